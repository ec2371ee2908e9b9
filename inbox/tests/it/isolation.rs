use std::{
    sync::atomic::Ordering,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::stage::{EFFECT, SQL_ERROR, Stage, event, until};

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_event_in_a_batch_of_500_leaves_499_in_the_same_pass() {
    let (without, calls) = batch_of_500(None).await;
    // A batch or two, if the engine's last fetch came in two parts.
    assert!(calls <= 2, "{calls} calls without a bad event");
    let (with, calls) = batch_of_500(Some(333)).await;
    println!(
        "a batch of 500: {:.1} ms; with one bad event in it: {:.1} ms and {calls} calls of the handler",
        without.as_secs_f64() * 1e3,
        with.as_secs_f64() * 1e3
    );
    assert!(calls <= 26, "{calls} calls: the batch was not halved");
}

/// From the first call of the handler to the last commit, and how many calls that took.
async fn batch_of_500(bad: Option<usize>) -> (Duration, usize) {
    let stage = Stage::new(&[]).await;
    let engine = stage.engine().await;
    let lock = stage.hold_up(&event(EFFECT, "first", 1)).await;
    let batch: Vec<_> = (0..500)
        .map(|n| {
            let event_type = if bad == Some(n) { SQL_ERROR } else { EFFECT };
            event(event_type, &format!("key-{n}"), 1)
        })
        .collect();
    stage.send_events_to(Some(0), &batch).await;
    // Who reads later than the engine has read them: so has the engine.
    until("the batch to stand in the topic", async || {
        stage.read(stage.topics.main()).len() == 501
    })
    .await;
    lock.rollback().await.unwrap();

    let good = 500 - bad.iter().count();
    until("the good ones", async || stage.effects().await == good as i64 + 1).await;
    until("the dead letter", async || stage.dead_letters().len() == 500 - good).await;
    engine.stop().await;
    let largest = stage.notes.largest.load(Ordering::Relaxed);
    assert!(largest >= 250, "{largest} together: they were no batch");
    stage.assert_once_and_in_order(good as i64 + 1).await;
    let began = SystemTime::now() - stage.notes.attempts(batch[0].id)[0].elapsed();
    let ended = stage
        .number(
            "SELECT (extract(epoch FROM max(pg_xact_commit_timestamp(xmin))) * 1e6)::bigint
               FROM (SELECT xmin FROM t.inbox UNION ALL SELECT xmin FROM t.dead_letters) AS line",
        )
        .await;
    let took = UNIX_EPOCH + Duration::from_micros(ended as u64);
    (
        took.duration_since(began).unwrap(),
        stage.notes.calls.load(Ordering::Relaxed) - 1,
    )
}
