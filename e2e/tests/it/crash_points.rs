//! The consumer's process ended at each of its named places, and what it leaves behind held against what it promised.

mod books;
mod wave;

use std::{
    os::unix::process::ExitStatusExt,
    time::{Duration, Instant},
};

use anyhow::Context;
use devstack::database::COMMERCE;
use e2e::{
    pair::{Role, Running, STOP_DEADLINE},
    place::Place,
    wait_for,
};
use inbox::crash_point::{self, CrashPoint, VARIABLE};
use sqlx::PgPool;
use tokio::task::{JoinSet, LocalSet};

use wave::{TOKEN, Wave};

/// Places at work at once; each has a database, topics and a consumer of its own, and takes one point after the other.
const LANES: usize = 4;
const DEADLINE: Duration = Duration::from_secs(60);
const SIGABRT: i32 = 6;

/// Some of each path; the full run takes all.
const SOME: [CrashPoint; 8] = [
    crash_point::COMMIT_AFTER,
    crash_point::REDIRECT_ACKNOWLEDGED,
    crash_point::OFFSET_STORED,
    crash_point::REVOKE_DRAINED,
    crash_point::RELEASE_COMMIT_BEFORE,
    crash_point::RELEASE_ACKNOWLEDGED,
    crash_point::DECIDE_COMMIT_AFTER,
    crash_point::STEP_COMMIT_BEFORE,
];

/// G2, G3, G5 and G10 at every named place of the engine, of redirects, of redrives and of what operators do: a process that
/// dies there leaves tables that agree with each other and with the topics, and the next one brings all to its end.
#[tokio::test]
async fn a_consumer_that_dies_at_any_crash_point_leaves_nothing_lost_doubled_or_unaudited() -> anyhow::Result<()> {
    let full = std::env::var_os("E2E_FULL").is_some();
    let mut deaths: Vec<(CrashPoint, u32)> = if full {
        crash_point::ALL.iter().flat_map(|point| times(*point)).collect()
    } else {
        SOME.iter().map(|point| (*point, 1)).collect()
    };
    if let Ok(only) = std::env::var("E2E_CRASH_POINTS") {
        deaths = crash_point::ALL.iter().flat_map(|point| times(*point)).collect();
        deaths.retain(|(point, times)| only.split(',').any(|name| name == format!("{}@{times}", point.name())));
    }
    let started = Instant::now();
    let died = deaths.len();
    let (here, mut lanes) = (LocalSet::new(), JoinSet::new());
    for lane in 0..LANES {
        let deaths: Vec<_> = deaths.iter().copied().skip(lane).step_by(LANES).collect();
        lanes.spawn_local_on(async move { work(&deaths).await }, &here);
    }
    here.run_until(async {
        while let Some(lane) = lanes.join_next().await {
            lane??;
        }
        anyhow::Ok(())
    })
    .await?;
    println!("{died} deaths in {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// A process is stopped once in its life.
fn times(point: CrashPoint) -> impl Iterator<Item = (CrashPoint, u32)> {
    let most = if point.name().starts_with("revoke.") { 1 } else { 3 };
    (1..=most).map(move |times| (point, times))
}

async fn work(deaths: &[(CrashPoint, u32)]) -> anyhow::Result<()> {
    if deaths.is_empty() {
        return Ok(());
    }
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    e2e::workload::prepare_orders(&owner, 0).await?;
    for (point, times) in deaths {
        let death = format!("{}@{times}", point.name());
        die_and_go_on(&place, &owner, *point, *times).await.context(death)?;
    }
    Ok(())
}

/// One death, and the life after it.
async fn die_and_go_on(place: &Place, owner: &PgPool, point: CrashPoint, times: u32) -> anyhow::Result<()> {
    let death = format!("{}@{times}", point.name());
    let start = Instant::now();
    let mut consumer = start_consumer(place, &[(VARIABLE, &death)])?;
    let mut waves = Vec::new();
    // Some places are met once in a wave.
    for number in 1..=times {
        let mut wave = Wave::new(place, owner, format!("{death}-{number}"))?;
        let driven = wave.drive(&mut consumer).await;
        waves.push(wave);
        if let Err(error) = driven {
            // Either it has died, or the wave is stuck, which is said then.
            let ended = consumer.service.wait(Duration::from_secs(5)).await;
            ended.unwrap_or_else(|_| panic!("{error:#}"));
            break;
        }
    }
    // Those that are left are met on the way out.
    let status = match consumer.service.exited()? {
        Some(status) => status,
        None => consumer.service.terminate(STOP_DEADLINE).await?,
    };
    let log = consumer.service.log()?;
    let died_there = log.contains(&format!("died at crash point {}", point.name()));
    assert!(
        status.signal() == Some(SIGABRT) && died_there,
        "{death} is not where it ended: {status}"
    );
    let lived = start.elapsed();
    drop(consumer);

    // Nothing moves now. What the dead process had begun is over when its connections are.
    wait_for("the connections of the dead", DEADLINE, async || {
        let left: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = $1",
        )
        .bind(COMMERCE)
        .fetch_one(owner)
        .await?;
        Ok(left == 0)
    })
    .await?;
    books::assert_consistent(place, owner)
        .await
        .context("while nothing runs")?;
    for wave in &waves {
        wave.assert_lost_answer_is_audited_if_it_was_done().await?;
    }

    let start = Instant::now();
    let mut consumer = start_consumer(place, &[])?;
    for wave in &mut waves {
        // Panics, so that the log is shown.
        wave.drive(&mut consumer)
            .await
            .expect("the next process brings all to its end");
    }
    consumer.ready().await?;
    consumer.stop().await?;
    books::assert_consistent(place, owner).await?;
    books::assert_every_letter_has_its_record(place, owner).await?;
    let mut counted = books::Counted::default();
    for wave in &waves {
        wave.assert_settled().await?;
        counted.add(wave.count().await?);
    }
    println!(
        "{death:28} died by SIGABRT after {:.1} s, settled in {:.1} s: {counted}",
        lived.as_secs_f64(),
        start.elapsed().as_secs_f64(),
    );
    Ok(())
}

/// With a name that stays, so that the group does not wait for a dead member's session to end.
/// The last delay is long: on a slow machine what is late must not die before it comes.
fn start_consumer(place: &Place, extra: &[(&str, &str)]) -> anyhow::Result<Running> {
    let tokens = format!("olga:operator:{TOKEN}");
    let mut env = vec![
        ("RETRY_DELAYS", "300ms,2s,20s"),
        ("GROUP_INSTANCE_ID", "one"),
        ("ADMIN_TOKENS", &tokens),
        ("DEAD_LETTER_RUN", "1000"),
    ];
    env.extend_from_slice(extra);
    Running::spawn(place, Role::Consumer(0), &env)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_point_that_is_not_there_ends_the_start_and_says_so() -> anyhow::Result<()> {
    let place = Place::shared().await?;
    let mut consumer = start_consumer(&place, &[(VARIABLE, "redirect.acknowleged")])?;
    let status = consumer.service.wait(DEADLINE).await?;
    let log = consumer.service.log()?;
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(
        log.contains("there is no crash point \\\"redirect.acknowleged\\\"; there are batch.received, "),
        "{log}"
    );
    Ok(())
}
