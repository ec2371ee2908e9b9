use std::time::Duration;

use e2e::{
    feed,
    pair::{Role, Running},
    place::Place,
    wait_for, workload,
};
use rdkafka::producer::{BaseRecord, Producer};
use shared_events::shipment::Line;
use sqlx::PgPool;

const LIMIT: i64 = 2_000;
const DEADLINE: Duration = Duration::from_secs(300);
/// The consumer's resident memory stays below this, whatever waits for it.
const MEMORY_KIB: u64 = 80 * 1024;

/// G6 and G7: a backlog of 200,000 events (24,000 in the short run) at 2,000/s, on one and on three instances.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rate_at_the_table_stays_below_the_limit_with_one_and_with_three_instances() -> anyhow::Result<()> {
    let backlog: i64 = if std::env::var_os("E2E_FULL").is_some() {
        200_000
    } else {
        24_000
    };
    for instances in [1, 3] {
        let place = Place::shared().await?;
        let owner = place.owner_pool()?;
        workload::prepare_orders(&owner, 1_000).await?;
        fill(&place, backlog).await?;

        let limit = LIMIT.to_string();
        let settings = [("RATE_LIMIT", limit.as_str())];
        let mut consumers = Vec::new();
        for instance in 0..instances {
            consumers.push(Running::spawn(&place, Role::Consumer(instance), &settings)?);
        }
        for consumer in &mut consumers {
            consumer.ready().await?;
        }
        let mut largest_kib = 0;
        wait_for("the backlog to be applied", DEADLINE, async || {
            for consumer in &consumers {
                largest_kib = largest_kib.max(consumer.resident_kib()?);
            }
            Ok(applied(&owner).await? >= backlog)
        })
        .await?;
        let mut rebalances = 0.0;
        for consumer in &consumers {
            rebalances += consumer.counter("inbox_rebalances_total").await?;
        }
        for consumer in consumers {
            consumer.stop().await?;
        }

        let (fastest, seconds) = fastest_second(&owner).await?;
        println!(
            "{instances} instance(s): {backlog} events in {seconds:.1} s, fastest second {fastest} of {LIMIT}, \
             largest resident memory {} MiB, {rebalances} rebalance callbacks",
            largest_kib / 1024
        );
        assert_eq!(applied(&owner).await?, backlog);
        assert!(fastest as f64 <= LIMIT as f64 * 1.05, "{fastest} events in one second");
        assert!(largest_kib < MEMORY_KIB, "{largest_kib} KiB");
        // Each instance joins once and each join moves partitions once; a storm would be dozens.
        assert!(rebalances <= 4.0 * instances as f64, "{rebalances} rebalance callbacks");
    }
    Ok(())
}

/// Commits in any window of one second, by the server's own commit times; and the time from first to last.
async fn fastest_second(owner: &PgPool) -> anyhow::Result<(i64, f64)> {
    Ok(sqlx::query_as(
        "WITH commit AS MATERIALIZED (SELECT pg_xact_commit_timestamp(xmin) AS at FROM commerce.inbox),
              window_of AS (SELECT count(*) OVER (ORDER BY at RANGE BETWEEN CURRENT ROW
                                                  AND interval '999999 microseconds' FOLLOWING) AS events FROM commit)
         SELECT (SELECT max(events) FROM window_of), (SELECT extract(epoch FROM max(at) - min(at))::float8 FROM commit)",
    )
    .fetch_one(owner)
    .await?)
}

async fn applied(owner: &PgPool) -> anyhow::Result<i64> {
    Ok(sqlx::query_scalar("SELECT count(*) FROM commerce.inbox")
        .fetch_one(owner)
        .await?)
}

async fn fill(place: &Place, backlog: i64) -> anyhow::Result<()> {
    let producer = feed::producer(place)?;
    for number in 0..backlog {
        let key = format!("s-{number}");
        let order = 1 + number % 1_000;
        let line = Line {
            quantity: 1,
            ..workload::line_of(order, 0)
        };
        let value = feed::envelope(&key, 1, &feed::created(&order.to_string(), &[line]))?;
        let record = BaseRecord::to(place.topics.main()).key(&key).payload(&value);
        producer.send(record).map_err(|(error, _)| error)?;
    }
    Ok(producer.flush(DEADLINE)?)
}
