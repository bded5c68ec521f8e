//! How well a score agrees with labels (ROC AUC, accuracies, F1) or with another score (Pearson, Spearman).
//!
//! A case is called positive where its score is at least the threshold. Every function is `None` where its value is not defined, and
//! where a score is not a number.

/// A case with what a judge says of it and what it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// The judge's score: the higher, the more it holds the case for positive.
    pub score: f64,
    /// Whether the case is positive.
    pub positive: bool,
}

/// How many cases of each kind are called what, at one threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Confusion {
    true_positives: usize,
    false_positives: usize,
    positives: usize,
    negatives: usize,
}

impl Confusion {
    fn new(cases: &[Scored], threshold: f64) -> Option<Self> {
        if cases.iter().any(|case| case.score.is_nan()) || threshold.is_nan() {
            return None;
        }
        let count = |holds: &dyn Fn(&Scored) -> bool| cases.iter().filter(|case| holds(case)).count();
        Some(Confusion {
            true_positives: count(&|case| case.positive && case.score >= threshold),
            false_positives: count(&|case| !case.positive && case.score >= threshold),
            positives: count(&|case| case.positive),
            negatives: count(&|case| !case.positive),
        })
    }

    fn true_negatives(self) -> usize {
        self.negatives - self.false_positives
    }
}

/// The area under the ROC curve: the probability that a random positive case has a higher score than a random negative one, where a
/// tie counts one half.
///
/// It is the Mann-Whitney statistic over the number of pairs, `(R - p (p + 1) / 2) / (p n)`, with `R` the sum of the average ranks
/// of the `p` positive cases among all and `n` the number of negative ones (Hanley and McNeil 1982, section II). `None` unless there
/// are cases of both classes.
pub fn roc_auc(cases: &[Scored]) -> Option<f64> {
    let ranks = average_ranks(&cases.iter().map(|case| case.score).collect::<Vec<_>>())?;
    let positives = cases.iter().filter(|case| case.positive).count();
    let negatives = cases.len() - positives;
    if positives == 0 || negatives == 0 {
        return None;
    }
    let of_positives: f64 = cases.iter().zip(&ranks).filter(|(case, _)| case.positive).map(|(_, rank)| rank).sum();
    let (positives, negatives) = (positives as f64, negatives as f64);
    Some((of_positives - positives * (positives + 1.0) / 2.0) / (positives * negatives))
}

/// The share of cases that are called what they are. `None` without cases.
pub fn accuracy(cases: &[Scored], threshold: f64) -> Option<f64> {
    let counts = Confusion::new(cases, threshold)?;
    (!cases.is_empty()).then(|| (counts.true_positives + counts.true_negatives()) as f64 / cases.len() as f64)
}

/// The mean of the two classes' recalls, `(TP / P + TN / N) / 2`: 1/2 for any judge that does not look at the case (Brodersen et al.
/// 2010). `None` unless there are cases of both classes.
pub fn balanced_accuracy(cases: &[Scored], threshold: f64) -> Option<f64> {
    let counts = Confusion::new(cases, threshold)?;
    let recall = |found: usize, all: usize| (all > 0).then(|| found as f64 / all as f64);
    let of_positives = recall(counts.true_positives, counts.positives)?;
    Some((of_positives + recall(counts.true_negatives(), counts.negatives)?) / 2.0)
}

/// The harmonic mean of precision and recall of the positive class, `2 TP / (2 TP + FP + FN)` (van Rijsbergen 1979, chapter 7).
/// `None` where no case is positive and none is called so.
pub fn f1(cases: &[Scored], threshold: f64) -> Option<f64> {
    let counts = Confusion::new(cases, threshold)?;
    // TP + FN is all positives, so that the denominator is what is called positive and what is.
    let denominator = counts.true_positives + counts.false_positives + counts.positives;
    (denominator > 0).then(|| 2.0 * counts.true_positives as f64 / denominator as f64)
}

/// The threshold that maximises [`balanced_accuracy`] (equally Youden's J), the highest of the best, among the scores that occur.
///
/// Choose it on other cases than those on which the accuracy at it is reported: on its own cases it is optimistic, the more so the
/// fewer there are. `None` unless there are cases of both classes.
pub fn best_threshold(cases: &[Scored]) -> Option<f64> {
    let all = Confusion::new(cases, f64::INFINITY)?;
    if all.positives == 0 || all.negatives == 0 {
        return None;
    }
    let mut descending = cases.to_vec();
    descending.sort_by(|a, b| b.score.total_cmp(&a.score));
    let (mut true_positives, mut false_positives) = (0i128, 0i128);
    let mut best: Option<(i128, f64)> = None;
    for group in descending.chunk_by(|a, b| a.score == b.score) {
        let positives = group.iter().filter(|case| case.positive).count();
        true_positives += positives as i128;
        false_positives += (group.len() - positives) as i128;
        // TP / P - FP / N over their common denominator: whole numbers, so that equals are found to be equal.
        let difference = true_positives * all.negatives as i128 - false_positives * all.positives as i128;
        if best.is_none_or(|(highest, _)| difference > highest) {
            best = Some((difference, group[0].score));
        }
    }
    best.map(|(_, threshold)| threshold)
}

/// Pearson's correlation of pairs. `None` where a side is constant, holds no finite number or there are fewer than two pairs.
pub fn pearson(pairs: &[(f64, f64)]) -> Option<f64> {
    let first = pairs.first()?;
    // Deviations from a rounded mean need not be zero, so that a constant side is looked for by its values.
    if pairs.iter().all(|pair| pair.0 == first.0) || pairs.iter().all(|pair| pair.1 == first.1) {
        return None;
    }
    let count = pairs.len() as f64;
    let mean = |side: fn(&(f64, f64)) -> f64| pairs.iter().map(side).sum::<f64>() / count;
    let (mean_first, mean_second) = (mean(|pair| pair.0), mean(|pair| pair.1));
    let (mut products, mut first_squares, mut second_squares) = (0.0, 0.0, 0.0);
    for (first, second) in pairs {
        let (first, second) = (first - mean_first, second - mean_second);
        products += first * second;
        first_squares += first * first;
        second_squares += second * second;
    }
    let correlation = products / (first_squares.sqrt() * second_squares.sqrt());
    correlation.is_finite().then(|| correlation.clamp(-1.0, 1.0))
}

/// Spearman's rank correlation: [`pearson`] of the [`average_ranks`] of both sides (Spearman 1904). `None` as there; a score may be
/// infinite.
pub fn spearman(pairs: &[(f64, f64)]) -> Option<f64> {
    let first = average_ranks(&pairs.iter().map(|pair| pair.0).collect::<Vec<_>>())?;
    let second = average_ranks(&pairs.iter().map(|pair| pair.1).collect::<Vec<_>>())?;
    pearson(&first.into_iter().zip(second).collect::<Vec<_>>())
}

/// The rank of each value, the least 1; equal values share the mean of the ranks that they take. `None` where a value is not a
/// number.
pub fn average_ranks(values: &[f64]) -> Option<Vec<f64>> {
    if values.iter().any(|value| value.is_nan()) {
        return None;
    }
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut below = 0;
    for tied in order.chunk_by(|&a, &b| values[a] == values[b]) {
        for &index in tied {
            ranks[index] = below as f64 + (tied.len() + 1) as f64 / 2.0;
        }
        below += tied.len();
    }
    Some(ranks)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Few distinct scores, so that many are equal.
    fn cases() -> impl Strategy<Value = Vec<Scored>> {
        let case = (-4i32..5, any::<bool>());
        proptest::collection::vec(
            case.prop_map(|(score, positive)| Scored { score: f64::from(score) / 3.0, positive }),
            1..40,
        )
    }

    #[test]
    fn one_class_a_constant_side_and_what_is_no_number_have_no_value() {
        let one_class = [Scored { score: 0.1, positive: true }, Scored { score: 0.2, positive: true }];
        assert_eq!(roc_auc(&one_class), None);
        assert_eq!(balanced_accuracy(&one_class, 0.15), None);
        assert_eq!(best_threshold(&one_class), None);
        assert_eq!(accuracy(&one_class, 0.15), Some(0.5));
        assert_eq!((accuracy(&[], 0.0), roc_auc(&[]), f1(&[], 0.0), pearson(&[])), (None, None, None, None));
        assert_eq!(f1(&[Scored { score: 0.0, positive: false }], 1.0), None);
        let broken = [Scored { score: f64::NAN, positive: true }, Scored { score: 0.2, positive: false }];
        assert_eq!((roc_auc(&broken), accuracy(&broken, 0.1), best_threshold(&broken)), (None, None, None));
        assert_eq!(accuracy(&one_class, f64::NAN), None);
        // 0.1 three times has a mean that is not 0.1.
        let constant = [(0.1, 1.0), (0.1, 2.0), (0.1, 4.0)];
        assert_eq!((pearson(&constant), spearman(&constant)), (None, None));
        assert_eq!(pearson(&[(1.0, 2.0), (f64::INFINITY, 3.0)]), None);
        assert!((spearman(&[(1.0, 2.0), (f64::INFINITY, 3.0)]).unwrap() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn equal_zeros_of_either_sign_are_tied() {
        let cases = [Scored { score: 0.0, positive: true }, Scored { score: -0.0, positive: false }];
        assert_eq!(roc_auc(&cases), Some(0.5));
    }

    proptest! {
        #[test]
        fn the_area_is_the_share_of_pairs_in_order(cases in cases()) {
            let side = |positive| cases.iter().filter(move |case| case.positive == positive);
            let pairs: Vec<f64> = side(true).flat_map(|high| side(false).map(move |low| {
                if high.score == low.score { 0.5 } else { f64::from(high.score > low.score) }
            })).collect();
            match roc_auc(&cases) {
                Some(area) => prop_assert!((area - pairs.iter().sum::<f64>() / pairs.len() as f64).abs() < 1e-12),
                None => prop_assert!(pairs.is_empty()),
            }
        }

        #[test]
        fn reversed_scores_have_the_area_above_the_curve(cases in cases()) {
            let reversed: Vec<Scored> = cases.iter().map(|case| Scored { score: -case.score, ..*case }).collect();
            if let Some(area) = roc_auc(&cases) {
                prop_assert!((roc_auc(&reversed).unwrap() - (1.0 - area)).abs() < 1e-12);
            }
        }

        #[test]
        fn the_order_of_cases_does_not_matter(cases in cases(), turn in 0usize..40) {
            let mut turned = cases.clone();
            turned.rotate_left(turn % cases.len());
            prop_assert_eq!(roc_auc(&cases), roc_auc(&turned));
            prop_assert_eq!(best_threshold(&cases), best_threshold(&turned));
        }

        #[test]
        fn no_threshold_is_better_than_the_best(cases in cases()) {
            if let Some(best) = best_threshold(&cases) {
                let reached = balanced_accuracy(&cases, best).unwrap();
                for case in &cases {
                    let other = balanced_accuracy(&cases, case.score).unwrap();
                    prop_assert!(other <= reached + 1e-12);
                    prop_assert!(case.score <= best || other < reached - 1e-12);
                }
            }
        }

        #[test]
        fn a_rising_function_keeps_ranks_and_a_line_keeps_pearson(values in proptest::collection::vec(-3.0f64..3.0, 2..30)) {
            let curve: Vec<(f64, f64)> = values.iter().map(|&x| (x, x.exp())).collect();
            let falling: Vec<(f64, f64)> = values.iter().map(|&x| (x, 1.0 - 2.0 * x)).collect();
            if let Some(found) = spearman(&curve) {
                prop_assert!((found - 1.0).abs() < 1e-12);
                prop_assert!((pearson(&falling).unwrap() + 1.0).abs() < 1e-9);
            }
        }
    }
}
