use std::time::Duration;

use anyhow::Context;
use outbox::{AfterCommit, Hints, Lifecycle, Mode, Relay, RelayState, WalBudget};
use service_runtime::{database, health::Readiness, kafka::KafkaSettings};
use sqlx::PgPool;

use crate::{
    config::{DatabaseSettings, RelayLifecycle, RelayMode, RelaySourceSettings},
    schema::SCHEMA,
};

/// `ce_source` of this service's events.
pub const SOURCE: &str = "logistics";

/// Three times what the news of a stall takes, and half of what an operator would need to act on it.
const SILENT_AFTER: Duration = Duration::from_secs(30);

/// What this service's publishers work with: its outbox table, its slot, its topic.
pub struct Publishing {
    settings: outbox::RelaySettings,
    pool: PgPool,
    kafka: KafkaSettings,
}

impl Publishing {
    /// # Errors
    /// A URL that is not one.
    pub fn new(
        database: &DatabaseSettings,
        source: &RelaySourceSettings,
        kafka: &KafkaSettings,
    ) -> anyhow::Result<Self> {
        // The API's own login may not mark rows; everything it publishes would be published again.
        anyhow::ensure!(
            source.relay_mode != RelayMode::AfterCommit || source.logistics_relay_database_url.is_some(),
            "RELAY_MODE=after-commit needs LOGISTICS_RELAY_DATABASE_URL"
        );
        let url = source
            .logistics_relay_database_url
            .as_ref()
            .unwrap_or(&database.logistics_database_url);
        // A pool of its own: neither requests nor marks wait for each other's connections.
        let pool = database::pool("logistics-relay", url, &database.pool).context("LOGISTICS_RELAY_DATABASE_URL")?;
        let settings = outbox::RelaySettings {
            mode: match source.relay_mode {
                RelayMode::Wal => Mode::Wal,
                RelayMode::Poll => Mode::Poll,
                RelayMode::AfterCommit => Mode::AfterCommit,
                RelayMode::External => Mode::External,
                RelayMode::Auto => Mode::Auto,
            },
            lifecycle: match source.relay_lifecycle {
                RelayLifecycle::Off => Lifecycle::Off,
                RelayLifecycle::Published => Lifecycle::Published,
                RelayLifecycle::Full => Lifecycle::Full,
            },
            database_url: url.expose().to_owned(),
            schema: SCHEMA.to_owned(),
            slot: source.relay_slot.clone(),
            publication: source.relay_publication.clone(),
            wal_budget: WalBudget {
                bytes: source.relay_wal_budget_bytes,
                age: source.relay_wal_budget_age,
            },
            topic: source.shipments_topic.clone(),
            source: SOURCE.to_owned(),
            max_in_flight: source.relay_max_in_flight as usize,
            max_in_flight_bytes: source.relay_max_in_flight_bytes as usize,
            linger: source.relay_linger,
            silent_after: SILENT_AFTER,
            poll_interval: source.relay_poll_interval,
            sweep_after: source.relay_sweep_after,
            confirm_group: source.relay_confirm_group.clone(),
            confirm_within: source.relay_confirm_within,
            retention: source.outbox_retention,
        };
        Ok(Self {
            settings,
            pool,
            kafka: kafka.clone(),
        })
    }

    /// The relay.
    ///
    /// # Errors
    /// A slot name that is not one.
    pub fn relay(&self) -> anyhow::Result<Relay> {
        let kafka = self.kafka.client_config("logistics-relay");
        Relay::new(self.settings.clone(), self.pool.clone(), kafka).context("relay")
    }

    /// The publisher of what this process commits, in mode `after-commit`, and how it hears of commits.
    pub fn after_commit(&self) -> Option<(AfterCommit, Hints)> {
        let kafka = self.kafka.client_config("logistics-after-commit");
        (self.settings.mode == Mode::AfterCommit)
            .then(|| AfterCommit::new(self.settings.clone(), self.pool.clone(), kafka))
    }
}

/// For `/health/ready`: a relay that stands by is as ready as one that streams.
pub fn readiness(status: &outbox::Status) -> Readiness {
    match status.get() {
        (RelayState::Streaming | RelayState::Polling | RelayState::Standby | RelayState::Sweeping, _) => {
            Readiness::Ready
        }
        (state, lasted) => Readiness::NotReady(format!("{state}, for {} s", lasted.as_secs())),
    }
}
