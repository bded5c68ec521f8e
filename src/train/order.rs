//! Which examples an optimizer step sees.

use std::collections::BTreeSet;
use std::ops::Range;

use rand::RngCore;

use crate::random::{shuffle, stream};

/// The most rows that a share of the data sets aside for evaluation where the data are more than one window: as many say enough of a model, and
/// they are kept in memory and gone through at every evaluation.
pub const MOST_HELD_OUT: usize = 10_000;

/// How the examples of an epoch are cut into optimizer steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps {
    /// Examples of an epoch.
    pub examples: usize,
    /// Examples of a step, at least 1.
    pub batch_size: usize,
    /// Whether a last step that would be short is left out, unless there is no other.
    pub drops_rest: bool,
}

impl Steps {
    /// The number of steps in which every example is seen once; the last of them may be short, if it is not left out.
    pub fn per_epoch(&self) -> usize {
        let (whole, all) = (self.examples / self.batch_size, self.examples.div_ceil(self.batch_size));
        if self.drops_rest && whole > 0 { whole } else { all }
    }

    /// The number of steps of a run of `epochs`, which may be a fraction, and at most `max_steps`.
    pub fn total(&self, epochs: f64, max_steps: Option<usize>) -> usize {
        let steps = (epochs * self.per_epoch() as f64).ceil() as usize;
        steps.min(max_steps.unwrap_or(usize::MAX))
    }

    /// The epoch of optimizer step `step`, the first being 0, and the places in that epoch's order that it takes.
    pub fn places(&self, step: usize) -> (usize, Range<usize>) {
        let steps = self.per_epoch().max(1);
        let start = step % steps * self.batch_size;
        (step / steps, start..self.examples.min(start + self.batch_size))
    }
}

/// The order of the examples: each epoch is a permutation of its own, cut into optimizer steps.
///
/// A step's examples depend on the seed and the step alone, so that a run can start at any step.
#[derive(Debug, Clone)]
pub struct Order {
    examples: Vec<usize>,
    steps: Steps,
    seed: u64,
    /// The epoch whose permutation is at hand, and that permutation.
    epoch: Option<(usize, Vec<usize>)>,
}

impl Order {
    /// The order of `examples` (indices), `batch_size` of them a step.
    pub fn new(examples: Vec<usize>, batch_size: usize, seed: u64) -> Self {
        let steps = Steps { examples: examples.len(), batch_size: batch_size.max(1), drops_rest: false };
        Order { examples, steps, seed, epoch: None }
    }

    /// The same order, in which the last examples of an epoch that do not fill a step are left out of it, unless there is no other step.
    pub fn without_rest(self) -> Self {
        Order { steps: Steps { drops_rest: true, ..self.steps }, ..self }
    }

    /// The number of steps in which every example is seen once; the last of them may be short, if it is not left out.
    pub fn steps_per_epoch(&self) -> usize {
        self.steps.per_epoch()
    }

    /// The number of steps of a run of `epochs`, which may be a fraction, and at most `max_steps`.
    pub fn total_steps(&self, epochs: f64, max_steps: Option<usize>) -> usize {
        self.steps.total(epochs, max_steps)
    }

    /// The examples of optimizer step `step`, the first being 0.
    pub fn step(&mut self, step: usize) -> &[usize] {
        let (epoch, places) = self.steps.places(step);
        let permutation = match self.epoch.take() {
            Some((at_hand, permutation)) if at_hand == epoch => permutation,
            _ => {
                let mut examples = self.examples.clone();
                shuffle(&mut examples, &mut stream(self.seed, "order of examples", epoch as u64));
                examples
            }
        };
        let (_, permutation) = self.epoch.insert((epoch, permutation));
        &permutation[places]
    }
}

/// Sets aside a random `fraction` of `0..count` for evaluation: (training, evaluation), both ascending.
///
/// A fraction above 0 sets aside at least one example, but never the only one.
pub fn evaluation_split(count: usize, fraction: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let held_out = held_out_count(count, fraction);
    let mut examples: Vec<usize> = (0..count).collect();
    shuffle(&mut examples, &mut stream(seed, "evaluation split", 0));
    let mut training = examples.split_off(held_out);
    training.sort_unstable();
    examples.sort_unstable();
    (training, examples)
}

/// The rows, ascending, that are set aside for evaluation of so many that no list of all is made: as many as [`evaluation_split`] would, up to
/// [`MOST_HELD_OUT`].
pub fn held_out_rows(count: usize, fraction: f64, seed: u64) -> Vec<usize> {
    let wanted = held_out_count(count, fraction).min(MOST_HELD_OUT);
    let mut random = stream(seed, "evaluation split", 0);
    let mut chosen = BTreeSet::new();
    // Floyd's algorithm (Bentley & Floyd 1987): every set of `wanted` rows is equally likely.
    for last in count - wanted..count {
        let row = ((u128::from(random.next_u64()) * (last as u128 + 1)) >> 64) as usize;
        if !chosen.insert(row) {
            chosen.insert(last);
        }
    }
    chosen.into_iter().collect()
}

/// The number of examples that a fraction of them is: at least one if it is above 0, but never the only one.
fn held_out_count(count: usize, fraction: f64) -> usize {
    let wanted = (fraction * count as f64).round() as usize;
    wanted.max(usize::from(fraction > 0.0)).min(count.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(mut items: Vec<usize>) -> Vec<usize> {
        items.sort_unstable();
        items
    }

    #[test]
    fn a_rest_is_left_out_where_it_is_to_be_and_there_is_another_step() {
        let steps = |count: usize| {
            let mut order = Order::new((0..count).collect(), 4, 1).without_rest();
            let sizes = |order: &mut Order| (0..order.steps_per_epoch()).map(|step| order.step(step).len()).collect();
            let sizes: Vec<usize> = sizes(&mut order);
            sizes
        };
        assert_eq!((steps(9), steps(8), steps(3)), (vec![4, 4], vec![4, 4], vec![3]));
    }

    #[test]
    fn every_epoch_sees_every_example_once_in_an_order_of_its_own() {
        let examples: Vec<usize> = (100..123).collect();
        let mut order = Order::new(examples.clone(), 5, 7);
        assert_eq!(order.steps_per_epoch(), 5);
        let mut epoch =
            |first: usize| (first..first + 5).flat_map(|step| order.step(step).to_vec()).collect::<Vec<_>>();
        let (first, second) = (epoch(0), epoch(5));
        assert_eq!(sorted(first.clone()), examples);
        assert_eq!(sorted(second.clone()), examples);
        assert_ne!(first, second);
        assert_ne!(first, examples);
    }

    #[test]
    fn a_step_has_the_same_examples_wherever_the_run_starts() {
        let order = || Order::new((0..50).collect(), 8, 3);
        let mut whole = order();
        let steps: Vec<Vec<usize>> = (0..20).map(|step| whole.step(step).to_vec()).collect();
        assert_eq!(order().step(17), steps[17]);
        assert_eq!(whole.step(2), steps[2]);
        assert_ne!(Order::new((0..50).collect(), 8, 4).step(2), steps[2]);
    }

    #[test]
    fn the_run_has_as_many_steps_as_its_epochs_or_fewer() {
        let order = Order::new((0..10).collect(), 4, 0);
        assert_eq!(order.total_steps(2.0, None), 6);
        assert_eq!(order.total_steps(0.5, None), 2);
        assert_eq!(order.total_steps(2.0, Some(5)), 5);
        let mut empty = Order::new(Vec::new(), 4, 0);
        assert_eq!((empty.total_steps(3.0, None), empty.step(0).len()), (0, 0));
    }

    #[test]
    fn the_split_is_a_partition_of_the_wanted_size() {
        let (training, evaluation) = evaluation_split(200, 0.1, 5);
        assert_eq!(evaluation.len(), 20);
        assert_eq!(sorted([training.clone(), evaluation.clone()].concat()), (0..200).collect::<Vec<_>>());
        assert_ne!(evaluation, (0..20).collect::<Vec<_>>());
        assert_ne!(evaluation, evaluation_split(200, 0.1, 6).1);
        assert_eq!(evaluation_split(10, 0.01, 5).1.len(), 1);
        assert_eq!(evaluation_split(10, 0.0, 5).1.len(), 0);
        assert_eq!(evaluation_split(1, 0.5, 5), (vec![0], vec![]));
        assert_eq!(evaluation_split(0, 0.5, 5), (vec![], vec![]));
    }

    #[test]
    fn the_rows_held_out_of_many_are_as_many_as_of_few_up_to_a_limit() {
        let rows = held_out_rows(1000, 0.2, 5);
        assert_eq!((rows.len(), rows.is_sorted_by(|left, right| left < right)), (200, true));
        assert!(rows[199] < 1000 && rows[199] > 900 && rows[0] < 100, "{rows:?}");
        assert_ne!(rows, held_out_rows(1000, 0.2, 6));
        assert_eq!(held_out_rows(usize::MAX / 2, 0.05, 5).len(), MOST_HELD_OUT);
        assert_eq!((held_out_rows(10, 0.01, 5).len(), held_out_rows(10, 0.0, 5).len()), (1, 0));
        assert_eq!((held_out_rows(3, 0.9, 5).len(), held_out_rows(1, 0.5, 5).len()), (2, 0));
    }

    #[test]
    fn every_row_is_as_likely_to_be_held_out() {
        let mut counts = [0.0; 20];
        for seed in 0..4000 {
            held_out_rows(20, 0.25, seed).into_iter().for_each(|row| counts[row] += 1.0);
        }
        // 4000 draws at 1/4: a standard deviation of 27 about 1000.
        assert!(counts.iter().all(|count: &f64| (count - 1000.0).abs() < 110.0), "{counts:?}");
    }
}
