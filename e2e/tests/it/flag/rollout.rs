use std::time::Duration;

use anyhow::Context;
use e2e::{
    client::Client,
    flag::{ADMIN, Flag},
    pair::{Role, Running},
    place::Place,
    wait_for, workload,
};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::time::Instant;

use super::{PATIENCE, complete, complete_when_created};

const TO_SHADOW: (&str, &str) = ("shadow", "outbox");

/// Each stop condition, met on purpose; and a roll-out that none of them ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_roll_out_that_meets_its_stop_condition_is_taken_back_and_says_why() -> anyhow::Result<()> {
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, 1_000).await?;
    let api = Running::start(&place, Role::Api, &[ADMIN]).await?;
    let relay = Running::start(&place, Role::Relay, &[]).await?;
    let mut consumer = Running::start(&place, Role::Consumer(0), &[]).await?;
    let flag = Flag::new(&api.url(""))?;
    let client = Client::new(&api.url(""), PATIENCE)?;
    let roll_out = async |(mode, rest): (&str, &str), steps: Value, soak: f64, stop: Value| {
        let body = json!({"mode": mode, "rest": rest, "steps": steps, "soak_seconds": soak, "stop": stop,
                          "reason": "drill"});
        let (status, view) = flag
            .ask(reqwest::Method::POST, "/admin/flag/rollout", Some(&body))
            .await?;
        anyhow::ensure!(status == 202, "{status} {view}");
        anyhow::Ok(view)
    };
    let ended = async || {
        wait_for("the roll-out to end", PATIENCE, async || {
            Ok(flag.rollout().await?["state"] != "running")
        })
        .await?;
        flag.rollout().await
    };
    let lenient = json!({"lag_seconds": 60.0, "error_ratio": 0.5, "dead_letters": 0});

    roll_out(TO_SHADOW, json!([1, 10, 50, 100]), 0.2, lenient.clone()).await?;
    let (status, problem) = flag
        .ask(
            reqwest::Method::POST,
            "/admin/flag/rollout",
            Some(&json!({"mode": "legacy", "rest": "outbox", "steps": [1], "soak_seconds": 1, "stop": lenient, "reason": "r"})),
        )
        .await?;
    assert_eq!((status.as_u16(), &problem["code"]), (409, &json!("rollout-runs")));
    let done = ended().await?;
    assert_eq!((&done["state"], &done["step"]), (&json!("done"), &json!(4)), "{done}");
    let view = flag.read("/admin/flag").await?;
    assert_eq!(
        (&view["flag"]["mode"], &view["flag"]["percent"], &view["flag"]["set_by"]),
        (&json!("shadow"), &json!(100.0), &json!("roll-out")),
        "{view}"
    );

    // Where mismatches count, nothing found in nothing proves nothing.
    flag.set(&json!({"mode": "outbox", "reason": "once more"})).await?;
    roll_out(TO_SHADOW, json!([100]), 0.0, json!({"mismatches": 0})).await?;
    wait_for("its step to be in force", PATIENCE, async || {
        let view = flag.read("/admin/flag").await?;
        Ok(view["rollout"]["step"] == 1 && view["in_force"] == true)
    })
    .await?;
    // One that cannot be tried out, because commerce is slow for a moment, proves nothing either.
    let mut orders = 1..400;
    while flag.rollout().await?["state"] == "running" {
        let order = orders.next().context("nothing is compared")?;
        complete_when_created(&client, &owner, order, 1).await?;
    }
    assert_eq!(ended().await?["state"], "done");
    assert!(flag.read("/admin/shadow").await?["compared"].as_i64() > Some(0));

    // Somebody who sets the flag ends it.
    roll_out(TO_SHADOW, json!([1, 100]), 600.0, json!({"dead_letters": 0})).await?;
    wait_for("its first step", PATIENCE, async || {
        Ok(flag.rollout().await?["step"] == 1)
    })
    .await?;
    flag.set(&json!({"mode": "outbox", "reason": "an incident"})).await?;
    assert_eq!(ended().await?["state"], "superseded");

    for condition in ["mismatches", "dead_letters", "lag_seconds", "error_ratio"] {
        let safe = flag
            .set(&json!({"mode": "outbox", "reason": format!("before {condition}")}))
            .await?;
        let limit = match condition {
            "lag_seconds" => json!(1.0),
            "error_ratio" => json!(0.2),
            _ => json!(0),
        };
        // Beside orders that stay synchronous, commerce lags with the others alone.
        let modes = if condition == "lag_seconds" {
            ("outbox", "legacy")
        } else {
            TO_SHADOW
        };
        roll_out(modes, json!([50, 100]), 60.0, json!({condition: limit})).await?;
        match condition {
            "mismatches" => {
                let bug = "CREATE FUNCTION commerce.bug() RETURNS trigger LANGUAGE plpgsql AS $$
                              BEGIN IF session_user = 'commerce_svc' THEN NEW.carrier := 'wrong'; END IF; RETURN NEW; END $$;
                           CREATE TRIGGER bug BEFORE INSERT ON commerce.order_timeline
                              FOR EACH ROW EXECUTE FUNCTION commerce.bug()";
                sqlx::raw_sql(bug).execute(&owner).await?;
            }
            "dead_letters" | "error_ratio" => {}
            _ => consumer.service.sigstop()?,
        }
        let mut order = 10;
        let end = Instant::now() + PATIENCE;
        while flag.rollout().await?["state"] == "running" {
            anyhow::ensure!(Instant::now() < end, "{condition}: it goes on");
            order += 1;
            match condition {
                // Nobody has ordered this.
                "dead_letters" => {
                    let body = json!({"order_id": "none", "warehouse": "main", "carrier": "Speedy",
                                      "lines": [{"sku": "s1", "quantity": 1}]});
                    client.post("/v1/shipments", &body).await?;
                }
                "error_ratio" => break,
                _ => drop(complete(&client, condition.len() as i64 * 50 + order, 1).await?),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if condition == "error_ratio" {
            // Requests cannot lock what somebody else holds, and give up.
            fail_requests(&owner, &api, &flag).await?;
        }
        let rollout = ended().await?;
        let view = flag.read("/admin/flag").await?;
        println!("{condition}: {}", rollout["ended_because"]);
        assert_eq!(rollout["state"], "returned", "{rollout}");
        assert_eq!(
            (&view["flag"]["mode"], &view["flag"]["rollout"]),
            (&json!("outbox"), &rollout["id"]),
            "{view}"
        );
        let reason = view["flag"]["reason"].as_str().context("no reason")?;
        assert!(
            reason.contains(rollout["ended_because"].as_str().context("no cause")?),
            "{reason}"
        );
        assert!(
            rollout["safe_version"].as_i64() >= safe["flag"]["version"].as_i64(),
            "{rollout}"
        );
        match condition {
            "mismatches" => {
                // How long after the first mismatch stood there.
                let after: f64 = sqlx::query_scalar(
                    "SELECT extract(epoch FROM (SELECT max(set_at) FROM logistics.flag_values)
                                             - (SELECT min(found_at) FROM logistics.shadow_mismatches))::float8",
                )
                .fetch_one(&owner)
                .await?;
                println!("  {after:.2} s after the first mismatch was noted");
                sqlx::raw_sql("DROP TRIGGER bug ON commerce.order_timeline")
                    .execute(&owner)
                    .await?;
            }
            "lag_seconds" => consumer.service.sigcont()?,
            _ => {}
        }
    }
    api.stop().await?;
    relay.stop().await?;
    consumer.stop().await
}

/// While no process runs, nobody sees whether a condition is met.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_of_a_roll_out_that_nobody_has_watched_soaks_again() -> anyhow::Result<()> {
    const SOAK: f64 = 2.0;
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    let api = Running::start(&place, Role::Api, &[ADMIN]).await?;
    let flag = Flag::new(&api.url(""))?;
    let body = json!({"mode": "shadow", "rest": "outbox", "steps": [10, 100], "soak_seconds": SOAK, "stop": {"dead_letters": 0},
                      "reason": "drill"});
    let (status, view) = flag
        .ask(reqwest::Method::POST, "/admin/flag/rollout", Some(&body))
        .await?;
    anyhow::ensure!(status == 202, "{status} {view}");
    let reaches = async |step: i64| {
        wait_for("the step to begin", PATIENCE, async || {
            Ok(flag.rollout().await?["step"] == step)
        })
        .await
    };
    reaches(1).await?;
    api.stop().await?;
    // As if that had been last night.
    let night = "UPDATE logistics.flag_rollouts SET step_began_at = now() - interval '8 hours', watched_at = now() - interval '8 hours'";
    sqlx::query(night).execute(&owner).await?;
    let away: time::OffsetDateTime = sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(&owner).await?;

    let api = Running::start(&place, Role::Api, &[ADMIN]).await?;
    reaches(2).await?;
    let query = "SELECT extract(epoch FROM max(set_at) - $1)::float8 FROM logistics.flag_values";
    let soaked: f64 = sqlx::query_scalar(query).bind(away).fetch_one(&owner).await?;
    assert!(soaked >= SOAK, "the next step came {soaked} s after the process");
    api.stop().await
}

/// Asks for what cannot be done, until the roll-out is over.
async fn fail_requests(owner: &PgPool, api: &Running, flag: &Flag) -> anyhow::Result<()> {
    sqlx::raw_sql("ALTER TABLE logistics.shipment_lines ADD CONSTRAINT nothing_more CHECK (quantity < 0) NOT VALID")
        .execute(owner)
        .await?;
    let http = reqwest::Client::new();
    let end = Instant::now() + PATIENCE;
    while flag.rollout().await?["state"] == "running" {
        anyhow::ensure!(Instant::now() < end, "the roll-out goes on");
        let body =
            json!({"order_id": "1", "warehouse": "main", "carrier": "Speedy", "lines": [{"sku": "s1", "quantity": 1}]});
        let answer = http.post(api.url("/v1/shipments")).json(&body).send().await?;
        assert_eq!(answer.status(), 500);
    }
    sqlx::raw_sql("ALTER TABLE logistics.shipment_lines DROP CONSTRAINT nothing_more")
        .execute(owner)
        .await?;
    Ok(())
}
