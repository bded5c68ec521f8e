//! Sequence classifiers that others trained, or `sft --objective classification` did: texts, or pairs of texts, to the probabilities of labels.
//!
//! What says whether an answer is toxic (Detoxify, ToxiGen's classifiers) or follows from a passage (models of natural-language inference) is
//! such a model. BERT, RoBERTa, XLM-RoBERTa and every decoder run on the model core; DeBERTa-v2 and v3, whose attention is another, on
//! an encoder of their own that cannot be trained ([`deberta`]).

pub mod deberta;
mod identity;
mod labels;
mod windows;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::{TokenTree, split_by_budget};
use crate::data::tokenize::{EncodedTexts, Tokenizer};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::model::architecture::{Architecture, Config};
use crate::model::folder::{read_architecture, read_json};
use crate::model::head::Form;
use crate::model::weight_files::TensorFiles;
use crate::remote::hub;
use deberta::Deberta;
pub use identity::Identity;
pub use labels::Outputs;
pub use windows::Windows;

/// A text, or a pair of texts (premise and hypothesis), to be classified.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ClassifierInput {
    /// The text, or the first of two.
    pub text: String,
    /// The second.
    pub pair: Option<String>,
}

/// What a classifier says of texts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Classified {
    /// The probability of every label for every text, `[texts][labels]`.
    pub probabilities: Vec<Vec<f32>>,
    /// How many of the texts were longer than the classifier reads and lost their end.
    pub truncated: usize,
}

/// A frozen sequence classifier with its tokenizer and its labels.
pub struct Classifier {
    folder: PathBuf,
    tokenizer: Tokenizer,
    network: Network,
    labels: Vec<String>,
    outputs: Outputs,
    max_length: usize,
    identity: Identity,
}

/// What computes the labels' numbers.
enum Network {
    Core(Box<Model>),
    Deberta(Box<Deberta>),
}

/// A network as read, with what is known of it beside its weights.
struct Loaded {
    network: Network,
    labels: Vec<String>,
    outputs: Outputs,
    identity: Identity,
}

impl Classifier {
    /// Reads a folder of `config.json`, `*.safetensors` and `tokenizer.json` with the class `...ForSequenceClassification` of a known family, or one
    /// that `sft --objective classification` wrote: full weights, or adapters on their base.
    ///
    /// # Errors
    /// Where the folder holds no such classifier whole. A head is never made up.
    pub fn load(folder: &Path) -> Result<Self> {
        let given = folder;
        let folder = &hub::folder(given)?;
        let config_path = folder.join("config.json");
        let config = if config_path.is_file() { read_json(&config_path)? } else { Value::Null };
        let loaded = if is_deberta(&config) { load_deberta(folder, &config)? } else { load_on_the_core(folder)? };
        let Loaded { network, labels, outputs, identity } = loaded;
        let tokenizer = Tokenizer::open(&adapt::companions(folder, &[])?)?.for_rows(network.vocabulary());
        let limits = [network.longest(), tokenizer.model_max_length()?];
        let max_length = limits.into_iter().flatten().min().unwrap_or(usize::MAX);
        Ok(Classifier { folder: given.to_path_buf(), tokenizer, network, labels, outputs, max_length, identity })
    }

    /// The bytes of the weights of a classifier that is not read yet: as they are stored, or, of DeBERTa, in f32.
    pub fn stored_bytes(folder: &Path) -> Result<usize> {
        let (base, _) = adapt::resolve(&hub::folder(folder)?, &[])?;
        let config = read_json(&base.join("config.json"))?;
        let files = TensorFiles::open(&base)?;
        if is_deberta(&config) {
            return Ok(4 * files.numbers());
        }
        let bytes = |path: &Path| Ok(std::fs::metadata(path).map_err(Error::io(path))?.len() as usize);
        files.paths().map(bytes).sum()
    }

    /// What the labels are called, in the order of their probabilities.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// How scores become probabilities.
    pub fn outputs(&self) -> Outputs {
        self.outputs
    }

    /// The most tokens of a text, or of both of a pair, that it reads: as many as the model has positions, or as the tokenizer's files say if that is less.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// By what a result names the classifier that it came from.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The place of the first of these names that is a label's, in whatever case: classifiers call the same thing differently.
    ///
    /// # Errors
    /// Where none of them is; the message lists the labels that there are.
    pub fn label_index(&self, names: &[&str]) -> Result<usize> {
        let place = |name: &&str| self.labels.iter().position(|label| label.to_lowercase() == name.to_lowercase());
        match names.iter().find_map(place) {
            Some(index) => Ok(index),
            None => bail!(
                "{}: this classifier has no label called {}; its labels are {}",
                self.folder.display(),
                names.join(" or "),
                self.labels.join(", ")
            ),
        }
    }

    /// The tokens of a text or pair as the classifier reads them, cut to its length.
    pub fn encode(&self, input: &ClassifierInput) -> Result<EncodedTexts> {
        // transformers takes an empty second text for none.
        let pair = input.pair.as_deref().filter(|pair| !pair.is_empty());
        let encoded = self.tokenizer.encode_texts(&input.text, pair, self.max_length)?;
        if encoded.tokens.is_empty() {
            bail!("{}: the text \"{}\" has no token for the classifier to read", self.folder.display(), input.text);
        }
        Ok(encoded)
    }

    /// The probability of every label for every text, in batches of at most `tokens_per_batch` tokens (a longer text stands alone). A text's numbers do not depend
    /// on those beside it, and a text that occurs again is not read again.
    pub fn probabilities(&self, inputs: &[ClassifierInput], tokens_per_batch: usize) -> Result<Classified> {
        let (scores, truncated) = self.scores(inputs, tokens_per_batch)?;
        let probabilities = scores.iter().map(|scores| self.outputs.probabilities(scores)).collect();
        Ok(Classified { probabilities, truncated })
    }

    /// The logarithm of the odds of one label for every text, as [`probabilities`](Self::probabilities) reads them.
    pub fn log_odds(&self, inputs: &[ClassifierInput], label: usize, tokens_per_batch: usize) -> Result<Vec<f64>> {
        let (scores, _) = self.scores(inputs, tokens_per_batch)?;
        Ok(scores.iter().map(|scores| self.outputs.log_odds(scores, label)).collect())
    }

    /// The labels' numbers for every text, and how many texts lost their end.
    fn scores(&self, inputs: &[ClassifierInput], tokens_per_batch: usize) -> Result<(Vec<Vec<f32>>, usize)> {
        let mut places: HashMap<&ClassifierInput, usize> = HashMap::new();
        let mut different: Vec<&ClassifierInput> = Vec::new();
        let place = |input| {
            *places.entry(input).or_insert_with(|| {
                different.push(input);
                different.len() - 1
            })
        };
        let places: Vec<usize> = inputs.iter().map(place).collect();
        let texts = different.iter().map(|input| self.encode(input)).collect::<Result<Vec<_>>>()?;
        let sizes: Vec<usize> = texts.iter().map(|text| text.tokens.len()).collect();
        let mut found = Vec::with_capacity(texts.len());
        for range in split_by_budget(&sizes, tokens_per_batch) {
            let first = range.start;
            let logits: Vec<Vec<f32>> = self.network.logits(&texts[range])?.to_vec2()?; // [texts, labels]
            // An infinite logit would be a probability of 0 or 1.
            if let Some(text) = logits.iter().position(|row| row.iter().any(|value| !value.is_finite())) {
                bail!(
                    "{}: gives the text \"{}\" a logit that is no finite number; the weights are damaged or overflow",
                    self.folder.display(),
                    different[first + text].text
                );
            }
            found.extend(logits);
        }
        let truncated = places.iter().filter(|&&place| texts[place].was_cut).count();
        Ok((places.iter().map(|&place| found[place].clone()).collect(), truncated))
    }
}

impl Network {
    /// The labels' numbers, `[texts, labels]`.
    fn logits(&self, texts: &[EncodedTexts]) -> Result<Tensor> {
        match self {
            Network::Deberta(deberta) => deberta.logits(texts),
            Network::Core(model) => {
                let trees: Vec<TokenTree> = texts.iter().map(EncodedTexts::tree).collect();
                let batch = model.pack_texts(trees.iter().zip(texts.iter().map(|text| &text.types[..])));
                Ok(model.classes(&model.hidden(&batch, &Pass::default())?, &batch)?.tensor().clone())
            }
        }
    }

    fn vocabulary(&self) -> usize {
        match self {
            Network::Deberta(deberta) => deberta.vocabulary(),
            Network::Core(model) => model.architecture().vocabulary,
        }
    }

    fn longest(&self) -> Option<usize> {
        match self {
            Network::Deberta(deberta) => Some(deberta.longest()),
            Network::Core(model) => model.architecture().longest(),
        }
    }
}

fn is_deberta(config: &Value) -> bool {
    config.get("model_type").and_then(Value::as_str) == Some(deberta::MODEL_TYPE)
}

fn load_deberta(folder: &Path, config: &Value) -> Result<Loaded> {
    let file = folder.join("config.json").display().to_string();
    let config = Config::new(config, file);
    check_class(&config, deberta::CLASS, false)?;
    let deberta = Deberta::load(folder, &config, &Device::Cpu)?;
    let labels = labels::labels(&config, deberta.labels(), deberta::OUT)?;
    let outputs = labels::outputs(&config, labels.len())?;
    let identity = Identity::of(folder, deberta::CLASS, folder, &[])?;
    Ok(Loaded { network: Network::Deberta(Box::new(deberta)), labels, outputs, identity })
}

fn load_on_the_core(folder: &Path) -> Result<Loaded> {
    let (base, adapters) = adapt::resolve(folder, &[])?;
    let (json, architecture) = read_architecture(&base)?;
    let file = base.join("config.json").display().to_string();
    let config = Config::new(&json, file);
    if adapters.is_empty() {
        // A head of our own form stands in a folder of the bare model's class.
        check_class(&config, architecture.classifier_class, Form::read(folder)?.is_some())?;
    }
    let role = Role { folder, adapters: &[], training: Training::Frozen, head: Head::AsFound, seed: 0 };
    let model = Bases::new(Device::Cpu).load(&role)?;
    let labels = labels_of(&model, &config, folder, !adapters.is_empty())?;
    let outputs = labels::outputs(&config, labels.len())?;
    let identity = Identity::of(folder, architecture.classifier_class, &base, &adapters)?;
    Ok(Loaded { network: Network::Core(Box::new(model)), labels, outputs, identity })
}

/// The labels of a model's head: for one that came with an adapter, of which the base's `config.json` knows nothing, those that were saved with it.
fn labels_of(model: &Model, config: &Config, folder: &Path, in_adapter: bool) -> Result<Vec<String>> {
    let architecture: &Architecture = model.architecture();
    let Some(head) = model.head() else {
        bail!(
            "{}: tensor \"{}.weight\" is missing, so there is no classification head; expected the folder of a {}",
            folder.display(),
            architecture.names.head.out,
            architecture.classifier_class
        );
    };
    match (in_adapter, head.form.labels.is_empty()) {
        (true, false) => Ok(head.form.labels.clone()),
        (true, true) => Ok((0..head.labels()).map(labels::unnamed).collect()),
        (false, _) => labels::labels(config, head.labels(), head.out_name()),
    }
}

/// Refuses a model of another class than the family's classifier, unless it has a head of our own.
fn check_class(config: &Config, expected: &str, has_own_head: bool) -> Result<()> {
    let named = config.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str);
    match named {
        Some(named) if named != expected && !has_own_head => bail!(
            "{}: \"architectures\" is \"{named}\", expected \"{expected}\"; give a model that was trained to classify, or train one with `sft --objective classification`",
            config.file
        ),
        _ => Ok(()),
    }
}
