use proptest::prelude::*;
use shared_events::{Envelope, envelope::Fact, shipment::AGGREGATE_TYPE};
use time::Duration;
use uuid::Uuid;

use super::*;

const START: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

fn line(sku: &str, quantity: i32) -> Line {
    Line {
        sku: sku.to_owned(),
        quantity,
    }
}

fn new_shipment() -> NewShipment {
    NewShipment {
        order_id: "10248".to_owned(),
        warehouse: "main".to_owned(),
        carrier: "Federal Shipping".to_owned(),
        lines: vec![line("42", 10), line("11", 12), line("72", 5)],
    }
}

fn open() -> Shipment {
    Shipment::create(7, new_shipment(), START).shipment
}

fn changed(shipment: &Shipment, command: &Command) -> Changed {
    match shipment.decide(command, START + Duration::HOUR) {
        Ok(Decision::Changed(changed)) => *changed,
        other => panic!("{command:?} of {} was {other:?}", shipment.status),
    }
}

fn complete() -> Command {
    Command::Complete { tracking_number: None }
}

fn give_back(lines: Option<Vec<Line>>) -> Command {
    Command::Return {
        reason: "damaged".to_owned(),
        lines,
    }
}

#[test]
fn lines_stand_in_the_order_of_their_skus() {
    let skus: Vec<String> = open().lines.into_iter().map(|line| line.sku).collect();
    assert_eq!(skus, ["11", "42", "72"]);
}

#[test]
fn completing_without_a_tracking_number_uses_the_label_number() {
    let completed = changed(&open(), &complete()).shipment;
    assert_eq!(completed.tracking_number.as_deref(), Some("LS-0000000007"));
    assert_eq!((completed.status, completed.sequence), (Status::Completed, 2));
}

#[test]
fn completing_again_is_harmless_unless_it_means_another_parcel() {
    let number = |number: &str| Command::Complete {
        tracking_number: Some(number.to_owned()),
    };
    let completed = changed(&open(), &number("A1")).shipment;
    assert_eq!(completed.decide(&complete(), START), Ok(Decision::AlreadyCompleted));
    assert_eq!(completed.decide(&number("A1"), START), Ok(Decision::AlreadyCompleted));
    let recorded = "A1".to_owned();
    assert_eq!(
        completed.decide(&number("B2"), START),
        Err(Refusal::OtherTrackingNumber { recorded })
    );
}

#[test]
fn a_shipment_is_returned_when_nothing_is_left_out() {
    let completed = changed(&open(), &complete()).shipment;
    let part = changed(&completed, &give_back(Some(vec![line("11", 5), line("72", 5)])));
    assert_eq!(part.shipment.status, Status::Completed);
    let rest = changed(&part.shipment, &give_back(None));
    assert_eq!(rest.shipment.status, Status::Returned);
    assert_eq!(rest.event.lines(), [line("11", 7), line("42", 10)]);
}

#[test]
fn more_than_was_sent_cannot_come_back() {
    let completed = changed(&open(), &complete()).shipment;
    let too_many = completed.decide(&give_back(Some(vec![line("42", 1), line("11", 13)])), START);
    let sku = "11".to_owned();
    assert_eq!(
        too_many,
        Err(Refusal::ReturnsTooMany {
            line: 1,
            sku,
            asked: 13,
            left: 12
        })
    );
    let sku = "99".to_owned();
    assert_eq!(
        completed.decide(&give_back(Some(vec![line("99", 1)])), START),
        Err(Refusal::UnknownSku { line: 0, sku })
    );
}

fn any_command() -> impl Strategy<Value = Command> {
    let reason = || "[a-z]{1,9}";
    let lines = prop::collection::btree_map("(11|42|72|99)", 1..8_i32, 1..4);
    let lines = lines.prop_map(|lines| lines.into_iter().map(|(sku, quantity)| line(&sku, quantity)).collect());
    prop_oneof![
        2 => prop::option::of("[A-Z0-9]{2}").prop_map(|tracking_number| Command::Complete { tracking_number }),
        1 => reason().prop_map(|reason| Command::Hold { reason }),
        1 => Just(Command::Release),
        1 => reason().prop_map(|reason| Command::Cancel { reason }),
        4 => (reason(), prop::option::of(lines)).prop_map(|(reason, lines)| Command::Return { reason, lines }),
    ]
}

/// What the table's constraints say of a row.
fn assert_invariants(shipment: &Shipment) {
    let shipped = matches!(shipment.status, Status::Completed | Status::Returned);
    assert_eq!(shipment.completed_at.is_some(), shipped);
    assert_eq!(shipment.tracking_number.is_some(), shipped);
    let stopped = matches!(shipment.status, Status::OnHold | Status::Cancelled);
    assert!(shipment.reason.is_some() || !stopped);
    for line in &shipment.lines {
        assert!((0..=line.quantity).contains(&line.returned_quantity));
    }
    let all_back = shipment.lines.iter().all(|line| line.left() == 0);
    assert_eq!(all_back, shipment.status == Status::Returned);
}

/// What a consumer reads on the wire is what was decided here.
fn assert_event_survives_the_wire(changed: &Changed) {
    let fact = Fact {
        aggregate_type: AGGREGATE_TYPE,
        aggregate_id: changed.shipment.id.to_string(),
        sequence: changed.shipment.sequence,
        transaction_key: Uuid::nil(),
        timestamp: changed.shipment.updated_at,
    };
    let occasion = crate::announce::Occasion {
        transaction_key: fact.transaction_key,
        now: fact.timestamp,
        traceparent: None,
    };
    let envelope = crate::announce::new_event(changed, &occasion).unwrap().envelope;
    let bytes = envelope.encode().unwrap();
    let decoded = Envelope::decode(bytes.as_bytes()).unwrap();
    assert_eq!(decoded.sequence, fact.sequence);
    assert_eq!(decoded.aggregate_id, fact.aggregate_id);
    assert_eq!(ShipmentEvent::from_envelope(&decoded).unwrap(), changed.event);
}

proptest! {
    #[test]
    fn any_commands_keep_the_invariants_and_number_the_events(commands in prop::collection::vec(any_command(), 0..30)) {
        let created = Shipment::create(7, new_shipment(), START);
        assert_event_survives_the_wire(&created);
        let mut shipment = created.shipment;
        let mut returned = 0;
        for (at, command) in commands.iter().enumerate() {
            let now = START + Duration::seconds(at as i64);
            command.check().unwrap();
            match shipment.decide(command, now) {
                Ok(Decision::Changed(changed)) => {
                    prop_assert_eq!(changed.shipment.sequence, shipment.sequence + 1);
                    prop_assert_eq!(changed.shipment.updated_at, now);
                    prop_assert!(!matches!(shipment.status, Status::Cancelled | Status::Returned), "left a final status");
                    assert_event_survives_the_wire(&changed);
                    if let ShipmentEvent::Returned(event) = &changed.event {
                        returned += event.lines.iter().map(|line| line.quantity).sum::<i32>();
                    }
                    shipment = changed.shipment;
                }
                Ok(Decision::AlreadyCompleted) => prop_assert_eq!(shipment.status, Status::Completed),
                Err(_) => {}
            }
            assert_invariants(&shipment);
            prop_assert_eq!(shipment.lines.iter().map(|line| line.returned_quantity).sum::<i32>(), returned);
        }
    }
}
