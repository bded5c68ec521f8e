//! Presets: the details of PPO as publications and programs set them, and what `--algorithm` changes.

use clap::{Arg, ValueEnum};
use serde::{Deserialize, Serialize};
use toml::Value;

use super::{Algorithm, PpoSettings};

/// A publication or program whose details are taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// Ouyang et al. 2022, appendix C.4
    Instructgpt,
    /// Huang et al. 2024, The N+ Implementation Details of RLHF with PPO
    NPlus,
    /// The defaults of TRL 1.12, the last that had PPO
    Trl,
}

/// A setting by the name of its field, and its value as on the command line.
type Setting = (&'static str, &'static str);

/// What the paper leaves open is as in `n-plus` (λ, whitening) or this program's own default (the learning rate, which it scans for each size, clipping of
/// gradients, the length of answers, of which it allows a thousand tokens).
const INSTRUCTGPT: &[Setting] = &[
    // 256,000 episodes, one answer to each prompt.
    ("batch_size", "512"),
    ("answers", "1"),
    ("minibatches", "8"),
    ("ppo_epochs", "1"),
    ("reshuffle", "true"),
    ("temperature", "1"),
    ("missing_eos_penalty", "0"),
    ("reward_clip", "0"),
    ("whiten_rewards", "false"),
    ("kl_coefficient", "0.02"),
    ("kl_in", "reward"),
    ("kl_estimator", "k1"),
    ("kl_controller", "fixed"),
    ("gamma", "1"),
    ("lambda", "0.95"),
    ("whiten_advantages", "minibatch"),
    ("whitening_variance", "biased"),
    ("clip_range", "0.2"),
    ("entropy_coefficient", "0"),
    ("ratio_threshold", "0"),
    ("sampler_correction", "0"),
    ("value_learning_rate", "9e-6"),
    ("value_clip_range", "0.2"),
    ("value_coefficient", "1"),
    ("critic_warmup", "0"),
    ("ptx_coefficient", "27.8"),
    ("ptx_ratio", "8"),
    ("ema_decay", "0.992"),
    ("beta1", "0.9"),
    ("beta2", "0.95"),
    ("epsilon", "1e-8"),
    ("schedule", "constant"),
    // Ten updates from a tenth of the peak.
    ("warmup_steps", "10"),
    ("warmup_start_ratio", "0.1"),
];

/// The code of the paper, whose whitening takes the biased variance.
const N_PLUS: &[Setting] = &[
    ("batch_size", "512"),
    ("answers", "1"),
    ("minibatches", "1"),
    ("ppo_epochs", "4"),
    ("reshuffle", "true"),
    ("response_length", "53"),
    ("temperature", "0.7"),
    // The EOS trick.
    ("missing_eos_score", "-1"),
    ("reward_clip", "0"),
    ("whiten_rewards", "false"),
    ("kl_coefficient", "0.05"),
    ("kl_in", "reward"),
    ("kl_estimator", "k1"),
    ("kl_controller", "fixed"),
    ("gamma", "1"),
    ("lambda", "0.95"),
    ("whiten_advantages", "rollout"),
    ("whitening_variance", "biased"),
    ("clip_range", "0.2"),
    ("entropy_coefficient", "0"),
    ("ratio_threshold", "0"),
    ("sampler_correction", "0"),
    ("value_clip_range", "0.2"),
    ("value_coefficient", "0.1"),
    ("critic_warmup", "0"),
    ("ema_decay", "0"),
    ("learning_rate", "3e-6"),
    ("beta1", "0.9"),
    ("beta2", "0.999"),
    ("epsilon", "1e-5"),
    // PyTorch's default for AdamW.
    ("weight_decay", "0.01"),
    ("max_gradient_norm", "0"),
    ("schedule", "linear"),
    ("minimum_learning_rate_ratio", "0"),
    ("warmup_ratio", "0"),
];

/// Batches are the user's in TRL, and by its default no token ends an answer; 64 answers and the end-of-text token are its examples'.
const TRL: &[Setting] = &[
    ("batch_size", "64"),
    ("answers", "1"),
    ("minibatches", "1"),
    ("ppo_epochs", "4"),
    ("reshuffle", "true"),
    ("response_length", "53"),
    ("temperature", "0.7"),
    ("missing_eos_penalty", "0"),
    ("reward_clip", "0"),
    ("whiten_rewards", "false"),
    ("kl_coefficient", "0.05"),
    ("kl_in", "reward"),
    ("kl_estimator", "k1"),
    ("kl_controller", "fixed"),
    ("gamma", "1"),
    ("lambda", "0.95"),
    ("whiten_advantages", "rollout"),
    ("whitening_variance", "unbiased"),
    ("clip_range", "0.2"),
    ("entropy_coefficient", "0"),
    ("ratio_threshold", "0"),
    ("sampler_correction", "0"),
    ("value_clip_range", "0.2"),
    ("value_coefficient", "0.1"),
    ("critic_warmup", "0"),
    ("ema_decay", "0"),
    ("learning_rate", "3e-6"),
    ("beta1", "0.9"),
    ("beta2", "0.999"),
    ("epsilon", "1e-8"),
    ("weight_decay", "0"),
    // `max_grad_norm` is among its settings, but its loop never clips.
    ("max_gradient_norm", "0"),
    ("schedule", "linear"),
    ("minimum_learning_rate_ratio", "0"),
    ("warmup_ratio", "0"),
];

/// Ahmadian et al. 2024: the KL penalty in the reward of the whole answer, whose ratio is clipped as a whole.
const RLOO: &[Setting] =
    &[("answers", "4"), ("loss_aggregation", "sequence"), ("whiten_advantages", "none"), ("ppo_epochs", "1")];

/// Shao et al. 2024, section 4.1: eight answers here, as in TRL, where the paper has 64; k3 in the loss with weight 0.04.
const GRPO: &[Setting] = &[
    ("answers", "8"),
    ("loss_aggregation", "answer"),
    ("whiten_advantages", "none"),
    ("ppo_epochs", "1"),
    ("kl_in", "loss"),
    ("kl_estimator", "k3"),
    ("kl_coefficient", "0.04"),
];

impl Preset {
    /// What it sets.
    pub fn settings(self) -> &'static [Setting] {
        match self {
            Preset::Instructgpt => INSTRUCTGPT,
            Preset::NPlus => N_PLUS,
            Preset::Trl => TRL,
        }
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Preset::Instructgpt => "instructgpt",
            Preset::NPlus => "n-plus",
            Preset::Trl => "trl",
        }
    }
}

impl Algorithm {
    /// The defaults that it changes.
    pub fn settings(self) -> &'static [Setting] {
        match self {
            Algorithm::Ppo => &[],
            Algorithm::Rloo => RLOO,
            Algorithm::Grpo => GRPO,
        }
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Ppo => "ppo",
            Algorithm::Rloo => "rloo",
            Algorithm::Grpo => "grpo",
        }
    }
}

/// Gives a flag the default that the preset has for it where one is chosen, or else the algorithm's. In the loss the KL penalty is estimated by k3: the gradient
/// of k1 there is 0 on average.
pub(super) fn conditional_defaults(argument: Arg) -> Arg {
    let id = argument.get_id().as_str().to_string();
    let value = |settings: &'static [Setting]| settings.iter().find(|(name, _)| *name == id).map(|(_, value)| *value);
    let argument = if id == "kl_estimator" { argument.default_value_if("kl_in", "loss", "k3") } else { argument };
    let by_preset = Preset::value_variants().iter().map(|preset| ("preset", preset.name(), preset.settings()));
    let by_algorithm = Algorithm::value_variants().iter().map(|one| ("algorithm", one.name(), one.settings()));
    by_preset.chain(by_algorithm).fold(argument, |argument, (flag, name, settings)| match value(settings) {
        Some(value) => argument.default_value_if(flag, name, value),
        None => argument,
    })
}

/// What the preset or the algorithm set, a line each: the setting, its value in this run, and the preset's own where flags or file won over it.
pub fn lines(settings: &PpoSettings) -> Vec<(String, String)> {
    let Ok(table) = toml::Table::try_from(settings) else { return Vec::new() };
    let chosen = settings.preset.map_or_else(Vec::new, |preset| preset.settings().to_vec());
    let others =
        settings.algorithm.settings().iter().filter(|(name, _)| !chosen.iter().any(|(other, _)| other == name));
    let line = |&(name, preset): &Setting| {
        let value = table.get(name).map_or_else(String::new, plain);
        let same = value == preset || value.parse::<f64>().is_ok_and(|value| preset.parse() == Ok(value));
        let shown = if same { preset.to_string() } else { format!("{value} (given; the preset has {preset})") };
        (name.replace('_', "-"), shown)
    };
    chosen.iter().chain(others).map(line).collect()
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
