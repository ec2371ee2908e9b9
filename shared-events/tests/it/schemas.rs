use schemars::{JsonSchema, generate::SchemaSettings};
use shared_events::{
    Envelope,
    shipment::{
        ShipmentCancelled, ShipmentCompleted, ShipmentCreated, ShipmentHeld, ShipmentReleased, ShipmentReturned,
    },
    topics::{COMMERCE_GROUP, GroupTopics, SHIPMENTS},
};

use crate::assert_committed;

fn schema<T: JsonSchema>() -> String {
    let schema = SchemaSettings::draft2020_12()
        .into_generator()
        .into_root_schema_for::<T>();
    serde_json::to_string_pretty(&schema).unwrap() + "\n"
}

#[test]
fn the_committed_schemas_are_those_of_the_types() {
    for (file, schema) in [
        ("envelope.json", schema::<Envelope>()),
        ("ShipmentCreated.v1.json", schema::<ShipmentCreated>()),
        ("ShipmentCompleted.v1.json", schema::<ShipmentCompleted>()),
        ("ShipmentHeld.v1.json", schema::<ShipmentHeld>()),
        ("ShipmentReleased.v1.json", schema::<ShipmentReleased>()),
        ("ShipmentCancelled.v1.json", schema::<ShipmentCancelled>()),
        ("ShipmentReturned.v1.json", schema::<ShipmentReturned>()),
    ] {
        assert_committed("schemas", file, &schema);
    }
}

#[test]
fn topic_names_are_those_of_the_design() {
    let topics = GroupTopics::new(SHIPMENTS, COMMERCE_GROUP);
    assert_eq!(
        topics.all(2),
        [
            "logistics.shipments",
            "logistics.shipments.commerce.retry.1",
            "logistics.shipments.commerce.retry.2",
            "logistics.shipments.commerce.dlt",
        ]
    );
}
