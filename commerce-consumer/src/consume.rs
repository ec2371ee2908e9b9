use std::time::Duration;

use anyhow::Context;
use inbox::{
    Engine, FloodLimit, GroupProtocol, Membership, Ordering, Pace, Parking, Rate, Schedule, Settings, Table,
    UnknownTypes,
};
use rdkafka::ClientConfig;
use shared_events::topics::GroupTopics;
use sqlx::PgPool;

use crate::{
    apply_shipment::ApplyShipment,
    config::{self, GroupSettings, OrderingSettings},
    schema::SCHEMA,
};

/// A few statements of at most DATABASE_STATEMENT_TIMEOUT each; far above any batch that still makes progress.
const TRANSACTION_LIMIT: Duration = Duration::from_secs(60);

/// Events that the share of dead letters is taken of.
const FLOOD_WINDOW: u32 = 1_000;

/// A floor is a share of a limit.
#[derive(Debug, thiserror::Error)]
#[error("RATE_FLOOR needs a RATE_LIMIT that is a number and not below it")]
pub struct FloorWithoutLimit;

/// The engine of this service, ready to run. `client_config` holds the brokers' addresses and security.
///
/// # Errors
/// [`FloorWithoutLimit`]; none that this service's constants could cause.
pub fn engine(
    settings: &GroupSettings,
    pool: PgPool,
    client_config: ClientConfig,
) -> anyhow::Result<Engine<ApplyShipment>> {
    let table = Table::new(SCHEMA, &settings.commerce_group).context("the inbox table")?;
    let unknown_types = match settings.unknown_types {
        config::UnknownTypes::Skip => UnknownTypes::Skip,
        config::UnknownTypes::DeadLetter => UnknownTypes::DeadLetter,
    };
    let settings = Settings {
        topics: GroupTopics::new(&settings.shipments_topic, &settings.commerce_group),
        schedule: Schedule::new(settings.retry_delays.0.clone()),
        batch_limit: settings.batch_limit as usize,
        transaction_limit: TRANSACTION_LIMIT,
        max_transactions: settings.max_transactions as usize,
        rate_limit: settings.rate_limit,
        retry_rate_limit: settings.retry_rate_limit,
        redrive_rate_limit: settings.redrive_rate_limit,
        pace: pace(settings)?,
        membership: Membership {
            protocol: match settings.membership.group_protocol {
                config::GroupProtocol::Classic => GroupProtocol::Classic,
                config::GroupProtocol::Consumer => GroupProtocol::Consumer,
            },
            instance_id: settings.membership.group_instance_id.0.clone(),
            poll_interval: None,
        },
        unknown_types,
        ordering: ordering(&settings.ordering),
        flood_limit: FloodLimit {
            run: settings.flood.dead_letter_run,
            ratio: f64::from(settings.flood.dead_letter_percent) / 100.0,
            window: FLOOD_WINDOW,
            resume_after: settings.flood.flood_resume_after.0,
        },
        letters_retention: settings.dead_letters_retention.0,
        join_trace: service_runtime::telemetry::set_parent,
        consumer_version: concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")),
    };
    Ok(Engine::new(
        settings,
        pool,
        table,
        client_config,
        ApplyShipment { unknown_types },
    ))
}

pub(crate) fn ordering(settings: &OrderingSettings) -> Ordering {
    match settings.ordering {
        config::Ordering::None => Ordering::None,
        config::Ordering::PerKey => Ordering::PerKey(Parking {
            most_per_key: settings.parked_per_key,
            most_in_all: settings.parked_in_all,
            released_by: settings.dead_letters_release.0.clone(),
        }),
    }
}

fn pace(settings: &GroupSettings) -> Result<Option<Pace>, FloorWithoutLimit> {
    let Some(floor) = settings.pace.rate_floor.0 else {
        return Ok(None);
    };
    match settings.rate_limit {
        Rate::PerSecond(limit) if floor <= limit => Ok(Some(Pace {
            floor,
            commit_within: settings.pace.rate_commit_within.0,
            lock_waits: settings.pace.rate_lock_waits,
        })),
        Rate::PerSecond(_) | Rate::Unlimited => Err(FloorWithoutLimit),
    }
}
