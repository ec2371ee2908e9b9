use std::time::Duration;

use shared_events::{Envelope, headers};
use uuid::Uuid;

use crate::stage::{EFFECT, NEVER, NOT_YET, PANIC, SECOND_TIME, SQL_ERROR, Stage, TRACEPARENT, event, events, until};

/// Key, value, and the error type they get.
type Poison<'a> = (&'a [u8], Option<&'a [u8]>, &'static str);

#[tokio::test(flavor = "multi_thread")]
async fn poison_reaches_the_dead_letters_with_its_bytes_and_headers_and_delays_nobody() {
    let stage = Stage::new(&[Duration::from_secs(3_600)]).await;
    let engine = stage.engine().await;
    let good = events(300, 20);
    let deep = "[".repeat(100_000);
    let negative = event(EFFECT, "k", 1)
        .encode()
        .unwrap()
        .replace("\"sequence\":1", "\"sequence\":-1");
    let nul = event(EFFECT, "k", 1).encode().unwrap().replace("\"k\"", "\"k\\u0000\"");
    let not_in_utc = good[0].encode().unwrap();
    let (start, end) = not_in_utc.split_once("\"timestamp\":\"").unwrap();
    let not_in_utc = format!(
        "{start}\"timestamp\":\"9999-12-31T23:59:59-01:00\"{}",
        end.split_once('"').unwrap().1
    );
    // An index could not hold it, and nothing could be noted about it.
    let long = event(EFFECT, "k", 1)
        .encode()
        .unwrap()
        .replace("\"thing\"", &format!("\"{}\"", "t".repeat(4_000)));
    let poison: [Poison<'_>; 11] = [
        (b"1", None, "malformed"),
        (b"2", Some(b""), "malformed"),
        (b"3", Some(b"x"), "malformed"),
        (b"4", Some(b"\xff\xfe\x00"), "malformed"),
        (b"5", Some(br#"{"id":"not a uuid"}"#), "malformed"),
        (b"6", Some(deep.as_bytes()), "malformed"),
        (b"7", Some(negative.as_bytes()), "invalid_envelope"),
        (b"8", Some(nul.as_bytes()), "invalid_envelope"),
        (b"\x00\xff", Some(b"null"), "malformed"),
        (b"9", Some(not_in_utc.as_bytes()), "malformed"),
        (b"10", Some(long.as_bytes()), "invalid_envelope"),
    ];
    for (place, (key, value, _)) in poison.iter().enumerate() {
        stage.send_events(&good[place * 25..][..25]).await;
        let partition = Some(place as i32 % 6);
        stage
            .send(
                Some(key),
                *value,
                partition,
                &[TRACEPARENT, ("mine", b"\xff\x00"), ("attempt", b"-7")],
            )
            .await;
    }
    stage.send(None, Some(b"no key"), Some(2), &[]).await;
    stage.send_events(&good[250..]).await;
    until("all good events", async || stage.effects().await == 300).await;
    until("all dead letters", async || {
        stage.dead_letters().len() == poison.len() + 1
    })
    .await;
    engine.stop().await;

    stage.assert_once_and_in_order(300).await;
    let letters = stage.dead_letters();
    for (place, (key, value, code)) in poison.iter().enumerate() {
        let letter = letters
            .iter()
            .find(|letter| letter.key.as_deref() == Some(*key))
            .unwrap();
        assert_eq!(letter.value.as_deref(), *value);
        assert_eq!(letter.partition, place as i32 % 6, "the partition number stays");
        assert_eq!(letter.headers["mine"], b"\xff\x00");
        assert_eq!(letter.headers[headers::TRACEPARENT], TRACEPARENT.1);
        assert_eq!(letter.header(headers::ERROR_TYPE), *code);
        assert_eq!(letter.header(headers::ERROR_CLASS), "permanent");
        assert_eq!(letter.header(headers::ATTEMPT), "1");
        assert_eq!(letter.header(headers::ORIGIN_TOPIC), stage.topics.main());
        assert_eq!(letter.header(headers::ORIGIN_PARTITION), (place % 6).to_string());
        assert!(letter.header(headers::ORIGIN_OFFSET).parse::<i64>().unwrap() >= 0);
        assert!(letter.header(headers::ORIGIN_TIMESTAMP).parse::<i64>().unwrap() > 0);
        assert_eq!(letter.header(headers::CONSUMER_VERSION), "test 0");
        assert!(!letter.headers.contains_key(headers::NOT_BEFORE));
    }
    let keyless = letters.iter().find(|letter| letter.key.is_none()).unwrap();
    assert_eq!((keyless.value.as_deref(), keyless.partition), (Some(&b"no key"[..]), 2));
    assert_eq!(stage.read(&stage.topics.retry(1)).len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_hold_their_delay_and_end_in_the_dead_letters() {
    let delays = [Duration::from_millis(400), Duration::from_millis(900)];
    let stage = Stage::new(&delays).await;
    let engine = stage.engine().await;
    let never: Vec<Envelope> = (0..20).map(|n| event(NOT_YET, &format!("bad-{n}"), 1)).collect();
    let later: Vec<Envelope> = (0..20).map(|n| event(SECOND_TIME, &format!("late-{n}"), 1)).collect();
    let good = events(100, 100);
    stage.send_events(never.iter().chain(&later).chain(&good)).await;
    until("the dead letters", async || stage.dead_letters().len() == 20).await;
    until("the late ones", async || stage.effects().await == 120).await;
    engine.stop().await;

    stage.assert_once_and_in_order(120).await;
    for event in &never {
        let attempts = stage.notes.attempts(event.id);
        assert_eq!(attempts.len(), 3, "one attempt per tier and the first");
        for (pair, delay) in attempts.windows(2).zip(delays) {
            let waited = pair[1] - pair[0];
            // The broker stamps whole milliseconds.
            assert!(
                waited >= delay - Duration::from_millis(2),
                "{waited:?} is less than {delay:?}"
            );
            assert!(
                waited < delay + Duration::from_secs(5),
                "{waited:?} is far more than {delay:?}"
            );
        }
        let letters = stage.dead_letters();
        let letter = letters
            .iter()
            .find(|letter| letter.key.as_deref() == Some(event.aggregate_id.as_bytes()));
        let letter = letter.unwrap();
        assert_eq!(letter.value.as_deref(), Some(event.encode().unwrap().as_bytes()));
        assert_eq!(letter.header(headers::ATTEMPT), "3");
        assert_eq!(letter.header(headers::ERROR_TYPE), "not_yet");
        assert_eq!(letter.header(headers::ERROR_CLASS), "event_transient");
        assert_eq!(
            letter.header(headers::ORIGIN_TOPIC),
            stage.topics.main(),
            "the first place, kept through the tiers"
        );
    }
    for tier in [1, 2] {
        let waiting = stage.read(&stage.topics.retry(tier));
        assert_eq!(waiting.len(), if tier == 1 { 40 } else { 20 });
        assert!(
            waiting
                .iter()
                .all(|record| record.header(headers::ATTEMPT) == tier.to_string())
        );
        assert!(
            waiting
                .iter()
                .all(|record| record.headers.contains_key(headers::NOT_BEFORE))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_fail_their_batch_are_found_and_the_rest_takes_effect() {
    let stage = Stage::new(&[]).await;
    let mut all = events(400, 40);
    for (place, script) in [(7, SQL_ERROR), (150, PANIC), (151, NEVER), (299, SQL_ERROR)] {
        all.insert(place, event(script, &format!("bad-{place}"), 1));
    }
    // Before the engine starts, so that they stand in full batches.
    stage.send_events(&all).await;
    let engine = stage.engine().await;
    until("the good events", async || stage.effects().await == 400).await;
    until("the dead letters", async || stage.dead_letters().len() == 4).await;
    engine.stop().await;

    stage.assert_once_and_in_order(400).await;
    let mut types: Vec<String> = stage
        .dead_letters()
        .iter()
        .map(|letter| letter.header(headers::ERROR_TYPE).to_owned())
        .collect();
    types.sort();
    assert_eq!(types, ["handler_error", "handler_error", "never", "panic"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_retry_headers_cannot_keep_an_event_in_the_tiers() {
    let stage = Stage::new(&[Duration::from_millis(50)]).await;
    let engine = stage.engine().await;
    for attempt in ["0", "-1", "999999999999999999999", "18446744073709551616", "x", "1"] {
        let value = event(NOT_YET, attempt, 1).encode().unwrap();
        let forged: [(&str, &[u8]); 5] = [
            (headers::ATTEMPT, attempt.as_bytes()),
            (headers::ORIGIN_TOPIC, b"somewhere.else"),
            (headers::ORIGIN_PARTITION, b"0"),
            (headers::ORIGIN_OFFSET, b"0"),
            (headers::NOT_BEFORE, b"9999-12-31T23:59:59.000000Z"),
        ];
        stage
            .send(Some(attempt.as_bytes()), Some(value.as_bytes()), None, &forged)
            .await;
    }
    until("the dead letters", async || stage.dead_letters().len() == 6).await;
    engine.stop().await;
    for letter in stage.dead_letters() {
        assert_eq!(letter.header(headers::ATTEMPT), "2");
        assert_eq!(letter.header(headers::ORIGIN_TOPIC), stage.topics.main());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_only_fits_compressed_reaches_the_dead_letters_whole() {
    let stage = Stage::new(&[]).await;
    let engine = stage.engine().await;
    let large = vec![b'x'; 2_000_000];
    stage.send(Some(b"large"), Some(&large), Some(1), &[]).await;
    stage.send(Some(b"small"), Some(b"x"), Some(1), &[]).await;
    until("both dead letters", async || stage.dead_letters().len() == 2).await;
    engine.stop().await;
    let letters = stage.dead_letters();
    assert_eq!(letters[0].key.as_deref(), Some(&b"large"[..]));
    assert!(letters[0].value.as_deref() == Some(&large), "the bytes are the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_no_topic_takes_stops_its_partition_and_says_so() {
    let stage = Stage::new(&[]).await;
    stage.limit_bytes(&stage.topics.dead_letter(), 4_000).await;
    let engine = stage.engine().await;
    // Nothing that compression could make smaller.
    let large: Vec<u8> = std::iter::repeat_with(|| *Uuid::new_v4().as_bytes())
        .flatten()
        .take(10_000)
        .collect();
    stage.send(Some(b"before"), Some(b"x"), Some(1), &[]).await;
    stage.send(Some(b"large"), Some(&large), Some(1), &[]).await;
    stage.send(Some(b"behind"), Some(b"x"), Some(1), &[]).await;
    let place = format!("{}[1] at offset 1 is refused", stage.topics.main());
    until("the stop", async || {
        let paused = engine.status.snapshot().paused;
        paused.is_some_and(|reason| reason.contains(&place))
    })
    .await;
    for partition in [0, 2, 3, 4, 5] {
        stage.send(Some(b"other"), Some(b"x"), Some(partition), &[]).await;
    }
    until("the other partitions", async || stage.dead_letters().len() >= 6).await;
    assert!(
        stage
            .dead_letters()
            .iter()
            .all(|letter| letter.key.as_deref() != Some(b"large"))
    );

    stage.limit_bytes(&stage.topics.dead_letter(), 1_000_000).await;
    until("all of them", async || {
        let letters = stage.dead_letters();
        [&b"before"[..], b"large", b"behind"]
            .iter()
            .all(|key| letters.iter().any(|letter| letter.key.as_deref() == Some(*key)))
    })
    .await;
    until("the end of the stop", async || {
        engine.status.snapshot().paused.is_none()
    })
    .await;
    engine.stop().await;
    let letters = stage.dead_letters();
    let found = letters
        .iter()
        .find(|letter| letter.key.as_deref() == Some(b"large"))
        .unwrap();
    assert!(found.value.as_deref() == Some(&large), "the bytes are the same");
}
