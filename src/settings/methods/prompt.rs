//! Settings of the methods with virtual tokens.

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::Method;
use crate::settings::flags::Flags;
use crate::settings::groups::{TrainingSettings, at_least_one};

const PROMPT: &str = "Virtual tokens (--method prompt-tuning, p-tuning, prefix-tuning, p-tuning-v2)";

/// Prompt tuning, P-tuning, prefix tuning and P-tuning v2.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct PromptSettings {
    /// Number of virtual tokens
    #[arg(long, help_heading = PROMPT, default_value_t = 20, value_parser = at_least_one)]
    pub num_virtual_tokens: usize,
    /// How virtual tokens of prompt tuning start, and the words whose keys and values a prefix starts from
    #[arg(long, help_heading = PROMPT, value_enum, default_value_t = PromptInit::SampleVocab)]
    pub prompt_tuning_init: PromptInit,
    /// The text, or the label words separated by commas, to start from
    #[arg(long, help_heading = PROMPT, value_name = "TEXT")]
    pub prompt_tuning_init_text: Option<String>,
    /// The encoder of P-tuning
    #[arg(long, help_heading = PROMPT, value_enum, default_value_t = PromptEncoder::Mlp)]
    pub encoder_reparameterization_type: PromptEncoder,
    /// Width of the encoder of P-tuning [default: the model's], or of a prefix's perceptron [default: that of all keys]
    #[arg(long, help_heading = PROMPT, value_parser = at_least_one)]
    pub encoder_hidden_size: Option<usize>,
    /// Layers of P-tuning's LSTM
    #[arg(long, help_heading = PROMPT, default_value_t = 2, value_parser = at_least_one)]
    pub encoder_num_layers: usize,
    /// Train the prefix through a perceptron, which is dropped afterwards (Li & Liang 2021, section 4.3)
    #[arg(long, help_heading = PROMPT)]
    #[serde(default)]
    pub prefix_projection: bool,
}

impl PromptSettings {
    /// When they are read.
    pub(super) fn flags() -> Flags<TrainingSettings> {
        let of = |training: &TrainingSettings| training.methods.prompt.clone();
        let has_tokens = |training: &TrainingSettings| {
            let method = &training.method;
            method.has(Method::PromptTuning) || method.has(Method::PTuning) || has_prefix(training)
        };
        let is_by_encoder = |training: &TrainingSettings| training.method.has(Method::PTuning);
        let starts_from_words = move |training: &TrainingSettings| {
            let prefix = training.method.has(Method::PrefixTuning) && !of(training).prefix_projection;
            training.method.has(Method::PromptTuning) || prefix
        };
        // A prefix through a perceptron, and one that is trained directly from random numbers on, can start from zero too.
        let starts = move |training: &TrainingSettings| {
            let init = of(training).prompt_tuning_init;
            let is_direct = training.method.has(Method::PTuningV2) && init == PromptInit::Random;
            starts_from_words(training) || has_prefix(training) && init == PromptInit::Zero || is_direct
        };
        let has_text = move |training: &TrainingSettings| {
            let init = of(training).prompt_tuning_init;
            starts_from_words(training) && matches!(init, PromptInit::Text | PromptInit::ClassLabels)
        };
        Flags::new()
            .only(
                "with --method prompt-tuning, p-tuning, prefix-tuning or p-tuning-v2",
                &["num_virtual_tokens"],
                has_tokens,
            )
            .only("with --method prompt-tuning or prefix-tuning", &["prompt_tuning_init"], starts)
            .only(
                "with --prompt-tuning-init text or class-labels and --method prompt-tuning or prefix-tuning",
                &["prompt_tuning_init_text"],
                has_text,
            )
            .only("with --method p-tuning", &["encoder_reparameterization_type"], is_by_encoder)
            .only(
                "with --method p-tuning, or prefix-tuning and --prefix-projection",
                &["encoder_hidden_size"],
                move |training| {
                    is_by_encoder(training)
                        || training.method.has(Method::PrefixTuning) && of(training).prefix_projection
                },
            )
            .only(
                "with --method p-tuning and --encoder-reparameterization-type lstm",
                &["encoder_num_layers"],
                move |training| {
                    is_by_encoder(training) && of(training).encoder_reparameterization_type == PromptEncoder::Lstm
                },
            )
            .only("with --method prefix-tuning", &["prefix_projection"], |training: &TrainingSettings| {
                training.method.has(Method::PrefixTuning)
            })
    }
}

fn has_prefix(training: &TrainingSettings) -> bool {
    training.method.has(Method::PrefixTuning) || training.method.has(Method::PTuningV2)
}

/// How virtual tokens start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PromptInit {
    /// Random words of the 5,000 most common of the vocabulary
    SampleVocab,
    /// The words of the classes' labels (--prompt-tuning-init-text "good,bad"), repeated or averaged to the number of virtual tokens
    ClassLabels,
    /// A text (--prompt-tuning-init-text), repeated or cut
    Text,
    /// Normal numbers of the mean and deviation of the embedding table
    Random,
    /// Zero
    Zero,
}

/// P-tuning's encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PromptEncoder {
    /// A perceptron with two hidden layers
    Mlp,
    /// A bidirectional LSTM and a perceptron with one hidden layer
    Lstm,
}
