use std::collections::BTreeSet;

use axum::http::StatusCode;
use clap::Parser;
use commerce_consumer::{
    apply_shipment::{self, ApplyShipment},
    config::GroupSettings,
    consume,
};
use inbox::{DryRun, Outcome};
use rdkafka::ClientConfig;
use serde_json::{Value, json};
use shared_events::Envelope;
use sqlx::{AssertSqlSafe, PgConnection};

use crate::{
    consuming::Consuming,
    stage::{OPERATOR_TOKEN, Parcel, Stage, until},
    triage::{Desk, oversold},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_event_is_tried_without_effect_edited_and_redriven_over_rest() {
    let stage = Stage::with_sample().await;
    let consuming = Consuming::start(&stage, "none").await;
    let desk = Desk::of(&stage, &consuming);
    let post = async |path: &str, body: Value| desk.post(path, Some(OPERATOR_TOKEN), body).await;
    let (_, events) = oversold();
    for event in &events {
        consuming.send(event).await;
    }
    until("the held key", async || {
        stage
            .number("SELECT count(*) FROM commerce.held_keys WHERE state = 'dead' AND parked = 1")
            .await
            == 1
    })
    .await;
    let path = format!("/admin/dead-letters/{}", events[1].id);
    let (status, tried) = post(&format!("{path}/dry-run"), json!({})).await;
    assert_eq!(
        (status, &tried["outcome"], &tried["error_type"], &tried["changes"]),
        (
            StatusCode::OK,
            &json!("dead_letter"),
            &json!("ships_too_many"),
            &json!([])
        )
    );

    let mut payload: Value = serde_json::from_str(events[1].payload.get()).unwrap();
    payload["lines"][0]["quantity"] = json!(12);
    let edit = format!("{path}/edit");
    for (wrong, pointer) in [
        (json!({"reason": "x"}), ""),
        (json!({"version": 0, "reason": "x"}), ""),
        (json!({"payload": payload, "reason": ""}), "/reason"),
        (json!({"aggregateId": "2", "reason": "x"}), "/aggregateId"),
    ] {
        let (status, problem) = post(&edit, wrong).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{problem}");
        assert!(
            problem["errors"][0]["pointer"].as_str().unwrap().ends_with(pointer),
            "{problem}"
        );
    }
    let whole: Value = serde_json::from_str(&events[1].encode().unwrap()).unwrap();
    let mut whole = whole.as_object().unwrap().clone();
    whole.remove("id");
    let (status, problem) = post(&edit, json!({"envelope": whole, "reason": "x"})).await;
    assert_eq!(
        (status, &problem["errors"][0]["pointer"]),
        (StatusCode::UNPROCESSABLE_ENTITY, &json!("/envelope")),
        "it can be read"
    );
    let (status, shown) = post(&edit, json!({"payload": payload, "reason": "12 were packed"})).await;
    assert_eq!(
        (status, &shown["dry_run"], shown.get("id")),
        (StatusCode::OK, &json!(true), None)
    );
    assert_eq!(shown["before"], events[1].encode().unwrap());
    assert_eq!(stage.number("SELECT count(*) FROM commerce.operator_actions").await, 0);

    let ask = json!({"payload": payload, "reason": "12 were packed", "dry_run": false});
    let (status, edited) = post(&edit, ask.clone()).await;
    assert_eq!(status, StatusCode::OK, "{edited}");
    let new = edited["id"].as_str().unwrap();
    let after: Value = serde_json::from_str(edited["after"].as_str().unwrap()).unwrap();
    assert_eq!((&after["id"], &after["payload"]), (&edited["id"], &payload));
    let (status, problem) = post(&edit, ask.clone()).await;
    assert_eq!(
        (status, &problem["code"]),
        (StatusCode::CONFLICT, &json!("dead-letter-not-open"))
    );
    let (status, problem) = post("/admin/dead-letters/7/edit", ask).await;
    assert_eq!(
        (status, &problem["code"]),
        (StatusCode::NOT_FOUND, &json!("dead-letter-not-found"))
    );
    let (_, letter) = desk.get(&path).await;
    assert_eq!(
        (&letter["state"], &letter["replaced_by"]),
        (&json!("resolved"), &edited["id"])
    );

    let (_, tried) = post(&format!("/admin/dead-letters/{new}/dry-run"), json!({})).await;
    assert_eq!(tried["outcome"], "applied");
    let tables: Vec<&str> = tried["changes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|change| change["table"].as_str().unwrap())
        .collect();
    assert_eq!(
        tables,
        ["order_lines", "order_timeline", "orders", "products", "shipments"]
    );
    assert_eq!(
        (&tried["changes"][0]["before"], &tried["changes"][0]["after"]),
        (&json!({"shipped_quantity": 0}), &json!({"shipped_quantity": 12}))
    );
    let (status, _) = post(
        "/admin/dead-letters/redrive",
        json!({"ids": [new], "reason": "edited", "dry_run": false}),
    )
    .await;
    assert_eq!(status, StatusCode::ACCEPTED);
    until("the shipment and its return", async || {
        stage
            .number("SELECT count(*) FROM commerce.shipments WHERE sequence = 3")
            .await
            == 1
    })
    .await;
    let (_, tried) = post(&format!("/admin/dead-letters/{new}/dry-run"), json!({})).await;
    assert_eq!(
        (&tried["outcome"], &tried["changes"]),
        (&json!("duplicate"), &json!([]))
    );

    // Both letters are done with: out of sight, and back.
    let ask = |dry_run: bool| json!({"type": "ShipmentCompleted", "reason": "done", "dry_run": dry_run});
    let (status, view) = post("/admin/dead-letters/archive", ask(true)).await;
    assert_eq!(
        (status, &view["matched"], &view["changed"]),
        (StatusCode::OK, &json!(2), &json!(0))
    );
    let (_, view) = post("/admin/dead-letters/archive", ask(false)).await;
    assert_eq!((&view["matched"], &view["changed"]), (&json!(2), &json!(2)));
    let listed = async |query: &str| {
        let (_, list) = desk.get(&format!("/admin/dead-letters{query}")).await;
        list["dead_letters"].as_array().unwrap().len()
    };
    assert_eq!((listed("").await, listed("?state=archived").await), (0, 2));
    let (_, letter) = desk.get(&path).await;
    assert_eq!(letter["state"], "archived");
    assert!(letter["deleted_after"].as_str().unwrap() > letter["archived_at"].as_str().unwrap());
    let (_, view) = post(
        "/admin/dead-letters/restore",
        json!({"ids": [new], "reason": "not yet", "dry_run": false}),
    )
    .await;
    assert_eq!(view["changed"], 1);
    assert_eq!(
        (listed("?state=resolved").await, listed("?state=archived").await),
        (1, 1)
    );
    consuming.stop().await;
    stage.assert_books_balance().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shipment_goes_on_without_an_event_that_will_never_come() {
    let stage = Stage::with_sample().await;
    let consuming = Consuming::start(&stage, "none").await;
    let desk = Desk::of(&stage, &consuming);
    let pass = async |body: Value| desk.post("/admin/held-keys/pass", Some(OPERATOR_TOKEN), body).await;
    let mut parcel = Parcel::new("1", "10248", &[("11", 12)]);
    let mut unknown = Parcel::new("2", "10248", &[("42", 10)]);
    let created = parcel.created();
    let lost = [parcel.held(), parcel.released()];
    unknown.created();
    for event in [
        &created,
        &parcel.completed(),
        &parcel.returned(&[("11", 1)]),
        &unknown.held(),
    ] {
        consuming.send(event).await;
    }
    until("both to wait", async || {
        let (_, keys) = desk.get("/admin/held-keys?state=waiting").await;
        let parked = |place: usize| keys["held_keys"][place]["parked"].clone();
        (parked(0), parked(1)) == (json!(2), json!(1))
    })
    .await;
    let ask = |id: &str, to_sequence: i64| json!({"aggregate_type": "shipment", "aggregate_id": id, "to_sequence": to_sequence, "reason": "lost for good"});
    let (status, problem) = pass(ask("1", 5)).await;
    assert_eq!(
        (status, &problem["errors"][0]["pointer"]),
        (StatusCode::UNPROCESSABLE_ENTITY, &json!("/to_sequence")),
        "what has come is not passed over"
    );
    for id in ["2", "3"] {
        let (status, problem) = pass(ask(id, 2)).await;
        assert_eq!(
            (status, &problem["code"]),
            (StatusCode::CONFLICT, &json!("key-not-waiting")),
            "{problem}"
        );
    }
    assert_eq!(stage.number("SELECT count(*) FROM commerce.operator_actions").await, 0);
    let (status, view) = pass(ask("1", 4)).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{view}");
    let shipment = "SELECT count(*) FROM commerce.shipments WHERE sequence = 5 AND status = 'completed'";
    until("the shipment and its return", async || {
        stage.number(shipment).await == 1
    })
    .await;
    // What was lost comes after all.
    for event in &lost {
        consuming.send(event).await;
    }
    until("the duplicates", async || {
        stage.number("SELECT count(*) FROM commerce.inbox").await == 5
    })
    .await;
    consuming.stop().await;
    assert_eq!(stage.number(shipment).await, 1);
    let (_, actions) = desk.get("/admin/actions").await;
    assert_eq!(
        (
            &actions["actions"][0]["action"],
            &actions["actions"][0]["target"]["to_sequence"]
        ),
        (&json!("pass"), &json!(4))
    );
    stage.assert_books_balance().await;
}

#[derive(Parser)]
struct Group {
    #[command(flatten)]
    group: GroupSettings,
}

fn dry_run(stage: &Stage) -> DryRun<ApplyShipment> {
    let settings = Group::parse_from(["test"]).group;
    let engine = consume::engine(&settings, stage.pool.clone(), ClientConfig::new()).unwrap();
    engine.dry_run(stage.pool.clone())
}

/// A dead letter as if the event had died.
async fn bury(stage: &Stage, event: &Envelope) {
    sqlx::query(
        "INSERT INTO commerce.dead_letters
             (consumer, id, aggregate_type, aggregate_id, sequence, event_type, origin_topic, origin_partition, origin_offset,
              attempts, partition, record_value, header_names, header_values, error_class, error_type, error_message, fingerprint,
              consumer_version, holds)
         VALUES ('commerce', $1, $2, $3, $4, $5, 't', 0, 0, 1, 0, $6, '{}', '{}', 'permanent', 'x', 'x', 'x', 'x', true)",
    )
    .bind(event.id)
    .bind(&event.aggregate_type)
    .bind(&event.aggregate_id)
    .bind(event.sequence)
    .bind(&event.event_type)
    .bind(event.encode().unwrap().into_bytes())
    .execute(&stage.pool)
    .await
    .unwrap();
}

async fn tables(connection: &mut PgConnection) -> Vec<String> {
    sqlx::query_scalar("SELECT tablename::text FROM pg_tables WHERE schemaname = 'commerce' ORDER BY 1")
        .fetch_all(connection)
        .await
        .unwrap()
}

/// Every row of every table.
async fn content(stage: &Stage) -> Vec<(String, Vec<String>)> {
    let mut connection = stage.pool.acquire().await.unwrap();
    let mut content = Vec::new();
    for table in tables(&mut connection).await {
        let select = format!("SELECT to_jsonb(t)::text FROM commerce.{table} AS t ORDER BY 1");
        let rows = sqlx::query_scalar(AssertSqlSafe(select)).fetch_all(&mut *connection);
        content.push((table, rows.await.unwrap()));
    }
    content
}

/// Table and primary key of every row that this transaction has written.
async fn written(connection: &mut PgConnection) -> BTreeSet<(String, String)> {
    let mut written = BTreeSet::new();
    for table in tables(&mut *connection).await {
        let key: Vec<String> = sqlx::query_scalar(
            "SELECT attname::text FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY(indkey)
              WHERE indisprimary AND indrelid = ('commerce.' || $1)::regclass",
        )
        .bind(&table)
        .fetch_all(&mut *connection)
        .await
        .unwrap();
        let select =
            format!("SELECT to_jsonb(t)::text FROM commerce.{table} AS t WHERE t.xmin = pg_current_xact_id()::xid");
        let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(select))
            .fetch_all(&mut *connection)
            .await
            .unwrap();
        for row in rows {
            let mut columns: serde_json::Map<String, Value> = serde_json::from_str(&row).unwrap();
            columns.retain(|column, _| key.contains(column));
            if table == "order_timeline" {
                // Each try is given another number.
                columns.clear();
            }
            written.insert((table.clone(), Value::Object(columns).to_string()));
        }
    }
    written
}

#[tokio::test]
async fn the_service_may_delete_letters_and_their_attempts_and_nothing_that_it_must_remember() {
    let stage = Stage::empty().await;
    let deletable: Vec<String> = sqlx::query_scalar(
        "SELECT relname::text FROM pg_class
          WHERE relnamespace = 'commerce'::regnamespace AND relkind = 'r' AND has_table_privilege(oid, 'DELETE')
          ORDER BY 1",
    )
    .fetch_all(&stage.pool)
    .await
    .unwrap();
    assert_eq!(
        deletable,
        ["dead_letters", "failed_attempts", "held_keys", "inbox", "parked_events"]
    );
}

#[tokio::test]
async fn a_dry_run_names_every_row_that_the_effect_writes_and_writes_nothing() {
    let stage = Stage::with_sample().await;
    let dry_run = dry_run(&stage);
    let lines: &[(&str, i32)] = &[("11", 12), ("42", 10), ("72", 5)];
    let (mut kept, mut lost) = (
        Parcel::new("1", "10248", &lines[..2]),
        Parcel::new("2", "10248", &lines[2..]),
    );
    let mut foreign = lost.clone();
    let events = [
        kept.created(),
        kept.held(),
        kept.released(),
        kept.completed(),
        kept.returned(&[("11", 3)]),
        lost.created(),
        Envelope {
            event_type: "ShipmentWeighed".to_owned(),
            sequence: 2,
            ..foreign.created()
        },
        {
            lost.completed();
            lost.cancelled()
        },
    ];
    for event in &events {
        bury(&stage, event).await;
        let before = content(&stage).await;
        let tried = dry_run.letter(event.id).await.unwrap();
        assert!(before == content(&stage).await, "{}", event.event_type);
        let named: BTreeSet<(String, String)> = tried
            .changes
            .into_iter()
            .map(|mut change| {
                if change.table == "order_timeline" {
                    change.key.clear();
                }
                (change.table.to_owned(), Value::Object(change.key).to_string())
            })
            .collect();

        let mut transaction = stage.pool.begin().await.unwrap();
        let outcomes = apply_shipment::apply(&mut transaction, &[event]).await.unwrap();
        let expected = if event.event_type == "ShipmentWeighed" {
            Outcome::Skipped
        } else {
            Outcome::Applied
        };
        assert_eq!(
            (&outcomes[0], &tried.outcome),
            (&expected, &expected),
            "{}",
            event.event_type
        );
        assert_eq!(named, written(&mut transaction).await, "{}", event.event_type);
        assert!(!named.is_empty());
        transaction.commit().await.unwrap();
    }
    stage.assert_books_balance().await;
}

#[tokio::test]
async fn a_dry_run_says_what_would_become_of_a_letter_that_cannot_take_effect() {
    let stage = Stage::with_sample().await;
    let dry_run = dry_run(&stage);
    let (_, oversold) = oversold();
    let unknown = Parcel::new("9", "1", &[("11", 1)]).created();
    for event in oversold.iter().chain([&unknown]) {
        bury(&stage, event).await;
    }
    stage.apply(&oversold[..1]).await;
    let before = content(&stage).await;
    let outcome = async |event: &Envelope| dry_run.letter(event.id).await.unwrap().outcome;
    assert!(
        matches!(outcome(&oversold[1]).await, Outcome::DeadLetter(reason) if reason.error_type == "ships_too_many")
    );
    assert!(matches!(outcome(&oversold[2]).await, Outcome::Early(reason) if reason.error_type == "sequence_gap"));
    assert!(matches!(outcome(&unknown).await, Outcome::Retry(reason) if reason.error_type == "unknown_order"));
    assert_eq!(outcome(&oversold[0]).await, Outcome::Duplicate, "by its sequence");
    assert!(before == content(&stage).await);
}
