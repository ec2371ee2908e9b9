use std::{
    collections::BTreeMap,
    sync::{Arc, atomic},
    time::Duration,
};

use inbox::{Ordering, Parking, operator::Decision};
use shared_events::{Envelope, headers};
use tokio::time::Instant;

use crate::stage::{
    ANN, AT_DOOR, EFFECT, FLAKY, GATED, NEVER, NOT_YET, PANIC, RELEASES, SECOND_TIME, SQL_ERROR, STRICT, Stage, event,
    events, until, until_or,
};

const SHORT: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(200)];

/// Time enough for a test to see what waits.
const PATIENT: [Duration; 6] = [Duration::from_millis(500); 6];

#[tokio::test(flavor = "multi_thread")]
async fn g3_what_comes_after_a_failing_event_waits_and_follows_it_in_order() {
    let stage = Stage::new(&PATIENT).await;
    stage.notes.gate_closed.store(true, atomic::Ordering::Relaxed);
    let engine = stage.engine().await;
    let mut all = vec![event(EFFECT, "a", 1), event(GATED, "a", 2)];
    all.extend((3..=50).map(|sequence| event(EFFECT, "a", sequence)));
    all.extend(events(500, 25));
    stage.send_events(&all).await;
    until("the other keys", async || stage.effects().await == 501).await;
    until("its own key to wait", async || {
        stage.held("a").await == Some(("retrying".to_owned(), 48))
    })
    .await;
    // More of it arrive while it waits.
    stage
        .send_events(&[event(EFFECT, "a", 51), event(EFFECT, "a", 52)])
        .await;
    until("those to wait too", async || {
        stage.held("a").await.is_some_and(|(_, parked)| parked == 50)
    })
    .await;
    assert_eq!(stage.sequences("a").await, [1]);
    stage.notes.gate_closed.store(false, atomic::Ordering::Relaxed);
    until("the held key", async || stage.sequences("a").await.len() == 52).await;
    until("nothing held", async || stage.held("a").await.is_none()).await;
    engine.stop().await;
    stage.assert_once_and_in_order(552).await;
    assert_eq!(stage.number("SELECT count(*) FROM t.parked_events").await, 0);
    assert_eq!(
        stage.read(&stage.topics.retry(1)).len(),
        1,
        "only the one that failed went to the tier"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_fails_only_together_with_those_behind_it_does_not_strand_them() {
    let stage = Stage::new(&PATIENT).await;
    // It fails when the whole batch is tried, and not when it is tried again without those behind it.
    let mut all = vec![event(SECOND_TIME, "a", 1)];
    all.extend((2..=50).map(|sequence| event(EFFECT, "a", sequence)));
    stage.send_events(&all).await;
    let engine = stage.engine().await;
    until("all of them", async || stage.effects().await == 50).await;
    until("nothing held", async || stage.held("a").await.is_none()).await;
    engine.stop().await;
    stage.assert_once_and_in_order(50).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_holds_its_key_or_lets_it_go_by_its_type() {
    let stage = Stage::new(&[]).await;
    let engine = stage.engine().await;
    for (key, bad) in [
        ("held", NEVER),
        ("panicked", PANIC),
        ("refused", SQL_ERROR),
        ("released", RELEASES),
    ] {
        let mut all = vec![event(EFFECT, key, 1), event(bad, key, 2)];
        all.extend((3..=10).map(|sequence| event(EFFECT, key, sequence)));
        stage.send_events(&all).await;
    }
    stage.send_events(&events(100, 10)).await;
    until("the released key", async || {
        stage.sequences("released").await.len() == 9
    })
    .await;
    until("the others", async || stage.effects().await == 112).await;
    until("four dead letters", async || stage.dead_letters().len() == 4).await;
    engine.stop().await;
    for key in ["held", "panicked", "refused"] {
        assert_eq!(stage.sequences(key).await, [1], "{key}");
        assert_eq!(stage.held(key).await, Some(("dead".to_owned(), 8)), "{key}");
    }
    assert_eq!(stage.sequences("released").await, [1, 3, 4, 5, 6, 7, 8, 9, 10]);
    assert_eq!(stage.held("released").await, None);
}

/// G5: between the commit that passes over it and its record in the topic, the process ends.
#[tokio::test(flavor = "multi_thread")]
async fn g5_a_released_letter_reaches_its_topic_though_the_process_that_passed_over_it_ends_first() {
    let stage = Stage::new(&[]).await;
    stage.limit_bytes(&stage.topics.dead_letter(), 10).await;
    let engine = stage.engine().await;
    let released = event(RELEASES, "released", 2);
    stage
        .send_events(&[
            event(EFFECT, "released", 1),
            released.clone(),
            event(EFFECT, "released", 3),
        ])
        .await;
    until("its key to go on", async || stage.sequences("released").await == [1, 3]).await;
    engine.stop().await;
    assert_eq!(stage.dead_letters().len(), 0, "the broker takes none");

    stage.limit_bytes(&stage.topics.dead_letter(), 1_000_000).await;
    let engine = stage.engine().await;
    until("the dead letter", async || stage.dead_letters().len() == 1).await;
    engine.stop().await;
    assert_eq!(stage.notes.passed_over(released.id), 1);
    assert_eq!(stage.sequences("released").await, [1, 3]);
    let open = "SELECT count(*) FROM t.dead_letters WHERE state = 'open' AND NOT holds AND deaths = 1 AND error_type = 'releases'";
    assert_eq!(stage.number(open).await, 1);
    assert_eq!(
        stage.number("SELECT count(*) FROM t.inbox").await,
        2,
        "it took no effect"
    );
}

/// G5: the same, for one that dies of its last try out of a retry topic.
#[tokio::test(flavor = "multi_thread")]
async fn g5_a_released_letter_out_of_a_retry_topic_is_not_resolved_before_its_record_is_sent() {
    let mut stage = Stage::new(&SHORT[..1]).await;
    stage.ordering = Ordering::PerKey(Parking {
        most_per_key: 1_000,
        most_in_all: 1_000,
        released_by: [NOT_YET.to_owned()].into(),
    });
    stage.limit_bytes(&stage.topics.dead_letter(), 10).await;
    let engine = stage.engine().await;
    stage
        .send_events(&[event(NOT_YET, "released", 1), event(EFFECT, "released", 2)])
        .await;
    until("its key to go on", async || stage.sequences("released").await == [2]).await;
    engine.stop().await;
    stage.limit_bytes(&stage.topics.dead_letter(), 1_000_000).await;
    let engine = stage.engine().await;
    until("the dead letter", async || stage.dead_letters().len() == 1).await;
    engine.stop().await;
    let open = "SELECT count(*) FROM t.dead_letters WHERE state = 'open' AND deaths = 1 AND error_type = 'not_yet'";
    assert_eq!(stage.number(open).await, 1);
}

/// A released letter that comes again says nothing about its key, which somebody else may hold by now.
#[tokio::test(flavor = "multi_thread")]
async fn g3_a_released_letter_that_comes_again_does_not_let_go_what_another_event_holds() {
    let stage = Stage::new(&[Duration::from_secs(3600)]).await;
    stage.notes.gate_closed.store(true, atomic::Ordering::Relaxed);
    stage.limit_bytes(&stage.topics.dead_letter(), 10).await;
    let engine = stage.engine().await;
    let first = [event(EFFECT, "a", 1), event(RELEASES, "a", 2), event(EFFECT, "a", 3)];
    stage.send_events_to(Some(0), &first).await;
    until("its key to go on", async || stage.sequences("a").await == [1, 3]).await;
    until("nothing held", async || stage.held("a").await.is_none()).await;
    // Elsewhere, because that partition waits for its letter.
    let second = [event(GATED, "a", 4), event(EFFECT, "a", 5)];
    stage.send_events_to(Some(1), &second).await;
    let holds = async || stage.held("a").await == Some(("retrying".to_owned(), 1));
    until("another event to hold the key", holds).await;
    engine.stop().await;

    stage.limit_bytes(&stage.topics.dead_letter(), 1_000_000).await;
    let engine = stage.engine().await;
    until("the dead letter", async || stage.dead_letters().len() == 1).await;
    assert!(holds().await, "{:?}", stage.held("a").await);
    engine.stop().await;
    assert_eq!(stage.sequences("a").await, [1, 3]);
}

/// Its key has gone on: it can take effect no more, and nobody may be told that it has.
#[tokio::test(flavor = "multi_thread")]
async fn g5_a_released_letter_that_is_redriven_dies_again_and_is_not_said_to_have_taken_effect() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let engine = stage.engine().await;
    let released = event(RELEASES, "a", 2);
    stage
        .send_events(&[event(EFFECT, "a", 1), released.clone(), event(EFFECT, "a", 3)])
        .await;
    until("its key to go on", async || stage.sequences("a").await == [1, 3]).await;
    until("its record", async || stage.dead_letters().len() == 1).await;
    operator.decide(&[released.id], Decision::Redrive, ANN).await.unwrap();
    until("its second record", async || stage.dead_letters().len() == 2).await;
    until("nothing held", async || stage.held("a").await.is_none()).await;
    let letter = operator.letter(released.id).await.unwrap().unwrap().row;
    assert_eq!(
        (&*letter.state, &*letter.error_type, letter.deaths),
        ("open", "passed_over", 2)
    );
    assert_eq!(
        operator.decide(&[released.id], Decision::Skip, ANN).await.unwrap(),
        [released.id]
    );
    until("its end", async || {
        operator.letter(released.id).await.unwrap().unwrap().row.state == "resolved"
    })
    .await;
    engine.stop().await;
    assert_eq!(stage.sequences("a").await, [1, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_event_waits_for_the_one_before_it_without_an_attempt() {
    let stage = Stage::new(&SHORT).await;
    let engine = stage.engine().await;
    let all: Vec<Envelope> = (1..=6).map(|sequence| event(STRICT, "gap", sequence)).collect();
    // 2 is missing; 5 comes before 4.
    for place in [0, 2, 4, 3, 5] {
        stage.send_events(&all[place..=place]).await;
    }
    until("all but the first wait", async || {
        stage.held("gap").await == Some(("waiting".to_owned(), 4))
    })
    .await;
    assert_eq!(stage.sequences("gap").await, [1]);
    stage.send_events(&all[1..=1]).await;
    until("all of them", async || stage.sequences("gap").await.len() == 6).await;
    until("nothing held", async || stage.held("gap").await.is_none()).await;
    engine.stop().await;
    stage.assert_once_and_in_order(6).await;
    assert_eq!(stage.read(&stage.topics.retry(1)).len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_order_per_key_nobody_waits() {
    let mut stage = Stage::new(&[Duration::from_secs(1)]).await;
    stage.ordering = Ordering::None;
    let engine = stage.engine().await;
    let mut all = vec![event(SECOND_TIME, "a", 1)];
    all.extend((2..=20).map(|sequence| event(EFFECT, "a", sequence)));
    stage.send_events(&all).await;
    until("all of them", async || stage.effects().await == 20).await;
    engine.stop().await;
    assert_eq!(stage.sequences("a").await.last(), Some(&1), "the late one came last");
    assert_eq!(stage.number("SELECT count(*) FROM t.held_keys").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_too_many_parked_stops_its_partition_and_says_so() {
    let mut stage = Stage::new(&PATIENT).await;
    stage.notes.gate_closed.store(true, atomic::Ordering::Relaxed);
    stage.ordering = Ordering::PerKey(Parking {
        most_per_key: 10,
        most_in_all: 1_000,
        released_by: [].into(),
    });
    let engine = stage.engine().await;
    stage.send_events(&[event(GATED, "full", 1)]).await;
    // The batch that holds a key may pass the bound; those after it may not.
    until("the key to be held", async || stage.held("full").await.is_some()).await;
    stage
        .send_events(
            &(2..=30)
                .map(|sequence| event(EFFECT, "full", sequence))
                .collect::<Vec<_>>(),
        )
        .await;
    until("the stop", async || {
        let paused = engine.status.snapshot().paused;
        paused.is_some_and(|reason| reason.contains("10 events parked behind it"))
    })
    .await;
    stage.notes.gate_closed.store(false, atomic::Ordering::Relaxed);
    until("all of them after the retry", async || {
        stage.sequences("full").await.len() == 30
    })
    .await;
    engine.stop().await;
    stage.assert_once_and_in_order(30).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_bound_in_all_what_settles_a_key_passes_what_has_to_wait() {
    let mut stage = Stage::new(&[]).await;
    stage.ordering = Ordering::PerKey(Parking {
        most_per_key: 1_000,
        most_in_all: 5,
        released_by: [].into(),
    });
    let send = async |envelope: &Envelope, partition: i32| {
        let (key, value) = (envelope.aggregate_id.as_bytes(), envelope.encode().unwrap());
        stage
            .send(Some(key), Some(value.as_bytes()), Some(partition), &[])
            .await;
    };
    // A batch of its own: all of it waits behind one that is at the door. The second of two events of another partition was
    // fetched after everything that was there when the first one took effect.
    let door = Arc::clone(&stage.notes.door);
    let in_one_batch = async |name: &str, envelopes: &[Envelope]| {
        let closed = door.write().await;
        let first = event(AT_DOOR, name, 1);
        send(&first, 1).await;
        until("the one at the door", async || {
            !stage.notes.attempts(first.id).is_empty()
        })
        .await;
        for envelope in envelopes {
            send(envelope, 1).await;
        }
        for sequence in 1..=2 {
            let key = format!("beside-{name}");
            send(&event(EFFECT, &key, sequence), 2).await;
            until("the one beside it", async || {
                stage.sequences(&key).await.len() == sequence as usize
            })
            .await;
        }
        drop(closed);
    };
    // They come together, before they are counted.
    let engine = stage.engine().await;
    let early: Vec<_> = (0..8).map(|n| event(STRICT, &format!("key-{n}"), 2)).collect();
    in_one_batch("first", &early).await;
    until("more than the bound", async || {
        stage.number("SELECT count(*) FROM t.parked_events").await == 8
    })
    .await;
    engine.stop().await;

    // The first of a new key has to wait, and would hold up what settles another one.
    let engine = stage.engine().await;
    let late = event(STRICT, "late", 2);
    let settles = event(STRICT, "key-0", 1);
    in_one_batch("second", &[late.clone(), event(STRICT, "late", 3), settles]).await;
    until("the settled key", async || stage.sequences("key-0").await == [1, 2]).await;
    until("the stop", async || {
        let paused = engine.status.snapshot().paused;
        paused.is_some_and(|reason| reason.contains("5 events are parked"))
    })
    .await;
    assert_eq!(stage.held("late").await, None);
    for n in 1..8 {
        send(&event(STRICT, &format!("key-{n}"), 1), 2).await;
    }
    send(&event(STRICT, "late", 1), 3).await;
    until("all of them", async || stage.effects().await == 8 * 2 + 3 + 6).await;
    engine.stop().await;
    stage.assert_once_and_in_order(8 * 2 + 3 + 6).await;
    assert_eq!(stage.number("SELECT count(*) FROM t.held_keys").await, 0);
}

/// Each event fails at random: for a while, for ever and holding its key, for ever and releasing it, by an error of the whole
/// batch, by a panic; and the engines come and go.
#[tokio::test(flavor = "multi_thread")]
async fn g3_holds_for_random_failures_and_engines_that_come_and_go() {
    let full = std::env::var_os("E2E_FULL").is_some();
    let (seeds, keys, count) = if full { (20, 200, 50_000) } else { (2, 40, 3_000) };
    for _ in 0..seeds {
        let seed = uuid::Uuid::now_v7().as_u128() as u64 | 1;
        println!("seed {seed}");
        random_failures(seed, keys, count).await;
    }
}

async fn random_failures(seed: u64, keys: u64, count: usize) {
    let started = Instant::now();
    let mut random = Random(seed);
    let stage = Stage::new(&SHORT).await;
    let mut of_key: BTreeMap<u64, Vec<Envelope>> = BTreeMap::new();
    let mut all = Vec::with_capacity(count);
    // So many that about half of the keys end held.
    let one_in = 3 * count as u64 / keys;
    for _ in 0..count {
        let key = random.below(keys);
        let earlier = of_key.entry(key).or_default();
        let event_type = match random.below(one_in * 2) {
            0 => NEVER.to_owned(),
            1 => PANIC.to_owned(),
            2 | 3 => RELEASES.to_owned(),
            4 => SQL_ERROR.to_owned(),
            5..8 => format!("{FLAKY}{}", 1 + random.below(2)),
            _ => EFFECT.to_owned(),
        };
        let envelope = event(&event_type, &format!("key-{key}"), earlier.len() as i64 + 1);
        earlier.push(envelope.clone());
        all.push(envelope);
    }
    let mut engines = vec![stage.engine().await, stage.engine().await];
    for part in all.chunks(count / 10) {
        stage.send_events(part).await;
        let leaving = engines.swap_remove(random.below(2) as usize);
        leaving.stop().await;
        engines.push(stage.engine().await);
    }

    // What must be: per key all in sequence up to the first one that holds it, without those that release it.
    let mut applied = BTreeMap::new();
    let (mut parked, mut dead) = (0, Vec::new());
    for events in of_key.values() {
        let key = events[0].aggregate_id.clone();
        let holder = events
            .iter()
            .position(|event| [NEVER, PANIC, SQL_ERROR].contains(&event.event_type.as_str()));
        let until = holder.unwrap_or(events.len());
        let (released, effective): (Vec<&Envelope>, Vec<&Envelope>) =
            events[..until].iter().partition(|event| event.event_type == RELEASES);
        dead.extend(released.iter().map(|event| event.id.to_string()));
        dead.extend(holder.map(|holder| events[holder].id.to_string()));
        parked += events.len().saturating_sub(until + 1) as i64;
        applied.insert(key, effective.iter().map(|event| event.sequence).collect::<Vec<i64>>());
    }
    let effects: i64 = applied.values().map(|sequences| sequences.len() as i64).sum();
    let expected = [effects, parked, 0];
    let accounts = async || {
        let in_motion = "SELECT count(*) FROM t.held_keys WHERE state <> 'dead'";
        let parked = "SELECT count(*) FROM t.parked_events";
        [
            stage.effects().await,
            stage.number(parked).await,
            stage.number(in_motion).await,
        ]
    };
    until_or(
        "every event to be accounted for",
        async || accounts().await == expected,
        async || {
            format!(
                "applied, parked, keys in motion: {:?} instead of {expected:?}, seed {seed}",
                accounts().await
            )
        },
    )
    .await;
    let mut letters: Vec<String> = Vec::new();
    for letter in stage.dead_letters() {
        let envelope = Envelope::decode(letter.value.as_deref().unwrap()).unwrap();
        assert!(letter.headers.contains_key(headers::ERROR_TYPE));
        letters.push(envelope.id.to_string());
    }
    for engine in engines {
        engine.stop().await;
    }
    stage.assert_once_and_in_order(effects).await;
    for (key, expected) in &applied {
        assert_eq!(&stage.sequences(key).await, expected, "{key}, seed {seed}");
    }
    letters.sort();
    let copies = letters.len();
    letters.dedup();
    dead.sort();
    assert_eq!(letters, dead, "seed {seed}");
    println!(
        "{count} events over {keys} keys: {effects} applied, {parked} parked, {} dead ({copies} records), in {:.1} s",
        dead.len(),
        started.elapsed().as_secs_f64()
    );
}

/// xorshift64: reproducible by its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}
