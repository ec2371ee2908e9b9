use std::time::Duration;

use devstack::testing::{PrivateKafka, PrivatePostgres};
use e2e::{
    feed::{self, Feed},
    pair::{Role, Running},
    place::{Place, TIERS},
    topic, wait_for, workload,
};
use sqlx::PgPool;
use tokio::time::Instant;

const DEADLINE: Duration = Duration::from_secs(600);

/// 5 s without each server under 200 events a second; in the full run 60 s under 1,000. The events go on meanwhile: into the
/// topic while PostgreSQL is away, and waiting in their producer while Kafka is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_either_server_sends_nothing_to_the_retry_topics_or_the_dead_letters() -> anyhow::Result<()> {
    let full = std::env::var_os("E2E_FULL").is_some();
    let (rate, outage, orders) = if full { (1_000, 60, 400_000) } else { (200, 5, 20_000) };
    let outage = Duration::from_secs(outage);
    let mut postgres = PrivatePostgres::start().await?;
    let mut kafka = PrivateKafka::start().await?;
    let place = Place::private(&postgres, &kafka).await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, orders).await?;
    let mut consumer = Running::start(&place, Role::Consumer(0), &[("RATE_LIMIT", "unlimited")]).await?;
    let feed = Feed::start(&place, rate, orders)?;
    let started = Instant::now();
    caught_up(&owner, &feed, rate).await?;

    postgres.stop_fast().await?;
    tokio::time::sleep(outage).await;
    postgres.start_again().await?;
    let back = Instant::now();
    let behind = feed.sent() - feed::applied(&owner).await?;
    caught_up(&owner, &feed, rate).await?;
    println!(
        "PostgreSQL away for {outage:?}: {behind} events behind, no lag {:.1?} after it was back",
        back.elapsed()
    );

    kafka.stop().await?;
    tokio::time::sleep(outage).await;
    kafka.start_again().await?;
    let back = Instant::now();
    let behind = feed.sent() - feed::applied(&owner).await?;
    caught_up(&owner, &feed, rate).await?;
    println!(
        "Kafka away for {outage:?}: {behind} events behind, no lag {:.1?} after it was back",
        back.elapsed()
    );

    assert_eq!(consumer.service.exited()?, None, "no outage ends a consumer");
    let fed_for = started.elapsed();
    let sent = feed.stop().await?;
    wait_for("every event", DEADLINE, async || {
        Ok(feed::applied(&owner).await? >= sent)
    })
    .await?;
    consumer.stop().await?;
    println!(
        "{sent} events in {fed_for:.0?}, {:.0} a second",
        sent as f64 / fed_for.as_secs_f64()
    );

    let mut redirected = topic::count(&place.brokers, &place.topics.dead_letter()).await?;
    for tier in 1..=TIERS {
        redirected += topic::count(&place.brokers, &place.topics.retry(tier)).await?;
    }
    assert_eq!(redirected, 0, "records in retry topics and dead letters");
    for table in ["dead_letters", "failed_attempts", "parked_events", "held_keys"] {
        let query = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM commerce.{table}"));
        let rows: i64 = sqlx::query_scalar(query).fetch_one(&owner).await?;
        assert_eq!(rows, 0, "rows in {table}");
    }
    for (check, rows) in feed::check(&owner, sent).await? {
        assert_eq!(rows, 0, "{check}");
    }
    Ok(())
}

/// What is not applied is what was sent in the last half second.
async fn caught_up(owner: &PgPool, feed: &Feed, rate: i64) -> anyhow::Result<()> {
    wait_for("the end of the lag", DEADLINE, async || {
        let applied = feed::applied(owner).await?;
        Ok(applied > 0 && feed.sent() - applied <= rate / 2)
    })
    .await
}
