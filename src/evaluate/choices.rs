//! How probable a model finds given answers: what multiple choice, the recognition of hallucination and tasks with classes rest on.

use super::answering::{note_chats, warn_of_lengths};
use crate::data::schema::Answered;
use crate::data::tokenize_records::{Ending, Truncation};
use crate::error::Result;
use crate::sample;
use crate::score::{self, Score};
use crate::settings::{CommonSettings, ModelSettings, NamedFolder};
use crate::train::progress::Progress;

/// What a model thinks of each answer to each question, `[question][answer]`: the log-probability of its tokens, and how many there are. The answers to a
/// question share its computation.
pub fn scores(
    model: &NamedFolder,
    questions: &[Answered],
    common: &CommonSettings,
    progress: &mut Progress,
) -> Result<Vec<Vec<Score>>> {
    if questions.is_empty() {
        return Ok(Vec::new());
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
    score::scores(&model.frozen()?, &trees, &stacks, common.tokens_per_batch, |tree| {
        progress.advance(None, tree.tokens())
    })
}

/// The log-probabilities of the answers to a question.
pub fn log_probs(scores: &[Score]) -> Vec<f64> {
    scores.iter().map(|score| score.log_prob.unwrap_or(f64::NAN)).collect()
}
