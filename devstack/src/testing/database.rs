use std::time::Duration;

use anyhow::{Context, bail};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};
use uuid::Uuid;

use super::TestServers;
use crate::database::quote_identifier;

/// A database of one test. Dropped with its connections and replication slots when this value is dropped.
pub struct TestDatabase {
    servers: TestServers,
    name: String,
}

impl TestDatabase {
    /// A new database, cloned from a template that `prepare` fills once per run: it gets the superuser's URL of the
    /// empty template. The template's identity is `template` and `fingerprint`, for instance a hash of the
    /// migrations; several processes may ask for the same one at once.
    pub async fn create(
        servers: &TestServers,
        template: &str,
        fingerprint: &str,
        prepare: impl AsyncFnOnce(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let template = format!("template_{template}_{fingerprint}");
        if template.len() > 63 {
            bail!("the template name {template} is longer than the 63 bytes of a PostgreSQL name");
        }
        let mut connection = servers
            .superuser("postgres")
            .connect()
            .await
            .context("connect to PostgreSQL")?;
        ensure_template(&mut connection, servers, &template, prepare).await?;

        let name = format!("test_{}", Uuid::now_v7().simple());
        execute(
            &mut connection,
            format!(
                "CREATE DATABASE {} TEMPLATE {}",
                quote_identifier(&name),
                quote_identifier(&template)
            ),
        )
        .await
        .context("clone the template database")?;
        connection.close().await.context("close the connection")?;
        Ok(Self {
            servers: servers.clone(),
            name,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// For the superuser, who owns it.
    pub fn superuser_url(&self) -> String {
        self.servers.superuser_url(&self.name)
    }

    /// For one of the roles in [`crate::database`].
    pub fn url_for(&self, role: &str) -> anyhow::Result<String> {
        self.servers.role_url(role, &self.name)
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let options = self.servers.superuser("postgres");
        super::clean_up("the test database", || remove(options, &self.name));
    }
}

/// Finished templates carry the catalogue's template flag; one without it was left half-made and is made again.
async fn ensure_template(
    connection: &mut PgConnection,
    servers: &TestServers,
    template: &str,
    prepare: impl AsyncFnOnce(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if is_finished(connection, template).await? == Some(true) {
        return Ok(());
    }
    // Held by the session: released by the unlock below, or by the end of the connection after an error.
    sqlx::query("SELECT pg_advisory_lock(hashtextextended($1, 0))")
        .bind(template)
        .execute(&mut *connection)
        .await
        .context("lock the template")?;
    let found = is_finished(connection, template).await?;
    if found != Some(true) {
        let quoted = quote_identifier(template);
        if found.is_some() {
            execute(connection, format!("DROP DATABASE {quoted} WITH (FORCE)")).await?;
        }
        execute(connection, format!("CREATE DATABASE {quoted}")).await?;
        prepare(&servers.superuser_url(template))
            .await
            .context("prepare the template database")?;
        // Nobody may be connected to a template while it is cloned.
        execute(
            connection,
            format!("ALTER DATABASE {quoted} WITH ALLOW_CONNECTIONS false IS_TEMPLATE true"),
        )
        .await?;
        sqlx::query("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1")
            .bind(template)
            .execute(&mut *connection)
            .await
            .context("disconnect everybody from the template")?;
    }
    sqlx::query("SELECT pg_advisory_unlock(hashtextextended($1, 0))")
        .bind(template)
        .execute(connection)
        .await
        .context("unlock the template")?;
    Ok(())
}

async fn is_finished(connection: &mut PgConnection, template: &str) -> anyhow::Result<Option<bool>> {
    sqlx::query_scalar("SELECT datistemplate FROM pg_database WHERE datname = $1")
        .bind(template)
        .fetch_optional(connection)
        .await
        .context("look for the template database")
}

async fn remove(options: PgConnectOptions, name: &str) -> anyhow::Result<()> {
    let mut connection = options.connect().await.context("connect to PostgreSQL")?;
    // Nobody new may come while the slots are dropped: a reconnecting relay would take its slot again.
    execute(
        &mut connection,
        format!("ALTER DATABASE {} WITH ALLOW_CONNECTIONS false", quote_identifier(name)),
    )
    .await?;
    sqlx::query("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1")
        .bind(name)
        .execute(&mut connection)
        .await
        .context("disconnect everybody from the test database")?;
    let slots: Vec<String> = sqlx::query_scalar("SELECT slot_name::text FROM pg_replication_slots WHERE database = $1")
        .bind(name)
        .fetch_all(&mut connection)
        .await
        .context("list the replication slots")?;
    for slot in slots {
        drop_slot(&mut connection, &slot).await?;
    }
    execute(
        &mut connection,
        format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quote_identifier(name)),
    )
    .await?;
    connection.close().await.context("close the connection")
}

/// A slot stays active for a moment after its walsender was told to end.
async fn drop_slot(connection: &mut PgConnection, slot: &str) -> anyhow::Result<()> {
    for _ in 0..100 {
        let dropped = sqlx::query("SELECT pg_drop_replication_slot($1)")
            .bind(slot)
            .execute(&mut *connection)
            .await;
        match dropped {
            Ok(_) => return Ok(()),
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("55006") => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            // A temporary slot went with its walsender.
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42704") => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("drop the replication slot {slot}")),
        }
    }
    bail!("the replication slot {slot} is still in use after 5 s")
}

async fn execute(connection: &mut PgConnection, statement: String) -> anyhow::Result<()> {
    let shown = statement.clone();
    sqlx::query(AssertSqlSafe(statement))
        .execute(connection)
        .await
        .with_context(|| format!("execute {shown}"))?;
    Ok(())
}
