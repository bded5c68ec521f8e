//! How often a model's answer is preferred to the base model's.

use std::cmp::Ordering;
use std::path::Path;

use candle_core::Device;

use super::cuts::Cuts;
use super::judging::{Answer, ByModel};
use super::question::Question;
use crate::adapt::Bases;
use crate::data::schema::Prompt;
use crate::error::Result;
use crate::rewards::{Asked, Reply, RewardModel};
use crate::settings::CommonSettings;
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

/// The rewards of all answers. Those of all models to one question share its segment.
/// An answer that was cut off at its greatest length is scored as it is; one that ended, with the end-of-text token unless `as_is`.
pub(super) fn rewards(
    common: &CommonSettings,
    (folder, as_is): (&Path, bool),
    questions: &[Question],
    answers: &ByModel<Answer>,
    cuts: &mut Cuts,
) -> Result<ByModel<f64>> {
    let CommonSettings { max_length, tokens_per_batch, seed, .. } = *common;
    let model = RewardModel::load(folder, &mut Bases::of(common, Device::Cpu), max_length, seed)?;
    let mut model = model.reading_as_is(as_is);
    let prompt = |question: &Question| Prompt::new(question.prompt.clone(), question.origin.clone());
    let prompts: Vec<Prompt> = questions.iter().map(prompt).collect();
    let reply = |answer: &Answer| Reply { text: answer.text.clone(), ended: answer.ended.unwrap_or(true) };
    let replies: Vec<Vec<Reply>> = (0..questions.len())
        .map(|index| answers.iter().flat_map(|of_model| of_model[index].iter().map(reply)).collect())
        .collect();
    let asked: Vec<Asked> =
        prompts.iter().zip(&replies).map(|(prompt, replies)| Asked { prompt, tree: None, replies }).collect();
    let scores = model.score(&asked, tokens_per_batch)?;
    cuts.note_texts("the reward model", "answers", model.truncation(), max_length);
    let of_model = |(model, of_model): (usize, &Vec<Vec<Answer>>)| {
        let of_question = |(question, samples): (usize, &Vec<Answer>)| -> Vec<f64> {
            let before: usize = answers[..model].iter().map(|other| other[question].len()).sum();
            scores[question][before..before + samples.len()].iter().map(|&score| f64::from(score)).collect()
        };
        of_model.iter().enumerate().map(of_question).collect()
    };
    Ok(answers.iter().enumerate().map(of_model).collect())
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
