//! How well scores agree with rankings: accuracy, calibration, and what length alone would say.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::data::pairs::Pair;

/// One pair of answers, as the model and the labellers see it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JudgedPair {
    /// The score of the better answer less that of the worse.
    pub difference: f64,
    /// The length of the better answer less that of the worse, in tokens.
    pub longer: f64,
    /// By how many ranks they differ.
    pub distance: i64,
    /// The share of labellers who agree with the order, where the data says so.
    pub agreement: Option<f32>,
}

/// 1 where the better answer has the larger number, 1/2 where they are equal, 0 otherwise; NaN of a difference that is none.
fn worth(difference: f64) -> f64 {
    match difference.partial_cmp(&0.0) {
        None => f64::NAN,
        Some(Ordering::Equal) => 0.5,
        Some(order) => f64::from(u8::from(order == Ordering::Greater)),
    }
}

impl JudgedPair {
    /// Whether the model is right: 1, 1/2 or 0.
    pub fn right(&self) -> f64 {
        worth(self.difference)
    }

    /// Whether "the longer answer wins" is right.
    pub fn longer_wins(&self) -> f64 {
        worth(self.longer)
    }
}

/// The pairs of one prompt.
pub fn judged_pairs<'a>(
    scores: &'a [f32],
    lengths: &'a [usize],
    pairs: &'a [Pair],
    agreement: Option<f32>,
) -> impl Iterator<Item = JudgedPair> + 'a {
    pairs.iter().map(move |pair| JudgedPair {
        difference: f64::from(scores[pair.better]) - f64::from(scores[pair.worse]),
        longer: lengths[pair.better] as f64 - lengths[pair.worse] as f64,
        distance: pair.distance,
        agreement,
    })
}

/// How many pairs of a kind were judged right.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Accuracy {
    /// Pairs.
    pub pairs: usize,
    /// The share that the model judges right.
    pub accuracy: f64,
    /// The share that "the longer answer wins" judges right.
    pub longer_wins: f64,
}

/// The accuracy over some pairs.
pub fn accuracy<'a>(pairs: impl IntoIterator<Item = &'a JudgedPair>) -> Accuracy {
    let mut sums = Accuracy::default();
    for pair in pairs {
        sums.pairs += 1;
        sums.accuracy += pair.right();
        sums.longer_wins += pair.longer_wins();
    }
    let count = sums.pairs.max(1) as f64;
    Accuracy { pairs: sums.pairs, accuracy: sums.accuracy / count, longer_wins: sums.longer_wins / count }
}

/// The accuracy of each group of pairs that have the same key.
pub fn accuracy_by<K: Ord>(judged: &[JudgedPair], key: impl Fn(&JudgedPair) -> Option<K>) -> Vec<(K, Accuracy)> {
    let mut groups: BTreeMap<K, Vec<&JudgedPair>> = BTreeMap::new();
    for pair in judged {
        if let Some(key) = key(pair) {
            groups.entry(key).or_default().push(pair);
        }
    }
    groups.into_iter().map(|(key, pairs)| (key, accuracy(pairs))).collect()
}

/// The accuracy in each quarter of the pairs, by how far apart the model's scores are: the upper bound of each quarter.
pub fn accuracy_by_margin(judged: &[JudgedPair]) -> Vec<(f64, Accuracy)> {
    let mut sorted: Vec<&JudgedPair> = judged.iter().collect();
    sorted.sort_by(|a, b| a.difference.abs().total_cmp(&b.difference.abs()));
    let quarter = sorted.len().div_ceil(4).max(1);
    let bound = |part: &[&JudgedPair]| part.last().map_or(0.0, |pair| pair.difference.abs());
    sorted.chunks(quarter).map(|part| (bound(part), accuracy(part.iter().copied()))).collect()
}

/// Predicted and observed win rates, of the answer that the model prefers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CalibrationBin {
    /// Pairs.
    pub pairs: usize,
    /// Mean of `σ(|r_1 - r_2|)`.
    pub predicted: f64,
    /// The share of them in which the labellers prefer it too.
    pub observed: f64,
}

/// Ten bins of equal width of the predicted win rate, from 1/2 to 1; those without pairs are left out.
pub fn calibration(judged: &[JudgedPair]) -> Vec<CalibrationBin> {
    const BINS: usize = 10;
    let mut sums = vec![(0, 0.0, 0.0); BINS];
    for pair in judged {
        let predicted = 1.0 / (1.0 + (-pair.difference.abs()).exp());
        let bin = (((predicted - 0.5) * 2.0 * BINS as f64) as usize).min(BINS - 1);
        sums[bin].0 += 1;
        sums[bin].1 += predicted;
        sums[bin].2 += pair.right();
    }
    let bins = sums.into_iter().filter(|(pairs, ..)| *pairs > 0);
    bins.map(|(pairs, predicted, observed)| {
        let count = pairs as f64;
        CalibrationBin { pairs, predicted: predicted / count, observed: observed / count }
    })
    .collect()
}

/// The expected calibration error: the mean over pairs of how far a bin's observed win rate is from its predicted one (Guo et al. 2017).
pub fn calibration_error(bins: &[CalibrationBin]) -> f64 {
    let count: usize = bins.iter().map(|bin| bin.pairs).sum();
    let error = |bin: &CalibrationBin| bin.pairs as f64 * (bin.predicted - bin.observed).abs();
    bins.iter().map(error).sum::<f64>() / count.max(1) as f64
}

/// Pearson's correlation; 0 where one of the two does not vary, NaN where a number is none.
pub fn correlation(pairs: &[(f64, f64)]) -> f64 {
    let count = pairs.len().max(1) as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|pair| pair.0), mean(|pair| pair.1));
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for pair in pairs {
        xx += (pair.0 - x).powi(2);
        yy += (pair.1 - y).powi(2);
        xy += (pair.0 - x) * (pair.1 - y);
    }
    if xx == 0.0 || yy == 0.0 { xy } else { xy / (xx * yy).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::pairs::pairs;

    fn pair(difference: f64, distance: i64) -> JudgedPair {
        JudgedPair { difference, longer: -difference, distance, agreement: (distance > 1).then_some(0.75) }
    }

    #[test]
    fn equal_scores_count_half_and_groups_add_up() {
        let scores = [0.1, 0.7, 0.9];
        let judged: Vec<JudgedPair> = judged_pairs(&scores, &[3, 3, 9], &pairs(&[1, 0, 1]), None).collect();
        assert_eq!(accuracy(&judged), Accuracy { pairs: 2, accuracy: 0.5, longer_wins: 0.25 });
        let judged = [pair(1.0, 1), pair(0.0, 1), pair(-2.0, 2), pair(3.0, 2), pair(4.0, 2)];
        let by_distance = accuracy_by(&judged, |pair| Some(pair.distance));
        assert_eq!((by_distance[0].1.accuracy, by_distance[1].1.pairs), (0.75, 3));
        assert_eq!(accuracy_by(&judged, |pair| pair.agreement.map(|share| (share * 100.0) as i64)).len(), 1);
        let by_margin = accuracy_by_margin(&judged);
        assert_eq!(by_margin.iter().map(|(_, of)| of.pairs).collect::<Vec<_>>(), [2, 2, 1]);
        assert_eq!((by_margin[0].0, by_margin[1].1.accuracy), (1.0, 0.5));
    }

    #[test]
    fn a_model_that_is_right_as_often_as_it_says_is_calibrated() {
        // σ(ln 4) = 0.8: four right of five.
        let judged: Vec<JudgedPair> =
            (0..5).map(|index| pair(if index < 4 { 4f64.ln() } else { -4f64.ln() }, 1)).collect();
        let bins = calibration(&judged);
        assert!(bins.len() == 1 && bins[0].pairs == 5 && calibration_error(&bins) < 1e-12, "{bins:?}");
        let sure: Vec<JudgedPair> = (0..2).map(|index| pair(if index < 1 { 50.0 } else { -50.0 }, 1)).collect();
        assert!((calibration_error(&calibration(&sure)) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn correlation_is_pearsons() {
        assert!((correlation(&[(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]) - 1.0).abs() < 1e-12);
        assert!((correlation(&[(1.0, 1.0), (2.0, -1.0), (3.0, 0.0)]) + 0.5).abs() < 1e-12);
        assert_eq!(correlation(&[(1.0, 1.0), (1.0, 2.0)]), 0.0);
        assert!(correlation(&[(1.0, f64::NAN), (1.0, 2.0)]).is_nan());
    }

    #[test]
    fn a_score_that_is_no_number_is_neither_right_nor_wrong() {
        assert!(accuracy(&[pair(1.0, 1), pair(f64::NAN, 1)]).accuracy.is_nan());
    }
}
