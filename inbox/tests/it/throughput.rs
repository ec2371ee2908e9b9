use inbox::Ordering;

use crate::stage::{Stage, events, until};

/// No threshold: the ratio is printed, and the full run is long enough to mean something.
#[tokio::test(flavor = "multi_thread")]
async fn with_parking_and_without_it_a_backlog_of_good_events_is_drained_side_by_side() {
    let full = std::env::var_os("E2E_FULL").is_some();
    let (pairs, count) = if full { (8, 40_000) } else { (1, 4_000) };
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        // Each is the first one equally often.
        for parks in [pair % 2 == 0, pair % 2 == 1] {
            let rate = drain(parks, count).await;
            let rates = if parks { &mut with } else { &mut without };
            rates.push(rate);
        }
    }
    let ratios: Vec<f64> = with
        .iter()
        .zip(&without)
        .map(|(with, without)| with / without)
        .collect();
    println!("with parking {with:.0?}/s, without {without:.0?}/s, ratios {ratios:.2?}");
    println!(
        "medians: with parking {:.0}/s, without {:.0}/s, ratio of a pair {:.3}",
        median(with),
        median(without),
        median(ratios)
    );
}

/// Events per second, from the first commit to the last.
async fn drain(parks: bool, count: usize) -> f64 {
    let mut stage = Stage::new(&[]).await;
    if !parks {
        stage.ordering = Ordering::None;
    }
    stage.send_events(&events(count, 1_000)).await;
    let engine = stage.engine().await;
    until("every effect", async || stage.effects().await == count as i64).await;
    engine.stop().await;
    stage.assert_once_and_in_order(count as i64).await;
    let micros = stage
        .number(
            "SELECT (extract(epoch FROM max(at) - min(at)) * 1e6)::bigint
               FROM (SELECT pg_xact_commit_timestamp(xmin) AS at FROM t.inbox) AS commit",
        )
        .await;
    count as f64 / micros as f64 * 1e6
}

fn median(mut list: Vec<f64>) -> f64 {
    list.sort_by(f64::total_cmp);
    f64::midpoint(list[(list.len() - 1) / 2], list[list.len() / 2])
}
