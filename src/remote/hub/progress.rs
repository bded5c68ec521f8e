//! How far the transfer of a large file is, on the standard error stream: a bar, or a line now and then where there is no terminal.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};

/// Of smaller files nothing is shown.
const LARGE: u64 = 8 << 20;
/// Where there is no terminal, this much time passes between two lines.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// The progress of one file.
#[derive(Debug)]
pub struct Progress {
    label: String,
    size: u64,
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
}

impl Progress {
    /// Of `size` bytes; nothing is shown of small files, or if `quiet`.
    pub fn new(label: &str, size: u64, quiet: bool) -> Self {
        let is_shown = size >= LARGE && !quiet && !cfg!(test);
        let is_terminal = std::io::stderr().is_terminal();
        Progress {
            label: label.to_string(),
            size,
            bar: (is_shown && is_terminal).then(|| bar(label, size)),
            last_line: (is_shown && !is_terminal).then(Instant::now),
        }
    }

    /// So many bytes are there.
    pub fn at(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
        if let Some(last) = &mut self.last_line
            && last.elapsed() >= BETWEEN_LINES
        {
            *last = Instant::now();
            eprintln!("{} {} of {}", self.label, BinaryBytes(bytes), BinaryBytes(self.size));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

fn bar(label: &str, size: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} [{bar:10}] {binary_bytes}/{binary_total_bytes}  {eta} left")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(size).with_style(style.progress_chars("=> ")).with_prefix(label.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bars_template_is_valid() {
        let template = "{prefix} [{bar:10}] {binary_bytes}/{binary_total_bytes}  {eta} left";
        assert!(ProgressStyle::with_template(template).is_ok());
        assert_eq!(bar("org/tiny model.safetensors", 10).length(), Some(10));
    }
}
