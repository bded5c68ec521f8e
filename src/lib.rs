//! Aligning language models with human feedback.
#![warn(missing_docs)]

pub mod adapt;
pub mod data;
pub mod error;
pub mod evaluate;
pub mod files;
pub mod generate;
pub mod model;
pub mod ops;
pub mod ppo;
pub mod random;
pub mod reward;
pub mod sample;
pub mod score;
pub mod settings;
pub mod sft;
pub mod train;
pub mod world;

pub use error::{Error, Result};
