use axum::{
    Router,
    body::Body,
    http::{Request, StatusCode, header},
};
use clap::Parser;
use commerce_consumer::{
    config::GroupSettings,
    consume,
    http::{self, Api},
};
use http_body_util::BodyExt;
use rdkafka::ClientConfig;
use serde_json::{Value, json};
use service_runtime::http::HttpSettings;
use tower::ServiceExt;

use crate::stage::{Parcel, Stage};

#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    http: HttpSettings,
    #[command(flatten)]
    group: GroupSettings,
}

fn api(stage: &Stage) -> Api {
    Api {
        pool: stage.pool.clone(),
        group: "commerce".to_owned(),
    }
}

fn app(stage: &Stage) -> Router {
    let Defaults { http, group } = Defaults::parse_from(["test"]);
    let engine = consume::engine(&group, stage.pool.clone(), ClientConfig::new()).unwrap();
    http::app(api(stage), stage.admin(&engine), Router::new(), &http)
}

async fn get(stage: &Stage, path: &str) -> (StatusCode, Value) {
    let response = app(stage)
        .oneshot(Request::get(path).body(Body::empty()).unwrap())
        .await
        .unwrap();
    let (status, kind) = (response.status(), response.headers()[header::CONTENT_TYPE].clone());
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(
        kind,
        if status.is_success() {
            "application/json"
        } else {
            "application/problem+json"
        }
    );
    (status, serde_json::from_slice(&body).unwrap())
}

#[tokio::test]
async fn an_order_shows_its_lines_and_the_customers_timeline() {
    let stage = Stage::with_sample().await;
    let mut parcel = Parcel::new("7", "10248", &[("11", 12), ("42", 10), ("72", 3)]);
    let mut lost = Parcel::new("8", "10248", &[("72", 2)]);
    let events = [
        parcel.created(),
        parcel.held(),
        parcel.released(),
        parcel.completed(),
        lost.created(),
        lost.cancelled(),
        parcel.returned(&[("11", 2)]),
    ];
    let last = events.last().unwrap().id;
    stage.apply(&events).await;

    let (status, order) = get(&stage, "/v1/orders/10248").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(order["status"], "shipped");
    assert_eq!(order["shipment_ids"], json!(["7", "8"]));
    let kinds: Vec<&str> = order["timeline"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["delayed", "resumed", "shipped", "cancelled", "returned"]);
    assert_eq!(order["timeline"][2]["units"], 25);
    assert_eq!(order["timeline"][2]["tracking_number"], "T-1");
    let line = order["lines"]
        .as_array()
        .unwrap()
        .iter()
        .find(|line| line["sku"] == "72")
        .unwrap();
    assert_eq!(
        *line,
        json!({"sku": "72", "product_name": "Mozzarella di Giovanni", "unit_price": "34.8", "quantity": 5,
               "shipped_quantity": 3, "returned_quantity": 0, "cancelled_quantity": 2})
    );

    let (status, shipment) = get(&stage, "/v1/shipments/7").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        (&shipment["status"], &shipment["units"], &shipment["returned_units"]),
        (&json!("completed"), &json!(25), &json!(2))
    );
    assert_eq!(shipment["last_event"]["id"], last.to_string());
    assert_eq!(shipment["last_event"]["sequence"], 5);

    let (status, product) = get(&stage, "/v1/products/11").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!((&product["id"], &product["sellable"]), (&json!("11"), &json!(22 + 2)));

    let (status, summary) = get(&stage, "/v1/summary").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        summary,
        json!({"orders": {"paid": 829, "partially_shipped": 0, "shipped": 1, "cancelled": 0, "returned": 0},
               "units_shipped": 25, "units_returned": 2, "events_applied": 7})
    );
}

#[tokio::test]
async fn what_does_not_exist_is_a_404_whatever_the_id_looks_like() {
    let stage = Stage::empty().await;
    let long = "9".repeat(3_000);
    for id in [
        "1",
        "x",
        "%00",
        "a%00b",
        "-1",
        "%F0%9F%93%A6",
        "'%3B%20DROP%20TABLE%20x",
        &long,
    ] {
        for kind in ["order", "product", "shipment"] {
            let (status, problem) = get(&stage, &format!("/v1/{kind}s/{id}")).await;
            assert_eq!(status, StatusCode::NOT_FOUND, "{kind} {id}");
            assert_eq!(problem["code"], format!("{kind}-not-found"));
        }
    }
    let (status, problem) = get(&stage, "/v1/orders/%ff").await;
    assert_eq!(
        (status, &problem["code"]),
        (StatusCode::BAD_REQUEST, &json!("malformed-request"))
    );
    let (status, problem) = get(&stage, "/v1/elsewhere").await;
    assert_eq!((status, &problem["code"]), (StatusCode::NOT_FOUND, &json!("not-found")));
}

#[tokio::test]
async fn a_database_that_is_away_is_a_503() {
    let stage = Stage::empty().await;
    stage.pool.close().await;
    for path in [
        "/v1/orders/1",
        "/v1/products/1",
        "/v1/shipments/1",
        "/v1/summary",
        "/admin/held-keys",
        "/admin/dead-letters",
        "/admin/dead-letters/groups",
        "/admin/dead-letters/01a20298-8c22-7739-9baa-62b66b1b868c",
        "/admin/actions",
        "/admin/redrives",
        "/admin/redrives/01a20298-8c22-7739-9baa-62b66b1b868c",
    ] {
        let (status, problem) = get(&stage, path).await;
        assert_eq!(
            (status, &problem["code"]),
            (StatusCode::SERVICE_UNAVAILABLE, &json!("unavailable")),
            "{path}"
        );
    }
}

#[tokio::test]
async fn every_route_is_in_the_specification_and_every_specified_path_is_a_route() {
    let stage = Stage::empty().await;
    let (status, specification) = get(&stage, "/openapi.json").await;
    assert_eq!(status, StatusCode::OK);
    let paths: Vec<&String> = specification["paths"].as_object().unwrap().keys().collect();
    assert_eq!(
        paths,
        [
            "/admin/actions",
            "/admin/consumer",
            "/admin/consumer/limits",
            "/admin/consumer/pause",
            "/admin/consumer/resume",
            "/admin/dead-letters",
            "/admin/dead-letters/archive",
            "/admin/dead-letters/groups",
            "/admin/dead-letters/redrive",
            "/admin/dead-letters/restore",
            "/admin/dead-letters/skip",
            "/admin/dead-letters/{id}",
            "/admin/dead-letters/{id}/dry-run",
            "/admin/dead-letters/{id}/edit",
            "/admin/held-keys",
            "/admin/held-keys/pass",
            "/admin/redrives",
            "/admin/redrives/{id}",
            "/admin/redrives/{id}/cancel",
            "/v1/orders/{id}",
            "/v1/products/{id}",
            "/v1/shipments/{id}",
            "/v1/summary"
        ]
    );
    for path in paths {
        let (_, answer) = get(&stage, &path.replace("{id}", "1")).await;
        assert_ne!(answer["code"], "not-found", "{path} is served");
        let operations = specification["paths"][path].as_object().unwrap();
        assert!(
            operations
                .values()
                .all(|operation| operation["operationId"].is_string()),
            "{path}"
        );
    }
}

/// HAZARDS H3 for reads: a client that hangs up while BEGIN is under way must not leave a connection inside its snapshot, in
/// which the next one would see what is long past.
#[tokio::test(flavor = "multi_thread")]
async fn h3_two_thousand_cancelled_reads_leave_no_connection_inside_a_snapshot() {
    let stage = Stage::with_sample().await;
    let pool = stage.service_pool();
    let Defaults { http, group } = Defaults::parse_from(["test"]);
    let engine = consume::engine(&group, pool.clone(), ClientConfig::new()).unwrap();
    let api = Api {
        pool: pool.clone(),
        group: "commerce".to_owned(),
    };
    let app = http::app(api, stage.admin(&engine), Router::new(), &http);
    let mut cancelled = 0;
    for number in 0..2_000_u32 {
        let request = Request::get("/v1/orders/10248").body(Body::empty()).unwrap();
        let read = tokio::spawn(app.clone().oneshot(request));
        for _ in 0..number % 40 {
            tokio::task::yield_now().await;
        }
        read.abort();
        cancelled += u32::from(read.await.is_err());
        if number % 20 == 19 {
            stage
                .as_owner("UPDATE commerce.products SET name = name || '!' WHERE sku = '1'")
                .await;
            let now = stage
                .number("SELECT length(name)::bigint FROM commerce.products WHERE sku = '1'")
                .await;
            for _ in 0..8 {
                let seen: i64 =
                    sqlx::query_scalar("SELECT length(name)::bigint FROM commerce.products WHERE sku = '1'")
                        .fetch_one(&pool)
                        .await
                        .unwrap();
                assert_eq!(
                    seen, now,
                    "a connection stands in an old snapshot, after {cancelled} cancelled reads"
                );
            }
        }
    }
    assert!(cancelled > 200, "only {cancelled} of 2,000 reads were cancelled");
}
