//! Labelled texts to classes: by a head over a hidden state, or by the words with which a language model names the classes.

use std::path::Path;
use std::sync::OnceLock;

use candle_core::{D, Device, Tensor};
use serde_json::{Map, Value as Json, json};

use super::confusion::Predictions;
use super::control_task::{self, ControlTask};
use super::{Accumulated, SftReport, SftSettings, Task, language_modelling, train};
use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::{Batch, TokenTree};
use crate::data::inspect;
use crate::data::schema::{self, LABELLED, Labelled, Text};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::{Ending, Truncation};
use crate::error::Result;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::model::passes::StepPasses;
use crate::ops::{Outputs, Value};
use crate::say;
use crate::settings::{CommonSettings, Method};
use crate::train::examples::{Examples, values};
use crate::train::memory;
use crate::train::optimizer::Optimizer;
use crate::train::plan::{Sizes, Workload, check_lengths};
use crate::train::run::Run;
use crate::train::table::Table;

/// A text as tokens, with the number of its class.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelledText {
    /// The text; or, for a language model, the text and every class's word as an answer.
    pub tree: TokenTree,
    /// The types of the text's tokens; none for a language model.
    pub types: Vec<u32>,
    /// The class.
    pub label: usize,
    /// The hidden state that stands for the text, once it is computed, as the model under a probe does not change.
    features: OnceLock<Vec<f32>>,
}

impl LabelledText {
    fn typed(&self) -> (&TokenTree, &[u32]) {
        (&self.tree, &self.types)
    }
}

fn trees<'a>(texts: &'a [&LabelledText]) -> impl Iterator<Item = &'a TokenTree> {
    texts.iter().map(|text| &text.tree)
}

pub(super) fn run(settings: &SftSettings) -> Result<SftReport> {
    let common = &settings.common;
    let tokenizer = adapt::tokenizer(&settings.model.model, &settings.model.adapter)?;
    let labels = labels(settings)?;
    let mut examples = read(settings, &labels, &tokenizer)?;
    if let Some(count) = settings.examples.inspect {
        for example in examples.first(count)? {
            let LabelledText { tree, label, .. } = &example.value;
            say!("{}\n{}", labels[*label], inspect::inspect(tree, &tokenizer)?);
        }
        return Ok(SftReport::NOTHING);
    }
    let by_words = !settings.label_words.is_empty();
    let is_probe = settings.training.method.list() == [Method::Probing] && !by_words;
    if let (true, Some(window)) = (is_probe, examples.window()) {
        bail!(
            "{}: has {} rows to train on and --shuffle-window is {window}, and a probe is trained on hidden states that are computed once and all kept; raise \
             --shuffle-window above the number of rows, or name fewer rows",
            settings.data,
            examples.len()
        );
    }
    let role = Role {
        folder: &settings.model.model,
        adapters: &settings.model.adapter,
        training: Training::With(&settings.training),
        head: if by_words { Head::Language } else { Head::Classes(&labels) },
        seed: common.seed,
    };
    memory::check_before_reading(&settings.model, common, &settings.training)?;
    let mut bases = Bases::of(common, Device::Cpu);
    let model = bases.load(&role)?;
    let length = |text: &LabelledText| text.tree.longest();
    let too_long = check_lengths(model.architecture(), &examples, length, common.max_length)?;
    let schedule = settings.schedule_of(&examples);
    let evaluated = |text: &LabelledText| model.rows_of(&text.tree);
    // Of words the right one alone is learned.
    let right = |text: &LabelledText| text.tree.answers[text.label].tokens.len();
    let by_word = |text: &LabelledText| model.rows_of_answers(text.tree.prompt.len(), 1, right(text));
    let sizes = Sizes {
        tokens: &|text: &LabelledText| text.tree.tokens(),
        learned: if by_words { &by_word } else { &evaluated },
        evaluated: &evaluated,
        budget: common.tokens_per_batch,
    };
    let mut workload = Workload::new("labelled texts", &examples, schedule.total_steps, &sizes);
    if is_probe {
        // From hidden states that are looked up.
        workload = workload.looked_up(&examples, &sizes);
        workload.rows.learned = 0;
    }
    let plan = settings
        .plan(&model, &schedule, &workload, &[])?
        .warning(too_long)
        .warning(model.padding_warning(&tokenizer))
        .line("classes", format!("{}: {}", labels.len(), labels.join(", ")));
    let (checkpoints, total_steps) = (&settings.training.checkpoints, schedule.total_steps);
    let mut run = Run::start(&settings.resolved(), common, checkpoints, &plan, total_steps, settings.inputs()?)?;
    let save = |folder: &Path| {
        model.save(folder)?;
        tokenizer.save(folder)
    };
    let classes = Classes { model: &model, labels: &labels, common };
    let report = if by_words {
        let task = ByWords(classes);
        let report = train(settings, &model, &task, &mut examples, &mut run, save)?;
        run.heeding(|| {
            let Some((step, best)) = best(&role, &run, &mut bases)? else { return Ok(()) };
            let task = ByWords(Classes { model: &best, labels: &labels, common });
            write_report(&run, step, &task.0, task.predictions(&values(examples.evaluation()?))?, None)
        })?;
        report
    } else {
        let probed = if is_probe { examples.training() } else { None };
        if let Some(training) = &probed {
            run.heeding(|| {
                compute_features(&model, &values(training), common.tokens_per_batch)?;
                compute_features(&model, &values(examples.evaluation()?), common.tokens_per_batch)
            })?;
        }
        let task = ByHead { classes, is_probe };
        let report = train(settings, &model, &task, &mut examples, &mut run, save)?;
        let evaluation = values(examples.evaluation()?);
        let control = match &probed {
            Some(training) => {
                let texts = (&values(training)[..], &evaluation[..]);
                Some(control_task::run(settings, &bases.load(&role)?, labels.len(), texts)?)
            }
            None => None,
        };
        run.heeding(|| {
            let Some((step, best)) = best(&role, &run, &mut bases)? else { return Ok(()) };
            let task = ByHead { classes: Classes { model: &best, labels: &labels, common }, is_probe };
            write_report(&run, step, &task.classes, task.predictions(&evaluation)?, control)
        })?;
        report
    };
    run.finish()?;
    Ok(report)
}

/// The best model as it reads back from the run's folder, and the step that it is of.
fn best(role: &Role, run: &Run, bases: &mut Bases) -> Result<Option<(usize, Model)>> {
    let Some((best, folder)) = run.best() else { return Ok(None) };
    let role = Role { folder: &folder, adapters: &[], training: Training::Frozen, ..*role };
    Ok(Some((best.step, bases.load(&role)?)))
}

fn read<'a>(
    settings: &'a SftSettings,
    labels: &'a [String],
    tokenizer: &'a Tokenizer,
) -> Result<Examples<'a, LabelledText>> {
    if !settings.label_words.is_empty() && settings.label_words.len() != labels.len() {
        bail!(
            "--label-words has {} words, the data have the {} classes {}; give one for each, in this order",
            settings.label_words.len(),
            labels.len(),
            labels.join(", ")
        );
    }
    Examples::open(&settings.source(), LABELLED, |record, truncation| {
        let Some(label) = labels.iter().position(|label| *label == record.label) else {
            bail!(
                "{}, column `label`: \"{}\" is none of the classes {}; name all of them with --labels",
                record.origin,
                record.label,
                labels.join(", ")
            );
        };
        let (tree, types) = if settings.label_words.is_empty() {
            let texts = tokenizer.labelled(&record, settings.common.max_length, truncation)?;
            (texts.tree(), texts.types)
        } else {
            (with_words(settings, tokenizer, &record, truncation)?, Vec::new())
        };
        Ok(Some(LabelledText { tree, types, label, features: OnceLock::new() }))
    })
}

/// The classes: as given, or those of `--data`, for which its labels are gone through: numbers in their order and names in that of the alphabet.
fn labels(settings: &SftSettings) -> Result<Vec<String>> {
    if !settings.labels.is_empty() {
        return Ok(settings.labels.clone());
    }
    let mut labels: Vec<String> = schema::classes(&settings.data)?.into_iter().collect();
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

/// Computes the hidden states that stand for the texts under a frozen model.
fn compute_features(model: &Model, texts: &[&LabelledText], tokens_per_batch: usize) -> Result<()> {
    let frozen = model.frozen()?;
    for range in frozen.passes(trees(texts), tokens_per_batch) {
        let batch = frozen.pack_texts(texts[range.clone()].iter().map(|text| text.typed()));
        let pooled = frozen.pooled(&frozen.hidden(&batch, &Pass::default())?, &batch)?; // [texts, d_model]
        for (text, features) in texts[range].iter().zip(pooled.to_vec2()?) {
            text.features.get_or_init(|| features);
        }
    }
    Ok(())
}

/// The hidden states that were computed, `[texts, d_model]`.
pub(super) fn features(model: &Model, texts: &[&LabelledText]) -> Result<Value> {
    let all: Vec<f32> = texts.iter().flat_map(|text| text.features.get().into_iter().flatten()).copied().collect();
    let features = Tensor::from_vec(all, (texts.len(), model.architecture().d_model), model.device())?;
    Ok(Value::constant(features))
}

/// What both ways to classify need.
struct Classes<'a> {
    model: &'a Model,
    labels: &'a [String],
    common: &'a CommonSettings,
}

/// Classes by a head.
struct ByHead<'a> {
    classes: Classes<'a>,
    /// Whether the head reads hidden states that were computed before.
    is_probe: bool,
}

impl ByHead<'_> {
    /// The log-probability of every class for a batch of texts, `[texts, classes]`, and what it was computed from.
    fn log_probs(&self, model: &Model, batch: &Batch, pass: &Pass) -> Result<(Tensor, Outputs)> {
        let mut outputs = Outputs::default();
        let classes = outputs.tensor(&model.classes(&model.hidden(batch, pass)?, batch)?)?;
        Ok((log_softmax(&classes)?, outputs))
    }

    /// The log-probabilities of every class for every text.
    fn predictions(&self, texts: &[&LabelledText]) -> Result<Predictions> {
        let model = self.classes.model.frozen()?;
        let labels = texts.iter().map(|text| text.label).collect();
        if self.is_probe {
            let log_probs = log_softmax(model.classes_of_pooled(&features(&model, texts)?)?.tensor())?.to_vec2()?;
            return Ok(Predictions { log_probs, labels });
        }
        let mut log_probs = Vec::new();
        for range in model.passes(trees(texts), self.classes.common.tokens_per_batch) {
            let batch = model.pack_texts(texts[range].iter().map(|text| text.typed()));
            log_probs.extend(self.log_probs(&model, &batch, &Pass::default())?.0.to_vec2::<f32>()?);
        }
        Ok(Predictions { log_probs, labels })
    }
}

impl Task for ByHead<'_> {
    type Value = LabelledText;

    fn accumulate(&self, optimizer: &mut Optimizer, texts: &[&LabelledText], step: u64) -> Result<Accumulated> {
        let Classes { model, common, .. } = self.classes;
        let tokens = trees(texts).map(TokenTree::tokens).sum();
        let labels: Vec<usize> = texts.iter().map(|text| text.label).collect();
        if self.is_probe {
            let loss = accumulate_pooled(model, optimizer, &features(model, texts)?, &labels)?;
            return Ok(Accumulated { loss, tokens, metrics: Vec::new() });
        }
        let (mut total, mut passes) = (0.0, StepPasses::new(common.seed, step));
        for range in model.passes(trees(texts), common.tokens_per_batch) {
            let batch = model.pack_texts(texts[range.clone()].iter().map(|text| text.typed()));
            let (log_probs, outputs) = self.log_probs(model, &batch, &passes.next(model, &batch))?; // [texts, classes]
            let loss = (cross_entropy(&log_probs, &labels[range])? / texts.len() as f64)?;
            optimizer.backward(&loss, outputs)?;
            total += f64::from(loss.to_scalar::<f32>()?);
        }
        Ok(Accumulated { loss: total, tokens, metrics: Vec::new() })
    }

    fn evaluate(&self, texts: &[&LabelledText]) -> Result<Vec<(&'static str, f64)>> {
        Ok(self.predictions(texts)?.metrics(self.classes.labels.len()))
    }
}

/// Adds the gradient of the mean loss over hidden states `[texts, d_model]`, and gives the loss.
pub(super) fn accumulate_pooled(
    model: &Model,
    optimizer: &mut Optimizer,
    hidden: &Value,
    labels: &[usize],
) -> Result<f64> {
    let mut outputs = Outputs::default();
    let log_probs = log_softmax(&outputs.tensor(&model.classes_of_pooled(hidden)?)?)?;
    let loss = (cross_entropy(&log_probs, labels)? / labels.len() as f64)?;
    optimizer.backward(&loss, outputs)?;
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
struct ByWords<'a>(Classes<'a>);

impl ByWords<'_> {
    /// The log-probability of every class's word after every text, normalised over the classes.
    fn predictions(&self, texts: &[&LabelledText]) -> Result<Predictions> {
        let model = self.0.model.frozen()?;
        let mut rows = Vec::new();
        for range in model.passes(trees(texts), self.0.common.tokens_per_batch) {
            let batch = model.pack(trees(&texts[range]));
            let hidden = model.hidden(&batch, &Pass::default())?; // [tokens, d_model]
            let log_probs: Vec<f32> = model.log_probs(&hidden, &batch, 1.0)?.log_probs.to_vec1()?; // [targets]
            let sums: Vec<f32> =
                batch.answer_targets.iter().map(|targets| log_probs[targets.clone()].iter().sum()).collect();
            let sums = Tensor::from_vec(sums, (batch.trees.len(), self.0.labels.len()), &Device::Cpu)?;
            rows.extend(log_softmax(&sums)?.to_vec2::<f32>()?);
        }
        Ok(Predictions { log_probs: rows, labels: texts.iter().map(|text| text.label).collect() })
    }
}

impl Task for ByWords<'_> {
    type Value = LabelledText;

    fn accumulate(&self, optimizer: &mut Optimizer, texts: &[&LabelledText], step: u64) -> Result<Accumulated> {
        // The right word alone is learned.
        let right = |LabelledText { tree, label, .. }: &LabelledText| TokenTree {
            prompt: tree.prompt.clone(),
            answers: vec![tree.answers[*label].clone()],
        };
        let trees: Vec<TokenTree> = texts.iter().map(|text| right(text)).collect();
        let trees: Vec<&TokenTree> = trees.iter().collect();
        let Classes { model, common, .. } = self.0;
        let loss = language_modelling::accumulate(model, optimizer, &trees, common, step)?;
        let tokens = trees.iter().map(|tree| tree.tokens()).sum();
        Ok(Accumulated { loss, tokens, metrics: Vec::new() })
    }

    fn evaluate(&self, texts: &[&LabelledText]) -> Result<Vec<(&'static str, f64)>> {
        Ok(self.predictions(texts)?.metrics(self.0.labels.len()))
    }
}

/// Prints the confusion matrix of the model of step `step`, and writes `evaluation.json`.
fn write_report(
    run: &Run,
    step: usize,
    Classes { labels, common, .. }: &Classes,
    predictions: Predictions,
    control: Option<ControlTask>,
) -> Result<()> {
    let confusion = predictions.confusion(labels.len());
    // Nothing where there are no texts.
    let Some(interval) = confusion.accuracy_interval(common.seed) else { return Ok(()) };
    let percent = |share: f64| format!("{:.1}%", 100.0 * share);
    let mut table = Table::new(
        ["class, taken for".to_string()].into_iter().chain(labels.iter().cloned()).chain(["F1".to_string()]),
    );
    for (class, label) in labels.iter().enumerate() {
        let counts = confusion.counts[class].iter().map(usize::to_string);
        table.row([label.clone()].into_iter().chain(counts).chain([percent(confusion.f1(class))]));
    }
    run.note(&format!("evaluation of the model of step {step}\n\n{table}"));
    run.note(&format!(
        "accuracy {} with its 95% bootstrap interval (the most common class: {}), macro F1 {}",
        interval.percent(),
        percent(confusion.most_common()),
        percent(confusion.macro_f1())
    ));
    let f1: Map<String, Json> =
        labels.iter().enumerate().map(|(class, label)| (label.clone(), json!(confusion.f1(class)))).collect();
    let mut json = json!({
        "step": step,
        "loss": predictions.loss(),
        "examples": predictions.labels.len(),
        "accuracy": confusion.accuracy(),
        "accuracy_interval": [interval.low, interval.high],
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
