use std::time::Duration;

use anyhow::Context;
use reqwest::StatusCode;
use serde_json::Value;
use tokio::time::Instant;
use uuid::Uuid;

/// A client of the logistics API that does what a careful one does: one key per intent, the same request again until
/// there is a definite answer.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    patience: Duration,
}

impl Client {
    /// `patience` is how long one intent is tried before the test has failed.
    ///
    /// # Errors
    /// If the HTTP client cannot be made.
    pub fn new(base: &str, patience: Duration) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().timeout(Duration::from_secs(20)).build()?;
        Ok(Self {
            http,
            base: base.to_owned(),
            patience,
        })
    }

    /// Repeats until the answer is 2xx. Refusals for reasons of time (503, 409 in progress, a lost connection) are
    /// tried again with the same key; any other answer is a failure of the test.
    ///
    /// # Errors
    /// An answer that a valid request must not get, or none in time.
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let key = Uuid::now_v7().to_string();
        let deadline = Instant::now() + self.patience;
        loop {
            let last = match self.attempt(path, body, &key).await {
                Ok((status, answer)) if status.is_success() => return Ok(answer),
                Ok((status, answer)) => {
                    let again = status == StatusCode::SERVICE_UNAVAILABLE
                        || (status == StatusCode::CONFLICT && answer["retryable"] == true);
                    anyhow::ensure!(again, "{path}: {status} {answer}");
                    answer.to_string()
                }
                Err(error) => format!("{error:#}"),
            };
            anyhow::ensure!(
                Instant::now() < deadline,
                "{path}: no answer in {:?}, last {last}",
                self.patience
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn attempt(&self, path: &str, body: &Value, key: &str) -> anyhow::Result<(StatusCode, Value)> {
        let url = format!("{}{path}", self.base);
        let response = self
            .http
            .post(url)
            .header("idempotency-key", key)
            .json(body)
            .send()
            .await?;
        let status = response.status();
        let text = response.text().await?;
        let answer = serde_json::from_str(&text).with_context(|| format!("{path}: {status} {text:?}"))?;
        Ok((status, answer))
    }

    /// One POST with a key of its own, whatever the answer is.
    ///
    /// # Errors
    /// If there is no answer or it is not JSON.
    pub async fn try_post(&self, path: &str, body: &Value) -> anyhow::Result<(StatusCode, Value)> {
        self.attempt(path, body, &Uuid::now_v7().to_string()).await
    }

    /// One GET, as JSON.
    ///
    /// # Errors
    /// If there is no answer or it is not JSON.
    pub async fn get(&self, path: &str) -> anyhow::Result<(StatusCode, Value)> {
        let response = self.http.get(format!("{}{path}", self.base)).send().await?;
        let status = response.status();
        Ok((status, response.json().await?))
    }
}
