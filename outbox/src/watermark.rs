use std::{collections::VecDeque, fmt};

use sqlx::types::Uuid;
use tokio::time::Instant;

/// A position in the write-ahead log, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Lsn(pub(crate) u64);

impl fmt::Display for Lsn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// An event on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InFlight {
    pub(crate) id: Uuid,
    pub(crate) bytes: usize,
    /// Commit time, microseconds since 1970.
    pub(crate) committed_micros: i64,
    pub(crate) sent_at: Instant,
}

/// The oldest events that the broker has acknowledged without a gap, taken out of the watermark.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Acknowledged {
    pub(crate) events: Vec<InFlight>,
    /// End of the last transaction that is acknowledged as a whole; `None` if none has become so.
    pub(crate) end: Option<TransactionEnd>,
}

/// Where a transaction ends in the log, and when it was committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TransactionEnd {
    pub(crate) lsn: Lsn,
    /// Microseconds since 1970.
    pub(crate) committed_micros: i64,
}

/// Keeps the order in which events were sent and says up to where all of them are acknowledged.
///
/// Only the end of a transaction is a position: row positions of interleaved transactions are not ordered, and a
/// restart in the middle of a transaction must bring the whole of it again (HAZARDS H17, H18).
#[derive(Debug, Default)]
pub(crate) struct Watermark {
    /// Index of the first entry of `sent`.
    first: u64,
    sent: VecDeque<(InFlight, bool)>,
    /// (index after the transaction's last event, its end).
    ends: VecDeque<(u64, TransactionEnd)>,
    bytes: usize,
}

impl Watermark {
    /// Registers the next event; the result names it in its delivery report.
    pub(crate) fn sent(&mut self, event: InFlight) -> u64 {
        self.bytes += event.bytes;
        self.sent.push_back((event, false));
        self.first + self.sent.len() as u64 - 1
    }

    /// Everything sent so far belongs to transactions that end at or before `end`.
    pub(crate) fn committed(&mut self, end: TransactionEnd) {
        let index = self.first + self.sent.len() as u64;
        match self.ends.back_mut() {
            // Nothing was sent since: the later end covers both.
            Some(last) if last.0 == index => last.1 = end,
            _ => self.ends.push_back((index, end)),
        }
    }

    /// The broker has acknowledged the event. Reports may come in any order and twice.
    pub(crate) fn acknowledged(&mut self, index: u64) {
        let slot = index
            .checked_sub(self.first)
            .and_then(|offset| usize::try_from(offset).ok());
        if let Some((_, acknowledged)) = slot.and_then(|offset| self.sent.get_mut(offset)) {
            *acknowledged = true;
        }
    }

    /// The last event sent was refused, and nothing was sent since: it is as if it had not been sent.
    pub(crate) fn take_back(&mut self) {
        if let Some((event, _)) = self.sent.pop_back() {
            self.bytes -= event.bytes;
        }
    }

    /// Takes out the acknowledged prefix.
    pub(crate) fn take(&mut self) -> Acknowledged {
        let mut taken = Acknowledged::default();
        while let Some((event, true)) = self.sent.front().copied() {
            self.sent.pop_front();
            self.first += 1;
            self.bytes -= event.bytes;
            taken.events.push(event);
        }
        while let Some((index, end)) = self.ends.front().copied() {
            if index > self.first {
                break;
            }
            self.ends.pop_front();
            taken.end = Some(end);
        }
        taken
    }

    /// The oldest event on its way.
    pub(crate) fn oldest(&self) -> Option<InFlight> {
        self.sent.front().map(|(event, _)| *event)
    }

    /// Events sent and not yet taken out.
    pub(crate) fn len(&self) -> usize {
        self.sent.len()
    }

    /// Their size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether the broker has acknowledged everything sent.
    pub(crate) fn is_settled(&self) -> bool {
        self.sent.iter().all(|(_, acknowledged)| *acknowledged)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sent.is_empty() && self.ends.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(number: u128) -> InFlight {
        InFlight {
            id: Uuid::from_u128(number),
            bytes: 10,
            committed_micros: 0,
            sent_at: Instant::now(),
        }
    }

    fn end(lsn: u64) -> TransactionEnd {
        TransactionEnd {
            lsn: Lsn(lsn),
            committed_micros: 0,
        }
    }

    #[test]
    fn a_later_acknowledgement_does_not_pass_an_earlier_gap() {
        let mut watermark = Watermark::default();
        let first = watermark.sent(event(1));
        watermark.committed(end(100));
        let second = watermark.sent(event(2));
        watermark.committed(end(200));

        watermark.acknowledged(second);
        assert_eq!(watermark.take(), Acknowledged::default());

        watermark.acknowledged(first);
        let taken = watermark.take();
        assert_eq!((taken.events.len(), taken.end), (2, Some(end(200))));
        assert!(watermark.is_empty());
    }

    #[test]
    fn a_transaction_counts_only_as_a_whole() {
        let mut watermark = Watermark::default();
        let first = watermark.sent(event(1));
        let second = watermark.sent(event(2));
        watermark.acknowledged(first);
        assert_eq!(watermark.take().end, None);
        watermark.acknowledged(second);
        assert_eq!(watermark.take().end, None, "the commit has not been read yet");
        watermark.committed(end(7));
        assert_eq!(watermark.take().end, Some(end(7)));
    }

    proptest! {
        /// Transactions of random sizes, acknowledged in a random order: after each report the position is the end of
        /// the longest run of whole transactions in which nothing is outstanding, and it never goes back.
        #[test]
        fn the_position_is_the_longest_acknowledged_run_of_transactions(
            sizes in prop::collection::vec(0_usize..5, 1..30),
            seed in any::<u64>(),
        ) {
            let mut watermark = Watermark::default();
            let mut owner = Vec::new();
            for (transaction, size) in sizes.iter().enumerate() {
                for _ in 0..*size {
                    let index = watermark.sent(event(owner.len() as u128));
                    prop_assert_eq!(index, owner.len() as u64);
                    owner.push(transaction);
                }
                watermark.committed(end(transaction as u64 + 1));
            }
            let mut order: Vec<usize> = (0..owner.len()).collect();
            let mut state = seed | 1;
            for position in (1..order.len()).rev() {
                state ^= state << 13; state ^= state >> 7; state ^= state << 17;
                order.swap(position, (state % (position as u64 + 1)) as usize);
            }
            let mut outstanding = sizes.clone();
            let mut position = watermark.take().end.unwrap_or(end(0));
            let mut taken = 0;
            for index in order {
                watermark.acknowledged(index as u64);
                outstanding[owner[index]] -= 1;
                let acknowledged = watermark.take();
                for (offset, event) in acknowledged.events.iter().enumerate() {
                    prop_assert_eq!(event.id, Uuid::from_u128((taken + offset) as u128), "taken in the order sent");
                }
                taken += acknowledged.events.len();
                let next = acknowledged.end.unwrap_or(position);
                prop_assert!(next >= position);
                position = next;
                let expected = outstanding.iter().take_while(|left| **left == 0).count() as u64;
                prop_assert_eq!(position.lsn, Lsn(expected));
                prop_assert_eq!(watermark.bytes(), watermark.len() * 10);
            }
            prop_assert!(watermark.is_empty());
        }
    }
}
