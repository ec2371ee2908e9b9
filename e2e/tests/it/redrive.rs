use std::time::Duration;

use anyhow::Context;
use e2e::{
    feed::{self, Feed},
    pair::{Role, Running},
    place::Place,
    topic, wait_for, workload,
};
use rdkafka::producer::Producer;
use reqwest::StatusCode;
use serde_json::{Value, json};
use shared_events::shipment::Line;
use sqlx::{AssertSqlSafe, PgPool};
use tokio::time::Instant;

const DEADLINE: Duration = Duration::from_secs(1_200);
const TOKEN: &str = "a-token-of-a-test";
const CANARY: i64 = 50;

/// 2,000 dead letters in 6 groups; in the full run 100,000 in 60.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_that_is_killed_goes_on_with_one_effect_for_each_letter_while_live_events_keep_their_rate()
-> anyhow::Result<()> {
    let full = std::env::var_os("E2E_FULL").is_some();
    let (letters, groups, live_rate, live_orders, window) = if full {
        (100_000, 60, 200, 200_000, Duration::from_secs(20))
    } else {
        (2_000, 6, 100, 10_000, Duration::from_secs(2))
    };
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, live_orders).await?;
    let mut consumer = start(&place).await?;
    let started = Instant::now();
    kill_letters(&place, &owner, letters, groups).await?;
    println!(
        "{letters} dead letters in {groups} groups after {:.0?}",
        started.elapsed()
    );

    // Nobody else writes now.
    let before = dump(&owner).await?;
    let (status, view) = redrive(&consumer, true).await?;
    assert_eq!(
        (status, view["matched"].as_i64()),
        (StatusCode::OK, Some(letters)),
        "{view}"
    );
    let after = dump(&owner).await?;
    assert!(before.len() > 10 && before == after, "a dry run changes nothing");
    println!(
        "the dry run meant {letters} letters; the dump of {} tables is the same",
        before.len()
    );

    let feed = Feed::start(&place, live_rate, live_orders)?;
    wait_for("the first live events", DEADLINE, async || {
        Ok(feed::applied(&owner).await? > 0)
    })
    .await?;
    tokio::time::sleep(window).await;
    let alone = rate_of_live(&owner, window).await?;

    let failed = job(&consumer, DEADLINE).await?;
    assert_eq!(
        (
            failed["state"].as_str(),
            failed["sent"].as_i64(),
            failed["died_again"].as_i64()
        ),
        (Some("failed"), Some(CANARY), Some(CANARY)),
        "{failed}"
    );
    assert_eq!(
        count(&owner, "dead_letters WHERE state = 'open'").await?,
        letters,
        "the others have not moved"
    );
    println!("nothing repaired: {}", failed["ended_because"]);

    repair(&owner).await?;
    let (status, view) = redrive(&consumer, false).await?;
    assert_eq!(status, StatusCode::ACCEPTED, "{view}");
    let begun = Instant::now();
    let id = view["redrive"]["id"].as_str().context("no id")?.to_owned();
    let taken = async || count(&owner, "dead_letters WHERE state = 'resolved'").await;
    wait_for("the middle of the redrive", DEADLINE, async || {
        Ok(taken().await? >= letters / 2)
    })
    .await?;
    let beside = rate_of_live(&owner, window.min(begun.elapsed())).await?;
    let (half, half_after) = (taken().await?, begun.elapsed());
    consumer.service.kill9()?;
    assert!(taken().await? < letters, "it was over before the kill");
    consumer = start(&place).await?;
    let done = ended(&consumer, &id, DEADLINE).await?;
    println!(
        "redrive: {half} letters after {half_after:.1?}, killed, all {letters} after {:.1?}",
        begun.elapsed()
    );
    println!("live events: {alone:.0}/s without a redrive, {beside:.0}/s beside it, {live_rate}/s sent");
    assert_eq!(
        (
            done["state"].as_str(),
            done["took_effect"].as_i64(),
            done["died_again"].as_i64()
        ),
        (Some("succeeded"), Some(letters), Some(0)),
        "{done}"
    );

    let sent = feed.stop().await?;
    wait_for("every live event", DEADLINE, async || {
        Ok(feed::applied(&owner).await? >= sent)
    })
    .await?;
    consumer.stop().await?;
    for (check, rows) in feed::check(&owner, sent).await? {
        assert_eq!(rows, 0, "{check}");
    }
    assert_eq!(count(&owner, "dead_letters WHERE state <> 'resolved'").await?, 0);
    assert_eq!(
        count(&owner, "held_keys").await? + count(&owner, "parked_events").await?,
        0
    );
    assert_eq!(
        count(&owner, "inbox WHERE aggregate_id LIKE 'dead-%'").await?,
        2 * letters
    );
    assert_eq!(
        count(&owner, "order_lines WHERE order_id LIKE 'd%' AND shipped_quantity = 2").await?,
        letters,
        "each letter has one effect"
    );
    assert_eq!(count(&owner, "order_timeline WHERE order_id LIKE 'd%'").await?, letters);
    assert_eq!(
        count(&owner, "products WHERE sku LIKE 'x%' AND committed <> 0").await?,
        0
    );
    Ok(())
}

async fn start(place: &Place) -> anyhow::Result<Running> {
    let tokens = format!("olga:operator:{TOKEN}");
    let env = [
        ("ADMIN_TOKENS", tokens.as_str()),
        // So many dead letters are a flood; that they stop the consumer is another test's matter.
        ("DEAD_LETTER_RUN", "1000000"),
        ("DEAD_LETTER_PERCENT", "100"),
        ("REDRIVE_RATE_LIMIT", "5000"),
        // A redrive of so many letters begins by one statement.
        ("HTTP_TIMEOUT", "60s"),
        // So that the restart does not wait for the broker to miss the killed one.
        ("GROUP_INSTANCE_ID", "redrive"),
    ];
    Running::start(place, Role::Consumer(0), &env).await
}

/// Shipments of more than was ordered, each of an order of its own; the product's name is what tells the groups apart.
async fn kill_letters(place: &Place, owner: &PgPool, letters: i64, groups: i64) -> anyhow::Result<()> {
    let sku = |number: i64| {
        let letter = |number: i64| char::from(b'a' + (number % 26) as u8);
        format!("x{}{}", letter(number % groups / 26), letter(number % groups))
    };
    let skus: Vec<String> = (0..letters).map(sku).collect();
    sqlx::query(
        "WITH new_products AS (
             INSERT INTO commerce.products (sku, name, unit_price, sellable, committed)
             SELECT sku, sku, 1, 0, count(*) FROM unnest($1::text[]) AS sku GROUP BY sku
         )
         INSERT INTO commerce.orders (id, customer_id, ordered_on, carrier, ship_name, ship_city, ship_country, status)
         SELECT 'd' || n, 'c', '2026-11-22', 'Speedy', 'n', 'c', 'c', 'paid'
           FROM generate_series(0, cardinality($1) - 1) AS n",
    )
    .bind(&skus)
    .execute(owner)
    .await?;
    sqlx::query(
        "INSERT INTO commerce.order_lines (order_id, sku, quantity, unit_price)
         SELECT 'd' || n - 1, sku, 1, 1 FROM unnest($1::text[]) WITH ORDINALITY AS line (sku, n)",
    )
    .bind(&skus)
    .execute(owner)
    .await?;
    let producer = feed::producer(place)?;
    for (number, sku) in skus.into_iter().enumerate() {
        let lines = [Line { sku, quantity: 2 }];
        let key = format!("dead-{number}");
        feed::ship(&producer, place.topics.main(), &key, &format!("d{number}"), &lines)?;
    }
    producer.flush(DEADLINE)?;
    wait_for("every dead letter", DEADLINE, async || {
        Ok(count(owner, "dead_letters").await? == letters)
    })
    .await?;
    wait_for("their records", DEADLINE, async || {
        Ok(topic::count(&place.brokers, &place.topics.dead_letter()).await? as i64 == letters)
    })
    .await?;
    let fingerprints: i64 = sqlx::query_scalar("SELECT count(DISTINCT fingerprint) FROM commerce.dead_letters")
        .fetch_one(owner)
        .await?;
    assert_eq!(fingerprints, groups);
    Ok(())
}

/// As many as were shipped were ordered after all.
async fn repair(owner: &PgPool) -> anyhow::Result<()> {
    let mut transaction = owner.begin().await?;
    for statement in [
        "UPDATE commerce.order_lines SET quantity = 2 WHERE order_id LIKE 'd%'",
        "UPDATE commerce.products SET committed = 2 * committed WHERE sku LIKE 'x%'",
    ] {
        sqlx::query(statement).execute(&mut *transaction).await?;
    }
    Ok(transaction.commit().await?)
}

/// Every table of both services, as a digest of all its rows.
async fn dump(owner: &PgPool) -> anyhow::Result<Vec<(String, String)>> {
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT oid::regclass::text FROM pg_class
          WHERE relkind = 'r' AND relnamespace IN ('commerce'::regnamespace, 'logistics'::regnamespace) ORDER BY 1",
    )
    .fetch_all(owner)
    .await?;
    let mut dump = Vec::new();
    for table in tables {
        let query = format!(
            "SELECT count(*) || ' ' || md5(coalesce(string_agg(md5(line::text), '' ORDER BY line::text), ''))
               FROM {table} AS line"
        );
        let digest = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(owner).await?;
        dump.push((table, digest));
    }
    Ok(dump)
}

async fn redrive(consumer: &Running, dry_run: bool) -> anyhow::Result<(StatusCode, Value)> {
    let ask = json!({
        "error_type": "ships_too_many", "canary": CANARY, "rate": 2_000, "abort_percent": 10, "dry_run": dry_run,
        "reason": "two of each were ordered"
    });
    let response = reqwest::Client::new()
        .post(consumer.url("/admin/redrives"))
        .bearer_auth(TOKEN)
        .json(&ask)
        .send()
        .await?;
    Ok((response.status(), response.json().await?))
}

/// A redrive to its end.
async fn job(consumer: &Running, deadline: Duration) -> anyhow::Result<Value> {
    let (status, view) = redrive(consumer, false).await?;
    assert_eq!(status, StatusCode::ACCEPTED, "{view}");
    ended(consumer, view["redrive"]["id"].as_str().context("no id")?, deadline).await
}

async fn ended(consumer: &Running, id: &str, deadline: Duration) -> anyhow::Result<Value> {
    let url = consumer.url(&format!("/admin/redrives/{id}"));
    let mut view = Value::Null;
    wait_for("the redrive to end", deadline, async || {
        view = reqwest::get(&url).await?.json().await?;
        Ok(view["ended_at"].is_string())
    })
    .await
    .with_context(|| view.to_string())?;
    Ok(view)
}

/// Live events applied a second, over the last `window`.
async fn rate_of_live(owner: &PgPool, window: Duration) -> anyhow::Result<f64> {
    let seconds = window.as_secs_f64();
    let applied: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM commerce.inbox
          WHERE aggregate_id LIKE 'live-%' AND applied_at > clock_timestamp() - make_interval(secs => $1)",
    )
    .bind(seconds)
    .fetch_one(owner)
    .await?;
    Ok(applied as f64 / seconds)
}

async fn count(owner: &PgPool, rows: &str) -> anyhow::Result<i64> {
    let query = AssertSqlSafe(format!("SELECT count(*) FROM commerce.{rows}"));
    Ok(sqlx::query_scalar(query).fetch_one(owner).await?)
}
