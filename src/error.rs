//! One error type for the whole crate.
//!
//! A user's mistake (a missing column, a tensor of another shape, an unknown architecture) is an [`Error::Input`]: one
//! sentence that names the file and the column or tensor, what was found, what was expected and what to do. The programs
//! end with exit code 2 on it, as on a file that cannot be read or written ([`Error::Io`]).
//!
//! | exit code | meaning |
//! | --- | --- |
//! | 0 | done |
//! | 1 | a fault of ours or of the machine ([`Error::Tensor`]) |
//! | 2 | input that cannot be used, or a file that cannot be read or written; the sentence says which and what to do |
//! | 3 | stopped by SIGINT or SIGTERM ([`Error::Stopped`]): `--resume` goes on from the newest checkpoint, where there is one |
//! | 4 | the numbers went bad ([`Error::NotFinite`]): the weights as they last were good are kept |
//! | 130, 143 | ended at once by a second SIGINT or SIGTERM |

use std::path::{Path, PathBuf};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Input that cannot be used; the sentence says where, what, and what to do.
    #[error("{0}")]
    Input(String),
    /// A file or folder that could not be read or written.
    #[error("{path}: {source}{}", advice(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A signal asked the run to stop, and it did so at a point from which it can go on, or before it learned anything.
    #[error("{0}")]
    Stopped(String),
    /// Gradients were not finite many times in a row.
    #[error("{0}")]
    NotFinite(String),
    /// A tensor operation failed.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Input`] with this sentence. What it repeats of a file may be anything: control characters are shown and not sent to the
    /// terminal, and of a very long sentence the middle is left out.
    pub fn input(sentence: impl Into<String>) -> Self {
        Error::Input(shown(sentence.into()))
    }

    /// For `map_err`: attaches the path to an operating-system error.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// The same error with more to its sentence.
    pub fn and(self, more: impl std::fmt::Display) -> Self {
        match self {
            Error::Stopped(sentence) => Error::Stopped(format!("{sentence}; {more}")),
            Error::NotFinite(sentence) => Error::NotFinite(format!("{sentence}; {more}")),
            other => Error::Input(format!("{other}; {more}")),
        }
    }

    /// The exit code of a program that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Input(_) | Error::Io { .. } => 2,
            Error::Stopped(_) => 3,
            Error::NotFinite(_) => 4,
            Error::Tensor(_) => 1,
        }
    }
}

/// What to do where the operating system says no.
fn advice(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "; free space there or choose another --output; what was complete before is still there"
        }
        ErrorKind::PermissionDenied => "; choose a place where you may read and write, or change its permissions",
        ErrorKind::ReadOnlyFilesystem => "; choose an --output on a file system that can be written to",
        _ => "",
    }
}

/// The most characters that are shown of a sentence's start, and of its end.
const SHOWN: [usize; 2] = [900, 300];

fn shown(sentence: String) -> String {
    let sentence = match sentence.contains(char::is_control) {
        true => sentence
            .chars()
            .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() })
            .collect(),
        false => sentence,
    };
    let [first, last] = SHOWN;
    let start = sentence.char_indices().nth(first).map(|(at, _)| at);
    let end = sentence.char_indices().rev().nth(last).map(|(at, _)| at);
    match (start, end) {
        (Some(start), Some(end)) if start < end => format!("{} [...] {}", &sentence[..start], &sentence[end..]),
        _ => sentence,
    }
}

/// Returns early with an [`Error::Input`] made by `format!`.
#[macro_export]
macro_rules! bail {
    ($($arg:tt)*) => { return Err($crate::error::Error::input(format!($($arg)*))) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_one_line_of_bounded_length_whatever_it_repeats() {
        let error = Error::input("config.json: \"\u{1b}[2J\n\0\" is no name").to_string();
        assert_eq!(error, r#"config.json: "\u{1b}[2J\n\u{0}" is no name"#);
        let error = Error::input(format!("a.json: found {}, expected b", "é".repeat(1 << 20))).to_string();
        assert!(error.starts_with("a.json: found é") && error.ends_with("é, expected b"), "{error}");
        assert!(error.chars().count() < 1300);
        let whole = "x".repeat(1200);
        assert_eq!(Error::input(whole.clone()).to_string(), whole);
    }
}
