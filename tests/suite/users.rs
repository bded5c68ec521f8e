//! Adapters of many users in one batch, and adapters folded into weights, by the programs themselves.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, StringArray};
use arrow::datatypes::Float64Type;
use rlhf::data::parquet;
use rlhf::data::table::TableRows;

use crate::common::table;
use crate::workbench::Workbench;

/// The numbers of a column.
fn numbers(bench: &Workbench, file: &str, column: &str) -> Vec<f64> {
    let rows = TableRows::open(&bench.path(file).display().to_string()).unwrap();
    let batches: Vec<_> = rows.map(|rows| rows.unwrap().batch).collect();
    batches
        .iter()
        .flat_map(|batch| batch.column_by_name(column).unwrap().as_primitive::<Float64Type>().values().to_vec())
        .collect()
}

/// The first answer of each row.
fn answers(bench: &Workbench, file: &str) -> Vec<String> {
    let rows = TableRows::open(&bench.path(file).display().to_string()).unwrap();
    let lists: Vec<ArrayRef> =
        rows.map(|rows| rows.unwrap().batch.column_by_name("responses").unwrap().clone()).collect();
    let of_list = |list: &ArrayRef| -> Vec<String> {
        let list = list.as_list::<i32>();
        (0..list.len()).map(|row| list.value(row).as_string_view().value(0).to_string()).collect()
    };
    lists.iter().flat_map(of_list).collect()
}

/// A base with adapters of three users, and files whose column `who` names them.
fn workbench() -> (Workbench, [&'static str; 4]) {
    let bench = Workbench::new();
    bench.succeed(
        "sft --model model --data mixed.parquet --output base --evaluation-share 0 --epochs 10 --batch-size 12 \
         --learning-rate 3e-3 --quiet",
    );
    let prompt = "adapters+prompt-tuning --num-virtual-tokens 4";
    for (name, method) in [("ann", "lora"), ("bob", "prefix-tuning --num-virtual-tokens 4"), ("eve", prompt)] {
        bench.succeed(&format!(
            "sft --model base --data demonstrations.parquet --output {name} --evaluation-share 0 --epochs 4 --batch-size 4 \
             --learning-rate 1e-2 --method {method} --quiet"
        ));
    }
    let users = ["ann", "", "bob", "eve"];
    let who: Vec<&str> = (0..12).map(|row| users[row % 4]).collect();
    let rows = TableRows::open(&bench.path("demonstrations.parquet").display().to_string()).unwrap();
    let batch = rows.map(|rows| rows.unwrap().batch).next().unwrap();
    let columns = |with: Option<&str>| {
        let names = with.map_or(who.clone(), |name| vec![name; 12]);
        vec![
            ("prompt", batch.column_by_name("prompt").unwrap().clone()),
            ("completion", batch.column_by_name("completion").unwrap().clone()),
            ("who", Arc::new(StringArray::from(names)) as ArrayRef),
        ]
    };
    parquet::write(bench.path("mine.parquet"), &table(columns(None))).unwrap();
    parquet::write(bench.path("wrong.parquet"), &table(columns(Some("mallory")))).unwrap();
    (bench, users)
}

#[test]
fn each_row_is_scored_and_answered_with_its_own_users_adapter() {
    let (bench, users) = workbench();
    let adapters = "--adapters ann=ann bob=bob eve=eve --adapter-column who";
    bench.succeed(&format!("score --model base --data mine.parquet --output scored.parquet --quiet {adapters}"));
    bench.succeed(&format!(
        "sample --model base --data mine.parquet --output sampled.parquet --response-length 5 --quiet {adapters}"
    ));
    let (together, said) = (numbers(&bench, "scored.parquet", "log_prob"), answers(&bench, "sampled.parquet"));
    let mut differs = false;
    for (index, user) in users.into_iter().enumerate() {
        let model = if user.is_empty() { "base" } else { user };
        bench.succeed(&format!("score --model {model} --data mine.parquet --output alone.parquet --quiet"));
        bench.succeed(&format!(
            "sample --model {model} --data mine.parquet --output said.parquet --response-length 5 --quiet"
        ));
        let (alone, said_alone) = (numbers(&bench, "alone.parquet", "log_prob"), answers(&bench, "said.parquet"));
        for row in 0..12 {
            if row % 4 == index {
                assert!(
                    (together[row] - alone[row]).abs() < 1e-4,
                    "{user}, row {row}: {} {}",
                    together[row],
                    alone[row]
                );
                assert_eq!(said[row], said_alone[row], "{user}, row {row}");
            } else {
                differs |= (together[row] - alone[row]).abs() > 0.01;
            }
        }
    }
    assert!(differs, "the users' adapters differ");
    let error = bench.run(&format!("score --model base --data wrong.parquet --output out.parquet {adapters}"));
    let error = String::from_utf8(error.stderr).unwrap();
    assert!(error.contains("no adapter is called \"mallory\"; --adapters has ann, bob, eve"), "{error}");
}

#[test]
fn evaluation_prompts_are_answered_with_their_own_users_adapter() {
    let bench = Workbench::new();
    let world = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    let base = world.join("base").display().to_string();
    let demonstrations = world.join("demonstrations-test.parquet").display().to_string();
    bench.succeed(&format!(
        "sft --model {base} --data {demonstrations} --output ann --method lora --learning-rate 5e-3 --max-steps 10 --evaluation-share 0 --quiet"
    ));
    let file = world.join("evaluation.parquet").display().to_string();
    let batch = TableRows::open(&file).unwrap().next().unwrap().unwrap().batch.slice(0, 16);
    let who: ArrayRef =
        Arc::new(StringArray::from((0..16).map(|row| (row % 2 == 0).then_some("ann")).collect::<Vec<_>>()));
    let mut columns: Vec<(&str, ArrayRef)> = vec![("who", who)];
    let schema = batch.schema();
    columns.extend(
        schema.fields().iter().zip(batch.columns()).map(|(field, column)| (field.name().as_str(), column.clone())),
    );
    std::fs::create_dir(bench.path("cases")).unwrap();
    parquet::write(bench.path("cases/test-00000-of-00001.parquet"), &table(columns)).unwrap();
    // A training split beside it, with other rows and other users, is not what is evaluated.
    let training = vec![
        ("who", Arc::new(StringArray::from(vec![None, Some("ann"), Some("bob")])) as ArrayRef),
        ("prompt", Arc::new(StringArray::from(vec!["a", "b", "c"])) as ArrayRef),
    ];
    parquet::write(bench.path("cases/train-00000-of-00001.parquet"), &table(training)).unwrap();
    let evaluate = |model: &str, output: &str, more: &str| -> Vec<String> {
        bench.succeed(&format!(
            "evaluate --models m={model} --data cases --output {output} --response-length 16 --quiet {more}"
        ));
        let path = bench.path(&format!("{output}/answers.parquet")).display().to_string();
        let batches = TableRows::open(&path).unwrap().map(|rows| rows.unwrap().batch);
        let texts = |batch: arrow::array::RecordBatch| -> Vec<String> {
            let column = batch.column_by_name("response").unwrap().clone();
            let column = arrow::compute::cast(&column, &arrow::datatypes::DataType::Utf8).unwrap();
            column.as_string::<i32>().iter().map(|text| text.unwrap().to_string()).collect()
        };
        batches.flat_map(texts).collect()
    };
    let (plain, adapted) = (evaluate(&base, "plain", ""), evaluate("ann", "adapted", ""));
    let mixed = evaluate(&base, "mixed", "--adapters ann=ann --adapter-column who");
    assert_ne!(plain, adapted);
    for (row, found) in mixed.iter().enumerate() {
        assert_eq!(*found, if row % 2 == 0 { &adapted } else { &plain }[row], "row {row}");
    }
}

#[test]
fn adapters_named_on_the_command_line_stand_on_top_of_each_other() {
    let (bench, _) = workbench();
    let score = |model: &str, output: &str| {
        bench.succeed(&format!("score --model {model} --data mine.parquet --output {output}.parquet --quiet"));
        numbers(&bench, &format!("{output}.parquet"), "log_prob")
    };
    let (ann, bob) = (score("ann", "a"), score("bob", "b"));
    let both = score("base --adapter ann,bob", "ab");
    // An adapter on top of an adapter's folder is the same; a prefix and an update of linears do not mind their order.
    assert_eq!(both, score("ann --adapter bob", "a-b"));
    let reversed = score("base --adapter bob --adapter ann", "ba");
    assert!(both.iter().zip(&reversed).all(|(a, b)| (a - b).abs() < 1e-4));
    assert!((0..12).any(|row| (both[row] - ann[row]).abs() > 0.01 && (both[row] - bob[row]).abs() > 0.01));
    // A stack's folder is made of its adapters' folders.
    let parts = score("base --adapter eve/1-adapters,eve/2-prompt-tuning", "parts");
    assert_eq!(parts, score("eve", "eve"));
}

#[test]
fn an_exported_model_answers_as_the_model_with_its_adapters() {
    let (bench, _) = workbench();
    let printed = bench.succeed("export --model ann --output plain --quiet");
    assert!(printed.starts_with("largest absolute change in logits: "), "{printed}");
    assert!(bench.path("plain/model.safetensors").is_file() && !bench.path("plain/adapter_config.json").exists());
    for model in ["ann", "plain"] {
        bench.succeed(&format!("score --model {model} --data mine.parquet --output {model}.parquet --quiet"));
    }
    let (adapted, plain) = (numbers(&bench, "ann.parquet", "log_prob"), numbers(&bench, "plain.parquet", "log_prob"));
    assert!(adapted.iter().zip(&plain).all(|(a, b)| (a - b).abs() < 1e-4));
    bench.succeed("export --model ann --output half --dtype bf16 --quiet");
    let size = |name: &str| std::fs::metadata(bench.path(name).join("model.safetensors")).unwrap().len();
    assert!(size("half") < size("plain") * 6 / 10);
    let config = String::from_utf8(bench.bytes("half/config.json")).unwrap();
    assert!(config.contains("bfloat16"), "{config}");
    let refused = bench.run("export --model bob --output out --quiet");
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(error.contains("prefix-tuning cannot be folded into the weights"), "{error}");
    assert!(!bench.path("out").exists());
}
