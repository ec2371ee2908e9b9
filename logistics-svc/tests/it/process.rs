use std::{process::Command, time::Duration};

use devstack::{
    database::LOGISTICS,
    ports,
    testing::{Service, TestDatabase, TestServers, binary},
};

use crate::service::test_database;

const DEADLINE: Duration = Duration::from_secs(30);

fn run(args: &[&str], env: &[(&str, &str)]) -> (Option<i32>, String) {
    let output = Command::new(binary("logistics-svc").unwrap())
        .args(args)
        .env_clear()
        .envs(env.iter().copied())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

fn unused_address() -> String {
    format!("127.0.0.1:{}", ports::reserve().unwrap())
}

#[tokio::test]
async fn mistakes_end_the_process_with_the_documented_code() {
    let nowhere = format!("postgres://postgres@{}/shop", unused_address());
    let (code, text) = run(&["migrate", "--logistics-migration-database-url", &nowhere], &[]);
    assert_eq!(code, Some(3), "{text}");
    let (code, text) = run(&["api", "--max-event-bytes", "1"], &[]);
    assert_eq!(code, Some(2), "{text}");
    let (code, text) = run(&["api"], &[("LOGISTICS_LISTEN", "203.0.113.1:1")]);
    assert_eq!(code, Some(2), "{text}");
    let (code, text) = run(
        &["config", "show"],
        &[("LOGISTICS_DATABASE_URL", "postgres://u:hunter2@h/d")],
    );
    assert_eq!(code, Some(0), "{text}");
    assert!(
        text.contains("postgres://u:***@h/d") && !text.contains("hunter2"),
        "{text}"
    );
}

#[tokio::test]
async fn a_schema_that_is_behind_refuses_the_start_and_migrate_repairs_it() {
    let servers = TestServers::from_env().unwrap();
    let database = TestDatabase::create(&servers, "empty", "0", async |_| Ok(()))
        .await
        .unwrap();
    let listen = unused_address();
    let url = database.url_for(LOGISTICS).unwrap();
    let env = [
        ("LOGISTICS_DATABASE_URL", url.as_str()),
        ("LOGISTICS_LISTEN", listen.as_str()),
    ];
    let (code, text) = run(&["api"], &env);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("migration"), "{text}");

    let owner = database.superuser_url();
    let owner = [("LOGISTICS_MIGRATION_DATABASE_URL", owner.as_str())];
    let migrations: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn({
                let owner = owner.map(|(name, value)| (name, value.to_owned()));
                move || {
                    run(
                        &["migrate"],
                        &owner.each_ref().map(|(name, value)| (*name, value.as_str())),
                    )
                }
            })
        })
        .collect();
    for migration in migrations {
        let (code, text) = migration.join().unwrap();
        assert_eq!(code, Some(0), "{text}");
    }
    let mut service = Service::spawn(&binary("logistics-svc").unwrap(), &["api"], &env).unwrap();
    service
        .wait_ready(&format!("http://{listen}/health/ready"), DEADLINE)
        .await
        .unwrap();
    assert_eq!(service.terminate(DEADLINE).await.unwrap().code(), Some(143));
}

#[tokio::test]
async fn a_process_whose_database_is_away_lives_on_and_says_what_is_missing() {
    let (listen, nowhere) = (unused_address(), unused_address());
    let url = format!("postgres://logistics_svc@{nowhere}/shop");
    let env = [
        ("LOGISTICS_DATABASE_URL", url.as_str()),
        ("LOGISTICS_LISTEN", listen.as_str()),
    ];
    let mut service = Service::spawn(&binary("logistics-svc").unwrap(), &["api"], &env).unwrap();
    service
        .wait_ready(&format!("http://{listen}/health/live"), DEADLINE)
        .await
        .unwrap();
    let not_ready = service
        .wait_ready(&format!("http://{listen}/health/ready"), Duration::from_secs(2))
        .await;
    let said = format!("{:#}", not_ready.unwrap_err());
    assert!(said.contains("schema"), "{said}");
    assert_eq!(service.exited().unwrap(), None);
    assert_eq!(service.terminate(DEADLINE).await.unwrap().code(), Some(143));
}

#[tokio::test]
async fn metrics_tell_changes_and_latencies() {
    let database = test_database().await.unwrap();
    let listen = unused_address();
    let url = database.url_for(LOGISTICS).unwrap();
    let env = [
        ("LOGISTICS_DATABASE_URL", url.as_str()),
        ("LOGISTICS_LISTEN", listen.as_str()),
    ];
    let mut service = Service::spawn(&binary("logistics-svc").unwrap(), &["api"], &env).unwrap();
    service
        .wait_ready(&format!("http://{listen}/health/ready"), DEADLINE)
        .await
        .unwrap();
    let client = reqwest::Client::new();
    let created = client
        .post(format!("http://{listen}/v1/shipments"))
        .header("content-type", "application/json")
        .body(crate::service::new_shipment("1").to_string())
        .send()
        .await
        .unwrap();
    assert_eq!(created.status().as_u16(), 201);
    // Off unless it is asked for.
    let load_test = client.post(format!("http://{listen}/load-test/outbox")).send();
    assert_eq!(load_test.await.unwrap().status().as_u16(), 404);
    let metrics = client
        .get(format!("http://{listen}/metrics"))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    for expected in [
        "shipments_changed_total{event_type=\"ShipmentCreated\"",
        "flow_stage_duration_seconds_bucket{stage=\"commit\"",
        "http_server_request_duration_seconds_bucket{http_request_method=\"POST\"",
    ] {
        assert!(metrics.contains(expected), "{expected} is missing in\n{metrics}");
    }
    assert_eq!(service.terminate(DEADLINE).await.unwrap().code(), Some(143));
}
