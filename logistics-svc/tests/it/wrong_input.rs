use axum::{body::Body, http::Method};
use serde_json::{Value, json};

use crate::service::{TestService, new_shipment, request};

/// A request that must be refused: method, path, body; then the status and what the answer must name.
type Case = (&'static str, String, Sent, u16, &'static str);

enum Sent {
    Nothing,
    Json(Value),
    /// Content type and bytes.
    Raw(&'static str, Vec<u8>),
    WithKey(Vec<u8>),
}

use Sent::{Json, Nothing, Raw, WithKey};

fn with(pointer: &str, value: Value) -> Value {
    let mut shipment = new_shipment("10248");
    *shipment.pointer_mut(pointer).unwrap() = value;
    shipment
}

fn text(bytes: &str) -> Sent {
    Raw("application/json", bytes.as_bytes().to_vec())
}

fn creations() -> Vec<Case> {
    let post = |sent: Sent, status: u16, names: &'static str| ("POST", "/v1/shipments".to_owned(), sent, status, names);
    let mut unknown = new_shipment("1");
    unknown["statuz"] = json!("open");
    let mut bound = new_shipment("1");
    bound["status"] = json!("completed");
    let mut missing = new_shipment("1");
    missing.as_object_mut().unwrap().remove("carrier");
    vec![
        post(Nothing, 400, "empty"),
        post(text("{"), 400, "line 1"),
        post(text("{} {}"), 422, "order_id"),
        post(text("\u{feff}{}"), 400, "JSON"),
        post(text("[]"), 422, "the body"),
        post(text("null"), 422, "the body"),
        post(
            text(&format!("{}1{}", "[".repeat(200), "]".repeat(200))),
            422,
            "a JSON object",
        ),
        post(Raw("application/json", vec![b'"', 0xff, b'"']), 400, "JSON"),
        post(
            Raw("application/json", b"{\"order_id\":\"\\ud800\"}".to_vec()),
            400,
            "JSON",
        ),
        post(Raw("text/plain", b"{}".to_vec()), 415, "application/json"),
        post(Raw("application/json", vec![b' '; 1_000_001]), 413, "1000000"),
        post(Json(json!({})), 422, "order_id"),
        post(Json(unknown), 422, "statuz"),
        post(Json(bound), 422, "status"),
        post(Json(missing), 422, "carrier"),
        post(text(r#"{"order_id":"1","order_id":"2"}"#), 422, "order_id"),
        post(Json(with("/order_id", json!(10248))), 422, "/order_id"),
        post(Json(with("/order_id", json!(""))), 422, "/order_id"),
        post(Json(with("/order_id", json!("   "))), 422, "/order_id"),
        post(Json(with("/order_id", json!("a\u{0}b"))), 422, "/order_id"),
        post(Json(with("/warehouse", json!("x".repeat(65)))), 422, "/warehouse"),
        post(Json(with("/carrier", json!("ü".repeat(33)))), 422, "/carrier"),
        post(Json(with("/lines", json!([]))), 422, "/lines"),
        post(Json(with("/lines", json!(null))), 422, "/lines"),
        post(Json(with("/lines/1/quantity", json!(0))), 422, "/lines/1/quantity"),
        post(Json(with("/lines/1/quantity", json!(-5))), 422, "/lines/1/quantity"),
        post(
            Json(with("/lines/1/quantity", json!(1_000_001))),
            422,
            "/lines/1/quantity",
        ),
        post(
            Json(with("/lines/1/quantity", json!(i64::MAX))),
            422,
            "/lines/1/quantity",
        ),
        post(Json(with("/lines/1/quantity", json!(1.5))), 422, "/lines/1/quantity"),
        post(Json(with("/lines/1/quantity", json!("12"))), 422, "/lines/1/quantity"),
        post(text(r#"{"order_id":"1","lines":[{"quantity":1e400}]}"#), 400, "JSON"),
        post(Json(with("/lines/1/sku", json!("42"))), 422, "/lines/1/sku"),
        post(Json(with("/lines/0/sku", json!("\n"))), 422, "/lines/0/sku"),
        post(
            Json(with("/lines/0", json!({"sku": "1", "quantity": 1, "price": 2}))),
            422,
            "/lines/0",
        ),
        post(WithKey(vec![]), 400, "Idempotency-Key"),
        post(WithKey(vec![b'k'; 256]), 400, "Idempotency-Key"),
        post(WithKey(b"two words".to_vec()), 400, "Idempotency-Key"),
        post(WithKey(vec![b'k', 0xfc]), 400, "Idempotency-Key"),
    ]
}

fn many() -> Vec<Case> {
    let create = |body: Value, names| ("POST", "/v1/shipments/batch".to_owned(), Json(body), 422, names);
    let complete = |body: Value, names| ("POST", "/v1/shipments/complete".to_owned(), Json(body), 422, names);
    vec![
        create(json!({"shipments": []}), "/shipments"),
        create(json!({"shipments": vec![new_shipment("1"); 1_001]}), "/shipments"),
        create(
            json!({"shipments": [new_shipment("1"), with("/lines/0/sku", json!(""))]}),
            "/shipments/1/lines/0/sku",
        ),
        create(json!({"shipments": [new_shipment("1"), 7]}), "/shipments/1"),
        complete(json!({"ids": []}), "/ids"),
        complete(json!({"ids": vec![1; 10_001]}), "/ids"),
        complete(json!({"ids": [1, 0]}), "/ids/1"),
        complete(json!({"ids": [1, -9_223_372_036_854_775_808_i64]}), "/ids/1"),
        complete(json!({"ids": [1, 9_223_372_036_854_775_808_u64]}), "/ids/1"),
        complete(json!({"ids": [1, "2"]}), "/ids/1"),
        complete(json!({"ids": [1], "force": true}), "force"),
    ]
}

/// `open` and `completed` are shipments in these states.
fn changes(open: i64, completed: i64) -> Vec<Case> {
    let post = |id: &str, verb: &str, sent: Sent, status, names| {
        ("POST", format!("/v1/shipments/{id}/{verb}"), sent, status, names)
    };
    let (open, completed) = (open.to_string(), completed.to_string());
    let give_back = |lines: Value| Json(json!({"reason": "x", "lines": lines}));
    vec![
        post(
            &open,
            "complete",
            Json(json!({"tracking_number": ""})),
            422,
            "/tracking_number",
        ),
        post(
            &open,
            "complete",
            Json(json!({"tracking_number": "x".repeat(65)})),
            422,
            "/tracking_number",
        ),
        post(&open, "complete", Json(json!({"tracking": "x"})), 422, "tracking"),
        post(&open, "complete", Json(json!([])), 422, "a JSON object"),
        post(&open, "hold", Nothing, 400, "empty"),
        post(&open, "hold", Json(json!({})), 422, "reason"),
        post(&open, "hold", Json(json!({"reason": " "})), 422, "/reason"),
        post(&open, "hold", Json(json!({"reason": "x".repeat(501)})), 422, "/reason"),
        post(&open, "cancel", Json(json!({"reason": "a\u{7}"})), 422, "/reason"),
        post(&open, "release", Json(json!({"reason": "x"})), 422, "reason"),
        post(&open, "release", Nothing, 409, "open"),
        post(&open, "return", Json(json!({"reason": "x"})), 409, "open"),
        post(&completed, "hold", Json(json!({"reason": "x"})), 409, "completed"),
        post(&completed, "cancel", Json(json!({"reason": "x"})), 409, "completed"),
        post(
            &completed,
            "complete",
            Json(json!({"tracking_number": "other"})),
            409,
            "/tracking_number",
        ),
        post(&completed, "return", give_back(json!([])), 422, "/lines"),
        post(
            &completed,
            "return",
            give_back(json!([{"sku": "99", "quantity": 1}])),
            422,
            "/lines/0/sku",
        ),
        post(
            &completed,
            "return",
            give_back(json!([{"sku": "42", "quantity": 1}, {"sku": "11", "quantity": 13}])),
            422,
            "/lines/1/quantity",
        ),
        post(
            &completed,
            "return",
            give_back(json!([{"sku": "42", "quantity": 0}])),
            422,
            "/lines/0/quantity",
        ),
        post("999999", "complete", Nothing, 404, "999999"),
        post("0", "complete", Nothing, 404, "0"),
        post("-1", "hold", Json(json!({"reason": "x"})), 404, "-1"),
        post("9223372036854775808", "complete", Nothing, 404, "9223372036854775808"),
        post("%00", "complete", Nothing, 404, "does not exist"),
        post("%ff", "complete", Nothing, 404, "UTF-8"),
        post("1e3", "release", Nothing, 404, "1e3"),
        post("01", "release", Nothing, 404, "01"),
    ]
}

fn readings() -> Vec<Case> {
    let get = |path: &str, status, names| ("GET", path.to_owned(), Nothing, status, names);
    let altered = "/v1/shipments?cursor=01000000000000000100000000";
    vec![
        get("/v1/shipments/999999", 404, "999999"),
        get("/v1/shipments/abc", 404, "abc"),
        get("/v1/shipments?status=shipped", 400, "#query/status"),
        get("/v1/shipments?status=", 400, "#query/status"),
        get("/v1/shipments?limit=0", 400, "#query/limit"),
        get("/v1/shipments?limit=201", 400, "#query/limit"),
        get("/v1/shipments?limit=-1", 400, "#query/limit"),
        get("/v1/shipments?limit=9223372036854775808", 400, "#query/limit"),
        get("/v1/shipments?limit=1&limit=2", 400, "#query/limit"),
        get("/v1/shipments?order_id=", 400, "#query/order_id"),
        get("/v1/shipments?order_id=%00", 400, "#query/order_id"),
        get("/v1/shipments?offset=10", 400, "#query/offset"),
        get("/v1/shipments?cursor=", 400, "#query/cursor"),
        get(altered, 400, "#query/cursor"),
        get("/v1/shipments?cursor=%F0%9F%92%A9", 400, "#query/cursor"),
        get("/v1/nothing", 404, "openapi"),
        get("//v1/shipments", 404, "openapi"),
        ("PUT", "/v1/shipments/1".to_owned(), Nothing, 405, "Allow"),
        ("DELETE", "/v1/shipments/1".to_owned(), Nothing, 405, "Allow"),
        ("TRACE", "/v1/shipments".to_owned(), Nothing, 405, "Allow"),
    ]
}

#[tokio::test]
async fn g9_wrong_input_is_named_and_changes_nothing() {
    let service = TestService::start().await;
    let ids = service.create(2).await;
    service
        .post(&format!("/v1/shipments/{}/complete", ids[1]), json!({}))
        .await
        .expect(200);
    let before = service.state().await;
    let cases = [creations(), many(), changes(ids[0], ids[1]), readings()];
    for (method, path, sent, status, names) in cases.into_iter().flatten() {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let json = ("content-type", "application/json");
        let (shown, request) = match sent {
            Nothing => (String::new(), request(method.clone(), &path, &[], Body::empty())),
            Json(body) => (
                body.to_string(),
                request(method.clone(), &path, &[json], body.to_string()),
            ),
            Raw(content_type, bytes) => {
                let shown = String::from_utf8_lossy(&bytes).into_owned();
                (
                    shown,
                    request(method.clone(), &path, &[("content-type", content_type)], bytes),
                )
            }
            WithKey(key) => {
                let mut request = request(method.clone(), &path, &[json], new_shipment("1").to_string());
                let value = axum::http::HeaderValue::from_bytes(&key).unwrap();
                request.headers_mut().insert("idempotency-key", value);
                (format!("key {}", String::from_utf8_lossy(&key)), request)
            }
        };
        let shown: String = shown.chars().take(80).collect();
        let answer = service.send(request).await;
        let case = format!("{method} {path} {shown}: {}", answer.text);
        assert_eq!(answer.status.as_u16(), status, "{case}");
        assert_eq!(
            answer.header("content-type"),
            Some("application/problem+json"),
            "{case}"
        );
        let problem = answer.json();
        assert_eq!(problem["status"], status, "{case}");
        let named = problem["errors"][0]["pointer"] == names || problem["detail"].as_str().unwrap().contains(names);
        assert!(named, "{names} is not named by {case}");
        if status == 422 {
            assert!(problem["errors"][0]["pointer"].is_string(), "{case}");
        }
        assert_eq!(service.state().await, before, "changed by {case}");
    }
}

/// G7: what one call may hold in memory.
#[tokio::test]
async fn g9_a_call_whose_shipments_have_too_many_lines_together_is_refused() {
    let service = TestService::start().await;
    let ids = service.create(201).await;
    sqlx::query(
        "INSERT INTO logistics.shipment_lines (shipment_id, sku, quantity)
         SELECT id, 'many ' || number, 1 FROM logistics.shipments, generate_series(1, 498) AS number",
    )
    .execute(&service.owner)
    .await
    .unwrap();
    let before = service.state().await;
    let answer = service.post("/v1/shipments/complete", json!({ "ids": ids })).await;
    assert_eq!(answer.status.as_u16(), 422, "{}", answer.text);
    assert_eq!(answer.json()["errors"][0]["pointer"], "/ids");
    assert_eq!(service.state().await, before);
    let fewer = service.post("/v1/shipments/complete", json!({ "ids": ids[1..] })).await;
    assert_eq!(fewer.json()["counts"]["completed"], 200, "{}", fewer.text);
}
