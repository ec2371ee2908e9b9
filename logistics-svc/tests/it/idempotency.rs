use std::sync::atomic::Ordering;

use devstack::database::LOGISTICS;
use futures_util::future::join_all;
use serde_json::json;

use crate::{
    lost_commit::LostCommit,
    service::{Answer, TestService, new_shipment, service_pool, test_database},
};

const REPLAYED: &str = "idempotent-replayed";

/// As a client does that is told "409, Retry-After".
async fn insist(service: &TestService, path: &str, key: &str, body: serde_json::Value) -> Answer {
    for _ in 0..2_000 {
        let answer = service.post_with_key(path, key, body.clone()).await;
        if answer.status.as_u16() != 409 {
            return answer;
        }
        assert_eq!(answer.json()["code"], "idempotency-key-in-progress");
        assert_eq!(answer.header("retry-after"), Some("1"));
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("the key {key} stays in progress");
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_parallel_requests_with_one_key_have_one_effect_and_one_answer() {
    let service = TestService::start().await;
    for round in 0..20_i64 {
        let key = format!("key-{round}");
        let body = new_shipment("10248");
        let answers = join_all((0..50).map(|_| insist(&service, "/v1/shipments", &key, body.clone()))).await;
        let fresh = answers
            .iter()
            .filter(|answer| answer.header(REPLAYED).is_none())
            .count();
        assert_eq!(fresh, 1);
        for answer in &answers {
            answer.expect(201);
            assert_eq!(answer.text, answers[0].text);
            assert_eq!(
                answer.header("location"),
                Some(&*format!("/v1/shipments/{}", answers[0].id()))
            );
        }
        assert_eq!(
            service.count("SELECT count(*) FROM logistics.shipments").await,
            round + 1
        );
    }
    service.assert_events_match_shipments().await;
}

#[tokio::test]
async fn a_key_belongs_to_one_request() {
    let service = TestService::start().await;
    let ids = service.create(2).await;
    let complete = |id: i64| format!("/v1/shipments/{id}/complete");
    let first = service.post_with_key(&complete(ids[0]), "k", json!({})).await;
    first.expect(200);
    let again = service.post_with_key(&complete(ids[0]), "k", json!({})).await;
    assert_eq!((again.text, again.headers.get(REPLAYED).is_some()), (first.text, true));
    let other_body = json!({"tracking_number": "1Z"});
    for answer in [
        service.post_with_key(&complete(ids[0]), "k", other_body).await,
        service.post_with_key(&complete(ids[1]), "k", json!({})).await,
    ] {
        let problem = answer.expect(422);
        assert_eq!(problem["code"], "idempotency-key-reused");
        assert_eq!(problem["errors"][0]["pointer"], "#header/Idempotency-Key");
    }
    // Another operation has its own keys.
    let cancel = format!("/v1/shipments/{}/cancel", ids[1]);
    service
        .post_with_key(&cancel, "k", json!({"reason": "x"}))
        .await
        .expect(200);
}

#[tokio::test]
async fn a_refused_request_keeps_no_answer_and_is_judged_afresh() {
    let service = TestService::start().await;
    let id = service.create(1).await[0];
    let path = |verb: &str| format!("/v1/shipments/{id}/{verb}");
    service.post(&path("hold"), json!({"reason": "x"})).await.expect(200);
    service
        .post_with_key(&path("complete"), "k", json!({}))
        .await
        .expect(409);
    service.post(&path("release"), json!({})).await.expect(200);
    let completed = service.post_with_key(&path("complete"), "k", json!({})).await;
    completed.expect(200);
    assert_eq!(completed.header(REPLAYED), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn h1_a_lost_answer_to_commit_is_told_and_the_key_makes_the_repetition_harmless() {
    let database = test_database().await.unwrap();
    let proxy = LostCommit::in_front_of(&database.url_for(LOGISTICS).unwrap()).await;
    let service = TestService::over(database, service_pool(&proxy.url).unwrap())
        .await
        .unwrap();
    let id = service.create(1).await[0];
    let complete = format!("/v1/shipments/{id}/complete");

    proxy.armed.store(true, Ordering::SeqCst);
    let unknown = service.post_with_key(&complete, "k", json!({})).await;
    let problem = unknown.expect(503);
    assert_eq!(
        (&problem["code"], &problem["retryable"]),
        (&json!("outcome-unknown"), &json!(true))
    );
    assert_eq!(unknown.header("retry-after"), Some("1"));

    let repeated = service.post_with_key(&complete, "k", json!({})).await;
    assert_eq!(repeated.expect(200)["sequence"], 2);
    assert_eq!(repeated.header(REPLAYED), Some("true"), "the commit had happened");
    assert_eq!(service.count("SELECT count(*) FROM logistics.outbox").await, 2);
    service.assert_events_match_shipments().await;
}

#[tokio::test]
async fn answers_are_forgotten_after_a_day_in_small_batches() {
    let service = TestService::start().await;
    for number in 0..7 {
        let key = format!("k{number}");
        service
            .post_with_key("/v1/shipments", &key, new_shipment("1"))
            .await
            .expect(201);
    }
    sqlx::query("UPDATE logistics.idempotency_keys SET created_at = now() - interval '25 hours' WHERE key < 'k5'")
        .execute(&service.owner)
        .await
        .unwrap();
    let delete = || logistics_svc::tables::idempotency_keys::delete_expired(&service.pool, 3);
    assert_eq!(
        (
            delete().await.unwrap(),
            delete().await.unwrap(),
            delete().await.unwrap()
        ),
        (3, 2, 0)
    );
    assert_eq!(
        service.count("SELECT count(*) FROM logistics.idempotency_keys").await,
        2
    );
}
