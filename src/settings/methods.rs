//! What is trained, and each method's own settings, by PEFT's names and with its defaults where PEFT has them.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::flags::Flags;
use super::groups::{TrainingSettings, at_least_one, below_one, not_negative};

const LORA: &str = "LoRA and IA3 (--method lora, ia3)";
const PROMPT: &str = "Virtual tokens (--method prompt-tuning, p-tuning, prefix-tuning, p-tuning-v2)";
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
    #[arg(long, help_heading = LORA, value_name = "NAME", value_delimiter = ',')]
    #[serde(default)]
    pub target_modules: Vec<String>,
    /// Of IA3's targets those that are scaled at their input [default: the family's, as in PEFT]
    #[arg(long, help_heading = LORA, value_name = "NAME", value_delimiter = ',')]
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
    #[arg(long, help_heading = LORA, value_name = "NAME=R", value_delimiter = ',')]
    #[serde(default)]
    pub rank_pattern: Vec<Pattern>,
    /// Alphas of single layers
    #[arg(long, help_heading = LORA, value_name = "NAME=ALPHA", value_delimiter = ',')]
    #[serde(default)]
    pub alpha_pattern: Vec<Pattern>,
    /// Which biases of the model train beside the update
    #[arg(long, help_heading = LORA, value_enum, default_value_t = LoraBias::None)]
    pub lora_bias: LoraBias,
    /// Modules of the model that train as a whole in addition to the update: ends of names, such as lm_head, embed_tokens or norm
    #[arg(long, help_heading = LORA, value_name = "NAME", value_delimiter = ',')]
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
    fn flags() -> Flags<TrainingSettings> {
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
    #[arg(long, help_heading = HEAD, value_enum, value_delimiter = ',', default_value = "all")]
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
