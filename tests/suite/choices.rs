//! Multiple choice, recognition and perplexity against transformers, on the embedded world's base model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, Int64Array, StringArray, StructArray};
use arrow::datatypes::Field;
use rlhf::data::parquet;
use serde_json::Value;

use crate::common::{lists, table};
use crate::workbench::Workbench;

/// A path in the project.
fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn strings(values: &Value) -> Vec<String> {
    values.as_array().unwrap().iter().map(|value| value.as_str().unwrap().to_string()).collect()
}

/// A column of {choices, labels}.
fn targets(rows: &[(Vec<String>, Vec<i64>)]) -> ArrayRef {
    let ends: Vec<i32> = rows
        .iter()
        .scan(0, |end, row| {
            *end += row.0.len() as i32;
            Some(*end)
        })
        .collect();
    let choices: ArrayRef = Arc::new(StringArray::from_iter_values(rows.iter().flat_map(|row| &row.0)));
    let labels: ArrayRef = Arc::new(Int64Array::from_iter_values(rows.iter().flat_map(|row| row.1.iter().copied())));
    let columns = [("choices", lists(choices, &ends)), ("labels", lists(labels, &ends))];
    let field =
        |(name, column): (&str, ArrayRef)| (Arc::new(Field::new(name, column.data_type().clone(), true)), column);
    Arc::new(StructArray::from(columns.map(field).to_vec()))
}

#[test]
fn multiple_choice_and_recognition_are_those_of_transformers() {
    let expected: Value =
        serde_json::from_slice(&std::fs::read(path("tests/golden/choices/expected.json")).unwrap()).unwrap();
    let bench = Workbench::new();
    let questions = expected["questions"].as_array().unwrap();
    // The single true answer of MC1 is the first.
    let single = |question: &Value| {
        let answers: Vec<String> =
            strings(&question["true"]).into_iter().take(1).chain(strings(&question["false"])).collect();
        let labels = (0..answers.len()).map(|index| i64::from(index == 0)).collect();
        (answers, labels)
    };
    let multiple = |question: &Value| {
        let (right, wrong) = (strings(&question["true"]), strings(&question["false"]));
        let labels = right.iter().map(|_| 1).chain(wrong.iter().map(|_| 0)).collect();
        (right.into_iter().chain(wrong).collect(), labels)
    };
    let text = |rows: &[Value], key: &str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(|row| row[key].as_str().unwrap())))
    };
    let columns = vec![
        ("question", text(questions, "question")),
        ("mc1_targets", targets(&questions.iter().map(single).collect::<Vec<_>>())),
        ("mc2_targets", targets(&questions.iter().map(multiple).collect::<Vec<_>>())),
    ];
    parquet::write(bench.path("choices.parquet"), &table(columns)).unwrap();
    let shown = expected["recognition"].as_array().unwrap();
    let columns = ["knowledge", "question", "response", "hallucination"].map(|key| (key, text(shown, key)));
    parquet::write(bench.path("shown.parquet"), &table(columns.to_vec())).unwrap();
    let base = path("data/base").display().to_string();
    bench.succeed(&format!(
        "evaluate --models base={base} --multiple-choice choices.parquet --recognition shown.parquet --output report --quiet"
    ));
    let report: Value = serde_json::from_slice(&bench.bytes("report/evaluation.json")).unwrap();
    let mean = |rows: &[Value], of: &dyn Fn(&Value) -> f64| rows.iter().map(of).sum::<f64>() / rows.len() as f64;
    let log_probs = report["multiple_choice"]["base"]["log_probs"].as_array().unwrap();
    for (question, log_probs) in questions.iter().zip(log_probs) {
        // Those of MC1 come first: the single true answer and the false ones.
        let (found, false_answers) = (log_probs.as_array().unwrap(), question["false"].as_array().unwrap().len());
        let expected = question["log_probs"].as_array().unwrap();
        assert_eq!(found.len(), 1 + false_answers + expected.len());
        for (found, expected) in found[1 + false_answers..].iter().zip(expected) {
            let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
            assert!((found - expected).abs() < 1e-5 * expected.abs(), "{found} is not {expected}");
        }
    }
    for measure in ["mc1", "mc2"] {
        let found = report["multiple_choice"]["base"][measure]["value"].as_f64().unwrap();
        let expected = mean(questions, &|question| question[measure].as_f64().unwrap());
        assert!((found - expected).abs() < 1e-4, "{measure}: {found} is not {expected}");
    }
    let found = report["recognition"]["base"]["log_odds"].as_array().unwrap();
    for (found, shown) in found.iter().zip(shown) {
        let (found, expected) = (found.as_f64().unwrap(), shown["log_odds"].as_f64().unwrap());
        assert!((found - expected).abs() < 1e-4, "{found} is not {expected}");
    }
    assert_eq!(found.len(), shown.len());
}

#[test]
fn perplexity_is_the_exponential_of_the_loss_of_transformers() {
    let expected: Value =
        serde_json::from_slice(&std::fs::read(path("tests/golden/perplexity/expected.json")).unwrap()).unwrap();
    let texts = expected["texts"].as_array().unwrap();
    let text = |key: &str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(texts.iter().map(|row| row[key].as_str().unwrap())))
    };
    let bench = Workbench::new();
    let columns = ["prompt", "completion"].map(|key| (key, text(key)));
    parquet::write(bench.path("held_out.parquet"), &table(columns.to_vec())).unwrap();
    let base = path("data/base").display().to_string();
    bench.succeed(&format!(
        "evaluate --models base={base} --perplexity held_out.parquet --max-length {} --output report --quiet",
        expected["max_length"]
    ));
    let report: Value = serde_json::from_slice(&bench.bytes("report/evaluation.json")).unwrap();
    let found = &report["perplexity"]["base"];
    for measure in ["nats_per_token", "perplexity", "bits_per_byte"] {
        let (found, expected) = (found[measure]["value"].as_f64().unwrap(), expected[measure].as_f64().unwrap());
        assert!((found - expected).abs() < 1e-4 * expected, "{measure}: {found} is not {expected}");
    }
    for (found, text) in found["nats"].as_array().unwrap().iter().zip(texts) {
        let expected = text["loss"].as_f64().unwrap() * text["tokens"].as_f64().unwrap();
        let found = found.as_f64().unwrap();
        assert!((found - expected).abs() < 1e-4 * expected, "{found} is not {expected}");
    }
    let sum = |key: &str| texts.iter().map(|text| text[key].as_u64().unwrap()).sum::<u64>();
    let counts = ["tokens", "bytes", "tokens_left_out"].map(|key| found[key].as_u64().unwrap());
    assert_eq!(counts, [sum("tokens"), sum("bytes"), sum("left_out")]);
    let told = String::from_utf8(bench.bytes("report/report.md")).unwrap();
    assert!(told.contains("1 texts count with their beginning alone, 22 tokens of their ends"), "{told}");
}
