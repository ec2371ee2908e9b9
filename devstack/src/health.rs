//! Waiting for a service to say that it is ready.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::process::Process;

const POLL: Duration = Duration::from_millis(50);

/// Waits until a GET of `url` answers 200. Errors when the process ends or `deadline` passes, with the end of its log
/// and the last answer.
pub async fn wait_until_ready(process: &mut Process, url: &str, deadline: Duration) -> anyhow::Result<()> {
    let client = client()?;
    let end = Instant::now() + deadline;
    loop {
        if let Some(status) = process.exited()? {
            bail!(
                "{} ended ({status}); end of {}:\n{}",
                process.name(),
                process.log().display(),
                process.log_tail(20)
            );
        }
        let answer = match client.get(url).send().await {
            Ok(response) if response.status().is_success() => return Ok(()),
            Ok(response) => format!("{} {}", response.status(), response.text().await.unwrap_or_default()),
            Err(error) => format!("{:#}", anyhow::Error::from(error)),
        };
        if Instant::now() >= end {
            bail!(
                "{} was not ready within {} s; last answer of {url}: {answer}; end of {}:\n{}",
                process.name(),
                deadline.as_secs(),
                process.log().display(),
                process.log_tail(20)
            );
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Whether a GET of `url` answers 200 now.
pub async fn is_ready(url: &str) -> anyhow::Result<bool> {
    Ok(client()?
        .get(url)
        .send()
        .await
        .is_ok_and(|response| response.status().is_success()))
}

fn client() -> anyhow::Result<reqwest::Client> {
    reqwest::Client::builder()
        .timeout(Duration::from_secs(5))
        .no_proxy()
        .build()
        .context("build the HTTP client")
}
