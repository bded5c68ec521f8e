//! The groups of settings that programs share.
//!
//! Where InstructGPT (Ouyang et al. 2022, appendix C) states a value, it is the default.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use candle_core::DType;
use clap::{Arg, Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::flags::Flags;
use super::methods::{MethodSettings, Methods};
use crate::error::Result;
use crate::ops::{Arithmetic, BaseForm, CompactForm};

// A heading stands at each flag, as one set for a whole group would go on over the flags that follow the group.
const TRAINING: &str = "Training";
const OPTIMIZER: &str = "Optimizer";
const CHECKPOINTS: &str = "Checkpoints";

/// The default of `--shuffle-window`.
pub const SHUFFLE_WINDOW: usize = 10_000;

/// What every program has.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct CommonSettings {
    /// TOML file of settings, its keys named as the flags; flags win over it
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub settings: Option<PathBuf>,
    /// Folder to write to
    #[arg(long, value_name = "FOLDER")]
    pub output: PathBuf,
    /// Seed of everything random; the same seed gives the same result on any number of threads
    // TOML has no integers above 2^63 - 1.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: u64,
    /// Number of threads [default: one per core]
    #[arg(long, value_parser = at_least_one)]
    pub threads: Option<usize>,
    /// Longest sequence in tokens, prompt and answer together
    #[arg(long, default_value_t = 1024, value_parser = at_least_one)]
    pub max_length: usize,
    /// Tokens, virtual ones among them, that go through the model at a time: sets the memory needed, not the
    /// result, but for rounding
    #[arg(long, default_value_t = 4096, value_parser = at_least_one)]
    pub tokens_per_batch: usize,
    /// How products with the model's weights are made: in f32, or with operands rounded to bf16, which is
    /// faster where the processor has instructions for it (AMX, AVX512-BF16 of AMD). Sums, weights that
    /// train, gradients and the optimizer stay f32
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub precision: Precision,
    /// How the matrices of a frozen base model are kept in memory: as they are stored, in f32, or quantised
    /// when they are read, which makes them other numbers (q8_0: 8.5 bits each; q4_k: 4.5 bits, embeddings
    /// and output matrix 8.5). What trains stays f32
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub base_precision: BasePrecision,
    /// Print neither the plan nor the progress
    #[arg(long)]
    #[serde(default)]
    pub quiet: bool,
}

impl CommonSettings {
    /// When they are read.
    pub fn flags() -> Flags<Self> {
        Flags::new().always(&["settings", "output", "seed", "threads", "max_length", "tokens_per_batch"]).always(&[
            "precision",
            "base_precision",
            "quiet",
        ])
    }
}

/// In which precision the products of a model's weights are made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits
    #[default]
    F32,
    /// Operands of 16 bits with the range of 32, sums of 32 bits
    Bf16,
}

impl Precision {
    /// Makes it that of this process; can be done once, before the first product.
    pub fn set(self) -> Result<()> {
        match self {
            Precision::F32 => Arithmetic::F32.set(),
            Precision::Bf16 => Arithmetic::bf16()?.set(),
        }
    }
}

/// How the matrices of a frozen base model are kept in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum BasePrecision {
    /// As they are stored: f32, bf16, f16, or the blocks of a GGUF file
    #[default]
    #[value(name = "stored")]
    #[serde(rename = "stored")]
    Stored,
    /// 32 bits a number
    #[value(name = "f32")]
    #[serde(rename = "f32")]
    F32,
    /// Blocks of 32 integers of 8 bits
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8_0,
    /// Blocks of 256 integers of 4 bits; of 32 of 5 bits where rows do not divide into those
    #[value(name = "q4_k")]
    #[serde(rename = "q4_k")]
    Q4K,
}

impl BasePrecision {
    /// The form in which bases are read.
    pub fn form(self) -> BaseForm {
        match self {
            BasePrecision::Stored => BaseForm::Stored,
            BasePrecision::F32 => BaseForm::F32,
            BasePrecision::Q8_0 => BaseForm::Quantised(CompactForm::Q8_0),
            BasePrecision::Q4K => BaseForm::Quantised(CompactForm::Q4_K),
        }
    }
}

/// The model that a program starts from.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct ModelSettings {
    /// Model to start from: a folder (config.json, *.safetensors, tokenizer.json), or a model of the Hugging Face hub (organisation/name, or
    /// organisation/name@revision)
    #[arg(long, value_name = "FOLDER")]
    pub model: PathBuf,
    /// Adapters (PEFT, AdapterHub) on top of the model, in their order: folders, or names on the hub
    #[arg(long, value_name = "FOLDER", num_args = 1.., value_delimiter = ',')]
    #[serde(default)]
    pub adapter: Vec<PathBuf>,
}

impl ModelSettings {
    /// The model and the adapters on top of it, as they are when a program begins: what a reference is.
    pub fn as_it_is(&self) -> String {
        let on_top = self.adapter.iter().map(|adapter| format!(" with {}", adapter.display()));
        format!("{}{}, as it is at the start", self.model.display(), on_top.collect::<String>())
    }

    /// When they are read.
    pub fn flags() -> Flags<Self> {
        Flags::new().always(&["model", "adapter"])
    }
}

/// How a program that learns from examples goes through them.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct ExampleSettings {
    /// Examples to evaluate on, in the form of --data; of more than 10,000 and than --shuffle-window, 10,000 random ones [default: a share of the data]
    #[arg(long, value_name = "FILES")]
    pub evaluation_data: Option<String>,
    /// Share of the examples kept apart for evaluation, where there is no --evaluation-data; at most 10,000 of data larger than --shuffle-window
    #[arg(long, default_value_t = 0.05, value_parser = below_one)]
    pub evaluation_share: f64,
    /// Optimizer steps between evaluations [default: once an epoch]
    #[arg(long, value_parser = at_least_one)]
    pub evaluate_every: Option<usize>,
    /// Passes over the examples
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    pub epochs: usize,
    /// Rows among which the order is random; data of no more rows are kept in memory, of larger data one window at a time
    #[arg(long, value_name = "ROWS", default_value_t = SHUFFLE_WINDOW, value_parser = at_least_one)]
    pub shuffle_window: usize,
    /// Print this many examples as the model will see them, and stop
    #[arg(long, value_name = "N")]
    pub inspect: Option<usize>,
}

impl ExampleSettings {
    /// When they are read.
    pub fn flags() -> Flags<Self> {
        Flags::new().always(&["evaluation_data", "evaluate_every", "epochs", "shuffle_window", "inspect"]).only(
            "without --evaluation-data",
            &["evaluation_share"],
            |examples: &Self| examples.evaluation_data.is_none(),
        )
    }
}

/// What every program that trains has.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct TrainingSettings {
    /// What is trained: full, or a lightweight method, or several on top of each other, as in lora+prompt-tuning: probing, bitfit, lora,
    /// prompt-tuning, p-tuning, prefix-tuning, p-tuning-v2, adapters, ia3
    #[arg(long, help_heading = TRAINING, default_value = "full")]
    pub method: Methods,
    /// Go on with the optimizer's moments that lie beside the adapter that is trained further
    #[arg(long, help_heading = TRAINING)]
    #[serde(default)]
    pub resume_optimizer: bool,
    /// Stop after this many optimizer steps
    #[arg(long, help_heading = TRAINING, value_parser = at_least_one)]
    pub max_steps: Option<usize>,
    /// Sequences, prompts or episodes in an optimizer step
    #[arg(long, help_heading = TRAINING, default_value_t = 32, value_parser = at_least_one)]
    pub batch_size: usize,
    /// Peak learning rate
    #[arg(long, help_heading = TRAINING, value_parser = not_negative)]
    pub learning_rate: Option<f64>,
    /// Element type in which the trained weights are saved; they are evaluated as they are saved [default: that of the base model; of adapters f32]
    #[arg(long, help_heading = TRAINING, value_enum)]
    pub save_dtype: Option<ElementType>,
    /// What a pass keeps for its backward pass. The model learned is the same, byte for byte
    #[arg(long, help_heading = TRAINING, value_enum, default_value_t)]
    #[serde(default)]
    pub gradient_checkpointing: GradientCheckpointing,
    /// The methods' own settings.
    #[command(flatten)]
    #[serde(flatten)]
    pub methods: MethodSettings,
    /// The optimizer's own settings.
    #[command(flatten)]
    #[serde(flatten)]
    pub optimizer: OptimizerSettings,
    /// From where it can go on.
    #[command(flatten)]
    #[serde(flatten)]
    pub checkpoints: CheckpointSettings,
}

/// What of a pass is kept for its backward pass (Chen et al. 2016).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GradientCheckpointing {
    /// All that gradients are computed from
    #[default]
    Off,
    /// The input of every block, which is run again: less memory, more time
    Blocks,
}

/// An element type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ElementType {
    /// 32 bits
    F32,
    /// 16 bits with the range of 32
    Bf16,
    /// 16 bits
    F16,
}

impl ElementType {
    /// The same to tensors.
    pub fn dtype(self) -> DType {
        match self {
            ElementType::F32 => DType::F32,
            ElementType::Bf16 => DType::BF16,
            ElementType::F16 => DType::F16,
        }
    }
}

/// When a run notes all that it needs to go on, and from where it goes on.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct CheckpointSettings {
    /// Optimizer steps (200; of ppo, updates) or minutes (5min) between checkpoints; one is written at the end and on Ctrl-C or SIGTERM, too
    #[arg(long, help_heading = CHECKPOINTS, value_name = "STEPS|MINUTES", default_value = "5min")]
    pub checkpoint_every: Interval,
    /// Number of checkpoints that are kept, the newest
    #[arg(long, help_heading = CHECKPOINTS, value_name = "N", default_value_t = 2, value_parser = at_least_one)]
    pub keep: usize,
    /// Go on from a checkpoint: the newest in --output where there is one (auto, or no value), or that of another run's folder
    #[arg(long, help_heading = CHECKPOINTS, value_name = "auto|FOLDER", num_args = 0..=1, default_missing_value = "auto")]
    #[serde(skip)]
    pub resume: Option<PathBuf>,
}

/// Steps, or minutes, after which something is due again.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Interval {
    /// So many steps.
    Steps(usize),
    /// So many minutes.
    Minutes(f64),
}

impl FromStr for Interval {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "expected a number of steps (200) or of minutes (5min), above 0".to_string();
        let interval = match text.strip_suffix("min") {
            Some(minutes) => Interval::Minutes(minutes.trim().parse().map_err(|_| expected())?),
            None => Interval::Steps(text.parse().map_err(|_| expected())?),
        };
        match interval {
            Interval::Steps(0) => Err(expected()),
            // Up to a thousand years, which a clock can still add.
            Interval::Minutes(minutes) if !(minutes > 0.0 && minutes < 5e8) => Err(expected()),
            interval => Ok(interval),
        }
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Interval::Steps(steps) => write!(f, "{steps}"),
            Interval::Minutes(minutes) => write!(f, "{minutes}min"),
        }
    }
}

impl TryFrom<String> for Interval {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Interval> for String {
    fn from(interval: Interval) -> Self {
        interval.to_string()
    }
}

/// AdamW (Loshchilov & Hutter 2019) and the course of its learning rate.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct OptimizerSettings {
    /// Decoupled weight decay; norms and biases have none
    #[arg(long, help_heading = OPTIMIZER, default_value_t = 0.0, value_parser = not_negative)]
    pub weight_decay: f64,
    /// Decay rate of the mean of the gradients
    #[arg(long, help_heading = OPTIMIZER, default_value_t = 0.9, value_parser = below_one)]
    pub beta1: f64,
    /// Decay rate of the mean of the squared gradients
    #[arg(long, help_heading = OPTIMIZER, default_value_t = 0.95, value_parser = below_one)]
    pub beta2: f64,
    /// Added to the root of the mean squared gradient
    #[arg(long, help_heading = OPTIMIZER, default_value = "1e-8", value_parser = not_negative)]
    pub epsilon: f64,
    /// Whether epsilon is added after the correction of the squared gradients' mean (PyTorch) or before it (TensorFlow)
    #[arg(long, help_heading = OPTIMIZER, value_enum, default_value_t = EpsilonPlace::AfterCorrection)]
    pub epsilon_place: EpsilonPlace,
    /// Gradients are scaled down to this global norm; 0 leaves them as they are
    #[arg(long, help_heading = OPTIMIZER, default_value_t = 1.0, value_parser = not_negative)]
    pub max_gradient_norm: f64,
    /// A step whose gradients are not finite changes nothing; after this many in a row the run ends
    #[arg(long, help_heading = OPTIMIZER, default_value_t = 10, value_parser = at_least_one)]
    pub max_skipped_steps: usize,
    /// Course of the learning rate after the warm-up
    #[arg(long, help_heading = OPTIMIZER, value_enum, default_value_t = ScheduleShape::Cosine)]
    pub schedule: ScheduleShape,
    /// Steps in which the learning rate rises to its peak [default: by --warmup-ratio]
    #[arg(long, help_heading = OPTIMIZER)]
    pub warmup_steps: Option<usize>,
    /// Share of all steps, rounded down, in which the learning rate rises to its peak
    #[arg(long, help_heading = OPTIMIZER, default_value_t = 0.03, value_parser = ratio)]
    pub warmup_ratio: f64,
    /// Where the rise begins, as a share of the peak
    #[arg(long, help_heading = OPTIMIZER, default_value_t = 0.0, value_parser = ratio)]
    pub warmup_start_ratio: f64,
    /// Where the cosine or linear schedule ends, as a share of the peak
    #[arg(long, help_heading = OPTIMIZER, default_value_t = 0.1, value_parser = ratio)]
    pub minimum_learning_rate_ratio: f64,
}

/// Where AdamW adds epsilon, which matters in the first steps (Huang et al. 2024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EpsilonPlace {
    /// √(v / (1 - β₂ᵗ)) + ε, as PyTorch
    AfterCorrection,
    /// (√v + ε) / √(1 - β₂ᵗ), as TensorFlow
    BeforeCorrection,
}

/// The course of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleShape {
    /// Half a cosine from the peak to the minimum (Loshchilov & Hutter 2017)
    Cosine,
    /// A straight line from the peak to the minimum
    Linear,
    /// The peak throughout
    Constant,
}

impl CheckpointSettings {
    /// When they are read.
    pub fn flags() -> Flags<Self> {
        Flags::new().always(&["checkpoint_every", "keep", "resume"])
    }
}

impl OptimizerSettings {
    /// When they are read.
    pub fn flags() -> Flags<Self> {
        let has_warmup = |of: &Self| of.warmup_steps.map_or(of.warmup_ratio > 0.0, |steps| steps > 0);
        Flags::new()
            .always(&["weight_decay", "beta1", "beta2", "epsilon", "epsilon_place"])
            .always(&["max_gradient_norm", "max_skipped_steps", "schedule", "warmup_steps"])
            .only("without --warmup-steps", &["warmup_ratio"], |of: &Self| of.warmup_steps.is_none())
            .only("with --warmup-steps or --warmup-ratio above 0", &["warmup_start_ratio"], has_warmup)
            .only("with --schedule cosine or linear", &["minimum_learning_rate_ratio"], |of: &Self| {
                of.schedule != ScheduleShape::Constant
            })
    }
}

impl TrainingSettings {
    /// When they are read. `pooling` and `probe_hidden_size` are not among them: when a new head is made, the program says.
    pub fn flags() -> Flags<Self> {
        Flags::new()
            .always(&["method", "resume_optimizer", "max_steps", "batch_size", "learning_rate", "save_dtype"])
            .always(&["gradient_checkpointing"])
            .of(|training: &Self| &training.optimizer, OptimizerSettings::flags())
            .of(|training: &Self| &training.checkpoints, CheckpointSettings::flags())
            .of(|training: &Self| training, MethodSettings::flags())
    }

    /// The peak learning rate: as given, or the methods' default where that of full weights is `full`.
    pub fn learning_rate(&self, full: f64) -> f64 {
        self.learning_rate.unwrap_or_else(|| self.method.learning_rate(full))
    }

    /// The same with the learning rate that they stand for, as it is recorded.
    pub fn resolved(&self, full: f64) -> Self {
        TrainingSettings { learning_rate: Some(self.learning_rate(full)), ..self.clone() }
    }
}

/// The help of a program's `--learning-rate`, for its `#[command(mut_arg("learning_rate", learning_rate_help(full)))]`.
///
/// The default is that of the methods' table: ten times that of full weights for LoRA, and so on.
pub fn learning_rate_help(full: f64) -> impl FnOnce(Arg) -> Arg {
    move |argument| {
        // A product may differ from the shortest decimal in its last bit.
        let rounded = |rate: f64| format!("{rate:.6e}").parse().unwrap_or(rate);
        let [lora, bitfit, prompt]: [f64; 3] = [10.0, 100.0, 300.0].map(|factor| rounded(full * factor));
        argument.help(format!(
            "Peak learning rate [default: {full:e} for full, {lora:e} for lora and adapters, {bitfit:e} for bitfit, probing, p-tuning and \
             prefix-tuning, {prompt:e} for prompt-tuning, p-tuning-v2 and ia3]"
        ))
    }
}

/// A whole number, 1 or more.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected 1 or more".to_string()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}

/// A finite number, 0 or more.
pub fn not_negative(text: &str) -> Result<f64, String> {
    number_in(text, |number| number >= 0.0, "a finite number, 0 or more")
}

/// A number from 0 up to, but not including, 1.
pub fn below_one(text: &str) -> Result<f64, String> {
    number_in(text, |number| (0.0..1.0).contains(&number), "a number from 0 to below 1")
}

/// A number from 0 to 1.
pub fn ratio(text: &str) -> Result<f64, String> {
    number_in(text, |number| (0.0..=1.0).contains(&number), "a number from 0 to 1")
}

fn number_in(text: &str, holds: impl Fn(f64) -> bool, expected: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| format!("expected {expected}"))?;
    if number.is_finite() && holds(number) { Ok(number) } else { Err(format!("expected {expected}")) }
}
