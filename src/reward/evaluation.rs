//! How well a reward model agrees with rankings.

use std::ops::Range;

use candle_core::Tensor;
use serde_json::{Map, Value, json};

use super::RankedTree;
use super::loss::{Agreement, kwise_loss};
use crate::data::batch::split_by_budget;
use crate::error::Result;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::train::table::Table;

/// How well a reward model agrees with rankings.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RewardEvaluation {
    /// Mean k-wise loss a prompt.
    pub loss: f64,
    /// The model's agreement.
    pub agreement: Agreement,
    /// The agreement of "the longer answer (in tokens) wins", the baseline to beat.
    pub longer_wins: Agreement,
    /// Mean reward of all answers.
    pub mean_reward: f64,
}

/// A micro-batch as the model sees it.
pub(super) struct Scored {
    /// The score of every answer.
    pub scores: Vec<f32>,
    /// Each prompt's range of answers.
    pub trees: Vec<Range<usize>>,
    /// The sum of the prompts' losses.
    pub loss: Tensor,
}

/// Scores the answers of a micro-batch.
pub(super) fn score(model: &Model, ranked: &[&RankedTree], pass: &Pass) -> Result<Scored> {
    let batch = model.pack(ranked.iter().map(|ranked| &ranked.tree));
    let hidden = model.hidden(&batch, pass)?; // [tokens, d_model]
    let scores = model.rewards(&hidden, &batch)?; // [answers]
    let prompts: Vec<_> = (batch.trees.iter().zip(ranked))
        .map(|(answers, ranked)| (answers.clone(), ranked.ranks.as_slice(), ranked.margin))
        .collect();
    let loss = kwise_loss(&scores, &prompts)?;
    Ok(Scored { scores: scores.detach().to_vec1()?, trees: batch.trees, loss })
}

/// Loss and agreement of a frozen model.
pub fn evaluate(model: &Model, ranked: &[RankedTree], tokens_per_batch: usize) -> Result<RewardEvaluation> {
    let ranked: Vec<&RankedTree> = ranked.iter().collect();
    let sizes: Vec<usize> = ranked.iter().map(|ranked| ranked.tree.tokens()).collect();
    let mut evaluation = RewardEvaluation::default();
    let mut answers = 0;
    for range in split_by_budget(&sizes, tokens_per_batch) {
        let ranked = &ranked[range];
        let scored = score(model, ranked, &Pass::default())?;
        for (answers, ranked) in scored.trees.iter().zip(ranked) {
            evaluation.agreement.add(&scored.scores[answers.clone()], &ranked.ranks);
            let lengths: Vec<f32> = ranked.tree.answers.iter().map(|answer| answer.tokens.len() as f32).collect();
            evaluation.longer_wins.add(&lengths, &ranked.ranks);
        }
        evaluation.loss += f64::from(scored.loss.to_scalar::<f32>()?);
        evaluation.mean_reward += scored.scores.iter().map(|&score| f64::from(score)).sum::<f64>();
        answers += scored.scores.len();
    }
    evaluation.loss /= ranked.len() as f64;
    evaluation.mean_reward /= answers as f64;
    Ok(evaluation)
}

impl RewardEvaluation {
    /// By the names under which they are recorded.
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("evaluation_loss", self.loss),
            ("evaluation_accuracy", self.agreement.accuracy()),
            ("evaluation_accuracy_longer_wins", self.longer_wins.accuracy()),
            ("evaluation_mean_reward", self.mean_reward),
        ]
    }

    /// Pairs, accuracy and the baseline's accuracy at each rank distance.
    fn by_distance(&self) -> impl Iterator<Item = (i64, usize, f64, f64)> {
        let both = self.agreement.by_distance.iter().zip(self.longer_wins.by_distance.values());
        both.map(|((&distance, &(pairs, right)), &(_, longer))| {
            (distance, pairs, right / pairs as f64, longer / pairs as f64)
        })
    }

    /// Accuracy by rank distance, beside the baseline's, for the terminal.
    pub fn table(&self) -> String {
        let percent = |share: f64| format!("{:.1}%", 100.0 * share);
        let mut table = Table::new(["rank distance", "pairs", "accuracy", "the longer wins"]);
        for (distance, pairs, accuracy, longer) in self.by_distance() {
            table.row([distance.to_string(), pairs.to_string(), percent(accuracy), percent(longer)]);
        }
        let (accuracy, longer) = (percent(self.agreement.accuracy()), percent(self.longer_wins.accuracy()));
        table.row(["all".to_string(), self.agreement.pairs.to_string(), accuracy, longer]);
        table.to_string()
    }

    /// Everything, as it is written into the run's folder.
    pub fn json(&self) -> Value {
        let by_distance: Map<String, Value> = (self.by_distance())
            .map(|(distance, pairs, accuracy, longer)| {
                (distance.to_string(), json!({ "pairs": pairs, "accuracy": accuracy, "accuracy_longer_wins": longer }))
            })
            .collect();
        json!({
            "loss": self.loss,
            "pairs": self.agreement.pairs,
            "accuracy": self.agreement.accuracy(),
            "accuracy_longer_wins": self.longer_wins.accuracy(),
            "accuracy_by_rank_distance": by_distance,
            "mean_reward": self.mean_reward,
        })
    }
}
