//! How far a run is: a bar with loss, tokens a second and time left, or a line now and then where there is no terminal.

use std::cell::RefCell;
use std::collections::HashSet;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressStyle};

/// Where there is no terminal, this much time passes between two lines.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// The progress of one stage, on the standard error stream.
#[derive(Debug)]
pub struct Progress {
    label: String,
    total: usize,
    done: usize,
    /// Steps that were done before this process began.
    before: usize,
    tokens: usize,
    loss: Option<f64>,
    status: Option<String>,
    started: Instant,
    display: Display,
    /// What [`note_once`](Self::note_once) has said.
    noted: RefCell<HashSet<String>>,
}

#[derive(Debug)]
enum Display {
    Bar(ProgressBar),
    Lines { last: Instant },
    Hidden,
}

impl Progress {
    /// Progress over `total` steps; nothing is shown if `quiet`.
    pub fn new(label: impl Into<String>, total: usize, quiet: bool) -> Self {
        let label = label.into();
        let started = Instant::now();
        let display = if quiet || cfg!(test) {
            Display::Hidden
        } else if std::io::stderr().is_terminal() {
            Display::Bar(bar(&label, total))
        } else {
            Display::Lines { last: started }
        };
        let (loss, status, noted) = (None, None, RefCell::default());
        Progress { label, total, done: 0, before: 0, tokens: 0, loss, status, started, display, noted }
    }

    /// So many steps were done before.
    pub fn start_at(&mut self, done: usize) {
        (self.done, self.before) = (done, done);
        if let Display::Bar(bar) = &self.display {
            bar.set_position(done as u64);
            bar.reset_eta();
        }
    }

    /// One more step is done, with this loss if it has one, and this many real tokens.
    pub fn advance(&mut self, loss: Option<f64>, tokens: usize) {
        self.done += 1;
        self.tokens += tokens;
        self.loss = loss.or(self.loss);
        let message = self.message();
        match &mut self.display {
            Display::Bar(bar) => {
                bar.set_message(message);
                bar.inc(1);
            }
            Display::Lines { last } if last.elapsed() >= BETWEEN_LINES => {
                *last = Instant::now();
                eprintln!("{}", self.line());
            }
            _ => {}
        }
    }

    /// Shows this beside the loss from the next step on.
    pub fn show(&mut self, status: String) {
        self.status = Some(status);
    }

    /// Prints a line above the bar, such as the result of an evaluation.
    pub fn note(&self, text: &str) {
        match &self.display {
            Display::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Display::Lines { .. } => eprintln!("{text}"),
            Display::Hidden => {}
        }
    }

    /// The same of what several models may have to say of the same data, once.
    pub fn note_once(&self, text: &str) {
        if self.noted.borrow_mut().insert(text.to_owned()) {
            self.note(text);
        }
    }

    /// Real tokens a second since the start.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.started.elapsed().as_secs_f64().max(1e-9)
    }

    /// Ends the stage; its last state stays on the screen.
    pub fn finish(self) {
        match &self.display {
            Display::Bar(bar) => bar.abandon_with_message(self.message()),
            Display::Lines { .. } => eprintln!("{}", self.line()),
            Display::Hidden => {}
        }
    }

    fn message(&self) -> String {
        let loss = self.loss.map(|loss| format!("loss {loss:.4}"));
        let rate = (self.tokens > 0).then(|| format!("{} tokens/s", HumanCount(self.tokens_per_second() as u64)));
        [loss, self.status.clone(), rate].into_iter().flatten().collect::<Vec<_>>().join("  ")
    }

    fn line(&self) -> String {
        let elapsed = self.started.elapsed();
        let remaining = self.total.saturating_sub(self.done);
        let time = if remaining == 0 {
            format!("took {:#}", HumanDuration(elapsed))
        } else {
            let left = elapsed.mul_f64(remaining as f64 / (self.done - self.before).max(1) as f64);
            format!("{:#} left", HumanDuration(left))
        };
        let parts = [format!("{} {}/{}", self.label, self.done, self.total), self.message(), time];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("  ")
    }
}

fn bar(label: &str, total: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} [{bar:10}] {pos}/{len}  {wide_msg} {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total as u64).with_style(style.progress_chars("=> ")).with_prefix(label.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_the_last_loss_the_rate_and_the_time_left() {
        let mut progress = Progress::new("sft", 4, false);
        progress.started = Instant::now() - Duration::from_secs(10);
        progress.advance(Some(2.5), 600);
        progress.advance(None, 600);
        assert!((119.0..=120.0).contains(&progress.tokens_per_second()));
        let line = progress.line();
        assert!(line.starts_with("sft 2/4  loss 2.5000  1"), "{line}");
        progress.show("score 0.50".to_string());
        assert!(progress.line().contains("loss 2.5000  score 0.50  1"), "{}", progress.line());
        // Two of four steps took ten seconds.
        assert!(line.ends_with(" tokens/s  10s left"), "{line}");
        progress.advance(None, 0);
        progress.advance(None, 0);
        assert!(progress.line().ends_with("took 10s"), "{}", progress.line());
    }

    #[test]
    fn a_stage_without_loss_or_tokens_shows_only_its_steps() {
        let mut progress = Progress::new("score", 1, true);
        progress.advance(None, 0);
        assert!(progress.line().starts_with("score 1/1  took "), "{}", progress.line());
    }

    #[test]
    fn the_bars_template_is_valid() {
        assert!(bar("sft", 10).length() == Some(10));
        assert!(ProgressStyle::with_template("{prefix} [{bar:10}] {pos}/{len}  {wide_msg} {eta} left").is_ok());
    }
}
