//! A database per test with the sample in it, and events as logistics would announce them.

use std::{path::PathBuf, time::Duration, time::Instant};

use clap::Parser;
use commerce_consumer::{
    apply_shipment::{self, ApplyShipment},
    http::Admin,
    import,
    schema::MIGRATOR,
};
use devstack::{
    database::COMMERCE,
    testing::{TestDatabase, TestServers},
};
use inbox::{Engine, Outcome};
use samples::northwind::{self, Northwind};
use service_runtime::{auth::AuthSettings, database::PoolSettings, schema, settings::Secret};
use shared_events::{
    Envelope, Payload,
    envelope::Fact,
    shipment::{
        AGGREGATE_TYPE, Line, ShipmentCancelled, ShipmentCompleted, ShipmentCreated, ShipmentHeld, ShipmentReleased,
        ShipmentReturned,
    },
};
use sqlx::{
    Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use time::OffsetDateTime;
use uuid::Uuid;

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) const VIEWER_TOKEN: &str = "viewer-token-0123456789";
pub(crate) const OPERATOR_TOKEN: &str = "operator-token-0123456789";

#[derive(Parser)]
struct Tokens {
    #[command(flatten)]
    auth: AuthSettings,
}

#[derive(Parser)]
struct Pool {
    #[command(flatten)]
    pool: PoolSettings,
}

pub(crate) struct Stage {
    pub(crate) servers: TestServers,
    /// As `commerce_svc`, like the service itself.
    pub(crate) pool: PgPool,
    // Dropped, and with it the database, after the pool.
    database: TestDatabase,
}

impl Stage {
    pub(crate) async fn empty() -> Self {
        let servers = TestServers::from_env().unwrap();
        let owner = async |url: &str| {
            let url: Secret = url.parse()?;
            Ok(schema::migrate(&url, "commerce", &MIGRATOR).await?)
        };
        let database = TestDatabase::create(&servers, "commerce", &fingerprint(), owner)
            .await
            .unwrap();
        let pool = PgPoolOptions::new()
            .max_connections(12)
            .connect(&database.url_for(COMMERCE).unwrap())
            .await
            .unwrap();
        Self {
            servers,
            pool,
            database,
        }
    }

    pub(crate) async fn with_sample() -> Self {
        let stage = Self::empty().await;
        import::import(&stage.pool, &sample_dir()).await.unwrap();
        stage
    }

    /// Applies a batch in a transaction of its own.
    pub(crate) async fn apply(&self, envelopes: &[Envelope]) -> Vec<Outcome> {
        let mut transaction = self.pool.begin().await.unwrap();
        let all: Vec<&Envelope> = envelopes.iter().collect();
        let outcomes = apply_shipment::apply(&mut transaction, &all).await.unwrap();
        transaction.commit().await.unwrap();
        outcomes
    }

    /// The operators' side of an engine, with a token per role.
    pub(crate) fn admin(&self, engine: &Engine<ApplyShipment>) -> Admin {
        let tokens = format!("--admin-tokens=vic:viewer:{VIEWER_TOKEN},olga:operator:{OPERATOR_TOKEN}");
        Admin {
            operator: engine.operator(self.pool.clone()),
            dry_run: engine.dry_run(self.pool.clone()),
            pass: engine.pass(self.pool.clone()),
            status: engine.status(),
            limits: engine.limits(),
            controls: engine.controls(),
            grants: Tokens::parse_from(["test", &tokens]).auth.grants().unwrap(),
            letters_retention: Duration::from_secs(24 * 60 * 60),
        }
    }

    /// As the service itself opens it.
    pub(crate) fn service_pool(&self) -> PgPool {
        let url: Secret = self.database.url_for(COMMERCE).unwrap().parse().unwrap();
        let Pool { pool } = Pool::parse_from(["test"]);
        service_runtime::database::pool("commerce-consumer", &url, &pool).unwrap()
    }

    /// Connections of the service's role with other settings of the planner.
    pub(crate) async fn pool_with(&self, planner: &[(&str, &str)]) -> PgPool {
        let options: PgConnectOptions = self.database.url_for(COMMERCE).unwrap().parse().unwrap();
        PgPoolOptions::new()
            .max_connections(8)
            .connect_with(options.options(planner.iter().copied()))
            .await
            .unwrap()
    }

    /// What the service's role may not do.
    pub(crate) async fn as_owner(&self, statement: &'static str) {
        let mut owner = PgConnection::connect(&self.database.superuser_url()).await.unwrap();
        sqlx::raw_sql(statement).execute(&mut owner).await.unwrap();
    }

    pub(crate) async fn number(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.pool).await.unwrap()
    }

    /// What holds after any history: stock and statuses follow from the lines.
    pub(crate) async fn assert_books_balance(&self) {
        let unbalanced = "SELECT count(*) FROM commerce.products p WHERE committed <> (
            SELECT coalesce(sum(quantity - shipped_quantity - cancelled_quantity), 0)
            FROM commerce.order_lines l WHERE l.sku = p.sku)";
        assert_eq!(
            self.number(unbalanced).await,
            0,
            "committed is the sum of what is outstanding"
        );
        let mislabelled = "SELECT count(*) FROM commerce.orders o JOIN (
                SELECT order_id, sum(shipped_quantity) s, sum(returned_quantity) r, sum(cancelled_quantity) c,
                       sum(quantity) q FROM commerce.order_lines GROUP BY order_id) l ON l.order_id = o.id
            WHERE o.status <> CASE WHEN c = q THEN 'cancelled' WHEN s = 0 THEN 'paid'
                WHEN s + c < q THEN 'partially_shipped' WHEN r = s THEN 'returned' ELSE 'shipped' END";
        assert_eq!(self.number(mislabelled).await, 0, "a status follows from the lines");
    }
}

/// Changes with any migration, so that a template of older ones is not used.
fn fingerprint() -> String {
    let sums = MIGRATOR.iter().flat_map(|migration| migration.checksum.iter());
    let mixed = sums.fold(0u64, |sum, byte| {
        sum.wrapping_mul(0x0100_0000_01b3).wrapping_add(u64::from(*byte))
    });
    format!("{mixed:016x}")
}

pub(crate) fn sample_dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../samples/northwind"))
}

pub(crate) fn sample() -> Northwind {
    northwind::load(&sample_dir()).unwrap()
}

/// A shipment that announces itself.
#[derive(Clone)]
pub(crate) struct Parcel {
    id: String,
    order_id: String,
    lines: Vec<Line>,
    sequence: i64,
}

impl Parcel {
    pub(crate) fn new(id: &str, order_id: &str, lines: &[(&str, i32)]) -> Self {
        let line = |(sku, quantity): &(&str, i32)| Line {
            sku: (*sku).to_owned(),
            quantity: *quantity,
        };
        Self {
            id: id.to_owned(),
            order_id: order_id.to_owned(),
            lines: lines.iter().map(line).collect(),
            sequence: 0,
        }
    }

    /// One parcel for a whole order of the sample; its id is the order's.
    pub(crate) fn of_order(lines: &[&northwind::OrderLine]) -> Self {
        let order_id = lines[0].order_id.to_string();
        let line = |line: &&northwind::OrderLine| Line {
            sku: line.product_id.to_string(),
            quantity: line.quantity,
        };
        Self {
            id: order_id.clone(),
            order_id,
            lines: lines.iter().map(line).collect(),
            sequence: 0,
        }
    }

    pub(crate) fn created(&mut self) -> Envelope {
        let (order_id, lines) = (self.order_id.clone(), self.lines.clone());
        self.announce(&ShipmentCreated {
            order_id,
            warehouse: "main".into(),
            carrier: "Speedy Express".into(),
            lines,
            created_at: OffsetDateTime::now_utc(),
        })
    }

    pub(crate) fn completed(&mut self) -> Envelope {
        let (order_id, lines) = (self.order_id.clone(), self.lines.clone());
        self.announce(&ShipmentCompleted {
            order_id,
            warehouse: "main".into(),
            carrier: "Speedy Express".into(),
            tracking_number: "T-1".into(),
            lines,
            completed_at: OffsetDateTime::now_utc(),
        })
    }

    pub(crate) fn held(&mut self) -> Envelope {
        let (order_id, lines) = (self.order_id.clone(), self.lines.clone());
        self.announce(&ShipmentHeld {
            order_id,
            warehouse: "main".into(),
            carrier: "Speedy Express".into(),
            reason: "address".into(),
            lines,
            held_at: OffsetDateTime::now_utc(),
        })
    }

    pub(crate) fn released(&mut self) -> Envelope {
        let (order_id, lines) = (self.order_id.clone(), self.lines.clone());
        self.announce(&ShipmentReleased {
            order_id,
            warehouse: "main".into(),
            carrier: "Speedy Express".into(),
            lines,
            released_at: OffsetDateTime::now_utc(),
        })
    }

    pub(crate) fn cancelled(&mut self) -> Envelope {
        let (order_id, lines) = (self.order_id.clone(), self.lines.clone());
        self.announce(&ShipmentCancelled {
            order_id,
            warehouse: "main".into(),
            carrier: "Speedy Express".into(),
            reason: "lost".into(),
            lines,
            cancelled_at: OffsetDateTime::now_utc(),
        })
    }

    pub(crate) fn returned(&mut self, lines: &[(&str, i32)]) -> Envelope {
        let order_id = self.order_id.clone();
        let lines = Self::new("", "", lines).lines;
        self.announce(&ShipmentReturned {
            order_id,
            warehouse: "main".into(),
            carrier: "Speedy Express".into(),
            tracking_number: "T-1".into(),
            reason: "too small".into(),
            lines,
            returned_at: OffsetDateTime::now_utc(),
        })
    }

    fn announce<P: Payload>(&mut self, payload: &P) -> Envelope {
        self.sequence += 1;
        let fact = Fact {
            aggregate_type: AGGREGATE_TYPE,
            aggregate_id: self.id.clone(),
            sequence: self.sequence,
            transaction_key: Uuid::now_v7(),
            timestamp: OffsetDateTime::now_utc(),
        };
        Envelope::new(Uuid::now_v7(), fact, payload).unwrap()
    }
}

/// Polls until a condition holds; the name of what never came is the failure.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < DEADLINE, "{what} did not come within {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
