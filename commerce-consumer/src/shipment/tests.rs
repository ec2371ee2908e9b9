//! The decision beside a model that keeps nothing but the list of events that took effect, and counts.

use std::collections::BTreeMap;

use inbox::Outcome;
use proptest::prelude::*;
use shared_events::{
    Payload,
    envelope::{Envelope, Fact},
    shipment::{
        AGGREGATE_TYPE, Line, ShipmentCancelled, ShipmentCompleted, ShipmentCreated, ShipmentEvent, ShipmentHeld,
        ShipmentReleased, ShipmentReturned,
    },
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Shipment, decide};
use crate::order::{Order, OrderLine, OrderStatus};

const ORDER: &str = "10248";
const ORDERED: [(&str, i32); 2] = [("11", 12), ("42", 5)];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Created,
    Completed,
    Held,
    Released,
    Cancelled,
    Returned,
}

/// One try: an event for one of two shipments.
#[derive(Debug, Clone)]
struct Try {
    shipment: usize,
    kind: Kind,
    /// Added to the sequence that would be right.
    off_by: i64,
    known_order: bool,
    lines: Vec<(&'static str, i32)>,
}

fn a_try() -> impl Strategy<Value = Try> {
    let kind = prop_oneof![
        3 => Just(Kind::Created), 4 => Just(Kind::Completed), 1 => Just(Kind::Held),
        1 => Just(Kind::Released), 1 => Just(Kind::Cancelled), 4 => Just(Kind::Returned),
    ];
    let off_by = prop_oneof![8 => Just(0), 1 => Just(-1), 1 => Just(1)];
    let lines = prop::sample::subsequence(vec!["11", "42", "unknown"], 1..=2);
    let lines = prop_oneof![9 => Just(vec!["11"]), 9 => Just(vec!["11", "42"]), 1 => lines];
    (
        0..2usize,
        kind,
        off_by,
        prop::bool::weighted(0.95),
        lines,
        prop::collection::vec(1..8i32, 2),
    )
        .prop_map(|(shipment, kind, off_by, known_order, skus, quantities)| Try {
            shipment,
            kind,
            off_by,
            known_order,
            lines: skus.into_iter().zip(quantities).collect(),
        })
}

/// What took effect, in order.
#[derive(Default)]
struct Model {
    accepted: Vec<Try>,
}

#[derive(Debug, PartialEq, Eq)]
enum Expected {
    Applied,
    Duplicate,
    Retry,
    DeadLetter,
}

impl Model {
    fn applied(&self, shipment: usize) -> i64 {
        self.accepted.iter().filter(|event| event.shipment == shipment).count() as i64
    }

    /// Pieces of a sku that events of a kind moved, of one shipment or of all.
    fn moved(&self, kind: Kind, sku: Option<&str>, shipment: Option<usize>) -> i32 {
        self.accepted
            .iter()
            .filter(|event| event.kind == kind && shipment.is_none_or(|shipment| event.shipment == shipment))
            .flat_map(|event| &event.lines)
            .filter(|(moved, _)| sku.is_none_or(|sku| *moved == sku))
            .map(|(_, quantity)| quantity)
            .sum()
    }

    fn outstanding(&self, sku: &str, ordered: i32) -> i32 {
        ordered - self.moved(Kind::Completed, Some(sku), None) - self.moved(Kind::Cancelled, Some(sku), None)
    }

    fn may_follow(&self, event: &Try) -> bool {
        let kinds: Vec<Kind> = self
            .accepted
            .iter()
            .filter(|past| past.shipment == event.shipment)
            .map(|past| past.kind)
            .collect();
        let on_hold = matches!(kinds.last(), Some(Kind::Held));
        let open = matches!(kinds.last(), Some(Kind::Created | Kind::Released));
        let shipped = kinds.contains(&Kind::Completed);
        let out = self.moved(Kind::Completed, None, Some(event.shipment))
            - self.moved(Kind::Returned, None, Some(event.shipment));
        match event.kind {
            Kind::Created => kinds.is_empty(),
            Kind::Completed | Kind::Held => open,
            Kind::Released => on_hold,
            Kind::Cancelled => open || on_hold,
            Kind::Returned => shipped && event.lines.iter().map(|(_, quantity)| quantity).sum::<i32>() <= out,
        }
    }

    fn expects(&self, event: &Try) -> Expected {
        match event.off_by {
            ..0 => return Expected::Duplicate,
            1.. => return Expected::Retry,
            0 => {}
        }
        if !event.known_order {
            // A shipment that is known belongs to its order for ever.
            return if self.applied(event.shipment) == 0 {
                Expected::Retry
            } else {
                Expected::DeadLetter
            };
        }
        if !self.may_follow(event) {
            return Expected::DeadLetter;
        }
        if matches!(event.kind, Kind::Created | Kind::Held | Kind::Released) {
            return Expected::Applied;
        }
        for (sku, quantity) in &event.lines {
            let Some((_, ordered)) = ORDERED.iter().find(|(ordered, _)| ordered == sku) else {
                return Expected::Retry;
            };
            let out = self.moved(Kind::Completed, Some(sku), None) - self.moved(Kind::Returned, Some(sku), None);
            let room = if event.kind == Kind::Returned {
                out
            } else {
                self.outstanding(sku, *ordered)
            };
            if *quantity > room {
                return Expected::DeadLetter;
            }
        }
        Expected::Applied
    }

    fn status(&self) -> OrderStatus {
        let sum = |kind| self.moved(kind, None, None);
        let (shipped, returned, cancelled) = (sum(Kind::Completed), sum(Kind::Returned), sum(Kind::Cancelled));
        let ordered: i32 = ORDERED.iter().map(|(_, quantity)| quantity).sum();
        if cancelled == ordered {
            OrderStatus::Cancelled
        } else if shipped == 0 {
            OrderStatus::Paid
        } else if shipped + cancelled < ordered {
            OrderStatus::PartiallyShipped
        } else if returned == shipped {
            OrderStatus::Returned
        } else {
            OrderStatus::Shipped
        }
    }
}

fn payload(event: &Try) -> ShipmentEvent {
    let order_id = if event.known_order { ORDER } else { "unknown" }.to_owned();
    let lines = event
        .lines
        .iter()
        .map(|(sku, quantity)| Line {
            sku: (*sku).to_owned(),
            quantity: *quantity,
        })
        .collect();
    let (warehouse, carrier, reason) = ("main".to_owned(), "Speedy Express".to_owned(), "why".to_owned());
    let (at, tracking_number) = (OffsetDateTime::UNIX_EPOCH, "T1".to_owned());
    match event.kind {
        Kind::Created => ShipmentEvent::Created(ShipmentCreated {
            order_id,
            warehouse,
            carrier,
            lines,
            created_at: at,
        }),
        Kind::Completed => ShipmentEvent::Completed(ShipmentCompleted {
            order_id,
            warehouse,
            carrier,
            tracking_number,
            lines,
            completed_at: at,
        }),
        Kind::Held => ShipmentEvent::Held(ShipmentHeld {
            order_id,
            warehouse,
            carrier,
            reason,
            lines,
            held_at: at,
        }),
        Kind::Released => ShipmentEvent::Released(ShipmentReleased {
            order_id,
            warehouse,
            carrier,
            lines,
            released_at: at,
        }),
        Kind::Cancelled => ShipmentEvent::Cancelled(ShipmentCancelled {
            order_id,
            warehouse,
            carrier,
            reason,
            lines,
            cancelled_at: at,
        }),
        Kind::Returned => ShipmentEvent::Returned(ShipmentReturned {
            order_id,
            warehouse,
            carrier,
            tracking_number,
            reason,
            lines,
            returned_at: at,
        }),
    }
}

fn wrap<P: Payload>(event: &Try, sequence: i64, payload: &P) -> Envelope {
    let fact = Fact {
        aggregate_type: AGGREGATE_TYPE,
        aggregate_id: event.shipment.to_string(),
        sequence,
        transaction_key: Uuid::nil(),
        timestamp: OffsetDateTime::UNIX_EPOCH,
    };
    Envelope::new(Uuid::new_v4(), fact, payload).expect("payloads are JSON")
}

fn envelope(event: &Try, sequence: i64) -> (Envelope, ShipmentEvent) {
    let payload = payload(event);
    let envelope = match &payload {
        ShipmentEvent::Created(inner) => wrap(event, sequence, inner),
        ShipmentEvent::Completed(inner) => wrap(event, sequence, inner),
        ShipmentEvent::Held(inner) => wrap(event, sequence, inner),
        ShipmentEvent::Released(inner) => wrap(event, sequence, inner),
        ShipmentEvent::Cancelled(inner) => wrap(event, sequence, inner),
        ShipmentEvent::Returned(inner) => wrap(event, sequence, inner),
    };
    (envelope, payload)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn any_history_has_the_effect_of_the_events_that_fit(tries in prop::collection::vec(a_try(), 1..40)) {
        let mut model = Model::default();
        let mut order = Order {
            lines: ORDERED
                .iter()
                .map(|(sku, ordered)| ((*sku).to_owned(), OrderLine { ordered: *ordered, ..OrderLine::default() }))
                .collect(),
        };
        let mut shipments: BTreeMap<usize, Shipment> = BTreeMap::new();
        let mut committed: BTreeMap<String, i64> =
            ORDERED.iter().map(|(sku, ordered)| ((*sku).to_owned(), i64::from(*ordered))).collect();
        let mut sellable: BTreeMap<String, i64> = BTreeMap::new();

        for event in tries {
            let sequence = model.applied(event.shipment) + 1 + event.off_by;
            let (envelope, payload) = envelope(&event, sequence);
            let known = event.known_order.then_some(&order);
            let decided = decide(shipments.get(&event.shipment), known, &envelope, &payload);
            let expected = model.expects(&event);
            let outcome = match &decided {
                Ok(_) => Expected::Applied,
                Err(refusal) => match refusal.outcome() {
                    Outcome::Applied | Outcome::Skipped => unreachable!("a refusal is no effect"),
                    Outcome::Duplicate => Expected::Duplicate,
                    Outcome::Retry(_) | Outcome::Early(_) => Expected::Retry,
                    Outcome::DeadLetter(_) => Expected::DeadLetter,
                },
            };
            prop_assert_eq!(outcome, expected, "{:?}: {:?}", event, decided);
            let Ok(effect) = decided else { continue };
            prop_assert_eq!(effect.shipment.sequence, sequence);
            for (sku, change) in effect.stock {
                *committed.entry(sku.clone()).or_default() += change.committed;
                *sellable.entry(sku).or_default() += change.sellable;
            }
            order = effect.order.unwrap_or(order);
            shipments.insert(event.shipment, effect.shipment);
            model.accepted.push(event);

            for (sku, ordered) in ORDERED {
                let line = order.lines[sku];
                prop_assert_eq!(line.shipped, model.moved(Kind::Completed, Some(sku), None));
                prop_assert_eq!(line.returned, model.moved(Kind::Returned, Some(sku), None));
                prop_assert_eq!(line.cancelled, model.moved(Kind::Cancelled, Some(sku), None));
                prop_assert!(0 <= line.returned && line.returned <= line.shipped);
                prop_assert!(line.outstanding() >= 0);
                prop_assert_eq!(committed[sku], i64::from(model.outstanding(sku, ordered)));
                let back = model.moved(Kind::Returned, Some(sku), None) + model.moved(Kind::Cancelled, Some(sku), None);
                prop_assert_eq!(sellable.get(sku).copied().unwrap_or_default(), i64::from(back));
            }
            prop_assert_eq!(order.status(), model.status());
        }
    }
}
