use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use axum::Router;
use outbox::{Hints, Operator, Outbox, Relay};
use service_runtime::{
    auth::AuthSettings,
    database::{self, PoolSettings},
    health::{self, Health},
    http::{self, HttpSettings},
    kafka::KafkaSettings,
    schema::SchemaCheck,
    supervise::{ProcessSettings, Supervisor},
    telemetry::Telemetry,
};
use sqlx::PgPool;
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    change_shipments::ChangeShipments,
    config::{
        DatabaseSettings, EventSettings, ListenSettings, RelaySettings, RelaySourceSettings, ServeSettings,
        SwitchSettings,
    },
    find_shipments::FindShipments,
    forget_answers,
    http::{Admin, Api, FlagAdmin},
    relay::{self, Publishing, SOURCE},
    schema::{MIGRATOR, SCHEMA},
    switch::Switch,
};

/// Nothing was done: the configuration is wrong, or the schema is behind.
pub const CONFIGURATION_ERROR: u8 = 2;

/// Of the flag: to compare, to roll out, and for who looks at it. Requests neither wait for them nor hold them up.
const FLAG_CONNECTIONS: u32 = 4;
/// Connections that are still busy when everything else has ended.
const POOL_CLOSE_DEADLINE: Duration = Duration::from_secs(1);

/// What one process does: serve the REST interface, relay, or both.
#[derive(Debug)]
pub struct Roles {
    pub database: DatabaseSettings,
    pub listen: ListenSettings,
    pub http: HttpSettings,
    pub process: ProcessSettings,
    pub auth: AuthSettings,
    pub source: RelaySourceSettings,
    pub kafka: KafkaSettings,
    pub api: Option<(EventSettings, SwitchSettings)>,
    pub relay: bool,
}

/// Serves until a signal or the first failure; the exit code says which.
pub fn run(roles: Roles, telemetry: &Telemetry) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "the runtime could not be started");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(serve(roles, telemetry.clone()));
    // What is left runs after its deadline: a lost answer is better than a process that does not end.
    runtime.shutdown_background();
    code
}

async fn serve(roles: Roles, telemetry: Telemetry) -> ExitCode {
    let deadline = roles.process.shutdown_deadline;
    let started = match start(roles, telemetry).await {
        Ok(started) => started,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the start was refused");
            return ExitCode::from(CONFIGURATION_ERROR);
        }
    };
    let ended = started.supervisor.run(deadline).await;
    if tokio::time::timeout(POOL_CLOSE_DEADLINE, started.pool.close())
        .await
        .is_err()
    {
        tracing::warn!("connections to the database are still in use");
    }
    match ended {
        _ if started.schema.is_behind() || started.switch.is_some_and(|switch| switch.is_refused()) => {
            ExitCode::from(CONFIGURATION_ERROR)
        }
        Ok(code) => code,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the process failed");
            ExitCode::FAILURE
        }
    }
}

struct Started {
    supervisor: Supervisor,
    switch: Option<Switch>,
    pool: PgPool,
    schema: Arc<SchemaCheck>,
}

/// Everything that can be refused is refused here, before the first task.
async fn start(roles: Roles, telemetry: Telemetry) -> anyhow::Result<Started> {
    let url = &roles.database.logistics_database_url;
    let pool = database::pool("logistics-svc", url, &roles.database.pool).context("LOGISTICS_DATABASE_URL")?;
    let publishing = Publishing::new(&roles.database, &roles.source, &roles.kafka)?;
    let grants = roles.auth.grants()?;
    let relay = roles.relay.then(|| publishing.relay()).transpose()?;
    let address = roles.listen.logistics_listen;
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))?;
    let migration_url = roles.database.logistics_migration_database_url.clone();
    let schema = Arc::new(SchemaCheck::new(pool.clone(), migration_url, SCHEMA, &MIGRATOR));

    let mut supervisor = Supervisor::new();
    let stop = supervisor.stop_token();
    supervisor.spawn("schema", check_schema(schema.clone(), stop.clone()));

    let probe =
        database::single_pool("logistics-health", url, &roles.database.pool).context("LOGISTICS_DATABASE_URL")?;
    let operations = health(&roles, &probe, &schema, relay.as_ref())
        .routes()
        .merge(http::metrics_routes(telemetry));
    let flag_pool = database::pool(
        "logistics-flag",
        url,
        &PoolSettings {
            database_max_connections: FLAG_CONNECTIONS,
            ..roles.database.pool.clone()
        },
    )
    .context("LOGISTICS_DATABASE_URL")?;
    let switch = match &roles.api {
        Some((_, settings)) => {
            let connections = roles.database.pool.database_max_connections;
            let switch = Switch::new(address.to_string(), &settings.commerce_group, connections)?;
            let (schema, stop) = (schema.clone(), stop.clone());
            let (flag, pool) = (switch.clone(), flag_pool.clone());
            let own =
                database::single_pool("logistics-flag", url, &roles.database.pool).context("LOGISTICS_DATABASE_URL")?;
            supervisor.spawn("flag", async move {
                if schema.is_current(&stop).await {
                    flag.run(own, pool, stop).await?;
                }
                Ok(())
            });
            Some(switch)
        }
        None => None,
    };
    let changes = roles.api.as_ref().zip(switch.clone()).map(|((events, _), switch)| {
        let outbox = Outbox::new(SCHEMA, SOURCE, events.max_event_bytes as usize);
        let hints = match (publishing.after_commit(), &relay) {
            (Some((publisher, hints)), _) => {
                let stop = stop.clone();
                supervisor.spawn("after-commit", async move {
                    publisher.run(stop).await;
                    Ok(())
                });
                hints
            }
            (None, Some(relay)) => Hints::to_relay(relay.wake()),
            (None, None) => Hints::default(),
        };
        ChangeShipments::new(pool.clone(), outbox, hints, switch, OffsetDateTime::now_utc)
    });
    let admin = Admin {
        // Counting a large outbox takes long: neither requests nor health checks wait for it.
        operator: Operator::new(
            SCHEMA,
            database::single_pool("logistics-admin", url, &roles.database.pool).context("LOGISTICS_DATABASE_URL")?,
        ),
        relay: relay.as_ref().map(Relay::status),
        mode: roles.source.relay_mode,
        grants: grants.clone(),
    };
    let app = match (&changes, &switch) {
        (Some(changes), Some(switch)) => {
            supervisor.spawn("forget-answers", forget_answers::run(pool.clone(), stop.clone()));
            let api = Api {
                changes: changes.clone(),
                shipments: FindShipments::new(pool.clone()),
                flag: FlagAdmin {
                    pool: flag_pool,
                    switch: switch.clone(),
                    grants,
                },
                load_test: roles.api.as_ref().is_some_and(|(events, _)| events.load_test_endpoint),
            };
            crate::http::app(Some(api), admin, operations, &roles.http)
        }
        _ => crate::http::app(None, admin, operations, &roles.http),
    };
    if let Some(relay) = relay {
        let (schema, stop) = (schema.clone(), stop.clone());
        supervisor.spawn("relay", async move {
            if schema.is_current(&stop).await {
                relay.run(stop).await;
            }
            Ok(())
        });
    }
    tracing::info!(%address, api = changes.is_some(), relay = roles.relay, "listening");
    supervisor.spawn("http", serve_http(listener, app, roles.http, changes, stop));
    Ok(Started {
        supervisor,
        switch,
        pool,
        schema,
    })
}

fn health(roles: &Roles, pool: &PgPool, schema: &Arc<SchemaCheck>, relay: Option<&Relay>) -> Health {
    let (pool, schema) = (pool.clone(), schema.clone());
    let health = Health::new()
        .required("database", move || health::database(pool.clone()))
        .required("schema", move || {
            let readiness = schema.readiness();
            async move { readiness }
        });
    let Some(status) = relay.map(Relay::status) else {
        return health;
    };
    let check = move || {
        let readiness = relay::readiness(&status);
        async move { readiness }
    };
    // Shipments are taken while Kafka is away; a process that only relays is of no use then.
    if roles.api.is_some() {
        health.degraded_without("relay", check)
    } else {
        health.required("relay", check)
    }
}

async fn check_schema(schema: Arc<SchemaCheck>, stop: CancellationToken) -> anyhow::Result<()> {
    schema.run(&stop).await?;
    stop.cancelled().await;
    Ok(())
}

/// No new requests → the answers under way → the units of work whose clients are gone.
async fn serve_http(
    listener: TcpListener,
    app: Router,
    settings: HttpSettings,
    changes: Option<ChangeShipments>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    http::serve(listener, app, &settings, stop).await?;
    if let Some(changes) = changes {
        changes.drain().await;
    }
    Ok(())
}

impl Roles {
    /// The REST interface, with a relay beside it or without.
    pub fn serving(settings: ServeSettings, relay: bool) -> Self {
        Self {
            database: settings.database,
            listen: settings.listen,
            http: settings.http,
            process: settings.process,
            auth: settings.auth,
            source: settings.source,
            kafka: settings.kafka,
            api: Some((settings.events, settings.switch)),
            relay,
        }
    }

    /// A relay alone.
    pub fn relaying(settings: RelaySettings) -> Self {
        Self {
            database: settings.database,
            listen: settings.listen,
            http: settings.http,
            process: settings.process,
            auth: settings.auth,
            source: settings.source,
            kafka: settings.kafka,
            api: None,
            relay: true,
        }
    }
}
