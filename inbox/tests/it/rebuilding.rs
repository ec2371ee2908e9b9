use std::time::Duration;

use inbox::{
    Rebuild, Table, UnknownTypes,
    operator::{Decision, LetterFilter, LetterRow, Operator},
    rebuild::Progress,
};
use rdkafka::ClientConfig;
use shared_events::{Envelope, headers};

use crate::stage::{ANN, EFFECT, FOREIGN, GATED, NEVER, STRICT, Stage, TRACEPARENT, event, until};

/// The letters of a table, with what must be the same in a table that was filled again.
async fn letters(operator: &Operator) -> Vec<(LetterRow, Option<Vec<u8>>, Vec<(String, Vec<u8>)>)> {
    let mut letters = Vec::new();
    for row in operator.letters(&LetterFilter::default(), None, 1_000).await.unwrap() {
        let mut letter = operator.letter(row.id).await.unwrap().unwrap();
        // By the clock of the database there, and by that of a producer here.
        letter.row.first_died_at = time::OffsetDateTime::UNIX_EPOCH;
        letter.row.last_died_at = time::OffsetDateTime::UNIX_EPOCH;
        // What a retry topic's record says of earlier tries is in the attempts.
        letters.push((letter.row, letter.value, headers::without_redirect(&letter.headers)));
    }
    letters.sort_by_key(|(row, _, _)| row.id);
    letters
}

async fn rebuild(stage: &Stage) -> Progress {
    let mut client_config = ClientConfig::new();
    client_config.set("bootstrap.servers", stage.brokers());
    let rebuild = Rebuild {
        table: Table::new("t", stage.topics.group()).unwrap(),
        pool: stage.pool.clone(),
        client_config,
        topics: stage.topics.group_topics().clone(),
        ordering: stage.ordering.clone(),
    };
    let mut told = Vec::new();
    let end = rebuild.run(|progress| told.push(progress)).await.unwrap();
    assert_eq!(told.last(), Some(&end));
    assert!(told.is_sorted_by_key(|progress| (progress.read, progress.added)));
    assert_eq!(end.read, end.of);
    end
}

#[tokio::test(flavor = "multi_thread")]
async fn g5_the_table_of_dead_letters_is_filled_again_from_their_topic() {
    let mut stage = Stage::new(&[Duration::from_millis(50)]).await;
    stage.unknown_types = UnknownTypes::DeadLetter;
    let operator = stage.operator();
    assert_eq!(rebuild(&stage).await, Progress::default(), "nothing has died yet");
    stage
        .notes
        .gate_closed
        .store(true, std::sync::atomic::Ordering::Relaxed);
    let engine = stage.engine().await;
    // More than one statement takes.
    let never: Vec<Envelope> = (0..520).map(|key| event(NEVER, &format!("never-{key}"), 1)).collect();
    let gated: Vec<Envelope> = (0..20).map(|key| event(GATED, &format!("gated-{key}"), 1)).collect();
    let behind: Vec<Envelope> = (0..20).map(|key| event(STRICT, &format!("gated-{key}"), 2)).collect();
    stage.send_events(never.iter().chain(&gated).chain(&behind)).await;
    stage.send_events(&[event(FOREIGN, "foreign", 1)]).await;
    stage.send(Some(b"k"), Some(b"no event"), None, &[TRACEPARENT]).await;
    stage.send(None, None, None, &[]).await;
    let all = LetterFilter::default();
    until("all letters", async || operator.count(&all).await.unwrap() == 543).await;
    // One that dies twice, and one that is settled.
    operator.decide(&[never[0].id], Decision::Redrive, ANN).await.unwrap();
    operator.decide(&[never[1].id], Decision::Skip, ANN).await.unwrap();
    until("a second death and a skip", async || {
        let [twice, settled] = [&never[0], &never[1]].map(|letter| operator.letter(letter.id));
        let (twice, settled) = (twice.await.unwrap().unwrap(), settled.await.unwrap().unwrap());
        (twice.row.deaths, &*twice.row.state, &*settled.row.state) == (2, "open", "resolved")
    })
    .await;
    until("their records", async || stage.dead_letters().len() == 544).await;
    engine.stop().await;

    let with_all = letters(&operator).await;
    assert_eq!(rebuild(&stage).await.added, 0, "the table lacks nothing");
    assert!(letters(&operator).await == with_all);
    sqlx::query("DELETE FROM t.dead_letters")
        .execute(&stage.pool)
        .await
        .unwrap();
    assert_eq!(rebuild(&stage).await.added, 542);
    let open: Vec<_> = with_all
        .into_iter()
        .filter(|(row, _, _)| row.id != never[1].id)
        .collect();
    let again = letters(&operator).await;
    for (before, after) in open.iter().zip(&again) {
        assert_eq!(before, after);
    }
    assert_eq!((again.len(), rebuild(&stage).await.added), (542, 0));
    assert!(letters(&operator).await == again);

    // They are as good as the first ones.
    stage
        .notes
        .gate_closed
        .store(false, std::sync::atomic::Ordering::Relaxed);
    let engine = stage.engine().await;
    let ids: Vec<_> = gated.iter().map(|letter| letter.id).collect();
    assert_eq!(operator.decide(&ids, Decision::Redrive, ANN).await.unwrap().len(), 20);
    until("their effects, and what waited behind them", async || {
        stage.effects().await == 40
    })
    .await;
    engine.stop().await;
    assert_eq!(stage.sequences("gated-7").await, [1, 2]);
    assert_eq!(rebuild(&stage).await.added, 0);
    assert_eq!(
        stage
            .number("SELECT count(*) FROM t.dead_letters WHERE state = 'resolved'")
            .await,
        20
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_is_on_its_way_comes_back_as_such_and_arrives() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    stage
        .notes
        .gate_closed
        .store(true, std::sync::atomic::Ordering::Relaxed);
    let engine = stage.engine().await;
    let bad = event(GATED, "a", 1);
    stage.send_events(&[bad.clone(), event(EFFECT, "a", 2)]).await;
    until("the key to be held", async || {
        stage.held("a").await == Some(("dead".to_owned(), 1))
    })
    .await;
    until("its record", async || stage.dead_letters().len() == 1).await;
    engine.stop().await;
    operator.decide(&[bad.id], Decision::Redrive, ANN).await.unwrap();
    sqlx::query("DELETE FROM t.dead_letters")
        .execute(&stage.pool)
        .await
        .unwrap();
    assert_eq!(rebuild(&stage).await.added, 1);
    assert_eq!(operator.letter(bad.id).await.unwrap().unwrap().row.state, "redriving");
    stage
        .notes
        .gate_closed
        .store(false, std::sync::atomic::Ordering::Relaxed);
    let engine = stage.engine().await;
    until("both effects", async || stage.sequences("a").await == [1, 2]).await;
    engine.stop().await;
    assert_eq!(operator.letter(bad.id).await.unwrap().unwrap().row.state, "resolved");
}
