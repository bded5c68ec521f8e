//! Labelled texts to classes: by a head over a hidden state, or by the words with which a language model names the classes.

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::{D, Device, Tensor};
use serde_json::{Map, Value, json};

use super::confusion::Predictions;
use super::control_task::{self, ControlTask};
use super::{Accumulated, SftReport, SftSettings, Task, language_modelling, train};
use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::{Batch, TokenTree, split_by_budget};
use crate::data::inspect;
use crate::data::schema::{self, Labelled, Text};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::{Ending, Truncation};
use crate::error::Result;
use crate::model::adapter::Pass;
use crate::model::{Model, dropout_seed};
use crate::say;
use crate::settings::{CommonSettings, Method};
use crate::train::memory;
use crate::train::optimizer::Optimizer;
use crate::train::order::{self, Order};
use crate::train::plan::{Examples, training_plan};
use crate::train::run::Run;
use crate::train::table::Table;

/// A text as tokens, with the number of its class.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// The text; or, for a language model, the text and every class's word as an answer.
    pub tree: TokenTree,
    /// The types of the text's tokens; none for a language model.
    pub types: Vec<u32>,
    /// The class.
    pub label: usize,
}

impl Example {
    fn typed(&self) -> (&TokenTree, &[u32]) {
        (&self.tree, &self.types)
    }
}

/// The examples of a run.
pub(super) struct Data {
    labels: Vec<String>,
    training: Vec<Example>,
    evaluation: Vec<Example>,
    truncation: Truncation,
}

pub(super) fn run(settings: &SftSettings) -> Result<SftReport> {
    let common = &settings.common;
    let tokenizer = Tokenizer::load(adapt::tokenizer_folder(&settings.model.model)?)?;
    let data = read(settings, &tokenizer)?;
    if let Some(count) = settings.examples.inspect {
        for example in data.training.iter().take(count) {
            say!("{}\n{}", data.labels[example.label], inspect::inspect(&example.tree, &tokenizer)?);
        }
        return Ok(SftReport::NOTHING);
    }
    let by_words = !settings.label_words.is_empty();
    let role = Role {
        folder: &settings.model.model,
        adapters: &settings.model.adapter,
        training: Training::With(&settings.training),
        head: if by_words { Head::Language } else { Head::Classes(&data.labels) },
        seed: common.seed,
    };
    memory::check_before_reading(&settings.model, &settings.training)?;
    let mut bases = Bases::new(Device::Cpu);
    let model = bases.load(&role)?;
    tokenizer.fits(model.architecture().vocabulary)?;
    let longest = data.training.iter().chain(&data.evaluation).map(|example| example.tree.longest()).max();
    model.architecture().check_length(longest.unwrap_or(0))?;
    let order = Order::new((0..data.training.len()).collect(), settings.training.batch_size, common.seed);
    let tokens = data.training.iter().map(|example| example.tree.tokens()).sum();
    let (training, evaluation) = (data.training.len(), data.evaluation.len());
    let examples = Examples { what: "labelled texts", training, evaluation, tokens, truncation: data.truncation };
    let plan = training_plan("sft", &model, &[], common, &settings.training, &examples, 0)?
        .line("classes", format!("{}: {}", data.labels.len(), data.labels.join(", ")));
    let total_steps = order.total_steps(settings.examples.epochs as f64, settings.training.max_steps);
    let checkpoints = &settings.training.checkpoints;
    let mut run = Run::start(&settings.resolved(), common, checkpoints, &plan, total_steps, settings.inputs()?)?;
    let save = |folder: &Path| {
        model.save(folder)?;
        tokenizer.save(folder)
    };
    let is_probe = settings.training.method.list() == [Method::Probing] && !by_words;
    let report = if by_words {
        let task = ByWords { model: &model, data: &data, common };
        let report = train(settings, &model, &task, order, &mut run, save)?;
        write_report(&run, &data, task.predictions()?, None)?;
        report
    } else if is_probe {
        let features = |examples: &[Example]| pooled(&model, examples, common.tokens_per_batch);
        let (training, evaluation) = (features(&data.training)?, features(&data.evaluation)?);
        let task = ByHead::new(&model, &data, Input::Pooled { training: &training, evaluation: &evaluation }, common);
        let report = train(settings, &model, &task, order, &mut run, save)?;
        let control = control_task::run(settings, &bases.load(&role)?, &data, (&training, &evaluation))?;
        write_report(&run, &data, task.predictions()?, Some(control))?;
        report
    } else {
        let task = ByHead::new(&model, &data, Input::Tokens, common);
        let report = train(settings, &model, &task, order, &mut run, save)?;
        write_report(&run, &data, task.predictions()?, None)?;
        report
    };
    run.finish()?;
    Ok(report)
}

fn read(settings: &SftSettings, tokenizer: &Tokenizer) -> Result<Data> {
    let rows = |pattern: &str| schema::labelled(pattern)?.collect::<Result<Vec<Labelled>>>();
    let training = rows(&settings.data)?;
    let (training, evaluation) = match &settings.examples.evaluation_data {
        Some(pattern) => (training, rows(pattern)?),
        None => order::split(training, settings.examples.evaluation_share, settings.common.seed),
    };
    let labels = labels(settings, &training)?;
    if !settings.label_words.is_empty() && settings.label_words.len() != labels.len() {
        bail!(
            "--label-words has {} words, the data have the {} classes {}; give one for each, in this order",
            settings.label_words.len(),
            labels.len(),
            labels.join(", ")
        );
    }
    let mut truncation = Truncation::default();
    let mut example = |record: &Labelled| -> Result<Example> {
        let Some(label) = labels.iter().position(|label| *label == record.label) else {
            bail!(
                "{}, column `label`: \"{}\" is none of the classes {}; name all of them with --labels",
                record.origin,
                record.label,
                labels.join(", ")
            );
        };
        let max_length = settings.common.max_length;
        if !settings.label_words.is_empty() {
            let tree = with_words(settings, tokenizer, record, &mut truncation)?;
            return Ok(Example { tree, types: Vec::new(), label });
        }
        let texts = tokenizer.labelled(record, max_length, &mut truncation)?;
        Ok(Example { tree: texts.tree(), types: texts.types, label })
    };
    let training = training.iter().map(&mut example).collect::<Result<Vec<_>>>()?;
    let evaluation = evaluation.iter().map(&mut example).collect::<Result<Vec<_>>>()?;
    Ok(Data { labels, training, evaluation, truncation })
}

/// The classes: as given, or those of the training data, numbers in their order and names in that of the alphabet.
fn labels(settings: &SftSettings, training: &[Labelled]) -> Result<Vec<String>> {
    if !settings.labels.is_empty() {
        return Ok(settings.labels.clone());
    }
    let found: BTreeSet<&String> = training.iter().map(|record| &record.label).collect();
    let mut labels: Vec<String> = found.into_iter().cloned().collect();
    if labels.iter().all(|label| label.parse::<i64>().is_ok()) {
        labels.sort_by_key(|label| label.parse::<i64>().unwrap_or_default());
    }
    if labels.len() < 2 {
        bail!("{}: column `label` has {} class; expected two or more", settings.data, labels.len());
    }
    Ok(labels)
}

/// The text as a prompt, and the word of every class as an answer to it.
fn with_words(
    settings: &SftSettings,
    tokenizer: &Tokenizer,
    record: &Labelled,
    truncation: &mut Truncation,
) -> Result<TokenTree> {
    let template = settings.label_template.replace("\\n", "\n");
    let Some((before, after)) = template.split_once("{label}") else {
        bail!("--label-template \"{}\": there is no {{label}} in it", settings.label_template);
    };
    let text = match &record.pair {
        Some(pair) => format!("{}\n{pair}", record.text),
        None => record.text.clone(),
    };
    let prompt = before.replace("{text}", &text);
    // A space belongs to the word that follows it.
    let (prompt, space) = prompt.strip_suffix(' ').map_or((prompt.as_str(), ""), |prompt| (prompt, " "));
    let answers: Vec<Text> =
        settings.label_words.iter().map(|word| Text::Plain(format!("{space}{word}{after}"))).collect();
    let prompt = Text::Plain(prompt.to_string());
    tokenizer.tree(Some(&prompt), &answers, |_| Ending::AsIs, settings.common.max_length, truncation)
}

/// The hidden states that stand for the texts, `[texts, d_model]`, under a frozen model.
fn pooled(model: &Model, examples: &[Example], tokens_per_batch: usize) -> Result<Tensor> {
    let frozen = model.frozen()?;
    let sizes: Vec<usize> = examples.iter().map(|example| example.tree.tokens()).collect();
    let mut all = Vec::new();
    for range in split_by_budget(&sizes, tokens_per_batch) {
        let batch = frozen.pack_texts(examples[range].iter().map(Example::typed));
        all.push(frozen.pooled(&frozen.hidden(&batch, &Pass::default())?, &batch)?);
    }
    if all.is_empty() {
        return Ok(Tensor::zeros((0, model.architecture().d_model), candle_core::DType::F32, model.device())?);
    }
    Ok(Tensor::cat(&all, 0)?)
}

/// What a head reads.
enum Input<'a> {
    /// The texts, through the model.
    Tokens,
    /// Hidden states that were computed once, `[texts, d_model]`, as the model under a probe does not change.
    Pooled { training: &'a Tensor, evaluation: &'a Tensor },
}

/// Classes by a head.
struct ByHead<'a> {
    model: &'a Model,
    data: &'a Data,
    input: Input<'a>,
    common: &'a CommonSettings,
}

impl<'a> ByHead<'a> {
    fn new(model: &'a Model, data: &'a Data, input: Input<'a>, common: &'a CommonSettings) -> Self {
        ByHead { model, data, input, common }
    }

    /// The log-probability of every class for some texts, `[texts, classes]`.
    fn log_probs(&self, model: &Model, examples: &[&Example], pass: &Pass) -> Result<Tensor> {
        let batch = model.pack_texts(examples.iter().map(|example| example.typed()));
        log_softmax(&model.classes(&model.hidden(&batch, pass)?, &batch)?)
    }

    /// The log-probabilities of every class for every evaluation text.
    fn predictions(&self) -> Result<Predictions> {
        let model = self.model.frozen()?;
        let examples: Vec<&Example> = self.data.evaluation.iter().collect();
        let rows = match &self.input {
            Input::Pooled { evaluation, .. } => log_softmax(&model.classes_of_pooled(evaluation)?)?.to_vec2()?,
            Input::Tokens => {
                let sizes: Vec<usize> = examples.iter().map(|example| example.tree.tokens()).collect();
                let mut rows = Vec::new();
                for range in split_by_budget(&sizes, self.common.tokens_per_batch) {
                    let log_probs = self.log_probs(&model, &examples[range], &Pass::default())?;
                    rows.extend(log_probs.to_vec2::<f32>()?);
                }
                rows
            }
        };
        Ok(Predictions { log_probs: rows, labels: examples.iter().map(|example| example.label).collect() })
    }
}

impl Task for ByHead<'_> {
    fn accumulate(&self, optimizer: &mut Optimizer, chosen: &[usize], step: u64) -> Result<Accumulated> {
        let examples: Vec<&Example> = chosen.iter().map(|&index| &self.data.training[index]).collect();
        let sizes: Vec<usize> = examples.iter().map(|example| example.tree.tokens()).collect();
        let tokens = sizes.iter().sum();
        if let Input::Pooled { training, .. } = &self.input {
            let labels: Vec<usize> = examples.iter().map(|example| example.label).collect();
            let loss = accumulate_pooled(self.model, optimizer, training, chosen, &labels)?;
            return Ok(Accumulated { loss, tokens, metrics: Vec::new() });
        }
        let mut total = 0.0;
        for (index, range) in split_by_budget(&sizes, self.common.tokens_per_batch).into_iter().enumerate() {
            let pass = Pass { dropout_seed: Some(dropout_seed(self.common.seed, step, index as u64)) };
            let log_probs = self.log_probs(self.model, &examples[range.clone()], &pass)?; // [texts, classes]
            let labels: Vec<usize> = examples[range].iter().map(|example| example.label).collect();
            let loss = (cross_entropy(&log_probs, &labels)? / examples.len() as f64)?;
            optimizer.accumulate(&loss.backward()?)?;
            total += f64::from(loss.to_scalar::<f32>()?);
        }
        Ok(Accumulated { loss: total, tokens, metrics: Vec::new() })
    }

    fn evaluate(&self) -> Result<Vec<(&'static str, f64)>> {
        Ok(self.predictions()?.metrics(self.data.labels.len()))
    }
}

/// Adds the gradient of the mean loss over hidden states, and gives the loss.
pub(super) fn accumulate_pooled(
    model: &Model,
    optimizer: &mut Optimizer,
    pooled: &Tensor,
    chosen: &[usize],
    labels: &[usize],
) -> Result<f64> {
    let rows: Vec<u32> = chosen.iter().map(|&index| index as u32).collect();
    let hidden = pooled.index_select(&Tensor::from_slice(&rows, rows.len(), pooled.device())?, 0)?; // [texts, d_model]
    let log_probs = log_softmax(&model.classes_of_pooled(&hidden)?)?;
    let loss = (cross_entropy(&log_probs, labels)? / chosen.len() as f64)?;
    optimizer.accumulate(&loss.backward()?)?;
    Ok(f64::from(loss.to_scalar::<f32>()?))
}

/// `z - log Σ exp(z)` of every row.
pub(super) fn log_softmax(x: &Tensor) -> Result<Tensor> {
    Ok(candle_nn::ops::log_softmax(x, D::Minus1)?)
}

/// `-Σ log p(label)`.
fn cross_entropy(log_probs: &Tensor, labels: &[usize]) -> Result<Tensor> {
    let index: Vec<u32> = labels.iter().map(|&label| label as u32).collect();
    let index = Tensor::from_vec(index, (labels.len(), 1), log_probs.device())?;
    Ok(log_probs.gather(&index, 1)?.sum_all()?.neg()?)
}

/// Classes by the words of a language model.
struct ByWords<'a> {
    model: &'a Model,
    data: &'a Data,
    common: &'a CommonSettings,
}

impl ByWords<'_> {
    /// The log-probability of every class's word after every evaluation text, normalised over the classes.
    fn predictions(&self) -> Result<Predictions> {
        let model = self.model.frozen()?;
        let examples = &self.data.evaluation;
        let sizes: Vec<usize> = examples.iter().map(|example| example.tree.tokens()).collect();
        let mut rows = Vec::new();
        for range in split_by_budget(&sizes, self.common.tokens_per_batch) {
            let batch = Batch::pack(examples[range].iter().map(|example| &example.tree));
            let hidden = model.hidden(&batch, &Pass::default())?; // [tokens, d_model]
            let log_probs: Vec<f32> = model.log_probs(&hidden, &batch, 1.0)?.log_probs.to_vec1()?; // [targets]
            let sums: Vec<f32> =
                batch.answer_targets.iter().map(|targets| log_probs[targets.clone()].iter().sum()).collect();
            let classes = self.data.labels.len();
            let sums = Tensor::from_vec(sums, (batch.trees.len(), classes), &Device::Cpu)?;
            rows.extend(log_softmax(&sums)?.to_vec2::<f32>()?);
        }
        Ok(Predictions { log_probs: rows, labels: examples.iter().map(|example| example.label).collect() })
    }
}

impl Task for ByWords<'_> {
    fn accumulate(&self, optimizer: &mut Optimizer, chosen: &[usize], step: u64) -> Result<Accumulated> {
        // The right word alone is learned.
        let right = |&index: &usize| {
            let Example { tree, label, .. } = &self.data.training[index];
            TokenTree { prompt: tree.prompt.clone(), answers: vec![tree.answers[*label].clone()] }
        };
        let trees: Vec<TokenTree> = chosen.iter().map(right).collect();
        let loss = language_modelling::accumulate(
            self.model,
            optimizer,
            &trees.iter().collect::<Vec<_>>(),
            self.common,
            step,
        )?;
        let tokens = trees.iter().map(TokenTree::tokens).sum();
        Ok(Accumulated { loss, tokens, metrics: Vec::new() })
    }

    fn evaluate(&self) -> Result<Vec<(&'static str, f64)>> {
        Ok(self.predictions()?.metrics(self.data.labels.len()))
    }
}

/// Prints the confusion matrix and writes `evaluation.json`.
fn write_report(run: &Run, data: &Data, predictions: Predictions, control: Option<ControlTask>) -> Result<()> {
    if data.evaluation.is_empty() {
        return Ok(());
    }
    let labels = &data.labels;
    let confusion = predictions.confusion(labels.len());
    let percent = |share: f64| format!("{:.1}%", 100.0 * share);
    let mut table =
        Table::new(["class, taken for".to_string()].into_iter().chain(labels.clone()).chain(["F1".to_string()]));
    for (class, label) in labels.iter().enumerate() {
        let counts = confusion.counts[class].iter().map(usize::to_string);
        table.row([label.clone()].into_iter().chain(counts).chain([percent(confusion.f1(class))]));
    }
    run.note(&table.to_string());
    run.note(&format!(
        "accuracy {} (the most common class: {}), macro F1 {}",
        percent(confusion.accuracy()),
        percent(confusion.most_common()),
        percent(confusion.macro_f1())
    ));
    let f1: Map<String, Value> =
        labels.iter().enumerate().map(|(class, label)| (label.clone(), json!(confusion.f1(class)))).collect();
    let mut json = json!({
        "loss": predictions.loss(),
        "examples": predictions.labels.len(),
        "accuracy": confusion.accuracy(),
        "accuracy_most_common": confusion.most_common(),
        "macro_f1": confusion.macro_f1(),
        "f1": f1,
        "labels": labels,
        "confusion": confusion.counts,
    });
    if let Some(control) = control {
        run.note(&format!(
            "control task {} (the most common label: {}), selectivity {}",
            percent(control.accuracy),
            percent(control.most_common),
            percent(confusion.accuracy() - control.accuracy)
        ));
        json["control_accuracy"] = json!(control.accuracy);
        json["control_accuracy_most_common"] = json!(control.most_common);
        json["selectivity"] = json!(confusion.accuracy() - control.accuracy);
    }
    run.write("evaluation.json", &format!("{json:#}\n"))
}

impl Data {
    /// Number of classes.
    pub(super) fn classes(&self) -> usize {
        self.labels.len()
    }

    /// Training and evaluation texts.
    pub(super) fn both(&self) -> (&[Example], &[Example]) {
        (&self.training, &self.evaluation)
    }
}
