use std::io::{self, IsTerminal, Write};

use serde::de::IgnoredAny;
use serde_json::Value;

use super::{Colour, Common, failure::Failure};

pub(super) struct Screen {
    pub(super) json: bool,
    pub(super) quiet: bool,
    /// Whether progress is shown, and then whether as a moving bar.
    pub(super) progress: Option<Moving>,
    colour: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moving {
    Bar,
    Lines,
}

/// A column of a table: its header, and the cell of an item.
pub(super) type Column = (&'static str, fn(&Value) -> String);

impl Screen {
    pub(super) fn new(common: &Common) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let moving = if io::stderr().is_terminal() && !dumb {
            Moving::Bar
        } else {
            Moving::Lines
        };
        Self {
            json: common.json,
            quiet: common.quiet,
            progress: (!common.quiet && !common.no_progress).then_some(moving),
            colour: match common.color {
                Colour::Auto => io::stdout().is_terminal() && !dumb && !no_colour,
                Colour::Always => true,
                Colour::Never => false,
            },
        }
    }

    /// The result: the object itself, or what `human` makes of it.
    pub(super) fn result(&self, object: &Value, human: impl FnOnce(&Value) -> String) -> Result<(), Failure> {
        if self.json {
            return self.line(&object.to_string());
        }
        self.line(human(object).trim_end())
    }

    /// On standard output.
    pub(super) fn line(&self, text: &str) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{text}")?;
        Ok(stdout.flush()?)
    }

    /// On standard error, for the person, unless they want quiet.
    pub(super) fn note(&self, text: &str) {
        if !self.quiet {
            self.clear();
            say(&format!("{text}\n"));
        }
    }

    /// Takes a bar away, so that what follows stands alone.
    pub(super) fn clear(&self) {
        if self.progress == Some(Moving::Bar) {
            say("\r\x1b[2K");
        }
    }

    fn paint(&self, cell: &str, padded: &str) -> String {
        let colour = match cell {
            "open" | "dead" | "failed" => "\x1b[31m",
            "redriving" | "retrying" | "waiting" | "releasing" | "canary" | "running" | "cancelled" => "\x1b[33m",
            "resolved" | "succeeded" => "\x1b[32m",
            _ => return padded.to_owned(),
        };
        if self.colour {
            format!("{colour}{padded}\x1b[0m")
        } else {
            padded.to_owned()
        }
    }
}

/// Rows that come page by page. A later page may widen a column, never narrow it.
pub(super) struct Table<'a> {
    screen: &'a Screen,
    columns: &'a [Column],
    widths: Vec<usize>,
    begun: bool,
}

impl<'a> Table<'a> {
    pub(super) fn new(screen: &'a Screen, columns: &'a [Column]) -> Self {
        Self {
            screen,
            columns,
            widths: columns.iter().map(|(header, _)| header.len()).collect(),
            begun: false,
        }
    }

    pub(super) fn rows(&mut self, items: &[Value]) -> Result<(), Failure> {
        if self.screen.json {
            return items.iter().try_for_each(|item| self.screen.line(&item.to_string()));
        }
        let rows: Vec<Vec<String>> = items
            .iter()
            .map(|item| self.columns.iter().map(|(_, cell)| cell(item)).collect())
            .collect();
        for row in &rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        if !self.begun && !rows.is_empty() {
            self.begun = true;
            let headers: Vec<String> = self.columns.iter().map(|(header, _)| (*header).to_owned()).collect();
            self.row(&headers)?;
        }
        rows.iter().try_for_each(|row| self.row(row))
    }

    fn row(&self, row: &[String]) -> Result<(), Failure> {
        let cells = row.iter().zip(&self.widths).map(|(cell, width)| {
            let padded = format!("{cell:width$}");
            self.screen.paint(cell, &padded)
        });
        self.screen.line(cells.collect::<Vec<_>>().join("  ").trim_end())
    }
}

/// A closed standard error takes nothing away from the work itself.
pub(super) fn say(text: &str) {
    let mut stderr = io::stderr().lock();
    stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush()).ok();
}

/// A field for a person: what is not there is unknown, and nothing in it reaches the terminal as a command.
pub(super) fn text(value: &Value) -> String {
    let text = match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        other => other.to_string(),
    };
    harmless(&text)
}

fn harmless(text: &str) -> String {
    let shown = |character: char| {
        if character.is_control() {
            character.escape_unicode().to_string()
        } else {
            character.to_string()
        }
    };
    text.chars().map(shown).collect()
}

/// Lines of a record: indented, its line ends kept.
pub(super) fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {}\n", harmless(line))).collect()
}

/// JSON with a line per value; names keep their order, and numbers their digits. `None` if it is no JSON.
pub(super) fn pretty(json: &str) -> Option<String> {
    serde_json::from_str::<IgnoredAny>(json).ok()?;
    let (mut shown, mut depth, mut in_string, mut escaped) = (String::new(), 0, false, false);
    let mut rest = json.chars().peekable();
    while let Some(character) = rest.next() {
        if in_string {
            shown.push(character);
            in_string = escaped || character != '"';
            escaped = character == '\\' && !escaped;
            continue;
        }
        match character {
            ' ' | '\n' | '\r' | '\t' => {}
            '{' | '[' => {
                while rest.next_if(|next| next.is_ascii_whitespace()).is_some() {}
                shown.push(character);
                match rest.next_if(|next| ['}', ']'].contains(next)) {
                    Some(end) => shown.push(end),
                    None => {
                        depth += 1;
                        shown.push_str(&format!("\n{}", "  ".repeat(depth)));
                    }
                }
            }
            '}' | ']' => {
                depth -= 1;
                shown.push_str(&format!("\n{}{character}", "  ".repeat(depth)));
            }
            ',' => shown.push_str(&format!(",\n{}", "  ".repeat(depth))),
            ':' => shown.push_str(": "),
            _ => {
                in_string = character == '"';
                shown.push(character);
            }
        }
    }
    Some(shown)
}

/// Lines that went with `- `, lines that came with `+ `, and two lines around them.
pub(super) fn difference(before: &str, after: &str) -> String {
    const AROUND: usize = 2;
    /// Beyond it, the table below would be too large to be worth it.
    const MOST: usize = 4_000_000;
    let (before, after): (Vec<&str>, Vec<&str>) = (before.lines().collect(), after.lines().collect());
    if before.len().saturating_mul(after.len()) > MOST {
        return "  too long to be compared line by line\n".to_owned();
    }
    // common[i][j]: the longest common part of what follows line i and line j.
    let mut common = vec![vec![0; after.len() + 1]; before.len() + 1];
    for i in (0..before.len()).rev() {
        for j in (0..after.len()).rev() {
            common[i][j] = if before[i] == after[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut lines, mut i, mut j) = (Vec::new(), 0, 0);
    while i < before.len() || j < after.len() {
        if i < before.len() && j < after.len() && before[i] == after[j] {
            lines.push((' ', before[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == after.len() || (i < before.len() && common[i + 1][j] >= common[i][j + 1]) {
            lines.push(('-', before[i]));
            i += 1;
        } else {
            lines.push(('+', after[j]));
            j += 1;
        }
    }
    let near = |place: usize| {
        let from = place.saturating_sub(AROUND);
        lines[from..lines.len().min(place + AROUND + 1)]
            .iter()
            .any(|(mark, _)| *mark != ' ')
    };
    let shown = lines.iter().enumerate().filter(|(place, _)| near(*place));
    shown.map(|(_, (mark, line))| format!("{mark} {line}\n")).collect()
}

pub(super) fn count(value: &Value) -> String {
    value.as_i64().map_or_else(|| "unknown".to_owned(), grouped)
}

/// `12,345`.
pub(super) fn grouped(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if number < 0 { format!("-{grouped}") } else { grouped }
}

/// To the second, in UTC as the API has it.
pub(super) fn time(value: &Value) -> String {
    let shown = text(value);
    match shown.split_once('.') {
        Some((seconds, _)) => format!("{seconds}Z"),
        None => shown,
    }
}

/// `0.8 s`, `12 s`, `3 min 05 s`, `2 h 05 min`.
pub(super) fn duration(value: &Value) -> String {
    let Some(seconds) = value.as_f64() else {
        return "unknown".to_owned();
    };
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..60 => format!("{whole} s"),
        60..3_600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3_600, whole % 3_600 / 60),
    }
}

/// Names and values below each other.
pub(super) fn block(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    rows.iter()
        .map(|(name, value)| format!("{name:width$}  {value}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_times_and_texts_are_shown_for_a_person() {
        assert_eq!(
            [0, 999, 1_000, -1_234_567].map(grouped),
            ["0", "999", "1,000", "-1,234,567"]
        );
        assert_eq!(count(&json!(null)), "unknown", "never 0");
        assert_eq!(time(&json!("2026-11-22T05:00:00.123456Z")), "2026-11-22T05:00:00Z");
        assert_eq!(duration(&json!(185.4)), "3 min 05 s");
        assert_eq!(text(&json!("a\u{1b}[2Jb\n")), "a\\u{1b}[2Jb\\u{a}");
    }

    #[test]
    fn json_is_indented_as_it_stands_and_compared_line_by_line() {
        let json = r#"{"z":[1.50,{ }],"a":"x\\",  "b":"\"{,"}"#;
        let lines = "{\n  \"z\": [\n    1.50,\n    {}\n  ],\n  \"a\": \"x\\\\\",\n  \"b\": \"\\\"{,\"\n}";
        assert_eq!(pretty(json).as_deref(), Some(lines));
        assert_eq!(pretty("no JSON"), None);
        assert_eq!(
            difference("1\n2\n3\n4\n5\n6", "1\n2\n3\n4\n5\n7"),
            "  4\n  5\n- 6\n+ 7\n"
        );
        assert_eq!(difference("a\nb", "a\nb"), "");
    }
}
