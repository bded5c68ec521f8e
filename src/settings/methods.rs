//! What is trained, and each method's own settings, by PEFT's names and with its defaults where PEFT has them.

mod lora;
mod prompt;

use std::fmt;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::flags::Flags;
use super::groups::{TrainingSettings, at_least_one, not_negative};
pub use lora::{LoraBias, LoraInit, LoraSettings, Pattern};
pub use prompt::{PromptEncoder, PromptInit, PromptSettings};

const ADAPTERS: &str = "Bottleneck adapters (--method adapters)";
const HEAD: &str = "BitFit, and heads (--method bitfit, probing)";

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Method {
    /// All weights of the model
    Full,
    /// A head on a frozen model (Alain & Bengio 2017)
    Probing,
    /// Biases only (Ben Zaken et al. 2022)
    Bitfit,
    /// Low-rank updates beside frozen weights (Hu et al. 2021)
    Lora,
    /// Embeddings before the input (Lester et al. 2021)
    PromptTuning,
    /// The same through an encoder (Liu et al. 2021)
    PTuning,
    /// Keys and values before each layer's own (Li & Liang 2021)
    PrefixTuning,
    /// The same, each trained directly, from random ones on (Liu et al. 2022)
    #[value(name = "p-tuning-v2")]
    PTuningV2,
    /// Small bottlenecks after the sub-layers (Houlsby et al. 2019)
    Adapters,
    /// Vectors that scale keys, values and feed-forward (Liu et al. 2022b)
    Ia3,
}

impl Method {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Method::Full => "full",
            Method::Probing => "probing",
            Method::Bitfit => "bitfit",
            Method::Lora => "lora",
            Method::PromptTuning => "prompt-tuning",
            Method::PTuning => "p-tuning",
            Method::PrefixTuning => "prefix-tuning",
            Method::PTuningV2 => "p-tuning-v2",
            Method::Adapters => "adapters",
            Method::Ia3 => "ia3",
        }
    }

    /// The kind of adapter that it trains. P-tuning v2 starts otherwise than prefix tuning and is the same afterwards.
    pub fn adapter(self) -> &'static str {
        if self == Method::PTuningV2 { Method::PrefixTuning.name() } else { self.name() }
    }

    /// How much higher than full weights' the default learning rate is, after the methods' papers and PEFT's examples.
    fn learning_rate_factor(self) -> f64 {
        match self {
            Method::Full => 1.0,
            Method::Lora | Method::Adapters => 10.0,
            Method::Bitfit | Method::Probing => 100.0,
            Method::PTuning | Method::PrefixTuning => 100.0,
            Method::PromptTuning | Method::PTuningV2 | Method::Ia3 => 300.0,
        }
    }
}

/// One method, or several that stand on top of each other, written `lora+prompt-tuning`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Methods(Vec<Method>);

impl Methods {
    /// The methods, in their order.
    pub fn list(&self) -> &[Method] {
        &self.0
    }

    /// Whether this is one of the methods.
    pub fn has(&self, method: Method) -> bool {
        self.0.contains(&method)
    }

    /// Whether all weights train.
    pub fn is_full(&self) -> bool {
        self.0 == [Method::Full]
    }

    /// The default learning rate of a program whose default for full weights is `full`: that of the first method.
    pub fn learning_rate(&self, full: f64) -> f64 {
        let rate = full * self.0[0].learning_rate_factor();
        // As people write it: 0.003 and not 0.0030000000000000005.
        format!("{rate:.5e}").parse().unwrap_or(rate)
    }

    /// What the learning rate of one of several methods is multiplied with, so that each has its own.
    pub fn learning_rate_scale(&self, method: Method) -> f64 {
        method.learning_rate_factor() / self.0[0].learning_rate_factor()
    }
}

impl FromStr for Methods {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut methods = Vec::new();
        for name in text.split('+') {
            let Ok(method) = Method::from_str(name.trim(), true) else {
                let known: Vec<&str> = Method::value_variants().iter().map(|method| method.name()).collect();
                return Err(format!(
                    "unknown method \"{name}\"; known methods are {}, several joined by +",
                    known.join(", ")
                ));
            };
            if methods.iter().any(|other: &Method| other.adapter() == method.adapter()) {
                return Err(format!("{} is given twice", method.adapter()));
            }
            methods.push(method);
        }
        if methods.len() > 1 && methods.contains(&Method::Full) {
            return Err("full trains every weight, and no other method stands on top of it".to_string());
        }
        Ok(Methods(methods))
    }
}

impl TryFrom<String> for Methods {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Methods {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.0.iter().map(|method| method.name()).collect();
        formatter.write_str(&names.join("+"))
    }
}

impl From<Methods> for String {
    fn from(methods: Methods) -> Self {
        methods.to_string()
    }
}

/// The settings of all methods; a method reads its own.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct MethodSettings {
    /// LoRA's and IA3's.
    #[command(flatten)]
    #[serde(flatten)]
    pub lora: LoraSettings,
    /// Those of the methods with virtual tokens.
    #[command(flatten)]
    #[serde(flatten)]
    pub prompt: PromptSettings,
    /// The bottleneck adapters'.
    #[command(flatten)]
    #[serde(flatten)]
    pub bottleneck: BottleneckSettings,
    /// Probing's and BitFit's.
    #[command(flatten)]
    #[serde(flatten)]
    pub probe: ProbeSettings,
}

impl MethodSettings {
    /// When they are read: by the methods that are trained. `pooling` and `probe_hidden_size`, which are about new heads too, are not among them.
    pub fn flags() -> Flags<TrainingSettings> {
        let has = |method: Method| move |training: &TrainingSettings| training.method.has(method);
        let any = |methods: &'static [Method]| {
            move |training: &TrainingSettings| methods.iter().any(|&method| training.method.has(method))
        };
        let updates =
            &["lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern"];
        let beside = &["alpha_pattern", "lora_bias", "modules_to_save", "loraplus_lr_ratio"];
        let placed =
            &["adapter_placement", "reduction_factor", "non_linearity", "adapter_scaling", "adapter_train_norms"];
        Flags::new()
            .only("with --method lora", updates, has(Method::Lora))
            .only("with --method lora", beside, has(Method::Lora))
            .only("with --method lora or ia3", &["target_modules"], any(&[Method::Lora, Method::Ia3]))
            .only("with --method ia3", &["feedforward_modules"], has(Method::Ia3))
            .only("with --method adapters", placed, has(Method::Adapters))
            .only("with --method probing", &["probe_layer"], has(Method::Probing))
            .only("with --method bitfit", &["bitfit_biases"], has(Method::Bitfit))
            .of(|training: &TrainingSettings| training, PromptSettings::flags())
    }
}

/// Bottleneck adapters: `x + scaling W_up σ(W_down x)`.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct BottleneckSettings {
    /// Where they stand
    #[arg(long, help_heading = ADAPTERS, value_enum, default_value_t = Placement::Houlsby)]
    pub adapter_placement: Placement,
    /// The bottleneck is that many times narrower than the model [default: 16; 2 for parallel]
    #[arg(long, help_heading = ADAPTERS, value_parser = at_least_one)]
    pub reduction_factor: Option<usize>,
    /// The non-linearity: relu, gelu, gelu_new, silu (swish) or tanh [default: swish for houlsby, else relu]
    #[arg(long, help_heading = ADAPTERS, value_name = "NAME")]
    pub non_linearity: Option<String>,
    /// What the adapter's output is multiplied with [default: 1; 4 for parallel]
    #[arg(long, help_heading = ADAPTERS, value_parser = not_negative)]
    pub adapter_scaling: Option<f64>,
    /// Train the model's norms too, as Houlsby et al. do
    #[arg(long, help_heading = ADAPTERS)]
    #[serde(default)]
    pub adapter_train_norms: bool,
}

/// Where bottleneck adapters stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// After attention and after the feed-forward (Houlsby et al. 2019)
    Houlsby,
    /// After the feed-forward (Pfeiffer et al. 2021)
    Pfeiffer,
    /// Beside the feed-forward (He et al. 2022)
    Parallel,
}

/// Probing and BitFit, and the heads of classifiers and reward models.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct ProbeSettings {
    /// Which hidden state stands for a sequence [default: the family's: the last token, an encoder's first]
    #[arg(long, help_heading = HEAD, value_enum)]
    pub pooling: Option<Pooling>,
    /// The layer that is read, 1 for the first [default: the last]
    #[arg(long, help_heading = HEAD, value_parser = at_least_one)]
    pub probe_layer: Option<usize>,
    /// Width of a new head's hidden layer; 0 for none [default: as the family's classifier in transformers]
    #[arg(long, help_heading = HEAD)]
    pub probe_hidden_size: Option<usize>,
    /// Which biases BitFit trains
    #[arg(long, help_heading = HEAD, value_enum, num_args = 1.., value_delimiter = ',', default_value = "all")]
    pub bitfit_biases: Vec<BiasGroup>,
}

/// Which hidden state of a sequence stands for all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// The first token's, an encoder's CLS
    First,
    /// The mean over all tokens
    Mean,
    /// The last token's
    Last,
}

impl Pooling {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Pooling::First => "first",
            Pooling::Mean => "mean",
            Pooling::Last => "last",
        }
    }
}

/// Biases that BitFit may train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BiasGroup {
    /// All
    All,
    /// Of the queries
    Query,
    /// Of the keys
    Key,
    /// Of the values
    Value,
    /// Of attention's output
    Output,
    /// Of the feed-forward
    FeedForward,
    /// Of the feed-forward's first linear alone (with the queries', the subset of the paper's section 4)
    FeedForwardUp,
    /// Of the norms
    Norms,
}
