//! The plan that a program shows before it starts: parameters, data, memory.

use std::fmt;
use std::sync::Arc;

use indicatif::{DecimalBytes, HumanCount};

use super::table::Table;
use crate::data::tokenize_records::Truncation;
use crate::model::Model;
use crate::model::architecture::Architecture;
use crate::settings::{CommonSettings, TrainingSettings};

/// What a program is about to do, shown before it starts.
#[derive(Debug, Clone)]
pub struct Plan {
    title: String,
    lines: Table,
    memory: Option<u64>,
}

impl Plan {
    /// A plan under this title, such as the program's name and model.
    pub fn new(title: impl Into<String>) -> Self {
        Plan { title: title.into(), lines: Table::without_header(), memory: None }
    }

    /// What the plan is of.
    pub fn title(&self) -> &str {
        &self.title
    }

    /// Adds a line: what, and how much or which.
    pub fn line(mut self, label: &str, value: impl fmt::Display) -> Self {
        self.lines.row([format!("  {label}"), value.to_string()]);
        self
    }

    /// Adds the number of the model's parameters and the share that is trained.
    pub fn parameters(self, all: usize, trainable: usize) -> Self {
        let share = 100.0 * trainable as f64 / (all.max(1)) as f64;
        self.line("parameters", HumanCount(all as u64))
            .line("trainable", format!("{} ({share:.2}%)", HumanCount(trainable as u64)))
    }

    /// Adds a count of tokens.
    pub fn tokens(self, label: &str, tokens: usize) -> Self {
        self.line(label, HumanCount(tokens as u64))
    }

    /// Adds the memory that the run is expected to need at its peak, in bytes.
    pub fn memory(self, bytes: u64) -> Self {
        Plan { memory: Some(bytes), ..self }.line("memory expected", DecimalBytes(bytes))
    }

    /// The memory that the run is expected to need, in bytes.
    pub fn expected_memory(&self) -> Option<u64> {
        self.memory
    }

    /// Prints the plan to the standard error stream, unless `quiet`.
    pub fn print(&self, quiet: bool) {
        if !quiet {
            eprintln!("{self}");
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.title)?;
        self.lines.fmt(f)
    }
}

/// What a training program works through.
#[derive(Debug, Clone, Copy)]
pub struct Examples<'a> {
    /// What they are, in the plural.
    pub what: &'a str,
    /// How many there are to train on.
    pub training: usize,
    /// How many there are to evaluate on.
    pub evaluation: usize,
    /// Tokens of those to train on, of one epoch.
    pub tokens: usize,
    /// What was too long.
    pub truncation: Truncation,
}

/// A model in its role, as it stands in memory.
#[derive(Clone, Copy)]
pub struct InMemory<'a> {
    /// What it is there for.
    pub role: &'a str,
    /// The model.
    pub model: &'a Model,
}

/// The plan of a training program. The first of the models is what the user asked to have trained; the others stand beside it in memory, with
/// `cached_tokens` whose keys and values are held. Where there are several, each one's share of the memory has a line.
pub fn training_plan(
    program: &str,
    models: &[InMemory],
    common: &CommonSettings,
    training: &TrainingSettings,
    examples: &Examples,
    cached_tokens: usize,
) -> Plan {
    let model = models[0].model;
    let trainable = model.trainable_count();
    let count = |number: usize| HumanCount(number as u64);
    let evaluated = match examples.evaluation {
        0 => String::new(),
        evaluation => format!(", {} to evaluate on", count(evaluation)),
    };
    // A step's examples may be fewer tokens than go through the model at a time.
    let step = training.batch_size * examples.tokens.div_ceil(examples.training.max(1));
    let memory = expected_memory(models, common.tokens_per_batch.min(step), cached_tokens);
    let mut plan = Plan::new(program)
        .line("model", model.folder().path.display())
        .line("method", &training.method)
        .parameters(model.base_parameters() + model.added_parameters(), trainable)
        .line(examples.what, format!("{} to train on{evaluated}", count(examples.training)))
        .tokens("tokens an epoch", examples.tokens)
        .memory(memory.iter().map(|(_, bytes)| bytes).sum());
    if models.len() > 1 {
        for (what, bytes) in &memory {
            plan = plan.line(&format!("  {what}"), DecimalBytes(*bytes));
        }
    }
    for note in model.adapters().iter().filter_map(|adapter| adapter.note()) {
        plan = plan.line("note", note);
    }
    let Truncation { prompts, answers } = examples.truncation;
    for (what, number, lost) in [("prompts cut", prompts, "start"), ("answers cut", answers, "end")] {
        if number > 0 {
            let text = format!("{} lost their {lost} to --max-length {}", count(number), common.max_length);
            plan = plan.line(what, text);
        }
    }
    plan
}

/// The process itself: program, tokenizer, examples, buffers of the matrix products.
const BESIDES: u64 = 100_000_000;

/// The bytes held at the peak of a training step by what holds them, all numbers being `f32`: each base model once, for each trained parameter its
/// gradient, the sum of the gradients of earlier micro-batches and AdamW's two moments, and what one micro-batch keeps for its backward pass.
fn expected_memory(models: &[InMemory], micro_batch_tokens: usize, cached_tokens: usize) -> Vec<(String, u64)> {
    let bytes = |numbers: usize| 4 * numbers as u64;
    let mut parts = Vec::new();
    for (index, InMemory { role, model }) in models.iter().enumerate() {
        let sharer = models[..index].iter().find(|other| Arc::ptr_eq(other.model.weights(), model.weights()));
        let (own, note) = match sharer {
            Some(other) => (0, format!(" (on the weights of {})", other.role)),
            None => (model.base_parameters(), String::new()),
        };
        let numbers = own + model.added_parameters() + 4 * model.trainable_count();
        parts.push((format!("{role}{note}"), bytes(numbers)));
    }
    let architecture = models[0].model.architecture();
    parts.push(("kept for the backward pass".to_string(), bytes(kept_numbers(architecture) * micro_batch_tokens)));
    if cached_tokens > 0 {
        let cache = 2 * architecture.layers * architecture.kv_width() * cached_tokens;
        parts.push(("keys and values of the sampler".to_string(), bytes(cache)));
    }
    parts.push(("program and buffers".to_string(), BESIDES));
    parts
}

/// The numbers a token that a pass keeps for its backward pass. Of each block: what enters it, both norms' output, both sub-layers' output and
/// the sum between them; queries and keys before and after their rotation, values, what attention gives; and the rows of the feed-forward.
fn kept_numbers(architecture: &Architecture) -> usize {
    let Architecture { layers, d_model, d_ff, .. } = *architecture;
    layers * (6 * d_model + 3 * architecture.query_width() + 3 * architecture.kv_width() + 3 * d_ff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_states_parameters_trainable_share_tokens_and_memory() {
        let plan =
            Plan::new("sft").parameters(17_040_000, 170_400).tokens("training tokens", 1_250).memory(1_500_000_000);
        let expected = "sft
  parameters            17,040,000
  trainable        170,400 (1.00%)
  training tokens            1,250
  memory expected          1.50 GB
";
        assert_eq!(plan.to_string(), expected);
    }
}
