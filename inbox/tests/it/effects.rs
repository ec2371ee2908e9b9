use inbox::{EngineError, UnknownTypes};
use rdkafka::{ClientConfig, admin::AdminClient, admin::AdminOptions, client::DefaultClientContext};

use crate::stage::{DEADLINE, EFFECT, FOREIGN, PARTITIONS, SLOW, Stage, event, events, until};

const COUNT: usize = 6_000;

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

/// Large batches of new events are streamed into the inbox, which cannot pass over a row: here they meet events that come again.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_come_again_among_many_new_ones_take_effect_once_and_are_no_failures() {
    let stage = Stage::new(&[]).await;
    let events = events(3_000, 3);
    let engine = stage.engine().await;
    for (round, chunk) in events.chunks(500).enumerate() {
        let again = events[..round * 500].iter().rev().step_by(7);
        stage.send_events(chunk.iter().chain(again)).await;
        let sent = (round as i64 + 1) * 500;
        until("the effects of this round", async || stage.effects().await >= sent).await;
    }
    engine.stop().await;
    stage.assert_once_and_in_order(3_000).await;
    assert!(stage.dead_letters().is_empty());
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
