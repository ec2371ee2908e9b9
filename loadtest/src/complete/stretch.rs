use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::{latency::Quantiles, load, usage::Usage};

/// Parts of the time.
const STRETCHES: usize = 10;
/// By what share a process may be larger in the last part than in the third, when the load has met every path of it.
const GROWTH: f64 = 0.2;
/// Which part that is, counted from 0.
const SETTLED: usize = 2;

/// A tenth of the time after the warm-up.
#[derive(Debug, Serialize)]
pub struct Stretch {
    /// Seconds after the warm-up.
    pub from: usize,
    pub to: usize,
    pub response: Quantiles,
    /// From logistics' commit to commerce's, of what was committed then; only of the pair.
    pub applied: Option<Quantiles>,
    /// Largest resident memory of each process, in KiB.
    pub resident_kib: Vec<(String, u64)>,
}

/// The seconds of a load in ten parts, or fewer if it has fewer seconds.
///
/// # Errors
/// Never in practice: all histograms have the same bounds.
pub(super) fn of(seconds: &[load::Second]) -> anyhow::Result<Vec<Stretch>> {
    let count = seconds.len().min(STRETCHES);
    let bound = |number: usize| number * seconds.len() / count;
    let stretch = |number: usize| {
        let (from, to) = (bound(number), bound(number + 1));
        Ok(Stretch {
            from,
            to,
            response: Quantiles::of(&sum(seconds[from..to].iter().map(|second| &second.response))?),
            applied: None,
            resident_kib: Vec::new(),
        })
    };
    (0..count).map(stretch).collect()
}

pub(super) fn note_applied(stretches: &mut [Stretch], by_second: &[Histogram<u64>]) -> anyhow::Result<()> {
    for stretch in stretches {
        stretch.applied = Some(Quantiles::of(&sum(&by_second[stretch.from..stretch.to])?));
    }
    Ok(())
}

fn sum<'a>(histograms: impl IntoIterator<Item = &'a Histogram<u64>>) -> anyhow::Result<Histogram<u64>> {
    let mut sum = load::histogram()?;
    for histogram in histograms {
        sum.add(histogram)?;
    }
    Ok(sum)
}

/// `warm_up` is what the processes were watched for before the first part.
pub(super) fn note_memory(stretches: &mut [Stretch], usages: &[Usage], warm_up: Duration) {
    for stretch in stretches {
        for usage in usages {
            let within = |at: f64| (stretch.from as f64..stretch.to as f64).contains(&(at - warm_up.as_secs_f64()));
            let moments = usage.series.iter().filter(|moment| within(moment.at));
            if let Some(largest) = moments.filter_map(|moment| moment.resident_kib).max() {
                stretch.resident_kib.push((usage.process.clone(), largest));
            }
        }
    }
}

/// Processes that keep growing, in words. One that was started again has no past to be compared with.
pub(super) fn growth(stretches: &[Stretch], usages: &[Usage]) -> Vec<String> {
    let of = |stretch: Option<&Stretch>, process: &str| {
        let known = stretch?.resident_kib.iter().find(|(other, _)| other == process)?;
        Some(known.1 as f64 / 1024.0)
    };
    let grown = |usage: &Usage| {
        let process = &usage.process;
        let (before, after) = (of(stretches.get(SETTLED), process), of(stretches.last(), process));
        match before.zip(after) {
            None => Some(format!("the memory of {process} is not known")),
            Some((before, after)) => (after > before * (1.0 + GROWTH))
                .then(|| format!("{process} has grown from {before:.1} to {after:.1} MiB")),
        }
    };
    usages
        .iter()
        .filter(|usage| usage.lives == 1)
        .filter_map(grown)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::Moment;

    fn seconds(count: usize) -> Vec<load::Second> {
        let second = |number: usize| {
            let mut response = load::histogram().unwrap();
            response.record(1_000 * (number as u64 + 1)).unwrap();
            load::Second {
                offered: 1,
                answered: 1,
                failed: 0,
                response,
            }
        };
        (0..count).map(second).collect()
    }

    #[test]
    fn the_time_is_cut_into_ten_parts() {
        let bounds = |count| -> Vec<(usize, usize)> {
            let stretches = of(&seconds(count)).unwrap();
            stretches.iter().map(|stretch| (stretch.from, stretch.to)).collect()
        };
        assert_eq!(bounds(25).len(), 10);
        assert_eq!(bounds(25)[..2], [(0, 2), (2, 5)]);
        assert_eq!(bounds(25)[9], (22, 25));
        assert_eq!(bounds(3), [(0, 1), (1, 2), (2, 3)]);
        assert_eq!(bounds(0), []);
        let stretches = of(&seconds(20)).unwrap();
        assert_eq!(stretches[9].response.count, 2);
        assert!(stretches[9].response.p50 > stretches[0].response.p50);
    }

    #[test]
    fn a_process_that_keeps_growing_is_named() {
        let usage = |name: &str, per_second: u64, lives| Usage {
            process: name.to_owned(),
            lives,
            series: (0..15)
                .map(|at| Moment {
                    at: at as f64,
                    resident_kib: Some(10_240 + per_second * at),
                    cpu_seconds: None,
                })
                .collect(),
            ..Usage::default()
        };
        let mut stretches = of(&seconds(10)).unwrap();
        let usages = [
            usage("steady", 10, 1),
            usage("leaking", 1_024, 1),
            usage("killed", 1_024, 2),
        ];
        note_memory(&mut stretches, &usages, Duration::from_secs(5));
        assert_eq!(
            stretches[0].resident_kib[1],
            ("leaking".to_owned(), 15_360),
            "the warm-up is left out"
        );
        assert_eq!(growth(&stretches, &usages), ["leaking has grown from 17.0 to 24.0 MiB"]);
        let unseen = [usage("unseen", 0, 1)];
        assert_eq!(growth(&stretches, &unseen), ["the memory of unseen is not known"]);
    }
}
