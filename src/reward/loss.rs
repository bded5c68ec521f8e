//! Losses of reward models over ranked answers: pairwise (Ouyang et al. 2022, equation 1) and Plackett–Luce (Plackett 1975; Luce 1959).

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{D, Tensor};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::data::pairs::Pair;
use crate::error::Result;
use crate::ops;
use crate::settings::{Flags, below_one, not_negative};

const HEADING: &str = "Loss";

/// What a reward model is trained by.
#[derive(Debug, Clone, Copy, PartialEq, Args, Serialize, Deserialize)]
pub struct LossSettings {
    /// The loss of a prompt's ranked answers
    #[arg(long, help_heading = HEADING, value_enum, default_value_t = RankingLoss::Pairwise)]
    pub loss: RankingLoss,
    /// By how much a better answer's score is to be higher; a column margin wins over it
    #[arg(long, help_heading = HEADING, default_value_t = 0.0, value_parser = not_negative)]
    pub margin: f64,
    /// The share of labels taken to be the wrong way round
    #[arg(long, help_heading = HEADING, default_value_t = 0.0, value_parser = below_one)]
    pub label_smoothing: f64,
    /// Weight of (r_better + r_worse)², mean over pairs, which keeps scores around 0 (Eisenstein et al. 2023)
    #[arg(long, help_heading = HEADING, default_value_t = 0.0, value_parser = not_negative)]
    pub centring_coefficient: f64,
}

/// The loss of a prompt's ranked answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RankingLoss {
    /// -log σ(r_better - r_worse), mean over all pairs of the prompt's answers that are no tie and differ
    Pairwise,
    /// -log of the probability that each answer is chosen before all that are ranked below it, mean over answers
    PlackettLuce,
}

/// The ranked answers of one prompt in a micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub struct RankedAnswers<'a> {
    /// Where its scores stand among all.
    pub answers: Range<usize>,
    /// The pairs of its answers, by their index within the prompt.
    pub pairs: &'a [Pair],
    /// By how much a better answer's score has to be higher.
    pub margin: f32,
    /// How much the prompt counts.
    pub weight: f32,
}

impl LossSettings {
    /// When they are read.
    pub fn flags() -> Flags<Self> {
        Flags::new().always(&["loss", "margin", "label_smoothing", "centring_coefficient"])
    }

    /// `Σ over prompts of weight · loss`, with smoothing `(1 - ε) L(pairs) + ε L(pairs the other way round)`, plus the centring penalty; `scores`
    /// is `[answers]`. A prompt is one element, however many answers it has.
    pub fn loss(&self, scores: &Tensor, prompts: &[RankedAnswers]) -> Result<Tensor> {
        let mut loss = self.one_way(scores, prompts)?;
        if self.label_smoothing > 0.0 {
            let reversed: Vec<Vec<Pair>> =
                prompts.iter().map(|prompt| prompt.pairs.iter().map(|pair| pair.reversed()).collect()).collect();
            let other_way: Vec<RankedAnswers> = prompts
                .iter()
                .zip(&reversed)
                .map(|(prompt, pairs)| RankedAnswers { pairs, ..prompt.clone() })
                .collect();
            let flipped = self.one_way(scores, &other_way)?.affine(self.label_smoothing, 0.0)?;
            loss = (loss.affine(1.0 - self.label_smoothing, 0.0)? + flipped)?;
        }
        if self.centring_coefficient > 0.0 {
            let pairs = Pairs::of(scores, prompts)?;
            let squares = ((pairs.better + pairs.worse)?.sqr()? * pairs.weights)?;
            loss = (loss + squares.sum_all()?.affine(self.centring_coefficient, 0.0)?)?;
        }
        Ok(loss)
    }

    fn one_way(&self, scores: &Tensor, prompts: &[RankedAnswers]) -> Result<Tensor> {
        match self.loss {
            RankingLoss::Pairwise => {
                let Pairs { better, worse, weights, margins } = Pairs::of(scores, prompts)?;
                let difference = ((better - worse)? - margins)?;
                // -log σ(x) = log(1 + exp(-x))
                Ok((ops::softplus(&difference.neg()?)? * weights)?.sum_all()?)
            }
            RankingLoss::PlackettLuce => plackett_luce(scores, prompts),
        }
    }
}

/// All pairs of a micro-batch, one number each, `[pairs]`.
struct Pairs {
    better: Tensor,
    worse: Tensor,
    /// The prompt's weight divided by its number of pairs.
    weights: Tensor,
    margins: Tensor,
}

impl Pairs {
    fn of(scores: &Tensor, prompts: &[RankedAnswers]) -> Result<Self> {
        let (mut better, mut worse, mut weights, mut margins) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for prompt in prompts {
            for pair in prompt.pairs {
                better.push((prompt.answers.start + pair.better) as u32);
                worse.push((prompt.answers.start + pair.worse) as u32);
                weights.push(prompt.weight / prompt.pairs.len() as f32);
                margins.push(prompt.margin);
            }
        }
        let (device, count) = (scores.device(), better.len());
        Ok(Pairs {
            better: scores.index_select(&Tensor::from_vec(better, count, device)?, 0)?,
            worse: scores.index_select(&Tensor::from_vec(worse, count, device)?, 0)?,
            weights: Tensor::from_vec(weights, count, device)?,
            margins: Tensor::from_vec(margins, count, device)?,
        })
    }
}

/// What stands in place of the score of an answer that is no candidate: its exponential is 0.
const NO_CANDIDATE: f32 = -1e30;

/// `Σ over prompts of weight · mean over i of (log(exp(r_i - m) + Σ_j exp(r_j)) - (r_i - m))`, `j` over the answers that are worse than `i` in a pair,
/// `i` over those that have such. Without ties this is the Plackett–Luce likelihood; tied answers form a group whose members are compared with all
/// below it and not with each other. With two answers it is the pairwise loss.
fn plackett_luce(scores: &Tensor, prompts: &[RankedAnswers]) -> Result<Tensor> {
    let all = scores.elem_count();
    let (mut chosen, mut candidates, mut weights, mut margins) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for prompt in prompts {
        let mut choices: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for pair in prompt.pairs {
            choices.entry(pair.better).or_default().push(pair.worse);
        }
        for (&better, worse) in &choices {
            let first = candidates.len();
            candidates.resize(first + all, NO_CANDIDATE);
            for worse in worse {
                candidates[first + prompt.answers.start + worse] = 0.0;
            }
            candidates[first + prompt.answers.start + better] = -prompt.margin;
            chosen.push((prompt.answers.start + better) as u32);
            weights.push(prompt.weight / choices.len() as f32);
            margins.push(prompt.margin);
        }
    }
    let (device, count) = (scores.device(), chosen.len());
    let candidates = Tensor::from_vec(candidates, (count, all), device)?.broadcast_add(scores)?; // [choices, answers]
    let largest = candidates.detach().max_keepdim(D::Minus1)?; // [choices, 1]
    let sums = candidates.broadcast_sub(&largest)?.exp()?.sum(D::Minus1)?; // [choices]
    let chosen = scores.index_select(&Tensor::from_vec(chosen, count, device)?, 0)?; // [choices]
    let chosen = (chosen - Tensor::from_vec(margins, count, device)?)?;
    let losses = ((sums.log()? + largest.squeeze(1)?)? - chosen)?;
    Ok((losses * Tensor::from_vec(weights, count, device)?)?.sum_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::pairs::{differing_pairs, pairs};
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    const PLAIN: LossSettings =
        LossSettings { loss: RankingLoss::Pairwise, margin: 0.0, label_smoothing: 0.0, centring_coefficient: 0.0 };
    const PLACKETT_LUCE: LossSettings = LossSettings { loss: RankingLoss::PlackettLuce, ..PLAIN };

    fn mean_over_pairs(scores: &[f32], ranks: &[i64]) -> f64 {
        let pairs = pairs(ranks);
        let loss = |pair: &Pair| (1.0 + (-f64::from(scores[pair.better] - scores[pair.worse])).exp()).ln();
        pairs.iter().map(loss).sum::<f64>() / pairs.len() as f64
    }

    fn loss(settings: &LossSettings, scores: &[f32], ranks: &[i64], margin: f32) -> f32 {
        let tensor = Tensor::from_slice(scores, scores.len(), &Device::Cpu).unwrap();
        let prompt = RankedAnswers { answers: 0..scores.len(), pairs: &pairs(ranks), margin, weight: 1.0 };
        settings.loss(&tensor, &[prompt]).unwrap().to_scalar().unwrap()
    }

    proptest! {
        #[test]
        fn losses_ignore_the_order_of_answers_and_pairwise_is_the_mean_over_pairs(
            answers in prop::collection::vec((-4f32..4.0, 0i64..5), 2..9), margin in 0f32..1.0
        ) {
            let (scores, ranks): (Vec<f32>, Vec<i64>) = answers.iter().copied().unzip();
            prop_assume!(!pairs(&ranks).is_empty());
            let (reversed_scores, reversed_ranks): (Vec<f32>, Vec<i64>) = answers.iter().rev().copied().unzip();
            let smooth = LossSettings { label_smoothing: 0.2, centring_coefficient: 0.1, ..PLACKETT_LUCE };
            for settings in [PLAIN, PLACKETT_LUCE, smooth] {
                let found = loss(&settings, &scores, &ranks, margin);
                prop_assert!((found - loss(&settings, &reversed_scores, &reversed_ranks, margin)).abs() < 1e-5);
            }
            prop_assert!((f64::from(loss(&PLAIN, &scores, &ranks, 0.0)) - mean_over_pairs(&scores, &ranks)).abs() < 1e-5);
        }

        #[test]
        fn with_two_answers_both_losses_are_one(first in -4f32..4.0, second in -4f32..4.0, margin in 0f32..1.0, smoothing in 0f64..0.4) {
            let smooth = |settings: LossSettings| LossSettings { label_smoothing: smoothing, ..settings };
            let found = [PLAIN, PLACKETT_LUCE].map(|settings| loss(&smooth(settings), &[first, second], &[1, 0], margin));
            prop_assert!((found[0] - found[1]).abs() < 1e-5, "{found:?}");
        }

        /// The probability of an order, one choice after the other.
        #[test]
        fn without_ties_the_likelihood_is_that_of_drawing_without_replacement(scores in prop::collection::vec(-3f32..3.0, 2..7)) {
            let ranks: Vec<i64> = (0..scores.len() as i64).collect();
            let choice = |place: usize| {
                let total: f64 = scores[place..].iter().map(|&score| f64::from(score).exp()).sum();
                f64::from(scores[place]) - total.ln()
            };
            let likelihood: f64 = (0..scores.len() - 1).map(choice).sum();
            let found = f64::from(loss(&PLACKETT_LUCE, &scores, &ranks, 0.0));
            prop_assert!((found + likelihood / (scores.len() - 1) as f64).abs() < 1e-5);
        }
    }

    #[test]
    fn equal_scores_have_the_gradient_of_a_coin_and_a_weight_counts() -> Result<()> {
        let scores = Var::new(&[0f32, 0.0], &Device::Cpu)?;
        let prompt = RankedAnswers { answers: 0..2, pairs: &pairs(&[0, 1]), margin: 0.0, weight: 3.0 };
        let loss = PLAIN.loss(scores.as_tensor(), &[prompt])?;
        assert_eq!(loss.backward()?.get(&scores).unwrap().to_vec1::<f32>()?, [-1.5, 1.5]);
        Ok(())
    }

    /// Of three answers the first two are the same: what is left is each of them against the third.
    #[test]
    fn answers_that_are_the_same_are_not_compared_by_either_loss() -> Result<()> {
        let (scores, ranks) = ([0.7, 0.7, -0.4], [0, 1, 2]);
        let tensor = Tensor::from_slice(&scores, 3, &Device::Cpu)?;
        let prompt =
            RankedAnswers { answers: 0..3, pairs: &differing_pairs(&ranks, &[0, 0, 2]), margin: 0.0, weight: 1.0 };
        for settings in [PLAIN, PLACKETT_LUCE] {
            let found: f32 = settings.loss(&tensor, std::slice::from_ref(&prompt))?.to_scalar()?;
            let expected = loss(&settings, &scores[1..], &[0, 1], 0.0);
            assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
        }
        Ok(())
    }
}
