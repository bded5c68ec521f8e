//! How far a model's answers are from the base model: `log π(answer) - log π_base(answer)` of answers that `π` gave, whose mean is KL(π, π_base) where
//! nothing but a temperature shapes the sampling.

use super::question::Question;
use crate::data::batch::{Continuation, TokenTree};
use crate::error::Result;
use crate::generate::PromptTokens;
use crate::model::Model;
use crate::sample::Sampled;
use crate::score::{self, AnswerTrees};

/// The log-probability of every answer, `[question][sample]`, at a temperature; `prompts` are the questions as tokens.
pub(super) fn log_probs(
    model: &Model,
    (questions, prompts): (&[Question], &[PromptTokens]),
    answers: &[Vec<Sampled>],
    temperature: f64,
    tokens_per_batch: usize,
) -> Result<Vec<Vec<f64>>> {
    let answer =
        |sampled: &Sampled| Continuation { learned: vec![true; sampled.tokens.len()], tokens: sampled.tokens.clone() };
    let tree = |(prompt, answers): (&PromptTokens, &Vec<Sampled>)| TokenTree {
        prompt: prompt.tokens.clone(),
        answers: answers.iter().map(answer).collect(),
    };
    let trees: Vec<TokenTree> = prompts.iter().zip(answers).map(tree).collect();
    let stacks: Vec<usize> = prompts.iter().map(|prompt| prompt.stack).collect();
    let origins = questions.iter().map(|question| &question.origin).collect();
    let answers = AnswerTrees { trees: &trees, stacks: &stacks, origins };
    score::answer_log_probs(&model.frozen()?, &answers, temperature, tokens_per_batch, |_| ())
}
