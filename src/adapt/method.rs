//! Settings of the methods, under PEFT's names and with its defaults where it has them.

use serde::{Deserialize, Serialize};

/// What trains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Every weight.
    #[default]
    Full,
    /// Low-rank updates of linears on a frozen base (Hu et al. 2021).
    Lora,
}

/// Which method trains, and its settings.
#[derive(Debug, Clone, Default, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct MethodSettings {
    /// What trains: full weights or a lightweight method
    #[arg(long, value_enum, default_value_t = Method::Full)]
    pub method: Method,
    /// LoRA's settings.
    #[command(flatten)]
    #[serde(flatten)]
    pub lora: LoraSettings,
}

/// Settings of LoRA.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct LoraSettings {
    /// LoRA: rank of the updates
    #[arg(long, default_value_t = LoraSettings::default().lora_rank)]
    pub lora_rank: usize,
    /// LoRA: the update is scaled by alpha / rank
    #[arg(long, default_value_t = LoraSettings::default().lora_alpha)]
    pub lora_alpha: f64,
    /// LoRA: dropout on the input of the update
    #[arg(long, default_value_t = LoraSettings::default().lora_dropout)]
    pub lora_dropout: f32,
    /// LoRA: names of the linears to update, or all-linear
    #[arg(long, value_delimiter = ',', default_values_t = LoraSettings::default().lora_target_modules)]
    pub lora_target_modules: Vec<String>,
    /// LoRA: scale by alpha / sqrt(rank) instead (rank-stabilised, Kalajdzievski 2023)
    #[arg(long)]
    pub lora_rslora: bool,
}

impl Default for LoraSettings {
    fn default() -> Self {
        LoraSettings {
            lora_rank: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            lora_target_modules: vec![ALL_LINEAR.to_string()],
            lora_rslora: false,
        }
    }
}

/// Every linear of every block; the output matrix and heads are none of them.
pub const ALL_LINEAR: &str = "all-linear";
