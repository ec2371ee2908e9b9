use outbox::{AfterCommit, Mode};
use tokio_util::sync::CancellationToken;

use crate::stage::{Stage, first_seen, sequences};

/// HAZARDS H26, H27: the hint is only a hint.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_are_published_at_once_and_lost_hints_are_swept() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let (settings, pool, kafka) = stage.relay_parts(|settings| settings.mode = Mode::AfterCommit)?;
    let (publisher, hints) = AfterCommit::new(settings, pool, kafka);
    let stop = CancellationToken::new();
    let publishing = tokio::spawn(publisher.run(stop.clone()));
    let relay = stage
        .start_relay_with(|settings| settings.mode = Mode::AfterCommit)
        .await?;

    for sequence in 1..=200 {
        let event = Stage::event("k", sequence);
        let mut tx = stage.pool.begin().await?;
        stage.append(&mut tx, std::slice::from_ref(&event)).await?;
        let place = hints.reserve(std::slice::from_ref(&event));
        tx.commit().await?;
        // As a crash between commit and hint leaves it.
        if sequence % 50 == 0 {
            drop(place);
        } else {
            place.committed();
        }
    }
    let mut rolled_back = stage.pool.begin().await?;
    let never = Stage::event("never", 1);
    stage.append(&mut rolled_back, std::slice::from_ref(&never)).await?;
    drop(hints.reserve(std::slice::from_ref(&never)));
    rolled_back.rollback().await?;

    stage.all_marked().await?;
    let records = stage
        .read_until(|records| first_seen(&sequences(records, "k")).len() == 200)
        .await?;
    assert_eq!(
        first_seen(&sequences(&records, "k")),
        (1..=200).collect::<Vec<_>>(),
        "what follows a lost hint waits for it"
    );
    assert!(sequences(&records, "never").is_empty());
    println!("{} records for 200 events", records.len());
    stop.cancel();
    publishing.await?;
    relay.stop().await
}
