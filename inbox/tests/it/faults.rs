use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::stage::{EFFECT, SLOW, Stage, event, events, until};

/// A connection to another database of the same server: the one under test is to be shut.
async fn beside(stage: &Stage) -> PgConnection {
    let mut url: Vec<String> = stage
        .database
        .superuser_url()
        .rsplitn(2, '/')
        .map(str::to_owned)
        .collect();
    url[0] = "postgres".to_owned();
    url.reverse();
    PgConnection::connect(&url.join("/")).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_moves_nothing_and_counts_no_attempt() {
    let stage = Stage::new(&[std::time::Duration::from_millis(10)]).await;
    let mut beside = beside(&stage).await;
    let engine = stage.engine().await;
    stage.send_events(&events(200, 20)).await;
    until("the first effects", async || stage.effects().await == 200).await;

    let name = stage.database.name().to_owned();
    let shut = |open: bool| AssertSqlSafe(format!("ALTER DATABASE {name} ALLOW_CONNECTIONS {open}"));
    sqlx::raw_sql(shut(false)).execute(&mut beside).await.unwrap();
    sqlx::query("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1")
        .bind(&name)
        .execute(&mut beside)
        .await
        .unwrap();
    let during: Vec<_> = (0..200)
        .map(|n| event(EFFECT, &format!("key-{}", n % 20), 100 + n / 20))
        .collect();
    stage.send_events(&during).await;
    until("the pause", async || engine.status.snapshot().paused.is_some()).await;
    // Several tries later it is still only a pause.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(stage.committed(), 200);
    assert_eq!(stage.dead_letters().len() + stage.read(&stage.topics.retry(1)).len(), 0);

    sqlx::raw_sql(shut(true)).execute(&mut beside).await.unwrap();
    until("the rest", async || stage.effects().await == 400).await;
    until("the end of the pause", async || {
        engine.status.snapshot().paused.is_none()
    })
    .await;
    engine.stop().await;
    stage.assert_once_and_in_order(400).await;
    assert_eq!(stage.dead_letters().len() + stage.read(&stage.topics.retry(1)).len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_cut_again_and_again_lose_and_repeat_nothing() {
    let stage = Stage::new(&[]).await;
    let mut beside = beside(&stage).await;
    let engine = stage.engine().await;
    let all = events(6_000, 60);
    for chunk in all.chunks(300) {
        stage.send_events(chunk).await;
        sqlx::query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1")
            .bind(stage.database.name())
            .execute(&mut beside)
            .await
            .unwrap();
    }
    let count = || async {
        // This pool's connections were cut as well.
        sqlx::query_scalar::<_, i64>("SELECT count(*) FROM t.effects")
            .fetch_one(&stage.pool)
            .await
            .unwrap_or(0)
    };
    until("the last effect", async || count().await >= 6_000).await;
    engine.stop().await;
    stage.assert_once_and_in_order(6_000).await;
    assert_eq!(stage.dead_letters().len(), 0);
}

/// Forwards to the database until it is told to swallow everything: as from a host that lost its power, not even the
/// end of a connection comes through. What was swallowed stays lost; later connections are forwarded again.
async fn black_hole(stage: &mut Stage) -> watch::Sender<bool> {
    let url = stage.database.superuser_url();
    let (credentials, rest) = url.rsplit_once('@').unwrap();
    let (server, name) = rest.split_once('/').unwrap();
    let server = server.to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    // The server, too, must give up the transaction that nobody will end: it holds the inbox rows.
    let patience = "options[idle_in_transaction_session_timeout]=1000";
    let address = listener.local_addr().unwrap();
    stage.database_url = Some(format!("{credentials}@{address}/{name}?{patience}"));
    let (switch, swallows) = watch::channel(false);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (server, mut swallows) = (server.clone(), swallows.clone());
            tokio::spawn(async move {
                let mut database = TcpStream::connect(server).await.unwrap();
                let swallowed = tokio::select! {
                    ended = swallows.wait_for(|swallows| *swallows) => ended.is_ok(),
                    _ = copy_bidirectional(&mut client, &mut database) => false,
                };
                if swallowed {
                    // Both ends stay open.
                    std::future::pending::<()>().await;
                }
            });
        }
    });
    switch
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_falls_silent_is_given_up_and_found_again() {
    let mut stage = Stage::new(&[Duration::from_millis(10)]).await;
    stage.transaction_limit = Duration::from_secs(1);
    let silence = black_hole(&mut stage).await;
    let engine = stage.engine().await;
    stage.send_events(&events(200, 20)).await;
    until("the first effects", async || stage.effects().await == 200).await;

    // Slow ones, so that the silence falls into open transactions.
    let slow: Vec<_> = (0..20).map(|n| event(SLOW, &format!("key-{n}"), 100)).collect();
    stage.send_events(&slow).await;
    until("an open transaction", async || {
        stage
            .number("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(0.4)' AND state = 'active'")
            .await
            > 0
    })
    .await;
    silence.send(true).unwrap();
    until("the pause", async || engine.status.snapshot().paused.is_some()).await;
    silence.send(false).unwrap();
    until("the rest", async || stage.effects().await == 220).await;
    until("the end of the pause", async || {
        engine.status.snapshot().paused.is_none()
    })
    .await;
    engine.stop().await;
    stage.assert_once_and_in_order(220).await;
    assert_eq!(stage.dead_letters().len() + stage.read(&stage.topics.retry(1)).len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_were_deleted_unread_are_counted_and_the_rest_takes_effect() {
    let stage = Stage::new(&[]).await;
    let all: Vec<_> = (1..=60)
        .map(|sequence| event(EFFECT, &format!("key-{sequence}"), 1))
        .collect();
    for event in &all[..30] {
        stage.send_event(event).await;
    }
    let engine = stage.engine().await;
    until("the first effects", async || stage.effects().await == 30).await;
    engine.stop().await;
    for event in &all[30..50] {
        stage.send_event(event).await;
    }
    stage.delete_records().await;
    for event in &all[50..] {
        stage.send_event(event).await;
    }
    let engine = stage.engine().await;
    until("what is left", async || stage.effects().await == 40).await;
    until("the loss to be noticed", async || engine.status.snapshot().lost == 20).await;
    engine.stop().await;
}
