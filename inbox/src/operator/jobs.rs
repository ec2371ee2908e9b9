use sqlx::{FromRow, PgConnection};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Actor, LetterFilter, MEANT, Operator, bind_filter};
use crate::crash_point;

/// How a job goes about its letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// So many letters go first, and the rest only when all of them are settled; at least 1.
    pub canary: u32,
    /// Letters that are let go in a second, at most; at least 1. The redrive limit of the group holds beside it.
    pub rate: u32,
    /// The job is given up if a larger share of its settled letters died again; 0 to 100.
    pub abort_percent: u32,
}

/// A redrive of many letters, and how far it is.
#[derive(Debug, Clone, PartialEq, FromRow)]
pub struct Job {
    pub id: Uuid,
    /// `canary`, `running`, `cancelled`, `succeeded` or `failed`.
    pub state: String,
    /// JSON.
    pub filter: String,
    /// Meant when it began.
    pub letters: i64,
    pub canary: i64,
    pub rate: i32,
    pub abort_percent: i32,
    pub ended_because: Option<String>,
    pub actor: String,
    pub reason: String,
    pub created_at: OffsetDateTime,
    pub ended_at: Option<OffsetDateTime>,
    /// Let go so far; each of them is one of the next four.
    pub sent: i64,
    pub took_effect: i64,
    pub died_again: i64,
    /// Behind a letter of their key that is dead, or behind an event that has not come.
    pub held_back: i64,
    pub on_their_way: i64,
}

/// What a filter means for a job that would begin now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromRow)]
pub struct Eligible {
    /// Open letters that are meant.
    pub matched: i64,
    /// Of them, those of keys that another job works on.
    pub busy: i64,
    /// Of them, records that are no events: nothing can be done with them.
    pub unreadable: i64,
}

const JOB: &str =
    "id, state, filter::text AS filter, letters, canary, rate, abort_percent, ended_because, actor, reason,
    created_at, ended_at";

/// What became of a job's letters. One that waits behind a dead one of its key is still `redriving` itself.
const COUNTED: &str = "SELECT count(*) FILTER (WHERE letter.job_sent_at IS NOT NULL) AS sent,
       count(*) FILTER (WHERE letter.job_sent_at IS NOT NULL AND letter.state = 'resolved') AS took_effect,
       count(*) FILTER (WHERE letter.job_sent_at IS NOT NULL AND letter.state = 'open') AS died_again,
       count(*) FILTER (WHERE letter.job_sent_at IS NOT NULL AND letter.state = 'redriving'
                          AND held.state IN ('dead', 'waiting')) AS held_back,
       count(*) FILTER (WHERE letter.job_sent_at IS NOT NULL AND letter.state = 'redriving'
                          AND held.state IS DISTINCT FROM 'dead' AND held.state IS DISTINCT FROM 'waiting') AS on_their_way
  FROM {schema}.dead_letters AS letter
  LEFT JOIN {schema}.held_keys AS held
    ON held.consumer = letter.consumer AND held.aggregate_type = letter.aggregate_type
       AND held.aggregate_id = letter.aggregate_id";

/// A job's counts of [`COUNTED`], with those that a later job has taken over.
const COUNTS: &str = "counted.sent + job.taken_over AS sent, counted.took_effect,
    counted.died_again + job.taken_over AS died_again, counted.held_back, counted.on_their_way";

/// Letters of keys that a job works on which is not ended. Asked once and not for each letter: in a table that has just filled,
/// the server knows too little to choose the right index for that, and reads all letters for every one of them.
const BUSY: &str = "(letter.aggregate_type, letter.aggregate_id) IN (
    SELECT other.aggregate_type, other.aggregate_id
      FROM {schema}.redrive_jobs AS job
      JOIN {schema}.dead_letters AS other ON other.consumer = job.consumer AND other.job = job.id
     WHERE job.consumer = $1 AND job.ended_at IS NULL AND other.aggregate_id IS NOT NULL)";

/// For statements over all letters of a filter: time for them, and memory for the keys of [`BUSY`], of which 1,000,000 fit.
const OVER_ALL: &str = "SELECT set_config('statement_timeout', '5min', true), set_config('work_mem', '128MB', true)";

impl Operator {
    /// What a job with this filter would mean now.
    ///
    /// # Errors
    /// Any database error.
    pub async fn eligible(&self, filter: &LetterFilter) -> Result<Eligible, sqlx::Error> {
        let sql = format!(
            "SELECT count(*) AS matched, count(*) FILTER (WHERE aggregate_id IS NULL) AS unreadable,
                    count(*) FILTER (WHERE {BUSY}) AS busy
               FROM {{schema}}.dead_letters AS letter WHERE {MEANT} AND state = 'open'"
        );
        let mut transaction = self.pool.begin().await?;
        sqlx::query(OVER_ALL).execute(&mut *transaction).await?;
        let eligible = bind_filter!(sqlx::query_as(self.table.sql(&sql)), self.table.consumer(), filter)
            .fetch_one(&mut *transaction)
            .await?;
        transaction.rollback().await?;
        Ok(eligible)
    }

    /// Begins a job over the open letters that a filter means and whose keys no other job works on. `None` if there are none.
    /// `described` is the filter as it was asked for, JSON.
    ///
    /// # Errors
    /// Any database error; nothing has begun then.
    pub async fn begin_job(
        &self,
        filter: &LetterFilter,
        described: &str,
        plan: Plan,
        actor: Actor<'_>,
    ) -> Result<Option<Uuid>, sqlx::Error> {
        let id = Uuid::now_v7();
        let mut transaction = self.pool.begin().await?;
        sqlx::query(OVER_ALL).execute(&mut *transaction).await?;
        // One at a time: two that begin together would not see each other's letters.
        sqlx::query("SELECT pg_advisory_xact_lock(hashtext('redrive ' || $1))")
            .bind(self.table.consumer())
            .execute(&mut *transaction)
            .await?;
        // In the order in which those that decide by hand lock them.
        let meant = format!("{MEANT} AND state = 'open' AND aggregate_id IS NOT NULL AND NOT ({BUSY})");
        let sql = format!(
            "SELECT count(*) FROM (SELECT FROM {{schema}}.dead_letters AS letter WHERE {meant} ORDER BY id FOR UPDATE) AS locked"
        );
        bind_filter!(sqlx::query(self.table.sql(&sql)), self.table.consumer(), filter)
            .execute(&mut *transaction)
            .await?;
        // A statement of its own: it sees what the locks waited for. The jobs that let letters go before keep their counts.
        let sql = format!(
            "WITH taken AS (
                 UPDATE {{schema}}.dead_letters AS letter SET job = $10, job_sent_at = NULL WHERE {meant}
                 RETURNING old.job, old.job_sent_at
             ), before AS (
                 UPDATE {{schema}}.redrive_jobs AS job SET taken_over = job.taken_over + died.letters
                   FROM (SELECT job, count(*) AS letters FROM taken WHERE job_sent_at IS NOT NULL GROUP BY job) AS died
                  WHERE job.consumer = $1 AND job.id = died.job
             )
             SELECT count(*) FROM taken"
        );
        let taken: i64 = bind_filter!(sqlx::query_scalar(self.table.sql(&sql)), self.table.consumer(), filter)
            .bind(id)
            .fetch_one(&mut *transaction)
            .await?;
        if taken == 0 {
            transaction.rollback().await?;
            return Ok(None);
        }
        crash_point::JOB_TAKEN.reached();
        sqlx::query(self.table.sql(
            "INSERT INTO {schema}.redrive_jobs
                 (consumer, id, filter, letters, canary, rate, abort_percent, actor, role, reason)
             VALUES ($1, $2, $3::jsonb, $4, $5, $6, $7, $8, $9, $10)",
        ))
        .bind(self.table.consumer())
        .bind(id)
        .bind(described)
        .bind(taken)
        .bind(i64::from(plan.canary.max(1)))
        .bind(i32::try_from(plan.rate.max(1)).unwrap_or(i32::MAX))
        .bind(i32::try_from(plan.abort_percent.min(100)).unwrap_or(100))
        .bind(actor.name)
        .bind(actor.role)
        .bind(actor.reason)
        .execute(&mut *transaction)
        .await?;
        let target = serde_json::json!({ "job": id, "letters": taken }).to_string();
        self.note(&mut transaction, "redrive-job", &target, actor).await?;
        crash_point::JOB_COMMIT_BEFORE.reached();
        transaction.commit().await?;
        crash_point::JOB_COMMIT_AFTER.reached();
        Ok(Some(id))
    }

    /// Lets nothing more of a job go; what is on its way arrives. False if there is no such job at work.
    ///
    /// # Errors
    /// Any database error.
    pub async fn cancel_job(&self, id: Uuid, actor: Actor<'_>) -> Result<bool, sqlx::Error> {
        let mut transaction = self.pool.begin().await?;
        let cancelled = sqlx::query(self.table.sql(
            "UPDATE {schema}.redrive_jobs SET state = 'cancelled', ended_because = 'cancelled by ' || $3, ended_at = clock_timestamp()
              WHERE consumer = $1 AND id = $2 AND ended_at IS NULL",
        ))
        .bind(self.table.consumer())
        .bind(id)
        .bind(actor.name)
        .execute(&mut *transaction)
        .await?
        .rows_affected();
        if cancelled > 0 {
            let target = serde_json::json!({ "job": id }).to_string();
            self.note(&mut transaction, "cancel-job", &target, actor).await?;
        }
        crash_point::CANCEL_COMMIT_BEFORE.reached();
        transaction.commit().await?;
        crash_point::CANCEL_COMMIT_AFTER.reached();
        Ok(cancelled > 0)
    }

    /// One job, with what became of its letters so far.
    ///
    /// # Errors
    /// Any database error.
    pub async fn job(&self, id: Uuid) -> Result<Option<Job>, sqlx::Error> {
        let sql = format!(
            "SELECT {JOB}, {COUNTS} FROM {{schema}}.redrive_jobs AS job,
                    LATERAL ({COUNTED} WHERE letter.consumer = job.consumer AND letter.job = job.id) AS counted
              WHERE job.consumer = $1 AND job.id = $2"
        );
        sqlx::query_as(self.table.sql(&sql))
            .bind(self.table.consumer())
            .bind(id)
            .fetch_optional(&self.pool)
            .await
    }

    /// The latest jobs first, at most `most`, that began before the job `before`.
    ///
    /// # Errors
    /// Any database error.
    pub async fn jobs(&self, before: Option<Uuid>, most: u32) -> Result<Vec<Job>, sqlx::Error> {
        let sql = format!(
            "SELECT {JOB}, {COUNTS}
               FROM (SELECT * FROM {{schema}}.redrive_jobs
                      WHERE consumer = $1 AND ($2::uuid IS NULL OR id < $2) ORDER BY id DESC LIMIT $3) AS job,
                    LATERAL ({COUNTED} WHERE letter.consumer = job.consumer AND letter.job = job.id) AS counted
              ORDER BY id DESC"
        );
        sqlx::query_as(self.table.sql(&sql))
            .bind(self.table.consumer())
            .bind(before)
            .bind(i64::from(most))
            .fetch_all(&self.pool)
            .await
    }

    /// Brings each job that is due one step further; returns how many letters were let go. Any instance may do it at any
    /// time: a job is locked while one of them does, and then not due for a second.
    pub(crate) async fn step_jobs(&self) -> Result<usize, sqlx::Error> {
        let due: Vec<Uuid> = sqlx::query_scalar(self.table.sql(
            "SELECT id FROM {schema}.redrive_jobs
              WHERE consumer = $1 AND ended_at IS NULL AND stepped_at <= clock_timestamp() - interval '1 second'
              ORDER BY stepped_at",
        ))
        .bind(self.table.consumer())
        .fetch_all(&self.pool)
        .await?;
        let mut sent = 0;
        for id in due {
            sent += self.step_job(id).await?;
        }
        Ok(sent)
    }

    async fn step_job(&self, id: Uuid) -> Result<usize, sqlx::Error> {
        let mut transaction = self.pool.begin().await?;
        let due: Option<Due> = sqlx::query_as(self.table.sql(
            "SELECT state, letters, canary, rate, abort_percent,
                    extract(epoch FROM clock_timestamp() - stepped_at)::float8 AS since
               FROM {schema}.redrive_jobs
              WHERE consumer = $1 AND id = $2 AND ended_at IS NULL
                AND stepped_at <= clock_timestamp() - interval '1 second'
                FOR UPDATE SKIP LOCKED",
        ))
        .bind(self.table.consumer())
        .bind(id)
        .fetch_optional(&mut *transaction)
        .await?;
        // Another instance is at it, or was.
        let Some(due) = due else { return Ok(0) };
        let sql = format!("{COUNTED} WHERE letter.consumer = $1 AND letter.job = $2");
        let counted: Counted = sqlx::query_as(self.table.sql(&sql))
            .bind(self.table.consumer())
            .bind(id)
            .fetch_one(&mut *transaction)
            .await?;
        let mut sent = 0;
        let step = match next_step(&due, counted) {
            Step::Send { state, most } => {
                sent = self.send(&mut transaction, id, most).await?;
                if sent == 0 && counted.on_their_way == 0 {
                    let left = due.letters - counted.sent;
                    let because =
                        format!("{left} left out: decided by hand, or behind another dead letter of their key");
                    Step::End("succeeded", (left > 0).then_some(because))
                } else {
                    Step::Send { state, most }
                }
            }
            step => step,
        };
        self.note_step(&mut transaction, id, step).await?;
        crash_point::STEP_COMMIT_BEFORE.reached();
        transaction.commit().await?;
        crash_point::STEP_COMMIT_AFTER.reached();
        Ok(sent)
    }

    /// Lets the next letters of a job go; returns how many. A key whose earlier letter is dead waits for that one.
    async fn send(&self, connection: &mut PgConnection, id: Uuid, most: i64) -> Result<usize, sqlx::Error> {
        let next: Vec<Uuid> = sqlx::query_scalar(self.table.sql(
            "SELECT letter.id FROM {schema}.dead_letters AS letter
              WHERE letter.consumer = $1 AND letter.job = $2 AND letter.job_sent_at IS NULL AND letter.state = 'open'
                AND NOT EXISTS (SELECT FROM {schema}.dead_letters AS earlier
                                 WHERE earlier.consumer = letter.consumer
                                   AND earlier.aggregate_type = letter.aggregate_type
                                   AND earlier.aggregate_id = letter.aggregate_id
                                   AND earlier.sequence < letter.sequence AND earlier.state = 'open' AND earlier.holds
                                   AND (earlier.job IS DISTINCT FROM letter.job OR earlier.job_sent_at IS NOT NULL))
              ORDER BY letter.aggregate_type, letter.aggregate_id, letter.sequence LIMIT $3",
        ))
        .bind(self.table.consumer())
        .bind(id)
        .bind(most)
        .fetch_all(&mut *connection)
        .await?;
        let sent = self.let_go(connection, &next, false).await?;
        sqlx::query(self.table.sql(
            "UPDATE {schema}.dead_letters SET job_sent_at = clock_timestamp() WHERE consumer = $1 AND id = ANY($2)",
        ))
        .bind(self.table.consumer())
        .bind(&sent)
        .execute(connection)
        .await?;
        crash_point::STEP_SENT.reached();
        Ok(sent.len())
    }

    async fn note_step(&self, connection: &mut PgConnection, id: Uuid, step: Step) -> Result<(), sqlx::Error> {
        let (state, because, ended) = match step {
            Step::Wait => (None, None, false),
            Step::Send { state, .. } => (Some(state), None, false),
            Step::End(state, because) => (Some(state), because, true),
        };
        sqlx::query(self.table.sql(
            "UPDATE {schema}.redrive_jobs
                SET state = coalesce($3, state), ended_because = coalesce($4, ended_because), stepped_at = clock_timestamp(),
                    ended_at = CASE WHEN $5 THEN clock_timestamp() END
              WHERE consumer = $1 AND id = $2",
        ))
        .bind(self.table.consumer())
        .bind(id)
        .bind(state)
        .bind(&because)
        .bind(ended)
        .execute(connection)
        .await?;
        if ended {
            tracing::info!(job = %id, state, because, "a redrive has ended");
        }
        Ok(())
    }
}

/// A job that may be stepped on.
#[derive(Debug, FromRow)]
struct Due {
    state: String,
    letters: i64,
    canary: i64,
    rate: i32,
    abort_percent: i32,
    /// Seconds since its last step.
    since: f64,
}

#[derive(Debug, Clone, Copy, Default, FromRow)]
struct Counted {
    sent: i64,
    took_effect: i64,
    died_again: i64,
    on_their_way: i64,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Wait,
    /// Let the next letters go, and be in this state.
    Send {
        state: &'static str,
        most: i64,
    },
    /// Be over, in this state and for this reason.
    End(&'static str, Option<String>),
}

/// Seconds that a step makes up for at most: a job that nobody stepped on for a while does not catch up at once.
const CATCH_UP: f64 = 2.0;
/// Letters of one step, whatever the rate: one that is too large to end in time would be tried for ever.
const LARGEST_STEP: i64 = 5_000;
/// Seconds of its rate that may be on their way: more would only pile up behind the limit.
const ON_THEIR_WAY: i64 = 10;

fn next_step(due: &Due, counted: Counted) -> Step {
    let Counted {
        sent,
        took_effect,
        died_again,
        on_their_way,
    } = counted;
    let settled = took_effect + died_again;
    let broken = died_again * 100 > i64::from(due.abort_percent) * settled;
    let given_up = || {
        let because = format!(
            "{died_again} of {settled} died again, more than {} %",
            due.abort_percent
        );
        Step::End("failed", Some(because))
    };
    let most = (f64::from(due.rate) * due.since.clamp(0.0, CATCH_UP)).max(1.0) as i64;
    let most = most.min(LARGEST_STEP);
    match due.state.as_str() {
        "canary" if sent == 0 => Step::Send {
            state: "canary",
            most: due.canary,
        },
        "canary" if on_their_way > 0 => Step::Wait,
        _ if broken => given_up(),
        _ if on_their_way >= i64::from(due.rate).saturating_mul(ON_THEIR_WAY) => Step::Wait,
        _ => Step::Send { state: "running", most },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(state: &str, since: f64) -> Due {
        Due {
            state: state.to_owned(),
            letters: 1_000,
            canary: 10,
            rate: 50,
            abort_percent: 20,
            since,
        }
    }

    fn counted(sent: i64, took_effect: i64, died_again: i64) -> Counted {
        Counted {
            sent,
            took_effect,
            died_again,
            on_their_way: sent - took_effect - died_again,
        }
    }

    fn send(state: &'static str, most: i64) -> Step {
        Step::Send { state, most }
    }

    #[test]
    fn the_rest_goes_when_all_of_the_canary_is_settled_and_most_of_it_well() {
        assert_eq!(next_step(&due("canary", 0.1), counted(0, 0, 0)), send("canary", 10));
        assert_eq!(
            next_step(&due("canary", 1.0), counted(10, 0, 9)),
            Step::Wait,
            "one is on its way"
        );
        assert_eq!(next_step(&due("canary", 1.0), counted(10, 8, 2)), send("running", 50));
        assert!(matches!(
            next_step(&due("canary", 1.0), counted(10, 7, 3)),
            Step::End("failed", Some(because)) if because.contains("3 of 10")
        ));
    }

    #[test]
    fn it_runs_at_its_rate_and_ends_when_too_many_die() {
        assert_eq!(
            next_step(&due("running", 0.5), counted(100, 90, 10)),
            send("running", 25)
        );
        assert_eq!(
            next_step(&due("running", 60.0), counted(100, 90, 10)),
            send("running", 100)
        );
        assert_eq!(
            next_step(&due("running", 1.0), counted(600, 100, 0)),
            Step::Wait,
            "enough is on its way"
        );
        assert!(matches!(
            next_step(&due("running", 1.0), counted(100, 70, 20)),
            Step::End("failed", _)
        ));
    }
}
