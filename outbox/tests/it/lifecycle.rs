use std::time::Duration;

use outbox::{Lifecycle, Mode, Operator, RelayState, Selection};

use crate::stage::{RunningRelay, Stage, first_seen, sequences, wait_for};

async fn states(stage: &Stage) -> anyhow::Result<Vec<(&'static str, i64)>> {
    let operator = Operator::new("logistics", stage.pool.clone());
    let counts = operator.counts().await?;
    Ok(counts.into_iter().map(|count| (count.state, count.events)).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_life_ends_when_the_record_was_read_back() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage
        .start_relay_with(|settings| settings.lifecycle = Lifecycle::Full)
        .await?;
    for sequence in 1..=100 {
        stage.commit(&[Stage::event("k", sequence)]).await?;
    }
    wait_for("every event to be completed", async || {
        Ok(states(&stage).await? == [("init", 0), ("failed", 0), ("published", 0), ("completed", 100)])
    })
    .await?;
    relay.stop().await
}

/// A mark that loses against another transaction, or meets the statement timeout, is a matter between the relay and its database:
/// it is tried again, and no event is sent again for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn marks_that_fail_for_a_passing_reason_are_tried_again() -> anyhow::Result<()> {
    for (mode, state) in [(Mode::Wal, RelayState::Streaming), (Mode::Poll, RelayState::Polling)] {
        for code in ["40P01", "57014"] {
            let stage = Stage::new().await?;
            let relay = stage.start_relay_with(|settings| settings.mode = mode).await?;
            relay.reaches(state.clone()).await?;
            // A sequence is not rolled back: the first marks fail, the third attempt does not.
            let refuse = format!(
                "CREATE SEQUENCE public.refusals;
                 CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
                 BEGIN
                     IF nextval('public.refusals') <= 2 THEN RAISE 'not now' USING ERRCODE = '{code}'; END IF;
                     RETURN NULL;
                 END $$;
                 CREATE TRIGGER refuse BEFORE UPDATE ON logistics.outbox FOR EACH STATEMENT EXECUTE FUNCTION public.refuse();"
            );
            sqlx::raw_sql(sqlx::AssertSqlSafe(refuse)).execute(&stage.pool).await?;
            for sequence in 1..=20 {
                stage.commit(&[Stage::event("k", sequence)]).await?;
            }
            stage.all_marked().await?;
            let refusals: i64 = sqlx::query_scalar("SELECT last_value FROM public.refusals")
                .fetch_one(&stage.pool)
                .await?;
            assert!(refusals > 2, "{mode:?}: no mark was refused");
            stage.commit(&[Stage::event("k", 21)]).await?;
            let records = stage
                .read_until(|records| sequences(records, "k").contains(&21))
                .await?;
            assert_eq!(
                sequences(&records, "k"),
                (1..=21).collect::<Vec<_>>(),
                "{mode:?}, {code}"
            );
            relay.stop().await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_marks_the_position_says_what_is_published() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let off = |settings: &mut outbox::RelaySettings| settings.lifecycle = Lifecycle::Off;
    let relay = stage.start_relay_with(off).await?;
    relay.reaches(RelayState::Streaming).await?;
    for sequence in 1..=50 {
        stage.commit(&[Stage::event("k", sequence)]).await?;
    }
    let records = stage.read_until(|records| records.len() >= 50).await?;
    assert_eq!(sequences(&records, "k"), (1..=50).collect::<Vec<_>>());
    assert_eq!(stage.unpublished().await?, 50, "no row is written to");
    wait_for("the slot to follow", async || Ok(stage.slot_lag().await? < 100_000)).await?;
    relay.stop().await?;

    let relay = stage.start_relay_with(off).await?;
    relay.reaches(RelayState::Streaming).await?;
    wait_for("the backlog to be known", async || {
        Ok(relay.status.seen().backlog.is_some())
    })
    .await?;
    assert_eq!(relay.status.seen().backlog, Some((0, None)));
    stage.commit(&[Stage::event("k", 51)]).await?;
    let records = stage
        .read_until(|records| sequences(records, "k").contains(&51))
        .await?;
    assert_eq!(first_seen(&sequences(&records, "k")), (1..=51).collect::<Vec<_>>());
    relay.stop().await
}

/// Nobody publishes, as if the publisher outside had missed these.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_published_is_swept_after_its_time() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage
        .start_relay_with(|settings| {
            settings.mode = Mode::External;
            settings.sweep_after = Duration::from_millis(500);
        })
        .await?;
    for sequence in 1..=20 {
        stage.commit(&[Stage::event("k", sequence)]).await?;
    }
    stage.all_marked().await?;
    let records = stage.read_until(|records| records.len() >= 20).await?;
    assert_eq!(first_seen(&sequences(&records, "k")), (1..=20).collect::<Vec<_>>());
    relay.stop().await
}

/// Its patience with rows that stay unsent is short.
async fn streams_and_sweeps(stage: &Stage) -> anyhow::Result<RunningRelay> {
    let relay = stage
        .start_relay_with(|settings| {
            settings.mode = Mode::Wal;
            settings.sweep_after = Duration::from_millis(500);
        })
        .await?;
    relay.reaches(RelayState::Streaming).await?;
    Ok(relay)
}

/// A row that the stream passed without a mark: as a defect, or a hand in the database, would leave it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_stuck_unsent_behind_the_stream_is_swept() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = streams_and_sweeps(&stage).await?;
    stage.commit(&[Stage::event("k", 1)]).await?;
    stage.all_marked().await?;
    sqlx::raw_sql("UPDATE logistics.outbox SET published_at = NULL")
        .execute(&stage.pool)
        .await?;
    stage.all_marked().await?;
    let records = stage.read_until(|records| records.len() >= 2).await?;
    assert_eq!(sequences(&records, "k"), [1, 1]);
    relay.stop().await
}

/// The rows before it are several looks long, and none of them is stuck.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stuck_row_is_found_behind_a_backlog_that_is_not() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = streams_and_sweeps(&stage).await?;
    let mut events: Vec<_> = (0..1_800).map(|n| Stage::event(&format!("a-{n}"), 1)).collect();
    events.push(Stage::event("k", 1));
    stage.commit(&events).await?;
    stage.all_marked().await?;
    sqlx::raw_sql(
        "UPDATE logistics.outbox SET published_at = NULL,
                created_at = created_at + CASE aggregateid WHEN 'k' THEN interval '0' ELSE interval '1 hour' END",
    )
    .execute(&stage.pool)
    .await?;
    let records = stage.read_until(|records| sequences(records, "k").len() >= 2).await?;
    assert_eq!(records.len(), events.len() + 1, "and nothing else was sent again");
    relay.stop().await
}

/// A record that the topic has lost: published, and never read back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_never_read_back_is_sent_again() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let event = Stage::event("k", 1);
    stage.commit(std::slice::from_ref(&event)).await?;
    sqlx::raw_sql("UPDATE logistics.outbox SET published_at = clock_timestamp()")
        .execute(&stage.pool)
        .await?;
    let relay = stage
        .start_relay_with(|settings| {
            settings.lifecycle = Lifecycle::Full;
            settings.confirm_within = Duration::from_secs(1);
        })
        .await?;
    wait_for("the event to be completed", async || {
        Ok(states(&stage).await?[3] == ("completed", 1))
    })
    .await?;
    let asked: String = sqlx::query_scalar("SELECT requested_by FROM logistics.outbox_resends LIMIT 1")
        .fetch_one(&stage.pool)
        .await?;
    assert_eq!(asked, "sweeper");
    relay.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_operator_asks_for_is_sent_again_in_order() -> anyhow::Result<()> {
    for (mode, state) in [(Mode::Wal, RelayState::Streaming), (Mode::Poll, RelayState::Polling)] {
        let stage = Stage::new().await?;
        let relay = stage.start_relay_with(|settings| settings.mode = mode).await?;
        relay.reaches(state).await?;
        for sequence in 1..=10 {
            stage
                .commit(&[Stage::event("a", sequence), Stage::event("b", sequence)])
                .await?;
        }
        stage.all_marked().await?;
        let operator = Operator::new("logistics", stage.pool.clone());
        let ids = operator.select(&Selection::AggregateId("a".to_owned()), 100).await?;
        assert_eq!(ids.len(), 10);
        assert_eq!(operator.resend(&ids, "ann", "lost downstream").await?, 10);
        assert_eq!(operator.resend(&ids, "ann", "again").await?, 0, "still asked for");
        let records = stage.read_until(|records| records.len() >= 30).await?;
        let twice: Vec<i64> = (1..=10).chain(1..=10).collect();
        assert_eq!(sequences(&records, "a"), twice);
        assert_eq!(sequences(&records, "b").len(), 10);
        relay.stop().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_day_past_retention_is_dropped_only_when_all_of_it_is_published() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    // Two days of the past with an event each, one of them unsent.
    for (days, published) in [(20, true), (21, false)] {
        let sql = format!(
            "DO $$
             DECLARE day date := (now() AT TIME ZONE 'UTC')::date - {days};
                     low uuid := logistics.outbox_id_floor(day::timestamp AT TIME ZONE 'UTC');
                     high uuid := logistics.outbox_id_floor((day + 1)::timestamp AT TIME ZONE 'UTC');
             BEGIN
                 EXECUTE format('CREATE TABLE logistics.%I PARTITION OF logistics.outbox FOR VALUES FROM (%L) TO (%L)',
                                'outbox_' || to_char(day, 'YYYYMMDD'), low, high);
                 INSERT INTO logistics.outbox (id, aggregatetype, aggregateid, type, version, sequence, payload, tx_key,
                                               created_at, published_at)
                 VALUES (low, 'Shipment', 'old-{days}', 'ShipmentCreated', 1, 1, '{{}}', low, now() - interval '{days} days',
                         CASE WHEN {published} THEN now() END);
             END $$"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&stage.pool).await?;
    }
    let old = async || -> anyhow::Result<Vec<String>> {
        let rows = sqlx::query_scalar("SELECT aggregateid FROM logistics.outbox WHERE aggregateid LIKE 'old-%'");
        Ok(rows.fetch_all(&stage.pool).await?)
    };
    let drop_days = async || -> anyhow::Result<Vec<String>> {
        let dropped = sqlx::query_scalar("SELECT logistics.drop_outbox_partitions(now() - interval '7 days', NULL, 9)");
        Ok(dropped.fetch_all(&stage.pool).await?)
    };
    assert_eq!(drop_days().await?.len(), 1);
    assert_eq!(old().await?, ["old-21"], "the unsent one keeps its day");
    sqlx::raw_sql("UPDATE logistics.outbox SET published_at = now() WHERE published_at IS NULL")
        .execute(&stage.pool)
        .await?;
    // The relay does the same by itself.
    let relay = stage.start_relay().await?;
    wait_for("the other day to be dropped", async || Ok(old().await?.is_empty())).await?;
    relay.stop().await?;
    let refused = sqlx::query("SELECT logistics.drop_outbox_partitions(now(), NULL, 9)")
        .execute(&stage.pool)
        .await;
    assert!(refused.is_err(), "an outbox is not emptied by a typing error");
    Ok(())
}

/// Without marks the position passes what waits behind a failed row, and rows before its time count as sent: not these.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_keeps_a_failed_row_and_what_waits_behind_it() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    // In a day of their own, in a later one, and in the default partition, each beside a row that may go.
    let sql = "DO $$
        DECLARE day date; low uuid; high uuid; midnight timestamptz;
        BEGIN
            FOR ago IN 18..21 LOOP
                day := (now() AT TIME ZONE 'UTC')::date - ago;
                midnight := day::timestamp AT TIME ZONE 'UTC';
                low := logistics.outbox_id_floor(midnight);
                high := logistics.outbox_id_floor(midnight + interval '1 day');
                IF ago > 19 THEN
                    EXECUTE format('CREATE TABLE logistics.%I PARTITION OF logistics.outbox FOR VALUES FROM (%L) TO (%L)',
                                   'outbox_' || to_char(day, 'YYYYMMDD'), low, high);
                END IF;
                INSERT INTO logistics.outbox (id, aggregatetype, aggregateid, type, version, sequence, payload, tx_key,
                                              created_at, failed_at, failure)
                SELECT logistics.outbox_id_floor(midnight + make_interval(secs => n)), 'shipment',
                       CASE WHEN n = 1 THEN 'gone-' || ago || n ELSE 'kept' END, 'ShipmentCreated', 1, 30 - ago, '{}',
                       low, midnight, CASE WHEN n = 2 AND ago = 21 THEN now() END, CASE WHEN n = 2 AND ago = 21 THEN 'no' END
                  FROM generate_series(1, 2) AS n;
            END LOOP;
        END $$";
    sqlx::raw_sql(sql).execute(&stage.pool).await?;
    // A relay without marks has passed them all.
    let passed = "INSERT INTO logistics.outbox_relay_positions (slot, system_identifier, position, unmarked_before)
                  SELECT $1, system_identifier::text, '0/1', now() - interval '1 day' FROM pg_control_system()";
    sqlx::query(passed).bind(&stage.slot).execute(&stage.pool).await?;
    let left = async || -> anyhow::Result<Vec<String>> {
        let left = "SELECT DISTINCT aggregateid FROM logistics.outbox ORDER BY 1";
        Ok(sqlx::query_scalar(left).fetch_all(&stage.pool).await?)
    };
    let relay = stage
        .start_relay_with(|settings| settings.lifecycle = Lifecycle::Off)
        .await?;
    // Those that share a day with what is kept stay with it; the default partition's go one by one.
    wait_for("the others to go", async || {
        Ok(left().await? == ["gone-201", "gone-211", "kept"])
    })
    .await?;
    let kept = "SELECT count(*) FROM logistics.outbox WHERE aggregateid = 'kept'";
    assert_eq!(sqlx::query_scalar::<_, i64>(kept).fetch_one(&stage.pool).await?, 4);
    relay.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_before_1970_find_what_came_later() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    stage.commit(&[Stage::event("k", 1)]).await?;
    let now = time::OffsetDateTime::now_utc();
    let meant = Selection::Created {
        from: time::OffsetDateTime::UNIX_EPOCH - Duration::from_secs(86_400),
        to: now + Duration::from_secs(60),
    };
    let operator = Operator::new("logistics", stage.pool.clone());
    assert_eq!(operator.select(&meant, 10).await?.len(), 1);
    Ok(())
}

/// Two writers' clocks differ: a key's later event looks older than its earlier one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_old_enough_waits_for_an_earlier_one_that_looks_too_young() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let (mut ahead, mut behind) = (Stage::event("k", 1), Stage::event("k", 2));
    ahead.envelope.timestamp += Duration::from_secs(1);
    behind.envelope.timestamp -= Duration::from_secs(10);
    stage.commit(&[ahead]).await?;
    stage.commit(&[behind]).await?;
    let relay = stage
        .start_relay_with(|settings| {
            settings.mode = Mode::External;
            settings.sweep_after = Duration::from_millis(500);
        })
        .await?;
    stage.all_marked().await?;
    let records = stage.read_until(|records| records.len() >= 2).await?;
    assert_eq!(sequences(&records, "k"), [1, 2]);
    relay.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_marks_a_clean_stop_repeats_nothing() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    for sequence in 1..=3 {
        let relay = stage
            .start_relay_with(|settings| settings.lifecycle = Lifecycle::Off)
            .await?;
        relay.reaches(RelayState::Streaming).await?;
        stage.commit(&[Stage::event("k", sequence)]).await?;
        let records = stage
            .read_until(|records| sequences(records, "k").contains(&sequence))
            .await?;
        assert_eq!(sequences(&records, "k"), (1..=sequence).collect::<Vec<_>>());
        relay.stop().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_marks_what_is_asked_for_is_sent_again() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage
        .start_relay_with(|settings| settings.lifecycle = Lifecycle::Off)
        .await?;
    relay.reaches(RelayState::Streaming).await?;
    let mut event = Stage::event("k", 1);
    event.envelope.timestamp -= Duration::from_secs(2 * 3600);
    stage.commit(std::slice::from_ref(&event)).await?;
    let operator = Operator::new("logistics", stage.pool.clone());
    operator.resend(&[event.envelope.id], "ann", "lost downstream").await?;
    let records = stage.read_until(|records| records.len() >= 2).await?;
    assert_eq!(sequences(&records, "k"), [1, 1]);
    relay.stop().await
}

/// More than one look finds, from long before the relay's last look: it was away, and the topic has lost them all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_much_is_never_read_back_is_sent_again() -> anyhow::Result<()> {
    const EVENTS: i64 = 1_200;
    let stage = Stage::new().await?;
    let full = |settings: &mut outbox::RelaySettings| {
        settings.lifecycle = Lifecycle::Full;
        settings.confirm_within = Duration::from_secs(1);
    };
    let relay = stage.start_relay_with(full).await?;
    wait_for("the relay to have looked", async || {
        let looked = "SELECT count(*) FROM logistics.outbox_confirmations";
        let looked: i64 = sqlx::query_scalar(looked).fetch_one(&stage.pool).await?;
        Ok(looked == 1)
    })
    .await?;
    relay.stop().await?;
    let three_hours_ago = "UPDATE logistics.outbox_confirmations
                              SET settled_to = logistics.outbox_id_floor(now() - interval '3 hours')";
    sqlx::raw_sql(three_hours_ago).execute(&stage.pool).await?;
    let two_hours_ago =
        "INSERT INTO logistics.outbox (id, aggregatetype, aggregateid, type, version, sequence, payload,
                                                       tx_key, published_at)
         SELECT overlay(gen_random_uuid()::text PLACING
                        left(logistics.outbox_id_floor(now() - interval '2 hours')::text, 13) FROM 1)::uuid,
                'shipment', 'k', 'ShipmentCreated', 1, n, '{}', gen_random_uuid(), now() - interval '2 hours'
           FROM generate_series(1, 1200) AS n";
    sqlx::raw_sql(two_hours_ago).execute(&stage.pool).await?;
    let relay = stage.start_relay_with(full).await?;
    wait_for("every event to be completed", async || {
        Ok(states(&stage).await?[3] == ("completed", EVENTS))
    })
    .await?;
    relay.stop().await
}
