use std::collections::BTreeMap;

use commerce_consumer::apply_shipment;
use inbox::Outcome;
use shared_events::Envelope;

use crate::stage::{Parcel, Stage, sample};

fn error_types(outcomes: &[Outcome]) -> Vec<String> {
    outcomes
        .iter()
        .map(|outcome| match outcome {
            Outcome::Applied => "applied".to_owned(),
            Outcome::Duplicate => "duplicate".to_owned(),
            Outcome::Skipped => "skipped".to_owned(),
            Outcome::Retry(reason) => format!("retry {}", reason.error_type),
            Outcome::Early(reason) => format!("early {}", reason.error_type),
            Outcome::DeadLetter(reason) => format!("dead {}", reason.error_type),
        })
        .collect()
}

#[tokio::test]
async fn the_whole_sample_ships_line_by_line() {
    let stage = Stage::with_sample().await;
    let sample = sample();
    let lines = sample.lines_by_order();
    let mut batch = Vec::new();
    let mut shipped = BTreeMap::new();
    for order in &sample.orders {
        let mut parcel = Parcel::of_order(&lines[&order.id]);
        batch.push(parcel.created());
        if order.shipped_date.is_some() {
            batch.push(parcel.completed());
            for line in &lines[&order.id] {
                shipped.insert((line.order_id.to_string(), line.product_id.to_string()), line.quantity);
            }
        }
    }
    for batch in batch.chunks(500) {
        assert!(
            stage
                .apply(batch)
                .await
                .iter()
                .all(|outcome| *outcome == Outcome::Applied)
        );
    }
    let found: Vec<(String, String, i32)> =
        sqlx::query_as("SELECT order_id, sku, shipped_quantity FROM commerce.order_lines WHERE shipped_quantity > 0")
            .fetch_all(&stage.pool)
            .await
            .unwrap();
    let found: BTreeMap<_, _> = found
        .into_iter()
        .map(|(order, sku, quantity)| ((order, sku), quantity))
        .collect();
    assert_eq!(found, shipped);
    assert_eq!(
        found.values().map(|quantity| i64::from(*quantity)).sum::<i64>(),
        sample.units_shipped()
    );
    assert_eq!(
        stage
            .number("SELECT count(*) FROM commerce.orders WHERE status = 'paid'")
            .await,
        21
    );
    assert_eq!(
        stage
            .number("SELECT count(*) FROM commerce.orders WHERE status = 'shipped'")
            .await,
        809
    );
    assert_eq!(stage.number("SELECT count(*) FROM commerce.order_timeline").await, 809);
    assert_eq!(
        stage
            .number("SELECT sum(sequence)::bigint FROM commerce.shipments")
            .await,
        830 + 809
    );
    stage.assert_books_balance().await;

    // The same events again, as after the loss of every inbox row: the shipments remember.
    for batch in batch.chunks(500) {
        assert!(
            stage
                .apply(batch)
                .await
                .iter()
                .all(|outcome| *outcome == Outcome::Duplicate)
        );
    }
    assert_eq!(stage.number("SELECT count(*) FROM commerce.order_timeline").await, 809);
    stage.assert_books_balance().await;
}

#[tokio::test]
async fn one_batch_holds_good_events_and_every_kind_of_bad_one() {
    let stage = Stage::with_sample().await;
    // 10248: 12 of 11, 10 of 42, 5 of 72.
    let mut first = Parcel::new("a", "10248", &[("11", 10)]);
    let mut too_many = Parcel::new("b", "10248", &[("11", 3)]);
    let mut elsewhere = Parcel::new("c", "999999", &[("11", 1)]);
    let mut wrong_sku = Parcel::new("d", "10248", &[("1", 1)]);
    let mut gap = Parcel::new("e", "10248", &[("72", 1)]);
    let mut second = Parcel::new("f", "10248", &[("11", 2), ("42", 10), ("72", 5)]);
    let never_created = Parcel::new("g", "10248", &[("72", 1)]).completed();
    let foreign = {
        let mut other = first.clone();
        other.created();
        other.completed()
    };
    let foreign = Envelope {
        aggregate_type: "order".to_owned(),
        ..foreign
    };
    let unversioned = Envelope {
        version: 2,
        ..Parcel::new("h", "10248", &[("72", 1)]).created()
    };
    let (lost, after_gap) = {
        gap.created();
        (gap.held(), gap.released())
    };
    let batch = [
        first.created(),
        too_many.created(),
        elsewhere.created(),
        wrong_sku.created(),
        second.created(),
        first.completed(),
        too_many.completed(),
        wrong_sku.completed(),
        after_gap,
        never_created,
        foreign,
        unversioned,
        second.completed(),
        first.returned(&[("11", 11)]),
    ];
    let outcomes = stage.apply(&batch).await;
    drop(lost);
    assert_eq!(
        error_types(&outcomes),
        [
            "applied",
            "applied",
            "retry unknown_order",
            "applied",
            "applied",
            "applied",
            "dead ships_too_many",
            "retry unknown_line",
            "early sequence_gap",
            "dead wrong_status",
            "dead invalid_envelope",
            "dead unknown_version",
            "applied",
            "dead returns_too_many",
        ]
    );
    let status: String = sqlx::query_scalar("SELECT status FROM commerce.orders WHERE id = '10248'")
        .fetch_one(&stage.pool)
        .await
        .unwrap();
    assert_eq!(status, "shipped", "two parcels made the order whole within one batch");
    stage.assert_books_balance().await;
}

#[tokio::test]
async fn an_event_of_an_unknown_type_keeps_its_place_and_nothing_else() {
    let stage = Stage::with_sample().await;
    let unknown = |known: Envelope| Envelope {
        event_type: "ShipmentWeighed".to_owned(),
        ..known
    };
    let mut parcel = Parcel::new("a", "10248", &[("11", 12)]);
    assert_eq!(error_types(&stage.apply(&[parcel.created()]).await), ["applied"]);
    let weighed = unknown(parcel.held());
    let too_early = unknown(parcel.clone().released());
    let shipped = parcel.completed();
    // Of a shipment that nobody has announced: its first event, and one behind it.
    let (first, behind) = {
        let mut other = Parcel::new("b", "10248", &[("72", 1)]);
        (unknown(other.created()), unknown(other.held()))
    };
    let batch = [too_early, weighed.clone(), weighed, shipped, first, behind];
    assert_eq!(
        error_types(&stage.apply(&batch).await),
        [
            "early sequence_gap",
            "skipped",
            "duplicate",
            "applied",
            "skipped",
            "early sequence_gap"
        ]
    );
    let row: (String, i64, String) = sqlx::query_as("SELECT status, sequence, last_event_type FROM commerce.shipments")
        .fetch_one(&stage.pool)
        .await
        .unwrap();
    assert_eq!(row, ("completed".to_owned(), 3, "ShipmentCompleted".to_owned()));
    assert_eq!(stage.number("SELECT count(*) FROM commerce.order_timeline").await, 1);
    stage.assert_books_balance().await;

    // Alone in its batch it takes the same way.
    let last = unknown(parcel.held());
    assert_eq!(error_types(&stage.apply(&[last]).await), ["skipped"]);
    assert_eq!(stage.number("SELECT sequence FROM commerce.shipments").await, 4);
    stage.assert_books_balance().await;
}

#[tokio::test]
async fn creating_a_shipment_leaves_order_stock_and_timeline_as_they_are() {
    let stage = Stage::with_sample().await;
    let rows = "SELECT md5(string_agg(r, ',' ORDER BY r))::text FROM (
        SELECT o::text AS r FROM commerce.orders o UNION ALL SELECT l::text FROM commerce.order_lines l
        UNION ALL SELECT p::text FROM commerce.products p UNION ALL SELECT t::text FROM commerce.order_timeline t) x";
    let before: String = sqlx::query_scalar(rows).fetch_one(&stage.pool).await.unwrap();
    stage.apply(&[Parcel::new("a", "10248", &[("11", 12)]).created()]).await;
    let after: String = sqlx::query_scalar(rows).fetch_one(&stage.pool).await.unwrap();
    assert_eq!(before, after);
    assert_eq!(stage.number("SELECT count(*) FROM commerce.shipments").await, 1);
}

/// Eight workers, batches in any order over the same orders and the same 77 products.
#[tokio::test(flavor = "multi_thread")]
async fn workers_that_meet_the_same_rows_neither_deadlock_nor_lose_a_piece() {
    // Whatever plan the statistics of the day lead to: each of these makes another one cheapest.
    let off = |names: &[&'static str]| names.iter().map(|name| (*name, "off")).collect::<Vec<_>>();
    for planner in [
        Vec::new(),
        off(&["enable_seqscan"]),
        off(&["enable_hashjoin", "enable_nestloop"]),
        off(&[
            "enable_seqscan",
            "enable_bitmapscan",
            "enable_hashjoin",
            "enable_mergejoin",
        ]),
    ] {
        workers_meet(&planner).await;
    }
}

async fn workers_meet(planner: &[(&str, &str)]) {
    let stage = Stage::with_sample().await;
    let workers_pool = stage.pool_with(planner).await;
    let sample = sample();
    let lines = sample.lines_by_order();
    // Each order ships in as many parcels as it has lines, each parcel by another worker.
    let mut of_worker: Vec<Vec<Envelope>> = vec![Vec::new(); 8];
    let mut orders: Vec<_> = sample.orders.iter().collect();
    for (worker, events) in of_worker.iter_mut().enumerate() {
        orders.rotate_left(97);
        for order in &orders {
            for (place, line) in lines[&order.id]
                .iter()
                .enumerate()
                .filter(|(place, _)| place % 8 == worker)
            {
                let (id, sku) = (format!("{}-{place}", order.id), line.product_id.to_string());
                let mut parcel = Parcel::new(&id, &order.id.to_string(), &[(&sku, line.quantity)]);
                events.extend([parcel.created(), parcel.completed()]);
            }
        }
    }
    let workers = of_worker.into_iter().map(|events| {
        let pool = workers_pool.clone();
        tokio::spawn(async move {
            for batch in events.chunks(60) {
                let mut transaction = pool.begin().await.unwrap();
                let all: Vec<&Envelope> = batch.iter().collect();
                let outcomes = apply_shipment::apply(&mut transaction, &all).await.unwrap();
                transaction.commit().await.unwrap();
                assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Applied));
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }
    assert_eq!(
        stage
            .number("SELECT count(*) FROM commerce.orders WHERE status = 'shipped'")
            .await,
        830
    );
    assert_eq!(
        stage
            .number("SELECT sum(shipped_quantity)::bigint FROM commerce.order_lines")
            .await,
        51_317
    );
    assert_eq!(
        stage
            .number("SELECT sum(committed)::bigint FROM commerce.products")
            .await,
        0
    );
    stage.assert_books_balance().await;
}
