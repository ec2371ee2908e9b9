use std::collections::HashSet;

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::service::{TestService, new_shipment, too_large};

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_completions_of_one_shipment_append_one_event() {
    let service = TestService::start().await;
    let ids = service.create(20).await;
    for id in ids {
        let complete = format!("/v1/shipments/{id}/complete");
        let answers = join_all((0..16).map(|_| service.post(&complete, json!({})))).await;
        for answer in &answers {
            assert_eq!(answer.expect(200), answers[0].json());
        }
    }
    let events = "SELECT count(*) FROM logistics.outbox WHERE type = 'ShipmentCompleted'";
    assert_eq!(service.count(events).await, 20);
    service.assert_events_match_shipments().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sequences_have_no_gap_under_32_writers_and_nobody_deadlocks() {
    let service = TestService::start().await;
    let ids = service.create(8).await;
    let (service, ids) = (&service, &ids);
    let writers = (0..32_usize).map(|writer| async move {
        for round in 0..25_usize {
            let id = ids[(writer + round) % ids.len()];
            let verb = if (writer + round).is_multiple_of(2) {
                "hold"
            } else {
                "release"
            };
            let body = if verb == "hold" {
                json!({"reason": "busy"})
            } else {
                json!({})
            };
            let answer = service.post(&format!("/v1/shipments/{id}/{verb}"), body).await;
            assert!(matches!(answer.status.as_u16(), 200 | 409), "{}", answer.text);
        }
        // Overlapping sets in different orders: only the order of the locks keeps them apart.
        let mut mine = ids.clone();
        mine.rotate_left(writer % ids.len());
        if writer.is_multiple_of(3) {
            mine.reverse();
        }
        service
            .post("/v1/shipments/complete", json!({ "ids": mine }))
            .await
            .expect(200);
    });
    join_all(writers).await;
    service.assert_events_match_shipments().await;
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(service.count(deadlocks).await, 0);
}

/// What waits together commits together, and each request keeps the outcome it would have had alone.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_wait_together_commit_together_with_an_outcome_each() {
    let service = TestService::start().await;
    let ids = service.create(61).await;
    let (locked, ids) = ids.split_first().unwrap();
    let no_append = no_append(&service).await;
    let mut elsewhere = service.owner.begin().await.unwrap();
    sqlx::query("SELECT FROM logistics.shipments WHERE id = $1 FOR UPDATE")
        .bind(locked)
        .execute(&mut *elsewhere)
        .await
        .unwrap();

    let post = async |path: String, body: Value| service.post(&path, body).await;
    let complete = |id: &i64| format!("/v1/shipments/{id}/complete");
    let good = join_all(ids.iter().map(|id| post(complete(id), json!({}))));
    let held = post(complete(locked), json!({}));
    let unknown = post(complete(&999_999), json!({}));
    let refused = post(format!("/v1/shipments/{}/release", ids[0]), json!({}));
    let path = format!("/v1/shipments/{}/hold", ids[1]);
    let keyed = join_all((0..2).map(|_| service.post_with_key(&path, "k", json!({"reason": "x"}))));
    // The good ones and the one whose shipment is locked; the others may have their answer by then.
    let free = let_go(&service, no_append, 61);
    let others = async {
        let (good, unknown, refused, keyed, ()) = tokio::join!(good, unknown, refused, keyed, free);
        elsewhere.rollback().await.unwrap();
        (good, unknown, refused, keyed)
    };
    let ((good, unknown, refused, keyed), held) = tokio::join!(others, held);
    for (place, answer) in good.iter().enumerate() {
        // The one that is put on hold may be so before it is completed, or after.
        assert!(
            answer.status == 200 || (place == 1 && answer.status == 409),
            "{}",
            answer.text
        );
    }
    held.expect(200);
    unknown.expect(404);
    refused.expect(409);
    for answer in &keyed {
        assert!(matches!(answer.status.as_u16(), 200 | 409), "{}", answer.text);
    }
    service.assert_events_match_shipments().await;
    let transactions = "SELECT count(DISTINCT xmin::text) FROM logistics.outbox WHERE type = 'ShipmentCompleted'";
    let transactions = service.count(transactions).await;
    assert!(transactions < 20, "{transactions} transactions for 61 requests");
}

/// Creations share a transaction with each other and with changes, and each request gets its own shipment.
#[tokio::test(flavor = "multi_thread")]
async fn creations_that_wait_together_commit_together_each_with_its_own_shipment() {
    let service = TestService::start().await;
    let open = service.create(20).await;
    let create = async |order: i32| service.post("/v1/shipments", new_shipment(&order.to_string())).await;
    let no_append = no_append(&service).await;
    let created = join_all((0..40).map(create));
    let keyed = join_all((0..2).map(|_| service.post_with_key("/v1/shipments", "k", new_shipment("keyed"))));
    let complete = async |id: &i64| service.post(&format!("/v1/shipments/{id}/complete"), json!({})).await;
    let completed = join_all(open.iter().map(complete));
    let free = let_go(&service, no_append, 61);
    let (created, keyed, completed, ()) = tokio::join!(created, keyed, completed, free);
    let mut ids = HashSet::new();
    for (order, answer) in created.iter().enumerate() {
        assert_eq!(
            answer.expect(201)["order_id"],
            order.to_string(),
            "its own and nobody else's"
        );
        ids.insert(answer.id());
    }
    assert_eq!(ids.len(), 40);
    for answer in &completed {
        answer.expect(200);
    }
    // The second one finds the first in progress, or its answer.
    assert!(keyed.iter().all(|answer| matches!(answer.status.as_u16(), 201 | 409)));
    let of_the_key = "SELECT count(*) FROM logistics.shipments WHERE order_id = 'keyed'";
    assert_eq!(service.count(of_the_key).await, 1);
    service.assert_events_match_shipments().await;
    let transactions = "SELECT count(DISTINCT xmin::text) FROM logistics.outbox";
    let transactions = service.count(transactions).await;
    assert!(transactions < 20, "{transactions} transactions for 62 requests");
}

/// A creation that makes the group fail fails alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_creation_that_is_refused_at_the_append_takes_no_other_with_it() {
    let service = TestService::start().await;
    let create = async |order: i32| service.post("/v1/shipments", new_shipment(&order.to_string())).await;
    let no_append = no_append(&service).await;
    let good = join_all((0..30).map(create));
    let large = service.post("/v1/shipments", too_large());
    let (good, large, ()) = tokio::join!(good, large, let_go(&service, no_append, 30));
    for answer in &good {
        answer.expect(201);
    }
    assert_eq!(large.expect(413)["code"], "too-large");
    assert_eq!(service.count("SELECT count(*) FROM logistics.shipments").await, 30);
    service.assert_events_match_shipments().await;
}

/// Nobody gets as far as a commit.
async fn no_append(service: &TestService) -> sqlx::PgTransaction<'static> {
    let mut transaction = service.owner.begin().await.unwrap();
    sqlx::query("LOCK TABLE logistics.outbox IN EXCLUSIVE MODE")
        .execute(&mut *transaction)
        .await
        .unwrap();
    transaction
}

/// Once so many requests have come.
async fn let_go(service: &TestService, no_append: sqlx::PgTransaction<'_>, requests: usize) {
    while service.changes.in_progress() < requests {
        tokio::task::yield_now().await;
    }
    no_append.rollback().await.unwrap();
}
