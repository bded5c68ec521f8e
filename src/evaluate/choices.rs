//! How probable a model finds given answers: what multiple choice, the recognition of hallucination and tasks with classes rest on.

use serde::{Deserialize, Serialize};

use super::answering::{note_chats, warn_of_lengths};
use crate::bail;
use crate::data::schema::{Answered, Origin};
use crate::data::tokenize_records::{Ending, Truncation};
use crate::error::Result;
use crate::sample;
use crate::score::{self, AnswerTrees, Score};
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
    let (name, (model, tokenizer)) = (&model.name, sample::load(&folder, &[], common.seed)?);
    let mut truncation = Truncation::default();
    let tree = |question| tokenizer.answered(question, |_| Ending::AsIs, common.max_length, &mut truncation);
    let trees = questions.iter().map(tree).collect::<Result<Vec<_>>>()?;
    if truncation.prompts + truncation.answers > 0 {
        progress.note(&format!(
            "{} questions lost their start and {} answers their end to --max-length {}",
            truncation.prompts, truncation.answers, common.max_length
        ));
    }
    warn_of_lengths(name, &model, trees.iter().map(|tree| tree.longest()));
    note_chats(&truncation, &tokenizer, progress);
    let stacks = vec![0; trees.len()];
    let origins = questions.iter().map(|question| &question.origin).collect();
    let answers = AnswerTrees { trees: &trees, stacks: &stacks, origins };
    let scores = score::scores(&model.frozen()?, &answers, common.tokens_per_batch, |tree| {
        progress.advance(None, tree.tokens())
    })?;
    let log_prob = |(origin, score): (&Origin, &Score)| match score.log_prob {
        Some(log_prob) => Ok(log_prob),
        None => bail!("{origin}: the model gives no log-probability; give a language model"),
    };
    let of_question = |(origin, scores): (&&Origin, &Vec<Score>)| {
        scores.iter().map(|score| log_prob((origin, score))).collect::<Result<_>>()
    };
    let log_probs = answers.origins.iter().zip(&scores).map(of_question).collect::<Result<_>>()?;
    Ok(Found { log_probs, truncation })
}
