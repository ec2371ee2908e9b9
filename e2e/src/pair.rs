use std::time::Duration;

use anyhow::Context;
use devstack::testing::{Service, binary};

use crate::place::{Place, RETRY_DELAYS};

/// Until a process that was started says that it is ready.
pub const READY_DEADLINE: Duration = Duration::from_secs(60);
/// Until a process that was told to stop has drained; the services' own deadline is 25 s.
pub const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// One of the pair's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    Api,
    Relay,
    /// A second relay, on a port of its own.
    OtherRelay,
    /// API and relay in one process, on the API's port.
    ApiAndRelay,
    /// One of the consumer's instances, from 0 to below [`CONSUMERS`](crate::place::CONSUMERS).
    Consumer(usize),
}

/// A running process and how to start it again.
pub struct Running {
    pub service: Service,
    pub role: Role,
    port: u16,
}

impl Running {
    /// Starts the process with everything on its default but addresses, names and `extra`, and waits until it is ready.
    ///
    /// # Errors
    /// If it ends or is not ready in time; with the end of its log.
    pub async fn start(place: &Place, role: Role, extra: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mut running = Self::spawn(place, role, extra)?;
        running.ready().await?;
        Ok(running)
    }

    /// Starts the process and does not wait.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(place: &Place, role: Role, extra: &[(&str, &str)]) -> anyhow::Result<Self> {
        let (program, subcommand, port) = match role {
            Role::Api => ("logistics-svc", "api", place.api_port),
            Role::Relay => ("logistics-svc", "relay", place.relay_port),
            Role::OtherRelay => ("logistics-svc", "relay", place.other_relay_port),
            Role::ApiAndRelay => ("logistics-svc", "all", place.api_port),
            Role::Consumer(instance) => ("commerce-consumer", "consume", place.consumer_ports[instance]),
        };
        let listen = format!("127.0.0.1:{port}");
        let mut env = vec![
            ("LOGISTICS_DATABASE_URL", place.logistics_url.as_str()),
            ("LOGISTICS_RELAY_DATABASE_URL", &place.relay_url),
            ("LOGISTICS_LISTEN", &listen),
            ("COMMERCE_DATABASE_URL", &place.commerce_url),
            ("COMMERCE_LISTEN", &listen),
            ("COMMERCE_GROUP", place.topics.group()),
            ("KAFKA_BROKERS", &place.brokers),
            ("SHIPMENTS_TOPIC", place.topics.main()),
            ("RELAY_SLOT", &place.slot),
            ("RETRY_DELAYS", RETRY_DELAYS),
            ("LOG_FORMAT", "json"),
        ];
        env.extend_from_slice(extra);
        let service = Service::spawn(&binary(program)?, &[subcommand], &env)?;
        Ok(Self { service, role, port })
    }

    /// Waits for `/health/ready`.
    ///
    /// # Errors
    /// If the process ends or is not ready in time.
    pub async fn ready(&mut self) -> anyhow::Result<()> {
        let url = self.url("/health/ready");
        self.service
            .wait_ready(&url, READY_DEADLINE)
            .await
            .with_context(|| format!("{:?}", self.role))
    }

    /// Waits until the process answers at all.
    ///
    /// # Errors
    /// If it ends or does not answer in time.
    pub async fn live(&mut self) -> anyhow::Result<()> {
        let url = self.url("/health/live");
        self.service
            .wait_ready(&url, READY_DEADLINE)
            .await
            .with_context(|| format!("{:?}", self.role))
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// SIGTERM; the process must drain and end within its deadline with the code of a clean stop.
    ///
    /// # Errors
    /// If it hangs, or ends otherwise.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let status = self.service.terminate(STOP_DEADLINE).await?;
        anyhow::ensure!(
            status.code() == Some(143),
            "{:?} ended with {status}\n{}",
            self.role,
            self.service.log()?
        );
        Ok(())
    }

    /// A counter of the process, over all its labels; 0 if it has not counted yet.
    ///
    /// # Errors
    /// If the process does not answer.
    pub async fn counter(&self, name: &str) -> anyhow::Result<f64> {
        let metrics = reqwest::get(self.url("/metrics")).await?.text().await?;
        let lines = metrics.lines().filter(|line| line.starts_with(name));
        Ok(lines
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum())
    }

    /// Resident memory in KiB.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn resident_kib(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.service.pid()))?;
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .context("no VmRSS")?;
        line.split_whitespace()
            .nth(1)
            .and_then(|number| number.parse().ok())
            .context("VmRSS is not a number")
    }
}
