use std::{fmt::Write, fs, path::Path};

use anyhow::Context;

use crate::{complete::Completed, report::Report, usage::Usage};

const STYLE: &str = include_str!("style.css");
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 220.0;
/// Left of the plot for the numbers of its axis, and below it for the seconds.
const LEFT: f64 = 70.0;
const BELOW: f64 = 24.0;
const ABOVE: f64 = 8.0;
/// Lines across a plot.
const STEPS: usize = 4;

/// A line of a plot: its name and its points, seconds and value. A gap in the points is a gap in the line.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// Writes the page: verdict, text, pictures, conditions. It needs no script and no other file.
///
/// # Errors
/// If the file cannot be written.
pub fn write(path: &Path, report: &Report<Completed>, text: &str, met: bool) -> anyhow::Result<()> {
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>Load test: {}</title><style>{STYLE}</style></head><body>\n\
         <h1>Load test: {}</h1>\n<p class=\"{}\">{}</p>\n<pre>{}</pre>\n",
        escaped(report.kind),
        escaped(report.kind),
        if met { "met" } else { "missed" },
        if met {
            "✓ Every check was met."
        } else {
            "✗ Not met: the lines NOT MET below say what. The figures do not count."
        },
        escaped(text),
    );
    for result in &report.results {
        pictures(&mut page, result);
    }
    // A String takes everything that is written to it.
    writeln!(
        page,
        "<h2>Conditions</h2>\n<pre>{}</pre>\n</body></html>",
        escaped(&serde_json::to_string_pretty(&report.conditions).context("write the conditions")?)
    )
    .ok();
    fs::write(path, page).with_context(|| format!("write {}", path.display()))
}

fn pictures(page: &mut String, result: &Completed) {
    writeln!(page, "<h2>{}</h2>", escaped(&result.contender)).ok();
    let by_second = |name: &str, value: &dyn Fn(&crate::complete::Second) -> Option<f64>| Line {
        name: name.to_owned(),
        points: (result.seconds.iter().enumerate())
            .filter_map(|(second, of)| Some((second as f64, value(of)?)))
            .collect(),
    };
    let rates = [
        by_second("offered", &|second| Some(second.offered as f64)),
        by_second("answered", &|second| Some(second.answered as f64)),
        by_second("failed", &|second| Some(second.failed as f64)),
    ];
    plot(
        page,
        "Requests per second, by the second in which they were due",
        "/s",
        &rates,
    );
    let response = [
        by_second("response p50", &|second| Some(second.response_p50)),
        by_second("response p99", &|second| Some(second.response_p99)),
        by_second("response max", &|second| Some(second.response_max)),
    ];
    plot(page, "Response time, from due time to answer", " ms", &response);
    let applied = [
        by_second("p50", &|second| second.applied_p50),
        by_second("p99", &|second| second.applied_p99),
    ];
    if applied.iter().any(|line| !line.points.is_empty()) {
        plot(
            page,
            "From logistics' commit to commerce's, by the second of the first",
            " ms",
            &applied,
        );
        let backlog = [by_second("committed, not applied", &|second| {
            second.backlog.map(|events| events as f64)
        })];
        plot(
            page,
            "Backlog of commerce at the end of each second",
            " events",
            &backlog,
        );
    }
    let cores: Vec<Line> = result.usage.iter().map(cores).collect();
    plot(page, "Processors kept busy", " cores", &cores);
    let memory: Vec<Line> = result.usage.iter().map(resident).collect();
    plot(page, "Resident memory", " MiB", &memory);
}

fn cores(usage: &Usage) -> Line {
    let pairs = usage.series.iter().zip(usage.series.iter().skip(1));
    Line {
        name: usage.process.clone(),
        points: pairs
            .filter_map(|(before, after)| {
                let used = after.cpu_seconds? - before.cpu_seconds?;
                Some((after.at, used / (after.at - before.at)))
            })
            .collect(),
    }
}

fn resident(usage: &Usage) -> Line {
    let moments = usage.series.iter();
    Line {
        name: usage.process.clone(),
        points: moments
            .filter_map(|moment| Some((moment.at, moment.resident_kib? as f64 / 1024.0)))
            .collect(),
    }
}

/// A picture, and its figures as text for those who cannot see it.
fn plot(page: &mut String, title: &str, unit: &str, lines: &[Line]) {
    let points = || lines.iter().flat_map(|line| &line.points);
    let last = points().map(|(at, _)| *at).fold(1.0, f64::max);
    let first = points().map(|(at, _)| *at).fold(0.0, f64::min);
    let top = ceiling(points().map(|(_, value)| *value).fold(0.0, f64::max));
    let x = |at: f64| LEFT + (at - first) / (last - first) * (WIDTH - LEFT - 10.0);
    let y = |value: f64| ABOVE + (1.0 - value / top) * (HEIGHT - ABOVE - BELOW);
    writeln!(
        page,
        "<figure><figcaption>{},{}</figcaption>",
        escaped(title),
        escaped(unit)
    )
    .ok();
    writeln!(
        page,
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
        escaped(&told(title, unit, lines))
    )
    .ok();
    for step in 0..=STEPS {
        let value = top * step as f64 / STEPS as f64;
        let height = y(value);
        let end = WIDTH - 10.0;
        writeln!(
            page,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{height:.1}\" x2=\"{end}\" y2=\"{height:.1}\"/>"
        )
        .ok();
        writeln!(
            page,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            height + 4.0,
            short(value)
        )
        .ok();
        let at = first + (last - first) * step as f64 / STEPS as f64;
        writeln!(
            page,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{:.0} s</text>",
            x(at),
            HEIGHT - 6.0,
            at + 0.0
        )
        .ok();
    }
    for (number, line) in lines.iter().enumerate() {
        let path: Vec<String> = line
            .points
            .iter()
            .map(|(at, value)| format!("{:.1},{:.1}", x(*at), y(*value)))
            .collect();
        writeln!(
            page,
            "<polyline class=\"line c{}\" points=\"{}\"/>",
            number % 6,
            path.join(" ")
        )
        .ok();
    }
    page.push_str("</svg><p class=\"legend\">");
    for (number, line) in lines.iter().enumerate() {
        write!(
            page,
            "<span class=\"c{}\">{}</span> ",
            number % 6,
            escaped(&summary(line, unit))
        )
        .ok();
    }
    page.push_str("</p></figure>\n");
}

fn told(title: &str, unit: &str, lines: &[Line]) -> String {
    let lines: Vec<String> = lines.iter().map(|line| summary(line, unit)).collect();
    format!("{title}: {}", lines.join("; "))
}

fn summary(line: &Line, unit: &str) -> String {
    let values = || line.points.iter().map(|(_, value)| *value);
    let least = values().fold(f64::INFINITY, f64::min);
    if !least.is_finite() {
        return format!("{}: nothing", line.name);
    }
    let most = values().fold(0.0, f64::max);
    format!("{}: {} to {}{unit}", line.name, short(least), short(most))
}

/// The next of 1, 2, 5, 10, 20, 50 … that is not below.
fn ceiling(value: f64) -> f64 {
    let mut step = 1e-3;
    loop {
        for factor in [1.0, 2.0, 5.0] {
            if step * factor >= value {
                return step * factor;
            }
        }
        step *= 10.0;
    }
}

fn short(value: f64) -> String {
    if value >= 10_000.0 {
        format!("{:.0}k", value / 1e3)
    } else if value >= 100.0 || value == value.trunc() {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_ends_at_a_round_number() {
        assert_eq!(
            [0.0, 0.9, 1.0, 3.0, 5_100.0].map(ceiling),
            [0.001, 1.0, 1.0, 5.0, 10_000.0]
        );
    }

    #[test]
    fn a_picture_says_its_figures_in_words_too() {
        let line = Line {
            name: "a < b".to_owned(),
            points: vec![(0.0, 1.0), (1.0, 2.5)],
        };
        let mut page = String::new();
        plot(&mut page, "Rate", "/s", &[line]);
        assert!(page.contains("aria-label=\"Rate: a &lt; b: 1 to 2.50/s\""), "{page}");
        assert!(!page.contains("NaN"), "{page}");
    }

    #[test]
    fn a_picture_of_nothing_is_still_one() {
        let mut page = String::new();
        plot(&mut page, "Rate", "/s", &[]);
        assert!(page.contains("</svg>") && !page.contains("NaN"), "{page}");
    }
}
