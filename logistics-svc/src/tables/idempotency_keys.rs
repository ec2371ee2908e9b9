//! `logistics.idempotency_keys`: the gate in front of a change, and the answer kept behind it.

use sqlx::{FromRow, PgExecutor, PgTransaction};

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

#[derive(Debug, FromRow)]
struct Kept {
    /// Of the key, from 1.
    place: i64,
    request_hash: Vec<u8>,
    status: i32,
    location: Option<String>,
    response: String,
}

/// Tries the keys, which all differ; what each says stands at its place. The locks are let go by commit or rollback, whichever
/// ends the transaction. Waits for nobody.
pub async fn try_keys(tx: &mut PgTransaction<'_>, keys: &[&IdempotencyKey]) -> Result<Vec<Gate>, sqlx::Error> {
    let routes: Vec<&str> = keys.iter().map(|key| key.route).collect();
    let values: Vec<&str> = keys.iter().map(|key| key.value.as_str()).collect();
    // Two keys whose hashes collide refuse each other for a moment, and both succeed when repeated.
    let locked: Vec<bool> = sqlx::query_scalar(
        "SELECT pg_try_advisory_xact_lock(hashtextextended(route || ' ' || key, 0))
           FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS asked(route, key, place) ORDER BY place",
    )
    .bind(&routes)
    .bind(&values)
    .fetch_all(&mut **tx)
    .await?;
    // A statement of its own: only a snapshot younger than the locks sees what the previous holders committed.
    let kept: Vec<Kept> = sqlx::query_as(
        "SELECT place, request_hash, status, location, response::text AS response
           FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS asked(route, key, place)
           JOIN logistics.idempotency_keys AS kept USING (route, key)",
    )
    .bind(&routes)
    .bind(&values)
    .fetch_all(&mut **tx)
    .await?;
    let mut gates: Vec<Gate> = locked
        .into_iter()
        .map(|locked| if locked { Gate::Open } else { Gate::InProgress })
        .collect();
    for kept in kept {
        let place = usize::try_from(kept.place - 1).unwrap_or_default();
        let (Some(gate), Some(key)) = (gates.get_mut(place), keys.get(place)) else {
            continue;
        };
        if *gate == Gate::InProgress {
            continue;
        }
        *gate = if kept.request_hash == key.request_hash {
            Gate::Answered(Answer {
                status: u16::try_from(kept.status).unwrap_or(200),
                location: kept.location,
                body: kept.response,
            })
        } else {
            Gate::OtherRequest
        };
    }
    Ok(gates)
}

/// Keeps the answers, in the transaction of the changes they answer.
pub async fn keep(tx: &mut PgTransaction<'_>, answers: &[(&IdempotencyKey, &Answer)]) -> Result<(), sqlx::Error> {
    if answers.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO logistics.idempotency_keys (route, key, request_hash, status, location, response)
         SELECT route, key, request_hash, status, location, response::json
           FROM unnest($1::text[], $2::text[], $3::bytea[], $4::int[], $5::text[], $6::text[])
             AS new(route, key, request_hash, status, location, response)",
    )
    .bind(answers.iter().map(|(key, _)| key.route).collect::<Vec<_>>())
    .bind(answers.iter().map(|(key, _)| key.value.as_str()).collect::<Vec<_>>())
    .bind(
        answers
            .iter()
            .map(|(key, _)| key.request_hash.as_slice())
            .collect::<Vec<_>>(),
    )
    .bind(
        answers
            .iter()
            .map(|(_, answer)| i32::from(answer.status))
            .collect::<Vec<_>>(),
    )
    .bind(
        answers
            .iter()
            .map(|(_, answer)| answer.location.as_deref())
            .collect::<Vec<_>>(),
    )
    .bind(
        answers
            .iter()
            .map(|(_, answer)| answer.body.as_str())
            .collect::<Vec<_>>(),
    )
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
