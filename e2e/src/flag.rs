//! The switch, as an operator turns it.

use std::time::Duration;

use anyhow::Context;
use reqwest::StatusCode;
use serde_json::Value;

/// For [`crate::pair::Running::start`]'s `extra`.
pub const ADMIN: (&str, &str) = ("ADMIN_TOKENS", "eve:admin:a-token-that-may-switch");
const TOKEN: &str = "a-token-that-may-switch";

/// The flag's interface of one API process.
#[derive(Clone)]
pub struct Flag {
    http: reqwest::Client,
    base: String,
}

impl Flag {
    /// `base` is the address of an API process that was started with [`ADMIN`].
    ///
    /// # Errors
    /// If the HTTP client cannot be made.
    pub fn new(base: &str) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().timeout(Duration::from_secs(10)).build()?;
        Ok(Self {
            http,
            base: base.to_owned(),
        })
    }

    /// The answer's status and body.
    ///
    /// # Errors
    /// If there is none.
    pub async fn ask(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<(StatusCode, Value)> {
        let mut request = self
            .http
            .request(method, format!("{}{path}", self.base))
            .bearer_auth(TOKEN);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await?;
        Ok((answer.status(), answer.json().await?))
    }

    /// # Errors
    /// Any answer but the one of success.
    pub async fn set(&self, value: &Value) -> anyhow::Result<Value> {
        let (status, view) = self.ask(reqwest::Method::PUT, "/admin/flag", Some(value)).await?;
        anyhow::ensure!(status.is_success(), "{value}: {status} {view}");
        Ok(view)
    }

    /// # Errors
    /// Any answer but the one of success.
    pub async fn read(&self, path: &str) -> anyhow::Result<Value> {
        let (status, view) = self.ask(reqwest::Method::GET, path, None).await?;
        anyhow::ensure!(status.is_success(), "{path}: {status} {view}");
        Ok(view)
    }

    /// The last roll-out.
    ///
    /// # Errors
    /// If there is none.
    pub async fn rollout(&self) -> anyhow::Result<Value> {
        let view = self.read("/admin/flag/rollout").await?;
        view["rollouts"].get(0).cloned().context("no roll-out")
    }
}
