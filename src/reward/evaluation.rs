//! How well a reward model agrees with rankings it was not trained on.

use std::ops::Range;

use candle_core::Tensor;
use serde_json::{Value, json};

use super::RankedTree;
use super::agreement::{
    Accuracy, CalibrationBin, JudgedPair, accuracy, accuracy_by, accuracy_by_margin, calibration, calibration_error,
    correlation, judged_pairs,
};
use super::loss::{LossSettings, RankedAnswers};
use crate::bootstrap::{self, Cluster, Estimate};
use crate::data::batch::Batch;
use crate::data::pairs::differing_pairs;
use crate::error::Result;
use crate::figure::{Figure, Panel, Series};
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::ops::Outputs;
use crate::random::{self, shuffle};
use crate::settings::CommonSettings;
use crate::train::table::Table;

/// How well a reward model agrees with rankings.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RewardEvaluation {
    /// Mean loss a prompt, by weight.
    pub loss: f64,
    /// Every pair of answers that are no tie and differ.
    pub pairs: Vec<JudgedPair>,
    /// The share of pairs that are judged right, with its interval over prompts; nothing where there are no pairs.
    pub interval: Option<Estimate>,
    /// The accuracy of the same scores where each prompt's labels are put in random order: what chance gives on this data.
    pub shuffled_labels: f64,
    /// Mean score of all answers.
    pub mean_reward: f64,
    /// Correlation of an answer's score with its length in tokens.
    pub length_correlation: f64,
    /// The same among the answers to one prompt: of what both differ by from the prompt's mean.
    pub length_correlation_within: f64,
}

/// A micro-batch as the model sees it.
pub(super) struct Scored {
    /// The score of every answer.
    pub scores: Vec<f32>,
    /// Each prompt's range of answers.
    pub trees: Vec<Range<usize>>,
    /// The sum of the prompts' losses, by weight.
    pub loss: Tensor,
    /// What it was computed from.
    pub outputs: Outputs,
}

impl Scored {
    /// The pairs of each prompt of the micro-batch.
    pub fn pairs_by_prompt(&self, ranked: &[&RankedTree]) -> Vec<Vec<JudgedPair>> {
        let of_prompt = |(answers, ranked): (&Range<usize>, &&RankedTree)| {
            judged_pairs(&self.scores[answers.clone()], &lengths(ranked), &ranked.pairs, ranked.agreement).collect()
        };
        self.trees.iter().zip(ranked).map(of_prompt).collect()
    }
}

fn lengths(ranked: &RankedTree) -> Vec<usize> {
    ranked.tree.answers.iter().map(|answer| answer.tokens.len()).collect()
}

/// Scores the answers of a micro-batch, which `batch` holds.
pub(super) fn score<'a>(
    model: &Model,
    batch: Batch,
    ranked: &[&'a RankedTree],
    settings: &LossSettings,
    pass: &Pass,
) -> Result<Scored> {
    let hidden = model.hidden(&batch, pass)?; // [tokens, d_model]
    let mut outputs = Outputs::default();
    let scores = outputs.tensor(&model.rewards(&hidden, &batch)?)?; // [answers]
    drop(hidden);
    let prompt = |(answers, ranked): (&Range<usize>, &&'a RankedTree)| RankedAnswers {
        answers: answers.clone(),
        pairs: &ranked.pairs,
        margin: ranked.margin.unwrap_or(settings.margin as f32),
        weight: ranked.weight,
    };
    let prompts: Vec<RankedAnswers> = batch.trees.iter().zip(ranked).map(prompt).collect();
    let loss = settings.loss(&scores, &prompts)?;
    Ok(Scored { scores: scores.detach().to_vec1()?, trees: batch.trees, loss, outputs })
}

/// Loss and agreement of a frozen model.
pub fn evaluate(
    model: &Model,
    ranked: &[&RankedTree],
    settings: &LossSettings,
    common: &CommonSettings,
) -> Result<RewardEvaluation> {
    let trees = ranked.iter().map(|ranked| &ranked.tree);
    let weight: f64 = ranked.iter().map(|ranked| f64::from(ranked.weight)).sum();
    let mut evaluation = RewardEvaluation::default();
    let (mut points, mut within, mut shuffled, mut prompts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut random = random::stream(common.seed, "shuffled labels", 0);
    for range in model.passes(trees, common.tokens_per_batch) {
        let ranked = &ranked[range];
        let batch = model.pack(ranked.iter().map(|ranked| &ranked.tree));
        let scored = score(model, batch, ranked, settings, &Pass::default())?;
        for pairs in scored.pairs_by_prompt(ranked) {
            prompts.push(pairs.iter().map(JudgedPair::right).collect::<Cluster>());
            evaluation.pairs.extend(pairs);
        }
        evaluation.loss += f64::from(scored.loss.to_scalar::<f32>()?) / weight.max(f64::MIN_POSITIVE);
        for (answers, ranked) in scored.trees.iter().zip(ranked) {
            let (scores, lengths) = (&scored.scores[answers.clone()], lengths(ranked));
            let of_prompt: Vec<(f64, f64)> =
                scores.iter().zip(&lengths).map(|(&score, &length)| (f64::from(score), length as f64)).collect();
            within.extend(less_their_means(&of_prompt));
            points.extend(of_prompt);
            let mut ranks = ranked.ranks.clone();
            shuffle(&mut ranks, &mut random);
            shuffled.extend(judged_pairs(scores, &lengths, &differing_pairs(&ranks, &ranked.same_as), None));
        }
    }
    let mut stream = random::stream(common.seed, "bootstrap of accuracy", 0);
    evaluation.interval = bootstrap::rate(&prompts, bootstrap::RESAMPLES, &mut stream);
    evaluation.shuffled_labels = accuracy(&shuffled).accuracy;
    evaluation.mean_reward = points.iter().map(|(score, _)| score).sum::<f64>() / points.len().max(1) as f64;
    evaluation.length_correlation = correlation(&points);
    evaluation.length_correlation_within = correlation(&within);
    Ok(evaluation)
}

fn less_their_means(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let count = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0 / count, y + point.1 / count));
    points.iter().map(|point| (point.0 - x, point.1 - y)).collect()
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

impl RewardEvaluation {
    /// The accuracy over all pairs.
    pub fn accuracy(&self) -> Accuracy {
        accuracy(&self.pairs)
    }

    /// By the names under which they are recorded.
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
        let all = self.accuracy();
        vec![
            ("evaluation_loss", self.loss),
            ("evaluation_accuracy", all.accuracy),
            ("evaluation_accuracy_longer_wins", all.longer_wins),
            ("evaluation_calibration_error", calibration_error(&calibration(&self.pairs))),
            ("evaluation_mean_reward", self.mean_reward),
        ]
    }

    /// Groups of pairs with their names: by rank distance, by how far apart the scores are, and, where the data tells, by the labellers' agreement.
    fn groups(&self) -> [(&'static str, Vec<(String, Accuracy)>); 3] {
        let named = |groups: Vec<(i64, Accuracy)>, name: fn(i64) -> String| {
            groups.into_iter().map(|(key, of)| (name(key), of)).collect::<Vec<_>>()
        };
        // In steps of a tenth.
        let tenth = |pair: &JudgedPair| pair.agreement.map(|share| (share * 10.0 + 1e-4).floor() as i64);
        let by_margin = accuracy_by_margin(&self.pairs);
        [
            (
                "rank distance",
                named(accuracy_by(&self.pairs, |pair| Some(pair.distance)), |distance| distance.to_string()),
            ),
            ("score difference", by_margin.into_iter().map(|(bound, of)| (format!("up to {bound:.2}"), of)).collect()),
            ("labellers who agree", named(accuracy_by(&self.pairs, tenth), |tenth| format!("from {}%", 10 * tenth))),
        ]
    }

    /// Accuracy by kinds of pairs of the model of step `step`, and the baselines', for the terminal.
    pub fn tables(&self, step: usize) -> String {
        let mut text = format!("evaluation of the model of step {step}\n\n");
        for (name, groups) in self.groups().into_iter().filter(|(_, groups)| !groups.is_empty()) {
            let mut table = Table::new([name, "pairs", "accuracy", "the longer wins"]);
            let all = std::iter::once(("all".to_string(), self.accuracy()));
            for (key, Accuracy { pairs, accuracy, longer_wins }) in groups.into_iter().chain(all) {
                table.row([key, pairs.to_string(), percent(accuracy), percent(longer_wins)]);
            }
            text += &format!("{table}\n");
        }
        let interval = self.interval.map_or(String::new(), |interval| {
            format!("accuracy {} with its 95% bootstrap interval over prompts\n", interval.percent())
        });
        text + &interval
            + &format!(
                "shuffled labels {}  calibration error {:.3}  correlation with length {:.2} (within prompts {:.2})",
                percent(self.shuffled_labels),
                calibration_error(&calibration(&self.pairs)),
                self.length_correlation,
                self.length_correlation_within
            )
    }

    /// Everything about the model of step `step`, as it is written into the run's folder.
    pub fn json(&self, step: usize) -> Value {
        let numbers = |of: &Accuracy| json!({ "pairs": of.pairs, "accuracy": of.accuracy, "accuracy_longer_wins": of.longer_wins });
        let group = |groups: &[(String, Accuracy)]| -> Value {
            groups.iter().map(|(key, of)| (key.clone(), numbers(of))).collect::<serde_json::Map<_, _>>().into()
        };
        let bin =
            |bin: &CalibrationBin| json!({ "pairs": bin.pairs, "predicted": bin.predicted, "observed": bin.observed });
        let [distance, margin, agreement] = self.groups().map(|(_, groups)| group(&groups));
        let (all, bins) = (self.accuracy(), calibration(&self.pairs));
        json!({
            "step": step,
            "loss": self.loss,
            "pairs": all.pairs,
            "accuracy": all.accuracy,
            "accuracy_interval": self.interval.map(|interval| [interval.low, interval.high]),
            "accuracy_longer_wins": all.longer_wins,
            "accuracy_shuffled_labels": self.shuffled_labels,
            "accuracy_by_rank_distance": distance,
            "accuracy_by_score_difference": margin,
            "accuracy_by_labeller_agreement": agreement,
            "calibration_error": calibration_error(&bins),
            "calibration": bins.iter().map(bin).collect::<Vec<_>>(),
            "mean_reward": self.mean_reward,
            "length_correlation": self.length_correlation,
            "length_correlation_within_prompts": self.length_correlation_within,
        })
    }

    /// Predicted against observed win rate of the model of step `step`.
    pub fn figure(&self, step: usize) -> Figure {
        let bins = calibration(&self.pairs);
        let points = bins.iter().map(|bin| (bin.predicted, bin.observed)).collect();
        Figure {
            title: format!(
                "Calibration of the model of step {step} over {} pairs, expected error {:.3}",
                self.pairs.len(),
                calibration_error(&bins)
            ),
            panels: vec![Panel {
                x: "predicted win rate".to_string(),
                y: "observed win rate".to_string(),
                series: vec![Series { name: "reward model".to_string(), points }],
                is_calibration: true,
            }],
        }
    }
}
