use std::time::{Duration, Instant};

use inbox::Rate;

use crate::stage::{PARTITIONS, Stage, events, until};

/// What a member may take between two polls.
const POLL_INTERVAL: Duration = Duration::from_secs(10);

/// The interval passes more than twice, in the full run twelve times, while the queues are full and nearly nothing is granted.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_that_waits_for_the_rate_limit_moves_no_partition() {
    let full = std::env::var_os("E2E_FULL").is_some();
    let time = Duration::from_secs(if full { 120 } else { 25 });
    let mut stage = Stage::new(&[]).await;
    stage.rate = Rate::PerSecond(1.try_into().unwrap());
    stage.membership.poll_interval = Some(POLL_INTERVAL);
    stage.send_events(&events(10_000, 600)).await;
    let engine = stage.engine().await;
    until("its partitions", async || {
        engine.status.snapshot().partitions.len() == PARTITIONS as usize
    })
    .await;

    let (start, joined) = (Instant::now(), engine.status.snapshot().rebalances);
    while start.elapsed() < time {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = engine.status.snapshot();
        let after = start.elapsed();
        assert_eq!(now.rebalances, joined, "a rebalance after {after:?}");
        assert_eq!(now.partitions.len(), PARTITIONS as usize, "after {after:?}");
    }
    let (effects, after) = (stage.effects().await, start.elapsed());
    engine.stop().await;
    println!("{effects} of 10000 events in {after:.0?}, no rebalance after the one that joined");
    assert!(
        (1..=after.as_secs() as i64 + 5).contains(&effects),
        "{effects} effects in {after:?}: they did not wait for the limit"
    );
}

/// Also where nothing new comes: the client library knows no committed offset of a partition that it was told where to begin.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_nothing_that_was_finished_before_is_lag() {
    let stage = Stage::new(&[]).await;
    stage.send_events(&events(200, 50)).await;
    let engine = stage.engine().await;
    until("all have taken effect", async || stage.effects().await == 200).await;
    engine.stop().await;

    let engine = stage.engine().await;
    let lags = || {
        let partitions = engine.status.snapshot().partitions;
        let known: Vec<i64> = partitions.iter().filter_map(|partition| partition.lag).collect();
        (known.len() == PARTITIONS as usize).then_some(known)
    };
    until("the lag of every partition is known", async || lags().is_some()).await;
    assert_eq!(lags(), Some(vec![0; PARTITIONS as usize]));
    engine.stop().await;
}
