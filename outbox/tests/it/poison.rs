use std::time::Duration;

use outbox::{Mode, Operator, Outbox, RelayState, Selection};

use crate::stage::{Stage, first_seen, sequences, wait_for};

/// HAZARDS H29: the topic's limit is lowered under a row that was small enough when it was appended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_the_broker_refuses_holds_up_its_own_key_only() -> anyhow::Result<()> {
    for mode in [Mode::Wal, Mode::Poll, Mode::Auto] {
        let stage = Stage::new().await?;
        stage.limit_records(4_000).await?;
        let relay = stage.start_relay_with(|settings| settings.mode = mode).await?;
        stage.commit(&[Stage::event("bad", 1)]).await?;
        let poison = Stage::large_event("bad", 2, 8_000);
        stage.commit(std::slice::from_ref(&poison)).await?;
        for sequence in 1..=50 {
            stage
                .commit(&[
                    Stage::event("bad", 2 + sequence),
                    Stage::event("good-a", sequence),
                    Stage::event("good-b", sequence),
                ])
                .await?;
        }
        let complete = |records: &[crate::stage::Published]| {
            let seen = |key| first_seen(&sequences(records, key)).len();
            // What stands before the refused one comes from another partition, maybe later than all the rest.
            seen("good-a") == 50 && seen("good-b") == 50 && seen("bad") >= 1
        };
        let records = stage.read_until(complete).await?;
        for key in ["good-a", "good-b"] {
            assert_eq!(first_seen(&sequences(&records, key)), (1..=50).collect::<Vec<_>>());
        }
        let operator = Operator::new("logistics", stage.pool.clone());
        let id = poison.envelope.id;
        wait_for("the row to be set aside", async || {
            Ok(operator.event(id).await?.is_some_and(|event| event.state() == "failed"))
        })
        .await?;
        let event = operator.event(id).await?.unwrap();
        let failure = event.failure.unwrap();
        assert!(failure.to_lowercase().contains("too large"), "{mode:?}: {failure}");
        // It, and the fifty behind it.
        wait_for("the others to be marked", async || Ok(stage.unpublished().await? == 51)).await?;
        assert_eq!(first_seen(&sequences(&records, "bad")), [1], "what is behind it waits");

        // The operator asks too early, then repairs the topic and asks again.
        operator.resend(&[id], "ann", "is it repaired?").await?;
        wait_for("the refusal to be noted", async || {
            let refusal: Option<String> =
                sqlx::query_scalar("SELECT refusal FROM logistics.outbox_resends WHERE event_id = $1 LIMIT 1")
                    .bind(id)
                    .fetch_one(&stage.pool)
                    .await?;
            Ok(refusal.is_some())
        })
        .await?;
        stage.limit_records(1_000_000).await?;
        let meant = Selection::Ids(vec![id]);
        assert_eq!(operator.select(&meant, 10).await?, [id]);
        operator.resend(&[id], "ann", "the limit is raised").await?;
        stage.all_marked().await?;
        let records = stage
            .read_until(|records| first_seen(&sequences(records, "bad")).len() == 52)
            .await?;
        assert_eq!(
            first_seen(&sequences(&records, "bad")),
            (1..=52).collect::<Vec<_>>(),
            "{mode:?}"
        );
        relay.stop().await?;
    }
    Ok(())
}

/// A refused batch says nothing about which of its events is at fault.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_only_shared_a_batch_with_it_are_not_set_aside() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    stage.limit_records(6_000).await?;
    let events: Vec<_> = (0..40)
        .map(|key| match key {
            20 => Stage::large_event("k20", 1, 12_000),
            key => Stage::event(&format!("k{key}"), 1),
        })
        .collect();
    stage.commit(&events).await?;
    let relay = stage
        .start_relay_with(|settings| {
            settings.mode = Mode::Wal;
            settings.linger = std::time::Duration::from_millis(50);
        })
        .await?;
    wait_for("all but one to be marked", async || Ok(stage.unpublished().await? == 1)).await?;
    let failed: Vec<String> =
        sqlx::query_scalar("SELECT aggregateid FROM logistics.outbox WHERE failed_at IS NOT NULL")
            .fetch_all(&stage.pool)
            .await?;
    assert_eq!(failed, ["k20"]);
    relay.stop().await
}

/// HAZARDS H31: a broker takes any sequence number from a producer that it does not know on a partition (KAFKA-15591), so a
/// refused first batch does not stop the one behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_passes_a_first_batch_that_is_refused() -> anyhow::Result<()> {
    const ROUNDS: usize = 4;
    let stage = Stage::new().await?;
    stage.limit_records(100_000).await?;
    // One key for each round, and another partition's key to keep the producer busy between its events.
    let keys: Vec<_> = (0..60).map(|key| format!("k{key}")).collect();
    stage
        .commit(&keys.iter().map(|key| Stage::event(key, 1)).collect::<Vec<_>>())
        .await?;
    let relay = stage.start_relay_with(|settings| settings.mode = Mode::Poll).await?;
    let records = stage.read_until(|records| records.len() >= keys.len()).await?;
    let (bad, other): (Vec<_>, Vec<_>) = records
        .iter()
        .partition(|record| record.partition == records[0].partition);
    let filler = &other[0].key;
    let mut fillers = 2..;
    for (record, round) in bad.iter().zip(1..=ROUNDS as i64) {
        let key = &record.key;
        let mut backlog = vec![Stage::large_event(key, 2, 200_000)];
        for sequence in 3..=30 {
            backlog.extend(fillers.by_ref().take(20).map(|sequence| Stage::event(filler, sequence)));
            backlog.push(Stage::event(key, sequence));
        }
        stage.commit(&backlog).await?;
        wait_for("the key to wait behind its large event", async || {
            Ok(stage.unpublished().await? == 29 * round)
        })
        .await?;
    }
    let last = fillers.start - 1;
    let records = stage
        .read_until(|records| sequences(records, filler).last() == Some(&last))
        .await?;
    for record in &bad[..ROUNDS] {
        assert_eq!(
            first_seen(&sequences(&records, &record.key)),
            [1],
            "nothing behind the refused event"
        );
    }
    relay.stop().await
}

/// The topic's limit is lowered below what it has taken already, and somebody asks for that again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_published_event_that_the_broker_refuses_to_repeat_is_answered_and_left_alone() -> anyhow::Result<()> {
    for mode in [Mode::Wal, Mode::Poll] {
        let stage = Stage::new().await?;
        let relay = stage.start_relay_with(|settings| settings.mode = mode).await?;
        let large = Stage::large_event("k", 1, 8_000);
        stage.commit(std::slice::from_ref(&large)).await?;
        stage.all_marked().await?;
        stage.limit_records(4_000).await?;
        let operator = Operator::new("logistics", stage.pool.clone());
        let id = large.envelope.id;
        operator.resend(&[id], "ann", "lost downstream").await?;
        wait_for("the refusal to be noted", async || {
            let refused = "SELECT count(*) FROM logistics.outbox_resends WHERE refusal IS NOT NULL";
            let refused: i64 = sqlx::query_scalar(refused).fetch_one(&stage.pool).await?;
            Ok(refused == 1)
        })
        .await?;
        assert_eq!(operator.event(id).await?.unwrap().state(), "published");
        stage.commit(&[Stage::event("k", 2)]).await?;
        stage.all_marked().await?;

        stage.limit_records(1_000_000).await?;
        operator.resend(&[id], "ann", "the limit is raised").await?;
        let records = stage
            .read_until(|records| {
                sequences(records, "k")
                    .iter()
                    .filter(|sequence| **sequence == 1)
                    .count()
                    > 1
            })
            .await?;
        assert_eq!(first_seen(&sequences(&records, "k")), [1, 2], "{mode:?}");
        relay.stop().await?;
    }
    Ok(())
}

/// The same without anybody's asking: a crash of the server may leave the slot where it was before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rewound_slot_passes_a_published_event_that_the_broker_refuses_to_repeat() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage.start_relay().await?;
    relay.reaches(RelayState::Streaming).await?;
    relay.stop().await?;
    let before = format!("{}_before", stage.slot);
    let copy = "SELECT pg_copy_logical_replication_slot($1, $2)";
    sqlx::query(copy)
        .bind(&stage.slot)
        .bind(&before)
        .execute(&stage.pool)
        .await?;
    let relay = stage.start_relay().await?;
    stage.commit(&[Stage::large_event("k", 1, 8_000)]).await?;
    stage.all_marked().await?;
    relay.stop().await?;

    stage.limit_records(4_000).await?;
    for (drop, copied) in [(&stage.slot, Some(&before)), (&before, None)] {
        sqlx::query("SELECT pg_drop_replication_slot($1)")
            .bind(drop)
            .execute(&stage.pool)
            .await?;
        if let Some(copied) = copied {
            sqlx::query(copy)
                .bind(copied)
                .bind(&stage.slot)
                .execute(&stage.pool)
                .await?;
        }
    }
    let relay = stage.start_relay().await?;
    stage.commit(&[Stage::event("k", 2)]).await?;
    stage.all_marked().await?;
    wait_for("the slot to follow", async || Ok(stage.slot_lag().await? < 100_000)).await?;
    let records = stage.read_until(|records| records.len() >= 2).await?;
    assert_eq!(sequences(&records, "k"), [1, 2]);
    relay.stop().await
}

/// Above the client's own limit: it refuses at once, while what stands before is still on its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_the_client_refuses_leaves_nothing_before_it_behind() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage
        .start_relay_with(|settings| {
            settings.mode = Mode::Wal;
            settings.linger = Duration::from_millis(200);
        })
        .await?;
    let mut events: Vec<_> = (1..=20).map(|sequence| Stage::event("k", sequence)).collect();
    events.push(Stage::large_event("k", 21, 1_200_000));
    let mut tx = stage.pool.begin().await?;
    Outbox::new("logistics", "logistics", 2_000_000)
        .append(&mut tx, &events)
        .await?;
    tx.commit().await?;
    let failed = async || -> anyhow::Result<i64> {
        let failed = "SELECT count(*) FROM logistics.outbox WHERE failed_at IS NOT NULL";
        Ok(sqlx::query_scalar(failed).fetch_one(&stage.pool).await?)
    };
    wait_for("the row to be set aside", async || Ok(failed().await? == 1)).await?;
    wait_for("all before it to be marked", async || {
        Ok(stage.unpublished().await? == 1)
    })
    .await?;
    let records = stage
        .read_until(|records| first_seen(&sequences(records, "k")).len() == 20)
        .await?;
    assert_eq!(first_seen(&sequences(&records, "k")), (1..=20).collect::<Vec<_>>());
    relay.stop().await
}

/// More is asked for of a key that waits than fits into one look; what others ask for, and its own repair, come behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_of_a_waiting_key_hides_neither_other_requests_nor_its_repair() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    stage.limit_records(300_000).await?;
    let relay = stage.start_relay_with(|settings| settings.mode = Mode::Wal).await?;
    let mut events: Vec<_> = (1..=600).map(|sequence| Stage::event("bad", sequence)).collect();
    events.push(Stage::event("good", 1));
    stage.commit(&events).await?;
    stage.all_marked().await?;
    let poison = Stage::large_event("bad", 601, 600_000);
    stage.commit(std::slice::from_ref(&poison)).await?;
    let operator = Operator::new("logistics", stage.pool.clone());
    let id = poison.envelope.id;
    wait_for("the row to be set aside", async || {
        Ok(operator.event(id).await?.is_some_and(|event| event.state() == "failed"))
    })
    .await?;
    for key in ["bad", "good"] {
        let ids = operator.select(&Selection::AggregateId(key.to_owned()), 600).await?;
        operator.resend(&ids, "ann", "lost downstream").await?;
    }
    let open = "SELECT count(*) FROM logistics.outbox_resends AS resend JOIN logistics.outbox AS event ON event.id = resend.event_id
        WHERE event.aggregateid = 'good' AND resend.done_at IS NULL";
    wait_for("the request of the good key", async || {
        let open: i64 = sqlx::query_scalar(open).fetch_one(&stage.pool).await?;
        Ok(open == 0)
    })
    .await?;
    stage.limit_records(1_000_000).await?;
    operator.resend(&[id], "ann", "the limit is raised").await?;
    stage.all_marked().await?;
    relay.stop().await
}
