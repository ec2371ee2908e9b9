use std::time::{Duration, Instant};

use axum::body::Body;
use devstack::database::LOGISTICS;
use serde_json::json;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

use crate::service::{TestService, http_settings, json_request, new_shipment, pool_of, request, send, test_database};

/// Every creation that is acknowledged is there for others to see, whatever was cancelled before it on the same pool.
async fn assert_acknowledged_means_visible(service: &TestService) {
    for _ in 0..8 {
        let id = service.post("/v1/shipments", new_shipment("visible")).await.id();
        let seen: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM logistics.shipments WHERE id = $1)")
            .bind(id)
            .fetch_one(&service.owner)
            .await
            .unwrap();
        assert!(seen, "shipment {id} was acknowledged and nobody else sees it");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn h3_two_thousand_cancelled_requests_leave_no_open_transaction_and_no_invisible_insert() {
    let service = TestService::start().await;
    let id = service.create(1).await[0];
    assert_acknowledged_means_visible(&service).await;
    let started = Instant::now();
    for _ in 0..20 {
        service.create(1).await;
    }
    let whole_request = started.elapsed() / 20;
    let mut cancelled = 0;
    for number in 0_u64..2_000 {
        let write = json_request("/v1/shipments", Some(&format!("k{number}")), &new_shipment("cancelled"));
        let read = request(
            axum::http::Method::GET,
            &format!("/v1/shipments/{id}"),
            &[],
            Body::empty(),
        );
        let request = if number % 5 == 0 { read } else { write };
        // From "before BEGIN" to "after COMMIT", in steps that meet every await on the way.
        let patience = whole_request.mul_f64((number * 37 % 1_000) as f64 / 1_000.0);
        let sent = tokio::spawn(send(service.app.clone(), request));
        // Timers count milliseconds; this is finer.
        let until = Instant::now() + patience;
        while Instant::now() < until {
            tokio::task::yield_now().await;
        }
        sent.abort();
        cancelled += i32::from(sent.await.is_err());
        if number % 10 == 9 {
            // A poisoned connection is cured by the next transaction on it: look often.
            service.assert_no_open_transaction().await;
            assert_acknowledged_means_visible(&service).await;
        }
    }
    println!("{cancelled} of 2,000 requests were cancelled");
    assert!(cancelled > 500, "only {cancelled} requests were cancelled");
    service.changes.drain().await;
    service.assert_no_open_transaction().await;
    service.assert_events_match_shipments().await;
}

/// Also of one whose transaction has failed; and one that is well is lent again.
#[tokio::test(flavor = "multi_thread")]
async fn h3_a_connection_that_comes_back_inside_a_transaction_is_not_lent_again() {
    let database = test_database().await.unwrap();
    let pool = pool_of(1, &database.url_for(LOGISTICS).unwrap()).unwrap();
    let number = "SELECT pg_backend_pid()";
    let mut before: i32 = sqlx::query_scalar(number).fetch_one(&pool).await.unwrap();
    for (statement, is_lent_again) in [("SELECT 1", true), ("BEGIN", false), ("BEGIN; SELECT 1 / 0", false)] {
        let mut connection = pool.acquire().await.unwrap();
        let executed = sqlx::raw_sql(statement).execute(&mut *connection).await;
        assert_eq!(executed.is_err(), statement.ends_with('0'), "{statement}: {executed:?}");
        drop(connection);
        let after: i32 = sqlx::query_scalar(number).fetch_one(&pool).await.unwrap();
        assert_eq!(after == before, is_lent_again, "{statement}");
        before = after;
    }
    pool.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn h2_work_is_finished_for_a_client_that_hangs_up() {
    let service = TestService::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let server = tokio::spawn({
        let (app, stop) = (service.app.clone(), stop.clone());
        async move { service_runtime::http::serve(listener, app, &http_settings(), stop).await }
    });
    let ids = service.create(300).await;
    for id in &ids {
        let body = json!({"tracking_number": "1Z"}).to_string();
        let head = format!(
            "POST /v1/shipments/{id}/complete HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
             idempotency-key: hang-up-{id}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(head.as_bytes()).await.unwrap();
        // Some are gone before the server has read them, some while it works.
        tokio::time::sleep(Duration::from_micros((*id as u64 % 5) * 400)).await;
        drop(client);
    }
    stop.cancel();
    server.await.unwrap().unwrap();
    service.changes.drain().await;
    service.assert_no_open_transaction().await;
    service.assert_events_match_shipments().await;
    let begun = service
        .count("SELECT count(*) FROM logistics.shipments WHERE status = 'completed'")
        .await;
    println!("{begun} of 300 completions were begun, and finished");
    assert!(begun > 150, "the work of {begun} of 300 clients was done");
    let service = service.restarted().await;
    // What had not been read yet is done by the repetition, what was done is not done again.
    for id in ids {
        let path = format!("/v1/shipments/{id}/complete");
        let body = json!({"tracking_number": "1Z"});
        let service = &service;
        assert_eq!(
            service
                .post_with_key(&path, &format!("hang-up-{id}"), body)
                .await
                .expect(200)["sequence"],
            2
        );
    }
    service.assert_events_match_shipments().await;
}
