//! How far a model's answers are from the base model: `log π(answer) - log π_base(answer)` of answers that `π` gave, whose mean is KL(π, π_base).

use crate::data::batch::{Batch, Continuation, TokenTree, split_by_budget};
use crate::error::Result;
use crate::generate::PromptTokens;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::sample::Sampled;

/// The log-probability of every answer, `[prompt][sample]`, at a temperature.
pub(super) fn log_probs(
    model: &Model,
    prompts: &[PromptTokens],
    answers: &[Vec<Sampled>],
    temperature: f64,
    tokens_per_batch: usize,
) -> Result<Vec<Vec<f64>>> {
    let model = model.frozen()?;
    let answer =
        |sampled: &Sampled| Continuation { learned: vec![true; sampled.tokens.len()], tokens: sampled.tokens.clone() };
    let trees: Vec<(TokenTree, usize)> = (prompts.iter().zip(answers))
        .map(|(prompt, answers)| {
            let answers = answers.iter().map(answer).collect();
            (TokenTree { prompt: prompt.tokens.clone(), answers }, prompt.stack)
        })
        .collect();
    let sizes: Vec<usize> = trees.iter().map(|(tree, _)| tree.tokens()).collect();
    let mut all = Vec::with_capacity(trees.len());
    for range in split_by_budget(&sizes, tokens_per_batch) {
        let batch = Batch::pack_stacks(trees[range].iter().map(|(tree, stack)| (tree, *stack)));
        let hidden = model.hidden(&batch, &Pass::default())?; // [tokens, d_model]
        let found: Vec<f32> = model.log_probs(&hidden, &batch, temperature)?.log_probs.to_vec1()?;
        let sum =
            |answer: usize| batch.answer_targets[answer].clone().map(|target| f64::from(found[target])).sum::<f64>();
        all.extend(batch.trees.iter().map(|answers| answers.clone().map(sum).collect::<Vec<f64>>()));
    }
    Ok(all)
}
