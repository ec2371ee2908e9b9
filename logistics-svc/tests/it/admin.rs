use axum::http::Method;
use serde_json::{Value, json};

use crate::service::{Answer, OPERATOR_TOKEN, TestService, VIEWER_TOKEN, request};

async fn resend(service: &TestService, token: Option<&str>, body: Value) -> Answer {
    let bearer = token.map(|token| format!("Bearer {token}"));
    let mut headers = vec![("content-type", "application/json")];
    headers.extend(bearer.as_deref().map(|bearer| ("authorization", bearer)));
    service
        .send(request(
            Method::POST,
            "/admin/outbox/resend",
            &headers,
            body.to_string(),
        ))
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outbox_is_counted_by_state_and_each_event_can_be_looked_up() {
    let service = TestService::start().await;
    let ids = service.create(3).await;
    sqlx::query("UPDATE logistics.outbox SET published_at = now() WHERE aggregateid = $1")
        .bind(ids[0].to_string())
        .execute(&service.owner)
        .await
        .unwrap();
    let view = service.get("/admin/outbox").await.expect(200);
    let counts: Vec<(&str, i64)> = view["states"]
        .as_array()
        .unwrap()
        .iter()
        .map(|state| (state["state"].as_str().unwrap(), state["events"].as_i64().unwrap()))
        .collect();
    assert_eq!(counts, [("init", 2), ("failed", 0), ("published", 1), ("completed", 0)]);
    assert!(view["states"][0]["oldest_age_seconds"].as_f64().unwrap() >= 0.0);
    assert!(view["states"][1]["oldest_created_at"].is_null());

    let event: String = sqlx::query_scalar("SELECT id::text FROM logistics.outbox WHERE aggregateid = $1")
        .bind(ids[1].to_string())
        .fetch_one(&service.owner)
        .await
        .unwrap();
    let view = service.get(&format!("/admin/outbox/{event}")).await.expect(200);
    assert_eq!(
        (&view["state"], &view["aggregate_id"], &view["type"], &view["sequence"]),
        (
            &json!("init"),
            &json!(ids[1].to_string()),
            &json!("ShipmentCreated"),
            &json!(1)
        )
    );
    for unknown in ["01a20298-8c22-7739-9baa-62b66b1b868c", "no-id"] {
        let problem = service.get(&format!("/admin/outbox/{unknown}")).await.expect(404);
        assert_eq!(problem["code"], "event-not-found");
    }
    assert_eq!(
        service.get("/admin/relay").await.expect(200),
        json!({"mode": "auto", "runs_here": false})
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_sent_again_only_for_an_operator_who_says_why() {
    let service = TestService::start().await;
    let ids = service.create(2).await;
    let asked = json!({"shipment_id": ids[0], "reason": "lost downstream", "dry_run": false});

    let answer = resend(&service, None, asked.clone()).await;
    assert_eq!(answer.expect(401)["code"], "unauthenticated");
    assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    let answer = resend(&service, Some("a-token-nobody-has"), asked.clone()).await;
    assert_eq!(answer.expect(401)["code"], "unauthenticated");
    let problem = resend(&service, Some(VIEWER_TOKEN), asked.clone()).await.expect(403);
    assert!(problem["detail"].as_str().unwrap().contains("operator"), "{problem}");
    let requests = "SELECT count(*) FROM logistics.outbox_resends";
    assert_eq!(service.count(requests).await, 0);

    // Only said what would be sent, unless it is asked for outright.
    let dry = resend(
        &service,
        Some(OPERATOR_TOKEN),
        json!({"shipment_id": ids[0], "reason": "lost downstream"}),
    )
    .await
    .expect(200);
    assert_eq!(
        (&dry["dry_run"], &dry["matched"], &dry["requested"]),
        (&json!(true), &json!(1), &json!(0))
    );
    assert_eq!(service.count(requests).await, 0);

    let done = resend(&service, Some(OPERATOR_TOKEN), asked.clone()).await.expect(202);
    assert_eq!((&done["matched"], &done["requested"]), (&json!(1), &json!(1)));
    let again = resend(&service, Some(OPERATOR_TOKEN), asked).await.expect(202);
    assert_eq!(again["requested"], 0, "it is asked for already");
    let kept: (String, String) = sqlx::query_as("SELECT requested_by, reason FROM logistics.outbox_resends")
        .fetch_one(&service.owner)
        .await
        .unwrap();
    assert_eq!(kept, ("ann".to_owned(), "lost downstream".to_owned()));
    let event = done["event_ids"][0].as_str().unwrap();
    let view = service.get(&format!("/admin/outbox/{event}")).await.expect(200);
    assert_eq!(view["resend_open"], true);

    let by_time = json!({"from": "2020-01-01T00:00:00Z", "to": "2100-01-01T00:00:00Z", "reason": "r"});
    assert_eq!(
        resend(&service, Some(OPERATOR_TOKEN), by_time).await.expect(200)["matched"],
        2
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_to_send_again_that_means_nothing_names_the_field() {
    let service = TestService::start().await;
    for (body, pointer) in [
        (json!({"reason": "r"}), ""),
        (json!({"ids": [], "reason": "r"}), "/ids"),
        (
            json!({"ids": ["01a20298-8c22-7739-9baa-62b66b1b868c"], "shipment_id": 1, "reason": "r"}),
            "",
        ),
        (json!({"shipment_id": 1, "reason": " "}), "/reason"),
        (
            json!({"from": "yesterday", "to": "2026-11-22T05:00:00Z", "reason": "r"}),
            "/from",
        ),
        (
            json!({"from": "2026-11-22T05:00:00Z", "to": "2026-11-22T05:00:00Z", "reason": "r"}),
            "/to",
        ),
    ] {
        let problem = resend(&service, Some(OPERATOR_TOKEN), body.clone()).await.expect(422);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{body}");
    }
    let problem = resend(&service, Some(OPERATOR_TOKEN), json!({"shipment": 1, "reason": "r"})).await;
    assert!(problem.text.contains("shipment"), "{}", problem.text);
    assert_eq!(service.count("SELECT count(*) FROM logistics.outbox_resends").await, 0);
}
