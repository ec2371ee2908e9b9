use futures_util::future::join_all;
use serde_json::json;

use crate::service::TestService;

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
