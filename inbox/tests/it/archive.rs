use inbox::operator::{Decision, LetterFilter, Shelving};
use sqlx::query_scalar;
use uuid::Uuid;

use crate::stage::{ANN, NEVER, Stage, event, until};

fn in_state(state: &str) -> LetterFilter {
    LetterFilter {
        state: Some(state.to_owned()),
        ..LetterFilter::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn archived_letters_are_out_of_sight_until_they_are_restored_as_they_were() {
    let stage = Stage::new(&[]).await;
    let operator = stage.operator();
    let engine = stage.engine().await;
    let (open, skipped) = (event(NEVER, "a", 1), event(NEVER, "b", 1));
    stage.send_events([&open, &skipped]).await;
    stage.send(None, Some(b"no event"), None, &[]).await;
    let all = LetterFilter::default();
    until("all letters", async || operator.count(&all).await.unwrap() == 3).await;
    operator.decide(&[skipped.id], Decision::Skip, ANN).await.unwrap();
    until("the skipped one", async || {
        operator.count(&in_state("resolved")).await.unwrap() == 1
    })
    .await;
    engine.stop().await;

    let letters = operator.letters(&all, None, 10).await.unwrap();
    let unreadable = letters.iter().find(|letter| letter.aggregate_id.is_none()).unwrap().id;
    let mut meant = vec![skipped.id, unreadable];
    meant.sort();
    let mut selected = operator.select_for(Shelving::Archive, &all, 10).await.unwrap();
    selected.sort();
    assert_eq!(selected, meant, "not the one that holds its key");
    let ids = [open.id, skipped.id, unreadable];
    assert_eq!(operator.possible_for(Shelving::Archive, &ids).await.unwrap(), meant);
    assert_eq!(operator.shelve(&ids, Shelving::Archive, ANN).await.unwrap(), meant);
    assert!(operator.shelve(&ids, Shelving::Archive, ANN).await.unwrap().is_empty());

    let seen = async |filter: &LetterFilter| -> Vec<Uuid> {
        let rows = operator.letters(filter, None, 10).await.unwrap();
        let groups = operator.groups(filter).await.unwrap();
        let grouped: i64 = groups.iter().map(|group| group.letters).sum();
        assert_eq!(
            (rows.len() as i64, grouped),
            (grouped, operator.count(filter).await.unwrap())
        );
        let mut ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
        ids.sort();
        ids
    };
    assert_eq!(seen(&all).await, [open.id]);
    assert!(seen(&in_state("resolved")).await.is_empty());
    assert_eq!(seen(&in_state("archived")).await, meant);
    let letter = operator.letter(skipped.id).await.unwrap().unwrap();
    assert_eq!(
        (&*letter.row.state, letter.row.archived_at.is_some()),
        ("archived", true)
    );

    assert!(operator.select_for(Shelving::Restore, &all, 10).await.unwrap().len() == 2);
    assert_eq!(operator.shelve(&ids, Shelving::Restore, ANN).await.unwrap(), meant);
    assert_eq!(seen(&in_state("resolved")).await, [skipped.id]);
    assert_eq!(seen(&in_state("open")).await.len(), 2);
    let actions: Vec<String> = operator
        .actions(None, 10)
        .await
        .unwrap()
        .into_iter()
        .map(|action| action.action)
        .collect();
    assert_eq!(
        actions,
        ["restore", "archive", "skip"],
        "what changed nothing is no action"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn archived_letters_are_deleted_with_their_attempts_after_their_retention_and_nothing_else_is() {
    let stage = Stage::new(&[]).await;
    // More than one batch of them.
    let old: i64 = 700;
    for (name, letters, state, archived) in [
        ("old", old, "resolved", "now() - interval '61 minutes'"),
        ("new", 5, "resolved", "now() - interval '50 minutes'"),
        ("resolved", 5, "resolved", "NULL"),
        ("open", 5, "open", "NULL"),
    ] {
        let insert = format!(
            "WITH letters AS (
                 INSERT INTO t.dead_letters
                     (consumer, id, origin_topic, origin_partition, origin_offset, attempts, partition, header_names, header_values,
                      error_class, error_type, error_message, fingerprint, consumer_version, state, holds, archived_at, first_died_at)
                 SELECT $1, gen_random_uuid(), 't', 0, n, 1, 0, '{{}}', '{{}}', 'permanent', '{name}', 'x', 'x', 'x', '{state}', false,
                        {archived}, now() - interval '1 year'
                   FROM generate_series(1, $2) AS n RETURNING id)
             INSERT INTO t.failed_attempts
                 (consumer, event_id, attempt, topic, partition, error_class, error_type, error_message, consumer_version)
             SELECT $1, id, attempt, 't', 0, 'permanent', '{name}', 'x', 'x' FROM letters, generate_series(1, 2) AS attempt"
        );
        sqlx::query(sqlx::AssertSqlSafe(insert))
            .bind(stage.topics.group())
            .bind(letters)
            .execute(&stage.pool)
            .await
            .unwrap();
    }
    let engine = stage.engine().await;
    let left = async |table: &str| -> Vec<String> {
        let select = format!("SELECT error_type || ' ' || count(*) FROM t.{table} GROUP BY error_type ORDER BY 1");
        query_scalar(sqlx::AssertSqlSafe(select))
            .fetch_all(&stage.pool)
            .await
            .unwrap()
    };
    until("the old ones to be gone", async || {
        left("dead_letters").await.len() == 3
    })
    .await;
    engine.stop().await;
    assert_eq!(left("dead_letters").await, ["new 5", "open 5", "resolved 5"]);
    assert_eq!(left("failed_attempts").await, ["new 10", "open 10", "resolved 10"]);
}
