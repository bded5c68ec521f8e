//! Settings of LoRA and IA3.

use std::collections::BTreeMap;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::settings::groups::{at_least_one, below_one, not_negative};

const LORA: &str = "LoRA and IA3 (--method lora, ia3)";

/// Low-rank adaptation (Hu et al. 2021): `y = W x + s B A x`, with `A` `[r, d_in]`, `B` `[d_out, r]` and `s = alpha / r`.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct LoraSettings {
    /// Rank of the update
    #[arg(long, help_heading = LORA, default_value_t = 8, value_parser = at_least_one)]
    pub lora_r: usize,
    /// The update is scaled by alpha / r
    #[arg(long, help_heading = LORA, default_value_t = 8.0, value_parser = not_negative)]
    pub lora_alpha: f64,
    /// Dropout of the update's input
    #[arg(long, help_heading = LORA, default_value_t = 0.0, value_parser = below_one)]
    pub lora_dropout: f64,
    /// Names of the layers that get an update, or all-linear; lm_head too, and for LoRA the embeddings [default: the family's, as in PEFT]
    #[arg(long, help_heading = LORA, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    #[serde(default)]
    pub target_modules: Vec<String>,
    /// Of IA3's targets those that are scaled at their input [default: the family's, as in PEFT]
    #[arg(long, help_heading = LORA, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    #[serde(default)]
    pub feedforward_modules: Vec<String>,
    /// Scale by alpha / sqrt(r) instead, which suits high ranks (rsLoRA, Kalajdzievski 2023)
    #[arg(long, help_heading = LORA)]
    #[serde(default)]
    pub use_rslora: bool,
    /// Train magnitudes of the weights' rows beside the update, which then changes directions (DoRA, Liu et al. 2024)
    #[arg(long, help_heading = LORA)]
    #[serde(default)]
    pub use_dora: bool,
    /// How A and B start
    #[arg(long, help_heading = LORA, value_enum, default_value_t = LoraInit::Kaiming)]
    pub init_lora_weights: LoraInit,
    /// Ranks of single layers, such as "layers.0.self_attn.q_proj=4"; a name may be a regular expression, as in PEFT
    #[arg(long, help_heading = LORA, value_name = "NAME=R", num_args = 1.., value_delimiter = ',')]
    #[serde(default)]
    pub rank_pattern: Vec<Pattern>,
    /// Alphas of single layers
    #[arg(long, help_heading = LORA, value_name = "NAME=ALPHA", num_args = 1.., value_delimiter = ',')]
    #[serde(default)]
    pub alpha_pattern: Vec<Pattern>,
    /// Which biases of the model train beside the update
    #[arg(long, help_heading = LORA, value_enum, default_value_t = LoraBias::None)]
    pub lora_bias: LoraBias,
    /// Modules of the model that train as a whole in addition to the update: ends of names, such as lm_head, embed_tokens or norm
    #[arg(long, help_heading = LORA, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    #[serde(default)]
    pub modules_to_save: Vec<String>,
    /// B's learning rate is that many times A's (LoRA+, Hayou et al. 2024, who advise about 16)
    #[arg(long, help_heading = LORA, default_value_t = 1.0, value_parser = not_negative)]
    pub loraplus_lr_ratio: f64,
}

/// A layer's name or a regular expression, and a number for it; written `name=number`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern {
    /// The name.
    pub name: String,
    /// The number.
    pub number: f64,
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "expected name=number, as in q_proj=4".to_string();
        let (name, number) = text.rsplit_once('=').ok_or_else(wrong)?;
        match number.parse::<f64>() {
            Ok(number) if number.is_finite() && number > 0.0 => Ok(Pattern { name: name.to_string(), number }),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        format!("{}={}", pattern.name, pattern.number)
    }
}

impl Pattern {
    /// As PEFT writes them.
    pub fn map(patterns: &[Pattern]) -> BTreeMap<String, f64> {
        patterns.iter().map(|pattern| (pattern.name.clone(), pattern.number)).collect()
    }
}

/// How LoRA's matrices start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoraInit {
    /// A uniform in ±1/sqrt(d_in), B zero (PEFT's default)
    Kaiming,
    /// A normal with deviation 1/r, B zero
    Gaussian,
    /// A and B orthogonal to each other, both away from zero
    Orthogonal,
    /// A and B are the weight's principal components, which the frozen rest lacks (PiSSA, Meng et al. 2024)
    Pissa,
}

/// Which biases train beside LoRA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraBias {
    /// None
    None,
    /// All of the model
    All,
    /// Those of the layers that have an update
    #[value(name = "lora_only")]
    LoraOnly,
}
