use inbox::operator::{Decision, Edit, EditError, LetterFilter};
use serde_json::{Value, value::RawValue};
use shared_events::Envelope;

use crate::stage::{ANN, EFFECT, NEVER, STRICT, Stage, TRACEPARENT, event, until};

fn as_effect() -> Edit {
    Edit::Fields {
        event_type: Some(EFFECT.to_owned()),
        version: Some(2),
        payload: Some(RawValue::from_string(r#"{ "note": 1.10 }"#.to_owned()).unwrap()),
    }
}

/// Every column of every letter and held key, to be compared.
async fn everything(stage: &Stage) -> Vec<String> {
    sqlx::query_scalar(
        "SELECT to_jsonb(l)::text FROM t.dead_letters l UNION ALL SELECT to_jsonb(k)::text FROM t.held_keys k
         UNION ALL SELECT to_jsonb(a)::text FROM t.operator_actions a UNION ALL SELECT to_jsonb(i)::text FROM t.inbox i ORDER BY 1",
    )
    .fetch_all(&stage.pool)
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn g5_an_edited_letter_takes_the_place_of_the_first_one_which_never_takes_effect() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let engine = stage.engine().await;
    let bad = event(NEVER, "a", 2);
    stage.send_events(&[event(EFFECT, "a", 1)]).await;
    let value = bad.encode().unwrap();
    stage
        .send(Some(b"a"), Some(value.as_bytes()), None, &[TRACEPARENT])
        .await;
    let behind: Vec<Envelope> = (3..=20).map(|sequence| event(EFFECT, "a", sequence)).collect();
    stage.send_events(&behind).await;
    until("the key to be held", async || {
        stage.held("a").await == Some(("dead".to_owned(), 18))
    })
    .await;

    let before = everything(&stage).await;
    let shown = operator.preview_edit(bad.id, as_effect()).await.unwrap();
    assert_eq!(everything(&stage).await, before, "a dry run writes nothing");
    assert_eq!(shown.before.as_deref(), Some(value.as_bytes()));

    let edited = operator.edit(bad.id, as_effect(), ANN).await.unwrap();
    assert!(
        edited.value.contains(r#""payload":{ "note": 1.10 }"#),
        "{}",
        edited.value
    );
    let fields = |text: &str| serde_json::from_str::<serde_json::Map<String, Value>>(text).unwrap();
    let (old, new) = (fields(&value), fields(&edited.value));
    let changed: Vec<&String> = old.keys().filter(|name| old[*name] != new[*name]).collect();
    assert_eq!(changed, ["id", "payload", "type", "version"]);
    assert_eq!(edited.id.get_version_num(), 7);

    let first = operator.letter(bad.id).await.unwrap().unwrap();
    assert_eq!(
        (&*first.row.state, first.row.replaced_by, first.row.edited_from),
        ("resolved", Some(edited.id), None)
    );
    let second = operator.letter(edited.id).await.unwrap().unwrap();
    assert_eq!(
        (&*second.row.state, second.row.edited_from, second.row.holds),
        ("open", Some(bad.id), first.row.holds)
    );
    assert_eq!((&second.headers, second.parked), (&first.headers, 18));
    assert_eq!(second.headers.len(), 1);
    assert_eq!(
        stage.held("a").await,
        Some(("dead".to_owned(), 18)),
        "the key waits for the new one"
    );
    let again = operator.edit(bad.id, as_effect(), ANN).await.unwrap_err();
    assert!(
        matches!(&again, EditError::NotOpen(state) if state == "resolved"),
        "{again}"
    );

    // A copy of the first one is a duplicate, and lets nobody go.
    stage.send_event(&bad).await;
    stage.send_events(&[event(EFFECT, "b", 1)]).await;
    until("what came with the copy", async || stage.sequences("b").await == [1]).await;
    assert_eq!(stage.sequences("a").await, [1]);
    operator.decide(&[edited.id], Decision::Redrive, ANN).await.unwrap();
    until("the key to be free", async || stage.held("a").await.is_none()).await;
    engine.stop().await;
    assert_eq!(stage.sequences("a").await, (1..=20).collect::<Vec<i64>>());
    assert_eq!(
        stage.number("SELECT count(*) FROM t.inbox").await,
        22,
        "one for each event, the first one too"
    );
    let actions = operator.actions(None, 10).await.unwrap();
    assert_eq!((&*actions[1].action, &*actions[1].reason), ("edit", ANN.reason));
    assert!(actions[1].target.contains(&bad.id.to_string()) && actions[1].target.contains(&edited.id.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_is_no_event_becomes_one_of_the_key_it_was_sent_with() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let engine = stage.engine().await;
    stage.send(Some(b"a"), Some(b"{broken"), None, &[]).await;
    stage.send_events(&[event(STRICT, "a", 2), event(STRICT, "a", 3)]).await;
    until("the key to wait", async || {
        stage.held("a").await == Some(("waiting".to_owned(), 2))
    })
    .await;
    let unreadable = operator.letters(&LetterFilter::default(), None, 10).await.unwrap();
    let [unreadable] = unreadable.as_slice() else {
        panic!("{unreadable:?}")
    };
    let refused = operator.edit(unreadable.id, as_effect(), ANN).await.unwrap_err();
    assert!(matches!(refused, EditError::NoEvent(_)), "{refused}");
    let whole = |aggregate_id: &str, sequence| Edit::Event(Box::new(event(STRICT, aggregate_id, sequence)));
    let refused = operator.edit(unreadable.id, whole("b", 1), ANN).await.unwrap_err();
    assert!(matches!(refused, EditError::OtherKey { .. }), "{refused}");
    let refused = operator.edit(unreadable.id, whole("a", 0), ANN).await.unwrap_err();
    assert!(matches!(refused, EditError::Rejected(_)), "{refused}");
    assert_eq!(stage.number("SELECT count(*) FROM t.operator_actions").await, 0);

    let edited = operator.edit(unreadable.id, whole("a", 1), ANN).await.unwrap();
    let refused = operator.edit(edited.id, whole("a", 1), ANN).await.unwrap_err();
    assert!(matches!(refused, EditError::IsEvent), "{refused}");
    assert_eq!(
        operator.decide(&[edited.id], Decision::Redrive, ANN).await.unwrap(),
        [edited.id]
    );
    until("the key to be free", async || stage.held("a").await.is_none()).await;
    assert_eq!(stage.sequences("a").await, [1, 2, 3]);
    engine.stop().await;

    // The record itself comes again: it stays replaced, and is no open letter.
    stage.rewind();
    let engine = stage.engine().await;
    stage.send_events(&[event(EFFECT, "a", 4)]).await;
    until("all of it again", async || stage.sequences("a").await == [1, 2, 3, 4]).await;
    until("its record in the topic again", async || {
        stage.dead_letters().len() == 2
    })
    .await;
    engine.stop().await;
    let letter = operator.letter(unreadable.id).await.unwrap().unwrap();
    assert_eq!(
        (&*letter.row.state, letter.row.replaced_by),
        ("resolved", Some(edited.id))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_is_edited_and_redriven_at_once_is_one_of_both() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let engine = stage.engine().await;
    let bad: Vec<Envelope> = (0..40).map(|key| event(NEVER, &format!("key-{key}"), 1)).collect();
    stage.send_events(&bad).await;
    let all = LetterFilter::default();
    until("all letters", async || operator.count(&all).await.unwrap() == 40).await;
    let mut edited = 0;
    for letter in &bad {
        let one = [letter.id];
        let (edit, decide) = tokio::join!(
            operator.edit(letter.id, as_effect(), ANN),
            operator.decide(&one, Decision::Skip, ANN)
        );
        let decided = decide.unwrap().len();
        match edit {
            Ok(_) => assert_eq!(decided, 0),
            // The skip may have been carried out already.
            Err(EditError::NotOpen(_) | EditError::TookEffect) => assert_eq!(decided, 1),
            Err(error) => panic!("{error}"),
        }
        edited += 1 - decided as i64;
    }
    println!("{edited} of 40 were edited");
    until("what was skipped", async || {
        stage
            .number("SELECT count(*) FROM t.dead_letters WHERE state = 'resolved'")
            .await
            == 40
    })
    .await;
    engine.stop().await;
    let open = "SELECT count(*) FROM t.dead_letters WHERE state = 'open' AND edited_from IS NOT NULL";
    assert_eq!(stage.number(open).await, edited);
    assert_eq!(stage.number("SELECT count(*) FROM t.inbox").await, 40);
    assert_eq!(stage.effects().await, 0);
}
