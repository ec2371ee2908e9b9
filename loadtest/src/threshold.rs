use std::str::FromStr;

use crate::complete::Completed;

/// A figure and what it must not pass, `p99<25`: the run is not met otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct Threshold {
    figure: Figure,
    below: bool,
    bound: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Figure {
    P50,
    P99,
    Max,
    Rate,
    Failed,
    BrokerP50,
    BrokerP99,
    AppliedP50,
    AppliedP99,
}

const FIGURES: [(&str, Figure); 9] = [
    ("p50", Figure::P50),
    ("p99", Figure::P99),
    ("max", Figure::Max),
    ("rate", Figure::Rate),
    ("failed", Figure::Failed),
    ("broker-p50", Figure::BrokerP50),
    ("broker-p99", Figure::BrokerP99),
    ("applied-p50", Figure::AppliedP50),
    ("applied-p99", Figure::AppliedP99),
];

impl FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let place = text.find(['<', '>']).ok_or("write FIGURE<BOUND or FIGURE>BOUND")?;
        let (name, bound) = (text[..place].trim(), text[place + 1..].trim());
        let figure = FIGURES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, figure)| *figure);
        let figure = figure.ok_or_else(|| {
            let known: Vec<&str> = FIGURES.iter().map(|(known, _)| *known).collect();
            format!("`{name}` is not one of {}", known.join(", "))
        })?;
        Ok(Self {
            figure,
            below: text.as_bytes()[place] == b'<',
            bound: bound.parse().map_err(|_| format!("`{bound}` is not a number"))?,
        })
    }
}

impl Threshold {
    /// How the result misses it; `None` if it does not.
    pub fn missed_by(&self, completed: &Completed) -> Option<String> {
        let applied = completed.commit_to_applied.as_ref();
        let broker = completed.broker.as_ref().map(|broker| &broker.append_to_broker);
        let found = match self.figure {
            Figure::P50 => Some(completed.response.p50),
            Figure::P99 => Some(completed.response.p99),
            Figure::Max => Some(completed.response.max),
            Figure::Rate => Some(completed.achieved),
            Figure::Failed => Some(completed.failed as f64),
            Figure::BrokerP50 => broker.map(|times| times.p50),
            Figure::BrokerP99 => broker.map(|times| times.p99),
            Figure::AppliedP50 => applied.map(|times| times.p50),
            Figure::AppliedP99 => applied.map(|times| times.p99),
        };
        let met = found.is_some_and(|found| {
            if self.below {
                found < self.bound
            } else {
                found > self.bound
            }
        });
        let name = FIGURES
            .iter()
            .find(|(_, figure)| *figure == self.figure)
            .map_or("", |(name, _)| name);
        let sign = if self.below { "below" } else { "above" };
        let found = found.map_or("unknown".to_owned(), |found| format!("{found:.1}"));
        (!met).then(|| format!("threshold: {name} is {found}, wanted {sign} {}", self.bound))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threshold_is_a_figure_a_sign_and_a_bound() {
        let threshold: Threshold = "p99<25".parse().unwrap();
        assert_eq!(
            (threshold.figure, threshold.below, threshold.bound),
            (Figure::P99, true, 25.0)
        );
        assert!(!"rate > 1000".parse::<Threshold>().unwrap().below);
        assert!("p98<1".parse::<Threshold>().unwrap_err().contains("p50, p99"));
        for wrong in ["p99", "p99=3", "p99<x"] {
            assert!(wrong.parse::<Threshold>().is_err(), "{wrong}");
        }
    }
}
