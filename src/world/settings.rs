//! Settings of `world`, which makes the data that ships with the project.

use std::path::PathBuf;

use clap::Parser;

use super::files::Sizes;
use crate::settings::{Flags, Program};

/// Makes the data that ships with the project: raw text, demonstrations, simulated rankings, prompts, and the base model
#[derive(Debug, Parser)]
#[command(name = "world", version)]
pub struct WorldSettings {
    /// Folder to write to
    #[arg(long, default_value = "data")]
    pub output: PathBuf,
    /// Seed of everything random
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Number of threads [default: one per core]
    #[arg(long)]
    pub threads: Option<usize>,
    /// Write the Parquet files only, and leave the base model as it is
    #[arg(long)]
    pub files_only: bool,
    /// Documents of raw text that the base model is trained on
    #[arg(long, default_value_t = Sizes::default().pretrain)]
    pub documents: usize,
    /// Passes of the base model over the raw text
    #[arg(long, default_value_t = 3)]
    pub epochs: usize,
}

impl Program for WorldSettings {
    fn flags() -> Flags<Self> {
        Flags::new().always(&["output", "seed", "threads", "files_only", "documents"]).only(
            "without --files-only",
            &["epochs"],
            |world: &Self| !world.files_only,
        )
    }
}
