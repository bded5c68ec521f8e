//! The k-wise loss of InstructGPT (Ouyang et al. 2022, equation 1) and what is reported beside it.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::Tensor;

use crate::error::Result;
use crate::ops;

/// Two answers to one prompt of which the first is ranked better, by their index within the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// The answer with the lower rank.
    pub better: usize,
    /// The answer with the higher rank.
    pub worse: usize,
    /// By how many ranks they differ.
    pub distance: i64,
}

/// All pairs of answers that are no tie.
pub fn pairs(ranks: &[i64]) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for (better, &low) in ranks.iter().enumerate() {
        for (worse, &high) in ranks.iter().enumerate() {
            if low < high {
                pairs.push(Pair { better, worse, distance: high - low });
            }
        }
    }
    pairs
}

/// `Σ over prompts of (1 / pairs) Σ over pairs of -log σ(r_better - r_worse - margin)`: all pairs of a prompt are one element, however
/// many they are. `scores` is `[answers]`; `prompts` gives for each prompt its range of answers, its ranks and its margin.
pub fn kwise_loss(scores: &Tensor, prompts: &[(Range<usize>, &[i64], f32)]) -> Result<Tensor> {
    let (mut better, mut worse, mut weights, mut margins) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (answers, ranks, margin) in prompts {
        let pairs = pairs(ranks);
        for pair in &pairs {
            better.push((answers.start + pair.better) as u32);
            worse.push((answers.start + pair.worse) as u32);
            weights.push(1.0 / pairs.len() as f32);
            margins.push(*margin);
        }
    }
    let device = scores.device();
    let count = better.len();
    let better = scores.index_select(&Tensor::from_vec(better, count, device)?, 0)?; // [pairs]
    let worse = scores.index_select(&Tensor::from_vec(worse, count, device)?, 0)?; // [pairs]
    let difference = ((better - worse)? - Tensor::from_vec(margins, count, device)?)?;
    let losses = ops::softplus(&difference.neg()?)?; // -log σ(x) = log(1 + exp(-x))
    Ok((losses * Tensor::from_vec(weights, count, device)?)?.sum_all()?)
}

/// How often the higher score went to the better answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Agreement {
    /// Pairs compared.
    pub pairs: usize,
    /// Pairs in which the better answer had the higher score; equal scores count half.
    pub right: f64,
    /// The same two numbers by rank distance.
    pub by_distance: BTreeMap<i64, (usize, f64)>,
}

impl Agreement {
    /// Adds the pairs of one prompt.
    pub fn add(&mut self, scores: &[f32], ranks: &[i64]) {
        for Pair { better, worse, distance } in pairs(ranks) {
            let right = match scores[better].total_cmp(&scores[worse]) {
                std::cmp::Ordering::Greater => 1.0,
                std::cmp::Ordering::Equal => 0.5,
                std::cmp::Ordering::Less => 0.0,
            };
            self.pairs += 1;
            self.right += right;
            let entry = self.by_distance.entry(distance).or_default();
            entry.0 += 1;
            entry.1 += right;
        }
    }

    /// The share of pairs judged right.
    pub fn accuracy(&self) -> f64 {
        self.right / self.pairs.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    fn mean_over_pairs(scores: &[f32], ranks: &[i64]) -> f64 {
        let pairs = pairs(ranks);
        let loss = |pair: &Pair| (1.0 + (-f64::from(scores[pair.better] - scores[pair.worse])).exp()).ln();
        pairs.iter().map(loss).sum::<f64>() / pairs.len() as f64
    }

    proptest! {
        #[test]
        fn loss_is_the_mean_over_pairs_and_ignores_the_order_of_answers(
            answers in prop::collection::vec((-4f32..4.0, 0i64..5), 2..9)
        ) {
            let (scores, ranks): (Vec<f32>, Vec<i64>) = answers.iter().copied().unzip();
            prop_assume!(!pairs(&ranks).is_empty());
            let loss = |scores: &[f32], ranks: &[i64]| -> f32 {
                let tensor = Tensor::from_slice(scores, scores.len(), &Device::Cpu).unwrap();
                kwise_loss(&tensor, &[(0..scores.len(), ranks, 0.0)]).unwrap().to_scalar().unwrap()
            };
            let found = loss(&scores, &ranks);
            prop_assert!((f64::from(found) - mean_over_pairs(&scores, &ranks)).abs() < 1e-5);
            let (reversed_scores, reversed_ranks): (Vec<f32>, Vec<i64>) = answers.iter().rev().copied().unzip();
            prop_assert!((found - loss(&reversed_scores, &reversed_ranks)).abs() < 1e-5);
        }
    }

    #[test]
    fn equal_scores_have_the_gradient_of_a_coin() -> Result<()> {
        let scores = Var::new(&[0f32, 0.0], &Device::Cpu)?;
        let loss = kwise_loss(scores.as_tensor(), &[(0..2, &[0, 1], 0.0)])?;
        assert_eq!(loss.backward()?.get(&scores).unwrap().to_vec1::<f32>()?, [-0.5, 0.5]);
        Ok(())
    }

    #[test]
    fn ties_are_left_out_and_half_counted_nowhere() {
        assert_eq!(pairs(&[1, 0, 1]).len(), 2);
        let mut agreement = Agreement::default();
        agreement.add(&[0.1, 0.7, 0.9], &[1, 0, 1]);
        assert_eq!((agreement.pairs, agreement.accuracy()), (2, 0.5));
        assert_eq!(agreement.by_distance[&1], (2, 1.0));
    }
}
