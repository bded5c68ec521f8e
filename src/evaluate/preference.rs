//! How often a model's answer is preferred to the base model's.

use std::cmp::Ordering;

use candle_core::Device;

use super::{EvaluateSettings, origin};
use crate::adapt::{self, Bases, Head, Role, Training};
use crate::data::schema::{Answered, Text};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::{Ending, Truncation};
use crate::error::Result;
use crate::sample::Sampled;
use crate::score::reward_scores;
use crate::world::rule::{Case, preference};

/// How much `first` is preferred to `second`: 1 if it is, 1/2 for a tie, 0 if `second` is; the mean over both orders in which
/// the judge can see the two, so that a judge's liking for the first place counts for nothing.
pub fn in_both_orders<T: ?Sized>(first: &T, second: &T, judge: impl Fn(&T, &T) -> Ordering) -> f64 {
    let worth = |ordering| match ordering {
        Ordering::Greater => 1.0,
        Ordering::Equal => 0.5,
        Ordering::Less => 0.0,
    };
    (worth(judge(first, second)) + worth(judge(second, first).reverse())) / 2.0
}

/// How much the world's rule prefers `first` to `second`.
pub fn by_rule(case: &Case, first: &str, second: &str) -> f64 {
    in_both_orders(first, second, |left, right| preference(case, left, right))
}

/// How much a reward model prefers an answer to another, given their rewards. It scores each answer by itself, as neither sees
/// the other: the order cannot matter.
pub fn by_reward(first: f64, second: f64) -> f64 {
    in_both_orders(&first, &second, |left, right| left.total_cmp(right))
}

/// The rewards of all answers: `[model][prompt][sample]`, as `answers`. The answers of all models to one prompt share its segment.
/// An answer that was cut off at its greatest length is scored as it is; one that ended, with the end-of-text token.
pub(super) fn rewards(
    settings: &EvaluateSettings,
    folder: &std::path::Path,
    cases: &[Case],
    answers: &[Vec<Vec<Sampled>>],
) -> Result<Vec<Vec<Vec<f64>>>> {
    let tokenizer = Tokenizer::load(adapt::tokenizer_folder(folder)?)?;
    let role =
        Role { folder, adapters: &[], training: Training::Frozen, head: Head::Scalar, seed: settings.common.seed };
    let model = Bases::new(Device::Cpu).load(&role)?;
    tokenizer.fits(model.architecture().vocabulary)?;
    let mut rewards: Vec<Vec<Vec<f64>>> =
        answers.iter().map(|of_model| of_model.iter().map(|samples| vec![0.0; samples.len()]).collect()).collect();
    for ending in [Ending::Eos, Ending::AsIs] {
        let (mut trees, mut places) = (Vec::new(), Vec::new());
        for (index, case) in cases.iter().enumerate() {
            let of_case = answers.iter().enumerate().flat_map(|(model, of_model)| {
                of_model[index].iter().enumerate().map(move |(sample, answer)| ((model, sample), answer))
            });
            let (found, texts): (Vec<_>, Vec<_>) = of_case
                .filter(|(_, answer)| answer.ended == (ending == Ending::Eos))
                .map(|(place, answer)| (place, Text::Plain(answer.text.clone())))
                .unzip();
            if found.is_empty() {
                continue;
            }
            let prompt = Text::Plain(case.prompt.clone());
            let record = Answered { prompt, answers: texts, origin: origin(settings, index) };
            trees.push(tokenizer.answered(&record, ending, settings.common.max_length, &mut Truncation::default())?);
            places.push((index, found));
        }
        let scores = reward_scores(&model, &trees, settings.common.tokens_per_batch)?;
        for ((case, places), scores) in places.into_iter().zip(scores) {
            for ((model, sample), score) in places.into_iter().zip(scores) {
                rewards[model][case][sample] = score;
            }
        }
    }
    Ok(rewards)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_judge_that_likes_the_first_place_is_worth_nothing() {
        assert_eq!(in_both_orders(&1, &2, |_, _| Ordering::Greater), 0.5);
        assert_eq!(in_both_orders(&1, &2, Ord::cmp), 0.0);
        assert_eq!(in_both_orders(&2, &1, Ord::cmp), 1.0);
        assert_eq!(in_both_orders(&1, &1, Ord::cmp), 0.5);
    }

    #[test]
    fn the_higher_reward_is_preferred_and_equal_ones_tie() {
        assert_eq!((by_reward(0.5, -1.0), by_reward(-1.0, 0.5), by_reward(2.0, 2.0)), (1.0, 0.0, 0.5));
    }
}
