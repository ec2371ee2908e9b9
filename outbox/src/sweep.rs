use std::time::Duration;

use shared_events::envelope::format_timestamp;
use tokio::{task::JoinHandle, time::Instant};

use crate::{
    delivery::{Delivery, DeliveryError, Handed},
    ended::without_answer,
    limited_pool::LimitedPool,
    publisher::Outgoing,
    table::{self, After, Table, Unsent, UnsentRow},
};

/// Rows read at once; with the next page on its way this bounds memory whatever the backlog.
const PAGE: i64 = 2_000;

#[derive(Debug, thiserror::Error)]
pub(crate) enum SweepError {
    #[error("unsent rows could not be read")]
    Read(#[from] sqlx::Error),
    #[error("a row's time cannot be written")]
    Time(#[from] time::error::Format),
    #[error(transparent)]
    Delivery(#[from] DeliveryError),
    /// Another instance may own these keys by now.
    #[error("the leases could not be renewed in time")]
    LeaseLost,
}

/// How long a pass waits for the broker before its caller looks around.
const ROOM_PATIENCE: Duration = Duration::from_secs(1);
/// How often it is asked whether the transactions of a moment have ended.
const SETTLE_INTERVAL: Duration = Duration::from_millis(100);

/// Publishes what a slot that has just been looked at will not stream. Twice, because a transaction may have written its
/// commit before the slot's first position and still be invisible: it waits for its flush, or for a synchronous standby.
/// The second pass begins when everything that ran at the end of the first has ended.
pub(crate) async fn sweep_settled(
    table: &Table,
    pool: &LimitedPool,
    delivery: &mut Delivery,
    wanted: &Unsent,
) -> Result<u64, SweepError> {
    let mut swept = whole_pass(table, pool, delivery, wanted).await?;
    let (_, horizon) = table::snapshot(pool).await?;
    while table::snapshot(pool).await?.0 < horizon {
        // Some transaction may stay open for long; what others commit meanwhile does not wait for it. Without marks every
        // pass would send all of them again.
        if delivery.marks() {
            swept += whole_pass(table, pool, delivery, wanted).await?;
        }
        tokio::time::sleep(SETTLE_INTERVAL).await;
    }
    Ok(swept + whole_pass(table, pool, delivery, wanted).await?)
}

/// Passes until one has seen everything, and all of it is marked.
async fn whole_pass(
    table: &Table,
    pool: &LimitedPool,
    delivery: &mut Delivery,
    wanted: &Unsent,
) -> Result<u64, SweepError> {
    let mut sent = 0;
    loop {
        let passed = pass(table, pool, delivery, wanted, || true).await?;
        sent += passed.sent;
        delivery.finish().await?;
        if passed.is_all {
            return Ok(sent);
        }
    }
}

/// What one pass has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Passed {
    /// Rows sent; they may still be on their way.
    pub(crate) sent: u64,
    /// False if the broker took too long to answer, and the pass ended early.
    pub(crate) is_all: bool,
}

/// Publishes every row meant that is unsent and not on its way, each key in its own order, as long as `may_publish`.
///
/// A row that somebody else sends as well goes out twice; the consumer's inbox absorbs it. A row that only one of the two
/// finds goes out once. None goes out never: that is what the pass is for.
pub(crate) async fn pass(
    table: &Table,
    pool: &LimitedPool,
    delivery: &mut Delivery,
    wanted: &Unsent,
    may_publish: impl Fn() -> bool,
) -> Result<Passed, SweepError> {
    let mut sent = 0;
    delivery.forget_marked();
    let mut page = Page::read(table, pool, wanted, After::default()).await?;
    loop {
        page.retain(|row| !delivery.is_pending(row.id));
        let next = match page.after.take() {
            None => None,
            Some(after) => {
                delivery.forget_marked();
                Some(Page::begin(table, pool, wanted, after))
            }
        };
        delivery.nudge().await?;
        for row in &page.rows {
            let waited_since = Instant::now();
            while !delivery.has_room_for(&row.aggregate_id) {
                if waited_since.elapsed() > ROOM_PATIENCE {
                    return Ok(Passed { sent, is_all: false });
                }
                tokio::select! {
                    progress = delivery.progress() => progress?,
                    () = tokio::time::sleep(ROOM_PATIENCE) => {}
                }
            }
            if !may_publish() {
                return Err(SweepError::LeaseLost);
            }
            let time = format_timestamp(row.created_at)?;
            if delivery.publish(row.outgoing(&time)).await? == Handed::Over {
                sent += 1;
            }
        }
        match next {
            None => return Ok(Passed { sent, is_all: true }),
            Some(next) => page = next.end().await?,
        }
    }
}

/// Rows that were read at once, and where the next read begins, if there may be more.
struct Page {
    rows: Vec<UnsentRow>,
    after: Option<After>,
}

/// A page on its way from the database while the one before it is published.
struct Coming(JoinHandle<Result<Page, sqlx::Error>>);

impl Page {
    async fn read(table: &Table, pool: &LimitedPool, wanted: &Unsent, after: After) -> Result<Self, sqlx::Error> {
        let (rows, after) = table::unsent(table, pool, wanted, &after, PAGE).await?;
        Ok(Self { rows, after })
    }

    fn begin(table: &Table, pool: &LimitedPool, wanted: &Unsent, after: After) -> Coming {
        let (table, pool, wanted) = (table.clone(), pool.clone(), wanted.clone());
        Coming(tokio::spawn(
            async move { Self::read(&table, &pool, &wanted, after).await },
        ))
    }

    fn retain(&mut self, keep: impl Fn(&UnsentRow) -> bool) {
        self.rows.retain(keep);
    }
}

impl Coming {
    async fn end(mut self) -> Result<Page, sqlx::Error> {
        match (&mut self.0).await {
            Ok(page) => page,
            Err(error) => without_answer(error).await,
        }
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl UnsentRow {
    /// As it goes out; `time` is the row's time as the envelope has it.
    pub(crate) fn outgoing<'a>(&'a self, time: &'a str) -> Outgoing<'a> {
        Outgoing {
            id: self.id,
            key: &self.aggregate_id,
            event_type: &self.event_type,
            version: self.version,
            payload: self.payload.as_bytes(),
            time,
            traceparent: self.traceparent.as_deref(),
            committed_micros: (self.created_at.unix_timestamp_nanos() / 1_000) as i64,
        }
    }
}
