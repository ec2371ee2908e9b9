use std::sync::atomic::Ordering;

use sqlx::PgTransaction;

use crate::stage::{AT_DOOR, DEADLINE, EFFECT, FOREIGN, PARTITIONS, Running, SQL_ERROR, Stage, event, until};

const ALL: i64 = PARTITIONS as i64;

/// One transaction at a time, and that one waits for the table until the lock is given up. Behind it an event of each other
/// partition waits.
async fn all_partitions_wait(event_type_of: impl Fn(i32) -> &'static str) -> (Stage, Running, PgTransaction<'static>) {
    let mut stage = Stage::new(&[]).await;
    stage.max_transactions = 1;
    let engine = stage.engine().await;
    let lock = stage.hold_up(&event(EFFECT, "key-0", 1)).await;
    for partition in 1..PARTITIONS {
        let event = event(event_type_of(partition), &format!("key-{partition}"), 1);
        stage.send_events_to(Some(partition), &[event]).await;
    }
    until("an event of each partition in its worker's hands", async || {
        let partitions = engine.status.snapshot().partitions;
        let is_busy = |age: Option<f64>| age.is_some_and(|seconds| seconds > 0.0);
        partitions
            .iter()
            .filter(|partition| is_busy(partition.oldest_age_seconds))
            .count()
            == PARTITIONS as usize
    })
    .await;
    (stage, engine, lock)
}

/// Until each partition has something that is not finished.
async fn all_in_hand(engine: &Running) {
    until("an event of each partition", async || {
        let partitions = engine.status.snapshot().partitions;
        let is_busy = |age: Option<f64>| age.is_some_and(|seconds| seconds > 0.0);
        let busy = partitions
            .iter()
            .filter(|partition| is_busy(partition.oldest_age_seconds));
        busy.count() == PARTITIONS as usize
    })
    .await;
}

/// An event of this partition that hangs in its transaction while the door is closed.
async fn hang(stage: &Stage, partition: i32) {
    let at_door = event(AT_DOOR, &format!("key-{partition}"), 1);
    stage.send_events_to(Some(partition), [&at_door]).await;
    until("one that hangs", async || !stage.notes.attempts(at_door.id).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_of_several_partitions_that_wait_share_a_transaction() {
    let (stage, engine, lock) = all_partitions_wait(|_| EFFECT).await;
    lock.rollback().await.unwrap();
    until("all effects", async || stage.effects().await == ALL).await;
    until("their offsets", async || stage.committed() == ALL).await;
    engine.stop().await;
    stage.assert_once_and_in_order(ALL).await;
    assert_eq!(stage.number("SELECT count(DISTINCT xmin::text) FROM t.inbox").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_fails_takes_no_other_partition_with_it() {
    let (stage, engine, lock) = all_partitions_wait(|partition| if partition == 3 { SQL_ERROR } else { EFFECT }).await;
    lock.rollback().await.unwrap();
    until("the good ones", async || stage.effects().await == ALL - 1).await;
    until("all offsets", async || stage.committed() == ALL).await;
    engine.stop().await;
    stage.assert_once_and_in_order(ALL - 1).await;
    let dead = stage.dead_letters();
    assert_eq!(dead.len(), 1);
    assert_eq!(dead[0].key.as_deref(), Some(&b"key-3"[..]));
    // The first event, those that waited, each of these alone.
    assert_eq!(stage.notes.calls.load(Ordering::Relaxed), 1 + 1 + 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_keeps_its_verdicts_among_others_with_records_that_are_no_events() {
    let (stage, engine, lock) = all_partitions_wait(|_| EFFECT).await;
    for partition in 1..PARTITIONS {
        let key = format!("key-{partition}");
        stage
            .send(Some(key.as_bytes()), Some(b"no envelope"), Some(partition), &[])
            .await;
        let foreign = event(FOREIGN, &format!("foreign-{partition}"), 1);
        let rest = [foreign, event(EFFECT, &key, 2), event(EFFECT, &key, 3)];
        stage.send_events_to(Some(partition), &rest).await;
    }
    lock.rollback().await.unwrap();
    let (effects, records) = (1 + 3 * (ALL - 1), 1 + 5 * (ALL - 1));
    until("all effects", async || stage.effects().await == effects).await;
    until("all offsets", async || stage.committed() == records).await;
    engine.stop().await;
    stage.assert_once_and_in_order(effects).await;
    let dead = stage.dead_letters();
    assert_eq!(dead.len() as i64, ALL - 1);
    assert!(
        dead.iter()
            .all(|letter| letter.value.as_deref() == Some(b"no envelope"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_locked_holds_up_its_own_partition_only() {
    let mut stage = Stage::new(&[]).await;
    stage.max_transactions = 2;
    // Nothing else ends a wait for a lock.
    stage.transaction_limit = 10 * DEADLINE;
    sqlx::raw_sql(
        "CREATE TABLE t.rows (aggregate_id text PRIMARY KEY);
         INSERT INTO t.rows VALUES ('key-3');
         CREATE FUNCTION t.lock_row() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
             PERFORM FROM t.rows WHERE aggregate_id = new.aggregate_id FOR UPDATE; RETURN new; END$$;
         CREATE TRIGGER lock_row BEFORE INSERT ON t.effects FOR EACH ROW EXECUTE FUNCTION t.lock_row()",
    )
    .execute(&stage.pool)
    .await
    .unwrap();
    let mut lock = stage.pool.begin().await.unwrap();
    sqlx::query("SELECT FROM t.rows WHERE aggregate_id = 'key-3' FOR UPDATE")
        .execute(&mut *lock)
        .await
        .unwrap();
    let engine = stage.engine().await;
    let door = stage.notes.door.write().await;
    for partition in 0..2 {
        hang(&stage, partition).await;
    }
    for partition in 2..PARTITIONS {
        let event = event(EFFECT, &format!("key-{partition}"), 1);
        stage.send_events_to(Some(partition), &[event]).await;
    }
    all_in_hand(&engine).await;
    drop(door);
    until("the others", async || stage.effects().await == ALL - 1).await;
    until("the one that waits", async || stage.lock_waits().await == 1).await;
    assert_eq!(stage.sequences("key-3").await, Vec::<i64>::new());
    lock.rollback().await.unwrap();
    until("that one", async || stage.effects().await == ALL).await;
    engine.stop().await;
    stage.assert_once_and_in_order(ALL).await;
    assert!(stage.notes.largest.load(Ordering::Relaxed) > 1, "none was shared");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_hangs_does_not_hold_up_those_after_it() {
    let mut stage = Stage::new(&[]).await;
    stage.transaction_limit = 10 * DEADLINE;
    let engine = stage.engine().await;
    let door = stage.notes.door.write().await;
    hang(&stage, 0).await;
    for partition in 1..PARTITIONS {
        let event = event(EFFECT, &format!("key-{partition}"), 1);
        stage.send_events_to(Some(partition), &[event]).await;
    }
    until("the others", async || stage.effects().await == ALL - 1).await;
    drop(door);
    until("the one that hung", async || stage.effects().await == ALL).await;
    engine.stop().await;
    stage.assert_once_and_in_order(ALL).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_while_batches_wait_for_a_transaction_leaves_nothing_out() {
    let (stage, engine, lock) = all_partitions_wait(|_| EFFECT).await;
    let stopping = tokio::spawn(engine.stop());
    lock.rollback().await.unwrap();
    stopping.await.unwrap();
    let engine = stage.engine().await;
    until("all effects", async || stage.effects().await == ALL).await;
    until("all offsets", async || stage.committed() == ALL).await;
    engine.stop().await;
    stage.assert_once_and_in_order(ALL).await;
}
