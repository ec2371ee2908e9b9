//! `logistics.idempotency_keys`: the gate in front of a change, and the answer kept behind it.

use sqlx::{PgExecutor, PgTransaction};

use crate::idempotency::{Answer, IdempotencyKey};

/// What a client's key says about its request.
#[derive(Debug, PartialEq, Eq)]
pub enum Gate {
    /// First call: the key is locked until the transaction ends.
    Open,
    /// The same request was answered before.
    Answered(Answer),
    /// The same key is being worked on right now.
    InProgress,
    /// The key was used for another request.
    OtherRequest,
}

/// Tries the key. The lock is let go by commit or rollback, whichever ends the transaction.
pub async fn try_key(tx: &mut PgTransaction<'_>, key: &IdempotencyKey) -> Result<Gate, sqlx::Error> {
    // Two keys whose hashes collide refuse each other for a moment, and both succeed when repeated.
    let locked: bool = sqlx::query_scalar("SELECT pg_try_advisory_xact_lock(hashtextextended($1 || ' ' || $2, 0))")
        .bind(key.route)
        .bind(&key.value)
        .fetch_one(&mut **tx)
        .await?;
    if !locked {
        return Ok(Gate::InProgress);
    }
    // A statement of its own: only a snapshot younger than the lock sees what the previous holder committed.
    let kept: Option<(Vec<u8>, i32, Option<String>, String)> = sqlx::query_as(
        "SELECT request_hash, status, location, response::text
           FROM logistics.idempotency_keys WHERE route = $1 AND key = $2",
    )
    .bind(key.route)
    .bind(&key.value)
    .fetch_optional(&mut **tx)
    .await?;
    Ok(match kept {
        None => Gate::Open,
        Some((request_hash, ..)) if request_hash != key.request_hash => Gate::OtherRequest,
        Some((_, status, location, body)) => Gate::Answered(Answer {
            status: u16::try_from(status).unwrap_or(200),
            location,
            body,
        }),
    })
}

/// Keeps the answer, in the transaction of the change it answers.
pub async fn keep(tx: &mut PgTransaction<'_>, key: &IdempotencyKey, answer: &Answer) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO logistics.idempotency_keys (route, key, request_hash, status, location, response)
         VALUES ($1, $2, $3, $4, $5, $6::text::json)",
    )
    .bind(key.route)
    .bind(&key.value)
    .bind(key.request_hash.as_slice())
    .bind(i32::from(answer.status))
    .bind(answer.location.as_deref())
    .bind(&answer.body)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Deletes up to `limit` answers older than 24 hours, the oldest first; returns how many.
pub async fn delete_expired(executor: impl PgExecutor<'_>, limit: i64) -> Result<u64, sqlx::Error> {
    let deleted = sqlx::query(
        "DELETE FROM logistics.idempotency_keys
          WHERE (route, key) IN (SELECT route, key FROM logistics.idempotency_keys
                                  WHERE created_at < now() - interval '24 hours'
                                  ORDER BY created_at LIMIT $1)",
    )
    .bind(limit)
    .execute(executor)
    .await?;
    Ok(deleted.rows_affected())
}
