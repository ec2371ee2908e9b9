//! What a person sees while they wait, on standard error: one moving line on a terminal, plain lines otherwise.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const FRAME: Duration = Duration::from_millis(120);
/// Between plain lines about the same step.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);
const SPINNER: [&str; 10] = ["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"];
const CLEAR_LINE: &str = "\r\x1b[2K";

/// The steps under way. Cheap to clone; all clones write to the same place.
#[derive(Clone)]
pub struct Progress {
    board: Arc<Mutex<Board>>,
}

struct Board {
    moving: bool,
    colour: bool,
    frame: usize,
    next_id: u64,
    running: Vec<Running>,
}

struct Running {
    id: u64,
    what: String,
    detail: String,
    start: Instant,
    said: Instant,
}

/// A step under way. Dropped without [`Step::done`], it is shown as not finished.
pub struct Step {
    board: Arc<Mutex<Board>>,
    id: u64,
}

impl Progress {
    /// Writes until the returned value and its steps are gone. Needs a runtime.
    pub fn on_stderr() -> Self {
        let terminal = io::stderr().is_terminal();
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let board = Arc::new(Mutex::new(Board {
            moving: terminal && !dumb,
            colour: terminal && !dumb && !no_colour,
            frame: 0,
            next_id: 0,
            running: Vec::new(),
        }));
        let weak = Arc::downgrade(&board);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(FRAME).await;
                match weak.upgrade() {
                    Some(board) => lock(&board).tick(),
                    None => break,
                }
            }
        });
        Self { board }
    }

    /// `what` in the present progressive: "starting PostgreSQL".
    pub fn step(&self, what: impl Into<String>) -> Step {
        let mut board = lock(&self.board);
        let id = board.next_id;
        board.next_id += 1;
        let now = Instant::now();
        board.running.push(Running {
            id,
            what: what.into(),
            detail: String::new(),
            start: now,
            said: now,
        });
        if board.moving {
            board.redraw();
        }
        Step {
            board: Arc::clone(&self.board),
            id,
        }
    }

    /// A line that stays.
    pub fn note(&self, text: &str) {
        lock(&self.board).line(text);
    }
}

impl Step {
    /// What the step is at: "120 of 300 crates".
    pub fn detail(&self, text: impl Into<String>) {
        let mut board = lock(&self.board);
        if let Some(running) = board.running.iter_mut().find(|running| running.id == self.id) {
            running.detail = text.into();
        }
    }

    /// Replaces the step by a line that stays: "PostgreSQL 18 on 127.0.0.1:15432".
    pub fn done(self, outcome: &str) {
        self.finish("✓", "\x1b[32m", Some(outcome));
    }

    fn finish(&self, mark: &str, colour: &str, outcome: Option<&str>) {
        let mut board = lock(&self.board);
        let Some(position) = board.running.iter().position(|running| running.id == self.id) else {
            return;
        };
        let running = board.running.remove(position);
        let (on, off) = if board.colour { (colour, "\x1b[0m") } else { ("", "") };
        let text = outcome.unwrap_or(&running.what);
        let line = format!("{on}{mark}{off} {text} ({})", seconds(running.start.elapsed()));
        board.line(&line);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.finish("✗", "\x1b[31m", None);
    }
}

impl Board {
    fn tick(&mut self) {
        if self.moving {
            self.frame += 1;
            self.redraw();
            return;
        }
        let mut due = Vec::new();
        for running in &mut self.running {
            if running.said.elapsed() >= PLAIN_INTERVAL {
                running.said = Instant::now();
                due.push(running.describe());
            }
        }
        for text in due {
            self.line(&format!("… {text}"));
        }
    }

    fn redraw(&self) {
        let steps: Vec<String> = self.running.iter().map(Running::describe).collect();
        let text = match steps.as_slice() {
            [] => String::new(),
            steps => format!("{} {}", SPINNER[self.frame % SPINNER.len()], steps.join(" · ")),
        };
        // A line that wraps cannot be cleared.
        let shown: String = text.chars().take(terminal_width().saturating_sub(1)).collect();
        write(&format!("{CLEAR_LINE}{shown}"));
    }

    fn line(&self, text: &str) {
        if self.moving {
            write(&format!("{CLEAR_LINE}{text}\n"));
            self.redraw();
        } else {
            write(&format!("{text}\n"));
        }
    }
}

impl Running {
    fn describe(&self) -> String {
        let detail = if self.detail.is_empty() {
            String::new()
        } else {
            format!(", {}", self.detail)
        };
        format!("{}{detail} ({})", self.what, seconds(self.start.elapsed()))
    }
}

fn lock(board: &Mutex<Board>) -> MutexGuard<'_, Board> {
    // The board only draws; after a panic elsewhere it still may.
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A closed standard error takes nothing away from the work itself.
fn write(text: &str) {
    let mut stderr = io::stderr().lock();
    stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush()).ok();
}

/// In characters; 80 when the terminal does not say.
fn terminal_width() -> usize {
    std::env::var("COLUMNS")
        .ok()
        .and_then(|columns| columns.parse().ok())
        .unwrap_or(80)
}

/// "0.8 s", "12 s", "3 min 05 s".
pub fn seconds(duration: Duration) -> String {
    let whole = duration.as_secs();
    match whole {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{whole} s"),
        _ => format!("{} min {:02} s", whole / 60, whole % 60),
    }
}
