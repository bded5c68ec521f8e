//! How probable a model finds given answers: what multiple choice, the recognition of hallucination and tasks with classes rest on.

use serde::{Deserialize, Serialize};

use super::answering::{note_chats, warn_of_lengths};
use crate::data::answer_reader::AnswerReader;
use crate::data::batch::TokenTree;
use crate::data::schema::Answered;
use crate::data::tokenize_records::{Ending, Truncation};
use crate::error::Result;
use crate::sample;
use crate::score::{self, AnswerTrees};
use crate::settings::{CommonSettings, ModelSettings, NamedFolder};
use crate::train::progress::Progress;

/// What a model thinks of answers, and how many texts were too long for it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// The log-probability of each answer to each question, `[question][answer]`: the sum over its tokens.
    pub log_probs: Vec<Vec<f64>>,
    /// What lost a part.
    pub truncation: Truncation,
}

/// The log-probability of each answer to each question. The answers to a question share its computation.
pub fn log_probs(
    model: &NamedFolder,
    questions: &[Answered],
    common: &CommonSettings,
    progress: &mut Progress,
) -> Result<Found> {
    if questions.is_empty() {
        return Ok(Found::default());
    }
    let folder = ModelSettings { model: model.folder.clone(), adapter: Vec::new() };
    let (name, (model, tokenizer)) = (&model.name, sample::load(&folder, &[], common)?);
    let mut truncation = Truncation::default();
    let reader = AnswerReader { tokenizer: &tokenizer, is_encoder: false, max_length: common.max_length };
    let tree = |question| reader.answered(question, |_| Ending::AsIs, &mut truncation);
    let trees = questions.iter().map(tree).collect::<Result<Vec<_>>>()?;
    if let Some(cuts) = truncation.cuts(common.max_length) {
        progress.note_once(&cuts);
    }
    warn_of_lengths(name, &model, trees.iter().map(|tree| tree.longest()));
    note_chats(&truncation, &tokenizer, progress);
    let stacks = vec![0; trees.len()];
    let origins = questions.iter().map(|question| &question.origin).collect();
    let answers = AnswerTrees { trees: &trees, stacks: &stacks, origins };
    let done = |tree: &TokenTree| progress.advance(None, tree.tokens());
    let log_probs = score::answer_log_probs(&model.frozen()?, &answers, 1.0, common.tokens_per_batch, done)?;
    Ok(Found { log_probs, truncation })
}
