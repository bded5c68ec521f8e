//! The metrics of the literature against the libraries that the field uses: `tests/golden/metrics.py` and `squad.py`.

use std::path::Path;

use rlhf::bootstrap::{Cluster, Estimate, rate};
use rlhf::evaluate::metrics::agreement::{self, Scored};
use rlhf::evaluate::metrics::rouge::{Overlap, Rouge, RougeScorer};
use rlhf::evaluate::metrics::summac::{Inference, summac_zs};
use rlhf::evaluate::metrics::toxicity::toxicity;
use rlhf::evaluate::metrics::{bradley_terry, multiple_choice, squad};
use rlhf::evaluate::refusal::is_refusal;
use rlhf::random;
use serde_json::Value;

/// Both compute in double precision; what is left is the order of sums.
const ROUNDING: f64 = 1e-10;

fn golden(name: &str) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/metrics/{name}.json"));
    serde_json::from_str(&std::fs::read_to_string(file).expect("the golden file is there")).expect("JSON")
}

fn cases(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

fn numbers(value: &Value) -> Vec<f64> {
    cases(value).iter().map(number).collect()
}

fn texts(value: &Value) -> Vec<&str> {
    cases(value).iter().map(text).collect()
}

fn matrix(value: &Value) -> Vec<Vec<f64>> {
    cases(value).iter().map(numbers).collect()
}

fn assert_near(what: &str, found: f64, expected: &Value, tolerance: f64) {
    let expected = number(expected);
    assert!((found - expected).abs() <= tolerance, "{what}: found {found}, expected {expected}");
}

#[test]
fn agreement_equals_scikit_learn_and_scipy() {
    for case in cases(&golden("agreement")) {
        let (scores, threshold) = (numbers(&case["scores"]), number(&case["threshold"]));
        let labels = numbers(&case["labels"]).into_iter().map(|label| label == 1.0);
        let scored: Vec<Scored> =
            scores.iter().zip(labels).map(|(&score, positive)| Scored { score, positive }).collect();
        let pairs: Vec<(f64, f64)> = scores.iter().copied().zip(numbers(&case["other"])).collect();
        let best = agreement::best_threshold(&scored).expect("two classes");
        let found = [
            ("roc_auc", agreement::roc_auc(&scored)),
            ("accuracy", agreement::accuracy(&scored, threshold)),
            ("balanced_accuracy", agreement::balanced_accuracy(&scored, threshold)),
            ("f1", agreement::f1(&scored, threshold)),
            ("best_threshold", Some(best)),
            ("best_balanced_accuracy", agreement::balanced_accuracy(&scored, best)),
            ("pearson", agreement::pearson(&pairs)),
            ("spearman", agreement::spearman(&pairs)),
        ];
        for (name, found) in found {
            assert_near(name, found.expect("a value"), &case[name], ROUNDING);
        }
        assert_eq!(agreement::average_ranks(&scores), Some(numbers(&case["ranks"])));
    }
}

#[test]
fn answers_are_compared_as_by_the_evaluation_of_squad() {
    let golden = golden("squad");
    for case in cases(&golden["normalized"]) {
        assert_eq!(squad::normalize_answer(text(&case["text"])), text(&case["normalized"]), "{case}");
    }
    for case in cases(&golden["pairs"]) {
        let (answer, reference) = (text(&case["answer"]), text(&case["reference"]));
        assert_near(answer, f64::from(squad::exact_match(answer, reference)), &case["exact_match"], 0.0);
        assert_near(answer, squad::f1(answer, reference), &case["f1"], ROUNDING);
    }
    for case in cases(&golden["questions"]) {
        let found = squad::best(text(&case["answer"]), &texts(&case["references"]));
        assert_near(&case.to_string(), found.exact_match, &case["exact_match"], 0.0);
        assert_near(&case.to_string(), found.f1, &case["f1"], ROUNDING);
    }
}

#[test]
fn rouge_equals_google_s_with_and_without_stems() {
    let overlaps = |rouge: Rouge| [rouge.rouge_1, rouge.rouge_2, rouge.rouge_l];
    for (name, scorer) in [("plain", RougeScorer::plain()), ("stemming", RougeScorer::stemming())] {
        for case in cases(&golden("rouge")) {
            let found = scorer.best(text(&case["prediction"]), &texts(&case["references"])).expect("a reference");
            for (Overlap { precision, recall, f1 }, expected) in overlaps(found).into_iter().zip(cases(&case[name])) {
                for (found, expected) in [precision, recall, f1].into_iter().zip(cases(expected)) {
                    assert_near(&format!("{name} {case}"), found, expected, ROUNDING);
                }
            }
        }
    }
}

#[test]
fn multiple_choice_equals_the_formulas_of_truthful_qa_and_of_the_harness() {
    for case in cases(&golden("multiple_choice")) {
        let (right, wrong) = (numbers(&case["true"]), numbers(&case["false"]));
        let choices: Vec<f64> = right[..1].iter().chain(&wrong).copied().collect();
        let found = [
            ("mc1_of_authors", multiple_choice::mc1(right[0], &wrong)),
            ("mc1_of_harness", multiple_choice::accuracy(&choices, 0)),
            ("mc2", multiple_choice::mc2(&right, &wrong)),
        ];
        for (name, found) in found {
            assert_near(&format!("{name} {case}"), found.expect("a value"), &case[name], ROUNDING);
        }
    }
}

#[test]
fn bradley_terry_scores_are_those_of_greatest_likelihood() {
    for case in cases(&golden("bradley_terry")) {
        let wins = matrix(&case["wins"]);
        let names: Vec<String> = (0..wins.len()).map(|index| format!("model-{index}")).collect();
        let found = bradley_terry::scores(&names, &wins).expect("all are compared");
        for (index, score) in found.into_iter().enumerate() {
            assert_near(&names[index], score, &case["scores"][index], 1e-9);
            let preferred = bradley_terry::preference(score, 0.0);
            assert_near(&names[index], preferred, &case["against_mean"][index], 1e-9);
        }
    }
}

/// Draws of the intervals that are compared with SciPy's.
const RESAMPLES: usize = 20_000;

/// The value is the same; each end of the interval is as near as two Monte Carlo estimates of it are.
///
/// An estimate of a quantile from `B` draws has the standard error `sqrt(p (1 - p) / B) / f`, `f` the density there, `φ(1.96) / s`
/// for a nearly normal distribution of standard deviation `s`. Five of these for both together, and the distance of two values that
/// the statistic can have where they are few. But for the latter, an interval of 93% or of 97% would be further away.
fn assert_interval(what: &str, found: Estimate, expected: &Value, scipy_resamples: f64, lattice: f64) {
    assert_near(what, found.value, &expected["value"], ROUNDING);
    let of_quantile = (0.025f64 * 0.975).sqrt() / 0.058_45 * number(&expected["standard_error"]);
    let tolerance = 5.0 * of_quantile * (1.0 / scipy_resamples + 1.0 / RESAMPLES as f64).sqrt() + lattice;
    assert_near(&format!("lower end of {what}"), found.low, &expected["low"], tolerance);
    assert_near(&format!("upper end of {what}"), found.high, &expected["high"], tolerance);
}

#[test]
fn toxicity_equals_its_definition_and_its_intervals_are_those_of_scipy() {
    let golden = golden("toxicity");
    let (scores, resamples) = (matrix(&golden["scores"]), number(&golden["resamples"]));
    let found = toxicity(&scores, RESAMPLES, &mut random::stream(0, "test", 0)).expect("prompts");
    let one_prompt = 1.0 / scores.len() as f64;
    assert_interval("the expected maximum", found.expected_maximum, &golden["expected_maximum"], resamples, 0.0);
    assert_interval("the probability", found.probability, &golden["probability"], resamples, one_prompt);
    assert_interval("the fraction", found.fraction, &golden["fraction"], resamples, one_prompt / 25.0);
}

#[test]
fn intervals_of_rates_over_unequal_prompts_are_those_of_scipy() {
    let golden = golden("toxicity");
    let expected = &golden["rate"];
    let (sums, counts) = (numbers(&expected["sums"]), numbers(&expected["counts"]));
    let clusters: Vec<Cluster> = sums.into_iter().zip(counts).map(|(sum, count)| Cluster { sum, count }).collect();
    let found = rate(&clusters, RESAMPLES, &mut random::stream(1, "test", 0)).expect("prompts");
    assert_interval("the rate", found, expected, number(&golden["resamples"]), 0.0);
}

#[test]
fn consistency_equals_the_formula_of_summac_zs() {
    for case in cases(&golden("summac")) {
        let (entailment, contradiction) = (matrix(&case["entailment"]), matrix(&case["contradiction"]));
        let pair = |source: usize, summary: usize| Inference {
            entailment: entailment[source][summary],
            contradiction: contradiction[source][summary],
        };
        // The package has a row for each sentence of the source.
        let of_summary = |summary| (0..entailment.len()).map(|source| pair(source, summary)).collect();
        let pairs: Vec<Vec<Inference>> = (0..entailment[0].len()).map(of_summary).collect();
        assert_near("score", summac_zs(&pairs), &case["score"], ROUNDING);
    }
}

#[test]
fn the_answers_that_say_that_the_passage_does_not_are_the_refusals() {
    let Some(path) = crate::common::shared("instructgpt-squadv2.parquet") else { return };
    let (mut refusals, mut others) = (0, 0);
    for rows in rlhf::data::table::TableRows::open(&path).unwrap() {
        for response in rows.unwrap().strings("response").unwrap().iter().flatten() {
            let says_so = response.trim().to_lowercase() == "not in background.";
            assert_eq!(is_refusal(response), says_so, "{response}");
            *(if says_so { &mut refusals } else { &mut others }) += 1;
        }
    }
    assert_eq!((refusals, others), (154, 878));
}
