use std::{ops::Range, sync::Arc};

use tokio::{sync::Semaphore, time::Instant};
use tracing::Span;

use crate::{
    crash_point,
    decode::{self, History},
    engine::UnknownTypes,
    failure::{Class, classify},
    flood::{Flood, Sign},
    handler::{Handler, IncomingEvent, Outcome, Position, Reason},
    in_hand::InHand,
    lane::Lane,
    metrics::Metrics,
    ordering::Verdict,
    process::{Batch, BatchError, Begin, Process},
    rate_limit::{Permit, RateLimits},
    record::Record,
    redirect::{Letter, Outgoing, Redirector, Undelivered},
    retry::{Backoff, Step, random_unit},
    shared_transaction::{Gone, Shared, SharedTransactions},
    status::Status,
    table::Failed,
};

/// What all workers of an engine share.
pub(crate) struct Workers<H> {
    pub(crate) process: Arc<Process<H>>,
    pub(crate) group: String,
    pub(crate) batch_limit: usize,
    pub(crate) join_trace: fn(&Span, &str),
    /// How many transactions may be open at once, over all partitions.
    pub(crate) transactions: Arc<Semaphore>,
    pub(crate) shared: SharedTransactions,
    pub(crate) limits: RateLimits,
    pub(crate) redirector: Arc<Redirector>,
    pub(crate) flood: Arc<Flood>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) status: Status,
}

/// The partition was taken away or the engine stops; what is in hand stays unfinished and comes again elsewhere.
struct Cancelled;

impl From<Gone> for Cancelled {
    /// A worker that ends without having been told to ends the engine.
    fn from(_: Gone) -> Self {
        Self
    }
}

/// Whether a partition's batches share transactions. What one of them met that had to leave the others may be there still: one
/// goes alone then, twice as many after each further time.
struct Company {
    alone: u32,
    next_time: u32,
}

const LONGEST_ALONE: u32 = 64;

impl Default for Company {
    fn default() -> Self {
        Self { alone: 0, next_time: 1 }
    }
}

impl Company {
    fn is_wanted(&self) -> bool {
        self.alone == 0
    }

    fn ended(&mut self, shared: bool, kept: bool) {
        match (shared, kept) {
            (false, _) => self.alone = self.alone.saturating_sub(1),
            (true, true) => self.next_time = 1,
            (true, false) => {
                self.alone = self.next_time;
                self.next_time = (self.next_time * 2).min(LONGEST_ALONE);
            }
        }
    }
}

/// Leave for a batch to be in a transaction. Given back while the batch waits for the platform, so that others go on.
struct Leave {
    count: u32,
    permit: Option<Permit>,
}

impl<H: Handler> Workers<H> {
    /// Works until the lane is cancelled.
    pub(crate) async fn work(self: Arc<Self>, lane: Arc<Lane>) {
        let mut is_first = true;
        let mut company = Company::default();
        while let Some((records, permit)) = self.next(&lane).await {
            lane.take_in_hand(records.first().and_then(|record| record.timestamp_ms));
            if std::mem::take(&mut is_first) {
                // What the last owner had in hand comes again.
                self.process.expectation.forget();
            }
            // What comes out of a retry topic has failed before, and would take the others with it.
            let shares = lane.tier.is_none() && company.is_wanted();
            let finished = self.handle(&lane, records, permit, shares).await;
            lane.take_in_hand(None);
            self.status.resumed(&lane);
            match finished {
                Ok(kept) => company.ended(shares, kept),
                Err(Cancelled) => break,
            }
        }
    }

    /// What waits and is due, as much as the rate limit grants; no added delay.
    async fn next(&self, lane: &Lane) -> Option<(Vec<Record>, Permit)> {
        let granted = async {
            self.flood.open().await;
            let due = lane.queue.due(self.batch_limit).await;
            let start = Instant::now();
            let permit = self
                .limits
                .acquire(lane.budget(), u32::try_from(due).unwrap_or(u32::MAX))
                .await;
            self.metrics.waited(lane.budget(), start.elapsed());
            permit
        };
        tokio::select! {
            biased;
            () = lane.cancel.cancelled() => None,
            // Nobody else takes from this queue, so what was due is still there.
            permit = granted => Some((lane.queue.take(permit.count() as usize), permit)),
        }
    }

    /// One batch from decoding to its offset, in a transaction with others if it `shares` one. False if it had to leave them.
    async fn handle(&self, lane: &Lane, records: Vec<Record>, permit: Permit, shares: bool) -> Result<bool, Cancelled> {
        crash_point::BATCH_RECEIVED.reached();
        let mut in_hand = self.decode(lane, records);
        let spans: Vec<Span> = in_hand.events.iter().map(|event| self.span(event)).collect();
        let mut leave = Leave {
            count: permit.count(),
            permit: Some(permit),
        };
        let mut took_effect = vec![false; in_hand.records.len()];
        let mut shared = Shared::Alone(None);
        let mut kept_company = true;
        if shares && !in_hand.events.is_empty() {
            shared = self.shared.apply(&mut in_hand).await?;
            kept_company = matches!(shared, Shared::Judged);
            if !kept_company && lane.cancel.is_cancelled() {
                return Err(Cancelled);
            }
        }
        loop {
            if let Shared::Alone(tried) = std::mem::replace(&mut shared, Shared::Alone(None)) {
                self.apply(lane, &mut leave, &mut in_hand, tried).await?;
            }
            for (took_effect, verdict) in took_effect.iter_mut().zip(&in_hand.verdicts) {
                *took_effect |= *verdict == Verdict::Applied;
            }
            // What took effect at the first try is a duplicate at the second, and counts as it did.
            let signs = in_hand.verdicts.iter().zip(&took_effect).map(|(verdict, took_effect)| {
                if *took_effect {
                    Sign::TookEffect
                } else {
                    Sign::of(verdict)
                }
            });
            let Err(reason) = self.flood.admit(signs) else { break };
            // Whatever fails so often may be no fault of these events: none of them leaves, and all are tried again when
            // the stop is over. If a person has ended it, he has seen them, and they go.
            if self.hold_back(lane, &mut leave, reason).await? {
                self.apply(lane, &mut leave, &mut in_hand, None).await?;
                break;
            }
        }
        drop((spans, leave));
        for (event, place) in in_hand.events.iter().zip(&in_hand.places) {
            if took_effect[*place] || in_hand.verdicts[*place] == Verdict::Applied {
                self.metrics.applied(event.envelope.timestamp);
            }
        }
        self.bury(lane, &in_hand).await?;
        self.redirect(lane, &in_hand).await?;
        if let Some(last) = in_hand.records.last() {
            lane.finish_to(last.offset + 1);
            crash_point::OFFSET_FINISHED.reached();
        }
        Ok(kept_company)
    }

    fn decode(&self, lane: &Lane, records: Vec<Record>) -> InHand {
        let history = |record| decode::history(record, &lane.topic, lane.partition, lane.tier);
        let mut in_hand = InHand {
            histories: records.iter().map(history).collect(),
            verdicts: Vec::with_capacity(records.len()),
            events: Vec::with_capacity(records.len()),
            places: Vec::with_capacity(records.len()),
            records,
        };
        for (place, record) in in_hand.records.iter().enumerate() {
            self.metrics.consumed(record.timestamp_ms);
            let verdict = match decode::decode(record.value()) {
                Err(rejection) => dead_letter(rejection),
                // One that is to be a dead letter holds its key like any other: its transaction decides.
                Ok(envelope)
                    if self.process.unknown_types == UnknownTypes::Skip && !self.process.handler.takes(&envelope) =>
                {
                    Verdict::Skipped
                }
                Ok(envelope) => {
                    in_hand.places.push(place);
                    in_hand.events.push(IncomingEvent {
                        traceparent: decode::traceparent(record),
                        position: Position {
                            topic: Arc::clone(&lane.topic),
                            partition: lane.partition,
                            offset: record.offset,
                        },
                        envelope,
                    });
                    // Until its transaction says more.
                    Verdict::Duplicate
                }
            };
            in_hand.verdicts.push(verdict);
        }
        in_hand
    }

    /// The trace of the request that caused the event goes on here.
    fn span(&self, event: &IncomingEvent) -> Span {
        let Some(traceparent) = &event.traceparent else {
            return Span::none();
        };
        let span = tracing::info_span!(
            target: "trace",
            "process",
            otel.name = tracing::field::Empty,
            otel.kind = "consumer",
            messaging.system = "kafka",
            messaging.destination.name = &*event.position.topic,
            messaging.consumer.group.name = self.group,
            messaging.kafka.offset = event.position.offset,
            messaging.message.id = %event.envelope.id,
        );
        if !span.is_disabled() {
            span.record("otel.name", format!("process {}", event.position.topic));
            (self.join_trace)(&span, traceparent);
        }
        span
    }

    /// Gives every event its verdict. A batch that fails as a whole, and not by the platform's fault, is halved again and
    /// again, in order, until the events at fault stand alone: one in a batch of 500 costs some 18 transactions. The
    /// permit is kept until the last one.
    ///
    /// One for which there is no room to wait is put off, and so is what comes after it of its key: the rest of the batch may
    /// be what settles the keys that fill the table.
    ///
    /// `tried` is what became of the whole in a transaction that has just failed.
    async fn apply(
        &self,
        lane: &Lane,
        leave: &mut Leave,
        in_hand: &mut InHand,
        mut tried: Option<BatchError>,
    ) -> Result<(), Cancelled> {
        let records: Vec<&Record> = in_hand.records_of_events().collect();
        let histories: Vec<&History> = in_hand.histories_of_events().collect();
        let batch = Batch {
            events: &in_hand.events,
            records: &records,
            histories: &histories,
        };
        let mut verdicts = vec![None; in_hand.events.len()];
        let mut put_off: Vec<usize> = Vec::new();
        let mut full = String::new();
        let mut backoff = Backoff::new();
        let whole = 0..in_hand.events.len();
        let mut parts: Vec<Range<usize>> = Vec::from([whole]);
        loop {
            let Some(part) = parts.pop() else {
                if put_off.is_empty() {
                    break;
                }
                leave.permit = None;
                self.status.stuck(lane, std::mem::take(&mut full));
                self.wait(lane, &mut backoff).await?;
                parts.extend(put_off.drain(..).rev().map(|place| place..place + 1));
                continue;
            };
            if part.is_empty() {
                continue;
            }
            let halves = |part: &Range<usize>| {
                let middle = part.start + part.len() / 2;
                [middle..part.end, part.start..middle]
            };
            if part.clone().any(|place| follows(batch.events, place, &put_off)) {
                if part.len() > 1 {
                    parts.extend(halves(&part));
                } else {
                    put_off.push(part.start);
                }
                continue;
            }
            let applied = self
                .apply_together(lane, leave, batch.part(part.clone()), None, tried.take())
                .await?;
            let error = match applied {
                Ok(judged) => {
                    for (place, verdict) in part.zip(judged) {
                        verdicts[place] = Some(verdict);
                    }
                    continue;
                }
                Err(error) => error,
            };
            // Halving a large batch takes long, and a stop would wait for all of it; what has committed is a duplicate then.
            if lane.cancel.is_cancelled() {
                return Err(Cancelled);
            }
            if part.len() > 1 {
                tracing::debug!(topic = &*lane.topic, partition = lane.partition, events = part.len(), %error, "halved");
                parts.extend(halves(&part));
                continue;
            }
            if let BatchError::KeyFull { .. } | BatchError::TableFull(_) = error {
                full = error.to_string();
                put_off.push(part.start);
                continue;
            }
            // Its transaction is gone. That its key waits is noted in another one, before anything leaves.
            let outcome = failed(&error);
            loop {
                match self
                    .apply_together(lane, leave, batch.part(part.clone()), Some(&outcome), None)
                    .await?
                {
                    Ok(judged) => break verdicts[part.start] = judged.into_iter().next(),
                    Err(error) => {
                        self.status
                            .stuck(lane, format!("a failure could not be noted: {error}"));
                        self.wait(lane, &mut backoff).await?;
                    }
                }
            }
        }
        in_hand.judge(verdicts);
        Ok(())
    }

    /// One transaction, repeated until the platform lets it succeed or fail for another reason; or there is no room for what
    /// has to wait.
    async fn apply_together(
        &self,
        lane: &Lane,
        leave: &mut Leave,
        batch: Batch<'_>,
        judged: Option<&Outcome>,
        mut tried: Option<BatchError>,
    ) -> Result<Result<Vec<Verdict>, BatchError>, Cancelled> {
        let mut backoff = Backoff::new();
        loop {
            self.renew(lane, leave).await?;
            let result = if let Some(error) = tried.take() {
                Err(error)
            } else {
                // Never closed; without a slot there is nothing to do but stop.
                let _slot = self.transactions.acquire().await.map_err(|_| Cancelled)?;
                let start = Instant::now();
                let result = self.process.process(batch, judged, Begin::Patient).await;
                self.metrics.transaction(start.elapsed());
                result
            };
            match result {
                Err(error @ (BatchError::KeyFull { .. } | BatchError::TableFull(_))) => return Ok(Err(error)),
                Err(error) if classify(&error) == Class::Platform => {
                    leave.permit = None;
                    self.pause(lane, error.to_string(), &mut backoff).await?;
                }
                settled => {
                    self.status.resumed(lane);
                    return Ok(settled);
                }
            }
        }
    }

    /// Takes leave again after it was given back: for as many events as before, in several grants if the rate has sunk
    /// meanwhile, of which the last is kept.
    async fn renew(&self, lane: &Lane, leave: &mut Leave) -> Result<(), Cancelled> {
        let mut left = if leave.permit.is_some() { 0 } else { leave.count };
        while left > 0 {
            leave.permit = None;
            let permit = tokio::select! {
                biased;
                () = lane.cancel.cancelled() => return Err(Cancelled),
                permit = self.limits.acquire(lane.budget(), left) => permit,
            };
            left = left.saturating_sub(permit.count());
            leave.permit = Some(permit);
        }
        Ok(())
    }

    /// Waits until the flood is over; the leave is given back meanwhile. True if a person has said so.
    async fn hold_back(&self, lane: &Lane, leave: &mut Leave, reason: String) -> Result<bool, Cancelled> {
        leave.permit = None;
        self.status.stuck(lane, reason);
        tokio::select! {
            () = lane.cancel.cancelled() => Err(Cancelled),
            by_operator = self.flood.open() => Ok(by_operator),
        }
    }

    /// Notes the dead letters that no transaction has noted: they are no events.
    async fn bury(&self, lane: &Lane, in_hand: &InHand) -> Result<(), Cancelled> {
        let mut events = in_hand.places.iter().peekable();
        let mut failed = Vec::new();
        for (place, verdict) in in_hand.verdicts.iter().enumerate() {
            if events.next_if(|event_place| **event_place == place).is_some() {
                continue;
            }
            if let Verdict::Failed { class, reason, .. } = verdict {
                failed.push(Failed {
                    event: None,
                    record: &in_hand.records[place],
                    history: &in_hand.histories[place],
                    topic: &lane.topic,
                    partition: lane.partition,
                    class: *class,
                    reason,
                    // Without a sequence there is nothing to hold.
                    dead: Some(false),
                });
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        let mut backoff = Backoff::new();
        while let Err(error) = self.process.bury(&failed).await {
            if classify(&error) == Class::Platform {
                self.pause(lane, error.to_string(), &mut backoff).await?;
            } else {
                self.status
                    .stuck(lane, format!("dead letters cannot be noted: {error}"));
                self.wait(lane, &mut backoff).await?;
            }
        }
        self.status.resumed(lane);
        Ok(())
    }

    /// Counts what became of each record, and hands on what cannot stay. Returns when the broker has acknowledged every
    /// one of them.
    async fn redirect(&self, lane: &Lane, in_hand: &InHand) -> Result<(), Cancelled> {
        let mut letters: Vec<Letter<'_>> = Vec::new();
        let mut events = in_hand.places.iter().zip(&in_hand.events).peekable();
        for (place, (record, verdict)) in in_hand.records.iter().zip(&in_hand.verdicts).enumerate() {
            let event = events
                .next_if(|(event_place, _)| **event_place == place)
                .map(|(_, event)| event);
            match verdict {
                Verdict::Applied => {}
                Verdict::Skipped => self.metrics.skipped(),
                Verdict::Duplicate => self.metrics.duplicate(),
                Verdict::Parked => self.metrics.parked(),
                Verdict::Failed { step, class, reason } => {
                    let outgoing = Outgoing {
                        record,
                        topic: &lane.topic,
                        partition: lane.partition,
                        event,
                        history: &in_hand.histories[place],
                    };
                    letters.push(self.redirector.letter(outgoing, *step, *class, reason));
                }
            }
        }
        let mut backoff = Backoff::new();
        while !letters.is_empty() {
            match self.redirector.deliver(&mut letters).await {
                Ok(()) => crash_point::REDIRECT_ACKNOWLEDGED.reached(),
                Err(error @ Undelivered::Away { .. }) => self.pause(lane, error.to_string(), &mut backoff).await?,
                Err(error @ Undelivered::TooLarge { .. }) => {
                    self.status.stuck(lane, error.to_string());
                    self.wait(lane, &mut backoff).await?;
                }
            }
        }
        Ok(())
    }

    /// Database or broker are away: nothing moves until the pause is over.
    async fn pause(&self, lane: &Lane, reason: String, backoff: &mut Backoff) -> Result<(), Cancelled> {
        self.metrics.fault();
        self.status.paused(lane, reason);
        self.wait(lane, backoff).await
    }

    async fn wait(&self, lane: &Lane, backoff: &mut Backoff) -> Result<(), Cancelled> {
        tokio::select! {
            () = lane.cancel.cancelled() => Err(Cancelled),
            () = tokio::time::sleep(backoff.pause(random_unit())) => Ok(()),
        }
    }
}

/// Whether an event comes after one of its key that is put off.
fn follows(events: &[IncomingEvent], place: usize, put_off: &[usize]) -> bool {
    let envelope = &events[place].envelope;
    put_off.iter().map(|place| &events[*place].envelope).any(|earlier| {
        (&earlier.aggregate_id, &earlier.aggregate_type) == (&envelope.aggregate_id, &envelope.aggregate_type)
            && earlier.sequence <= envelope.sequence
    })
}

fn dead_letter(rejection: shared_events::Rejection) -> Verdict {
    Verdict::Failed {
        step: Step::DeadLetter,
        class: Class::Permanent,
        reason: rejection.into(),
    }
}

/// The outcome of an event that failed alone.
pub(crate) fn failed(error: &BatchError) -> Outcome {
    let error_type = match error {
        BatchError::Panicked(_) => "panic",
        BatchError::WrongCount { .. } => "handler_defect",
        BatchError::Handler(_) => "handler_error",
        BatchError::Begin(_)
        | BatchError::Inbox(_)
        | BatchError::Commit(_)
        | BatchError::TimedOut(_)
        | BatchError::KeyFull { .. }
        | BatchError::TableFull(_) => "database_error",
        BatchError::Undelivered(_) => "broker_error",
    };
    let reason = Reason::new(error_type, error.to_string());
    match classify(error) {
        Class::Permanent => Outcome::DeadLetter(reason),
        Class::Platform | Class::EventTransient => Outcome::Retry(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_to_leave_its_company_stays_away_for_longer_each_time() {
        let mut company = Company::default();
        for away in [1, 2, 4, 8, 16, 32, 64, 64] {
            assert!(company.is_wanted());
            company.ended(true, false);
            for _ in 0..away {
                assert!(!company.is_wanted());
                company.ended(false, true);
            }
        }
        company.ended(true, true);
        company.ended(true, false);
        company.ended(false, true);
        assert!(company.is_wanted(), "after a success it is one again");
    }
}
