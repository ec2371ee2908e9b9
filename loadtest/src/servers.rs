use std::{collections::HashMap, env, fs, os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use anyhow::Context;
use devstack::{
    database::{self, COMMERCE, LOGISTICS, RELAY},
    failure::{Exit, Failure},
    java::Java,
    kafka::{Kafka, KafkaOptions, Tuning},
    ports,
    postgres::{Postgres, PostgresOptions},
    process::Lifetime,
    progress::Progress,
    servers::Servers as Programs,
    testing::{KAFKA_BROKERS, ROLE_PASSWORD, TEST_DATABASE_URL},
};
use sqlx::{ConnectOptions, Connection, postgres::PgConnectOptions};
use tempfile::TempDir;
use url::Url;
use uuid::Uuid;

use crate::{cli::Where, topic};

/// The longest load on a fresh broker before anything is measured.
const WARM_UP: Duration = Duration::from_secs(90);
const WARM_UP_PARTITIONS: i32 = 12;

/// Where PostgreSQL and Kafka are. Servers that were started for the run end, and their files go, when this value is
/// dropped.
pub struct Servers {
    superuser: Url,
    passwords: Passwords,
    pub brokers: String,
    pub whose: &'static str,
    _own: Option<Own>,
}

/// Of the three roles that the services log in with.
enum Passwords {
    Same(String),
    /// By role.
    Each(HashMap<&'static str, String>),
}

/// The roles, and where docker-compose.yml has their passwords.
const PASSWORDS: [(&str, &str); 3] = [
    (LOGISTICS, "LOGISTICS_PASSWORD"),
    (RELAY, "RELAY_PASSWORD"),
    (COMMERCE, "COMMERCE_PASSWORD"),
];

/// In the order in which they must go: processes before their files.
struct Own {
    _postgres: Postgres,
    _kafka: Kafka,
    _dir: TempDir,
}

impl Servers {
    /// # Errors
    /// If a variable is missing, or a server does not start.
    pub async fn open(place: Where, progress: &Progress) -> anyhow::Result<Self> {
        match place {
            Where::Own => Self::start(progress).await,
            Where::Environment => Self::from_environment(),
        }
    }

    fn from_environment() -> anyhow::Result<Self> {
        let variable = |name: &str| {
            env::var(name).map_err(|_| {
                Failure::new(
                    Exit::Usage,
                    format!("--servers environment needs {name}, which is not set"),
                    "./dev up --only-servers, then eval \"$(./dev env)\"; or --servers own",
                )
            })
        };
        let url = variable(TEST_DATABASE_URL)?;
        Ok(Self {
            superuser: Url::parse(&url).with_context(|| format!("{TEST_DATABASE_URL} is not a URL"))?,
            passwords: match variable(ROLE_PASSWORD) {
                Ok(password) => Passwords::Same(password),
                Err(absent) => Passwords::of_each().ok_or(absent)?,
            },
            brokers: variable(KAFKA_BROKERS)?,
            whose: "environment",
            _own: None,
        })
    }

    /// With the settings of a local stack and Kafka's full compiler.
    async fn start(progress: &Progress) -> anyhow::Result<Self> {
        let dir = scratch_dir()?;
        let log = dir.path().join("fetch.log");
        let programs = Programs::ensure(&log, progress).await?;
        let step = progress.step("starting PostgreSQL and Kafka");
        let postgres = Postgres::start(
            &programs,
            PostgresOptions {
                dir: dir.path().join("postgres"),
                port: ports::reserve()?,
                password: Uuid::new_v4().simple().to_string(),
                log: dir.path().join("postgres.log"),
                lifetime: Lifetime::Bound,
                settings: Vec::new(),
            },
        )
        .await?;
        let mut kafka = Kafka::start(
            &programs,
            KafkaOptions {
                dir: dir.path().join("kafka"),
                java: Java::find()?.path,
                port: ports::reserve()?,
                controller_port: ports::reserve()?,
                log: dir.path().join("kafka.log"),
                tuning: Tuning::Throughput,
                lifetime: Lifetime::Bound,
            },
        )
        .await?;
        let role_password = Uuid::new_v4().simple().to_string();
        let superuser = Url::parse(&postgres.url("postgres")).context("the server's URL")?;
        let options: PgConnectOptions = superuser.as_str().parse().context("the server's URL")?;
        let mut connection = options.connect().await.context("connect to PostgreSQL")?;
        database::ensure_roles(&mut connection, &role_password).await?;
        connection.close().await.context("close the connection")?;
        step.done("PostgreSQL and Kafka of this run are up");
        let step = progress.step("warming up the broker");
        let pid = kafka.process().context("the broker has ended")?.identity().pid;
        let warm = topic::warm_up(&kafka.brokers(), WARM_UP_PARTITIONS, pid, WARM_UP).await?;
        step.done(if warm {
            "the broker is warm"
        } else {
            "the broker's compiler is still at work"
        });
        Ok(Self {
            superuser,
            passwords: Passwords::Same(role_password),
            brokers: kafka.brokers(),
            whose: "own",
            _own: Some(Own {
                _postgres: postgres,
                _kafka: kafka,
                _dir: dir,
            }),
        })
    }

    /// The superuser's URL of a database.
    pub fn owner_url(&self, database: &str) -> Url {
        let mut url = self.superuser.clone();
        url.set_path(database);
        url
    }

    /// The URL of a database for one of the services' roles.
    ///
    /// # Errors
    /// If the server's URL has no place for a login, or the role is none of the services'.
    pub fn role_url(&self, role: &str, database: &str) -> anyhow::Result<Url> {
        let password = match &self.passwords {
            Passwords::Same(password) => password,
            Passwords::Each(passwords) => passwords.get(role).with_context(|| format!("the password of {role}"))?,
        };
        let mut url = self.owner_url(database);
        url.set_username(role)
            .and_then(|()| url.set_password(Some(password)))
            .map_err(|()| anyhow::anyhow!("the URL of PostgreSQL has no place for a login"))?;
        Ok(url)
    }
}

impl Passwords {
    /// `None` unless the environment has all three.
    fn of_each() -> Option<Self> {
        let passwords = PASSWORDS.map(|(role, variable)| Some((role, env::var(variable).ok()?)));
        let passwords: Option<HashMap<_, _>> = passwords.into_iter().collect();
        passwords.map(Self::Each)
    }
}

/// A directory that the account of PostgreSQL can enter, unlike the usual temporary one.
fn scratch_dir() -> anyhow::Result<TempDir> {
    let dir = tempfile::Builder::new()
        .prefix("loadtest-")
        .tempdir()
        .context("create a directory")?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).context("open the directory")?;
    Ok(dir)
}

/// A program of the product, built beside this one.
///
/// # Errors
/// If it is not there.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let this = env::current_exe().context("find this program")?;
    let path = this.with_file_name(name);
    if !path.is_file() {
        return Err(Failure::new(
            Exit::Dependency,
            format!("{name} is not built beside this program"),
            "cargo build --workspace --bins, with --release for figures",
        )
        .into());
    }
    Ok(path)
}
