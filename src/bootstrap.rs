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

impl Estimate {
    /// A share with its interval, in percent.
    pub fn percent(&self) -> String {
        let [value, low, high] = [self.value, self.low, self.high].map(|share| 100.0 * share);
        format!("{value:.1}% [{low:.1}, {high:.1}]")
    }
}

impl FromIterator<f64> for Cluster {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        values
            .into_iter()
            .fold(Cluster::default(), |cluster, value| Cluster { sum: cluster.sum + value, count: cluster.count + 1.0 })
    }
}

/// Draws of which intervals are made where nothing else is said.
pub const RESAMPLES: usize = 1000;

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
    statistic(defined.len(), resamples, stream, |drawn| Some(ratio(drawn.iter().map(|&index| defined[index]))))
}

/// By how much a rate differs from that of another model, with its 95% interval: the same prompts are drawn for both (a paired bootstrap), so that what makes a prompt hard for both does
/// not widen the interval. Prompts for which either is not defined are left out of both; `None` where no other is left.
pub fn change(of_model: &[Cluster], of_base: &[Cluster], resamples: usize, stream: &mut Stream) -> Option<Estimate> {
    let pairs: Vec<(Cluster, Cluster)> = (of_model.iter().copied().zip(of_base.iter().copied()))
        .filter(|(model, base)| model.count > 0.0 && base.count > 0.0)
        .collect();
    if pairs.is_empty() {
        return None;
    }
    statistic(pairs.len(), resamples, stream, |drawn| {
        let rate = |of: fn(&(Cluster, Cluster)) -> Cluster| ratio(drawn.iter().map(|&index| of(&pairs[index])));
        Some(rate(|pair| pair.0) - rate(|pair| pair.1))
    })
}

fn ratio(clusters: impl Iterator<Item = Cluster>) -> f64 {
    let add = |(sum, count), cluster: Cluster| (sum + cluster.sum, count + cluster.count);
    let (sum, count) = clusters.fold((0.0, 0.0), add);
    sum / count
}

/// Any statistic of `items` items, given the indices of those that are counted, with its 95% percentile bootstrap interval. Draws for which it is not defined are left
/// out; `None` where it is not defined for all items.
pub fn statistic(
    items: usize,
    resamples: usize,
    stream: &mut Stream,
    of: impl Fn(&[usize]) -> Option<f64>,
) -> Option<Estimate> {
    statistics(items, resamples, stream, |drawn| Some(vec![of(drawn)?]))?.pop()
}

/// Several statistics of the same draws, as [`statistic`].
pub fn statistics(
    items: usize,
    resamples: usize,
    stream: &mut Stream,
    of: impl Fn(&[usize]) -> Option<Vec<f64>>,
) -> Option<Vec<Estimate>> {
    let mut indices: Vec<usize> = (0..items).collect();
    let values = of(&indices)?;
    let mut drawn: Vec<Vec<f64>> = vec![Vec::with_capacity(resamples); values.len()];
    for _ in 0..resamples {
        indices.iter_mut().for_each(|index| *index = stream.random_range(0..items));
        for (drawn, value) in drawn.iter_mut().zip(of(&indices).into_iter().flatten()) {
            drawn.push(value);
        }
    }
    Some(values.into_iter().zip(drawn).map(|(value, drawn)| estimate(value, drawn)).collect())
}

/// A value with the ends of its interval, given what it was in every draw.
fn estimate(value: f64, mut drawn: Vec<f64>) -> Estimate {
    drawn.sort_by(f64::total_cmp);
    let end = |share: f64| if drawn.is_empty() { value } else { quantile(&drawn, share) };
    Estimate { value, low: end(TAIL), high: end(1.0 - TAIL) }
}

/// The weighted mean of the groups' means, each over its own items, with its 95% percentile bootstrap interval: items are drawn within their group. Groups without items
/// are left out; `None` where there is no other.
pub fn mean_of_means(groups: &[(f64, &[f64])], resamples: usize, stream: &mut Stream) -> Option<Estimate> {
    let groups: Vec<(f64, &[f64])> = groups.iter().copied().filter(|(_, group)| !group.is_empty()).collect();
    if groups.is_empty() {
        return None;
    }
    let weights: f64 = groups.iter().map(|(weight, _)| weight).sum();
    let over_groups = |mean: &mut dyn FnMut(&[f64]) -> f64| {
        groups.iter().map(|(weight, group)| weight * mean(group)).sum::<f64>() / weights
    };
    let value = over_groups(&mut |group| group.iter().sum::<f64>() / group.len() as f64);
    let mut draw = || {
        over_groups(&mut |group| {
            (0..group.len()).map(|_| group[stream.random_range(0..group.len())]).sum::<f64>() / group.len() as f64
        })
    };
    let drawn = (0..resamples).map(|_| draw()).collect();
    Some(estimate(value, drawn))
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
    fn the_mean_of_means_counts_each_group_once_and_draws_within_it() {
        let (many, few) = (vec![1.0; 90], vec![0.0, 1.0]);
        let mean = |groups: &[(f64, &[f64])]| mean_of_means(groups, 500, &mut random::stream(0, "test", 0));
        let found = mean(&[(1.0, &many), (1.0, &few), (1.0, &[])]).unwrap();
        assert_eq!(found, Estimate { value: 0.75, low: 0.5, high: 1.0 });
        assert_eq!(mean(&[(3.0, &many), (1.0, &few)]).unwrap().value, 0.875);
        assert_eq!(mean(&[(1.0, &[])]), None);
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
    fn a_change_is_that_of_the_same_prompts() {
        let changed =
            |model: &[Cluster], base: &[Cluster]| change(model, base, 2000, &mut random::stream(4, "test", 0));
        let hard = answers((0..1000).map(|index| f64::from(index % 10) * 100.0));
        let shifted: Vec<Cluster> = hard.iter().map(|one| Cluster { sum: one.sum + 0.5, ..*one }).collect();
        // However different the prompts are, a model that is 1/2 above the base on each is so on every draw.
        assert_eq!(changed(&shifted, &hard), Some(Estimate { value: 0.5, low: 0.5, high: 0.5 }));
        // Of 400 prompts 100 turn bad and 40 turn good: the difference is 0.15, its variance (0.35 - 0.15²) / 400, however many were bad in both.
        let of = |bad: fn(usize) -> bool| answers((0..400).map(|index| f64::from(bad(index))));
        let (base, model) =
            (of(|index| !(40..200).contains(&index)), of(|index| (40..140).contains(&index) || index >= 200));
        let found = changed(&model, &base).unwrap();
        let half = 1.959_964 * ((0.35f64 - 0.15 * 0.15) / 400.0).sqrt();
        assert!((found.value - 0.15).abs() < 1e-12);
        assert!((found.low - (0.15 - half)).abs() < 0.1 * half, "{found:?}");
        assert!((found.high - (0.15 + half)).abs() < 0.1 * half, "{found:?}");
        // What only one of them answered is no pair.
        let nothing = vec![Cluster::default(); 2];
        assert_eq!(changed(&answers([1.0, 0.0]), &[answers([0.0])[0], nothing[0]]).unwrap().value, 1.0);
        assert_eq!(changed(&answers([1.0, 0.0]), &nothing), None);
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
