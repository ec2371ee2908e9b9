use serde_json::{Value, json};

use crate::service::{TestService, new_shipment};

#[tokio::test]
async fn ten_thousand_shipments_complete_in_one_transaction() {
    let service = TestService::start().await;
    let mut ids = service.create(10_000).await;
    // Not in the order of the locks.
    ids.reverse();
    let started = std::time::Instant::now();
    let answer = service
        .post("/v1/shipments/complete", json!({ "ids": ids }))
        .await
        .expect(200);
    println!("10,000 completions in {:?}", started.elapsed());
    assert_eq!(
        answer["counts"],
        json!({"completed": 10_000, "already_completed": 0, "refused": 0, "not_found": 0})
    );
    let reported: Vec<i64> = answer["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|result| result["id"].as_i64().unwrap())
        .collect();
    assert_eq!(reported, ids);
    let transactions = "SELECT count(DISTINCT tx_key) FROM logistics.outbox WHERE type = 'ShipmentCompleted'";
    assert_eq!(service.count(transactions).await, 1);
    service.assert_events_match_shipments().await;

    let again = service
        .post("/v1/shipments/complete", json!({ "ids": ids }))
        .await
        .expect(200);
    assert_eq!(again["counts"]["already_completed"], 10_000);
    assert_eq!(service.count("SELECT count(*) FROM logistics.outbox").await, 20_000);
}

#[tokio::test]
async fn each_id_has_its_own_result_and_none_holds_up_the_rest() {
    let service = TestService::start().await;
    let ids = service.create(4).await;
    let path = |id: i64, verb: &str| format!("/v1/shipments/{id}/{verb}");
    service
        .post(&path(ids[1], "hold"), json!({"reason": "address"}))
        .await
        .expect(200);
    service.post(&path(ids[2], "complete"), json!({})).await.expect(200);
    let unknown = ids[3] + 1_000;
    let list = [ids[3], unknown, ids[0], ids[1], ids[2], ids[0], ids[3]];
    let answer = service
        .post("/v1/shipments/complete", json!({ "ids": list }))
        .await
        .expect(200);
    let results: Vec<(i64, &str)> = answer["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|result| (result["id"].as_i64().unwrap(), result["outcome"].as_str().unwrap()))
        .collect();
    assert_eq!(
        results,
        [
            (ids[3], "completed"),
            (unknown, "not_found"),
            (ids[0], "completed"),
            (ids[1], "refused"),
            (ids[2], "already_completed")
        ]
    );
    assert_eq!(answer["results"][3]["code"], "wrong-status");
    service.assert_events_match_shipments().await;
}

#[tokio::test]
async fn many_are_created_all_or_none() {
    let service = TestService::start().await;
    let before = service.state().await;
    let mut shipments: Vec<Value> = (0..100).map(|number| new_shipment(&number.to_string())).collect();
    shipments[57]["lines"][1]["quantity"] = json!(0);
    let refused = service
        .post("/v1/shipments/batch", json!({ "shipments": shipments }))
        .await
        .expect(422);
    assert_eq!(refused["errors"][0]["pointer"], "/shipments/57/lines/1/quantity");
    assert_eq!(service.state().await, before);

    shipments[57]["lines"][1]["quantity"] = json!(1);
    let created = service
        .post("/v1/shipments/batch", json!({ "shipments": shipments }))
        .await
        .expect(201);
    let orders: Vec<&str> = created["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["order_id"].as_str().unwrap())
        .collect();
    assert_eq!(orders, (0..100).map(|number| number.to_string()).collect::<Vec<_>>());
    for item in created["items"].as_array().unwrap() {
        let read = service.get(&format!("/v1/shipments/{}", item["id"])).await.expect(200);
        assert_eq!(&read, item);
    }
    service.assert_events_match_shipments().await;
}
