use devstack::database::{LOGISTICS, RELAY};
use futures_util::future::join_all;
use sqlx::{Connection, PgConnection};

use crate::service::TestService;

const INSUFFICIENT_PRIVILEGE: &str = "42501";

async fn try_as(service: &TestService, role: &str, statement: &'static str) -> Result<u64, String> {
    let mut connection = PgConnection::connect(&service.database.url_for(role).unwrap())
        .await
        .unwrap();
    let done = sqlx::query(statement).execute(&mut connection).await;
    connection.close().await.unwrap();
    done.map(|done| done.rows_affected()).map_err(|error| match error {
        sqlx::Error::Database(error) => error.code().unwrap_or_default().into_owned(),
        other => panic!("{statement}: {other}"),
    })
}

#[tokio::test]
async fn each_role_has_only_its_rights() {
    let service = TestService::start().await;
    service.create(1).await;
    let before = service.state().await;
    for (role, statement) in [
        (LOGISTICS, "UPDATE logistics.outbox SET published_at = now()"),
        (LOGISTICS, "UPDATE logistics.outbox SET payload = '{}'"),
        (LOGISTICS, "DELETE FROM logistics.outbox"),
        (LOGISTICS, "TRUNCATE logistics.outbox"),
        (LOGISTICS, "DELETE FROM logistics.outbox_default"),
        (LOGISTICS, "DELETE FROM logistics.shipments"),
        (LOGISTICS, "DELETE FROM logistics.shipment_lines"),
        (LOGISTICS, "UPDATE logistics.idempotency_keys SET response = '{}'"),
        (LOGISTICS, "SELECT logistics.ensure_outbox_partitions(1)"),
        (LOGISTICS, "CREATE TABLE logistics.mine (id int)"),
        (LOGISTICS, "DELETE FROM logistics._sqlx_migrations"),
        (RELAY, "UPDATE logistics.outbox SET payload = '{}'"),
        (RELAY, "UPDATE logistics.outbox SET sequence = 9"),
        (RELAY, "DELETE FROM logistics.outbox"),
        (RELAY, "INSERT INTO logistics.outbox SELECT * FROM logistics.outbox"),
        (RELAY, "SELECT * FROM logistics.shipments"),
        (RELAY, "SELECT * FROM logistics.idempotency_keys"),
    ] {
        let refused = try_as(&service, role, statement).await;
        assert_eq!(refused, Err(INSUFFICIENT_PRIVILEGE.to_owned()), "{role}: {statement}");
    }
    assert_eq!(service.state().await, before);
    let mark = "UPDATE logistics.outbox SET published_at = now() WHERE published_at IS NULL";
    assert_eq!(try_as(&service, RELAY, mark).await, Ok(1));
}

#[tokio::test]
async fn partitions_are_made_ahead_by_the_relay_and_by_several_at_once() {
    let service = TestService::start().await;
    let calls = (0..8).map(|_| try_as(&service, RELAY, "SELECT logistics.ensure_outbox_partitions(20)"));
    for call in join_all(calls).await {
        call.unwrap();
    }
    let partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'logistics.outbox'::regclass";
    assert_eq!(service.count(partitions).await, 1 + 21);
    service.create(3).await;
    assert_eq!(
        service
            .count("SELECT count(*) FROM ONLY logistics.outbox_default")
            .await,
        0
    );
}

#[tokio::test]
async fn a_missing_partition_never_fails_a_request_and_its_day_stays_in_the_default() {
    let service = TestService::start().await;
    let drop_all = "DO $$ DECLARE part regclass; BEGIN
        FOR part IN SELECT inhrelid::regclass FROM pg_inherits
                     WHERE inhparent = 'logistics.outbox'::regclass
                       AND inhrelid <> 'logistics.outbox_default'::regclass
        LOOP EXECUTE format('DROP TABLE %s', part); END LOOP; END $$";
    sqlx::raw_sql(drop_all).execute(&service.owner).await.unwrap();
    service.create(3).await;
    let in_default = "SELECT count(*) FROM logistics.outbox_default";
    assert_eq!(service.count(in_default).await, 3);
    // Today is skipped, the days after it are made.
    let made = "SELECT logistics.ensure_outbox_partitions(2)::bigint";
    assert_eq!(service.count(made).await, 2);
    service.create(2).await;
    assert_eq!(service.count(in_default).await, 5);
    service.assert_events_match_shipments().await;
}
