use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::{io::AsyncReadExt, net::TcpListener};

use crate::service::{TestService, new_shipment, service_pool, test_database, too_large};

/// It only ends a test that has failed.
const DEADLINE: Duration = Duration::from_secs(90);

#[tokio::test]
async fn g1_every_change_has_its_event_and_every_event_its_change() {
    let service = TestService::start().await;
    let id = service.post("/v1/shipments", new_shipment("10248")).await.id();
    let path = |verb: &str| format!("/v1/shipments/{id}/{verb}");
    service
        .post(&path("hold"), json!({"reason": "address"}))
        .await
        .expect(200);
    service.post(&path("release"), json!({})).await.expect(200);
    let completed = service
        .post(&path("complete"), json!({"tracking_number": "1Z"}))
        .await
        .expect(200);
    assert_eq!(
        (
            &completed["status"],
            &completed["sequence"],
            &completed["tracking_number"]
        ),
        (&json!("completed"), &json!(4), &json!("1Z"))
    );
    let part = json!({"reason": "damaged", "lines": [{"sku": "11", "quantity": 2}]});
    let part = service.post(&path("return"), part).await.expect(200);
    assert_eq!(part["status"], "completed");
    let returned = service
        .post(&path("return"), json!({"reason": "rest"}))
        .await
        .expect(200);
    assert_eq!(returned["status"], "returned");
    service.assert_events_match_shipments().await;

    let events: Vec<(String, String, String)> = sqlx::query_as(
        "SELECT type, payload->>'sequence', payload->>'aggregateId' FROM logistics.outbox ORDER BY sequence",
    )
    .fetch_all(&service.owner)
    .await
    .unwrap();
    let types: Vec<&str> = events.iter().map(|event| event.0.as_str()).collect();
    assert_eq!(
        types,
        [
            "ShipmentCreated",
            "ShipmentHeld",
            "ShipmentReleased",
            "ShipmentCompleted",
            "ShipmentReturned",
            "ShipmentReturned"
        ]
    );
    assert!(events.iter().all(|event| event.2 == id.to_string()));
    assert_eq!(service.get(&format!("/v1/shipments/{id}")).await.json(), returned);
}

#[tokio::test]
async fn g1_an_event_above_the_size_limit_rolls_its_change_back() {
    let service = TestService::start().await;
    service.create(3).await;
    let before = service.state().await;
    let alone = service.post_with_key("/v1/shipments", "k1", too_large()).await;
    assert_eq!(alone.expect(413)["code"], "too-large");
    let with_others = json!({"shipments": [new_shipment("1"), too_large(), new_shipment("2")]});
    service
        .post_with_key("/v1/shipments/batch", "k2", with_others)
        .await
        .expect(413);
    assert_eq!(service.state().await, before);
    service.assert_no_open_transaction().await;
}

#[tokio::test]
async fn g1_holds_while_connections_are_cut_at_random() {
    let service = TestService::start().await;
    let done = AtomicBool::new(false);
    let cutter = async {
        let mut cut = 0;
        while !done.load(Ordering::Relaxed) {
            let one: Option<bool> = sqlx::query_scalar(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                  WHERE datname = current_database() AND usename = 'logistics_svc' ORDER BY random() LIMIT 1",
            )
            .fetch_optional(&service.owner)
            .await
            .unwrap();
            cut += i32::from(one == Some(true));
            tokio::time::sleep(Duration::from_millis(7)).await;
        }
        cut
    };
    let writers = async {
        let mut acknowledged = Vec::new();
        let end = Instant::now() + DEADLINE;
        // At one pace of cutting, a slow machine gets less through.
        for round in 0.. {
            if (round >= 60 && acknowledged.len() > 100) || Instant::now() >= end {
                break;
            }
            let created = futures_util::future::join_all((0..8).map(|writer| {
                let order = format!("{round}-{writer}");
                let service = &service;
                async move {
                    let answer = service.post("/v1/shipments", new_shipment(&order)).await;
                    match answer.status.as_u16() {
                        201 => {
                            let complete = format!("/v1/shipments/{}/complete", answer.id());
                            let completed = service.post(&complete, json!({})).await;
                            assert!(matches!(completed.status.as_u16(), 200 | 503), "{}", completed.text);
                            Some((answer.id(), completed.status.as_u16() == 200))
                        }
                        503 => None,
                        _ => panic!("{}", answer.text),
                    }
                }
            }))
            .await;
            acknowledged.extend(created.into_iter().flatten());
        }
        done.store(true, Ordering::Relaxed);
        acknowledged
    };
    let (cut, acknowledged) = futures_util::join!(cutter, writers);
    assert!(cut > 20, "only {cut} connections were cut");
    assert!(
        acknowledged.len() > 100,
        "only {} creations were acknowledged",
        acknowledged.len()
    );
    service.assert_events_match_shipments().await;
    for (id, completed) in acknowledged {
        let status: Option<(String,)> = sqlx::query_as("SELECT status FROM logistics.shipments WHERE id = $1")
            .bind(id)
            .fetch_optional(&service.owner)
            .await
            .unwrap();
        let (status,) = status.unwrap_or_else(|| panic!("shipment {id} was acknowledged and is gone"));
        assert!(!completed || status == "completed", "shipment {id} is {status}");
    }
}

/// A server that is being stopped answers the question for TLS with the end of the connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_up_during_the_greeting_is_away_and_no_defect() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://nobody@{}/none", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut question = [0; 8];
            stream.read_exact(&mut question).await.unwrap();
        }
    });
    let service = TestService::over(test_database().await.unwrap(), service_pool(&url).unwrap())
        .await
        .unwrap();
    for answer in [
        service.post("/v1/shipments", new_shipment("10248")).await,
        service.get("/v1/shipments/1").await,
    ] {
        assert_eq!(answer.status.as_u16(), 503, "{}", answer.text);
        assert_eq!(answer.json()["code"], "unavailable");
    }
}

#[tokio::test]
async fn the_load_tests_endpoint_appends_an_event_and_nothing_else() {
    let service = TestService::start().await;
    let answer = service.post("/load-test/outbox", new_shipment("10248")).await;
    let id = answer.id();
    let count =
        async |query: &'static str| -> i64 { sqlx::query_scalar(query).fetch_one(&service.owner).await.unwrap() };
    assert_eq!(count("SELECT count(*) FROM logistics.shipments").await, 0);
    let events = "SELECT count(*) FROM logistics.outbox WHERE type = 'ShipmentCreated' AND sequence = 1";
    assert_eq!(count(events).await, 1);
    service.get(&format!("/v1/shipments/{id}")).await.expect(404);
}
