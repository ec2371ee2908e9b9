//! The Northwind sample on its way through the product: orders into commerce, shipments through the REST interface of
//! logistics, their events back into commerce.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::failure::{Exit, Failure};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use samples::northwind::{Northwind, Order};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::progress::Progress;

/// Shipments per request: small enough that the events are seen arriving while the rest is still on its way.
const BATCH: usize = 100;
const PAGE: usize = 200;
const POLL: Duration = Duration::from_millis(25);
/// Without any new event in commerce.
const STALL: Duration = Duration::from_secs(30);

/// The two interfaces, and what is to be shipped.
pub struct Sample {
    client: Client,
    logistics: String,
    commerce: String,
    northwind: Northwind,
}

/// What commerce shows at the end.
#[derive(Debug, Clone, Copy)]
pub struct Totals {
    pub orders: usize,
    pub shipped: u64,
    pub units: u64,
    /// When the first event was seen applied.
    pub first_applied: Option<Instant>,
}

/// A shipment as logistics shows it.
#[derive(Debug, Clone, Deserialize)]
pub struct Shipment {
    pub id: i64,
    pub order_id: String,
    pub status: String,
}

#[derive(Deserialize)]
struct Page {
    items: Vec<Shipment>,
    next_cursor: Option<String>,
}

#[derive(Deserialize)]
struct Created {
    items: Vec<Shipment>,
}

#[derive(Deserialize)]
struct Summary {
    orders: HashMap<String, u64>,
    units_shipped: u64,
    events_applied: u64,
}

impl Sample {
    /// Reads the files in `dir`; `logistics` and `commerce` are base URLs.
    pub fn read(dir: &Path, logistics: String, commerce: String) -> anyhow::Result<Self> {
        let client = Client::builder()
            .timeout(Duration::from_secs(30))
            .no_proxy()
            .build()
            .context("build the HTTP client")?;
        Ok(Self {
            client,
            logistics,
            commerce,
            northwind: samples::northwind::load(dir)?,
        })
    }

    /// Whether commerce has the sample's orders: they are imported in one transaction, so one speaks for all.
    pub async fn is_imported(&self) -> anyhow::Result<bool> {
        let Some(order) = self.northwind.orders.first() else {
            bail!("the sample has no orders");
        };
        let url = format!("{}/v1/orders/{}", self.commerce, order.id);
        let response = self
            .client
            .get(&url)
            .send()
            .await
            .with_context(|| format!("GET {url}"))?;
        match response.status() {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            status => bail!("GET {url}: {status}"),
        }
    }

    /// Creates the missing shipments, completes those of shipped orders, and waits until commerce has applied all of
    /// it. May be repeated after any interruption: what logistics has is not created again, and a request whose
    /// answer was lost is recognised by its idempotency key.
    pub async fn ship(&self, progress: &Progress) -> anyhow::Result<Totals> {
        let send = async {
            let shipments = self.create(progress).await?;
            self.complete(shipments, progress).await
        };
        let (totals, ()) = tokio::try_join!(self.watch_arrivals(progress), send)?;
        Ok(totals)
    }

    /// What commerce shows now.
    pub async fn totals(&self) -> anyhow::Result<Totals> {
        Ok(self.totals_of(&self.summary().await?, None))
    }

    /// Up to `limit` shipments that wait in the warehouse.
    pub async fn open_shipments(&self, limit: usize) -> anyhow::Result<Vec<Shipment>> {
        let url = format!("{}/v1/shipments?status=open&limit={limit}", self.logistics);
        Ok(get::<Page>(&self.client, &url).await?.items)
    }

    async fn create(&self, progress: &Progress) -> anyhow::Result<HashMap<String, Shipment>> {
        let step = progress.step("creating the shipments");
        let mut shipments = self.existing().await?;
        let missing: Vec<&Order> = self
            .northwind
            .orders
            .iter()
            .filter(|order| !shipments.contains_key(&order.id.to_string()))
            .collect();
        let lines = self.northwind.lines_by_order();
        for batch in missing.chunks(BATCH) {
            let body: Vec<Value> = batch
                .iter()
                .map(|order| {
                    let lines: Vec<Value> = lines[&order.id]
                        .iter()
                        .map(|line| json!({"sku": line.product_id.to_string(), "quantity": line.quantity}))
                        .collect();
                    json!({
                        "order_id": order.id.to_string(),
                        "warehouse": "main",
                        "carrier": order.carrier,
                        "lines": lines,
                    })
                })
                .collect();
            let ids: Vec<i64> = batch.iter().map(|order| i64::from(order.id)).collect();
            let request = self
                .client
                .post(format!("{}/v1/shipments/batch", self.logistics))
                .header("Idempotency-Key", key("create", &ids))
                .json(&json!({ "shipments": body }));
            let created: Created = send(request)
                .await?
                .json()
                .await
                .context("read the created shipments")?;
            shipments.extend(created.items.into_iter().map(|item| (item.order_id.clone(), item)));
            step.detail(format!("{} of {}", shipments.len(), self.northwind.orders.len()));
        }
        step.done(&format!("{} shipments created", shipments.len()));
        Ok(shipments)
    }

    async fn complete(&self, shipments: HashMap<String, Shipment>, progress: &Progress) -> anyhow::Result<()> {
        let step = progress.step("completing the shipments of shipped orders");
        let open: Vec<i64> = self
            .northwind
            .orders
            .iter()
            .filter(|order| order.shipped_date.is_some())
            .filter_map(|order| shipments.get(&order.id.to_string()))
            .filter(|shipment| shipment.status == "open")
            .map(|shipment| shipment.id)
            .collect();
        for (done, ids) in open.chunks(BATCH).enumerate() {
            let request = self
                .client
                .post(format!("{}/v1/shipments/complete", self.logistics))
                .header("Idempotency-Key", key("complete", ids))
                .json(&json!({ "ids": ids }));
            send(request).await?;
            step.detail(format!("{} of {}", done * BATCH + ids.len(), open.len()));
        }
        step.done(&format!("{} shipments completed", open.len()));
        Ok(())
    }

    /// Every shipment that logistics has for an order of the sample.
    async fn existing(&self) -> anyhow::Result<HashMap<String, Shipment>> {
        let mut shipments = HashMap::new();
        let mut cursor: Option<String> = None;
        loop {
            let mut url = format!("{}/v1/shipments?limit={PAGE}", self.logistics);
            if let Some(cursor) = &cursor {
                url.push_str(&format!("&cursor={cursor}"));
            }
            let page: Page = get(&self.client, &url).await?;
            shipments.extend(page.items.into_iter().map(|item| (item.order_id.clone(), item)));
            match page.next_cursor {
                Some(next) => cursor = Some(next),
                None => return Ok(shipments),
            }
        }
    }

    /// Until commerce shows all that the sample ships.
    async fn watch_arrivals(&self, progress: &Progress) -> anyhow::Result<Totals> {
        let orders = self.northwind.orders.iter();
        let expected_orders = orders.filter(|order| order.shipped_date.is_some()).count() as u64;
        let expected_units = u64::try_from(self.northwind.units_shipped())?;
        let step = progress.step("commerce applies the events");
        let before = self.summary().await?.events_applied;
        let mut first_applied = None;
        let mut last_change = (Instant::now(), before);
        loop {
            let summary = self.summary().await?;
            if first_applied.is_none() && summary.events_applied > before {
                first_applied = Some(Instant::now());
            }
            let totals = self.totals_of(&summary, first_applied);
            step.detail(format!(
                "{} of {} orders shipped, {} units",
                grouped(totals.shipped),
                grouped(expected_orders),
                grouped(totals.units)
            ));
            if totals.shipped >= expected_orders && totals.units >= expected_units {
                step.done(&format!(
                    "commerce shows {} orders shipped, {} units",
                    grouped(totals.shipped),
                    grouped(totals.units)
                ));
                return Ok(totals);
            }
            if summary.events_applied != last_change.1 {
                last_change = (Instant::now(), summary.events_applied);
            }
            if last_change.0.elapsed() > STALL {
                let what = format!(
                    "commerce stands at {} of {expected_orders} orders and {} of {expected_units} units shipped, and no \
                     event has arrived for {} s",
                    totals.shipped,
                    totals.units,
                    STALL.as_secs()
                );
                let hint =
                    "./dev up --no-sample, or --fresh: other shipments of the sample's orders take its pieces away";
                return Err(Failure::new(Exit::Failed, what, hint).into());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn totals_of(&self, summary: &Summary, first_applied: Option<Instant>) -> Totals {
        Totals {
            orders: self.northwind.orders.len(),
            shipped: summary.orders.get("shipped").copied().unwrap_or(0),
            units: summary.units_shipped,
            first_applied,
        }
    }

    async fn summary(&self) -> anyhow::Result<Summary> {
        get(&self.client, &format!("{}/v1/summary", self.commerce)).await
    }
}

/// The same for the same ids, so that a request repeated after a lost answer is known to be the same one.
fn key(what: &str, ids: &[i64]) -> String {
    let (first, last) = (ids.first().unwrap_or(&0), ids.last().unwrap_or(&0));
    format!("northwind-{what}-{first}-{last}-{}", ids.len())
}

async fn get<T: serde::de::DeserializeOwned>(client: &Client, url: &str) -> anyhow::Result<T> {
    let response = send(client.get(url)).await?;
    response
        .json()
        .await
        .with_context(|| format!("read the answer to GET {url}"))
}

/// Errors with the problem that the service answered.
async fn send(request: RequestBuilder) -> anyhow::Result<Response> {
    let response = request.send().await.context("call a service")?;
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let url = response.url().clone();
    let problem = response.text().await.context("read a problem")?;
    bail!("{url} answered {status}: {problem}")
}

/// 50,119
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_separated() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(830), "830");
        assert_eq!(grouped(50_119), "50,119");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }
}
