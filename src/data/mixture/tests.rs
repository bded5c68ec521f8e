use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Int64Array, RecordBatch, StringArray};
use tempfile::TempDir;

use super::*;
use crate::data::parquet;
use crate::data::schema::Text;

/// Ten questions with answers, six rows of a published mixture, and the mixture's text.
fn folder(mixture: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let strings = |of: &dyn Fn(usize) -> String, count| -> ArrayRef {
        Arc::new(StringArray::from_iter_values((0..count).map(of)))
    };
    let write = |name: &str, columns: Vec<(&str, ArrayRef)>| {
        parquet::write(folder.path().join(name), &RecordBatch::try_from_iter(columns).unwrap()).unwrap();
    };
    let truth: ArrayRef = Arc::new(BooleanArray::from_iter((0..10).map(|row| Some(row % 2 == 0))));
    let number: ArrayRef = Arc::new(Int64Array::from_iter_values(0..10));
    let question = strings(&|row| format!("q{row}"), 10);
    write("boolq.parquet", vec![("question", question), ("answer", truth), ("number", number)]);
    let names = ["news_ask", "news_ask", "news_tell", "quiz_ask", "quiz_ask", "quiz_ask"];
    let (template, prompt) = (strings(&|row| names[row].to_string(), 6), strings(&|row| format!("p{row}"), 6));
    let completion = strings(&|row| format!("c{row}"), 6);
    write("t0.parquet", vec![("template", template), ("prompt", prompt), ("completion", completion)]);
    std::fs::write(folder.path().join("mixture.toml"), mixture).unwrap();
    folder
}

const BOOLQ: &str = "[[source]]\ndata = \"boolq.parquet\"\ntask = \"boolq\"\n
    [[source.template]]\nname = \"short\"\nprompt = \"{{ question }}?\"\ncompletion = \"{{ 'yes' if answer else 'no' }}\"\n
    [[source.template]]\nname = \"long\"\nprompt = \"Say: {{ question }} {{ number + 1 }}\"\ncompletion = \"{{ answer }}\"\n";
const T0: &str = "[[source]]\ndata = \"t0.parquet\"\ntask_column = \"template\"\ntemplate_column = \"template\"\ntasks = [\"news\", \"quiz\"]\n";

fn read_part(folder: &TempDir, part: Part, seed: u64) -> Result<Mixture> {
    read(folder.path().join("mixture.toml").to_str().unwrap(), part, seed)
}

fn shown(mixture: &Mixture) -> Vec<(String, String, String)> {
    let text = |text: &Text| match text {
        Text::Plain(text) => text.clone(),
        Text::Messages(_) => panic!("no messages here"),
    };
    let show = |example: &MixtureExample| {
        let Demonstration { prompt, completion, .. } = &example.demonstration;
        (example.task.clone(), prompt.as_ref().map(text).unwrap_or_default(), text(completion))
    };
    mixture.examples.iter().map(show).collect()
}

#[test]
fn a_task_gives_at_most_the_maximum_times_its_weight() {
    let weighted = BOOLQ.replace("task = \"boolq\"", "task = \"boolq\"\nweight = 2.5");
    let folder = folder(&format!("maximum = 2\n{weighted}{T0}"));
    let mixture = read_part(&folder, Part::Training, 0).unwrap();
    let expected = [("boolq", (5, 10)), ("news", (2, 3)), ("quiz", (2, 3))];
    assert_eq!(mixture.tasks, expected.map(|(task, count)| (task.to_string(), count)).into());
    assert_eq!(mixture.examples.len(), 9);
    assert_eq!(mixture, read_part(&folder, Part::Training, 0).unwrap());
    let other = read_part(&folder, Part::Training, 1).unwrap();
    assert_ne!(shown(&mixture), shown(&other));
}

#[test]
fn a_weight_above_one_repeats_examples() {
    let folder = folder(&BOOLQ.replace("task = \"boolq\"", "task = \"boolq\"\nweight = 2.5"));
    let mixture = read_part(&folder, Part::Training, 0).unwrap();
    let mut counts = BTreeMap::new();
    mixture.examples.iter().for_each(|example| *counts.entry(example.demonstration.origin.row).or_insert(0) += 1);
    assert_eq!((mixture.examples.len(), counts.len()), (25, 10));
    assert!(counts.values().all(|&count| count == 2 || count == 3));
}

#[test]
fn templates_see_the_columns_and_are_chosen_by_seed() {
    let folder = folder(&format!("templates_per_example = 2\n{BOOLQ}"));
    let both = read_part(&folder, Part::Training, 0).unwrap();
    let all: BTreeSet<_> = shown(&both).into_iter().map(|(_, prompt, completion)| (prompt, completion)).collect();
    assert_eq!(all.len(), 20);
    for expected in [("q0?", "yes"), ("q1?", "no"), ("Say: q0 1", "True"), ("Say: q9 10", "False")] {
        assert!(all.contains(&(expected.0.to_string(), expected.1.to_string())), "{all:?}");
    }
    std::fs::write(folder.path().join("mixture.toml"), BOOLQ).unwrap();
    let one = read_part(&folder, Part::Training, 0).unwrap();
    let templates: BTreeSet<_> = one.examples.iter().map(|example| example.template.clone()).collect();
    assert_eq!((one.examples.len(), templates.len()), (10, 2));
}

#[test]
fn what_is_held_out_is_in_the_other_part_with_every_template() {
    let folder = folder(&format!("held_out_tasks = [\"bool*\"]\nheld_out_templates = [\"*_tell\"]\n{BOOLQ}{T0}"));
    let training = read_part(&folder, Part::Training, 0).unwrap();
    assert!(shown(&training).iter().all(|(task, prompt, _)| task != "boolq" && prompt != "p2"));
    assert_eq!(training.examples.len(), 5);
    assert_eq!(training.describe(), "2 tasks, 5 of 5 examples; held out: task boolq, template news_tell");
    let held_out = read_part(&folder, Part::HeldOut, 0).unwrap();
    assert_eq!(held_out.examples.len(), 2 * 10 + 1);
}

#[test]
fn a_faulty_mixture_is_refused_by_name() {
    for (text, part) in [
        (BOOLQ.replace("question }}?", "questions }}?"), "short"),
        (BOOLQ.replace("{{ question }}?", "{{ question"), "short"),
        (BOOLQ.replace("task = ", "tasc = "), "tasc"),
        (BOOLQ.replace("task = ", "weight = 1e300\ntask = "), "weight"),
        (T0.replace("\"quiz\"", "\"quizzes\""), "quiz_ask"),
        (T0.replace("task_column", "# task_column"), "task_column"),
        (format!("maximum = 0\n{T0}"), "maximum"),
        (format!("held_out_tasks = [\"*\"]\n{T0}"), "no example"),
    ] {
        let error = read_part(&folder(&text), Part::Training, 0).unwrap_err().to_string();
        assert!(error.contains("mixture.toml") && error.contains(part), "{error}");
    }
}
