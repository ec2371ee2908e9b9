use std::{collections::BTreeSet, num::NonZeroU32, time::Duration};

use inbox::{Budget, GroupProtocol, Membership, Pace, Rate, operator::Change};
use sqlx::Connection;

use crate::stage::{ANN, Running, Stage, events, until};

fn per_second(rate: u32) -> Rate {
    Rate::PerSecond(NonZeroU32::new(rate).unwrap())
}

fn paused(engine: &Running) -> bool {
    engine.status.snapshot().paused_by_operator.is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_holds_every_instance_and_outlives_their_restarts() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    stage.send_events(&events(500, 10)).await;
    let engines = [stage.engine().await, stage.engine().await];
    until("the first effects", async || stage.effects().await == 500).await;

    operator.change(Change::Pause, ANN).await.unwrap();
    until("both to be paused", async || engines.iter().all(paused)).await;
    stage.send_events(&events(500, 10)).await;
    until("the backlog to be seen", async || {
        let waiting = |engine: &Running| {
            engine
                .status
                .snapshot()
                .partitions
                .into_iter()
                .filter_map(|p| p.oldest_age_seconds)
        };
        engines.iter().flat_map(waiting).any(|age| age > 0.0)
    })
    .await;
    for engine in engines {
        engine.stop().await;
    }
    let again = stage.engine().await;
    until("the new one to have its partitions", async || {
        again.status.snapshot().joined
    })
    .await;
    assert!(paused(&again));
    until("the backlog to be seen again", async || {
        let partitions = again.status.snapshot().partitions;
        partitions
            .iter()
            .any(|partition| partition.oldest_age_seconds.is_some_and(|age| age > 0.0))
    })
    .await;
    assert_eq!(stage.effects().await, 500, "paused is paused");

    operator.change(Change::GoOn, ANN).await.unwrap();
    until("the rest", async || stage.effects().await == 1_000).await;
    assert!(!paused(&again));
    again.stop().await;
    let actions = operator.actions(None, 10).await.unwrap();
    assert_eq!(
        actions.iter().map(|action| &*action.action).collect::<Vec<_>>(),
        ["resume", "pause"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_that_was_set_while_it_ran_is_remembered_until_it_is_taken_back() {
    let mut stage = Stage::new(&[]).await;
    stage.rate = per_second(1_000);
    let operator = stage.operator();
    let engine = stage.engine().await;
    let rates = [
        (Budget::Live, Some(per_second(7))),
        (Budget::Redrive, Some(per_second(9))),
    ];
    operator.change(Change::Rates(&rates), ANN).await.unwrap();
    let totals = |engine: &Running| Budget::ALL.map(|budget| engine.limits.total(budget));
    until("the new limits", async || {
        totals(&engine) == [per_second(7), Rate::Unlimited, per_second(9)]
    })
    .await;
    engine.stop().await;
    let again = stage.engine().await;
    until("the same limits", async || {
        again.status.snapshot().joined && totals(&again) == [per_second(7), Rate::Unlimited, per_second(9)]
    })
    .await;
    operator
        .change(Change::Rates(&[(Budget::Live, None)]), ANN)
        .await
        .unwrap();
    until("the limit of the settings", async || {
        totals(&again) == [per_second(1_000), Rate::Unlimited, per_second(9)]
    })
    .await;
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strained_database_slows_the_group_down_to_its_floor_and_no_further() {
    let mut stage = Stage::new(&[]).await;
    stage.rate = per_second(1_000);
    stage.pace = Some(Pace {
        floor: NonZeroU32::new(400).unwrap(),
        commit_within: Duration::from_secs(5),
        lock_waits: 0,
    });
    let engine = stage.engine().await;
    let share = || engine.limits.share(Budget::Live);
    until("its whole share", async || share() == Some(1_000.0)).await;

    let url = stage.database.superuser_url();
    let (mut first, mut second) =
        tokio::try_join!(sqlx::PgConnection::connect(&url), sqlx::PgConnection::connect(&url)).unwrap();
    let mut lock = first.begin().await.unwrap();
    let take = "SELECT pg_advisory_xact_lock(1)";
    sqlx::query(take).execute(&mut *lock).await.unwrap();
    let waiting = tokio::spawn(async move { sqlx::query(take).execute(&mut second).await });
    until("the floor", async || share() == Some(400.0)).await;
    lock.rollback().await.unwrap();
    waiting.await.unwrap().unwrap();
    until("its whole share again", async || share() == Some(1_000.0)).await;
    engine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_whose_partitions_the_brokers_spread_works_the_same() {
    let mut stage = Stage::new(&[]).await;
    stage.membership.protocol = GroupProtocol::Consumer;
    let all = events(2_000, 50);
    stage.send_events(&all[..1_000]).await;
    let first = stage.engine().await;
    until("the first half", async || stage.effects().await >= 500).await;
    let second = stage.engine().await;
    let owned = |engine: &Running| engine.status.snapshot().partitions.len();
    until("both to have partitions", async || {
        owned(&first) > 0 && owned(&second) > 0
    })
    .await;
    stage.send_events(&all[1_000..]).await;
    until("the second half", async || stage.effects().await >= 1_500).await;
    first.stop().await;
    until("everything", async || stage.effects().await >= 2_000).await;
    second.stop().await;
    stage.assert_once_and_in_order(2_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_instance_that_comes_back_in_time_has_its_partitions_without_a_rebalance() {
    for protocol in [GroupProtocol::Classic, GroupProtocol::Consumer] {
        let mut stage = Stage::new(&[]).await;
        let name = |id: &str| Membership {
            protocol,
            instance_id: Some(id.to_owned()),
            poll_interval: None,
        };
        stage.membership = name("a");
        let a = stage.engine().await;
        stage.membership = name("b");
        let b = stage.engine().await;
        let owned = |engine: &Running| {
            let partitions = engine.status.snapshot().partitions.into_iter();
            partitions.map(|partition| partition.partition).collect::<BTreeSet<_>>()
        };
        until("each to have its half", async || {
            !owned(&a).is_empty() && owned(&a).len() + owned(&b).len() == 6 && !owned(&b).is_empty()
        })
        .await;
        let (of_a, of_b) = (owned(&a), owned(&b));
        a.stop().await;
        stage.membership = name("a");
        let a = stage.engine().await;
        until("its partitions", async || !owned(&a).is_empty()).await;
        assert_eq!((owned(&a), owned(&b)), (of_a, of_b), "{protocol:?}");
        stage.send_events(&events(1_000, 50)).await;
        until("every effect", async || stage.effects().await >= 1_000).await;
        stage.assert_once_and_in_order(1_000).await;
        a.stop().await;
        b.stop().await;
    }
}
