use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use crate::{
    decode::History,
    failure::Class,
    handler::{IncomingEvent, Outcome, Reason},
    retry::{Schedule, Step},
};

/// Whether the events of a key wait for one of them that fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ordering {
    /// Nobody waits: right only for events that do not build on each other.
    None,
    PerKey(Parking),
}

/// How much may wait, and behind what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parking {
    /// Most events parked behind one key. One more stops its partition until the key is settled.
    pub most_per_key: u32,
    /// Most events parked in all; one more stops the partition that brings it, behind those of its batch that need not wait.
    /// Watched once a second, so it may be passed by what arrives in between.
    pub most_in_all: u32,
    /// The event types whose dead letters let their key go on. All others hold it until a person has settled them.
    pub released_by: HashSet<String>,
}

impl Ordering {
    /// Whether a dead letter of this type holds its key.
    pub(crate) fn holds(&self, event_type: &str) -> bool {
        self.parking()
            .is_some_and(|parking| !parking.released_by.contains(event_type))
    }

    /// Whether there are dead letters that let their key go on.
    pub(crate) fn releases(&self) -> bool {
        self.parking().is_some_and(|parking| !parking.released_by.is_empty())
    }

    pub(crate) fn parking(&self) -> Option<&Parking> {
        match self {
            Self::None => None,
            Self::PerKey(parking) => Some(parking),
        }
    }
}

/// Why a key is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyState {
    /// Its event is in a retry topic.
    Retrying,
    /// Its event is a dead letter that nobody has settled yet.
    Dead,
    /// Its event is parked itself: an earlier one has not come.
    Waiting,
    /// Its event is settled, those parked behind it are on their way.
    Releasing,
}

impl KeyState {
    pub const ALL: [Self; 4] = [Self::Retrying, Self::Dead, Self::Waiting, Self::Releasing];

    /// The word in the table, in metrics and in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retrying => "retrying",
            Self::Dead => "dead",
            Self::Waiting => "waiting",
            Self::Releasing => "releasing",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

/// A held key, as far as its events' turns depend on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HeldKey {
    pub(crate) state: KeyState,
    /// The event that holds it.
    pub(crate) event_id: Uuid,
    pub(crate) sequence: i64,
    /// Events parked behind it.
    pub(crate) parked: i64,
}

/// The aggregate: its type and its id.
pub type Key = (String, String);

pub(crate) type HeldKeys = HashMap<Key, HeldKey>;

/// The key is only made where some are held, which is hardly ever.
fn held_for<'a>(held: &'a HeldKeys, event: &IncomingEvent) -> Option<&'a HeldKey> {
    if held.is_empty() { None } else { held.get(&key(event)) }
}

pub(crate) fn key(event: &IncomingEvent) -> Key {
    let envelope = &event.envelope;
    (envelope.aggregate_type.clone(), envelope.aggregate_id.clone())
}

/// What an event may do in this transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It has taken effect before.
    Done,
    Try,
    /// It has died before and its key has gone on: nothing is to be done about it but to send its record.
    PassedOver,
    Park,
}

/// Only the event that holds a key may try, and whatever comes before it: those that come after wait. `is_new` says which
/// events have not taken effect yet, `behind` which of them turned out to follow a failure in this very batch.
pub(crate) fn turns(
    events: &[IncomingEvent],
    is_new: &[bool],
    held: &HeldKeys,
    behind: &HashSet<Uuid>,
    ordering: &Ordering,
) -> Vec<Turn> {
    let turn = |(event, is_new): (&IncomingEvent, &bool)| {
        let envelope = &event.envelope;
        if !is_new {
            return Turn::Done;
        }
        if behind.contains(&envelope.id) {
            return Turn::Park;
        }
        match held_for(held, event).filter(|_| *ordering != Ordering::None) {
            Some(held) if envelope.id != held.event_id && envelope.sequence >= held.sequence => Turn::Park,
            _ => Turn::Try,
        }
    };
    events.iter().zip(is_new).map(turn).collect()
}

/// What became of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Applied,
    Duplicate,
    Skipped,
    /// It waits in the table behind its key.
    Parked,
    /// It goes to a retry or dead-letter topic.
    Failed {
        step: Step,
        class: Class,
        reason: Reason,
    },
}

/// The verdicts of a batch, and what has to be written for them.
#[derive(Debug, Default)]
pub(crate) struct Settlement {
    pub(crate) verdicts: Vec<Verdict>,
    /// Keys that a failed or early event holds from now on: its place in the batch, the state, the reason.
    pub(crate) hold: Vec<(usize, KeyState, Reason)>,
    /// Places of the events to park.
    pub(crate) park: Vec<usize>,
    /// Keys whose event is settled.
    pub(crate) settled: HashSet<Key>,
    /// Places of dead letters that let their key go on: the handler has to pass over them.
    pub(crate) pass_over: Vec<usize>,
}

/// Events that took effect although an earlier one of their key failed in the same call of the handler, which did not
/// know: all is to be taken back and done again without them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OutOfOrder(pub(crate) HashSet<Uuid>);

/// Judges a batch by its turns and by the `answers` to those that try or were passed over. `histories` are the attempts behind
/// each event. Pure.
pub(crate) fn settle(
    events: &[IncomingEvent],
    turns: &[Turn],
    answers: Vec<Outcome>,
    histories: &[&History],
    held: &HeldKeys,
    ordering: &Ordering,
    schedule: &Schedule,
) -> Result<Settlement, OutOfOrder> {
    // Nearly always: everything took effect, and nobody waits for any of it.
    let nobody_waits = held.is_empty() && turns.iter().all(|turn| *turn == Turn::Try);
    let took_effect = answers.iter().all(|answer| *answer == Outcome::Applied);
    if nobody_waits && took_effect && answers.len() == events.len() {
        return Ok(Settlement {
            verdicts: vec![Verdict::Applied; events.len()],
            ..Settlement::default()
        });
    }
    let mut settlement = Settlement::default();
    let mut failed: HashSet<Key> = HashSet::new();
    let mut tried: HashMap<Key, usize> = HashMap::new();
    let mut out_of_order = HashSet::new();
    let mut answers = answers.into_iter();
    for (place, (event, turn)) in events.iter().zip(turns).enumerate() {
        let answer = match turn {
            Turn::Done => {
                settlement.verdicts.push(Verdict::Duplicate);
                // It took effect on another way than through here, and what waited for it has not heard of it.
                let key = key(event);
                if held.get(&key).is_some_and(|held| unblocks(held, event)) && !failed.contains(&key) {
                    settlement.settled.insert(key);
                }
                continue;
            }
            Turn::Park => {
                let key = key(event);
                if !held.contains_key(&key) && !failed.contains(&key) {
                    // It was taken out of the batch because the one before it had failed. Now that one did not: it has
                    // gone ahead alone, and this one follows through the table.
                    let reason = Reason::new("followed", "tried again without those behind it, it did not fail");
                    let before = tried.get(&key).copied().unwrap_or(place);
                    settlement.hold.push((before, KeyState::Releasing, reason));
                    failed.insert(key);
                }
                settlement.park.push(place);
                settlement.verdicts.push(Verdict::Parked);
                continue;
            }
            // As many answers as such turns: the caller has checked it.
            Turn::Try | Turn::PassedOver => answers.next().unwrap_or(Outcome::Duplicate),
        };
        let attempt = histories
            .get(place)
            .map_or(0, |history| history.attempts)
            .saturating_add(1);
        if *turn == Turn::PassedOver {
            // Its key is held by others now, or by nobody: that stays.
            settlement.verdicts.push(verdict(answer, attempt, schedule));
            continue;
        }
        if *ordering == Ordering::None {
            // No key is held, but one may be from before, or because of a redrive.
            let verdict = verdict(answer, attempt, schedule);
            let key = key(event);
            if !matches!(verdict, Verdict::Failed { .. }) && held.get(&key).is_some_and(|held| unblocks(held, event)) {
                settlement.settled.insert(key);
            }
            settlement.verdicts.push(verdict);
            continue;
        }
        let key = key(event);
        tried.insert(key.clone(), place);
        if failed.contains(&key) {
            match answer {
                Outcome::Duplicate => settlement.verdicts.push(Verdict::Duplicate),
                Outcome::Applied | Outcome::Skipped => {
                    out_of_order.insert(event.envelope.id);
                }
                Outcome::Retry(_) | Outcome::DeadLetter(_) | Outcome::Early(_) => {
                    settlement.park.push(place);
                    settlement.verdicts.push(Verdict::Parked);
                }
            }
            continue;
        }
        let holder = held.get(&key);
        // A dead letter is not forgotten because an earlier event fails as well.
        let holds = holder.is_none_or(|held| held.event_id == event.envelope.id || held.state != KeyState::Dead);
        if let Outcome::Early(reason) = answer {
            if holds {
                settlement.hold.push((place, KeyState::Waiting, reason));
            }
            settlement.park.push(place);
            settlement.verdicts.push(Verdict::Parked);
            failed.insert(key);
            continue;
        }
        let verdict = verdict(answer, attempt, schedule);
        if let Verdict::Failed { step, reason, .. } = &verdict {
            let state = match step {
                Step::Retry { .. } => KeyState::Retrying,
                Step::DeadLetter => KeyState::Dead,
            };
            if state == KeyState::Dead && !ordering.holds(&event.envelope.event_type) {
                settlement.pass_over.push(place);
                // Those behind it in this batch were judged without knowing: they follow through the table.
                if holds {
                    settlement.hold.push((place, KeyState::Releasing, reason.clone()));
                }
            } else if holds {
                settlement.hold.push((place, state, reason.clone()));
            }
            failed.insert(key);
        } else if holder.is_some_and(|held| unblocks(held, event)) {
            settlement.settled.insert(key);
        }
        settlement.verdicts.push(verdict);
    }
    if !out_of_order.is_empty() {
        return Err(OutOfOrder(out_of_order));
    }
    for (place, state, _) in &settlement.hold {
        let key = key(&events[*place]);
        // A key that was settled and then held again in the same batch is held.
        if *state == KeyState::Releasing {
            settlement.settled.insert(key);
        } else {
            settlement.settled.remove(&key);
        }
    }
    Ok(settlement)
}

/// Whether an event that has taken effect lets its key go.
fn unblocks(held: &HeldKey, event: &IncomingEvent) -> bool {
    let envelope = &event.envelope;
    held.event_id == envelope.id || (held.state == KeyState::Waiting && envelope.sequence < held.sequence)
}

pub(crate) fn verdict(answer: Outcome, attempt: u32, schedule: &Schedule) -> Verdict {
    match answer {
        Outcome::Applied => Verdict::Applied,
        Outcome::Duplicate => Verdict::Duplicate,
        Outcome::Skipped => Verdict::Skipped,
        Outcome::Retry(reason) | Outcome::Early(reason) => Verdict::Failed {
            step: schedule.after(attempt),
            class: Class::EventTransient,
            reason,
        },
        Outcome::DeadLetter(reason) => Verdict::Failed {
            step: Step::DeadLetter,
            class: Class::Permanent,
            reason,
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;
    use shared_events::Envelope;
    use time::OffsetDateTime;

    use super::*;
    use crate::handler::Position;

    fn event(sequence: i64) -> IncomingEvent {
        IncomingEvent {
            traceparent: None,
            position: Position {
                topic: "shipments".into(),
                partition: 0,
                offset: sequence,
            },
            envelope: Envelope {
                id: Uuid::now_v7(),
                event_type: "ShipmentCompleted".to_owned(),
                version: 1,
                timestamp: OffsetDateTime::UNIX_EPOCH,
                aggregate_type: "shipment".to_owned(),
                aggregate_id: "1".to_owned(),
                sequence,
                transaction_key: Uuid::nil(),
                payload: RawValue::from_string("{}".to_owned()).unwrap(),
            },
        }
    }

    #[test]
    fn a_batch_that_took_effect_leaves_nothing_to_be_written_whether_or_not_another_key_is_held() {
        let events = [event(1), event(2)];
        let another = HeldKey {
            state: KeyState::Dead,
            event_id: Uuid::now_v7(),
            sequence: 1,
            parked: 0,
        };
        let another = (("shipment".to_owned(), "2".to_owned()), another);
        let ordering = Ordering::PerKey(Parking {
            most_per_key: 10,
            most_in_all: 10,
            released_by: HashSet::new(),
        });
        for held in [HeldKeys::new(), HeldKeys::from([another])] {
            let turns = turns(&events, &[true; 2], &held, &HashSet::new(), &ordering);
            let answers = vec![Outcome::Applied; 2];
            let schedule = Schedule::new(Vec::new());
            let settlement = settle(&events, &turns, answers, &[], &held, &ordering, &schedule).unwrap();
            assert_eq!(settlement.verdicts, [Verdict::Applied, Verdict::Applied]);
            assert!(settlement.hold.is_empty() && settlement.park.is_empty());
            assert!(settlement.settled.is_empty() && settlement.pass_over.is_empty());
        }
    }
}
