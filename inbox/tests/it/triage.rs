use std::{sync::atomic::Ordering, time::Duration};

use inbox::{
    Operator, UnknownTypes,
    operator::{Decision, Job, LetterFilter, Plan},
};
use shared_events::Envelope;
use uuid::Uuid;

use crate::stage::{ANN, EFFECT, FLAKY, FOREIGN, GATED, NEVER, Running, Stage, event, events, until};

async fn state(operator: &Operator, id: Uuid) -> (String, i32) {
    let letter = operator.letter(id).await.unwrap().unwrap();
    (letter.row.state, letter.row.deaths)
}

#[tokio::test(flavor = "multi_thread")]
async fn g5_a_redriven_letter_takes_effect_and_those_behind_it_follow_in_order() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    stage.notes.gate_closed.store(true, Ordering::Relaxed);
    let engine = stage.engine().await;
    let bad = event(GATED, "a", 2);
    let mut all = vec![event(EFFECT, "a", 1), bad.clone()];
    all.extend((3..=40).map(|sequence| event(EFFECT, "a", sequence)));
    all.extend(events(100, 10));
    stage.send_events(&all).await;
    until("the key to be held", async || {
        stage.held("a").await == Some(("dead".to_owned(), 38))
    })
    .await;

    let letter = operator.letter(bad.id).await.unwrap().unwrap();
    assert_eq!(
        (letter.row.state.as_str(), letter.row.holds, letter.parked),
        ("open", true, 38)
    );
    assert_eq!(letter.value.as_deref(), Some(bad.encode().unwrap().as_bytes()));
    assert_eq!(letter.attempts.len(), 1);
    assert_eq!(letter.attempts[0].error_type, "not_yet");
    let groups = operator.groups(&LetterFilter::default()).await.unwrap();
    assert_eq!((groups.len(), groups[0].letters), (1, 1));

    // Not repaired yet: it dies again and nothing has moved.
    assert_eq!(
        operator.decide(&[bad.id], Decision::Redrive, ANN).await.unwrap(),
        [bad.id]
    );
    until("its second death", async || {
        state(&operator, bad.id).await == ("open".to_owned(), 2)
    })
    .await;
    until("the key to be held again", async || {
        stage.held("a").await == Some(("dead".to_owned(), 38))
    })
    .await;
    assert_eq!(stage.sequences("a").await, [1]);

    stage.notes.gate_closed.store(false, Ordering::Relaxed);
    // Decided while nobody runs; events keep coming.
    engine.stop().await;
    let selected = operator.select(&LetterFilter::default(), 10).await.unwrap();
    assert_eq!(
        operator.decide(&selected, Decision::Redrive, ANN).await.unwrap(),
        [bad.id]
    );
    assert!(
        operator
            .decide(&[bad.id], Decision::Redrive, ANN)
            .await
            .unwrap()
            .is_empty(),
        "it is on its way"
    );
    stage.send_events(&[event(EFFECT, "a", 41)]).await;
    let engine = stage.engine().await;
    until("all of the key", async || stage.sequences("a").await.len() == 41).await;
    until("nothing held", async || stage.held("a").await.is_none()).await;
    engine.stop().await;
    stage.assert_once_and_in_order(141).await;
    assert_eq!(state(&operator, bad.id).await, ("resolved".to_owned(), 2));
    let actions = operator.actions(None, 10).await.unwrap();
    assert_eq!(actions.len(), 2, "what changed nothing is no action");
    assert_eq!(
        (actions[0].actor.as_str(), actions[0].action.as_str()),
        ("ann", "redrive")
    );
    assert!(actions[0].target.contains(&bad.id.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_skipped_letter_lets_its_key_go_on_as_far_as_the_next_one() {
    let stage = Stage::new(&[Duration::from_millis(50)]).await;
    let operator = stage.operator();
    let engine = stage.engine().await;
    let (first, second) = (event(NEVER, "a", 2), event(NEVER, "a", 6));
    let mut all = vec![event(EFFECT, "a", 1), first.clone()];
    all.extend((3..=5).map(|sequence| event(EFFECT, "a", sequence)));
    all.push(second.clone());
    all.extend((7..=9).map(|sequence| event(EFFECT, "a", sequence)));
    stage.send_events(&all).await;
    until("the key to be held", async || {
        stage.held("a").await == Some(("dead".to_owned(), 7))
    })
    .await;
    assert_eq!(
        operator
            .decide(&[first.id, second.id], Decision::Skip, ANN)
            .await
            .unwrap(),
        [first.id]
    );
    until("the key to be held by the second", async || {
        stage.held("a").await == Some(("dead".to_owned(), 3))
    })
    .await;
    assert_eq!(stage.sequences("a").await, [1, 3, 4, 5]);
    assert_eq!(
        operator.decide(&[second.id], Decision::Skip, ANN).await.unwrap(),
        [second.id]
    );
    until("the rest", async || stage.held("a").await.is_none()).await;
    // A copy that comes late does not rise again.
    stage.send_events(std::slice::from_ref(&first)).await;
    stage.send_events(&[event(EFFECT, "a", 10)]).await;
    until("what comes after it", async || stage.sequences("a").await.len() == 8).await;
    engine.stop().await;
    assert_eq!(stage.sequences("a").await, [1, 3, 4, 5, 7, 8, 9, 10]);
    for letter in [first, second] {
        assert_eq!(state(&operator, letter.id).await, ("resolved".to_owned(), 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_are_found_by_what_they_have_in_common() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let engine = stage.engine().await;
    let never: Vec<_> = (0..30).map(|n| event(NEVER, &format!("n-{n}"), 1)).collect();
    let gated: Vec<_> = (0..10).map(|n| event(GATED, &format!("g-{n}"), 1)).collect();
    stage.notes.gate_closed.store(true, Ordering::Relaxed);
    stage.send_events(never.iter().chain(&gated)).await;
    for n in 0..5 {
        stage
            .send(Some(b"unreadable"), Some(b"x"), Some(n), &[("trace", b"1")])
            .await;
    }
    let everything = LetterFilter::default();
    until("all letters", async || operator.count(&everything).await.unwrap() == 45).await;
    let groups = operator.groups(&everything).await.unwrap();
    let counts: Vec<(&str, i64)> = groups
        .iter()
        .map(|group| (group.error_type.as_str(), group.letters))
        .collect();
    assert_eq!(counts, [("never", 30), ("not_yet", 10), ("malformed", 5)]);
    let of_type = LetterFilter {
        event_type: Some(GATED.to_owned()),
        ..LetterFilter::default()
    };
    assert_eq!(operator.count(&of_type).await.unwrap(), 10);
    let of_group = LetterFilter {
        fingerprint: Some(groups[2].fingerprint.clone()),
        ..LetterFilter::default()
    };
    let unreadable = operator.letters(&of_group, None, 100).await.unwrap();
    assert_eq!(unreadable.len(), 5);
    let letter = operator.letter(unreadable[0].id).await.unwrap().unwrap();
    assert_eq!(
        (letter.key.as_deref(), letter.value.as_deref()),
        (Some(&b"unreadable"[..]), Some(&b"x"[..]))
    );
    assert_eq!(letter.headers, [("trace".to_owned(), b"1".to_vec())]);
    assert!(
        operator.select(&of_group, 100).await.unwrap().is_empty(),
        "what is no event cannot be redriven"
    );
    // Page by page, the latest first, none twice and none left out.
    let mut seen = Vec::new();
    let mut before = None;
    loop {
        let page = operator.letters(&everything, before, 7).await.unwrap();
        let Some(last) = page.last() else { break };
        before = Some((last.last_died_at, last.id));
        seen.extend(page.iter().map(|letter| letter.id));
    }
    assert_eq!(seen.len(), 45);
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 45);
    engine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_of_an_unknown_type_holds_its_key_until_it_is_skipped_or_understood() {
    let mut stage = Stage::new(&[]).await;
    stage.unknown_types = UnknownTypes::DeadLetter;
    let operator = stage.operator();
    let engine = stage.engine().await;
    let foreign = ["skipped", "understood"].map(|key| event(FOREIGN, key, 2));
    for bad in &foreign {
        let key = &bad.aggregate_id;
        stage
            .send_events(&[event(EFFECT, key, 1), bad.clone(), event(EFFECT, key, 3)])
            .await;
        until("the key to be held", async || {
            stage.held(key).await == Some(("dead".to_owned(), 1))
        })
        .await;
        assert_eq!(operator.open(&[bad.id]).await.unwrap(), [bad.id]);
    }
    operator.decide(&[foreign[0].id], Decision::Skip, ANN).await.unwrap();
    until("the skipped one", async || stage.sequences("skipped").await == [1, 3]).await;
    stage.notes.upgraded.store(true, Ordering::Relaxed);
    operator.decide(&[foreign[1].id], Decision::Redrive, ANN).await.unwrap();
    until("the other", async || stage.sequences("understood").await == [1, 2, 3]).await;
    engine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_order_per_key_a_redriven_letter_leaves_nothing_behind() {
    let mut stage = Stage::new(&[Duration::from_millis(100), Duration::from_millis(100)]).await;
    stage.ordering = inbox::Ordering::None;
    let operator = stage.operator();
    stage.notes.gate_closed.store(true, Ordering::Relaxed);
    let engine = stage.engine().await;
    let bad: Vec<_> = (1..=3).map(|sequence| event(GATED, "a", sequence)).collect();
    stage.send_events(&bad).await;
    let open = LetterFilter::default();
    until("the dead letters", async || {
        operator.select(&open, 10).await.unwrap().len() == 3
    })
    .await;
    for letter in operator.select(&open, 10).await.unwrap() {
        operator.decide(&[letter], Decision::Redrive, ANN).await.unwrap();
    }
    until("their first failure", async || {
        let attempts = operator.letter(bad[0].id).await.unwrap().unwrap().attempts;
        attempts.len() > 3
    })
    .await;
    stage.notes.gate_closed.store(false, Ordering::Relaxed);
    until("all effects", async || {
        let again = operator.select(&open, 10).await.unwrap();
        operator.decide(&again, Decision::Redrive, ANN).await.unwrap();
        stage.effects().await == 3
    })
    .await;
    until("nothing held or parked", async || {
        stage.number("SELECT count(*) FROM t.held_keys").await
            + stage.number("SELECT count(*) FROM t.parked_events").await
            == 0
    })
    .await;
    engine.stop().await;
    assert_eq!(stage.number("SELECT count(*) FROM t.inbox").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_order_per_key_a_redrive_ends_when_its_letters_take_effect_out_of_a_tier() {
    let mut stage = Stage::new(&[Duration::from_millis(100)]).await;
    stage.ordering = inbox::Ordering::None;
    let operator = stage.operator();
    let engine = stage.engine().await;
    // Twice, and dead; once more on its way through again.
    let bad: Vec<_> = (1..=3).map(|n| event(&format!("{FLAKY}3"), "a", n)).collect();
    stage.send_events(&bad).await;
    let open = LetterFilter::default();
    until("the dead letters", async || {
        operator.select(&open, 10).await.unwrap().len() == 3
    })
    .await;
    let job = operator.begin_job(&open, "{}", PLAN, ANN).await.unwrap().unwrap();
    let done = ended(&operator, job).await;
    assert_eq!((&*done.state, done.sent, done.took_effect), ("succeeded", 3, 3));
    engine.stop().await;
    assert_eq!(stage.effects().await, 3);
    for letter in bad {
        assert_eq!(state(&operator, letter.id).await, ("resolved".to_owned(), 1));
    }
}

const PLAN: Plan = Plan {
    canary: 20,
    rate: 100,
    abort_percent: 10,
};

/// `letters` of as many keys and one effect before each, all of them dead.
async fn dead(stage: &Stage, letters: usize) -> (Vec<Envelope>, Running) {
    stage.notes.gate_closed.store(true, Ordering::Relaxed);
    let engine = stage.engine().await;
    let all: Vec<Envelope> = (0..letters)
        .flat_map(|key| {
            let key = format!("key-{key}");
            [event(EFFECT, &key, 1), event(GATED, &key, 2), event(EFFECT, &key, 3)]
        })
        .collect();
    stage.send_events(&all).await;
    until("every letter", async || {
        stage
            .number("SELECT count(*) FROM t.dead_letters WHERE state = 'open'")
            .await
            == letters as i64
            && stage.number("SELECT count(*) FROM t.parked_events").await == letters as i64
    })
    .await;
    (all, engine)
}

async fn begin(operator: &Operator) -> Option<Uuid> {
    let filter = LetterFilter {
        event_type: Some(GATED.to_owned()),
        ..LetterFilter::default()
    };
    operator.begin_job(&filter, "{}", PLAN, ANN).await.unwrap()
}

async fn ended(operator: &Operator, job: Uuid) -> Job {
    until("the redrive to end", async || {
        operator.job(job).await.unwrap().unwrap().ended_at.is_some()
    })
    .await;
    operator.job(job).await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_stops_at_its_canary_while_nothing_is_repaired_and_runs_to_its_end_afterwards() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let (all, engine) = dead(&stage, 150).await;
    let first = begin(&operator).await.unwrap();
    let failed = ended(&operator, first).await;
    assert_eq!((&*failed.state, failed.sent, failed.died_again), ("failed", 20, 20));
    assert!(failed.ended_because.unwrap().contains("20 of 20"));
    assert_eq!(stage.effects().await, 150, "the others have not moved");

    stage.notes.gate_closed.store(false, Ordering::Relaxed);
    let job = begin(&operator).await.unwrap();
    let done = ended(&operator, job).await;
    assert_eq!(
        (&*done.state, done.letters, done.sent, done.took_effect),
        ("succeeded", 150, 150, 150)
    );
    let failed = operator.job(first).await.unwrap().unwrap();
    assert_eq!(
        (failed.sent, failed.took_effect, failed.died_again),
        (20, 0, 20),
        "what the later one did is not its own"
    );
    until("what waited behind them", async || {
        stage.effects().await == all.len() as i64
    })
    .await;
    assert_eq!(begin(&operator).await, None, "nothing is left to redrive");
    engine.stop().await;
    stage.assert_once_and_in_order(all.len() as i64).await;
}

/// Each letter that it counts is its own, also one that somebody else writes while it begins.
#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_takes_letters_that_change_while_it_begins() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let (_, engine) = dead(&stage, 20).await;
    engine.stop().await;

    let mut other = stage.pool.begin().await.unwrap();
    sqlx::query("UPDATE t.dead_letters SET deaths = deaths + 1 WHERE aggregate_id IN ('key-3', 'key-7')")
        .execute(&mut *other)
        .await
        .unwrap();
    let beginning = tokio::spawn(async move { begin(&operator).await });
    until("the redrive to wait for the other", async || {
        stage
            .number(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
            )
            .await
            == 1
    })
    .await;
    other.commit().await.unwrap();
    beginning.await.unwrap().expect("a redrive");
    let counted = stage.number("SELECT letters FROM t.redrive_jobs").await;
    let taken = stage
        .number("SELECT count(*) FROM t.dead_letters JOIN t.redrive_jobs AS job ON job.id = dead_letters.job")
        .await;
    assert_eq!((counted, taken), (20, 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_that_is_cut_off_goes_on_in_the_next_instance_and_each_letter_takes_effect_once() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let (all, engine) = dead(&stage, 400).await;
    stage.notes.gate_closed.store(false, Ordering::Relaxed);
    let job = begin(&operator).await.unwrap();
    assert_eq!(begin(&operator).await, None, "no second one on the same keys");
    let filter = LetterFilter::default();
    assert_eq!(operator.eligible(&filter).await.unwrap().busy, 400);
    // One step behind the canary lets at most two seconds of the rate go, however slow the machine is.
    until("the first letters behind its canary", async || {
        operator.job(job).await.unwrap().unwrap().sent > i64::from(PLAN.canary)
    })
    .await;
    engine.stop().await;
    let cut = operator.job(job).await.unwrap().unwrap();
    assert!(cut.sent < 400 && cut.ended_at.is_none(), "{cut:?}");
    let engines = [stage.engine().await, stage.engine().await];
    let done = ended(&operator, job).await;
    assert_eq!((&*done.state, done.took_effect), ("succeeded", 400));
    until("what waited behind them", async || {
        stage.effects().await == all.len() as i64
    })
    .await;
    for engine in engines {
        engine.stop().await;
    }
    stage.assert_once_and_in_order(all.len() as i64).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_redrive_leaves_the_rest_as_it_was() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let (_, engine) = dead(&stage, 300).await;
    stage.notes.gate_closed.store(false, Ordering::Relaxed);
    let job = begin(&operator).await.unwrap();
    until("a part of it", async || {
        operator.job(job).await.unwrap().unwrap().took_effect >= 20
    })
    .await;
    assert!(operator.cancel_job(job, ANN).await.unwrap());
    let cancelled = ended(&operator, job).await;
    assert_eq!(cancelled.state, "cancelled");
    until("what was on its way", async || {
        operator.job(job).await.unwrap().unwrap().on_their_way == 0
    })
    .await;
    assert!(!operator.cancel_job(job, ANN).await.unwrap(), "it has ended");
    assert_eq!(
        stage
            .number("SELECT count(*) FROM t.dead_letters WHERE state = 'open'")
            .await,
        300 - cancelled.sent
    );
    // The rest is free for the next one.
    let next = ended(&operator, begin(&operator).await.unwrap()).await;
    assert_eq!((&*next.state, next.letters), ("succeeded", 300 - cancelled.sent));
    engine.stop().await;
}
