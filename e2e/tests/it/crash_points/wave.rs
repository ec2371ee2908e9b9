use std::time::Duration;

use anyhow::ensure;
use e2e::{pair::Running, place::Place, wait_for};
use rdkafka::{
    ClientConfig,
    producer::{BaseRecord, Producer, ThreadedProducer},
};
use reqwest::StatusCode;
use serde_json::{Value, json};
use shared_events::{
    Envelope, Payload,
    envelope::Fact,
    shipment::{AGGREGATE_TYPE, Line, ShipmentCancelled, ShipmentCompleted, ShipmentCreated, ShipmentReturned},
};
use sqlx::{AssertSqlSafe, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{DEADLINE, books::Counted};

pub(crate) const TOKEN: &str = "operator-token-0123456789";
const SKU: &str = "s1";
/// Of the line that comes late.
const LATE_SKU: &str = "s2";
const ORDERED: i32 = 10;

/// Shipments, each with an order of its own and of the same name, that together take every way through the engine:
///
/// | shipment | what becomes of its events |
/// | --- | --- |
/// | `good` | they take effect |
/// | `late` | its order comes late: the first is retried, the second parked and let go |
/// | `late-line` | the same, and the second lacks a line: it fails in the releaser, is retried, and holds the third |
/// | `dead` | the second ships too many: it dies, is redriven too early and dies again, is repaired and redriven |
/// | `skipped` | the second returns what never shipped: it dies and is skipped |
/// | `redriven-1`, `redriven-2` | the second cancels too many: they die, and are redriven as a job |
///
/// and a record that is no event.
pub(crate) struct Wave {
    name: String,
    owner: PgPool,
    brokers: String,
    topic: String,
    events: Vec<Envelope>,
    /// How many of [`STEPS`] are done.
    done: usize,
    asked: Option<Asked>,
    /// The reasons of what was accepted.
    accepted: Vec<String>,
}

/// What was asked of the consumer and has had no answer yet.
struct Asked {
    reason: String,
    /// SQL that tells whether it was done.
    evidence: String,
}

/// What drives a wave to its end. Each can be gone into again after a death in its middle.
#[derive(Debug, Clone, Copy)]
enum Step {
    Send,
    OrdersCome,
    LineComes,
    Die,
    Limit,
    RedriveTooEarly,
    BeginTooEarly,
    Cancel,
    Repair,
    Begin,
    Redrive,
    Skip,
    Settle,
}

const STEPS: [Step; 13] = [
    Step::Send,
    Step::OrdersCome,
    Step::LineComes,
    Step::Die,
    Step::Limit,
    Step::RedriveTooEarly,
    Step::BeginTooEarly,
    Step::Cancel,
    Step::Repair,
    Step::Begin,
    Step::Redrive,
    Step::Skip,
    Step::Settle,
];

/// Events of a wave that a customer hears of.
const ENTRIES: i64 = 10;

impl Wave {
    /// `name` is no other wave's.
    pub(crate) fn new(place: &Place, owner: &PgPool, name: String) -> anyhow::Result<Self> {
        let mut wave = Self {
            name,
            owner: owner.clone(),
            brokers: place.brokers.clone(),
            topic: place.topics.main().to_owned(),
            events: Vec::new(),
            done: 0,
            asked: None,
            accepted: Vec::new(),
        };
        let few = lines(SKU, 4);
        let one = lines(SKU, 1);
        let too_many = lines(SKU, ORDERED + 1);
        let late = lines(LATE_SKU, 4);
        let late_one = lines(LATE_SKU, 1);
        wave.shipment("good")?.completed(&few)?.returned(&one)?;
        wave.shipment("late")?.completed(&few)?;
        wave.shipment("late-line")?.completed(&late)?.returned(&late_one)?;
        wave.shipment("dead")?.completed(&too_many)?.returned(&one)?;
        wave.shipment("skipped")?.returned(&one)?.completed(&few)?;
        wave.shipment("redriven-1")?.cancelled(&too_many)?;
        wave.shipment("redriven-2")?.cancelled(&too_many)?;
        Ok(wave)
    }

    /// Takes the wave on from where it was. Fails when the consumer has ended, or when something never comes.
    pub(crate) async fn drive(&mut self, consumer: &mut Running) -> anyhow::Result<()> {
        while let Some(step) = STEPS.get(self.done) {
            let taken = self.take(*step, consumer).await;
            taken.map_err(|error| error.context(format!("{}: {step:?}", self.name)))?;
            self.done += 1;
        }
        Ok(())
    }

    async fn take(&mut self, step: Step, consumer: &mut Running) -> anyhow::Result<()> {
        let (dead, skipped) = (self.id("dead", 2), self.id("skipped", 2));
        let redriven = [self.id("redriven-1", 2), self.id("redriven-2", 2)];
        match step {
            Step::Send => {
                for order in ["good", "dead", "skipped", "redriven-1", "redriven-2"] {
                    self.order(order).await?;
                }
                self.send()
            }
            Step::OrdersCome => {
                let first = [self.id("late", 1), self.id("late-line", 1)];
                self.until_failed(consumer, &first).await?;
                self.order("late").await?;
                self.order("late-line").await
            }
            Step::LineComes => {
                self.until_failed(consumer, &[self.id("late-line", 2)]).await?;
                self.line("late-line", LATE_SKU).await
            }
            Step::Die => {
                let all = [dead, skipped, redriven[0], redriven[1]];
                self.until_dead(consumer, &all).await?;
                consumer.ready().await
            }
            Step::Limit => {
                let version = "SELECT coalesce(max(version), 0) FROM commerce.consumer_controls";
                let before: i64 = sqlx::query_scalar(version).fetch_one(&self.owner).await?;
                let evidence = format!("SELECT ({version}) > {before}");
                let body = json!({"live": "4000"});
                self.ask(consumer, step, "/admin/consumer/limits", body, evidence).await
            }
            Step::RedriveTooEarly => {
                self.decide(consumer, step, "redrive", dead).await?;
                self.until_dead(consumer, &[dead]).await
            }
            Step::BeginTooEarly => self.begin(consumer, step).await,
            Step::Cancel => {
                let begun = self.reason(Step::BeginTooEarly);
                let (id, ended): (Uuid, bool) =
                    sqlx::query_as("SELECT id, ended_at IS NOT NULL FROM commerce.redrive_jobs WHERE reason = $1")
                        .bind(begun)
                        .fetch_one(&self.owner)
                        .await?;
                // After a death it may have come to its end by itself, or by what was asked before and had no answer.
                if !ended || self.asked.is_some() {
                    let path = format!("/admin/redrives/{id}/cancel");
                    let evidence = format!("SELECT state = 'cancelled' FROM commerce.redrive_jobs WHERE id = '{id}'");
                    self.ask(consumer, step, &path, json!({}), evidence).await?;
                }
                self.until_dead(consumer, &redriven).await
            }
            Step::Repair => {
                for order in ["dead", "redriven-1", "redriven-2"] {
                    self.one_more(order).await?;
                }
                Ok(())
            }
            Step::Begin => self.begin(consumer, step).await,
            Step::Redrive => self.decide(consumer, step, "redrive", dead).await,
            Step::Skip => self.decide(consumer, step, "skip", skipped).await,
            Step::Settle => self.until_settled(consumer).await,
        }
    }

    fn id(&self, shipment: &str, sequence: i64) -> Uuid {
        let key = self.key(shipment);
        let is_it = |event: &&Envelope| event.aggregate_id == key && event.sequence == sequence;
        self.events.iter().find(is_it).map(|event| event.id).unwrap_or_default()
    }

    fn key(&self, shipment: &str) -> String {
        format!("{}/{shipment}", self.name)
    }

    fn reason(&self, step: Step) -> String {
        format!("{}/{step:?}", self.name)
    }

    fn send(&self) -> anyhow::Result<()> {
        let producer: ThreadedProducer<_> = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("partitioner", "murmur2_random")
            .set("enable.idempotence", "true")
            .create()?;
        let send = |key: &str, value: &str| {
            let record = BaseRecord::to(&self.topic).key(key).payload(value);
            producer.send(record).map_err(|(error, _)| error)
        };
        send(&self.key("no-event"), &format!("no event of {}", self.name))?;
        for event in &self.events {
            send(&event.aggregate_id, &event.encode()?)?;
        }
        Ok(producer.flush(DEADLINE)?)
    }

    /// In commerce, as the shop would hand it over.
    async fn order(&self, shipment: &str) -> anyhow::Result<()> {
        sqlx::query(
            "INSERT INTO commerce.orders
                    (id, customer_id, ordered_on, carrier, ship_name, ship_city, ship_country, status)
             VALUES ($1, 'c', '2026-11-22', 'Speedy', 'n', 'c', 'c', 'paid')",
        )
        .bind(self.key(shipment))
        .execute(&self.owner)
        .await?;
        self.line(shipment, SKU).await
    }

    async fn line(&self, shipment: &str, sku: &str) -> anyhow::Result<()> {
        let line = "INSERT INTO commerce.order_lines (order_id, sku, quantity, unit_price) VALUES ($1, $2, $3, 1)";
        self.commit(line, shipment, sku, ORDERED).await
    }

    /// The repair of an order of which too many were shipped or cancelled.
    async fn one_more(&self, shipment: &str) -> anyhow::Result<()> {
        let line = "UPDATE commerce.order_lines SET quantity = quantity + $3 WHERE (order_id, sku) = ($1, $2)";
        self.commit(line, shipment, SKU, 1).await
    }

    /// What a line has more is committed in the stock.
    async fn commit(&self, line: &'static str, shipment: &str, sku: &str, more: i32) -> anyhow::Result<()> {
        let mut transaction = self.owner.begin().await?;
        sqlx::query(line)
            .bind(self.key(shipment))
            .bind(sku)
            .bind(more)
            .execute(&mut *transaction)
            .await?;
        sqlx::query("UPDATE commerce.products SET committed = committed + $2 WHERE sku = $1")
            .bind(sku)
            .bind(more)
            .execute(&mut *transaction)
            .await?;
        Ok(transaction.commit().await?)
    }

    async fn until_failed(&self, consumer: &mut Running, ids: &[Uuid]) -> anyhow::Result<()> {
        self.until(
            consumer,
            "SELECT count(DISTINCT event_id) = cardinality($1::uuid[]) FROM commerce.failed_attempts WHERE event_id = ANY($1)",
            ids,
        )
        .await
    }

    /// With what comes behind them parked.
    async fn until_dead(&self, consumer: &mut Running, ids: &[Uuid]) -> anyhow::Result<()> {
        self.until(
            consumer,
            "SELECT count(*) = cardinality($1::uuid[]) FROM commerce.held_keys AS held JOIN commerce.dead_letters AS letter
                 ON letter.id = held.event_id
              WHERE held.event_id = ANY($1) AND held.state = 'dead' AND letter.state = 'open'
                AND held.parked >= CASE WHEN held.aggregate_id LIKE '%/redriven-_' THEN 0 ELSE 1 END",
            ids,
        )
        .await
    }

    async fn until_settled(&self, consumer: &mut Running) -> anyhow::Result<()> {
        let ids: Vec<Uuid> = self.events.iter().map(|event| event.id).collect();
        self.until(
            consumer,
            "SELECT (SELECT count(*) FROM commerce.inbox WHERE event_id = ANY($1)) = cardinality($1::uuid[])
                AND NOT EXISTS (SELECT FROM commerce.held_keys)
                AND NOT EXISTS (SELECT FROM commerce.redrive_jobs WHERE ended_at IS NULL)",
            &ids,
        )
        .await?;
        let buried = "SELECT count(*) > 0 FROM commerce.dead_letters WHERE record_key = $1";
        let key = self.key("no-event").into_bytes();
        alive_until(consumer, buried, async || {
            Ok(sqlx::query_scalar(buried).bind(&key).fetch_one(&self.owner).await?)
        })
        .await
    }

    async fn until(&self, consumer: &mut Running, sql: &'static str, ids: &[Uuid]) -> anyhow::Result<()> {
        alive_until(consumer, sql, async || {
            Ok(sqlx::query_scalar(sql).bind(ids).fetch_one(&self.owner).await?)
        })
        .await
    }

    async fn decide(&mut self, consumer: &Running, step: Step, decision: &str, letter: Uuid) -> anyhow::Result<()> {
        let deaths: i32 = sqlx::query_scalar("SELECT deaths FROM commerce.dead_letters WHERE id = $1")
            .bind(letter)
            .fetch_one(&self.owner)
            .await?;
        let evidence =
            format!("SELECT state <> 'open' OR deaths > {deaths} FROM commerce.dead_letters WHERE id = '{letter}'");
        let path = format!("/admin/dead-letters/{decision}");
        let body = json!({"ids": [letter], "dry_run": false});
        self.ask(consumer, step, &path, body, evidence).await
    }

    async fn begin(&mut self, consumer: &Running, step: Step) -> anyhow::Result<()> {
        // Whatever dies again, it goes on.
        let body = json!({"error_type": "cancels_too_many", "canary": 1, "abort_percent": 100, "dry_run": false});
        let evidence = format!(
            "SELECT EXISTS (SELECT FROM commerce.redrive_jobs WHERE reason = '{}')",
            self.reason(step)
        );
        self.ask(consumer, step, "/admin/redrives", body, evidence).await
    }

    /// As a careful operator asks: after a lost answer he looks whether it was done.
    async fn ask(
        &mut self,
        consumer: &Running,
        step: Step,
        path: &str,
        mut body: Value,
        evidence: String,
    ) -> anyhow::Result<()> {
        let reason = self.reason(step);
        if self.asked.take().is_some() && self.audited(&reason).await? == 1 {
            self.accepted.push(reason);
            return Ok(());
        }
        if self.accepted.contains(&reason) {
            return Ok(());
        }
        body["reason"] = json!(reason);
        self.asked = Some(Asked {
            reason: reason.clone(),
            evidence,
        });
        let request = reqwest::Client::new().post(consumer.url(path)).bearer_auth(TOKEN);
        let response = request.timeout(Duration::from_secs(20)).json(&body).send().await?;
        let (status, answer) = (response.status(), response.text().await?);
        self.asked = None;
        ensure!(status.is_success(), "{path}: {status} {answer}");
        let accepted = match step {
            Step::Limit => true,
            Step::Cancel => serde_json::from_str::<Value>(&answer)?["state"] == "cancelled",
            _ => status == StatusCode::ACCEPTED,
        };
        if accepted {
            self.accepted.push(reason);
        }
        Ok(())
    }

    async fn audited(&self, reason: &str) -> anyhow::Result<i64> {
        let audited = sqlx::query_scalar("SELECT count(*) FROM commerce.operator_actions WHERE reason = $1");
        Ok(audited.bind(reason).fetch_one(&self.owner).await?)
    }

    /// While no consumer runs.
    pub(crate) async fn assert_lost_answer_is_audited_if_it_was_done(&self) -> anyhow::Result<()> {
        let Some(Asked { reason, evidence }) = &self.asked else {
            return Ok(());
        };
        let done: bool = sqlx::query_scalar(AssertSqlSafe(evidence.as_str()))
            .fetch_one(&self.owner)
            .await?;
        let audited = self.audited(reason).await?;
        ensure!(
            audited == i64::from(done),
            "{reason}: done {done}, {audited} times in the audit"
        );
        Ok(())
    }

    /// Once nothing of it is under way any more.
    pub(crate) async fn assert_settled(&self) -> anyhow::Result<()> {
        let mine = format!("{}/%", self.name);
        let wrong: Vec<String> = sqlx::query_scalar(
            "SELECT coalesce(line::text, due::text)
               FROM (VALUES ('good', 's1', 4, 1, 0), ('late', 's1', 4, 0, 0), ('late-line', 's1', 0, 0, 0),
                            ('late-line', 's2', 4, 1, 0), ('dead', 's1', 11, 1, 0), ('skipped', 's1', 4, 0, 0),
                            ('redriven-1', 's1', 0, 0, 11), ('redriven-2', 's1', 0, 0, 11))
                    AS due (shipment, sku, shipped, returned, cancelled)
               FULL JOIN (SELECT * FROM commerce.order_lines WHERE order_id LIKE $1) AS line
                 ON line.order_id = $2::text || '/' || due.shipment AND line.sku = due.sku
              WHERE (due.shipped, due.returned, due.cancelled)
                    IS DISTINCT FROM (line.shipped_quantity, line.returned_quantity, line.cancelled_quantity)",
        )
        .bind(&mine)
        .bind(&self.name)
        .fetch_all(&self.owner)
        .await?;
        ensure!(
            wrong.is_empty(),
            "{}: lines that are not what was due: {wrong:?}",
            self.name
        );
        let entries: i64 = sqlx::query_scalar("SELECT count(*) FROM commerce.order_timeline WHERE order_id LIKE $1")
            .bind(&mine)
            .fetch_one(&self.owner)
            .await?;
        ensure!(entries == ENTRIES, "{}: {entries} entries, not {ENTRIES}", self.name);
        let mut audited: Vec<String> =
            sqlx::query_scalar("SELECT reason FROM commerce.operator_actions WHERE reason LIKE $1 ORDER BY id")
                .bind(&mine)
                .fetch_all(&self.owner)
                .await?;
        let mut accepted = self.accepted.clone();
        audited.sort_unstable();
        accepted.sort_unstable();
        ensure!(audited == accepted, "audited {audited:?}, accepted {accepted:?}");
        Ok(())
    }

    pub(crate) async fn count(&self) -> anyhow::Result<Counted> {
        let ids: Vec<Uuid> = self.events.iter().map(|event| event.id).collect();
        let counted: Counted = sqlx::query_as(
            "SELECT (SELECT count(*) FROM commerce.inbox WHERE event_id = ANY($1)) AS events,
                    (SELECT count(*) FROM commerce.failed_attempts WHERE event_id = ANY($1)) AS failed,
                    (SELECT count(*) FROM commerce.dead_letters WHERE id = ANY($1)) AS letters,
                    (SELECT sum(deaths)::bigint FROM commerce.dead_letters WHERE id = ANY($1)) AS deaths,
                    (SELECT count(*) FROM commerce.operator_actions WHERE reason LIKE $2) AS actions",
        )
        .bind(&ids)
        .bind(format!("{}/%", self.name))
        .fetch_one(&self.owner)
        .await?;
        ensure!(counted.events == ids.len() as i64, "{}: {counted}", self.name);
        Ok(counted)
    }

    /// Begins one more.
    fn shipment(&mut self, shipment: &str) -> anyhow::Result<History<'_>> {
        let key = self.key(shipment);
        let created = ShipmentCreated {
            order_id: key.clone(),
            warehouse: "main".to_owned(),
            carrier: "Speedy".to_owned(),
            lines: lines(SKU, 1),
            created_at: OffsetDateTime::now_utc(),
        };
        History {
            wave: self,
            key,
            sequence: 0,
        }
        .event(&created)
    }
}

async fn alive_until(
    consumer: &mut Running,
    what: &str,
    mut holds: impl AsyncFnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    wait_for(what, DEADLINE, async || {
        ensure!(consumer.service.exited()?.is_none(), "the consumer has ended");
        holds().await
    })
    .await
}

/// The events of one shipment so far.
struct History<'a> {
    wave: &'a mut Wave,
    key: String,
    sequence: i64,
}

impl History<'_> {
    fn event<P: Payload>(mut self, payload: &P) -> anyhow::Result<Self> {
        self.sequence += 1;
        let fact = Fact {
            aggregate_type: AGGREGATE_TYPE,
            aggregate_id: self.key.clone(),
            sequence: self.sequence,
            transaction_key: Uuid::now_v7(),
            timestamp: OffsetDateTime::now_utc(),
        };
        self.wave.events.push(Envelope::new(Uuid::now_v7(), fact, payload)?);
        Ok(self)
    }

    fn completed(self, lines: &[Line]) -> anyhow::Result<Self> {
        let completed = ShipmentCompleted {
            order_id: self.key.clone(),
            warehouse: "main".to_owned(),
            carrier: "Speedy".to_owned(),
            tracking_number: "t".to_owned(),
            lines: lines.to_vec(),
            completed_at: OffsetDateTime::now_utc(),
        };
        self.event(&completed)
    }

    fn returned(self, lines: &[Line]) -> anyhow::Result<Self> {
        let returned = ShipmentReturned {
            order_id: self.key.clone(),
            warehouse: "main".to_owned(),
            carrier: "Speedy".to_owned(),
            tracking_number: "t".to_owned(),
            reason: "damaged".to_owned(),
            lines: lines.to_vec(),
            returned_at: OffsetDateTime::now_utc(),
        };
        self.event(&returned)
    }

    fn cancelled(self, lines: &[Line]) -> anyhow::Result<Self> {
        let cancelled = ShipmentCancelled {
            order_id: self.key.clone(),
            warehouse: "main".to_owned(),
            carrier: "Speedy".to_owned(),
            reason: "lost".to_owned(),
            lines: lines.to_vec(),
            cancelled_at: OffsetDateTime::now_utc(),
        };
        self.event(&cancelled)
    }
}

fn lines(sku: &str, quantity: i32) -> Vec<Line> {
    vec![Line {
        sku: sku.to_owned(),
        quantity,
    }]
}
