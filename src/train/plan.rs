//! The plan that a program shows before it starts: parameters, data, memory.

use std::fmt;
use std::path::PathBuf;

use indicatif::{DecimalBytes, HumanCount};

use super::examples::Examples;
use super::memory::{self, Footprint, PassRows};
use super::schedule::Schedule;
use super::table::Table;
use crate::adapt;
use crate::bail;
use crate::data::notes;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::model::Model;
use crate::model::architecture::{Architecture, BeyondContext};
use crate::model::dtype;
use crate::ops::Arithmetic;
use crate::settings::{CommonSettings, ModelSettings, TrainingSettings};

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

/// How large the examples of a training program are.
pub struct Sizes<'a, T> {
    /// The tokens of an example.
    pub tokens: &'a dyn Fn(&T) -> usize,
    /// The rows that it has in the transformer where it is learned: virtual tokens and copies of a prompt are rows too.
    pub learned: &'a dyn Fn(&T) -> usize,
    /// The same where it is evaluated.
    pub evaluated: &'a dyn Fn(&T) -> usize,
    /// The rows that go through the model at a time, if they can be split so (`--tokens-per-batch`).
    pub budget: usize,
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
    /// The rows that go through the model at a time.
    pub rows: PassRows,
    /// What was too long or left out.
    pub truncation: Truncation,
    /// The same of the examples to evaluate on, where they are data of their own.
    pub evaluation_truncation: Truncation,
    /// The rows from which tokens and truncation are known, and those of a window, where the examples are read as they are needed.
    pub sampled_rows: Option<(usize, usize)>,
}

impl<'a> Workload<'a> {
    /// These examples in a run of so many steps.
    pub fn new<T>(what: &'a str, examples: &Examples<T>, steps: usize, sizes: &Sizes<T>) -> Self {
        Workload {
            what,
            training: examples.len(),
            evaluation: examples.evaluation_len(),
            evaluation_rows: examples.evaluation_rows(),
            rows: PassRows {
                learned: examples.largest_pass(sizes.learned, sizes.budget, steps),
                forward: examples.largest_evaluation_pass(sizes.evaluated, sizes.budget),
                of_one: examples.known().map(|example| (sizes.evaluated)(&example.value)).max().unwrap_or(0),
            },
            tokens: examples.sum(sizes.tokens),
            truncation: examples.truncation(),
            evaluation_truncation: examples.evaluation_truncation(),
            sampled_rows: examples.sampled_rows().zip(examples.window()),
        }
    }

    /// The same where a model looks something up for all examples to train on, or, where they are streamed, for those
    /// of a step, and learns nothing from that.
    pub fn looked_up<T>(mut self, examples: &Examples<T>, sizes: &Sizes<T>) -> Self {
        let all = examples.largest_training_pass(sizes.evaluated, sizes.budget).unwrap_or(self.rows.learned);
        self.rows.forward = self.rows.forward.max(all);
        self
    }

    /// So many of the examples, or of those that are known at the start.
    pub fn counted(&self, number: usize) -> String {
        let number = count(number);
        self.sampled_rows.map_or(number.to_string(), |(rows, _)| format!("{number} of the first {}", count(rows)))
    }

    /// The number of optimizer steps and the size of their batches, in words.
    pub fn steps(&self, total_steps: usize, batch_size: usize) -> String {
        let steps = count(total_steps);
        if batch_size <= self.training {
            return format!("{steps}, batches of {}", count(batch_size));
        }
        format!("{steps}, a batch of all {} {} (--batch-size {batch_size})", count(self.training), self.what)
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

/// In which forms the matrices of a frozen base are kept, and their bytes, where not all are f32.
pub fn base_forms(model: &Model) -> Option<String> {
    let (forms, all) = (model.weights().forms(), model.base_parameters().max(1));
    if forms.iter().all(|(form, _)| form == "f32") {
        return None;
    }
    let share = |(form, count): &(String, usize)| match 100.0 * *count as f64 / all as f64 {
        share if share >= 99.95 => form.clone(),
        share => format!("{form} ({share:.1}%)"),
    };
    let forms: Vec<String> = forms.iter().map(share).collect();
    Some(format!("{}, {}", forms.join(", "), DecimalBytes(model.weights().bytes() as u64)))
}

/// What the plan of a training program is made of.
pub struct TrainingPlan<'a> {
    /// The program.
    pub program: &'a str,
    /// The model that the user asked to have trained.
    pub model: &'a Model,
    /// What it was read from.
    pub source: &'a ModelSettings,
    /// Models that are in memory in addition to it.
    pub beside: &'a [Footprint],
    /// What all programs share.
    pub common: &'a CommonSettings,
    /// How it is trained.
    pub training: &'a TrainingSettings,
    /// What it is trained on.
    pub examples: &'a Workload<'a>,
    /// The learning rate of its optimizer steps or updates.
    pub schedule: &'a Schedule,
    /// What the steps are, and how many, in words.
    pub steps: (&'a str, String),
    /// Bytes of the keys and values that a sampler holds.
    pub cache: u64,
}

impl TrainingPlan<'_> {
    /// The plan.
    ///
    /// # Errors
    /// Where nothing could be learned (no example, a learning rate that is 0 in every step, weights that are no numbers), or the run does not fit
    /// the machine's memory.
    pub fn plan(&self) -> Result<Plan> {
        let TrainingPlan { model, training, examples, schedule, .. } = *self;
        if examples.training == 0 || schedule.total_steps == 0 {
            bail!("there are no {} to train on; check --data, --evaluation-share and --max-length", examples.what);
        }
        let warning = schedule.check()?;
        model.check_finite()?;
        let memory = self.memory()?;
        let mut plan = Plan::new(self.program)
            .line("model", model.folder().path.display())
            .optional_line("weights", model.folder().new_from_seed.map(|seed| format!("new, from --seed {seed}")));
        for (folder, what) in self.adapters()? {
            plan = plan.line("adapter", format!("{}, {what}", folder.display()));
        }
        plan = plan
            .line("method", &training.method)
            .parameters(model.base_parameters() + model.added_parameters(), model.trainable_count())
            .optional_line("base kept in", base_forms(model))
            .line("products", Arithmetic::current())
            .line("saved as", dtype::name(model.saved_dtype()))
            .line(examples.what, examples.examples());
        plan = match examples.sampled_rows {
            None => plan.tokens("tokens an epoch", examples.tokens),
            Some((_, window)) => plan
                .line("tokens an epoch", format!("about {}", count(examples.tokens)))
                .line("order", format!("random in windows of {} rows, read as they are needed", count(window))),
        };
        plan = plan
            .line(self.steps.0, &self.steps.1)
            .line("learning rate", schedule)
            .memory(memory.iter().map(|(_, bytes)| bytes).sum());
        if model.folder().is_text_part() {
            plan = plan.line("note", "the text part of this model is read and trained, not what it has for images");
        }
        for note in model.adapters().iter().filter_map(|adapter| adapter.note()) {
            plan = plan.line("note", note);
        }
        Ok(self.lost(plan).warning(warning))
    }

    /// The memory by what holds it, if it fits the machine.
    fn memory(&self) -> Result<Vec<(String, u64)>> {
        let TrainingPlan { model, examples, .. } = *self;
        let trained = Footprint::of("model", model)?.with_tokenizer(&model.folder().path);
        let footprints = [&[trained], self.beside].concat();
        memory::check(&footprints, examples.rows, self.cache)?;
        Ok(memory::expected(&footprints, examples.rows, self.cache))
    }

    /// The folders of the adapters that the model was read with, and what becomes of each.
    fn adapters(&self) -> Result<Vec<(PathBuf, &'static str)>> {
        let (_, folders) = adapt::resolve(&self.source.model, &self.source.adapter)?;
        // Adapters that were read are below new ones; of full training none is left.
        let what = |index: usize| match self.model.adapters().get(index) {
            None => "merged into the weights, which are trained",
            Some(adapter) if adapter.trainable_parameters().is_empty() => "not trained, below what is trained",
            Some(_) => "trained further",
        };
        Ok(folders.into_iter().enumerate().map(|(index, folder)| (folder, what(index))).collect())
    }

    /// The plan with what was cut and left out of the examples.
    fn lost(&self, mut plan: Plan) -> Plan {
        let (examples, max_length) = (self.examples, self.common.max_length);
        let counted = |number: usize| examples.counted(number);
        let evaluated = |number: usize| format!("of those to evaluate on {}", count(number));
        let sampled = examples.sampled_rows.map(|(rows, _)| format!(" of the first {} rows", count(rows)));
        let training = (examples.truncation, sampled.unwrap_or_default());
        let evaluation = (examples.evaluation_truncation, " of those to evaluate on".to_string());
        for ((lost, of), is_training) in [(training, true), (evaluation, false)] {
            let counted = |number: usize| if is_training { counted(number) } else { evaluated(number) };
            for (what, number, part) in [("prompts cut", lost.prompts, "start"), ("answers cut", lost.answers, "end")] {
                if number > 0 {
                    plan =
                        plan.line(what, format!("{} lost their {part} to --max-length {max_length}", counted(number)));
                }
            }
            let without_token = lost.left_out.saturating_sub(lost.ties + lost.without_pairs);
            if without_token > 0 {
                plan = plan.line("left out", format!("{} without a token to learn", counted(without_token)));
            }
            if lost.ties > 0 {
                plan = plan.line("left out", format!("{} prompts whose answers are one tie", counted(lost.ties)));
            }
            if lost.same_pairs > 0 {
                let mut text = format!("{} pairs whose answers are the same", counted(lost.same_pairs));
                if lost.same_when_cut > 0 {
                    text += &format!(", {} of them by --max-length {max_length}", count(lost.same_when_cut));
                }
                if lost.without_pairs > 0 {
                    text += &format!("; {} prompts have no other pair", count(lost.without_pairs));
                }
                plan = plan.line("left out", text);
            }
            plan = lost.chats.remarks(&of).into_iter().fold(plan, |plan, (what, text)| plan.line(what, text));
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_told_with_the_examples_that_they_have() {
        let mut workload = Workload {
            what: "demonstrations",
            training: 100,
            evaluation: 0,
            evaluation_rows: None,
            tokens: 1000,
            rows: PassRows::default(),
            truncation: Truncation::default(),
            evaluation_truncation: Truncation::default(),
            sampled_rows: None,
        };
        assert_eq!(workload.steps(4, 32), "4, batches of 32");
        workload.training = 8;
        assert_eq!(workload.steps(1, 32), "1, a batch of all 8 demonstrations (--batch-size 32)");
    }

    #[test]
    fn the_plan_states_parameters_trainable_share_tokens_and_memory() {
        let plan =
            Plan::new("sft").parameters(17_040_000, 170_400).tokens("training tokens", 1_250).memory(1_500_000_000);
        let expected = "sft
  parameters       17,040,000
  trainable        170,400 (1.00%)
  training tokens  1,250
  memory expected  1.50 GB
";
        assert_eq!(plan.to_string(), expected);
    }
}
