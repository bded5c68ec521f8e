//! Aligning language models with human feedback.
#![warn(missing_docs)]

pub mod data;
pub mod error;
pub mod files;
pub mod ops;
pub mod random;
pub mod settings;
pub mod train;

pub use error::{Error, Result};
