//! The commands that repair a letter, against answers in the shapes of the API: what they ask for, and what they show.

use std::sync::{Arc, Mutex};

use axum::{
    Json, Router,
    extract::{OriginalUri, State},
    routing::get,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::{
    cli::{Said, command, said},
    stage::OPERATOR_TOKEN,
};

const ID: &str = "01a20369-a68f-767c-a83a-078a525f0194";
const NEW: &str = "01a20369-b111-7000-8000-000000000001";

/// Answers, and remembers the bodies word for word.
#[derive(Clone, Default)]
struct Answers(Arc<Mutex<Vec<(String, String)>>>);

impl Answers {
    async fn serve(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = Router::new()
            .route("/{*path}", get(answer).post(answer))
            .with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        url
    }

    fn asked(&self) -> Vec<(String, String)> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

async fn answer(State(answers): State<Answers>, OriginalUri(uri): OriginalUri, body: String) -> Json<Value> {
    answers.0.lock().unwrap().push((uri.path().to_owned(), body.clone()));
    let asked: Value = serde_json::from_str(&body).unwrap_or_default();
    let event = |quantity: i32| {
        format!(r#"{{"id":"x","payload":{{"weight":1.50,"lines":[{{"sku":"11","quantity":{quantity}}}]}}}}"#)
    };
    Json(match uri.path().rsplit('/').next().unwrap() {
        ID => json!({"id": ID, "state": "open", "record_value": event(13)}),
        "edit" if asked["dry_run"] == true => json!({"dry_run": true, "before": event(13), "after": event(12)}),
        "edit" => json!({"dry_run": false, "id": NEW, "before": event(13), "after": event(12)}),
        "dry-run" => {
            json!({"outcome": "dead_letter", "error_type": "ships_too_many", "error_message": "13 of 12", "changes": []})
        }
        _ => {
            json!({"dry_run": asked["dry_run"], "matched": 1, "changed": i32::from(asked["dry_run"] == false), "ids": [ID]})
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_is_edited_word_for_word_and_nothing_is_sent_without_consent() {
    let answers = Answers::default();
    let url = answers.serve().await;
    let edit = async |editor: &str, more: &[&str]| -> Said {
        let edit = ["dead-letters", "edit", ID, "--reason", "12 were packed"];
        let mut command = command(&url, OPERATOR_TOKEN, &[&edit[..], more].concat());
        command
            .env("EDITOR", editor)
            .env("PATH", std::env::var_os("PATH").unwrap());
        said(command).await
    };
    let correct = "sed -i 's/: 13/: 12/'";
    let looked = edit(correct, &["--dry-run"]).await.ends(0);
    assert!(
        looked.out.contains("-         \"quantity\": 13") && looked.out.contains("+         \"quantity\": 12"),
        "{}",
        looked.out
    );
    edit(correct, &[]).await.ends(2);
    let sent = answers.asked();
    assert!(
        sent.iter().all(|(_, body)| !body.contains("\"dry_run\":false")),
        "{sent:?}"
    );

    let done = edit(correct, &["--yes"]).await.ends(0);
    assert_eq!(done.out.trim(), NEW);
    let sent = answers.asked();
    let last = &sent.last().unwrap().1;
    assert!(
        last.contains("1.50") && last.contains("\"quantity\": 12") && last.contains("\"dry_run\":false"),
        "{last}"
    );

    let unchanged = edit("true", &["--yes"]).await.ends(0);
    assert_eq!(unchanged.err, "nothing was changed\n");
    let broken = edit("sed -i 's/{/[/'", &["--yes"]).await.ends(2);
    assert!(broken.err.contains("what you wrote is in"), "{}", broken.err);
    edit("false", &["--yes"]).await.ends(2);
    assert!(answers.asked().iter().all(|(path, _)| !path.ends_with("/edit")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_archive_and_restore_ask_the_api_for_it() {
    let answers = Answers::default();
    let url = answers.serve().await;
    let run = async |args: &[&str]| said(command(&url, OPERATOR_TOKEN, args)).await;
    let tried = run(&["dead-letters", "dry-run", ID]).await.ends(99);
    assert_eq!(
        tried.out,
        "it would die again: ships_too_many: 13 of 12; nothing was written\n"
    );
    for verb in ["archive", "restore"] {
        answers.asked();
        run(&["dead-letters", verb, ID, "--reason", "x"]).await.ends(2);
        let done = run(&["dead-letters", verb, "--type", "x", "--reason", "x", "--yes"])
            .await
            .ends(0);
        assert!(done.out.starts_with("1 of 1 dead letters are "), "{}", done.out);
        let sent: Vec<Value> = answers
            .asked()
            .iter()
            .map(|(_, body)| serde_json::from_str(body).unwrap())
            .collect();
        assert_eq!(
            sent,
            [
                json!({"ids": [ID], "reason": "x", "dry_run": true}),
                json!({"type": "x", "reason": "x", "dry_run": true}),
                json!({"ids": [ID], "reason": "x", "dry_run": false}),
            ],
            "what was shown is what is decided"
        );
    }
}
