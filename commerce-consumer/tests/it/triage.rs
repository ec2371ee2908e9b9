use axum::{
    Router,
    body::Body,
    http::{Request, StatusCode},
};
use clap::Parser;
use commerce_consumer::http::{self, Api};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use service_runtime::http::HttpSettings;
use shared_events::Envelope;
use tower::ServiceExt;

use crate::{
    consuming::Consuming,
    stage::{OPERATOR_TOKEN, Parcel, Stage, VIEWER_TOKEN, until},
};

#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    http: HttpSettings,
}

/// The service as an operator sees it.
pub(crate) struct Desk(Router);

impl Desk {
    pub(crate) fn of(stage: &Stage, consuming: &Consuming<'_>) -> Self {
        let api = Api {
            pool: stage.pool.clone(),
            group: "commerce".to_owned(),
        };
        let settings = Defaults::parse_from(["test"]).http;
        Self(http::app(api, consuming.admin.clone(), Router::new(), &settings))
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, token: Option<&str>, body: Value) -> (StatusCode, Value) {
        let mut request = Request::post(path).header("content-type", "application/json");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        self.send(request.body(Body::from(body.to_string())).unwrap()).await
    }

    async fn send(&self, request: Request<Body>) -> (StatusCode, Value) {
        let response = self.0.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }
}

/// Ships more than was ordered, and comes back from that.
pub(crate) fn oversold() -> (Parcel, Vec<Envelope>) {
    let mut parcel = Parcel::new("1", "10248", &[("11", 13)]);
    let events = vec![parcel.created(), parcel.completed(), parcel.returned(&[("11", 1)])];
    (parcel, events)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_found_repaired_and_redriven_over_rest() {
    let stage = Stage::with_sample().await;
    let consuming = Consuming::start(&stage, "none").await;
    let desk = Desk::of(&stage, &consuming);
    let (_, events) = oversold();
    for event in &events {
        consuming.send(event).await;
    }
    until("the held key", async || {
        stage
            .number("SELECT count(*) FROM commerce.held_keys WHERE state = 'dead' AND parked = 1")
            .await
            == 1
    })
    .await;

    let (_, groups) = desk.get("/admin/dead-letters/groups").await;
    assert_eq!(groups["groups"][0]["error_type"], "ships_too_many");
    assert_eq!(
        (&groups["groups"][0]["letters"], &groups["groups"][0]["state"]),
        (&json!(1), &json!("open"))
    );
    let (_, list) = desk
        .get("/admin/dead-letters?type=ShipmentCompleted&state=open&limit=1")
        .await;
    let id = events[1].id.to_string();
    assert_eq!(list["dead_letters"][0]["id"], id);
    assert_eq!(list.get("next"), None);
    let (_, letter) = desk.get(&format!("/admin/dead-letters/{id}")).await;
    assert_eq!((&letter["parked"], &letter["holds_key"]), (&json!(1), &json!(true)));
    assert_eq!(letter["record_value"], events[1].encode().unwrap());
    assert_eq!(letter["failed_attempts"][0]["error_type"], "ships_too_many");
    let (_, keys) = desk.get("/admin/held-keys?state=dead").await;
    assert_eq!(
        (&keys["held_keys"][0]["aggregate_id"], &keys["held_keys"][0]["parked"]),
        (&json!("1"), &json!(1))
    );

    // A look costs nothing and changes nothing.
    let ask = json!({"ids": [id], "reason": "13 were ordered after all"});
    let (status, answer) = desk
        .post("/admin/dead-letters/redrive", Some(OPERATOR_TOKEN), ask)
        .await;
    assert_eq!(
        (status, &answer["matched"], &answer["decided"]),
        (StatusCode::OK, &json!(1), &json!(0))
    );
    assert_eq!(stage.number("SELECT count(*) FROM commerce.operator_actions").await, 0);

    let repair = "UPDATE commerce.order_lines SET quantity = 13 WHERE order_id = '10248' AND sku = '11'";
    sqlx::query(repair).execute(&stage.pool).await.unwrap_err();
    stage.as_owner(repair).await;
    stage
        .as_owner("UPDATE commerce.products SET committed = committed + 1 WHERE sku = '11'")
        .await;
    let ask = json!({"error_type": "ships_too_many", "reason": "13 were ordered after all", "dry_run": false});
    let (status, answer) = desk
        .post("/admin/dead-letters/redrive", Some(OPERATOR_TOKEN), ask)
        .await;
    assert_eq!((status, &answer["decided"]), (StatusCode::ACCEPTED, &json!(1)));
    until("the shipment and its return", async || {
        stage
            .number("SELECT count(*) FROM commerce.shipments WHERE sequence = 3")
            .await
            == 1
    })
    .await;
    until("nothing held", async || {
        stage.number("SELECT count(*) FROM commerce.held_keys").await == 0
    })
    .await;
    let (_, letter) = desk.get(&format!("/admin/dead-letters/{id}")).await;
    assert_eq!(letter["state"], "resolved");
    let (_, actions) = desk.get("/admin/actions").await;
    let action = &actions["actions"][0];
    assert_eq!(
        (&action["actor"], &action["action"]),
        (&json!("olga"), &json!("redrive"))
    );
    assert_eq!(
        (&action["target"]["letters"][0], &action["reason"]),
        (&json!(id), &json!("13 were ordered after all"))
    );
    consuming.stop().await;
    stage.assert_books_balance().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_skipped_letter_lets_its_shipment_go_on() {
    let stage = Stage::with_sample().await;
    let consuming = Consuming::start(&stage, "none").await;
    let desk = Desk::of(&stage, &consuming);
    let mut parcel = Parcel::new("1", "10248", &[("11", 12)]);
    let (created, completed) = (parcel.created(), parcel.completed());
    // Nobody can return what has not been shipped; then it ships.
    let mut impossible = parcel.clone().returned(&[("11", 1)]);
    impossible.sequence = 2;
    let shipped = Envelope {
        sequence: 3,
        ..completed
    };
    for event in [&created, &impossible, &shipped] {
        consuming.send(event).await;
    }
    until("the held key", async || {
        stage
            .number("SELECT count(*) FROM commerce.held_keys WHERE state = 'dead' AND parked = 1")
            .await
            == 1
    })
    .await;
    let ask = json!({"ids": [impossible.id], "reason": "it was never shipped", "dry_run": false});
    let (status, _) = desk.post("/admin/dead-letters/skip", Some(OPERATOR_TOKEN), ask).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    until("the shipment", async || {
        stage
            .number("SELECT count(*) FROM commerce.shipments WHERE sequence = 3 AND status = 'completed'")
            .await
            == 1
    })
    .await;
    consuming.stop().await;
    stage.assert_books_balance().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_event_of_a_shipment_cannot_be_skipped() {
    let stage = Stage::with_sample().await;
    let consuming = Consuming::start(&stage, "none").await;
    let desk = Desk::of(&stage, &consuming);
    let created = Parcel::new("1", "no such order", &[("11", 1)]).created();
    consuming.send(&created).await;
    until("the letter", async || {
        stage
            .number("SELECT count(*) FROM commerce.dead_letters WHERE state = 'open'")
            .await
            == 1
    })
    .await;
    for dry_run in [true, false] {
        let ask = json!({"type": "ShipmentCreated", "reason": "away with it", "dry_run": dry_run});
        let (status, problem) = desk.post("/admin/dead-letters/skip", Some(OPERATOR_TOKEN), ask).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
        assert!(problem.to_string().contains("cannot be skipped"), "{problem}");
    }
    consuming.stop().await;
    assert_eq!(
        stage
            .number("SELECT count(*) FROM commerce.dead_letters WHERE state = 'open'")
            .await,
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_decide_and_who_asks_wrongly_is_told_so_and_nothing_happens() {
    let stage = Stage::with_sample().await;
    let consuming = Consuming::start(&stage, "none").await;
    let desk = Desk::of(&stage, &consuming);
    let ask = |more: Value| {
        let mut body = json!({"reason": "x", "dry_run": false});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let by_type = ask(json!({"type": "ShipmentHeld"}));
    for path in [
        "/admin/dead-letters/redrive",
        "/admin/dead-letters/skip",
        "/admin/dead-letters/archive",
        "/admin/dead-letters/restore",
        "/admin/held-keys/pass",
        "/admin/consumer/resume",
        "/admin/consumer/pause",
        "/admin/consumer/limits",
        "/admin/redrives",
        "/admin/redrives/01a20298-8c22-7739-9baa-62b66b1b868c/cancel",
        "/admin/dead-letters/01a20298-8c22-7739-9baa-62b66b1b868c/edit",
        "/admin/dead-letters/01a20298-8c22-7739-9baa-62b66b1b868c/dry-run",
    ] {
        assert_eq!(
            desk.post(path, None, by_type.clone()).await.0,
            StatusCode::UNAUTHORIZED,
            "{path}"
        );
        assert_eq!(
            desk.post(path, Some("wrong"), by_type.clone()).await.0,
            StatusCode::UNAUTHORIZED
        );
        assert_eq!(
            desk.post(path, Some(VIEWER_TOKEN), by_type.clone()).await.0,
            StatusCode::FORBIDDEN
        );
    }
    for (wrong, pointer) in [
        (ask(json!({})), ""),
        (ask(json!({"ids": []})), "/ids"),
        (
            ask(json!({"ids": ["01a20298-8c22-7739-9baa-62b66b1b868c"], "type": "x"})),
            "/ids",
        ),
        (ask(json!({"from": "yesterday"})), "/from"),
        (ask(json!({"type": "x", "reason": " "})), "/reason"),
    ] {
        let (status, problem) = desk
            .post("/admin/dead-letters/redrive", Some(OPERATOR_TOKEN), wrong)
            .await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{problem}");
        assert!(
            problem["errors"][0]["pointer"].as_str().unwrap().ends_with(pointer),
            "{problem}"
        );
    }
    for path in [
        "/admin/dead-letters?state=gone",
        "/admin/dead-letters?limit=0",
        "/admin/dead-letters?cursor=x",
        "/admin/dead-letters?colour=red",
        "/admin/dead-letters?type=a&type=b",
        "/admin/dead-letters/groups?from=now",
        "/admin/held-keys?state=free",
        "/admin/actions?before=x",
    ] {
        let (status, problem) = desk.get(path).await;
        assert_eq!(
            (status, &problem["code"]),
            (StatusCode::BAD_REQUEST, &json!("malformed-request")),
            "{path}"
        );
    }
    let (status, problem) = desk.get("/admin/dead-letters/nothing").await;
    assert_eq!(
        (status, &problem["code"]),
        (StatusCode::NOT_FOUND, &json!("dead-letter-not-found"))
    );
    let (status, view) = desk.get("/admin/consumer").await;
    assert_eq!(
        (status, &view["limits"][0]["budget"], &view["stopped"]),
        (StatusCode::OK, &json!("live"), &json!(null))
    );
    assert_eq!(stage.number("SELECT count(*) FROM commerce.operator_actions").await, 0);
    let (status, _) = desk
        .post(
            "/admin/consumer/resume",
            Some(OPERATOR_TOKEN),
            json!({"reason": "after the repair"}),
        )
        .await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        stage
            .number("SELECT count(*) FROM commerce.operator_actions WHERE action = 'resume'")
            .await,
        1
    );
    consuming.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_consumer_is_paused_slowed_down_and_let_go_again_over_rest() {
    let stage = Stage::with_sample().await;
    let consuming = Consuming::start(&stage, "none").await;
    let desk = Desk::of(&stage, &consuming);
    let ask = |body: Value| (Some(OPERATOR_TOKEN), body);
    let (token, body) = ask(json!({"reason": "stocktaking"}));
    let (status, view) = desk.post("/admin/consumer/pause", token, body).await;
    assert_eq!(
        (status, &view["paused_by_operator"]),
        (StatusCode::OK, &json!("stocktaking"))
    );

    let (token, body) = ask(json!({"live": "300", "redrive": "unlimited", "reason": "slowly now"}));
    let (status, view) = desk.post("/admin/consumer/limits", token, body).await;
    let rates = |view: &Value| {
        let limits = view["limits"].as_array().unwrap().clone();
        limits
            .iter()
            .map(|limit| limit["rate"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let (live, retry) = (rates(&view)[0].clone(), rates(&view)[1].clone());
    assert_eq!(
        (status, &*live, &*rates(&view)[2]),
        (StatusCode::OK, "300", "unlimited")
    );
    let (token, body) = ask(json!({"live": "default", "reason": "as before"}));
    let (_, view) = desk.post("/admin/consumer/limits", token, body).await;
    assert!(rates(&view)[0] != "300" && rates(&view)[1] == retry && rates(&view)[2] == "unlimited");

    for (wrong, pointer) in [
        (json!({"live": "fast", "reason": "x"}), "/live"),
        (json!({"retry": "0", "reason": "x"}), "/retry"),
        (json!({"reason": "x"}), ""),
        (json!({"live": "1", "reason": ""}), "/reason"),
    ] {
        let (token, body) = ask(wrong);
        let (status, problem) = desk.post("/admin/consumer/limits", token, body).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{problem}");
        assert!(
            problem["errors"][0]["pointer"].as_str().unwrap().ends_with(pointer),
            "{problem}"
        );
    }
    let mut parcel = Parcel::new("1", "10248", &[("11", 12)]);
    consuming.send(&parcel.created()).await;
    let (token, body) = ask(json!({"reason": "counted"}));
    let (status, view) = desk.post("/admin/consumer/resume", token, body).await;
    assert_eq!((status, &view["paused_by_operator"]), (StatusCode::OK, &Value::Null));
    until("the shipment", async || {
        stage
            .number("SELECT count(*) FROM commerce.shipments WHERE sequence = 1")
            .await
            == 1
    })
    .await;
    let (_, actions) = desk.get("/admin/actions").await;
    let actions: Vec<&str> = actions["actions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|action| action["action"].as_str().unwrap())
        .collect();
    assert_eq!(actions, ["resume", "limit", "limit", "pause"]);
    consuming.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_dead_letters_go_through_again_as_one_redrive_over_rest() {
    let stage = Stage::with_sample().await;
    let consuming = Consuming::start(&stage, "none").await;
    let desk = Desk::of(&stage, &consuming);
    let (_, events) = oversold();
    for event in &events {
        consuming.send(event).await;
    }
    until("the held key", async || {
        stage
            .number("SELECT count(*) FROM commerce.held_keys WHERE state = 'dead' AND parked = 1")
            .await
            == 1
    })
    .await;
    for (wrong, pointer) in [
        (json!({"reason": "x"}), ""),
        (json!({"type": "x", "canary": 0, "reason": "x"}), "/canary"),
        (json!({"type": "x", "rate": 0, "reason": "x"}), "/rate"),
        (
            json!({"type": "x", "abort_percent": 101, "reason": "x"}),
            "/abort_percent",
        ),
        (json!({"type": "x", "reason": ""}), "/reason"),
        (json!({"from": "x", "reason": "x"}), "/from"),
    ] {
        let (status, problem) = desk.post("/admin/redrives", Some(OPERATOR_TOKEN), wrong).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{problem}");
        assert!(
            problem["errors"][0]["pointer"].as_str().unwrap().ends_with(pointer),
            "{problem}"
        );
    }
    let ask = json!({"error_type": "ships_too_many", "reason": "13 were ordered after all"});
    let (status, view) = desk.post("/admin/redrives", Some(OPERATOR_TOKEN), ask).await;
    assert_eq!(
        (status, &view["matched"], &view["busy"], view.get("redrive")),
        (StatusCode::OK, &json!(1), &json!(0), None)
    );
    assert_eq!(stage.number("SELECT count(*) FROM commerce.redrive_jobs").await, 0);

    stage
        .as_owner("UPDATE commerce.order_lines SET quantity = 13 WHERE order_id = '10248' AND sku = '11'")
        .await;
    stage
        .as_owner("UPDATE commerce.products SET committed = committed + 1 WHERE sku = '11'")
        .await;
    let ask = json!({"error_type": "ships_too_many", "dry_run": false, "reason": "13 were ordered after all"});
    let (status, view) = desk.post("/admin/redrives", Some(OPERATOR_TOKEN), ask).await;
    assert_eq!((status, &view["redrive"]["letters"]), (StatusCode::ACCEPTED, &json!(1)));
    let path = format!("/admin/redrives/{}", view["redrive"]["id"].as_str().unwrap());
    until("the redrive to end", async || {
        desk.get(&path).await.1["state"] == "succeeded"
    })
    .await;
    let (_, view) = desk.get(&path).await;
    assert_eq!(
        (&view["took_effect"], &view["filter"], &view["actor"]),
        (&json!(1), &json!({"error_type": "ships_too_many"}), &json!("olga"))
    );
    until("the shipment and its return", async || {
        stage
            .number("SELECT count(*) FROM commerce.shipments WHERE sequence = 3")
            .await
            == 1
    })
    .await;
    let (_, list) = desk.get("/admin/redrives?limit=1").await;
    assert_eq!((&list["redrives"][0]["id"], list.get("next")), (&view["id"], None));
    let (status, _) = desk.get("/admin/redrives/7").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (status, view) = desk
        .post(
            &format!("{path}/cancel"),
            Some(OPERATOR_TOKEN),
            json!({"reason": "too late"}),
        )
        .await;
    assert_eq!(
        (status, &view["state"]),
        (StatusCode::OK, &json!("succeeded")),
        "it has ended"
    );
    consuming.stop().await;
    stage.assert_books_balance().await;
}
