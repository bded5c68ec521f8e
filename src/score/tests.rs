use std::path::{Path, PathBuf};

use ::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use arrow::array::{Array, AsArray, BooleanBuilder, Int32Array, ListBuilder, StringArray, StringBuilder};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type};
use tempfile::TempDir;

use super::*;
use crate::data::parquet;
use crate::data::tokenize::Tokenizer;
use crate::data::train_tokenizer::{SpecialTokens, train_bpe};
use crate::settings::from_arguments;
use crate::settings::testing::OnlyTraining;

/// A small Llama with random weights and a byte tokenizer, as a folder; with a scalar head if asked.
pub(crate) fn random_model(folder: &Path, with_head: bool) -> PathBuf {
    random_model_in(folder.join(if with_head { "reward-model" } else { "model" }), with_head, 0.3, 5)
}

/// The same in this folder, its weights of this standard deviation and from this seed.
pub(crate) fn random_model_in(folder: PathBuf, with_head: bool, deviation: f64, seed: u64) -> PathBuf {
    let config = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 280, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": true, "initializer_range": deviation,
        "bos_token_id": 1, "eos_token_id": 2,
    });
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let texts = ["Vubek keeps a hen.", "What does Vubek keep?"].map(str::to_owned);
    train_bpe(texts.into_iter(), 280, &SpecialTokens::default()).unwrap().save(&folder).unwrap();
    let training = from_arguments::<OnlyTraining>(["--method", "full"]).unwrap().training;
    let head = if with_head { Head::ScalarOrNew } else { Head::Language };
    let role = Role { folder: &folder, adapters: &[], training: Training::With(&training), head, seed };
    let mut model = Bases::new(Device::Cpu).load(&role).unwrap();
    if let Some(head) = model.head_mut() {
        head.form.shift = 0.25;
    }
    let saved = folder.with_file_name("saved");
    std::fs::create_dir_all(&saved).unwrap();
    model.save(&saved).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::rename(saved, &folder).unwrap();
    folder
}

fn settings(model: &Path, data: &Path, output: &Path, more: &[&str]) -> ScoreSettings {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let named = ["--model".into(), text(model), "--data".into(), text(data), "--output".into(), text(output)];
    let more = more.iter().map(|&flag| flag.to_owned());
    from_arguments(named.into_iter().chain(more).chain(["--quiet".to_owned()])).unwrap()
}

fn write(folder: &TempDir, columns: Vec<(&str, ArrayRef)>) -> PathBuf {
    let path = folder.path().join("in.parquet");
    parquet::write(&path, &RecordBatch::try_from_iter(columns).unwrap()).unwrap();
    path
}

fn read(path: &Path) -> RecordBatch {
    TableRows::open(path.to_str().unwrap()).unwrap().next().unwrap().unwrap().batch
}

fn strings(texts: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(texts.to_vec()))
}

fn floats(batch: &RecordBatch, name: &str) -> Vec<f64> {
    batch.column_by_name(name).unwrap().as_primitive::<Float64Type>().values().to_vec()
}

fn names(batch: &RecordBatch) -> Vec<String> {
    batch.schema().fields().iter().map(|field| field.name().clone()).collect()
}

/// The log-probability of `completion` after `prompt` from the logits of the whole sequence, and the head's score at its end.
fn one_by_one(model: &Path, prompt: &str, completion: &str) -> (f64, usize, Option<f64>) {
    let tokenizer = Tokenizer::load(model).unwrap();
    let ScoreSettings { model, common, .. } = settings(model, Path::new("unread"), Path::new("unread"), &[]);
    let model = load(&model, &[], &common).unwrap();
    let tokens = tokenizer.encode(&format!("{prompt}{completion}")).unwrap();
    let start = tokenizer.encode(prompt).unwrap().len();
    let tree = TokenTree { prompt: tokens.clone(), answers: vec![crate::data::batch::Continuation::default()] };
    let hidden = model.hidden(&Batch::pack([&tree]), &Pass::default()).unwrap();
    let rows: Vec<u32> = (0..tokens.len() as u32).collect();
    let logits = model.logits(&hidden, &rows, &[]).unwrap().to_vec2::<f32>().unwrap();
    let log_prob = (start..tokens.len()).map(|position| {
        let row: Vec<f64> = logits[position - 1].iter().map(|&logit| f64::from(logit)).collect();
        let maximum = row.iter().copied().fold(f64::MIN, f64::max);
        let total = row.iter().map(|logit| (logit - maximum).exp()).sum::<f64>().ln() + maximum;
        row[tokens[position] as usize] - total
    });
    let reward = model.head().map(|_| model.values(&hidden, &[tokens.len() - 1]).unwrap().to_vec1().unwrap()[0]);
    (log_prob.sum(), tokens.len() - start, reward.map(f64::from))
}

const PROMPTS: [&str; 3] = ["What does Vubek keep?\n", "Hello.\n", "Who?\n"];
const ANSWERS: [[&str; 2]; 3] = [["Vubek keeps a hen.", "A cow."], ["Hi!", "Go away."], ["x", "Nobody knows."]];

#[test]
fn log_probs_and_rewards_are_those_of_each_sequence_alone() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), true);
    let mut lists = ListBuilder::new(StringBuilder::new());
    ANSWERS.iter().for_each(|answers| lists.append_value(answers.iter().map(Some)));
    let id: ArrayRef = Arc::new(Int32Array::from(vec![7, 8, 9]));
    let data = write(&folder, vec![("id", id), ("responses", Arc::new(lists.finish())), ("prompt", strings(&PROMPTS))]);
    let output = folder.path().join("out.parquet");
    // With 30 tokens a batch, trees are packed together and apart.
    run(&settings(&model, &data, &output, &["--tokens-per-batch", "30"])).unwrap();
    let (before, after) = (read(&data), read(&output));
    assert_eq!(names(&after), ["id", "responses", "prompt", "log_prob", "tokens", "reward"]);
    assert_eq!(after.columns()[..3], *before.columns());
    let list = |name: &str, row: usize| after.column_by_name(name).unwrap().as_list::<i32>().value(row);
    for (row, (prompt, answers)) in PROMPTS.iter().zip(ANSWERS).enumerate() {
        let (log_probs, tokens, rewards) = (list("log_prob", row), list("tokens", row), list("reward", row));
        assert_eq!(log_probs.len(), 2);
        for (index, answer) in answers.iter().enumerate() {
            let (log_prob, count, reward) = one_by_one(&model, prompt, answer);
            let found = log_probs.as_primitive::<Float64Type>().value(index);
            assert!((found - log_prob).abs() < 1e-4, "{prompt}{answer}: {found} {log_prob}");
            assert_eq!(tokens.as_primitive::<Int64Type>().value(index), count as i64);
            assert!((rewards.as_primitive::<Float64Type>().value(index) - reward.unwrap()).abs() < 1e-5);
        }
    }
}

#[test]
fn carried_columns_and_the_files_metadata_come_back_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), false);
    let text: ArrayRef = strings(&["a", "b", "a"]);
    let cast = |to: &DataType| arrow::compute::cast(&text, to).unwrap();
    let field = |data_type: DataType| Arc::new(Field::new("item", data_type, true));
    let tagged = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
    let days: ArrayRef = Arc::new(Int64Array::from(vec![0, 86_400_000, 1_704_067_200_000]));
    let nested = DataType::Struct(vec![field(DataType::List(field(DataType::LargeUtf8)))].into());
    let lists = cast(&DataType::List(field(DataType::Utf8)));
    let large = arrow::compute::cast(&lists, &DataType::List(field(DataType::LargeUtf8))).unwrap();
    let nested_values = arrow::array::StructArray::new(
        match &nested {
            DataType::Struct(fields) => fields.clone(),
            _ => panic!(),
        },
        vec![large],
        None,
    );
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("prompt", cast(&DataType::LargeUtf8)),
        ("completion", text.clone()),
        ("tag", cast(&tagged)),
        ("list", lists),
        ("bytes", cast(&DataType::Binary)),
        (
            "time",
            arrow::compute::cast(
                &days,
                &DataType::Timestamp(arrow::datatypes::TimeUnit::Microsecond, Some("UTC".into())),
            )
            .unwrap(),
        ),
        ("nested", Arc::new(nested_values)),
    ];
    let metadata = std::collections::HashMap::from([("pandas".to_owned(), "{}".to_owned())]);
    let day = ("day", arrow::compute::cast(&days, &DataType::Date64).unwrap());
    for columns in [columns.clone(), vec![columns[0].clone(), columns[1].clone(), day]] {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let schema = Arc::new(batch.schema().as_ref().clone().with_metadata(metadata.clone()));
        let batch = RecordBatch::try_new(schema.clone(), batch.columns().to_vec()).unwrap();
        let data = folder.path().join("in.parquet");
        parquet::write(&data, &batch).unwrap();
        let output = folder.path().join("out.parquet");
        run(&settings(&model, &data, &output, &[])).unwrap();
        // Read by the library alone, with nothing of ours between.
        let reader = ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(&output).unwrap()).unwrap();
        let metadata_read = reader.schema().metadata().clone();
        let read = reader.build().unwrap().next().unwrap().unwrap();
        let (count, stored) = (schema.fields().len(), read.schema());
        for (found, expected) in stored.fields().iter().zip(schema.fields()) {
            assert_eq!(found.data_type(), expected.data_type(), "{}", expected.name());
        }
        assert_eq!(&read.columns()[..count], batch.columns());
        assert_eq!(metadata_read.get("pandas").map(String::as_str), Some("{}"));
    }
}

#[test]
fn one_answer_a_row_gives_one_number_a_row_and_a_language_model_no_reward() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), false);
    let completions = ANSWERS.map(|answers| answers[1]);
    let data = write(&folder, vec![("prompt", strings(&PROMPTS)), ("completion", strings(&completions))]);
    let output = folder.path().join("out.parquet");
    let report = run(&settings(&model, &data, &output, &["--prefix", "policy_"])).unwrap();
    let after = read(&output);
    assert_eq!(names(&after), ["prompt", "completion", "policy_log_prob", "policy_tokens"]);
    let expected: Vec<_> = PROMPTS.iter().zip(completions).map(|(p, c)| one_by_one(&model, p, c)).collect();
    for (found, expected) in floats(&after, "policy_log_prob").iter().zip(&expected) {
        assert!((found - expected.0).abs() < 1e-4);
    }
    assert_eq!((report.rows, report.answers), (3, 3));
    assert_eq!(report.tokens, expected.iter().map(|expected| expected.1).sum::<usize>());
}

#[test]
fn the_end_of_text_is_one_token_more_only_if_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), false);
    let data = write(&folder, vec![("prompt", strings(&PROMPTS)), ("completion", strings(&["a", "b", "c</s>"]))]);
    let tokens = |flags: &[&str]| {
        let output = folder.path().join("out.parquet");
        run(&settings(&model, &data, &output, flags)).unwrap();
        read(&output).column_by_name("tokens").unwrap().as_primitive::<Int64Type>().values().to_vec()
    };
    // An answer that ends with it gets no second one.
    assert_eq!(tokens(&[]), [1, 1, 2]);
    assert_eq!(tokens(&["--add-eos"]), [2, 2, 2]);
}

#[test]
fn pairs_get_a_column_for_each_answer() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), true);
    let chosen = ANSWERS.map(|answers| answers[0]);
    let rejected = ANSWERS.map(|answers| answers[1]);
    let columns = vec![("prompt", strings(&PROMPTS)), ("chosen", strings(&chosen)), ("rejected", strings(&rejected))];
    let data = write(&folder, columns);
    let output = folder.path().join("out.parquet");
    run(&settings(&model, &data, &output, &[])).unwrap();
    let after = read(&output);
    let scores = ["log_prob", "tokens", "reward"];
    let expected: Vec<String> =
        ["chosen", "rejected"].iter().flat_map(|a| scores.map(|s| format!("{a}_{s}"))).collect();
    assert_eq!(names(&after)[3..], expected);
    for (name, answers) in [("chosen_reward", chosen), ("rejected_reward", rejected)] {
        for ((found, prompt), answer) in floats(&after, name).iter().zip(PROMPTS).zip(answers) {
            assert!((found - one_by_one(&model, prompt, answer).2.unwrap()).abs() < 1e-5);
        }
    }
}

#[test]
fn an_answer_that_was_cut_off_gets_no_end_of_text() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), true);
    let mut responses = ListBuilder::new(StringBuilder::new());
    responses.append_value([Some("b"), Some("c")]);
    let mut ended = ListBuilder::new(BooleanBuilder::new());
    ended.append_value([Some(true), Some(false)]);
    let mut columns: Vec<(&str, ArrayRef)> =
        vec![("prompt", strings(&["a"])), ("responses", Arc::new(responses.finish()))];
    columns.push(("ended", Arc::new(ended.finish())));
    let data = write(&folder, columns.clone());
    let output = folder.path().join("out.parquet");
    run(&settings(&model, &data, &output, &["--add-eos"])).unwrap();
    let tokens = read(&output).column_by_name("tokens").unwrap().as_list::<i32>().value(0);
    assert_eq!(tokens.as_primitive::<Int64Type>().values()[..], [2, 1]);
    let mut short = ListBuilder::new(BooleanBuilder::new());
    short.append_value([Some(true)]);
    columns[2].1 = Arc::new(short.finish());
    let data = write(&folder, columns);
    let error = run(&settings(&model, &data, &output, &["--add-eos"])).unwrap_err().to_string();
    assert!(error.contains("column `ended` has 1 values for 2 answers"), "{error}");
}

/// Says of a model's head that it was trained on answers with the end-of-text token.
fn note_endings(model: &Path) {
    let path = model.join("head.json");
    let mut form: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    form["answers_end_with_eos"] = serde_json::json!(true);
    std::fs::write(path, form.to_string()).unwrap();
}

#[test]
fn answers_end_as_those_that_the_head_was_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), true);
    let answers = ANSWERS.map(|answers| answers[1]);
    let data = write(&folder, vec![("prompt", strings(&PROMPTS)), ("completion", strings(&answers))]);
    let output = folder.path().join("out.parquet");
    let scored = |data: &Path, flags: &[&str]| {
        run(&settings(&model, data, &output, flags)).unwrap();
        let after = read(&output);
        let tokens = after.column_by_name("tokens").unwrap().as_primitive::<Int64Type>().values().to_vec();
        (tokens, floats(&after, "reward"))
    };
    // Nothing is known of the head: answers are read as they are.
    let (as_is, ended) = (scored(&data, &[]), scored(&data, &["--add-eos"]));
    assert!(as_is.0.iter().zip(&ended.0).all(|(open, closed)| open + 1 == *closed) && as_is.1 != ended.1);
    note_endings(&model);
    assert_eq!(scored(&data, &[]), ended);
    assert_eq!(scored(&data, &["--add-eos"]), ended);
    assert_eq!(scored(&data, &["--as-is"]), as_is);
    // An answer that has its end gets no other, and one that was cut off stays open.
    let written = answers.map(|answer| format!("{answer}</s>"));
    let written: Vec<&str> = written.iter().map(String::as_str).collect();
    let data = write(&folder, vec![("prompt", strings(&PROMPTS)), ("completion", strings(&written))]);
    assert_eq!(scored(&data, &[]), ended);
    let cut: ArrayRef = Arc::new(arrow::array::BooleanArray::from(vec![Some(true), Some(false), None]));
    let columns = vec![("prompt", strings(&PROMPTS)), ("completion", strings(&answers)), ("ended", cut)];
    let some = scored(&write(&folder, columns), &[]);
    assert_eq!(some.0, [ended.0[0], as_is.0[1], ended.0[2]]);
    for (row, expected) in [ended.1[0], as_is.1[1], ended.1[2]].into_iter().enumerate() {
        assert!((some.1[row] - expected).abs() < 1e-5);
    }
    let needed = ["--model=m", "--data=d", "--output=o", "--as-is", "--add-eos"];
    assert!(from_arguments::<ScoreSettings>(needed).is_err());
}

#[test]
fn a_number_that_is_none_is_an_error_with_its_row_and_there_is_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), true);
    let data = write(&folder, vec![("prompt", strings(&PROMPTS)), ("completion", strings(&["a", "b", "c"]))]);
    let output = folder.path().join("out.parquet");
    for flags in [&[][..], &["--tokens-per-batch", "1"]] {
        let mut form: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(model.join("head.json")).unwrap()).unwrap();
        // Each score is divided by the smallest number: it overflows.
        form["divisor"] = serde_json::json!(1e-38);
        form["shift"] = serde_json::json!(-3e38);
        std::fs::write(model.join("head.json"), form.to_string()).unwrap();
        let error = run(&settings(&model, &data, &output, flags)).unwrap_err();
        let sentence = error.to_string();
        assert!(sentence.contains("in.parquet: row 0") && sentence.contains("the reward of answer 0"), "{sentence}");
        assert!(error.exit_code() == 2 && !output.exists());
    }
}

#[test]
fn the_best_answer_of_each_prompt_is_kept_with_its_scores() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), true);
    let mut lists = ListBuilder::new(StringBuilder::new());
    ANSWERS.iter().for_each(|answers| lists.append_value(answers.iter().map(Some)));
    let data = write(&folder, vec![("prompt", strings(&PROMPTS)), ("responses", Arc::new(lists.finish()))]);
    let output = folder.path().join("out.parquet");
    run(&settings(&model, &data, &output, &["--best"])).unwrap();
    let after = read(&output);
    assert_eq!(names(&after), ["prompt", "completion", "log_prob", "tokens", "reward"]);
    let kept = after.column_by_name("completion").unwrap().as_string_view();
    for (row, (prompt, answers)) in PROMPTS.iter().zip(ANSWERS).enumerate() {
        let rewards = answers.map(|answer| one_by_one(&model, prompt, answer).2.unwrap());
        let best = usize::from(rewards[1] > rewards[0]);
        assert_eq!(kept.value(row), answers[best]);
        assert!((floats(&after, "reward")[row] - rewards[best]).abs() < 1e-5);
    }
    let refused =
        |model: &Path, data: &Path| run(&settings(model, data, &output, &["--best"])).unwrap_err().to_string();
    let language_model = random_model(folder.path(), false);
    assert!(refused(&language_model, &data).contains("gives no reward"));
    let data = write(&folder, vec![("prompt", strings(&["a"])), ("completion", strings(&["b"]))]);
    assert!(refused(&model, &data).contains("each row holds one answer"));
}

#[test]
fn columns_that_are_there_already_are_refused_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), false);
    let columns = vec![("prompt", strings(&["a"])), ("completion", strings(&["b"])), ("tokens", strings(&["c"]))];
    let data = write(&folder, columns);
    let output = folder.path().join("out.parquet");
    let error = run(&settings(&model, &data, &output, &[])).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("in.parquet: there is a column `tokens` already"), "{error}");
    let data = write(&folder, vec![("question", strings(&["a"]))]);
    assert!(run(&settings(&model, &data, &output, &[])).unwrap_err().to_string().contains("`question`"));
    assert!(!output.exists());
}

#[test]
fn an_unreadable_shift_is_an_error_and_not_a_missing_head() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), true);
    std::fs::write(model.join("head.json"), "{}").unwrap();
    let data = write(&folder, vec![("prompt", strings(&["a"])), ("completion", strings(&["b"]))]);
    let output = folder.path().join("out.parquet");
    let error = run(&settings(&model, &data, &output, &[])).unwrap_err().to_string();
    assert!(error.contains("head.json"), "{error}");
}

#[test]
fn an_empty_answer_has_no_tokens_and_log_probability_zero() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path(), false);
    let data = write(&folder, vec![("prompt", strings(&["a"])), ("completion", strings(&[""]))]);
    let output = folder.path().join("out.parquet");
    run(&settings(&model, &data, &output, &[])).unwrap();
    let after = read(&output);
    assert_eq!(floats(&after, "log_prob"), [0.0]);
    assert_eq!(after.column_by_name("tokens").unwrap().data_type(), &DataType::Int64);
}

#[test]
fn an_encoder_scores_an_answer_as_the_second_text_of_a_pair() {
    let model = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/classifiers/xlm-roberta"));
    let folder = tempfile::tempdir().unwrap();
    let answers = ["A hen.", "Nobody knows, she says.", ""];
    let data = write(&folder, vec![("prompt", strings(&PROMPTS)), ("completion", strings(&answers))]);
    let output = folder.path().join("out.parquet");
    run(&settings(model, &data, &output, &[])).unwrap();
    let found = floats(&read(&output), "reward");
    // As the program that rewards a policy's answers reads them.
    let mut rewards = crate::rewards::RewardModel::load(model, &mut Bases::new(Device::Cpu), 1024, 0).unwrap();
    let prompts: Vec<schema::Prompt> = schema::prompts(data.to_str().unwrap()).unwrap().collect::<Result<_>>().unwrap();
    for ((prompt, answer), found) in prompts.iter().zip(answers).zip(found) {
        let replies = [crate::rewards::Reply { text: answer.to_string(), ended: true }];
        let asked = crate::rewards::Asked { prompt, tree: None, replies: &replies };
        let expected = rewards.score(&[asked], 512).unwrap()[0][0];
        assert!((found - f64::from(expected)).abs() < 1e-5, "{answer}: {found} is not {expected}");
    }
}
