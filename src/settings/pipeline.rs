//! Settings of `pipeline`, which has few of its own: the stages that it runs have theirs.

use std::path::PathBuf;

use clap::Parser;

use super::flags::{Flags, Program};
use super::groups::Precision;
use super::methods::Methods;

/// Aligns the base model that ships with the project, and says what that did: sft, reward, ppo, evaluate
#[derive(Debug, Parser)]
#[command(name = "pipeline", version)]
pub struct PipelineSettings {
    /// Folder of the world's files, made by the program `world`
    #[arg(long, default_value = "data")]
    pub data: PathBuf,
    /// Folder to write to
    #[arg(long, default_value = "runs/pipeline")]
    pub output: PathBuf,
    /// What is trained at each stage: full, or lightweight methods, as in lora+prompt-tuning
    #[arg(long, default_value = "full")]
    pub method: Methods,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Number of threads [default: one per core]
    #[arg(long)]
    pub threads: Option<usize>,
    /// How products with the models' weights are made
    #[arg(long, value_enum, default_value_t)]
    pub precision: Precision,
    /// Go on at the stage and step where an earlier run stopped
    #[arg(long)]
    pub resume: bool,
}

impl Program for PipelineSettings {
    fn flags() -> Flags<Self> {
        Flags::new().always(&["data", "output", "method", "seed", "threads", "precision", "resume"])
    }
}
