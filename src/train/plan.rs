//! The plan that a program shows before it starts: parameters, data, memory.

use std::fmt;

use indicatif::{DecimalBytes, HumanCount};

use super::examples::Examples;
use super::memory::{self, Footprint};
use super::table::Table;
use crate::bail;
use crate::data::notes;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::model::Model;
use crate::model::architecture::{Architecture, BeyondContext};
use crate::settings::{CommonSettings, TrainingSettings};

/// The format of conversations for a model without a chat template, in words.
pub const TRANSCRIPT: &str = "a transcript (Human: …, Assistant: …), as the model has no chat template";

/// What a program is about to do, shown before it starts.
#[derive(Debug, Clone)]
pub struct Plan {
    title: String,
    lines: Table,
    memory: Option<u64>,
    warnings: Vec<String>,
    chat_template: Option<String>,
}

impl Plan {
    /// A plan under this title, such as the program's name and model.
    pub fn new(title: impl Into<String>) -> Self {
        let (lines, warnings) = (Table::without_header(), Vec::new());
        Plan { title: title.into(), lines, memory: None, warnings, chat_template: None }
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

    /// Adds a line, if there is something to say.
    pub fn optional_line(self, label: &str, value: Option<impl fmt::Display>) -> Self {
        match value {
            Some(value) => self.line(label, value),
            None => self,
        }
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

    /// Adds a warning, if there is one: it is printed after the plan, and a run keeps it in `warnings.txt`.
    pub fn warning(mut self, text: Option<String>) -> Self {
        self.warnings.extend(text);
        self
    }

    /// The warnings.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Adds in which format conversations are written, where the model has no chat template; a run saves it with the models that it keeps.
    pub fn chat_format(mut self, tokenizer: &Tokenizer) -> Self {
        self.chat_template = tokenizer.transcript().map(str::to_owned);
        match self.chat_template {
            Some(_) => self.line("chat format", format!("{TRANSCRIPT}; saved with the model as chat_template.jinja")),
            None => self,
        }
    }

    /// The chat template that a run saves with the models that it keeps.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The memory that the run is expected to need, in bytes.
    pub fn expected_memory(&self) -> Option<u64> {
        self.memory
    }

    /// Prints the plan to the standard error stream, unless `quiet`.
    pub fn print(&self, quiet: bool) {
        if !quiet {
            eprintln!("{self}");
            notes::print();
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
pub struct Workload<'a> {
    /// What the examples are, in the plural.
    pub what: &'a str,
    /// How many there are to train on.
    pub training: usize,
    /// How many there are to evaluate on.
    pub evaluation: usize,
    /// Of how many these are some.
    pub evaluation_rows: Option<usize>,
    /// Tokens of those to train on, of one epoch.
    pub tokens: usize,
    /// What was too long.
    pub truncation: Truncation,
    /// The rows from which tokens and truncation are known, and those of a window, where the examples are read as they are needed.
    pub sampled_rows: Option<(usize, usize)>,
}

impl<'a> Workload<'a> {
    /// These examples, of which `tokens` gives the tokens of each.
    pub fn new<T>(what: &'a str, examples: &Examples<T>, tokens: impl Fn(&T) -> usize) -> Self {
        Workload {
            what,
            training: examples.len(),
            evaluation: examples.evaluation_len(),
            evaluation_rows: examples.evaluation_rows(),
            tokens: examples.sum(tokens),
            truncation: examples.truncation(),
            sampled_rows: examples.sampled_rows().zip(examples.window()),
        }
    }

    /// So many of the examples, or of those that are known at the start.
    pub fn counted(&self, number: usize) -> String {
        let number = count(number);
        self.sampled_rows.map_or(number.to_string(), |(rows, _)| format!("{number} of the first {}", count(rows)))
    }

    fn examples(&self) -> String {
        let rows = if self.sampled_rows.is_some() { " rows" } else { "" };
        let of = self.evaluation_rows.map_or(String::new(), |rows| format!(" of {}", count(rows)));
        let evaluated = match self.evaluation {
            0 => String::new(),
            evaluation => format!(", {}{of} to evaluate on", count(evaluation)),
        };
        format!("{}{rows} to train on{evaluated}", count(self.training))
    }
}

fn count(number: usize) -> HumanCount {
    HumanCount(number as u64)
}

/// Refuses a model that cannot read the longest of its texts, of which `tokens` gives the tokens of each;
/// gives a warning where it was not made for some of them.
pub fn check_lengths<T>(
    model: &Architecture,
    examples: &Examples<T>,
    tokens: impl Fn(&T) -> usize,
    max_length: usize,
) -> Result<Option<String>> {
    check_length(model, examples.largest(&tokens), max_length)?;
    // Of data that are read as they are needed, the first rows are known.
    let mut lengths = BeyondContext::of(model);
    for example in examples.known() {
        lengths.add(tokens(&example.value));
    }
    Ok(lengths.warning())
}

/// Refuses a model that cannot read the longest of its texts; where these are read as they are needed, so that `longest` is not known, one that
/// cannot read texts of `max_length` tokens.
pub fn check_length(model: &Architecture, longest: Option<usize>, max_length: usize) -> Result<()> {
    match (longest, model.longest()) {
        (Some(longest), _) => model.check_length(longest),
        (None, Some(positions)) if max_length > positions => bail!(
            "--max-length is {max_length}, the model has {positions} positions, and of data larger than --shuffle-window it is not known at the start \
             how long the longest text is; give --max-length {positions}"
        ),
        _ => Ok(()),
    }
}

/// The plan of a training program, which cannot be made where the run does not fit the machine's memory. The model is what the user asked to have trained; others stand beside it in memory, with `cached_tokens` whose keys
/// and values are held.
pub fn training_plan(
    program: &str,
    model: &Model,
    beside: &[Footprint],
    common: &CommonSettings,
    training: &TrainingSettings,
    examples: &Workload,
    cached_tokens: usize,
) -> Result<Plan> {
    let trainable = model.trainable_count();
    // A step's examples may be fewer tokens than go through the model at a time.
    let step = training.batch_size * examples.tokens.div_ceil(examples.training.max(1));
    let footprints = [&[Footprint::of("model", model)], beside].concat();
    let tokens = common.tokens_per_batch.min(step);
    let sampler = (model.architecture(), cached_tokens);
    memory::check(&footprints, tokens, sampler)?;
    let memory = memory::expected(&footprints, tokens, sampler);
    let mut plan = Plan::new(program)
        .line("model", model.folder().path.display())
        .optional_line("weights", model.folder().new_from_seed.map(|seed| format!("new, from --seed {seed}")))
        .line("method", &training.method)
        .parameters(model.base_parameters() + model.added_parameters(), trainable)
        .line(examples.what, examples.examples());
    plan = match examples.sampled_rows {
        None => plan.tokens("tokens an epoch", examples.tokens),
        Some((_, window)) => plan
            .line("tokens an epoch", format!("about {}", count(examples.tokens)))
            .line("order", format!("random in windows of {} rows, read as they are needed", count(window))),
    };
    plan = plan.memory(memory.iter().map(|(_, bytes)| bytes).sum());
    if model.folder().is_text_part() {
        plan = plan.line("note", "the text part of this model is read and trained, not what it has for images");
    }
    for note in model.adapters().iter().filter_map(|adapter| adapter.note()) {
        plan = plan.line("note", note);
    }
    let Truncation { prompts, answers, chats } = examples.truncation;
    for (what, number, lost) in [("prompts cut", prompts, "start"), ("answers cut", answers, "end")] {
        if number > 0 {
            let text = format!("{} lost their {lost} to --max-length {}", examples.counted(number), common.max_length);
            plan = plan.line(what, text);
        }
    }
    let of = examples.sampled_rows.map_or(String::new(), |(rows, _)| format!(" of the first {} rows", count(rows)));
    Ok(chats.remarks(&of).into_iter().fold(plan, |plan, (what, text)| plan.line(what, text)))
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
