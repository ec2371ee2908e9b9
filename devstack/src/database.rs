//! What the services' migrations expect to find: three login roles and a database.

use anyhow::Context;
use sqlx::{AssertSqlSafe, PgConnection};

/// Of the logistics API.
pub const LOGISTICS: &str = "logistics_svc";
/// Of the relay; the only one with REPLICATION.
pub const RELAY: &str = "logistics_relay";
/// Of the commerce consumer.
pub const COMMERCE: &str = "commerce_svc";

/// The database of both services' schemas.
pub const DATABASE: &str = "shop";

const ROLES: [(&str, &str); 3] = [
    (LOGISTICS, "LOGIN NOREPLICATION"),
    (RELAY, "LOGIN REPLICATION"),
    (COMMERCE, "LOGIN NOREPLICATION"),
];

/// The roles of `roles` that exist already.
pub async fn existing_roles(connection: &mut PgConnection) -> anyhow::Result<Vec<String>> {
    let names: Vec<String> = ROLES.iter().map(|(name, _)| (*name).to_owned()).collect();
    sqlx::query_scalar("SELECT rolname::text FROM pg_roles WHERE rolname = ANY($1) ORDER BY 1")
        .bind(names)
        .fetch_all(connection)
        .await
        .context("list the roles")
}

/// Creates the roles that are missing and gives all of them `password`.
pub async fn ensure_roles(connection: &mut PgConnection, password: &str) -> anyhow::Result<()> {
    let existing = existing_roles(connection).await?;
    for (name, attributes) in ROLES {
        let verb = if existing.iter().any(|role| role == name) {
            "ALTER"
        } else {
            "CREATE"
        };
        let statement = format!(
            "{verb} ROLE {name} WITH {attributes} PASSWORD {}",
            quote_literal(password)
        );
        sqlx::query(AssertSqlSafe(statement))
            .execute(&mut *connection)
            .await
            .with_context(|| format!("create the role {name}"))?;
    }
    // For the synchronous path only, which says so with SET ROLE; nothing of it is inherited.
    let grant = format!("GRANT {COMMERCE} TO {LOGISTICS} WITH INHERIT FALSE, SET TRUE");
    sqlx::query(AssertSqlSafe(grant))
        .execute(connection)
        .await
        .context("let logistics act as commerce")?;
    Ok(())
}

/// Creates the database when it is missing.
pub async fn ensure_database(connection: &mut PgConnection, name: &str) -> anyhow::Result<()> {
    let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
        .bind(name)
        .fetch_one(&mut *connection)
        .await
        .context("look for the database")?;
    if !exists {
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {}", quote_identifier(name))))
            .execute(connection)
            .await
            .with_context(|| format!("create the database {name}"))?;
    }
    Ok(())
}

pub(crate) fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_containers_roles_have_the_same_rights() {
        let script = include_str!("../../compose/postgres/10-roles.sh");
        for (name, attributes) in ROLES {
            let line = format!("CREATE ROLE {name} WITH {attributes} PASSWORD ");
            assert!(script.contains(&line), "{line} is not in\n{script}");
        }
        let grant = format!("GRANT {COMMERCE} TO {LOGISTICS} WITH INHERIT FALSE, SET TRUE;");
        assert!(script.contains(&grant), "{grant} is not in\n{script}");
    }

    #[test]
    fn quotes_are_doubled_inside_names_and_literals() {
        assert_eq!(quote_identifier("a\"b"), "\"a\"\"b\"");
        assert_eq!(quote_literal("a'b"), "'a''b'");
    }
}
