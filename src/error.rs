//! One error type for the whole crate.
//!
//! A user's mistake (a missing column, a tensor of another shape, an unknown architecture) is an [`Error::Input`]: one
//! sentence that names the file and the column or tensor, what was found, what was expected and what to do. The programs
//! end with exit code 2 on it. Anything else is an [`Error::Tensor`], a fault of ours or of the machine: exit code 1.

use std::path::{Path, PathBuf};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Input that cannot be used; the sentence says where, what, and what to do.
    #[error("{0}")]
    Input(String),
    /// A file or folder that could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A tensor operation failed.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Input`] with this sentence.
    pub fn input(sentence: impl Into<String>) -> Self {
        Error::Input(sentence.into())
    }

    /// For `map_err`: attaches the path to an operating-system error.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// The exit code of a program that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Input(_) | Error::Io { .. } => 2,
            Error::Tensor(_) => 1,
        }
    }
}

/// Returns early with an [`Error::Input`] made by `format!`.
#[macro_export]
macro_rules! bail {
    ($($arg:tt)*) => { return Err($crate::error::Error::input(format!($($arg)*))) };
}
