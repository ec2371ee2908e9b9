//! The process: settings → telemetry → tasks, and the exit code they end with.

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use axum::Router;
use commerce_consumer::{
    apply_shipment::ApplyShipment,
    cli,
    config::{Cli, Command, ConfigOutput, ConsumeSettings, ImportSettings, MigrateSettings},
    consume::{self, FloorWithoutLimit},
    http::{self, Admin, Api},
    import::{self, ImportError},
    rebuild::{self, RebuildSettings},
    schema::{MIGRATOR, SCHEMA},
};
use inbox::{Engine, Status, rebuild::Progress};
use service_runtime::{
    auth::GrantsError,
    database::{self, PoolSettings},
    health::{self, Health, Readiness},
    schema::{self, SchemaCheck, SchemaError},
    settings::{self, Effective},
    supervise::Supervisor,
    telemetry::Telemetry,
};
use sqlx::PgPool;
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_util::sync::CancellationToken;

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: u8 = 2;
const UNREACHABLE: u8 = 3;

/// Connections that are still busy when everything else has ended.
const POOL_CLOSE_DEADLINE: Duration = Duration::from_secs(1);

/// For all requests over HTTP together, beside those of the consumer.
const CONNECTIONS_FOR_PEOPLE: u32 = 4;

fn main() -> ExitCode {
    let (cli, effective) = settings::parse_or_exit::<Cli>();
    let ended = match cli.command {
        Command::Consume(settings) => consume(settings),
        Command::Migrate(settings) => migrate(&settings),
        Command::Import(settings) => import(&settings),
        Command::RebuildDeadLetters(settings) => rebuild(&settings),
        Command::Config(command) => {
            show(command.what, &effective);
            Ok(ExitCode::SUCCESS)
        }
        Command::Operate(command) => Ok(cli::run(&command)),
    };
    ended.unwrap_or_else(|error| {
        say(&format!("error: {error:#}"));
        exit_code(&error)
    })
}

/// What a script that started us can act on.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    if let Some(SchemaError::Unreachable(_)) = error.downcast_ref() {
        return ExitCode::from(UNREACHABLE);
    }
    // An address that cannot be listened on, or a URL that is none: nothing was done.
    let is_configuration = error.is::<std::io::Error>()
        || error.is::<GrantsError>()
        || error.is::<FloorWithoutLimit>()
        || matches!(error.downcast_ref(), Some(sqlx::Error::Configuration(_)));
    if is_configuration {
        return ExitCode::from(USAGE);
    }
    if error.downcast_ref().is_some_and(rebuild::is_unreachable) {
        return ExitCode::from(UNREACHABLE);
    }
    match error.downcast_ref() {
        Some(ImportError::Files(_)) => ExitCode::from(USAGE),
        Some(ImportError::Database(sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut)) => ExitCode::from(UNREACHABLE),
        _ => ExitCode::FAILURE,
    }
}

fn consume(settings: ConsumeSettings) -> anyhow::Result<ExitCode> {
    let telemetry = Telemetry::install("commerce-consumer", &settings.process.telemetry)?;
    let runtime = Runtime::new().context("the runtime could not be started")?;
    let ended = runtime.block_on(run(settings, telemetry.clone()));
    // What is left runs after its deadline: repeated work is better than a process that does not end.
    runtime.shutdown_background();
    // Outside async code: the last export blocks.
    telemetry.flush();
    ended
}

async fn run(settings: ConsumeSettings, telemetry: Telemetry) -> anyhow::Result<ExitCode> {
    let ConsumeSettings {
        database,
        listen,
        http,
        group,
        kafka,
        auth,
        process,
    } = settings;
    let grants = auth.grants()?;
    let pool = database::pool("commerce-consumer", &database.commerce_database_url, &database.pool)
        .context("COMMERCE_DATABASE_URL is not a database URL")?;
    let listener = TcpListener::bind(listen.commerce_listen)
        .await
        .with_context(|| format!("COMMERCE_LISTEN {} cannot be used", listen.commerce_listen))?;
    let schema = Arc::new(SchemaCheck::new(
        pool.clone(),
        database.commerce_migration_database_url,
        SCHEMA,
        &MIGRATOR,
    ));
    let engine = consume::engine(&group, pool.clone(), kafka.client_config("commerce-consumer"))?;

    // What people ask, a hundred thousand dead letters at once even, must not take the connections that events need.
    let for_people = PoolSettings {
        database_max_connections: CONNECTIONS_FOR_PEOPLE,
        ..database.pool.clone()
    };
    let for_people = database::pool("commerce-http", &database.commerce_database_url, &for_people)
        .context("COMMERCE_DATABASE_URL is not a database URL")?;

    let operations = operations(&pool, &schema, engine.status(), telemetry);
    let admin = Admin {
        operator: engine.operator(for_people.clone()),
        dry_run: engine.dry_run(for_people.clone()),
        pass: engine.pass(for_people.clone()),
        status: engine.status(),
        limits: engine.limits(),
        controls: engine.controls(),
        grants,
        letters_retention: group.dead_letters_retention.0,
    };
    let api = Api {
        pool: for_people.clone(),
        group: group.commerce_group,
    };
    let app = http::app(api, admin, operations, &http);
    let address = listener.local_addr()?;
    tracing::info!(%address, topic = group.shipments_topic, "listening");

    let mut supervisor = Supervisor::new();
    let stop = supervisor.stop_token();
    supervisor.spawn("http", {
        let stop = stop.clone();
        async move { Ok(service_runtime::http::serve(listener, app, &http, stop).await?) }
    });
    supervisor.spawn("consumer", consumer(schema.clone(), engine, stop));
    let code = supervisor.run(process.shutdown_deadline).await?;
    let closed = async { tokio::join!(pool.close(), for_people.close()) };
    if tokio::time::timeout(POOL_CLOSE_DEADLINE, closed).await.is_err() {
        tracing::warn!("connections to the database are still in use");
    }
    Ok(if schema.is_behind() {
        ExitCode::from(USAGE)
    } else {
        code
    })
}

async fn consumer(
    schema: Arc<SchemaCheck>,
    engine: Engine<ApplyShipment>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    schema.run(&stop).await?;
    if schema.is_current(&stop).await {
        engine.run(stop).await?;
    }
    Ok(())
}

/// Health and metrics: what answers whatever the service's load.
fn operations(pool: &PgPool, schema: &Arc<SchemaCheck>, status: Status, telemetry: Telemetry) -> Router {
    let (pool, schema, consumer) = (pool.clone(), Arc::clone(schema), status.clone());
    Health::new()
        .required("database", move || health::database(pool.clone()))
        .required("schema", move || std::future::ready(schema.readiness()))
        .required("kafka", move || std::future::ready(kafka(&status)))
        .degraded_without("consumer", move || {
            let snapshot = consumer.snapshot();
            let by_operator = snapshot
                .paused_by_operator
                .map(|reason| format!("paused by an operator: {reason}"));
            let paused = snapshot.paused.or(by_operator);
            std::future::ready(paused.map_or(Readiness::Ready, Readiness::NotReady))
        })
        .routes()
        .merge(service_runtime::http::metrics_routes(telemetry))
}

fn kafka(status: &Status) -> Readiness {
    let snapshot = status.snapshot();
    match snapshot.broker_fault {
        Some(reason) => Readiness::NotReady(reason),
        None if !snapshot.joined => Readiness::NotReady("the consumer has not joined its group yet".to_owned()),
        None => Readiness::Ready,
    }
}

fn migrate(settings: &MigrateSettings) -> anyhow::Result<ExitCode> {
    let runtime = Runtime::new().context("the runtime could not be started")?;
    runtime.block_on(schema::migrate(
        &settings.commerce_migration_database_url,
        SCHEMA,
        &MIGRATOR,
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn import(settings: &ImportSettings) -> anyhow::Result<ExitCode> {
    let runtime = Runtime::new().context("the runtime could not be started")?;
    let imported = runtime.block_on(async {
        let database = &settings.database;
        let pool = database::pool("commerce-import", &database.commerce_database_url, &database.pool)
            .context("COMMERCE_DATABASE_URL is not a database URL")?;
        if let Some(url) = &database.commerce_migration_database_url {
            schema::migrate(url, SCHEMA, &MIGRATOR).await?;
        }
        anyhow::Ok(import::import(&pool, &settings.dir).await?)
    })?;
    let import::Imported {
        orders,
        lines,
        products,
    } = imported;
    say(&format!(
        "imported {orders} orders, {lines} lines, {products} products; what was there before is unchanged"
    ));
    Ok(ExitCode::SUCCESS)
}

fn rebuild(settings: &RebuildSettings) -> anyhow::Result<ExitCode> {
    let runtime = Runtime::new().context("the runtime could not be started")?;
    runtime.block_on(rebuild::rebuild(settings, |progress| {
        let Progress { read, of, added } = progress;
        say(&format!("read {read} of {of} records, added {added} dead letters"));
    }))?;
    Ok(ExitCode::SUCCESS)
}

#[expect(clippy::print_stdout, reason = "the result of the command")]
fn show(what: ConfigOutput, effective: &Effective) {
    match what {
        ConfigOutput::Show => print!("{}", effective.to_text()),
        ConfigOutput::Docs => print!("{}", effective.to_markdown()),
    }
}

#[expect(clippy::print_stderr, reason = "for the person at the terminal")]
fn say(line: &str) {
    eprintln!("{line}");
}
