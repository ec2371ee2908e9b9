use std::sync::atomic::Ordering;

use sqlx::PgTransaction;

use crate::stage::{AT_DOOR, EFFECT, PARTITIONS, Running, SQL_ERROR, Stage, event, until};

/// One transaction at a time, and that one waits for the table until the lock is given up. Behind it waits an event in each
/// other partition.
async fn all_partitions_wait(event_type_of: impl Fn(i32) -> &'static str) -> (Stage, Running, PgTransaction<'static>) {
    let mut stage = Stage::new(&[]).await;
    stage.max_transactions = 1;
    let engine = stage.engine().await;
    let mut lock = stage.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE t.inbox IN EXCLUSIVE MODE")
        .execute(&mut *lock)
        .await
        .unwrap();
    stage.send_events_to(Some(0), &[event(EFFECT, "key-0", 1)]).await;
    let waiting = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'";
    until("the first event to wait", async || stage.number(waiting).await == 1).await;
    for partition in 1..PARTITIONS {
        let event = event(event_type_of(partition), &format!("key-{partition}"), 1);
        stage.send_events_to(Some(partition), &[event]).await;
    }
    // Who reads later than the engine has read them: so has the engine.
    until("an event in each partition", async || {
        stage.read(stage.topics.main()).len() == PARTITIONS as usize
    })
    .await;
    (stage, engine, lock)
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_of_several_partitions_that_wait_share_a_transaction() {
    let (stage, engine, lock) = all_partitions_wait(|_| EFFECT).await;
    lock.rollback().await.unwrap();
    let all = i64::from(PARTITIONS);
    until("all effects", async || stage.effects().await == all).await;
    until("their offsets", async || stage.committed() == all).await;
    engine.stop().await;
    stage.assert_once_and_in_order(all).await;
    let transactions = stage.number("SELECT count(DISTINCT xmin::text) FROM t.inbox").await;
    // One more if the engine read the last event late.
    assert!((2..=3).contains(&transactions), "{transactions} transactions");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_fails_takes_no_other_partition_with_it() {
    let (stage, engine, lock) = all_partitions_wait(|partition| if partition == 3 { SQL_ERROR } else { EFFECT }).await;
    lock.rollback().await.unwrap();
    let all = i64::from(PARTITIONS);
    until("the good ones", async || stage.effects().await == all - 1).await;
    until("all offsets", async || stage.committed() == all).await;
    engine.stop().await;
    stage.assert_once_and_in_order(all - 1).await;
    let dead = stage.dead_letters();
    assert_eq!(dead.len(), 1);
    assert_eq!(dead[0].key.as_deref(), Some(&b"key-3"[..]));
    // The first one, those that waited, each of them alone.
    let calls = stage.notes.calls.load(Ordering::Relaxed);
    assert!(calls > PARTITIONS as usize, "{calls} calls: they did not share a transaction");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_hangs_holds_up_no_other_partition() {
    let stage = Stage::new(&[]).await;
    let engine = stage.engine().await;
    let door = stage.notes.door.write().await;
    let at_door = event(AT_DOOR, "key-0", 1);
    stage.send_events_to(Some(0), [&at_door]).await;
    until("one that hangs", async || !stage.notes.attempts(at_door.id).is_empty()).await;
    for partition in 1..PARTITIONS {
        let event = event(EFFECT, &format!("key-{partition}"), 1);
        stage.send_events_to(Some(partition), &[event]).await;
    }
    let others = i64::from(PARTITIONS) - 1;
    until("the others", async || stage.effects().await == others).await;
    drop(door);
    until("the one that hung", async || stage.effects().await == others + 1).await;
    engine.stop().await;
    stage.assert_once_and_in_order(others + 1).await;
}
