use std::{collections::HashMap, time::Duration};

use e2e::{
    feed::{self, completed, created, envelope},
    pair::{Role, Running},
    place::{Place, TIERS},
    topic, wait_for, workload,
};
use rdkafka::producer::{BaseRecord, Producer};
use shared_events::{headers::Redirect, shipment::Line};
use uuid::Uuid;

const GOOD: i64 = 10_000;
const BAD: i64 = 1_000;
/// Orders that commerce has; every shipment of the good ones belongs to one.
const ORDERS: i64 = GOOD / 2;
const DEADLINE: Duration = Duration::from_secs(120);

/// 1,000 duplicates, 1,000 undecodable and 1,000 always-failing records among 10,000 good ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_records_become_dead_letters_and_hold_nobody_up() -> anyhow::Result<()> {
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, ORDERS).await?;
    // So many bad ones are a flood; that they stop the consumer is another test's matter.
    let env = [
        ("RETRY_DELAYS", "2s,2s,2s"),
        ("DEAD_LETTER_RUN", "1000000"),
        ("DEAD_LETTER_PERCENT", "100"),
    ];
    let consumer = Running::start(&place, Role::Consumer(0), &env).await?;

    // Two events per shipment and order: created and completed.
    let mut good = Vec::new();
    for order in 1..=ORDERS {
        let key = format!("good-{order}");
        let lines = vec![Line {
            sku: format!("s{}", 1 + order % 20),
            quantity: 4,
        }];
        good.push((key.clone(), envelope(&key, 1, &created(&order.to_string(), &lines))?));
        good.push((key.clone(), envelope(&key, 2, &completed(&order.to_string(), &lines))?));
    }
    let undecodable: Vec<Vec<u8>> = (0..BAD).map(undecodable).collect();
    let failing: Vec<(String, String)> = (0..BAD)
        .map(|number| {
            let key = format!("failing-{number}");
            let lines = [Line {
                sku: "s1".to_owned(),
                quantity: 1,
            }];
            let value = envelope(&key, 1, &created("no such order", &lines))?;
            anyhow::Ok((key, value))
        })
        .collect::<anyhow::Result<_>>()?;

    let producer = feed::producer(&place)?;
    let send = |key: Option<&str>, value: &[u8]| -> anyhow::Result<()> {
        let mut record = BaseRecord::<str, [u8]>::to(place.topics.main()).payload(value);
        record.key = key;
        producer.send(record).map_err(|(error, _)| error.into())
    };
    let every = (GOOD / BAD) as usize;
    for (index, (key, value)) in good.iter().enumerate() {
        send(Some(key), value.as_bytes())?;
        if index % every == 0 {
            let number = index / every;
            send(Some(key), value.as_bytes())?;
            send(number.is_multiple_of(2).then_some("undecodable"), &undecodable[number])?;
            send(Some(&failing[number].0), failing[number].1.as_bytes())?;
        }
    }
    producer.flush(DEADLINE)?;

    // The good ones first: none of them waits for a delay of another key, and the shortest way to a dead letter of a
    // failing one is three delays long.
    let applied = async || -> anyhow::Result<i64> {
        Ok(sqlx::query_scalar("SELECT count(*) FROM commerce.inbox")
            .fetch_one(&owner)
            .await?)
    };
    wait_for("the good records", DEADLINE, async || Ok(applied().await? >= GOOD)).await?;
    let dead = async || topic::read(&place.brokers, &place.topics.dead_letter()).await;
    wait_for("the dead letters", DEADLINE, async || {
        Ok(dead().await?.len() as i64 >= 2 * BAD)
    })
    .await?;
    consumer.stop().await?;

    assert_eq!(applied().await?, GOOD, "each good event once, no other");
    let shipped: i64 = sqlx::query_scalar("SELECT sum(shipped_quantity) FROM commerce.order_lines")
        .fetch_one(&owner)
        .await?;
    assert_eq!(shipped, ORDERS * 4);

    // No good record was ever in a retry topic.
    for tier in 1..=TIERS {
        for record in topic::read(&place.brokers, &place.topics.retry(tier)).await? {
            let key = String::from_utf8(record.key.unwrap_or_default())?;
            assert!(key.starts_with("failing-"), "{key} in tier {tier}");
        }
    }

    // Every bad record is there once, with its bytes and its past.
    let letters = dead().await?;
    assert_eq!(letters.len() as i64, 2 * BAD);
    let mut by_value: HashMap<Vec<u8>, _> = HashMap::new();
    for letter in letters {
        let redirect = Redirect::decode(&letter.headers).expect("a dead letter has its origin");
        assert_eq!(&*redirect.origin.topic, place.topics.main());
        assert_eq!(redirect.origin.partition, letter.partition, "a key keeps its partition");
        assert!(!redirect.error_message.is_empty() && !redirect.consumer_version.is_empty());
        by_value.insert(letter.value.clone().unwrap_or_default(), (letter, redirect));
    }
    for (number, value) in undecodable.iter().enumerate() {
        let (letter, redirect) = by_value.remove(value).expect("the raw bytes are kept");
        assert_eq!((redirect.error_class.as_str(), redirect.attempt), ("permanent", 1));
        assert_eq!(letter.key.is_some(), number % 2 == 0);
    }
    for (key, value) in &failing {
        let (letter, redirect) = by_value.remove(value.as_bytes()).expect("the failing event is kept");
        assert_eq!(letter.key.as_deref(), Some(key.as_bytes()));
        assert_eq!(redirect.attempt as usize, TIERS + 1, "it went through every tier");
    }
    assert!(by_value.is_empty());

    let waited: f64 =
        sqlx::query_scalar("SELECT extract(epoch FROM max(applied_at) - min(applied_at))::float8 FROM commerce.inbox")
            .fetch_one(&owner)
            .await?;
    println!(
        "{GOOD} good events applied within {waited:.1} s, {} dead letters with bytes and headers",
        2 * BAD
    );
    Ok(())
}

/// Bytes of five kinds that are not an envelope, each different.
fn undecodable(number: i64) -> Vec<u8> {
    match number % 5 {
        0 => format!("not json {number}").into_bytes(),
        1 => format!("{{\"id\": {number}").into_bytes(),
        2 => [&[0xFF, 0xFE, 0x00][..], &number.to_be_bytes()].concat(),
        3 => format!("[{number}]").into_bytes(),
        _ => format!(
            "{{\"id\":\"{}\",\"type\":\"ShipmentCreated\",\"version\":{number}}}",
            Uuid::nil()
        )
        .into_bytes(),
    }
}
