use anyhow::Context;
use clap::Args;
use inbox::{Rebuild, RebuildError, Table, rebuild::Progress};
use service_runtime::{database, kafka::KafkaSettings};
use shared_events::topics::GroupTopics;

use crate::{
    config::{DatabaseSettings, GroupSettings},
    consume,
    schema::SCHEMA,
};

#[derive(Debug, Clone, Args)]
pub struct RebuildSettings {
    #[command(flatten)]
    pub database: DatabaseSettings,
    #[command(flatten)]
    pub group: GroupSettings,
    #[command(flatten)]
    pub kafka: KafkaSettings,
}

/// Adds the dead letters that the table lacks and their topic has. Safe to repeat, also while the consumer runs.
///
/// # Errors
/// [`RebuildError`], or a database URL that is none.
pub async fn rebuild(settings: &RebuildSettings, tell: impl FnMut(Progress)) -> anyhow::Result<Progress> {
    let RebuildSettings { database, group, kafka } = settings;
    let rebuild = Rebuild {
        table: Table::new(SCHEMA, &group.commerce_group).context("the inbox table")?,
        pool: database::pool("commerce-rebuild", &database.commerce_database_url, &database.pool)
            .context("COMMERCE_DATABASE_URL is not a database URL")?,
        client_config: kafka.client_config("commerce-rebuild"),
        topics: GroupTopics::new(&group.shipments_topic, &group.commerce_group),
        ordering: consume::ordering(&group.ordering),
    };
    Ok(rebuild.run(tell).await?)
}

/// Whether a rebuild has ended because the brokers or the database do not answer.
pub fn is_unreachable(error: &RebuildError) -> bool {
    use rdkafka::{error::KafkaError, types::RDKafkaErrorCode};
    match error {
        RebuildError::Silent(_) | RebuildError::Database(sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut) => true,
        RebuildError::Client(KafkaError::MetadataFetch(code)) => matches!(
            code,
            RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::OperationTimedOut
                | RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::Resolve
        ),
        RebuildError::Client(_) | RebuildError::TopicMissing(_) | RebuildError::Database(_) | RebuildError::Defect => {
            false
        }
    }
}
