//! The harness that other crates' tests stand on, against real servers.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use devstack::database::{COMMERCE, LOGISTICS, RELAY};
use devstack::testing::{PrivateKafka, PrivatePostgres, TestDatabase, TestServers, TestTopics};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use sqlx::{Connection, PgConnection};

#[tokio::test]
async fn a_template_is_prepared_once_and_each_clone_is_its_own() {
    let servers = TestServers::from_env().unwrap();
    let fingerprint = uuid::Uuid::now_v7().simple().to_string();
    let prepared = AtomicUsize::new(0);
    let prepare = async |url: &str| -> anyhow::Result<()> {
        prepared.fetch_add(1, Ordering::SeqCst);
        let mut connection = PgConnection::connect(url).await?;
        sqlx::query("CREATE TABLE mark (id int)")
            .execute(&mut connection)
            .await?;
        Ok(())
    };
    let (first, second) = tokio::try_join!(
        TestDatabase::create(&servers, "t", &fingerprint, prepare),
        TestDatabase::create(&servers, "t", &fingerprint, prepare),
    )
    .unwrap();
    assert_eq!(prepared.load(Ordering::SeqCst), 1);

    let mut connection = PgConnection::connect(&first.superuser_url()).await.unwrap();
    sqlx::query("INSERT INTO mark VALUES (1)")
        .execute(&mut connection)
        .await
        .unwrap();
    let mut other = PgConnection::connect(&second.superuser_url()).await.unwrap();
    let marks: i64 = sqlx::query_scalar("SELECT count(*) FROM mark")
        .fetch_one(&mut other)
        .await
        .unwrap();
    assert_eq!(marks, 0);
}

#[tokio::test]
async fn a_dropped_test_database_leaves_no_database_slot_or_connection() {
    let servers = TestServers::from_env().unwrap();
    let database = TestDatabase::create(&servers, "empty", "1", async |_: &str| Ok(()))
        .await
        .unwrap();
    let mut connection = PgConnection::connect(&database.superuser_url()).await.unwrap();
    let slot = format!("slot_{}", database.name());
    sqlx::query("SELECT pg_create_logical_replication_slot($1, 'pgoutput')")
        .bind(&slot)
        .execute(&mut connection)
        .await
        .unwrap();
    for role in [LOGISTICS, RELAY, COMMERCE] {
        PgConnection::connect(&database.url_for(role).unwrap()).await.unwrap();
    }

    let name = database.name().to_owned();
    drop(database);

    let mut connection = PgConnection::connect(&servers.superuser_url("postgres")).await.unwrap();
    let left: i64 = sqlx::query_scalar(
        "SELECT (SELECT count(*) FROM pg_database WHERE datname = $1)
              + (SELECT count(*) FROM pg_replication_slots WHERE slot_name = $2)
              + (SELECT count(*) FROM pg_stat_activity WHERE datname = $1)",
    )
    .bind(&name)
    .bind(&slot)
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn test_topics_have_equal_partition_counts_and_go_away() {
    let servers = TestServers::from_env().unwrap();
    let topics = TestTopics::create(&servers, 2, 3).await.unwrap();
    let names = topics.all(2);
    assert_eq!(partitions(&servers, &names), [3, 3, 3, 3]);
    drop(topics);
    assert_eq!(partitions(&servers, &names), [0, 0, 0, 0]);
}

fn partitions(servers: &TestServers, topics: &[String]) -> Vec<usize> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", servers.brokers())
        .create()
        .unwrap();
    let metadata = consumer.fetch_metadata(None, Duration::from_secs(10)).unwrap();
    let count = |name: &String| {
        let topic = metadata.topics().iter().find(|topic| topic.name() == name);
        topic.map_or(0, |topic| topic.partitions().len())
    };
    topics.iter().map(count).collect()
}

#[tokio::test]
async fn a_private_postgres_keeps_commits_through_every_kind_of_stop() {
    let mut server = PrivatePostgres::start().await.unwrap();
    let mut connection = PgConnection::connect(&server.superuser_url()).await.unwrap();
    sqlx::query("CREATE TABLE mark (id int)")
        .execute(&mut connection)
        .await
        .unwrap();
    for round in 1..=3 {
        let mut connection = PgConnection::connect(&server.superuser_url()).await.unwrap();
        sqlx::query("INSERT INTO mark VALUES (1)")
            .execute(&mut connection)
            .await
            .unwrap();
        match round {
            1 => drop(server.stop_fast().await.unwrap()),
            2 => drop(server.stop_immediate().await.unwrap()),
            _ => server.kill().unwrap(),
        }
        assert!(PgConnection::connect(&server.superuser_url()).await.is_err());
        server.start_again().await.unwrap();
        let mut connection = PgConnection::connect(&server.superuser_url()).await.unwrap();
        let marks: i64 = sqlx::query_scalar("SELECT count(*) FROM mark")
            .fetch_one(&mut connection)
            .await
            .unwrap();
        assert_eq!(marks, round);
    }
    PgConnection::connect(&server.role_url(RELAY)).await.unwrap();
}

#[tokio::test]
async fn a_private_kafka_keeps_its_topics_through_stop_and_kill() {
    let mut broker = PrivateKafka::start().await.unwrap();
    let topics = TestTopics::create_on(&broker.brokers(), 1, 2).await.unwrap();
    broker.stop().await.unwrap();
    broker.start_again().await.unwrap();
    broker.kill().unwrap();
    broker.start_again().await.unwrap();
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", broker.brokers())
        .create()
        .unwrap();
    let metadata = consumer
        .fetch_metadata(Some(topics.main()), Duration::from_secs(10))
        .unwrap();
    assert_eq!(metadata.topics()[0].partitions().len(), 2);
}
