use std::{
    pin::pin,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{FIRST_BACKOFF, HEALTHY_AFTER, LONGEST_BACKOFF, Relay, Session, error::SessionError, wal::Prepared};
use crate::{
    status::{RelayState, Source, with_causes},
    table,
};

/// How long the log may take to begin before the table is read meanwhile: a healthy start takes a tenth of it.
const PATIENCE: Duration = Duration::from_secs(2);
/// The server notices a closed connection within this time even while it makes a slot.
const OWN_LEAD_LASTS: Duration = Duration::from_secs(8);
/// A slot that was just streamed from can be dropped a moment later.
const DROP_INTERVAL: Duration = Duration::from_millis(200);
const DROP_ATTEMPTS: u32 = 25;

/// Why the log is not streamed, as the two halves tell each other.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Wait {
    /// Not long enough to say anything.
    Beginning,
    /// Another instance streams; the table is its business too.
    Standby,
    /// The table is to be read meanwhile.
    Without(String),
}

/// How the log is to be followed again.
struct Next {
    wait: Wait,
    /// The slot costs too much, or has left rows out: it is dropped, and made anew once the table is drained.
    gives_up_slot: bool,
    /// Before the next try.
    pause: Duration,
}

impl Next {
    fn at_once() -> Self {
        Self {
            wait: Wait::Beginning,
            gives_up_slot: false,
            pause: Duration::ZERO,
        }
    }
}

impl Relay {
    /// The log while it can be had, and the table whenever it cannot: while the slot is made, which waits for every open
    /// transaction; while the server refuses replication; while every stream ends as soon as it
    /// began; and after the slot was given up because it cost too much or
    /// left rows out.
    ///
    /// No switch can make a gap. From the log to the table: unsent rows are found by their state. From the table to the log:
    /// a slot that was made anew, or moved, is swept for before it is streamed from. What both send is absorbed by the
    /// consumer's inbox; each sends a key's unsent rows in sequence from the first on, so their order holds.
    pub(super) async fn wal_or_table(&self, stop: &CancellationToken) {
        let mut backoff = FIRST_BACKOFF;
        let mut next = Next::at_once();
        while !stop.is_cancelled() {
            let Some(prepared) = self.table_until_wal(next, stop).await else {
                return;
            };
            let started = Instant::now();
            let Err(error) = self.deliver(prepared, self.breached(), stop).await else {
                return;
            };
            if stop.is_cancelled() {
                tracing::info!(reason = with_causes(&error), "the session ended with the stop");
                return;
            }
            let first_in_a_row = started.elapsed() >= HEALTHY_AFTER || backoff == FIRST_BACKOFF;
            if first_in_a_row {
                backoff = FIRST_BACKOFF;
            }
            if error.is_renewal() {
                next = Next::at_once();
                continue;
            }
            self.failed(&error, backoff);
            let reason = with_causes(&error);
            next = match error {
                error if matches!(error, SessionError::Budget(_)) || error.leaves_gap() => Next {
                    wait: Wait::Without(reason),
                    gives_up_slot: true,
                    pause: Duration::ZERO,
                },
                // Once is a server that restarts. A log that can be had and ends again and again moves nothing.
                _ => Next {
                    wait: if first_in_a_row {
                        Wait::Beginning
                    } else {
                        Wait::Without(reason)
                    },
                    gives_up_slot: false,
                    pause: backoff,
                },
            };
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
    }

    /// Prepares to follow the log, and reads the table if that takes long. `None` with the stop.
    async fn table_until_wal(&self, next: Next, stop: &CancellationToken) -> Option<Prepared> {
        let (say, heard) = watch::channel(next.wait);
        let drained = Notify::new();
        let polling = stop.child_token();
        let mut meanwhile = pin!(self.table_meanwhile(heard, &drained, &polling));
        let wal = async {
            tokio::time::sleep(next.pause).await;
            self.wal_when_ready(&say, next.gives_up_slot.then_some(&drained)).await
        };
        let prepared = tokio::select! {
            prepared = wal => prepared,
            // It ends only with the stop, and has finished what it has sent.
            () = &mut meanwhile => return None,
        };
        // Finishes what it has sent, within its own deadline.
        polling.cancel();
        meanwhile.await;
        Some(prepared)
    }

    /// Tries until the log can be followed. After a slot was given up only once the table is drained: a broker that is away would fill
    /// a new slot as it filled the old one.
    async fn wal_when_ready(&self, say: &watch::Sender<Wait>, drained: Option<&Notify>) -> Prepared {
        if let Some(drained) = drained {
            self.give_up_slot().await;
            drained.notified().await;
        }
        let mut backoff = FIRST_BACKOFF;
        let began = Instant::now();
        loop {
            let without = |reason: String| {
                say.send_if_modified(|wait| {
                    let changed = !matches!(wait, Wait::Without(_));
                    *wait = Wait::Without(reason);
                    changed
                });
            };
            // Said again and again while another instance leads.
            let began_standby = Instant::now();
            let led = Mutex::new(began_standby);
            let standby = || {
                *led.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                say.send_if_modified(|wait| {
                    // A session of our own that was cut off holds the lead for a moment more: the table is read on.
                    let own = matches!(wait, Wait::Without(_)) && began_standby.elapsed() < OWN_LEAD_LASTS;
                    !own && std::mem::replace(wait, Wait::Standby) != Wait::Standby
                });
            };
            let mut preparing = pin!(self.prepare(standby));
            let prepared = loop {
                tokio::select! {
                    prepared = &mut preparing => break prepared,
                    () = tokio::time::sleep(PATIENCE) => {
                        let led_for = led.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
                        if led_for >= PATIENCE && !matches!(*say.borrow(), Wait::Without(_)) {
                            without("the slot is not ready yet".to_owned());
                        }
                    }
                }
            };
            match prepared {
                Ok(prepared) => return prepared,
                Err(error) => {
                    self.metrics.failed();
                    let reason = with_causes(&error);
                    tracing::warn!(slot = self.slot.name, reason, ?backoff, "the log cannot be followed");
                    // A server that restarts has no table to read either.
                    if error.needs_a_person() || began.elapsed() >= PATIENCE {
                        without(reason);
                    }
                    if self.breach.borrow().is_some() {
                        // Nobody moves it, and it costs more than it may.
                        self.give_up_slot().await;
                    }
                }
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
    }

    /// Reads the table while the other half says that there is no log, until told to stop.
    async fn table_meanwhile(&self, mut heard: watch::Receiver<Wait>, drained: &Notify, stop: &CancellationToken) {
        while !stop.is_cancelled() {
            let wait = heard.borrow_and_update().clone();
            let Wait::Without(reason) = wait else {
                if wait == Wait::Standby {
                    self.status.set(RelayState::Standby);
                }
                tokio::select! {
                    () = stop.cancelled() => return,
                    changed = heard.changed() => if changed.is_err() { return },
                }
                continue;
            };
            self.status.switch(Source::Poll, &reason);
            let session = stop.child_token();
            let poll = self.repeat(Session::Table { drained }, &session);
            let led_by_another = async {
                while heard.wait_for(|wait| *wait == Wait::Standby).await.is_err() {
                    std::future::pending::<()>().await;
                }
                session.cancel();
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = poll => {}
                () = led_by_another => {}
            }
        }
    }

    /// Why the slot costs more than it may, as soon as it does.
    async fn breached(&self) -> String {
        let mut breach = self.breach.subscribe();
        loop {
            let reason = breach.borrow_and_update().clone();
            match reason {
                Some(reason) => return reason,
                // The sender is ours, and lives as long.
                None if breach.changed().await.is_err() => std::future::pending().await,
                None => {}
            }
        }
    }

    /// Drops the slot, so that the server lets its log go. Every unsent row is in the table. One that somebody else streams
    /// from is left alone.
    pub(super) async fn give_up_slot(&self) {
        for _ in 0..DROP_ATTEMPTS {
            match table::drop_slot(&self.pool, &self.slot.name).await {
                Ok(true) => {
                    // What was seen is over; the monitor judges anew.
                    self.breach.send_replace(None);
                    tracing::warn!(
                        slot = self.slot.name,
                        "the slot is dropped; the server may let its log go"
                    );
                    return;
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(
                        slot = self.slot.name,
                        error = with_causes(&error),
                        "the slot could not be dropped"
                    );
                }
            }
            tokio::time::sleep(DROP_INTERVAL).await;
        }
    }
}
