use std::{str::FromStr, time::Duration};

use anyhow::Context;
use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Method, Request, StatusCode},
};
use devstack::{
    database::LOGISTICS,
    testing::{TestDatabase, TestServers},
};
use http_body_util::BodyExt;
use logistics_svc::{
    change_shipments::ChangeShipments,
    config::RelayMode,
    find_shipments::FindShipments,
    http::{self, Admin, Api, FlagAdmin},
    schema::{MIGRATOR, SCHEMA},
    switch::Switch,
};
use outbox::{Hints, Operator, Outbox};
use serde_json::{Value, json};
use service_runtime::{
    auth::AuthSettings,
    database::{self, PoolSettings},
    http::HttpSettings,
    schema,
    settings::Secret,
};
use shared_events::topics::COMMERCE_GROUP;
use sqlx::{PgPool, postgres::PgPoolOptions};
use time::OffsetDateTime;
use tower::ServiceExt;

pub(crate) const VIEWER_TOKEN: &str = "a-token-that-may-look";
pub(crate) const OPERATOR_TOKEN: &str = "a-token-that-may-act";
pub(crate) const ADMIN_TOKEN: &str = "a-token-that-may-switch";
pub(crate) const MAX_EVENT_BYTES: usize = 40_000;

/// The service in this process, on a database of its own.
pub(crate) struct TestService {
    pub(crate) app: Router,
    pub(crate) changes: ChangeShipments,
    /// Follows no flag until a test runs it.
    pub(crate) switch: Switch,
    /// As the service's own role.
    pub(crate) pool: PgPool,
    /// As the superuser, to look at what is committed.
    pub(crate) owner: PgPool,
    pub(crate) database: TestDatabase,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    #[track_caller]
    pub(crate) fn expect(&self, status: u16) -> Value {
        let shown: String = self.text.chars().take(1_000).collect();
        assert_eq!(self.status.as_u16(), status, "{shown}");
        self.json()
    }

    #[track_caller]
    pub(crate) fn id(&self) -> i64 {
        self.json()["id"].as_i64().unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

pub(crate) async fn test_database() -> anyhow::Result<TestDatabase> {
    let servers = TestServers::from_env()?;
    let fingerprint: String = MIGRATOR
        .iter()
        .flat_map(|migration| migration.checksum.iter().take(3))
        .map(|byte| format!("{byte:02x}"))
        .collect();
    TestDatabase::create(&servers, "logistics", &fingerprint, async |owner_url| {
        let url = Secret::from_str(owner_url)?;
        Ok(schema::migrate(&url, SCHEMA, &MIGRATOR).await?)
    })
    .await
}

pub(crate) fn http_settings() -> HttpSettings {
    HttpSettings {
        http_max_body_bytes: 1_000_000,
        http_timeout: Duration::from_secs(30),
        http_header_timeout: Duration::from_secs(5),
        http_write_timeout: Duration::from_secs(5),
        http_max_concurrent_requests: 512,
        http_max_connections: 1024,
    }
}

pub(crate) fn service_pool(url: &str) -> anyhow::Result<PgPool> {
    pool_of(8, url)
}

/// As the service makes it.
pub(crate) fn pool_of(connections: u32, url: &str) -> anyhow::Result<PgPool> {
    let settings = PoolSettings {
        database_max_connections: connections,
        database_acquire_timeout: Duration::from_secs(20),
        database_statement_timeout: Duration::from_secs(20),
    };
    Ok(database::pool("logistics-svc", &Secret::from_str(url)?, &settings)?)
}

impl TestService {
    pub(crate) async fn start() -> Self {
        let database = test_database().await.unwrap();
        let pool = service_pool(&database.url_for(LOGISTICS).unwrap()).unwrap();
        Self::over(database, pool).await.unwrap()
    }

    /// The next process over the same database.
    pub(crate) async fn restarted(self) -> Self {
        let pool = service_pool(&self.database.url_for(LOGISTICS).unwrap()).unwrap();
        Self::over(self.database, pool).await.unwrap()
    }

    pub(crate) async fn over(database: TestDatabase, pool: PgPool) -> anyhow::Result<Self> {
        let owner = PgPoolOptions::new()
            .max_connections(2)
            .connect(&database.superuser_url())
            .await
            .context("connect as the owner")?;
        let outbox = Outbox::new(SCHEMA, "logistics", MAX_EVENT_BYTES);
        let switch = Switch::new("here".to_owned(), COMMERCE_GROUP, 8)?;
        let changes = ChangeShipments::new(
            pool.clone(),
            outbox,
            Hints::default(),
            switch.clone(),
            OffsetDateTime::now_utc,
        );
        let grants = AuthSettings {
            admin_tokens: vec![
                format!("vic:viewer:{VIEWER_TOKEN}").parse()?,
                format!("ann:operator:{OPERATOR_TOKEN}").parse()?,
                format!("eve:admin:{ADMIN_TOKEN}").parse()?,
            ],
        }
        .grants()?;
        let api = Api {
            changes: changes.clone(),
            shipments: FindShipments::new(pool.clone()),
            flag: FlagAdmin {
                pool: pool.clone(),
                switch: switch.clone(),
                grants: grants.clone(),
            },
            load_test: true,
        };
        let admin = Admin {
            operator: Operator::new(SCHEMA, pool.clone()),
            relay: None,
            mode: RelayMode::Auto,
            grants,
        };
        Ok(Self {
            app: http::app(Some(api), admin, Router::new(), &http_settings()),
            changes,
            switch,
            pool,
            owner,
            database,
        })
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        send(self.app.clone(), request).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(request(Method::GET, path, &[], Body::empty())).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(json_request(path, None, &body)).await
    }

    pub(crate) async fn post_with_key(&self, path: &str, key: &str, body: Value) -> Answer {
        self.send(json_request(path, Some(key), &body)).await
    }

    /// Creates `count` shipments of two lines; their ids.
    pub(crate) async fn create(&self, count: usize) -> Vec<i64> {
        let mut ids = Vec::with_capacity(count);
        while ids.len() < count {
            let next = (count - ids.len()).min(1_000);
            let shipments: Vec<Value> = (0..next).map(|_| new_shipment("10248")).collect();
            let answer = self
                .post("/v1/shipments/batch", json!({ "shipments": shipments }))
                .await;
            let created = answer.expect(201);
            ids.extend(
                created["items"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|item| item["id"].as_i64().unwrap()),
            );
        }
        ids
    }

    pub(crate) async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.owner).await.unwrap()
    }

    /// Everything a request may change, as one text.
    pub(crate) async fn state(&self) -> String {
        sqlx::query_scalar(
            "SELECT concat_ws(' ',
                (SELECT count(*) || '/' || coalesce(sum(sequence), 0) FROM logistics.shipments),
                (SELECT count(*) || '/' || coalesce(sum(returned_quantity), 0) FROM logistics.shipment_lines),
                (SELECT count(*) FROM logistics.outbox), (SELECT count(*) FROM logistics.idempotency_keys))",
        )
        .fetch_one(&self.owner)
        .await
        .unwrap()
    }

    /// G1 and the ground of G3: every shipment has exactly the events 1..=sequence, and no event is without a shipment.
    pub(crate) async fn assert_events_match_shipments(&self) {
        let wrong: Vec<(String, Option<i64>, i64, i64, i64)> = sqlx::query_as(
            "SELECT coalesce(shipment.id::text, event.aggregateid), shipment.sequence, coalesce(event.events, 0),
                    coalesce(event.first, 0), coalesce(event.last, 0)
               FROM logistics.shipments AS shipment
               FULL JOIN (SELECT aggregateid, count(DISTINCT sequence) AS events, min(sequence) AS first,
                                 max(sequence) AS last, count(*) AS total
                            FROM logistics.outbox GROUP BY aggregateid) AS event
                 ON event.aggregateid = shipment.id::text
              WHERE event.total IS DISTINCT FROM shipment.sequence OR event.events <> event.total
                 OR event.first <> 1 OR event.last <> shipment.sequence",
        )
        .fetch_all(&self.owner)
        .await
        .unwrap();
        assert!(wrong.is_empty(), "shipment, sequence, events, first, last: {wrong:?}");
    }

    /// Polls until no connection of the service has a transaction open; panics after 10 s.
    pub(crate) async fn assert_no_open_transaction(&self) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        loop {
            let open = self
                .count(
                    "SELECT count(*) FROM pg_stat_activity
                      WHERE datname = current_database() AND usename = 'logistics_svc' AND xact_start IS NOT NULL",
                )
                .await;
            if open == 0 {
                return;
            }
            assert!(
                tokio::time::Instant::now() < deadline,
                "{open} transactions are still open"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

pub(crate) async fn send(app: Router, request: Request<Body>) -> Answer {
    let (parts, body) = app.oneshot(request).await.unwrap().into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    Answer {
        status: parts.status,
        headers: parts.headers,
        text: String::from_utf8(bytes.to_vec()).unwrap(),
    }
}

pub(crate) fn request(method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(body.into()).unwrap()
}

pub(crate) fn json_request(path: &str, key: Option<&str>, body: &Value) -> Request<Body> {
    let mut headers = vec![("content-type", "application/json")];
    headers.extend(key.map(|key| ("idempotency-key", key)));
    request(Method::POST, path, &headers, body.to_string())
}

pub(crate) fn new_shipment(order_id: &str) -> Value {
    json!({"order_id": order_id, "warehouse": "main", "carrier": "Federal Shipping",
           "lines": [{"sku": "42", "quantity": 10}, {"sku": "11", "quantity": 12}]})
}

/// An event of more than 40,000 bytes, above the test's limit, of fields that are each allowed.
pub(crate) fn too_large() -> Value {
    let lines: Vec<Value> = (0..500)
        .map(|number| json!({"sku": format!("{number:0>64}"), "quantity": 1_000_000}))
        .collect();
    json!({"order_id": "10248", "warehouse": "main", "carrier": "x", "lines": lines})
}
