use std::time::Duration;

use bytes::Bytes;
use time::OffsetDateTime;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{
    connection::{Connection, ConnectionError, Frame},
    pgoutput::{Change, DecodeError, Decoder},
};
use crate::{
    delivery::{Delivery, DeliveryError},
    publisher::Outgoing,
    sweep::SweepError,
    table::Unsent,
    upkeep::Upkeep,
    watermark::{Lsn, TransactionEnd},
};

/// How often the server hears from us; its `wal_sender_timeout` is ten times this.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// A server asked every second that says nothing for this long is gone.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// How long a stop waits for the broker to acknowledge what is on its way; the rest comes again at the next start.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("the stream cannot be read")]
    Decode(#[from] DecodeError),
    #[error(transparent)]
    Delivery(#[from] DeliveryError),
    #[error("upkeep")]
    Upkeep(#[from] SweepError),
}

/// Streams until told to stop: next frames → publish → mark → confirm. `confirmed` is where the slot stands; `on_stall`
/// hears every second whether the broker acknowledges, and `upkeep` has its round then, over the rows that `unsent` means.
///
/// Rows are published while their transaction still arrives (protocol 1 sends only committed ones), so memory does not
/// grow with a transaction; the position moves only with its end.
pub(crate) async fn stream(
    mut connection: Connection,
    delivery: &mut Delivery,
    confirmed: Lsn,
    upkeep: &mut Upkeep,
    unsent: &Unsent,
    on_stall: impl Fn(bool),
    stop: &CancellationToken,
) -> Result<(), StreamError> {
    let mut reader = Reader {
        decoder: Decoder::default(),
        transaction: None,
        streamed: None,
        waiting: None,
    };
    let mut heard = Instant::now();
    let mut status_due = tokio::time::interval(STATUS_INTERVAL);
    status_due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // A row sent alone waits for the broker: a stop must not wait with it. Its transaction has no position yet.
        let mut answer = tokio::select! {
            () = stop.cancelled() => break,
            answer = reader.publish_buffered(&mut connection, delivery) => answer?,
        };
        let has_room = delivery.has_room() && reader.waiting.is_none();
        if !has_room {
            // We are the silent side: what the server says waits in the socket.
            heard = Instant::now();
        }
        if !answer {
            tokio::select! {
                () = stop.cancelled() => break,
                filled = connection.fill(), if has_room => {
                    filled?;
                    heard = Instant::now();
                }
                progress = delivery.progress() => progress?,
                _ = status_due.tick() => {
                    if heard.elapsed() > SILENCE_LIMIT {
                        return Err(ConnectionError::Timeout(SILENCE_LIMIT).into());
                    }
                    on_stall(delivery.is_stalled());
                    tokio::select! {
                        () = stop.cancelled() => break,
                        kept = upkeep.round(delivery, unsent, reader.horizon(delivery.is_idle())) => kept?,
                    }
                    answer = true;
                }
            }
        }
        if answer {
            let confirmed = confirmed.max(delivery.recorded());
            connection.send_status(confirmed, now_micros()).await?;
        }
    }
    match tokio::time::timeout(DRAIN_LIMIT, delivery.finish()).await {
        Ok(finished) => finished?,
        Err(_) => tracing::warn!("the broker did not acknowledge in time; unacknowledged events are sent again"),
    }
    let confirmed = confirmed.max(delivery.recorded());
    connection.send_status(confirmed, now_micros()).await?;
    Ok(connection.close().await?)
}

struct Reader {
    decoder: Decoder,
    /// Commit time of the transaction that is arriving.
    transaction: Option<i64>,
    /// Commit time of the last transaction that has arrived.
    streamed: Option<i64>,
    /// A row whose key must wait for an acknowledgement; nothing after it is read.
    waiting: Option<Bytes>,
}

impl Reader {
    /// The time up to which the log has brought everything: rows that were unsent long before it were missed.
    fn horizon(&self, idle: bool) -> OffsetDateTime {
        let now = OffsetDateTime::now_utc();
        let streamed = self
            .streamed
            .and_then(|micros| OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1_000).ok());
        match streamed {
            _ if idle => now,
            Some(streamed) => streamed.min(now),
            None => OffsetDateTime::UNIX_EPOCH,
        }
    }

    /// Publishes what has been read from the socket, as far as there is room. True if the server wants an answer now.
    async fn publish_buffered(
        &mut self,
        connection: &mut Connection,
        delivery: &mut Delivery,
    ) -> Result<bool, StreamError> {
        let mut answer = false;
        while delivery.has_room() {
            let frame = match self.waiting.take() {
                Some(message) => Some(Frame::Data(message)),
                None => connection.buffered_frame()?,
            };
            match frame {
                None => break,
                Some(Frame::Data(message)) => {
                    if !self.publish(&message, delivery).await? {
                        self.waiting = Some(message);
                        break;
                    }
                }
                Some(Frame::Keepalive { end, reply }) => {
                    answer |= reply;
                    // Log of other tables and databases: without this an idle outbox would hold all of it
                    // (HAZARDS H12). Frames come in order, so nothing of ours is left below `end`.
                    if self.transaction.is_none() && delivery.is_idle() {
                        delivery.skipped_to(end);
                    }
                }
            }
        }
        Ok(answer)
    }

    /// False if the row's key has to wait; the message is to come again.
    async fn publish(&mut self, message: &Bytes, delivery: &mut Delivery) -> Result<bool, StreamError> {
        match self.decoder.decode(message)? {
            Change::Begin { committed_micros } => self.transaction = Some(committed_micros),
            Change::Insert(row) => {
                let event = Outgoing {
                    id: row.id,
                    key: row.aggregate_id,
                    event_type: row.event_type,
                    version: row.version,
                    payload: row.payload,
                    time: &rfc3339(row.created_at),
                    traceparent: row.traceparent,
                    committed_micros: self.transaction.unwrap_or_default(),
                };
                if !delivery.has_room_for(event.key) {
                    return Ok(false);
                }
                delivery.publish(event).await?;
            }
            Change::Commit { end } => {
                let committed_micros = self.transaction.take().unwrap_or_default();
                self.streamed = Some(committed_micros);
                delivery.committed(TransactionEnd {
                    lsn: end,
                    committed_micros,
                });
            }
            Change::Nothing => {}
        }
        Ok(true)
    }
}

/// `2026-11-22 05:00:00.5+00` as `2026-11-22T05:00:00.500000Z`, the bytes that the envelope has; the session's time zone
/// is UTC.
fn rfc3339(postgres: &str) -> String {
    let utc = postgres.strip_suffix("+00").unwrap_or(postgres);
    let (seconds, fraction) = utc.split_once('.').unwrap_or((utc, ""));
    format!("{}.{fraction:0<6}Z", seconds.replacen(' ', "T", 1))
}

fn now_micros() -> i64 {
    (OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000) as i64
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_time_of_the_stream_becomes_rfc_3339() {
        for (postgres, wire) in [
            ("2026-11-22 05:00:00.123456+00", "2026-11-22T05:00:00.123456Z"),
            ("2026-11-22 05:00:00.5+00", "2026-11-22T05:00:00.500000Z"),
            ("2026-11-22 05:00:00+00", "2026-11-22T05:00:00.000000Z"),
        ] {
            assert_eq!(super::rfc3339(postgres), wire);
        }
    }
}
