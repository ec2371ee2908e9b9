use sqlx::{PgConnection, PgPool};

use crate::{
    flag::{Flag, Mode, Share},
    switch::Switch,
    tables::{
        flag_instances,
        flag_rollouts::{self, Rollout},
        flag_values, shadow,
    },
};

/// Who sets the flag on the way.
const BY: &str = "roll-out";
/// Commerce may be locked: then that is what is to be known.
const ASK_WITHIN: &str = "SET LOCAL statement_timeout = '1s'";
/// Of the table.
const LONGEST_REASON: usize = 500;
const SET_BY_ANOTHER: &str = "the flag was set by somebody else";
/// A ratio of fewer requests says nothing.
const FEWEST_REQUESTS: i64 = 20;

/// Every process looks once a second. After a longer pause nobody knows what the step would have met.
const UNWATCHED: f64 = 10.0;

/// One look at the roll-out that runs, by one process at a time: a condition that is met takes the flag back, a step that has
/// soaked under watch is followed by the next. All in one transaction, so a crash leaves the step as it was, and the next process looks.
///
/// # Errors
/// Any database error; nothing has changed then.
pub(crate) async fn advance(pool: &PgPool, switch: &Switch) -> Result<(), sqlx::Error> {
    let mut tx = pool.begin().await?;
    let Some(rollout) = flag_rollouts::lock_running(&mut tx).await? else {
        return tx.rollback().await;
    };
    let flag = flag_values::in_force(&mut *tx).await?;
    if flag.version != in_force(&rollout) {
        flag_rollouts::end(&mut tx, rollout.id, "superseded", SET_BY_ANOTHER).await?;
        tracing::warn!(
            rollout = rollout.id,
            version = flag.version,
            "the roll-out has ended, {SET_BY_ANOTHER}"
        );
        return tx.commit().await;
    }
    let unwatched = rollout
        .unwatched_seconds
        .filter(|pause| rollout.step > 0 && *pause > UNWATCHED);
    if let Some(pause) = unwatched {
        tracing::warn!(
            rollout = rollout.id,
            pause,
            "no process has watched the roll-out, its step soaks again"
        );
    }
    flag_rollouts::note_watched(&mut tx, rollout.id, unwatched.is_some()).await?;
    if rollout.step == 0 {
        step(&mut tx, &rollout, rollout.safe_version).await?;
    } else if let Some(because) = condition(&mut tx, &rollout, switch).await? {
        take_back(&mut tx, &rollout, &because).await?;
    } else if unwatched.is_none() && has_soaked(&mut tx, &rollout).await? {
        proceed(&mut tx, &rollout).await?;
    }
    tx.commit().await
}

/// The version that stands while nobody else sets the flag.
fn in_force(rollout: &Rollout) -> i64 {
    rollout.version.unwrap_or(rollout.safe_version)
}

/// The step has soaked: it is safe, and the next one begins, or there is none.
async fn proceed(tx: &mut PgConnection, rollout: &Rollout) -> Result<(), sqlx::Error> {
    if rollout.step as usize >= rollout.steps.len() {
        flag_rollouts::end(tx, rollout.id, "done", "every step has soaked").await?;
        tracing::info!(rollout = rollout.id, "the roll-out is done");
        return Ok(());
    }
    step(tx, rollout, in_force(rollout)).await
}

async fn step(tx: &mut PgConnection, rollout: &Rollout, safe_version: i64) -> Result<(), sqlx::Error> {
    let steps = rollout.steps.len();
    let share = rollout.steps.get(rollout.step as usize).copied();
    let value = share.and_then(Share::from_hundredths);
    let (Some(share), Some(mode), Some(rest)) = (value, Mode::from_name(&rollout.mode), Mode::from_name(&rollout.rest))
    else {
        // Of a newer release, perhaps.
        return flag_rollouts::end(
            tx,
            rollout.id,
            "superseded",
            "its next step is not one that this release knows",
        )
        .await;
    };
    let reason = format!("step {} of {steps} of roll-out {}", rollout.step + 1, rollout.id);
    let flag = Flag {
        version: 0,
        mode,
        rest,
        share,
    };
    let Some(flag) = flag_values::add(tx, flag, (BY, &reason), Some(rollout.id), Some(in_force(rollout))).await? else {
        return flag_rollouts::end(tx, rollout.id, "superseded", SET_BY_ANOTHER).await;
    };
    tracing::info!(
        rollout = rollout.id,
        percent = share.percent(),
        version = flag.version,
        reason,
        "the roll-out goes on"
    );
    let counts = flag_instances::requests_and_failures(&mut *tx).await?;
    let compared = shadow::compared(&mut *tx).await?;
    flag_rollouts::note_step(tx, rollout.id, (flag.version, safe_version), counts, compared).await
}

async fn take_back(tx: &mut PgConnection, rollout: &Rollout, because: &str) -> Result<(), sqlx::Error> {
    let safe = flag_values::of_version(&mut *tx, rollout.safe_version).await?;
    let mut reason = format!("roll-out {} is taken back: {because}", rollout.id);
    // It may quote the server, at any length; all of it stands with the roll-out.
    reason.truncate(reason.floor_char_boundary(LONGEST_REASON));
    let Some(flag) = flag_values::add(tx, safe, (BY, &reason), Some(rollout.id), Some(in_force(rollout))).await? else {
        return flag_rollouts::end(tx, rollout.id, "superseded", SET_BY_ANOTHER).await;
    };
    flag_rollouts::end(tx, rollout.id, "returned", because).await?;
    tracing::warn!(
        rollout = rollout.id,
        because,
        version = flag.version,
        mode = flag.mode.name(),
        percent = flag.share.percent(),
        "the roll-out is taken back"
    );
    Ok(())
}

/// Where mismatches count, something must have been compared: nothing found in nothing proves nothing.
async fn has_soaked(tx: &mut PgConnection, rollout: &Rollout) -> Result<bool, sqlx::Error> {
    if rollout.step_age_seconds.is_none_or(|age| age < rollout.soak_seconds) {
        return Ok(false);
    }
    let has_shadow = [&rollout.mode, &rollout.rest]
        .iter()
        .any(|mode| *mode == Mode::Shadow.name());
    if rollout.stop.most_mismatches.is_none() || !has_shadow {
        return Ok(true);
    }
    Ok(shadow::compared(tx).await? > rollout.compared_before.unwrap_or(0))
}

/// The stop condition that is met, in words.
async fn condition(tx: &mut PgConnection, rollout: &Rollout, switch: &Switch) -> Result<Option<String>, sqlx::Error> {
    if let Some(most) = rollout.stop.most_mismatches {
        let found = shadow::found_since(&mut *tx, rollout.started_at, most + 1).await?;
        if found > most {
            return Ok(Some(format!("shadow mode found more than {most} mismatches")));
        }
    }
    if let Some(most) = rollout.stop.most_error_ratio {
        let (requests, failures) = flag_instances::requests_and_failures(&mut *tx).await?;
        let requests = requests - rollout.requests_before.unwrap_or(0);
        let failures = failures - rollout.failures_before.unwrap_or(0);
        if requests >= FEWEST_REQUESTS && failures as f64 / requests as f64 > most {
            return Ok(Some(format!(
                "{failures} of {requests} requests failed, more than {most} of them"
            )));
        }
    }
    if rollout.stop.most_lag_seconds.is_none() && rollout.stop.most_dead_letters.is_none() {
        return Ok(None);
    }
    if let Some(unable) = switch.unable() {
        // Of several instances, those that can look decide.
        let instances = flag_instances::list(&mut *tx).await?;
        let others_can = instances.iter().any(|instance| instance.unable.is_none());
        return Ok((!others_can).then(|| format!("commerce cannot be looked at: {unable}")));
    }
    let old = match rollout.stop.most_lag_seconds {
        Some(seconds) => flag_rollouts::events_older_than(&mut *tx, seconds).await?,
        None => Vec::new(),
    };
    // What fails in it must not take the rest of this transaction with it.
    let mut savepoint = sqlx::Connection::begin(&mut *tx).await?;
    sqlx::raw_sql(ASK_WITHIN).execute(&mut *savepoint).await?;
    let health = switch
        .legacy()
        .commerce_health(&mut savepoint, &old, rollout.started_at)
        .await;
    savepoint.rollback().await?;
    let (dead_letters, lags) = match health {
        Ok(health) => health,
        Err(error) => return Ok(Some(format!("commerce cannot be looked at: {error}"))),
    };
    if let (Some(most), true) = (rollout.stop.most_lag_seconds, lags) {
        return Ok(Some(format!("commerce lags by more than {most} s")));
    }
    if let Some(most) = rollout.stop.most_dead_letters
        && dead_letters > most
    {
        return Ok(Some(format!("{dead_letters} new dead letters, more than {most}")));
    }
    Ok(None)
}
