//! A model that answers questions.

use std::collections::HashMap;

use super::divergence;
use super::journal::Journal;
use super::question::Question;
use crate::adapt::users;
use crate::bail;
use crate::data::schema::Prompt;
use crate::data::splits::Pattern;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::files::warn_once;
use crate::generate::{PromptTokens, SamplingSettings};
use crate::model::Model;
use crate::model::architecture::BeyondContext;
use crate::sample::{self, Sampled, Sampler};
use crate::settings::{CommonSettings, ModelSettings, NamedFolder, UserSettings};
use crate::train::plan::TRANSCRIPT;
use crate::train::progress::Progress;

/// What is asked, and how it is answered.
#[derive(Debug, Clone, Copy)]
pub struct Asking<'a> {
    /// What the answers belong to, in the journal.
    pub part: &'a str,
    /// What is asked.
    pub questions: &'a [Question],
    /// The file that the questions were read from, and the adapters that its rows name.
    pub users: Option<(&'a str, &'a UserSettings)>,
    /// Answers to each question.
    pub samples: usize,
    /// How they are sampled.
    pub sampling: &'a SamplingSettings,
    /// What all programs share.
    pub common: &'a CommonSettings,
}

/// A model with the questions as it reads them.
pub struct Answering<'a> {
    asking: Asking<'a>,
    number: usize,
    name: String,
    model: Model,
    tokenizer: Tokenizer,
    prompts: Vec<PromptTokens>,
    truncation: Truncation,
}

/// A model's answers to every question.
pub struct Answers {
    /// `[question][sample]`.
    pub sampled: Vec<Vec<Sampled>>,
    /// The vocabulary that their tokens are of.
    pub vocabulary: HashMap<String, u32>,
}

/// Answers that are kept together in the journal, about.
const ANSWERS_A_PIECE: usize = 1024;

/// Warns where a model reads sequences of these lengths that are longer than it was made for.
pub(super) fn warn_of_lengths(name: &str, model: &Model, lengths: impl IntoIterator<Item = usize>) {
    if let Some(warning) = BeyondContext::of(model.architecture()).with(lengths).warning() {
        warn_once(&format!("warning: {name}: {warning}"));
    }
}

/// Notes what a model does not read of conversations as the data have them, and in which format it reads them where it has no chat template.
pub(super) fn note_chats(truncation: &Truncation, tokenizer: &Tokenizer, progress: &Progress) {
    truncation.chats.remarks("").iter().for_each(|(_, text)| progress.note_once(text));
    if tokenizer.transcript().is_some() {
        progress.note_once(&format!("conversations are written as {TRANSCRIPT}"));
    }
}

impl<'a> Answering<'a> {
    /// Reads the model of this number, and makes tokens of the questions.
    pub fn open(asking: Asking<'a>, number: usize, model: &NamedFolder, progress: &mut Progress) -> Result<Self> {
        let folder = ModelSettings { model: model.folder.clone(), adapter: Vec::new() };
        let name = model.name.clone();
        let adapters = asking.users.map_or(&[][..], |(_, users)| &users.adapters);
        let (model, tokenizer) = sample::load(&folder, adapters, asking.common)?;
        let stacks = match asking.users {
            Some((data, users)) if !users.adapters.is_empty() => {
                users::stacks_of_rows(users, Pattern::evaluation(data))?
            }
            _ => vec![0; asking.questions.len()],
        };
        if stacks.len() != asking.questions.len() {
            bail!(
                "the data have {} rows with an adapter's name for {} prompts, as if they had changed meanwhile; evaluate again",
                stacks.len(),
                asking.questions.len()
            );
        }
        let prompt_length = sample::prompt_length(asking.common, asking.sampling)?;
        let mut truncation = Truncation::default();
        let tokens = asking.questions.iter().map(|question| {
            let prompt = Prompt::new(question.prompt.clone(), question.origin.clone());
            tokenizer.prompt(&prompt, prompt_length, &mut truncation)
        });
        let origins = asking.questions.iter().map(|question| Some(question.origin.clone()));
        let prompts = (tokens.zip(stacks).zip(origins))
            .map(|((tokens, stack), origin)| Ok(PromptTokens { tokens: tokens?, stack, origin }));
        let prompts: Vec<PromptTokens> = prompts.collect::<Result<_>>()?;
        if let Some(cuts) = truncation.cuts(asking.common.max_length) {
            progress.note_once(&cuts);
        }
        note_chats(&truncation, &tokenizer, progress);
        Ok(Answering { asking, number, name, model, tokenizer, prompts, truncation })
    }

    /// How many questions were too long.
    pub fn truncation(&self) -> Truncation {
        self.truncation
    }

    /// The answers to every question.
    pub fn answer(&self, journal: &Journal, progress: &mut Progress) -> Result<Answers> {
        let Asking { part, samples, sampling, common, .. } = self.asking;
        let sampler = Sampler::new(&self.model, &self.tokenizer, *sampling, samples, common);
        let mut sampled = Vec::with_capacity(self.prompts.len());
        for prompts in self.prompts.chunks((ANSWERS_A_PIECE / samples).max(1)) {
            let first = sampled.len();
            let piece = format!("{part}-{}-{first}", self.number);
            let answers: Vec<Vec<Sampled>> =
                journal.piece(&piece, &prompts, || Ok(sampler.sample(prompts, first, progress)?.answers))?;
            sampled.extend(answers);
        }
        let length = |(prompt, answers): (&PromptTokens, &Vec<Sampled>)| {
            let prompt = prompt.tokens.len();
            answers.iter().map(move |answer| prompt + answer.tokens.len()).collect::<Vec<_>>()
        };
        warn_of_lengths(&self.name, &self.model, self.prompts.iter().zip(&sampled).flat_map(length));
        Ok(Answers { sampled, vocabulary: self.tokenizer.vocabulary() })
    }

    /// The log-probability of every answer, of whatever model, under this one.
    pub fn log_probs(&self, sampled: &[Vec<Sampled>]) -> Result<Vec<Vec<f64>>> {
        // A model that takes the most probable token is still a distribution.
        let temperature = self.asking.sampling.temperature;
        let temperature = if self.asking.sampling.is_greedy() { 1.0 } else { temperature };
        let asked = (self.asking.questions, &self.prompts[..]);
        divergence::log_probs(&self.model, asked, sampled, temperature, self.asking.common.tokens_per_batch)
    }

    /// Whether answers of this vocabulary are of this model's too.
    pub fn has_vocabulary(&self, vocabulary: &HashMap<String, u32>) -> bool {
        self.tokenizer.vocabulary() == *vocabulary
    }
}
