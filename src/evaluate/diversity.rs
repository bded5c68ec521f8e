//! Distinct-2: how varied the answers are (Li et al. 2016, "A Diversity-Promoting Objective Function", section 5).

use std::collections::HashMap;

use crate::bootstrap::Estimate;

/// Distinct bigrams of words as a share of all bigrams of words, over all answers together; words are what white space divides.
/// `groups` holds the answers to each prompt. `None` where no answer has two words.
///
/// The interval is the jackknife's, `±1.96` standard errors from leaving out one prompt at a time: a bootstrap sample
/// holds prompts twice, whose second copy adds no distinct bigram, so it would put the interval beside the value.
pub fn distinct_2<'a>(groups: impl IntoIterator<Item = impl IntoIterator<Item = &'a str>>) -> Option<Estimate> {
    let groups: Vec<Vec<(&str, &str)>> =
        groups.into_iter().map(|answers| answers.into_iter().flat_map(bigrams).collect()).collect();
    // For each bigram how often it occurs, and in which group if in one only.
    let mut occurrences: HashMap<(&str, &str), Option<usize>> = HashMap::new();
    for (group, bigrams) in groups.iter().enumerate() {
        for &bigram in bigrams {
            let only = occurrences.entry(bigram).or_insert(Some(group));
            *only = only.filter(|&other| other == group);
        }
    }
    let total: usize = groups.iter().map(Vec::len).sum();
    if total == 0 {
        return None;
    }
    let value = occurrences.len() as f64 / total as f64;
    let mut own = vec![0; groups.len()];
    occurrences.values().flatten().for_each(|&group| own[group] += 1);
    let without: Vec<f64> = (groups.iter().zip(&own))
        .filter(|(bigrams, _)| bigrams.len() < total)
        .map(|(bigrams, &own)| (occurrences.len() - own) as f64 / (total - bigrams.len()) as f64)
        .collect();
    let half = 1.959_964 * jackknife_standard_error(&without);
    Some(Estimate { value, low: (value - half).max(0.0), high: (value + half).min(1.0) })
}

fn bigrams(answer: &str) -> impl Iterator<Item = (&str, &str)> {
    answer.split_whitespace().zip(answer.split_whitespace().skip(1))
}

/// `sqrt((n - 1) / n Σ (θ_i - mean θ)²)` of the values with one prompt left out each (Efron & Tibshirani 1993, equation 11.5).
fn jackknife_standard_error(without: &[f64]) -> f64 {
    let n = without.len() as f64;
    if without.len() < 2 {
        return 0.0;
    }
    let mean = without.iter().sum::<f64>() / n;
    ((n - 1.0) / n * without.iter().map(|value| (value - mean).powi(2)).sum::<f64>()).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(groups: &[&[&str]]) -> Option<f64> {
        distinct_2(groups.iter().map(|answers| answers.iter().copied())).map(|estimate| estimate.value)
    }

    #[test]
    fn distinct_2_counts_each_bigram_once_over_all_answers() {
        // a-b, b-c, c-d and a-b, b-x: four distinct ones of five.
        assert_eq!(value(&[&["a b c d"], &["a b  x"]]), Some(0.8));
        assert_eq!(value(&[&["a b c d", "a b x"]]), Some(0.8));
        assert_eq!(value(&[&["a b"], &["b a"]]), Some(1.0));
        assert_eq!(value(&[&["yes"], &[""]]), None);
    }

    #[test]
    fn the_jackknife_of_a_mean_is_its_standard_error() {
        let sample = [1.0, 4.0, 2.0, 7.0, 3.0];
        let n = sample.len() as f64;
        let sum: f64 = sample.iter().sum();
        let without: Vec<f64> = sample.iter().map(|value| (sum - value) / (n - 1.0)).collect();
        let variance = sample.iter().map(|value| (value - sum / n).powi(2)).sum::<f64>() / (n - 1.0);
        assert!((jackknife_standard_error(&without) - (variance / n).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn the_interval_holds_the_value_and_is_wider_for_fewer_prompts() {
        let answers: Vec<String> =
            (0..400).map(|index| format!("{} keeps {} in the barn", index % 37, index % 11)).collect();
        let estimate = |count: usize| distinct_2(answers[..count].iter().map(|answer| [answer.as_str()])).unwrap();
        let (few, many) = (estimate(40), estimate(400));
        assert!(few.low < few.value && few.value < few.high);
        assert!(few.high - few.low > many.high - many.low);
    }
}
