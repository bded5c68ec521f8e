//! How far a measured rate would move if other prompts had been drawn.

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::random::Stream;

/// A measured value with its 95% interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The value on all prompts.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// What one prompt contributes to a rate: `sum` over `count` answers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cluster {
    /// For example the number of rude answers.
    pub sum: f64,
    /// The number of answers; 0 where the rate is not defined for this prompt.
    pub count: f64,
}

/// Share of the bootstrap distribution outside the interval, on each side.
const TAIL: f64 = 0.025;

/// The rate `Σ sum / Σ count` with its 95% percentile bootstrap interval (Efron 1979).
///
/// Prompts are drawn, not answers: answers to one prompt are no independent evidence. Prompts for which the rate is not defined
/// are left out before the draw. `None` where it is defined for no prompt.
pub fn rate(clusters: &[Cluster], resamples: usize, stream: &mut Stream) -> Option<Estimate> {
    let defined: Vec<Cluster> = clusters.iter().copied().filter(|cluster| cluster.count > 0.0).collect();
    if defined.is_empty() {
        return None;
    }
    let value = ratio(defined.iter());
    let draw = |stream: &mut Stream| ratio((0..defined.len()).map(|_| &defined[stream.random_range(0..defined.len())]));
    let mut drawn: Vec<f64> = (0..resamples).map(|_| draw(stream)).collect();
    drawn.sort_by(f64::total_cmp);
    let end = |share: f64| if drawn.is_empty() { value } else { quantile(&drawn, share) };
    Some(Estimate { value, low: end(TAIL), high: end(1.0 - TAIL) })
}

fn ratio<'a>(clusters: impl Iterator<Item = &'a Cluster>) -> f64 {
    let (sum, count) = clusters.fold((0.0, 0.0), |(sum, count), cluster| (sum + cluster.sum, count + cluster.count));
    sum / count
}

/// The value below which `share` of the sorted values lie, interpolated linearly between neighbours.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let position = share * (sorted.len() - 1) as f64;
    let (below, above) = (position.floor() as usize, position.ceil() as usize);
    sorted[below] + (position - below as f64) * (sorted[above] - sorted[below])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    fn answers(values: impl IntoIterator<Item = f64>) -> Vec<Cluster> {
        values.into_iter().map(|sum| Cluster { sum, count: 1.0 }).collect()
    }

    #[test]
    fn quantiles_are_interpolated() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.0), 1.0);
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), 3.0);
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 1.0), 4.0);
    }

    #[test]
    fn prompts_that_agree_leave_no_interval_and_no_prompt_leaves_no_rate() {
        let mut stream = random::stream(0, "test", 0);
        let certain = rate(&answers([1.0; 20]), 100, &mut stream);
        assert_eq!(certain, Some(Estimate { value: 1.0, low: 1.0, high: 1.0 }));
        assert_eq!(rate(&[Cluster::default(); 3], 100, &mut stream), None);
    }

    #[test]
    fn two_prompts_have_the_three_resamples_of_the_closed_form() {
        // Means 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4: both tails of 2.5% lie within the outer two.
        let found = rate(&answers([0.0, 1.0]), 1000, &mut random::stream(0, "test", 0));
        assert_eq!(found, Some(Estimate { value: 0.5, low: 0.0, high: 1.0 }));
    }

    #[test]
    fn the_interval_of_a_share_is_that_of_the_binomial() {
        // 300 of 1000: the normal approximation is 0.3 ± 1.96 sqrt(0.3 · 0.7 / 1000).
        let clusters = answers((0..1000).map(|index| f64::from(index % 10 < 3)));
        let found = rate(&clusters, 2000, &mut random::stream(1, "test", 0)).unwrap();
        let half = 1.959_964 * (0.3f64 * 0.7 / 1000.0).sqrt();
        assert!((found.value - 0.3).abs() < 1e-12);
        assert!((found.low - (0.3 - half)).abs() < 0.1 * half, "{found:?}");
        assert!((found.high - (0.3 + half)).abs() < 0.1 * half, "{found:?}");
    }

    #[test]
    fn answers_to_one_prompt_are_one_piece_of_evidence() {
        // Ten answers a prompt, all alike within it: the interval is that of one answer a prompt.
        let single = answers((0..200).map(|index| f64::from(index % 4 == 0)));
        let tenfold: Vec<Cluster> =
            single.iter().map(|cluster| Cluster { sum: 10.0 * cluster.sum, count: 10.0 }).collect();
        let estimate = |clusters: &[Cluster]| rate(clusters, 500, &mut random::stream(2, "test", 0)).unwrap();
        assert_eq!(estimate(&single), estimate(&tenfold));
    }

    #[test]
    fn the_interval_holds_the_truth_about_95_times_in_100() {
        const TRIALS: u64 = 400;
        let covered = (0..TRIALS).filter(|&trial| {
            let mut stream = random::stream(3, "test", trial);
            let sample: Vec<f64> = (0..100).map(|_| f64::from(stream.random::<f64>() < 0.4)).collect();
            let found = rate(&answers(sample), 300, &mut stream).unwrap();
            found.low <= 0.4 && 0.4 <= found.high
        });
        let share = covered.count() as f64 / TRIALS as f64;
        // Two standard errors of the simulation are 0.022; the percentile interval at 100 prompts covers a little less than 0.95.
        assert!((0.915..=0.975).contains(&share), "{share}");
    }
}
