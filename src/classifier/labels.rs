//! What a `config.json` says of a classifier's labels.

use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::Result;
use crate::model::architecture::Config;
use crate::numbers::largest;

/// How the scores of labels become probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outputs {
    /// `exp(z_i) / Σ exp(z_j)`: a text has one of the labels.
    Softmax,
    /// `1 / (1 + exp(-z_i))`: a text has any number of them.
    Sigmoid,
}

impl Outputs {
    /// The probabilities of scores, `[labels]` each.
    pub fn probabilities(self, scores: &[f32]) -> Vec<f32> {
        let scores = scores.iter().map(|&score| f64::from(score));
        match self {
            Outputs::Sigmoid => scores.map(|score| (1.0 / (1.0 + (-score).exp())) as f32).collect(),
            Outputs::Softmax => {
                let largest = largest(scores.clone()).unwrap_or(0.0);
                let powers: Vec<f64> = scores.map(|score| (score - largest).exp()).collect();
                let sum: f64 = powers.iter().sum();
                powers.iter().map(|power| (power / sum) as f32).collect()
            }
        }
    }

    /// The logarithm of a label's odds, `log(p / (1 - p))`, by the scores, so that it does not end where `p` rounds to
    /// 0 or 1: `z_i`, or `z_i - log Σ_{j ≠ i} exp(z_j)`.
    pub fn log_odds(self, scores: &[f32], label: usize) -> f64 {
        let score = f64::from(scores[label]);
        let others = scores.iter().enumerate().filter(|&(other, _)| other != label);
        let others: Vec<f64> = others.map(|(_, &score)| f64::from(score)).collect();
        match (self, largest(others.iter().copied())) {
            (Outputs::Softmax, Some(largest)) => {
                score - largest - others.iter().map(|other| (other - largest).exp()).sum::<f64>().ln()
            }
            _ => score,
        }
    }
}

/// What `transformers` calls a label without a name.
pub(super) fn unnamed(index: usize) -> String {
    format!("LABEL_{index}")
}

/// The names of the `count` labels that the tensor `out.weight` has rows for: `id2label`, in the order of its numbers.
///
/// # Errors
/// Where the file says another number of labels, or leaves one out.
pub(super) fn labels(config: &Config, count: usize, out: &str) -> Result<Vec<String>> {
    let disagree = |field: &str, named: usize| {
        crate::Error::input(format!(
            "{}: \"{field}\" says {named} labels, but tensor \"{out}.weight\" has {count}; check that config.json belongs to these weights",
            config.file
        ))
    };
    let Some(names) = config.get("id2label") else {
        return match config.optional_size("num_labels")? {
            Some(named) if named != count => Err(disagree("num_labels", named)),
            _ => Ok((0..count).map(unnamed).collect()),
        };
    };
    let Some(names) = names.as_object() else {
        bail!("{}: field \"id2label\" is {names}, expected an object of numbers and names", config.file);
    };
    if names.len() != count {
        return Err(disagree("id2label", names.len()));
    }
    let name = |index: usize| match names.get(&index.to_string()).and_then(|name| name.as_str()) {
        Some(name) => Ok(name.to_string()),
        None => bail!(
            "{}: field \"id2label\" has no name for label {index}; expected names for the numbers 0 to {}",
            config.file,
            count - 1
        ),
    };
    (0..count).map(name).collect()
}

/// What the text-classification pipeline of `transformers` makes of scores: `problem_type` decides, or the number of labels where it is absent.
///
/// # Errors
/// For a regression, whose number is no probability.
pub(super) fn outputs(config: &Config, labels: usize) -> Result<Outputs> {
    match config.text("problem_type", "")? {
        "multi_label_classification" => Ok(Outputs::Sigmoid),
        "" | "single_label_classification" if labels == 1 => Ok(Outputs::Sigmoid),
        "" | "single_label_classification" => Ok(Outputs::Softmax),
        other => bail!(
            "{}: field \"problem_type\" is \"{other}\"; a classifier's is single_label_classification or multi_label_classification",
            config.file
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config(json: &Value) -> Config<'_> {
        Config::new(json, "config.json")
    }

    #[test]
    fn log_odds_go_on_where_probabilities_round_to_0_or_1() {
        let is = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
        is(Outputs::Softmax.log_odds(&[100.0, 0.0, 0.0], 0), 100.0 - 2f64.ln());
        is(Outputs::Softmax.log_odds(&[1.0, 3.5], 0), -2.5);
        is(Outputs::Sigmoid.log_odds(&[-50.0, 3.0], 0), -50.0);
        let odds = |p: f32| f64::from(p / (1.0 - p)).ln();
        let scores = [0.3, -1.2, 0.8];
        for outputs in [Outputs::Softmax, Outputs::Sigmoid] {
            for (label, &p) in outputs.probabilities(&scores).iter().enumerate() {
                assert!((outputs.log_odds(&scores, label) - odds(p)).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn labels_stand_in_the_order_of_their_numbers() {
        let json = json!({ "id2label": { "2": "c", "10": "k", "0": "a", "1": "b", "3": "d", "4": "e", "5": "f", "6": "g", "7": "h", "8": "i",
            "9": "j" } });
        assert_eq!(labels(&config(&json), 11, "classifier").unwrap().concat(), "abcdefghijk");
        assert_eq!(labels(&config(&json!({})), 2, "classifier").unwrap(), ["LABEL_0", "LABEL_1"]);
    }

    #[test]
    fn labels_that_are_not_the_heads_are_refused() {
        for (json, part) in [
            (
                json!({ "id2label": { "0": "a", "1": "b" } }),
                "\"id2label\" says 2 labels, but tensor \"classifier.weight\" has 3",
            ),
            (
                json!({ "id2label": { "0": "a", "1": "b", "3": "c" } }),
                "no name for label 2; expected names for the numbers 0 to 2",
            ),
            (json!({ "id2label": ["a", "b", "c"] }), "expected an object"),
            (json!({ "num_labels": 2 }), "\"num_labels\" says 2 labels"),
        ] {
            let error = labels(&config(&json), 3, "classifier").unwrap_err().to_string();
            assert!(error.starts_with("config.json: ") && error.contains(part), "{error}");
        }
    }

    #[test]
    fn probabilities_follow_the_problem_and_the_number_of_labels() {
        let of = |json: Value, count: usize| outputs(&config(&json), count);
        assert_eq!(of(json!({}), 1).unwrap(), Outputs::Sigmoid);
        assert_eq!(of(json!({}), 2).unwrap(), Outputs::Softmax);
        assert_eq!(of(json!({ "problem_type": null }), 3).unwrap(), Outputs::Softmax);
        assert_eq!(of(json!({ "problem_type": "single_label_classification" }), 3).unwrap(), Outputs::Softmax);
        assert_eq!(of(json!({ "problem_type": "multi_label_classification" }), 3).unwrap(), Outputs::Sigmoid);
        assert!(of(json!({ "problem_type": "regression" }), 1).unwrap_err().to_string().contains("\"regression\""));
        assert_eq!(Outputs::Softmax.probabilities(&[1000.0, 1000.0]), [0.5, 0.5]);
        assert_eq!(Outputs::Sigmoid.probabilities(&[0.0, -1000.0, 1000.0]), [0.5, 0.0, 1.0]);
    }
}
