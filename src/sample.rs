//! Sampling: prompts in, `k` answers to each out.

use std::sync::Arc;

use arrow::array::{BooleanBuilder, ListBuilder, StringBuilder};
use candle_core::Device;
use clap::{Arg, Parser};
use serde::{Deserialize, Serialize};

use crate::adapt::{self, Bases, Head, Role, Training, users};
use crate::bail;
use crate::data::parquet::ParquetWriter;
use crate::data::schema::{self, Prompt, Text};
use crate::data::table::TableRows;
use crate::data::text_column::{TextForm, batch_of, named};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::{Error, Result};
use crate::generate::{Generation, PromptTokens, SamplingSettings, Stop, generate};
use crate::model::Model;
use crate::model::architecture::BeyondContext;
use crate::ops::Arithmetic;
use crate::settings::{
    CommonSettings, Flags, ModelSettings, NamedFolder, Program, Section, ShortFlag, UserSettings, at_least_one,
    short_help,
};
use crate::train::plan::{Plan, TRANSCRIPT, base_forms};
use crate::train::progress::Progress;

/// Samples answers to prompts and writes them to a Parquet file
#[derive(Debug, Clone, PartialEq, Parser, Serialize, Deserialize)]
#[command(name = "sample", version, mut_arg("output", parquet_output))]
pub struct SampleSettings {
    /// The model that answers.
    #[command(flatten)]
    #[serde(flatten)]
    pub model: ModelSettings,
    /// The adapters that single prompts are answered with.
    #[command(flatten)]
    #[serde(flatten)]
    pub users: UserSettings,
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of prompts (columns prompt, messages or instruction)
    #[arg(long, value_name = "FILES")]
    pub data: String,
    /// Answers to each prompt
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
    pub answers: usize,
    /// How answers are sampled.
    #[command(flatten)]
    #[serde(flatten)]
    pub sampling: SamplingSettings,
    /// What all programs share.
    #[command(flatten)]
    #[serde(flatten)]
    pub common: CommonSettings,
}

impl Program for SampleSettings {
    fn flags() -> Flags<Self> {
        Flags::new()
            .of(|sample: &Self| &sample.model, ModelSettings::flags())
            .of(|sample: &Self| &sample.users, UserSettings::flags())
            .always(&["data", "answers"])
            .of(|sample: &Self| &sample.sampling, SamplingSettings::flags())
            .of(|sample: &Self| &sample.common, CommonSettings::flags())
    }

    fn short_help() -> Vec<Section> {
        vec![
            Section {
                heading: "Input and output",
                flags: &[
                    ShortFlag("model", "FOLDER", "Model folder, GGUF file, or name on the hub"),
                    ShortFlag("data", "FILES", "Prompts"),
                    ShortFlag("output", "FILE", "Parquet file to write: prompt, responses, ended"),
                    ShortFlag("adapters", "NAME=FOLDER", "Adapters; a row runs with its --adapter-column"),
                    ShortFlag("answers", "N", "Answers a prompt"),
                ],
            },
            short_help::SAMPLING,
            short_help::GENERAL,
        ]
    }
}

/// `--output` of a program that writes one Parquet file.
pub(crate) fn parquet_output(argument: Arg) -> Arg {
    argument.value_name("FILE").help("Parquet file to write")
}

/// What came out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SampleReport {
    /// Prompts answered.
    pub prompts: usize,
    /// Answers sampled.
    pub answers: usize,
    /// Answers that ended by themselves before `--response-length`.
    pub ended: usize,
    /// Tokens of all answers.
    pub tokens: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Those of them that were not computed again, as prompts begin alike.
    pub shared_tokens: usize,
    /// Prompts that lost their start to `--max-length`, how prompts end, and what of them the chat template
    /// does not write.
    pub truncation: Truncation,
}

/// Runs the program: reads prompts, samples, writes.
///
/// # Errors
/// Where settings, model or data cannot be used; then there is no output file.
pub fn run(settings: &SampleSettings) -> Result<SampleReport> {
    let common = &settings.common;
    let prompt_length = prompt_length(common, &settings.sampling)?;
    let rows = TableRows::open(&settings.data)?.rows();
    let (model, tokenizer) = load(&settings.model, &settings.users.adapters, common)?;
    let stacks = users::stacks_of_rows(&settings.users, &settings.data)?;
    Plan::new("sample")
        .line("model", settings.model.model.display())
        .line("prompts", rows)
        .line("answers", format!("{} to each, {}", settings.answers, settings.sampling))
        .optional_line("base kept in", base_forms(&model))
        .line("products", Arithmetic::current())
        .line("prompts keep", format!("their last {prompt_length} tokens"))
        .line("keys and values", settings.sampling.cache(model.architecture()))
        .print(common.quiet);
    let sampler = Sampler::new(&model, &tokenizer, settings.sampling, settings.answers, common);
    let mut progress = Progress::new("sample", rows, common.quiet);
    let mut report = SampleReport::default();
    let mut lengths = BeyondContext::of(model.architecture());
    let mut output = Output { settings, form: form(&settings.data)?, writer: None };
    let mut prompts = schema::prompts(&settings.data)?;
    loop {
        let chunk: Vec<Prompt> = prompts.by_ref().take(PROMPTS_AT_A_TIME).collect::<Result<_>>()?;
        if chunk.is_empty() {
            break;
        }
        let tokens: Vec<PromptTokens> = (chunk.iter().zip(&stacks[report.prompts..]))
            .map(|(prompt, &stack)| {
                let tokens = tokenizer.prompt(prompt, prompt_length, &mut report.truncation)?;
                Ok(PromptTokens { tokens, stack, origin: Some(prompt.origin.clone()) })
            })
            .collect::<Result<_>>()?;
        let SampledAnswers { answers, shared_tokens } = sampler.sample(&tokens, report.prompts, &mut progress)?;
        report.prompts += chunk.len();
        report.prompt_tokens += tokens.iter().map(|prompt| prompt.tokens.len()).sum::<usize>();
        report.shared_tokens += shared_tokens;
        for (prompt, answers) in tokens.iter().zip(&answers) {
            answers.iter().for_each(|answer| lengths.add(prompt.tokens.len() + answer.tokens.len()));
        }
        for answer in answers.iter().flatten() {
            report.answers += 1;
            report.ended += usize::from(answer.ended);
            report.tokens += answer.tokens.len();
        }
        output.write(&chunk, &answers)?;
    }
    output.finish()?;
    progress.finish();
    if !common.quiet {
        say(&report, settings);
        say_chat_format(&tokenizer);
    }
    if let Some(warning) = lengths.warning() {
        eprintln!("warning: {warning}");
    }
    Ok(report)
}

fn say(report: &SampleReport, settings: &SampleSettings) {
    eprintln!(
        "{} answers to {} prompts in {} ({} ended by themselves, {:.1} tokens on average)",
        report.answers,
        report.prompts,
        settings.common.output.display(),
        report.ended,
        report.tokens as f64 / report.answers.max(1) as f64
    );
    if report.shared_tokens > 0 {
        let SampleReport { prompt_tokens, shared_tokens, .. } = report;
        eprintln!(
            "{shared_tokens} of {prompt_tokens} tokens of prompts were not computed again, as prompts begin alike"
        );
    }
    if let Some(cuts) = report.truncation.cuts(settings.common.max_length) {
        eprintln!("{cuts}");
    }
    report.truncation.chats.remarks("").iter().for_each(|(_, text)| eprintln!("{text}"));
}

/// Says in which format conversations were written, where the model has no chat template.
pub(crate) fn say_chat_format(tokenizer: &Tokenizer) {
    if tokenizer.transcript().is_some() {
        eprintln!("conversations were written as {TRANSCRIPT}");
    }
}

/// How many tokens `--max-length` leaves to a prompt beside `--response-length`.
pub(crate) fn prompt_length(common: &CommonSettings, sampling: &SamplingSettings) -> Result<usize> {
    sampling.check()?;
    match common.max_length.checked_sub(sampling.response_length) {
        None | Some(0) => bail!(
            "--max-length {} leaves no room for a prompt beside --response-length {}; raise the first or lower the second",
            common.max_length,
            sampling.response_length
        ),
        Some(length) => Ok(length),
    }
}

/// A frozen language model with its tokenizer, and the adapters of users on top of it.
pub(crate) fn load(
    settings: &ModelSettings,
    users: &[NamedFolder],
    common: &CommonSettings,
) -> Result<(Model, Tokenizer)> {
    let tokenizer = adapt::tokenizer(&settings.model, &settings.adapter)?;
    let role = Role {
        folder: &settings.model,
        adapters: &settings.adapter,
        training: Training::Frozen,
        head: Head::Language,
        seed: common.seed,
    };
    let model = Bases::of(common, Device::Cpu).load_with_users(&role, users)?;
    Ok((model, tokenizer))
}

/// A sampled answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sampled {
    /// Its text, without the stop token.
    pub text: String,
    /// Its tokens, the stop token included.
    pub tokens: Vec<u32>,
    /// Whether it ended by itself before the greatest length was reached.
    pub ended: bool,
}

/// Prompts that are read, and their answers written, at a time.
const PROMPTS_AT_A_TIME: usize = 2048;
/// Answers sampled by one call of [`generate`], at least.
const ANSWERS_A_CALL: usize = 512;
/// Caches that the answers of one call fill, at least: its last answers are computed with fewer others.
const CACHES_A_CALL: usize = 4;

/// The answers to each of some prompts.
pub struct SampledAnswers {
    /// The answers to each prompt.
    pub answers: Vec<Vec<Sampled>>,
    /// Tokens of the prompts that were not computed again, as another prompt begins with them too.
    pub shared_tokens: usize,
}

/// Samples answers, as many prompts at a time as fit the memory.
pub struct Sampler<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    settings: SamplingSettings,
    answers: usize,
    seed: u64,
    tokens_per_pass: usize,
}

impl<'a> Sampler<'a> {
    /// A sampler of `answers` answers to each prompt.
    pub fn new(
        model: &'a Model,
        tokenizer: &'a Tokenizer,
        settings: SamplingSettings,
        answers: usize,
        common: &CommonSettings,
    ) -> Self {
        Sampler { model, tokenizer, settings, answers, seed: common.seed, tokens_per_pass: common.tokens_per_batch }
    }

    /// The answers to each of `prompts`. The first of them is prompt number `first` of the whole run, which chooses the random
    /// streams: an answer does not depend on which prompts are sampled with its own.
    pub fn sample(&self, prompts: &[PromptTokens], first: usize, progress: &mut Progress) -> Result<SampledAnswers> {
        let mut all = Vec::with_capacity(prompts.len());
        let mut shared_tokens = 0;
        for group in prompts.chunks(self.prompts_a_call(prompts)) {
            let generation = Generation {
                answers: self.answers,
                sampling: self.settings,
                stop: Stop::at(self.tokenizer.stop_tokens()),
                seed: self.seed,
                first: ((first + all.len()) * self.answers) as u64,
                tokens_per_pass: self.tokens_per_pass,
            };
            let generated = generate(self.model, group, &generation)?;
            shared_tokens += generated.shared_tokens;
            for (prompt, answers) in group.iter().zip(generated.answers) {
                let tokens: usize = answers.iter().map(|answer| answer.tokens.len()).sum();
                progress.advance(None, prompt.tokens.len() + tokens);
                let sampled = answers.into_iter().map(|answer| {
                    let said = &answer.tokens[..answer.tokens.len() - usize::from(answer.ended)];
                    let text = self.tokenizer.decode_answer(&prompt.tokens, said)?;
                    Ok(Sampled { text, ended: answer.ended, tokens: answer.tokens })
                });
                all.push(sampled.collect::<Result<_>>()?);
            }
        }
        Ok(SampledAnswers { answers: all, shared_tokens })
    }

    fn prompts_a_call(&self, prompts: &[PromptTokens]) -> usize {
        let longest = prompts.iter().map(|prompt| prompt.tokens.len()).max().unwrap_or(0);
        let fitting = self.settings.kv_cache_tokens / (longest + self.answers * self.settings.response_length);
        (CACHES_A_CALL * fitting).max(ANSWERS_A_CALL / self.answers).max(1)
    }
}

/// What the prompts of a file hold.
fn form(data: &str) -> Result<TextForm> {
    let mut form = TextForm::of([]);
    schema::prompts(data)?.try_for_each(|prompt| prompt.map(|prompt| form.add(&prompt.prompt)))?;
    Ok(form)
}

/// The file that is written.
struct Output<'a> {
    settings: &'a SampleSettings,
    form: TextForm,
    writer: Option<(ParquetWriter, arrow::datatypes::SchemaRef)>,
}

impl Output<'_> {
    fn write(&mut self, prompts: &[Prompt], answers: &[Vec<Sampled>]) -> Result<()> {
        let texts: Vec<&Text> = prompts.iter().map(|prompt| &prompt.prompt).collect();
        let Some(column) = self.form.column("prompt", &texts) else { return Err(self.mixed()) };
        let mut responses = ListBuilder::new(StringBuilder::new());
        for answers in answers {
            responses.append_value(answers.iter().map(|answer| Some(&answer.text)));
        }
        let mut ended = ListBuilder::new(BooleanBuilder::new());
        for answers in answers {
            ended.append_value(answers.iter().map(|answer| Some(answer.ended)));
        }
        let mut columns = vec![column];
        columns.extend(self.form.input_columns(&texts));
        columns.push(named("responses", Arc::new(responses.finish())));
        columns.push(named("ended", Arc::new(ended.finish())));
        let batch = batch_of(columns)?;
        let (mut writer, schema) = match self.writer.take() {
            Some(open) => open,
            None => (ParquetWriter::create(&self.settings.common.output, batch.schema())?, batch.schema()),
        };
        if batch.schema() != schema {
            return Err(self.mixed());
        }
        writer.write(&batch)?;
        self.writer = Some((writer, schema));
        Ok(())
    }

    fn mixed(&self) -> Error {
        let data = &self.settings.data;
        Error::input(format!(
            "{data}: prompts are strings in one file and messages in another; sample each file by itself"
        ))
    }

    fn finish(self) -> Result<()> {
        self.writer.map_or(Ok(()), |(writer, _)| writer.finish())
    }
}

#[cfg(test)]
mod tests;
