use std::{sync::atomic::Ordering, time::Duration};

use inbox::FloodLimit;

use crate::stage::{RELEASES, Stage, event, events, until};

const RUN: u32 = 50;

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_fails_everything_is_stopped_and_nothing_is_lost() {
    let mut stage = Stage::new(&[]).await;
    stage.flood_limit = FloodLimit {
        run: RUN,
        ratio: 1.0,
        window: 1_000,
        resume_after: None,
    };
    stage.notes.broken.store(true, Ordering::Relaxed);
    stage.send_events(&events(2_000, 2_000)).await;
    let engine = stage.engine().await;
    until("the stop", async || {
        let paused = engine.status.snapshot().paused;
        paused.is_some_and(|reason| reason.contains("dead letters one after another"))
    })
    .await;
    assert!(engine.controls.stopped().is_some());
    assert!(stage.dead_letters().len() <= RUN as usize, "never more than the limit");

    stage.notes.broken.store(false, Ordering::Relaxed);
    let dead = async || stage.dead_letters().len() as i64;
    until("everything", async || {
        // Again, if a batch that was judged before the repair has stopped it once more.
        if engine.controls.stopped().is_some() {
            engine.controls.resume();
        }
        stage.effects().await + dead().await == 2_000
    })
    .await;
    engine.stop().await;
    stage.assert_once_and_in_order(2_000 - dead().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_consumer_goes_on_by_itself_after_the_repair() {
    let mut stage = Stage::new(&[]).await;
    stage.flood_limit = FloodLimit {
        run: 10,
        ratio: 1.0,
        window: 1_000,
        resume_after: Some(Duration::from_millis(300)),
    };
    stage.notes.broken.store(true, Ordering::Relaxed);
    let engine = stage.engine().await;
    stage.send_events(&events(500, 500)).await;
    until("the stop", async || engine.controls.stopped().is_some()).await;
    let dead = stage.dead_letters().len();
    // Several tries by itself, none of which lets anything through.
    let calls = stage.notes.calls.load(Ordering::Relaxed);
    until("more tries", async || {
        stage.notes.calls.load(Ordering::Relaxed) > calls + 12
    })
    .await;
    assert_eq!(stage.dead_letters().len(), dead);

    stage.notes.broken.store(false, Ordering::Relaxed);
    until("the rest", async || stage.effects().await == 500 - dead as i64).await;
    engine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_lets_go_what_is_dead_indeed_however_much_of_it_there_is() {
    let mut stage = Stage::new(&[]).await;
    stage.flood_limit = FloodLimit {
        run: 10,
        ratio: 1.0,
        window: 1_000,
        resume_after: None,
    };
    // In one partition, so that one batch has far more of them than the limit.
    for _ in 0..200 {
        stage.send(Some(b"k"), Some(b"no event"), Some(0), &[]).await;
    }
    let engine = stage.engine().await;
    until("the stop", async || engine.controls.stopped().is_some()).await;
    assert!(stage.dead_letters().len() <= 10);
    until("all of them", async || {
        engine.controls.resume();
        stage.dead_letters().len() == 200
    })
    .await;
    engine.stop().await;
}

/// They were passed over before the limit stopped them, so the handler calls them duplicates when it is over.
#[tokio::test(flavor = "multi_thread")]
async fn g5_released_letters_that_a_flood_has_stopped_leave_when_it_is_over() {
    let mut stage = Stage::new(&[]).await;
    stage.flood_limit = FloodLimit {
        run: 10,
        ratio: 1.0,
        window: 1_000,
        resume_after: None,
    };
    let all: Vec<_> = (0..100).map(|n| event(RELEASES, &format!("key-{n}"), 1)).collect();
    stage.send_events_to(Some(0), &all).await;
    let engine = stage.engine().await;
    until("the stop", async || engine.controls.stopped().is_some()).await;
    until("all of them", async || {
        engine.controls.resume();
        stage.dead_letters().len() == 100
    })
    .await;
    engine.stop().await;
    assert_eq!(
        stage
            .number("SELECT count(*) FROM t.dead_letters WHERE state = 'open'")
            .await,
        100
    );
    assert_eq!(stage.number("SELECT count(*) FROM t.inbox").await, 0);
}
