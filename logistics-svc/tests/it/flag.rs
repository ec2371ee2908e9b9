use std::time::Duration;

use axum::http::Method;
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::service::{ADMIN_TOKEN, Answer, OPERATOR_TOKEN, TestService, request};

async fn ask(service: &TestService, method: Method, path: &str, token: Option<&str>, body: Value) -> Answer {
    let bearer = token.map(|token| format!("Bearer {token}"));
    let mut headers = vec![("content-type", "application/json")];
    headers.extend(bearer.as_deref().map(|bearer| ("authorization", bearer)));
    service.send(request(method, path, &headers, body.to_string())).await
}

async fn set(service: &TestService, body: Value) -> Answer {
    ask(service, Method::PUT, "/admin/flag", Some(ADMIN_TOKEN), body).await
}

/// The flag is followed from now on, until the returned token is cancelled.
async fn follow(service: &TestService) -> (CancellationToken, JoinHandle<anyhow::Result<()>>) {
    let (stop, switch, pool) = (CancellationToken::new(), service.switch.clone(), service.pool.clone());
    let following = tokio::spawn({
        let stop = stop.clone();
        async move { switch.run(pool.clone(), pool, stop).await }
    });
    let end = Instant::now() + Duration::from_secs(30);
    while service.get("/admin/flag").await.expect(200)["instances"] == json!([]) {
        assert!(Instant::now() < end, "it is no instance");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (stop, following)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_anybody_sets_it_everything_goes_by_the_outbox() {
    let service = TestService::start().await;
    let view = service.get("/admin/flag").await.expect(200);
    assert_eq!(
        (
            &view["flag"]["version"],
            &view["flag"]["mode"],
            &view["flag"]["percent"]
        ),
        (&json!(0), &json!("outbox"), &json!(100.0))
    );
    assert_eq!(view["previous"], Value::Null);
    assert_eq!(
        service.get("/admin/flag/history").await.expect(200)["values"],
        json!([])
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_value_is_kept_with_who_set_it_when_and_why() {
    let service = TestService::start().await;
    let (stop, following) = follow(&service).await;
    for number in 1..=3 {
        let reason = format!("drill {number}");
        let view = set(&service, json!({"mode": "outbox", "reason": reason}))
            .await
            .expect(200);
        assert_eq!(view["in_force"], true, "{view}");
        assert_eq!(view["instances"][0]["version"], number, "{view}");
        assert_eq!(
            (
                &view["flag"]["set_by"],
                &view["flag"]["reason"],
                &view["previous"]["version"]
            ),
            (&json!("eve"), &json!(reason), &json!(number - 1))
        );
    }
    let page = service.get("/admin/flag/history?limit=2").await.expect(200);
    assert_eq!(page["values"][0]["version"], 3);
    assert_eq!(page["next"], 2);
    let rest = service.get("/admin/flag/history?limit=2&before=2").await.expect(200);
    assert_eq!(
        (&rest["values"][0]["reason"], &rest["next"]),
        (&json!("drill 1"), &Value::Null)
    );
    stop.cancel();
    following.await.unwrap().unwrap();
    let view = service.get("/admin/flag").await.expect(200);
    assert_eq!(view["instances"], json!([]), "it has left");
}

/// The audit cannot be written around: the service itself may only add to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_value_is_changed_or_taken_out() {
    let service = TestService::start().await;
    set(&service, json!({"mode": "outbox", "reason": "drill"}))
        .await
        .expect(200);
    for statement in [
        "UPDATE logistics.flag_values SET reason = 'another'",
        "DELETE FROM logistics.flag_values",
        "TRUNCATE logistics.flag_values",
        "DELETE FROM logistics.flag_rollouts",
        "UPDATE logistics.flag_rollouts SET reason = 'another'",
    ] {
        let refused = sqlx::query(statement).execute(&service.pool).await;
        let code = refused
            .unwrap_err()
            .into_database_error()
            .unwrap()
            .code()
            .unwrap()
            .into_owned();
        assert_eq!(code, "42501", "{statement}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_values_name_the_field_and_leave_nothing_behind() {
    let service = TestService::start().await;
    for (body, pointer) in [
        (json!({"mode": "async", "reason": "r"}), "/mode"),
        (json!({"mode": "outbox", "rest": "", "reason": "r"}), "/rest"),
        (json!({"mode": "legacy", "percent": 101, "reason": "r"}), "/percent"),
        (json!({"mode": "legacy", "percent": 0.001, "reason": "r"}), "/percent"),
        (json!({"mode": "outbox", "percent": 10, "reason": "r"}), "/rest"),
        (json!({"mode": "outbox", "reason": " "}), "/reason"),
        (json!({"mode": "outbox", "reason": "r".repeat(501)}), "/reason"),
    ] {
        let problem = set(&service, body.clone()).await.expect(422);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{body}");
    }
    let stop = json!({"mismatches": 0});
    let good =
        json!({"mode": "shadow", "rest": "outbox", "steps": [1, 100], "soak_seconds": 1, "stop": stop, "reason": "r"});
    for (field, value, pointer) in [
        ("rest", json!("shadow"), "/rest"),
        ("steps", json!([]), "/steps"),
        ("steps", json!([10, 10]), "/steps/1"),
        ("steps", json!([0]), "/steps/0"),
        ("soak_seconds", json!(-1), "/soak_seconds"),
        ("stop", json!({}), "/stop"),
        ("stop", json!({"error_ratio": -0.1}), "/stop/error_ratio"),
    ] {
        let mut body = good.clone();
        body[field] = value;
        let answer = ask(
            &service,
            Method::POST,
            "/admin/flag/rollout",
            Some(ADMIN_TOKEN),
            body.clone(),
        )
        .await;
        assert_eq!(answer.expect(422)["errors"][0]["pointer"], pointer, "{body}");
    }
    for (token, status) in [(None, 401), (Some(OPERATOR_TOKEN), 403)] {
        let body = json!({"mode": "outbox", "reason": "r"});
        ask(&service, Method::PUT, "/admin/flag", token, body)
            .await
            .expect(status);
        ask(&service, Method::POST, "/admin/flag/rollout", token, good.clone())
            .await
            .expect(status);
    }
    assert_eq!(service.count("SELECT count(*) FROM logistics.flag_values").await, 0);
    assert_eq!(service.count("SELECT count(*) FROM logistics.flag_rollouts").await, 0);
}

/// Here commerce's schema is in no database of this service.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_synchronous_path_is_refused_where_commerce_is_not() {
    let service = TestService::start().await;
    let (stop, following) = follow(&service).await;
    for mode in ["legacy", "shadow"] {
        let problem = set(&service, json!({"mode": mode, "reason": "drill"}))
            .await
            .expect(409);
        assert_eq!(problem["code"], "flag-unavailable");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains("commerce's schema is not in the database"), "{detail}");
    }
    // By another instance, say, that can. This one leaves everything to the outbox.
    sqlx::query(
        "INSERT INTO logistics.flag_values (version, mode, rest, share, set_by, reason)
         VALUES (2, 'legacy', 'legacy', 10000, 'another', 'drill')",
    )
    .execute(&service.pool)
    .await
    .unwrap();
    let ids = service.create(2).await;
    service
        .post(&format!("/v1/shipments/{}/complete", ids[0]), json!({}))
        .await
        .expect(200);
    assert_eq!(service.count("SELECT count(*) FROM logistics.outbox").await, 3);
    stop.cancel();
    following.await.unwrap().unwrap();

    // A start under such a value is refused.
    let error = service
        .switch
        .run(service.pool.clone(), service.pool.clone(), CancellationToken::new())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("set to legacy"), "{error:#}");
    assert!(service.switch.is_refused());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_has_looked_changes_nothing_that_somebody_else_has_set_since() {
    let service = TestService::start().await;
    let (stop, following) = follow(&service).await;
    let first = set(&service, json!({"mode": "outbox", "reason": "one", "if_version": 0}))
        .await
        .expect(200);
    assert_eq!(first["set_version"], 1, "{first}");
    let late = set(&service, json!({"mode": "outbox", "reason": "two", "if_version": 0}))
        .await
        .expect(409);
    assert_eq!(
        (&late["code"], &late["detail"]),
        (&json!("flag-changed"), &json!("it is version 1 now"))
    );
    assert_eq!(service.get("/admin/flag").await.expect(200)["flag"]["reason"], "one");
    stop.cancel();
    following.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reason_is_one_line_and_an_error_ratio_a_share() {
    let service = TestService::start().await;
    for reason in ["a\nversion 9: legacy, by eve", "\u{1b}[2J", "\u{202e}abc", "  "] {
        let refused = set(&service, json!({"mode": "outbox", "reason": reason}))
            .await
            .expect(422);
        assert_eq!(refused["errors"][0]["pointer"], "/reason", "{refused}");
    }
    let body = json!({"mode": "outbox", "rest": "legacy", "steps": [1], "soak_seconds": 1, "stop": {"error_ratio": 5.0}, "reason": "r"});
    let refused = ask(&service, Method::POST, "/admin/flag/rollout", Some(ADMIN_TOKEN), body)
        .await
        .expect(422);
    assert_eq!(refused["errors"][0]["pointer"], "/stop/error_ratio", "{refused}");
    assert_eq!(
        service.get("/admin/flag/history").await.expect(200)["values"],
        json!([])
    );
}
