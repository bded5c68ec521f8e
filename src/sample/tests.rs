use std::path::{Path, PathBuf};

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray};

use super::*;
use crate::data::parquet;
use crate::score::tests::random_model;
use crate::settings::from_arguments;

fn settings(model: &Path, data: &Path, output: &Path, more: &[&str]) -> SampleSettings {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let named = ["--model".into(), text(model), "--data".into(), text(data), "--output".into(), text(output)];
    let more = more.iter().map(|&flag| flag.to_owned());
    from_arguments(named.into_iter().chain(more).chain(["--quiet".to_owned()])).unwrap()
}

fn prompts(folder: &Path, texts: &[&str]) -> PathBuf {
    let path = folder.join("prompts.parquet");
    let column: ArrayRef = Arc::new(StringArray::from(texts.to_vec()));
    parquet::write(&path, &RecordBatch::try_from_iter([("prompt", column)]).unwrap()).unwrap();
    path
}

fn read(path: &Path) -> (Vec<String>, Vec<Vec<String>>) {
    let batch = TableRows::open(path.to_str().unwrap()).unwrap().next().unwrap().unwrap().batch;
    let texts = |column: &dyn Array| -> Vec<String> {
        column.as_string_view().iter().map(|text| text.unwrap().to_owned()).collect()
    };
    let lists = batch.column_by_name("responses").unwrap().as_list::<i32>();
    let responses = lists.iter().map(|list| texts(&list.unwrap())).collect();
    (texts(batch.column_by_name("prompt").unwrap()), responses)
}

#[test]
fn every_prompt_gets_its_answers_whatever_is_sampled_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), false);
    let texts: Vec<String> = (0..9).map(|index| format!("Prompt {index}: ")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let data = prompts(folder.path(), &texts);
    let sample = |name: &str, tokens: &str| {
        let output = folder.path().join(name);
        let flags = ["--answers", "3", "--response-length", "8"];
        let flags = [&flags[..], &["--tokens-per-batch", tokens, "--kv-cache-tokens", tokens]].concat();
        let report = run(&settings(&model, &data, &output, &flags)).unwrap();
        assert_eq!((report.prompts, report.answers), (9, 27));
        read(&output)
    };
    let (prompts, responses) = sample("all.parquet", "32768");
    assert_eq!(prompts, texts);
    assert!(responses.iter().all(|answers| answers.len() == 3));
    // A random model says something else each time.
    assert_ne!(responses[0][0], responses[0][1]);
    assert_eq!(sample("few.parquet", "1").1, responses);
}

#[test]
fn a_long_prompt_loses_its_start_so_that_the_answer_has_room() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), false);
    let data = prompts(folder.path(), &["a long prompt that does not fit", "b"]);
    let output = folder.path().join("out.parquet");
    let report = run(&settings(&model, &data, &output, &["--max-length", "20", "--response-length", "8"])).unwrap();
    assert_eq!(report.truncation.prompts, 1);
    let error = run(&settings(&model, &data, &output, &["--max-length", "8", "--response-length", "8"])).unwrap_err();
    assert!(error.to_string().contains("leaves no room for a prompt"), "{error}");
}

#[test]
fn conversations_are_written_as_conversations() {
    let turn = |text: &str| Text::messages(vec![schema::Message::user(text)]);
    let (first, second) = (turn("Hello"), turn("Bye"));
    let (_, column) = TextForm::of([&first, &second]).column("prompt", &[&first, &second]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prompts.parquet");
    parquet::write(&path, &RecordBatch::try_from_iter([("prompt", column)]).unwrap()).unwrap();
    let read: Vec<Text> =
        schema::prompts(path.to_str().unwrap()).unwrap().map(|prompt| prompt.unwrap().prompt).collect();
    assert_eq!(read, [first, second]);
    let mixed = [turn("a"), Text::Plain("b".into())];
    assert!(TextForm::of(&mixed).column("prompt", &[&mixed[0], &mixed[1]]).is_none());
    assert!(TextForm::of(&mixed).column("prompt", &[&mixed[1], &mixed[0]]).is_none());
}

#[test]
fn logits_that_are_no_numbers_are_an_error_with_the_prompts_row_and_there_is_no_file() {
    let folder = tempfile::tempdir().unwrap();
    // With weights in a file, of which one is spoilt.
    let model = random_model(folder.path(), true);
    let file = model.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let name = tensors.keys().find(|name| name.ends_with("layers.1.mlp.down_proj.weight")).unwrap().clone();
    let spoilt = tensors[&name].affine(f64::NAN, 0.0).unwrap();
    tensors.insert(name, spoilt);
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let data = prompts(folder.path(), &["Hello.\n", "Who?\n"]);
    let output = folder.path().join("out.parquet");
    for flags in [&["--temperature", "0"][..], &[], &["--top-k", "3"], &["--top-p", "0.5", "--answers", "2"]] {
        let error = run(&settings(&model, &data, &output, flags)).unwrap_err();
        let sentence = error.to_string();
        assert!(sentence.contains("prompts.parquet: row 0") && sentence.contains("not finite"), "{sentence}");
        assert!(sentence.contains("reward-model") && sentence.contains("token 0 of the answer"), "{sentence}");
        assert!(error.exit_code() == 2 && !output.exists());
    }
}
