//! The operators' commands: the real binary, over a socket, on a consumer at work.

use std::{
    io::Read,
    process::{Child, Command, Stdio},
};

use axum::Router;
use clap::Parser;
use commerce_consumer::http::{self, Api};
use devstack::ports;
use serde_json::{Value, json};
use service_runtime::http::HttpSettings;
use shared_events::Envelope;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    consuming::Consuming,
    stage::{OPERATOR_TOKEN, Parcel, Stage, VIEWER_TOKEN, until},
};

#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    http: HttpSettings,
}

/// A consumer at work, and the address where its API answers.
struct Shop<'a> {
    stage: &'a Stage,
    consuming: Consuming<'a>,
    url: String,
    stop: CancellationToken,
}

pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    fn lines(&self) -> Vec<Value> {
        let parsed = self.out.lines().map(serde_json::from_str);
        parsed
            .collect::<Result<_, _>>()
            .unwrap_or_else(|_| panic!("{}", self.out))
    }

    pub(crate) fn ends(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        self
    }
}

impl<'a> Shop<'a> {
    async fn open(stage: &'a Stage) -> Self {
        let consuming = Consuming::start(stage, "none").await;
        let api = Api {
            pool: stage.pool.clone(),
            group: "commerce".to_owned(),
        };
        let settings = Defaults::parse_from(["test"]).http;
        let app = http::app(api, consuming.admin.clone(), Router::new(), &settings);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        tokio::spawn({
            let stop = stop.clone();
            async move { service_runtime::http::serve(listener, app, &settings, stop).await }
        });
        Self {
            stage,
            consuming,
            url,
            stop,
        }
    }

    /// So many dead letters, each of a shipment of its own.
    async fn with_dead_letters(stage: &'a Stage, number: usize) -> (Self, Vec<Envelope>) {
        let shop = Self::open(stage).await;
        let mut dead = Vec::new();
        for parcel in 1..=number {
            let mut parcel = Parcel::new(&parcel.to_string(), "10248", &[("11", 13)]);
            shop.consuming.send(&parcel.created()).await;
            dead.push(parcel.completed());
            shop.consuming.send(dead.last().unwrap()).await;
        }
        shop.holds(number).await;
        (shop, dead)
    }

    async fn holds(&self, number: usize) {
        let held = "SELECT count(*) FROM commerce.held_keys WHERE state = 'dead'";
        until("the held keys", async || {
            self.stage.number(held).await == i64::try_from(number).unwrap()
        })
        .await;
    }

    fn command(&self, token: &str, args: &[&str]) -> Command {
        command(&self.url, token, args)
    }

    async fn run(&self, args: &[&str]) -> Said {
        said(self.command(OPERATOR_TOKEN, args)).await
    }

    async fn actions(&self) -> i64 {
        self.stage
            .number("SELECT count(*) FROM commerce.operator_actions")
            .await
    }

    /// What was ordered is enlarged, so that one parcel of 13 may ship.
    async fn repair(&self) {
        self.stage
            .as_owner("UPDATE commerce.order_lines SET quantity = 13 WHERE order_id = '10248' AND sku = '11'")
            .await;
        self.stage
            .as_owner("UPDATE commerce.products SET committed = committed + 1 WHERE sku = '11'")
            .await;
    }

    async fn close(self) {
        self.stop.cancel();
        self.consuming.stop().await;
        self.stage.assert_books_balance().await;
    }
}

pub(crate) fn command(url: &str, token: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_commerce-consumer"));
    command
        .args(args)
        .env_clear()
        .env("COMMERCE_ADMIN_URL", url)
        .env("ADMIN_TOKEN", token)
        .stdin(Stdio::null());
    command
}

pub(crate) async fn said(mut command: Command) -> Said {
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .unwrap()
        .unwrap();
    Said {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_shown_for_people_and_as_json_lines() {
    let stage = Stage::with_sample().await;
    let (shop, dead) = Shop::with_dead_letters(&stage, 3).await;
    let id = dead[0].id.to_string();

    let groups = shop
        .run(&["dead-letters", "groups", "--state", "open", "--json"])
        .await
        .ends(0);
    let groups = groups.lines();
    assert_eq!(
        (groups.len(), &groups[0]["letters"], &groups[0]["error_type"]),
        (1, &json!(3), &json!("ships_too_many"))
    );
    let list = shop
        .run(&["dead-letters", "list", "--limit", "2", "--json"])
        .await
        .ends(0);
    let died: Vec<String> = list
        .lines()
        .iter()
        .map(|letter| letter["last_died_at"].to_string())
        .collect();
    assert!(died.len() == 2 && died[0] >= died[1], "the latest first: {died:?}");
    assert!(list.err.contains("there are more"), "{}", list.err);
    let list = shop
        .run(&[
            "dead-letters",
            "list",
            "--all",
            "--aggregate-id",
            "1",
            "--json",
            "--quiet",
        ])
        .await
        .ends(0);
    assert_eq!(
        (&list.lines()[0]["id"], list.lines().len(), &*list.err),
        (&json!(id), 1, "")
    );
    let count = shop
        .run(&["dead-letters", "count", "--from", "1h", "--json"])
        .await
        .ends(0);
    assert_eq!(
        count.lines(),
        [json!({"letters": 3, "open": 3, "redriving": 0, "resolved": 0, "at_least": false})]
    );
    let letter = shop.run(&["dead-letters", "show", &id, "--json"]).await.ends(0);
    assert_eq!(letter.lines()[0]["record_value"], dead[0].encode().unwrap());
    let keys = shop
        .run(&["held-keys", "list", "--state", "dead", "--limit", "1", "--json"])
        .await
        .ends(0);
    assert_eq!((keys.lines().len(), &keys.lines()[0]["event_id"]), (1, &json!(id)));

    let list = shop.run(&["dead-letters", "list"]).await.ends(0);
    let lines: Vec<&str> = list.out.lines().collect();
    assert_eq!(lines.len(), 4, "{}", list.out);
    let at = |line: &str, word: &str| line.find(word).unwrap_or_else(|| panic!("{line}"));
    assert_eq!(at(lines[0], "STATE"), at(lines[1], "open"), "aligned: {}", list.out);
    assert_eq!(at(lines[0], "ERROR"), at(lines[3], "ships_too_many:"), "{}", list.out);
    assert!(!list.out.contains('\u{1b}'), "no colour without a terminal");
    let letter = shop.run(&["dead-letters", "show", &id]).await.ends(0);
    assert!(
        letter.out.contains("permanent ships_too_many") && letter.out.contains("\"sequence\": 2"),
        "{}",
        letter.out
    );
    let none = shop
        .run(&["dead-letters", "list", "--type", "ShipmentHeld"])
        .await
        .ends(0);
    assert_eq!((&*none.out, &*none.err), ("", "no dead letter matches\n"));

    // A reader that has read enough.
    let mut child = shop
        .command("", &["dead-letters", "list", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let (status, err) = tokio::task::spawn_blocking(move || ended(&mut child)).await.unwrap();
    assert_eq!((status, &*err), (Some(0), ""), "a closed pipe ends quietly");
    shop.close().await;
}

fn ended(child: &mut Child) -> (Option<i32>, String) {
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    (child.wait().unwrap().code(), err)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_changes_without_consent_and_a_role_and_with_them_the_letter_takes_effect() {
    let stage = Stage::with_sample().await;
    let (shop, dead) = Shop::with_dead_letters(&stage, 1).await;
    let id = dead[0].id.to_string();

    let skip = ["dead-letters", "skip", &id, "--reason", "of no use"];
    let refused = shop.run(&skip).await.ends(2);
    assert!(
        refused.err.contains("1 open dead letter") && refused.err.contains("--yes"),
        "{}",
        refused.err
    );
    let looked = shop.run(&[&skip[..], &["--dry-run"]].concat()).await.ends(0);
    assert!(
        looked.out.contains(&id) && looked.out.contains("nothing was changed"),
        "{}",
        looked.out
    );
    let yes = [&skip[..], &["--yes"]].concat();
    let wrong = said(shop.command("not-one-of-the-tokens", &yes)).await.ends(2);
    assert_eq!(
        wrong.err,
        "error: A token is needed\n  why: the token is not known\n  \
         try: set ADMIN_TOKEN or --token-file to one of the tokens that the service's ADMIN_TOKENS names\n"
    );
    let viewer = said(shop.command(VIEWER_TOKEN, &yes)).await.ends(2);
    assert!(viewer.err.contains("needs the role operator"), "{}", viewer.err);
    assert_eq!(shop.actions().await, 0, "nothing was changed");

    // An empty reason, and neither id nor filter: the service's own words, by the option that was typed.
    let wrong = shop
        .run(&["dead-letters", "redrive", &id, "--reason", "", "--yes"])
        .await
        .ends(2);
    assert!(
        wrong.err.contains("why: --reason (/reason): must have 1 to 500 bytes"),
        "{}",
        wrong.err
    );
    let wrong = shop
        .run(&["dead-letters", "redrive", "--reason", "x", "--yes"])
        .await
        .ends(2);
    assert!(wrong.err.contains("at least one field of a filter"), "{}", wrong.err);
    let wrong = shop
        .run(&["dead-letters", "redrive", &id, "--type", "x", "--reason", "x", "--yes"])
        .await
        .ends(2);
    assert!(wrong.err.contains("cannot be used with"), "{}", wrong.err);
    assert_eq!(shop.actions().await, 0, "nothing was changed");

    shop.repair().await;
    let unknown = "01a20369-a68f-767c-a83a-078a525f0194";
    let redrive = [
        "dead-letters",
        "redrive",
        &id,
        unknown,
        "--reason",
        "13 were ordered",
        "--yes",
        "--json",
    ];
    let done = shop.run(&redrive).await.ends(4);
    assert_eq!(
        (&done.lines()[0]["matched"], &done.lines()[0]["decided"]),
        (&json!(1), &json!(1))
    );
    assert!(done.err.contains(unknown), "what is left is named: {}", done.err);
    until("the shipment", async || {
        stage
            .number("SELECT count(*) FROM commerce.shipments WHERE sequence = 2")
            .await
            == 1
    })
    .await;
    let actions = shop.run(&["actions", "list", "--json"]).await.ends(0);
    assert_eq!(
        (&actions.lines()[0]["actor"], &actions.lines()[0]["reason"]),
        (&json!("olga"), &json!("13 were ordered"))
    );
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_is_followed_to_its_end_and_its_exit_code_says_how_it_ended() {
    let stage = Stage::with_sample().await;
    let (shop, dead) = Shop::with_dead_letters(&stage, 1).await;
    let begin = [
        "redrives",
        "begin",
        "--error-type",
        "ships_too_many",
        "--reason",
        "repaired",
    ];
    let yes = [&begin[..], &["--yes", "--json"]].concat();

    shop.run(&begin).await.ends(2);
    let looked = shop.run(&[&begin[..], &["--dry-run", "--json"]].concat()).await.ends(0);
    assert_eq!(looked.lines()[0]["matched"], 1);
    let wrong = shop.run(&[&yes[..], &["--canary", "0"]].concat()).await.ends(2);
    assert!(
        wrong.err.contains("--canary (/canary): must be 1 to 10000"),
        "{}",
        wrong.err
    );
    assert_eq!(stage.number("SELECT count(*) FROM commerce.redrive_jobs").await, 0);

    // The repair was forgotten.
    let failed = shop.run(&yes).await.ends(99);
    assert_eq!(
        (&failed.lines()[0]["state"], &failed.lines()[0]["died_again"]),
        (&json!("failed"), &json!(1))
    );
    assert!(
        failed.err.contains("0/1 settled") && failed.err.contains("it gave up"),
        "{}",
        failed.err
    );
    shop.holds(1).await;

    // It does not go on while the group is paused, so that it can be interrupted and cancelled.
    shop.run(&["consumer", "pause", "--reason", "a look", "--yes"])
        .await
        .ends(0);
    let mut child = shop
        .command(OPERATOR_TOKEN, &yes)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("the redrive", async || {
        stage
            .number("SELECT count(*) FROM commerce.redrive_jobs WHERE ended_at IS NULL")
            .await
            == 1
    })
    .await;
    let mut begun = [0; 1_024];
    let stderr = child.stderr.as_mut().unwrap();
    let mut told = String::new();
    while !told.contains("settled") {
        let read = stderr.read(&mut begun).unwrap();
        assert!(read > 0, "{told}");
        told.push_str(&String::from_utf8_lossy(&begun[..read]));
    }
    let interrupted = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(interrupted.success());
    let (code, err) = tokio::task::spawn_blocking(move || ended(&mut child)).await.unwrap();
    assert_eq!(code, Some(130), "{err}");
    assert!(
        err.contains("redrives follow") && err.contains("redrives cancel"),
        "{err}"
    );
    let list = shop.run(&["redrives", "list", "--limit", "1", "--json"]).await.ends(0);
    let job = list.lines()[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(list.lines()[0]["state"], "canary", "it goes on");
    let cancelled = shop
        .run(&["redrives", "cancel", &job, "--reason", "too early", "--yes", "--json"])
        .await
        .ends(0);
    assert_eq!(cancelled.lines()[0]["state"], "cancelled");
    let followed = shop.run(&["redrives", "follow", &job]).await.ends(4);
    assert!(followed.out.contains("cancelled by olga"), "{}", followed.out);

    shop.repair().await;
    shop.run(&["consumer", "resume", "--reason", "looked"]).await.ends(0);
    let done = shop.run(&yes).await.ends(0);
    assert_eq!(
        (&done.lines()[0]["state"], &done.lines()[0]["took_effect"]),
        (&json!("succeeded"), &json!(1))
    );
    assert_eq!(done.lines().len(), 1, "one object per line: {}", done.out);
    let letter = shop
        .run(&["dead-letters", "show", &dead[0].id.to_string(), "--json"])
        .await
        .ends(0);
    assert_eq!(letter.lines()[0]["state"], "resolved");
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_consumer_is_looked_at_paused_slowed_down_and_let_go_again() {
    let stage = Stage::with_sample().await;
    let shop = Shop::open(&stage).await;
    let limits = ["consumer", "limits", "--live", "300", "--reason", "slowly now"];
    shop.run(&limits).await.ends(2);
    shop.run(&["consumer", "pause", "--reason", "x", "--dry-run"])
        .await
        .ends(0);
    shop.run(&["consumer", "limits", "--live", "300"]).await.ends(2);
    assert_eq!(shop.actions().await, 0, "nothing was changed");
    let slower = shop.run(&[&limits[..], &["--yes", "--json"]].concat()).await.ends(0);
    assert_eq!(slower.lines()[0]["limits"][0]["rate"], "300");
    assert!(slower.err.contains("live from 5000 to 300"), "{}", slower.err);
    let wrong = shop
        .run(&["consumer", "limits", "--retry", "fast", "--reason", "x", "--yes"])
        .await
        .ends(2);
    assert!(wrong.err.contains("--retry (/retry)"), "{}", wrong.err);
    let now = shop.run(&["consumer", "limits"]).await.ends(0);
    assert!(now.out.starts_with("limit, live  300"), "{}", now.out);

    shop.run(&["consumer", "pause", "--reason", "stocktaking", "--yes"])
        .await
        .ends(0);
    let paused = shop.run(&["consumer", "status"]).await.ends(0);
    assert!(paused.out.contains("paused by a person  stocktaking"), "{}", paused.out);
    let resumed = shop
        .run(&["consumer", "resume", "--reason", "counted", "--json"])
        .await
        .ends(0);
    assert_eq!(resumed.lines()[0]["paused_by_operator"], Value::Null);
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_away_or_asked_wrongly_is_told_apart_by_the_exit_code() {
    let stage = Stage::empty().await;
    let shop = Shop::open(&stage).await;
    let broken = shop.run(&["dead-letters", "list", "--state", "gone"]).await.ends(2);
    let why = "error: The request cannot be read\n  why: --state (#query/state): is not one of open, ";
    assert!(broken.err.starts_with(why), "{}", broken.err);
    assert!(
        broken
            .err
            .ends_with("  try: correct that value; --help says what it may be\n"),
        "{}",
        broken.err
    );
    let broken = shop.run(&["dead-letters", "list", "--from", "yesterday"]).await.ends(2);
    assert!(broken.err.contains("2026-11-22T05:00:00Z"), "{}", broken.err);
    shop.run(&["dead-letters", "list", "--colour", "red"]).await.ends(2);
    let unknown = "01a20369-a68f-767c-a83a-078a525f0194";
    let missing = shop.run(&["dead-letters", "show", unknown]).await.ends(2);
    assert!(missing.err.contains("There is no such dead letter"), "{}", missing.err);
    let verbose = shop.run(&["dead-letters", "show", unknown, "--verbose"]).await.ends(2);
    assert!(
        verbose.err.contains("beneath: HTTP 404, code dead-letter-not-found"),
        "{}",
        verbose.err
    );
    let wrong = shop
        .run(&["actions", "list", "--url", "http://olga:secret@127.0.0.1:1"])
        .await
        .ends(2);
    assert!(
        wrong.err.contains("carries a login") && !wrong.err.contains("secret"),
        "{}",
        wrong.err
    );
    let wrong = shop
        .run(&["actions", "list", "--token-file", "/nowhere/token"])
        .await
        .ends(2);
    assert!(wrong.err.contains("/nowhere/token cannot be read"), "{}", wrong.err);

    // Nobody listens where somebody did.
    let nowhere = format!("http://127.0.0.1:{}", ports::reserve().unwrap());
    for args in [
        &["dead-letters", "list"][..],
        &["dead-letters", "skip", unknown, "--reason", "x", "--yes"],
        &["redrives", "follow", unknown],
        &["consumer", "resume", "--reason", "x"],
    ] {
        let away = said(command(&nowhere, OPERATOR_TOKEN, args)).await.ends(3);
        assert!(
            away.err.contains(&format!("error: {nowhere}/ cannot be reached")),
            "{}",
            away.err
        );
        assert!(
            away.err.contains("Connection refused") && away.err.contains("COMMERCE_ADMIN_URL"),
            "{}",
            away.err
        );
        assert_eq!(away.out, "");
    }
    shop.close().await;
}
