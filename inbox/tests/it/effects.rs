use std::sync::atomic::Ordering;

use inbox::{EngineError, UnknownTypes};
use rdkafka::{ClientConfig, admin::AdminClient, admin::AdminOptions, client::DefaultClientContext};
use shared_events::Envelope;
use uuid::Uuid;

use crate::stage::{DEADLINE, EFFECT, FOREIGN, PARTITIONS, SLOW, Stage, event, events, until};

const COUNT: usize = 6_000;

/// Of the inbox, without its consumer and its time.
type Row = (Uuid, String, String, i64, String, i32, i64);

#[tokio::test(flavor = "multi_thread")]
async fn every_event_takes_effect_once_and_in_order_with_every_record_twice_and_two_engines() {
    let stage = Stage::new(&[]).await;
    let events = events(COUNT, 60);
    let (first, second) = (stage.engine().await, stage.engine().await);
    // The second copy comes in the same batch, in a later one, or through the other engine.
    for chunk in events.chunks(500) {
        stage.send_events(chunk).await;
        stage.send_events(chunk).await;
    }
    until("the last effect", async || stage.effects().await >= COUNT as i64).await;
    first.stop().await;
    second.stop().await;
    stage.assert_once_and_in_order(COUNT as i64).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_new_events_are_streamed_into_the_inbox_and_a_known_one_among_them_costs_one_transaction() {
    let stage = Stage::new(&[]).await;
    // Notes the statements whose transactions are committed.
    let trigger = "CREATE TABLE t.claims (statement text);
        CREATE FUNCTION t.note_claim() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN INSERT INTO t.claims SELECT current_query(); RETURN NULL; END$$;
        CREATE TRIGGER note AFTER INSERT ON t.inbox FOR EACH STATEMENT EXECUTE FUNCTION t.note_claim()";
    sqlx::raw_sql(trigger).execute(&stage.pool).await.unwrap();
    let streamed = async || {
        stage
            .number("SELECT count(*) FROM t.claims WHERE statement LIKE 'COPY%'")
            .await
    };
    let engine = stage.engine().await;
    let mut sent = Vec::new();
    let mut send_together = async |together: &[Envelope]| {
        let first = event(EFFECT, "first", sent.len() as i64 + 1);
        let lock = stage.hold_up(&first).await;
        stage.send_events_to(Some(0), together).await;
        sent.push(first);
        sent.extend_from_slice(together);
        // Who reads later than the engine has read them: so has the engine.
        until("the rest to stand in the topic", async || {
            stage.read(stage.topics.main()).len() == sent.len()
        })
        .await;
        let calls = stage.notes.calls.load(Ordering::Relaxed);
        lock.rollback().await.unwrap();
        until("the last one", async || stage.committed() == sent.len() as i64).await;
        stage.notes.calls.load(Ordering::Relaxed) - calls
    };

    // Until it is sure that nothing comes again.
    for key in ["a", "b", "c", "d"] {
        send_together(&[event(EFFECT, key, 1)]).await;
    }
    assert_eq!(streamed().await, 0);
    let new = events(100, 100);
    assert_eq!(send_together(&new).await, 2);
    assert_eq!(streamed().await, 1);

    let mut with_a_known_one: Vec<Envelope> = (0..100).map(|n| event(EFFECT, &format!("other-{n}"), 1)).collect();
    with_a_known_one.insert(33, new[77].clone());
    assert_eq!(send_together(&with_a_known_one).await, 2, "not halved");
    assert_eq!(streamed().await, 1, "that one was rolled back");
    engine.stop().await;

    let known = 4 * 2 + 1 + 100 + 1 + 33;
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT event_id, aggregate_type, aggregate_id, sequence, topic, partition, record_offset FROM t.inbox
          ORDER BY record_offset",
    )
    .fetch_all(&stage.pool)
    .await
    .unwrap();
    let expected = (0..)
        .zip(&sent)
        .filter(|(offset, _)| *offset != known)
        .map(|(offset, event)| {
            let Envelope {
                id,
                aggregate_type,
                aggregate_id,
                sequence,
                ..
            } = event.clone();
            (
                id,
                aggregate_type,
                aggregate_id,
                sequence,
                stage.topics.main().to_owned(),
                0,
                offset,
            )
        });
    assert_eq!(rows, expected.collect::<Vec<Row>>());
    stage.assert_once_and_in_order(sent.len() as i64 - 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_that_come_and_go_repeat_nothing_and_leave_nothing_out() {
    let stage = Stage::new(&[]).await;
    let events = events(COUNT, 60);
    let first = stage.engine().await;
    let mut others = Vec::new();
    for (round, chunk) in events.chunks(COUNT / 12).enumerate() {
        stage.send_events(chunk).await;
        match round {
            1 | 3 | 8 => others.push(stage.engine().await),
            6 | 9 | 10 => others.remove(0).stop().await,
            _ => {}
        }
    }
    until("the last effect", async || stage.effects().await >= COUNT as i64).await;
    until("the whole assignment", async || {
        first.status.snapshot().partitions.len() == PARTITIONS as usize
    })
    .await;
    first.stop().await;
    stage.assert_once_and_in_order(COUNT as i64).await;
    assert_eq!(stage.committed(), COUNT as i64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_finishes_the_batch_in_hand_and_commits_its_offsets() {
    let stage = Stage::new(&[]).await;
    let engine = stage.engine().await;
    let mut sent = 0;
    let mut stopping = None;
    let mut engine = Some(engine);
    // Records keep coming, before, during and after the stop.
    loop {
        stage.send_event(&event(SLOW, &format!("key-{sent}"), 1)).await;
        sent += 1;
        if stage.effects().await > 20
            && let Some(engine) = engine.take()
        {
            stopping = Some(tokio::spawn(engine.stop()));
        }
        if stopping.as_ref().is_some_and(|stopping| stopping.is_finished()) {
            break;
        }
    }
    let applied = stage.effects().await;
    assert!(applied < sent, "the last record came after the stop");
    assert_eq!(
        stage.committed(),
        applied,
        "what took effect is committed, and nothing else"
    );

    let engine = stage.engine().await;
    until("the rest", async || stage.effects().await == sent).await;
    engine.stop().await;
    stage.assert_once_and_in_order(sent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_type_is_skipped_or_kept_as_the_policy_says() {
    let mut stage = Stage::new(&[]).await;
    let engine = stage.engine().await;
    stage.send_event(&event(FOREIGN, "a", 1)).await;
    stage.send_event(&event(EFFECT, "a", 2)).await;
    until("the known event", async || stage.effects().await == 1).await;
    engine.stop().await;
    assert_eq!(stage.committed(), 2);
    assert_eq!(stage.dead_letters().len(), 0);

    stage.unknown_types = UnknownTypes::DeadLetter;
    let engine = stage.engine().await;
    stage.send_event(&event(FOREIGN, "a", 3)).await;
    until("the dead letter", async || stage.dead_letters().len() == 1).await;
    engine.stop().await;
    assert_eq!(stage.dead_letters()[0].header("error-type"), "unknown_type");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_topic_is_refused_by_name() {
    let stage = Stage::new(&[std::time::Duration::from_secs(1)]).await;
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", std::env::var("KAFKA_BROKERS").unwrap())
        .create()
        .unwrap();
    let dead_letters = stage.topics.dead_letter();
    let deleted = admin
        .delete_topics(&[&dead_letters], &AdminOptions::new())
        .await
        .unwrap();
    deleted[0].as_ref().unwrap();
    // The broker answers before its own view of the topics has followed.
    let gone = || {
        let metadata = admin.inner().fetch_metadata(Some(&dead_letters), DEADLINE).unwrap();
        metadata.topics().iter().all(|topic| topic.error().is_some())
    };
    until("the end of the topic", async || gone()).await;
    let error = stage.engine().await.ended().await;
    assert!(
        matches!(&error, EngineError::TopicMissing(name) if *name == dead_letters),
        "{error}"
    );
}
