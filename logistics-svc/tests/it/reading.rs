use axum::{
    body::Body,
    http::{Method, StatusCode},
};
use serde_json::json;

use crate::service::{TestService, new_shipment, request};

#[tokio::test]
async fn pages_hold_every_shipment_once_and_the_link_leads_on() {
    let service = TestService::start().await;
    let mut expected = service.create(125).await;
    expected.reverse();
    let mut seen = Vec::new();
    let mut path = "/v1/shipments?status=open&limit=50".to_owned();
    let mut sizes = Vec::new();
    loop {
        let answer = service.get(&path).await;
        let page = answer.expect(200);
        let items = page["items"].as_array().unwrap();
        sizes.push(items.len());
        seen.extend(items.iter().map(|item| item["id"].as_i64().unwrap()));
        // Created while somebody pages: it belongs to no later page.
        service.create(1).await;
        let Some(link) = answer.header("link") else {
            assert!(page["next_cursor"].is_null());
            break;
        };
        let (target, rel) = link.split_once(">; ").unwrap();
        assert_eq!(rel, "rel=\"next\"");
        assert!(target.ends_with(page["next_cursor"].as_str().unwrap()));
        path = target.trim_start_matches('<').to_owned();
    }
    assert_eq!(sizes, [50, 50, 25]);
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn the_list_is_narrowed_by_order_and_status() {
    let service = TestService::start().await;
    let strange = "a b&c=ü%";
    let id = service.post("/v1/shipments", new_shipment(strange)).await.id();
    service.post("/v1/shipments", new_shipment("other")).await.expect(201);
    let ids = |answer: &crate::service::Answer| {
        let page = answer.expect(200);
        let items = page["items"].as_array().unwrap();
        items
            .iter()
            .map(|item| item["id"].as_i64().unwrap())
            .collect::<Vec<_>>()
    };
    let by_order = "/v1/shipments?order_id=a+b%26c%3D%C3%BC%25";
    assert_eq!(ids(&service.get(by_order).await), [id]);
    assert!(ids(&service.get(&format!("{by_order}&status=completed")).await).is_empty());
    service
        .post(&format!("/v1/shipments/{id}/complete"), json!({}))
        .await
        .expect(200);
    assert_eq!(ids(&service.get("/v1/shipments?status=completed").await), [id]);
}

#[tokio::test]
async fn an_etag_stands_for_the_sequence() {
    let service = TestService::start().await;
    let created = service.post("/v1/shipments", new_shipment("1")).await;
    let path = created.header("location").unwrap().to_owned();
    let first = service.get(&path).await;
    assert_eq!(first.text, created.text);
    assert_eq!(first.header("etag"), Some("\"1\""));
    let known = || request(Method::GET, &path, &[("if-none-match", "\"7\", \"1\"")], Body::empty());
    assert_eq!(service.send(known()).await.status, StatusCode::NOT_MODIFIED);
    service
        .post(&format!("{path}/hold"), json!({"reason": "x"}))
        .await
        .expect(200);
    assert_eq!(service.send(known()).await.header("etag"), Some("\"2\""));
}

#[tokio::test]
async fn the_database_being_away_is_a_503_that_says_so() {
    let service = TestService::start().await;
    service.pool.close().await;
    for answer in [
        service.get("/v1/shipments/1").await,
        service.get("/v1/shipments").await,
        service.post("/v1/shipments", new_shipment("1")).await,
    ] {
        let problem = answer.expect(503);
        assert_eq!(
            (&problem["code"], &problem["retryable"]),
            (&json!("unavailable"), &json!(true))
        );
        assert!(answer.header("retry-after").is_some());
    }
}
