//! Parked events on their way out.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use inbox::operator::{Decision, LetterFilter};
use serde_json::{json, value::RawValue};
use shared_events::Envelope;
use uuid::Uuid;

use crate::{
    rate::{busiest_second, limit},
    stage::{ANN, CRAWLING, EFFECT, GATED, LOCKED, NEVER, Running, STAYS, Stage, event, until},
};

/// For each key a dead letter, and `behind` parked behind it.
async fn dead(stage: &Stage, keys: &[(&str, &[&Envelope])]) -> (Vec<Uuid>, Running) {
    stage.notes.gate_closed.store(true, Ordering::Relaxed);
    let engine = stage.engine().await;
    let letters: Vec<Envelope> = keys.iter().map(|(key, _)| event(GATED, key, 1)).collect();
    stage.send_events(&letters).await;
    until("the letters", async || {
        stage
            .number("SELECT count(*) FROM t.held_keys WHERE state = 'dead'")
            .await
            == keys.len() as i64
    })
    .await;
    // Only now, so that none of them is ever in one batch with its letter.
    for (_, behind) in keys {
        stage.send_events(behind.iter().copied()).await;
    }
    let parked = keys.iter().map(|(_, behind)| behind.len() as i64).sum::<i64>();
    until("what is behind them", async || {
        stage.number("SELECT count(*) FROM t.parked_events").await == parked
    })
    .await;
    until("their records", async || stage.dead_letters().len() == keys.len()).await;
    stage.notes.gate_closed.store(false, Ordering::Relaxed);
    (letters.iter().map(|letter| letter.id).collect(), engine)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_cannot_go_holds_up_no_other() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let locked = event(LOCKED, "locked", 2);
    let stays = event(STAYS, "stays", 2);
    let free: Vec<Envelope> = (2..=5).map(|sequence| event(EFFECT, "free", sequence)).collect();
    let behind: Vec<&Envelope> = free.iter().collect();
    let (letters, engine) = dead(
        &stage,
        &[("locked", &[&locked]), ("stays", &[&stays]), ("free", &behind)],
    )
    .await;
    // One that cannot be passed over for now, and one whose effect waits for a row that somebody holds.
    operator.decide(&letters[1..2], Decision::Redrive, ANN).await.unwrap();
    until("the second to die", async || {
        operator
            .letter(stays.id)
            .await
            .unwrap()
            .is_some_and(|letter| letter.parked == 0)
    })
    .await;
    assert_eq!(
        operator.decide(&[stays.id], Decision::Skip, ANN).await.unwrap(),
        [stays.id]
    );
    operator.decide(&letters[..1], Decision::Redrive, ANN).await.unwrap();
    until("a try of each", async || {
        stage.notes.attempts(locked.id).len() > 1 && stage.notes.passed_over(stays.id) > 1
    })
    .await;
    operator.decide(&letters[2..], Decision::Redrive, ANN).await.unwrap();
    until("the one behind them", async || stage.sequences("free").await.len() == 5).await;
    let (tries, passes) = (stage.notes.attempts(locked.id).len(), stage.notes.passed_over(stays.id));
    until("more tries of the others", async || {
        stage.notes.attempts(locked.id).len() > tries && stage.notes.passed_over(stays.id) > passes
    })
    .await;
    for key in ["locked", "stays"] {
        assert_eq!(
            stage.held(key).await,
            Some(("releasing".to_owned(), if key == "locked" { 2 } else { 1 }))
        );
    }
    engine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn g5_a_parked_event_that_dies_is_noted_before_its_record_leaves() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let mut large = event(NEVER, "a", 2);
    let noise: String = (0..1_000).map(|_| Uuid::now_v7().to_string()).collect();
    large.payload = RawValue::from_string(json!({ "noise": noise }).to_string()).unwrap();
    let (letters, engine) = dead(&stage, &[("a", &[&large]), ("b", &[&event(EFFECT, "b", 2)])]).await;
    let topic = stage.topics.dead_letter();
    stage.limit_bytes(&topic, 4_000).await;
    operator.decide(&letters[..1], Decision::Redrive, ANN).await.unwrap();
    until("the refusal to be shown", async || {
        let paused = engine.status.snapshot().paused;
        paused.is_some_and(|reason| reason.contains("max.message.bytes"))
    })
    .await;
    until("more tries", async || stage.notes.attempts(large.id).len() > 3).await;
    let letter = operator.letter(large.id).await.unwrap().unwrap();
    assert_eq!(
        (&*letter.row.state, letter.row.deaths, letter.attempts.len()),
        ("open", 1, 1),
        "one death and one failure, however often its record is sent"
    );
    assert_eq!(stage.dead_letters().len(), 2);
    assert_eq!(stage.held("a").await, Some(("releasing".to_owned(), 1)));
    operator.decide(&letters[1..], Decision::Redrive, ANN).await.unwrap();
    until("the other key", async || stage.sequences("b").await == [1, 2]).await;

    stage.limit_bytes(&topic, 1_000_000).await;
    until("its record", async || stage.dead_letters().len() == 3).await;
    until("its key", async || {
        stage.held("a").await == Some(("dead".to_owned(), 0))
    })
    .await;
    until("the end of the warning", async || {
        engine.status.snapshot().paused.is_none()
    })
    .await;
    engine.stop().await;
    assert_eq!(stage.number("SELECT count(*) FROM t.parked_events").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn g5_a_parked_event_that_cannot_be_read_becomes_a_letter() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let (first, last) = (event(EFFECT, "a", 2), event(EFFECT, "a", 3));
    let (letters, engine) = dead(&stage, &[("a", &[&first, &last])]).await;
    sqlx::query("UPDATE t.parked_events SET record_value = 'of another version' WHERE event_id = $1")
        .bind(first.id)
        .execute(&stage.pool)
        .await
        .unwrap();
    operator.decide(&letters, Decision::Redrive, ANN).await.unwrap();
    until("its letter", async || {
        stage.held("a").await == Some(("dead".to_owned(), 1))
    })
    .await;
    let row = operator.letter(first.id).await.unwrap().unwrap().row;
    assert_eq!(
        (&*row.state, &*row.error_type, row.sequence),
        ("open", "unreadable_parked", Some(2))
    );
    assert_eq!(stage.dead_letters().len(), 2);

    // It dies again while nothing is repaired; then it can be skipped.
    operator.decide(&[first.id], Decision::Redrive, ANN).await.unwrap();
    until("its second death", async || {
        operator.letter(first.id).await.unwrap().unwrap().row.deaths == 2
    })
    .await;
    until("its key", async || {
        stage.held("a").await == Some(("dead".to_owned(), 1))
    })
    .await;
    assert_eq!(
        operator.decide(&[first.id], Decision::Skip, ANN).await.unwrap(),
        [first.id]
    );
    until("the key to go on", async || stage.held("a").await.is_none()).await;
    engine.stop().await;
    assert_eq!(stage.sequences("a").await, [1, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn g10_a_stop_waits_for_what_is_on_its_way_out() {
    let stage = Stage::new(&[]).await;
    let slow = event(CRAWLING, "a", 2);
    let (letters, engine) = dead(&stage, &[("a", &[&slow])]).await;
    stage.operator().decide(&letters, Decision::Redrive, ANN).await.unwrap();
    until("its try", async || !stage.notes.attempts(slow.id).is_empty()).await;
    engine.stop().await;
    assert_eq!(stage.sequences("a").await, [1, 2]);
    assert_eq!(stage.held("a").await, None);
}

/// A hundred thousand letters of as many keys in the full run.
#[tokio::test(flavor = "multi_thread")]
async fn g6_letters_of_many_keys_leave_at_the_limit_and_not_faster() {
    let full = std::env::var_os("E2E_FULL").is_some();
    let (letters, rate) = if full { (100_000, 2_000) } else { (2_000, 1_000) };
    let mut stage = Stage::new(&[]).await;
    stage.redrive_rate = limit(rate);
    let operator = stage.operator();
    stage.notes.broken.store(true, Ordering::Relaxed);
    let engine = stage.engine().await;
    let all: Vec<Envelope> = (0..letters).map(|n| event(EFFECT, &format!("key-{n}"), 1)).collect();
    stage.send_events(&all).await;
    patiently(async || stage.number("SELECT count(*) FROM t.dead_letters").await == letters).await;
    engine.stop().await;
    stage.notes.broken.store(false, Ordering::Relaxed);
    let ids = operator.select(&LetterFilter::default(), u32::MAX).await.unwrap();
    for ids in ids.chunks(1_000) {
        operator.decide(ids, Decision::Redrive, ANN).await.unwrap();
    }
    let engine = stage.engine().await;
    until("the first effects", async || stage.effects().await > 0).await;
    let (start, before) = (Instant::now(), stage.effects().await);
    patiently(async || stage.effects().await == letters).await;
    let per_second = (letters - before) as f64 / start.elapsed().as_secs_f64();
    engine.stop().await;
    stage.assert_once_and_in_order(letters).await;
    let busiest = busiest_second(&stage).await;
    println!("{letters} letters of as many keys: {per_second:.0}/s, {busiest} in the busiest second, limit {rate}/s");
    assert!(busiest as f64 <= f64::from(rate) * 1.05, "{busiest} in one second");
    // How fast that is depends on the machine, how many keys go in one transaction does not: a hundredth of the limit.
    let transactions = stage.number("SELECT count(DISTINCT xmin::text) FROM t.inbox").await;
    let granted = i64::from(rate) / 100;
    assert!(transactions * granted <= letters * 3 / 2, "{transactions} transactions");
}

/// As `until`, with a deadline for the full run.
async fn patiently(condition: impl AsyncFn() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < Duration::from_secs(600), "too slow");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
