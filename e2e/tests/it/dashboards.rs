//! What Prometheus and Grafana are given (compose/), held against what the services say.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use anyhow::{Context, ensure};
use e2e::{
    client::Client,
    feed::{self, created, envelope},
    flag::{ADMIN, Flag},
    ledger,
    pair::{Role, Running},
    place::Place,
    wait_for, workload,
};
use rdkafka::producer::{BaseRecord, Producer};
use serde_json::{Value, json};
use shared_events::shipment::Line;

const RULES: &str = "compose/prometheus/alerts.yml";
const DASHBOARD: &str = "compose/grafana/dashboards/shipments.json";
const DEADLINE: Duration = Duration::from_secs(60);

/// Words of the query language, and what Prometheus knows by itself.
const NOT_OURS: [&str; 6] = ["and", "or", "unless", "offset", "bool", "up"];

/// A pair that has done everything once: shipped, retried, given up, gone the old way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_metric_of_dashboard_and_alerts_is_one_that_the_services_have() -> anyhow::Result<()> {
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, 3).await?;
    let api = Running::start(&place, Role::Api, &[ADMIN]).await?;
    let relay = Running::start(&place, Role::Relay, &[]).await?;
    let consumer = Running::start(&place, Role::Consumer(0), &[]).await?;
    let client = Client::new(&api.url(""), DEADLINE)?;
    ship(&client, 1).await?;
    ledger::quiet(&owner, DEADLINE).await?;
    Flag::new(&api.url(""))?
        .set(&json!({"mode": "legacy", "reason": "a metric of its own"}))
        .await?;
    let legacy = wait_for("the old path to be taken", DEADLINE, async || {
        ship(&client, 2).await?;
        Ok(api.counter("flow_path_events_total").await? > 0.0)
    });
    legacy.await?;
    let lines = [Line {
        sku: "s1".to_owned(),
        quantity: 1,
    }];
    let value = envelope("homeless", 1, &created("no such order", &lines))?;
    let producer = feed::producer(&place)?;
    let record = BaseRecord::to(place.topics.main()).key("homeless").payload(&value);
    producer.send(record).map_err(|(error, _)| error)?;
    producer.flush(DEADLINE)?;

    let used = used()?;
    let mut missing = BTreeSet::new();
    let found = wait_for("every metric to show", DEADLINE, async || {
        let mut shown = BTreeSet::new();
        for process in [&api, &relay, &consumer] {
            let text = reqwest::get(process.url("/metrics")).await?.text().await?;
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            shown.extend(lines.filter_map(|line| Some(line.split(['{', ' ']).next()?.to_owned())));
        }
        missing = used.difference(&shown).cloned().collect();
        Ok(missing.is_empty())
    });
    found.await.with_context(|| format!("missing: {missing:?}"))
}

/// One shipment of a prepared order.
async fn ship(client: &Client, order: i64) -> anyhow::Result<()> {
    let line = workload::line_of(order, 0);
    let lines = json!([{"sku": line.sku, "quantity": 1}]);
    let shipment = json!({"order_id": order.to_string(), "warehouse": "main", "carrier": "Speedy", "lines": lines});
    let created = client.post("/v1/shipments", &shipment).await?;
    let id = created["id"].as_i64().context("no id")?;
    client.post(&format!("/v1/shipments/{id}/complete"), &json!({})).await?;
    Ok(())
}

#[test]
fn every_alert_says_how_bad_it_is_and_where_to_read_on() -> anyhow::Result<()> {
    let rules = read(RULES)?;
    let alerts: Vec<&str> = rules.split("- alert: ").skip(1).collect();
    assert!(alerts.len() > 10, "only {} alerts", alerts.len());
    let runbook = read("docs/RUNBOOK.md")?;
    let anchors: BTreeSet<String> = runbook.lines().filter(|line| line.starts_with('#')).map(slug).collect();
    for alert in alerts {
        let name = alert.lines().next().unwrap_or_default();
        ensure!(alert.contains("severity: "), "{name} has no severity");
        ensure!(alert.contains("summary: "), "{name} has no summary");
        let url = after(alert, "runbook_url: ").with_context(|| format!("{name} names no section"))?;
        let anchor = url
            .strip_prefix("docs/RUNBOOK.md#")
            .context("a section of the runbook")?;
        ensure!(anchors.contains(anchor), "{name}: {url} is not there");
    }
    Ok(())
}

#[test]
fn names_are_told_from_functions_labels_and_words() {
    let expression =
        r#"histogram_quantile(0.99, sum by (le, job) (rate(a_bucket{stage="b c"}[5m]))) > 30 and b_total offset 10m"#;
    let names: Vec<String> = names(expression).into_iter().collect();
    assert_eq!(names, ["a_bucket", "b_total"]);
}

/// The metrics that dashboard and alert rules name.
fn used() -> anyhow::Result<BTreeSet<String>> {
    let rules = read(RULES)?;
    let mut expressions: Vec<String> = rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("expr: "))
        .map(str::to_owned)
        .collect();
    ensure!(expressions.len() > 10, "only {} rules", expressions.len());
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    expressions.extend(targets.filter_map(|target| target["expr"].as_str()).map(str::to_owned));
    Ok(expressions.iter().flat_map(|expression| names(expression)).collect())
}

/// The names of metrics in an expression of Prometheus: words that are no function, no label and no word of the language.
fn names(expression: &str) -> BTreeSet<String> {
    let mut text = without(expression, '{', '}');
    text = without(&text, '[', ']');
    for grouping in ["by (", "without (", "on ("] {
        while let Some(start) = text.find(grouping) {
            let end = text[start..].find(')').map_or(text.len(), |length| start + length + 1);
            text.replace_range(start..end, " ");
        }
    }
    let word = |character: char| character.is_ascii_alphanumeric() || matches!(character, '_' | ':' | '.');
    let mut found = BTreeSet::new();
    let mut rest = text.as_str();
    while let Some(start) = rest.find(word) {
        let length = rest[start..]
            .find(|character| !word(character))
            .unwrap_or(rest.len() - start);
        let name = &rest[start..start + length];
        rest = &rest[start + length..];
        // An aggregation whose grouping was taken out is followed by a space.
        let is_function = rest.starts_with('(');
        let is_number = name.starts_with(|first: char| first.is_ascii_digit());
        if !is_number && !is_function && !NOT_OURS.contains(&name) {
            found.insert(name.to_owned());
        }
    }
    for aggregation in ["sum", "max", "min", "avg", "count"] {
        found.remove(aggregation);
    }
    found
}

fn without(text: &str, open: char, close: char) -> String {
    let mut depth = 0;
    text.chars()
        .filter(|&character| {
            depth += i32::from(character == open);
            let outside = depth == 0;
            depth -= i32::from(character == close);
            outside
        })
        .collect()
}

fn after<'a>(text: &'a str, start: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.trim().strip_prefix(start))
}

/// A heading's anchor, as GitHub makes it.
fn slug(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase();
    words
        .chars()
        .filter(|character| character.is_alphanumeric() || matches!(character, ' ' | '-' | '_'))
        .map(|character| if character == ' ' { '-' } else { character })
        .collect()
}

fn read(path: &str) -> anyhow::Result<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    fs::read_to_string(root.join(path)).with_context(|| path.to_owned())
}
