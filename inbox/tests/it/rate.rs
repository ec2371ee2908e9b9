use std::time::{Duration, Instant};

use inbox::{Budget, Rate};
use sqlx::Connection;

use crate::stage::{EFFECT, LOCKED, Stage, event, events, until};

const LIMIT: f64 = 1_000.0;

pub(crate) fn limit(rate: u32) -> Rate {
    Rate::PerSecond(rate.try_into().unwrap())
}

/// The most events that any window of one second holds, by the times of their commits.
pub(crate) async fn busiest_second(stage: &Stage) -> i64 {
    stage
        .number(
            "SELECT max(n) FROM (SELECT count(*) OVER
                 (ORDER BY at RANGE BETWEEN CURRENT ROW AND interval '999999 microseconds' FOLLOWING) AS n
             FROM (SELECT pg_xact_commit_timestamp(xmin) AS at FROM t.inbox) i) w",
        )
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_second_sees_more_than_the_limit_even_when_transactions_hang_and_then_commit_together() {
    let mut stage = Stage::new(&[]).await;
    stage.rate = limit(LIMIT as u32);
    stage.send_events(&events(6_000, 120)).await;
    let start = Instant::now();
    let engines = [stage.engine().await, stage.engine().await, stage.engine().await];
    let mut blocker = sqlx::PgConnection::connect(&stage.database.superuser_url())
        .await
        .unwrap();
    for at in [1_500, 3_000] {
        until("its share of the events", async || stage.effects().await >= at).await;
        let mut lock = blocker.begin().await.unwrap();
        sqlx::query("LOCK TABLE t.effects IN EXCLUSIVE MODE")
            .execute(&mut *lock)
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        lock.rollback().await.unwrap();
    }
    until("the last effect", async || stage.effects().await >= 6_000).await;
    let took = start.elapsed();
    for engine in engines {
        engine.stop().await;
    }
    stage.assert_once_and_in_order(6_000).await;
    let busiest = busiest_second(&stage).await;
    assert!(busiest as f64 <= LIMIT * 1.05, "{busiest} events in one second");
    assert!(
        busiest as f64 >= LIMIT * 0.8,
        "only {busiest} events in the best second"
    );
    assert!(
        took < Duration::from_secs(20),
        "{took:?} for six seconds of work and two stalls"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_changed_at_run_time_is_in_force_at_once() {
    let mut stage = Stage::new(&[]).await;
    stage.rate = limit(1);
    stage.send_events(&events(2_000, 60)).await;
    let engine = stage.engine().await;
    until("a first effect", async || stage.effects().await > 0).await;
    engine.limits.set(Budget::Live, Rate::Unlimited);
    until("all effects", async || stage.effects().await == 2_000).await;
    engine.stop().await;
    stage.assert_once_and_in_order(2_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_that_wait_for_the_platform_leave_the_rate_to_the_others() {
    let mut stage = Stage::new(&[]).await;
    // 25 events may be in flight, in grants of 10: three full batches that kept theirs would stop everything.
    stage.rate = limit(1_000);
    let batch = async |event_type: &str, partition: i32| {
        for n in 0..20 {
            let envelope = event(event_type, &format!("{event_type}-{partition}"), n + 1);
            let (key, value) = (envelope.aggregate_id.clone(), envelope.encode().unwrap());
            stage
                .send(Some(key.as_bytes()), Some(value.as_bytes()), Some(partition), &[])
                .await;
        }
    };
    for partition in 0..4 {
        batch(LOCKED, partition).await;
    }
    let engine = stage.engine().await;
    until("a pause", async || engine.status.snapshot().paused.is_some()).await;
    for partition in 4..6 {
        batch(EFFECT, partition).await;
    }
    until("the other partitions", async || stage.effects().await == 40).await;
    assert!(engine.status.snapshot().paused.is_some());
    engine.stop().await;
    stage.assert_once_and_in_order(40).await;
}
