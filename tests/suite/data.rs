//! From Parquet files to trees of tokens.

use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, DictionaryArray, FixedSizeListArray, Float32Array, Int8Array, Int32Array, Int64Array,
    LargeListArray, LargeStringArray, ListViewArray, StringArray, StringViewArray, StructArray, UInt16Array,
};
use arrow::buffer::{NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{Field, Int32Type};
use proptest::prelude::*;
use rlhf::data::files::files;
use rlhf::data::parquet::{self, ParquetWriter};
use rlhf::data::schema::{
    self, AnswerLayout, Demonstration, Message, Projection, Prompt, Ranking, TemplateInputs, Text,
};
use rlhf::data::splits::Pattern;
use rlhf::data::table::TableRows;
use rlhf::data::template::ChatTemplate;
use rlhf::data::text_column::{TextForm, batch_of};
use tempfile::TempDir;

use crate::common::{lists, shared, strings, table};

/// A file with these columns in a folder of its own.
fn file(columns: Vec<(&str, ArrayRef)>) -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    parquet::write(&path, &table(columns)).unwrap();
    let path = path.display().to_string();
    (folder, path)
}

fn plain(text: &str) -> Text {
    Text::Plain(text.to_owned())
}

fn rankings(path: &str) -> Vec<Ranking> {
    schema::rankings(path).unwrap().collect::<Result<_, _>>().unwrap()
}

fn error_of<T>(result: rlhf::Result<impl Iterator<Item = rlhf::Result<T>>>) -> String {
    match result {
        Err(error) => error.to_string(),
        Ok(mut items) => {
            let error = items.find_map(Result::err).expect("an error").to_string();
            assert!(items.next().is_none(), "nothing follows an error");
            error
        }
    }
}

// ---- files -------------------------------------------------------------------------------------------------------

#[test]
fn every_encoding_of_a_file_reads_the_same() {
    let Some(folder) = shared("variants") else { return };
    let files = files(&folder).unwrap();
    assert_eq!(files.len(), 7);
    let read = |path: &PathBuf| -> Vec<(Text, Vec<Text>)> {
        rankings(&path.display().to_string()).into_iter().map(|record| (record.prompt, record.responses)).collect()
    };
    let first = read(&files[0]);
    assert_eq!(first.len(), 100);
    for file in &files[1..] {
        assert!(read(file) == first, "{}", file.display());
    }
    assert_eq!(TableRows::open(&folder).unwrap().rows(), 700);
    assert_eq!(rankings(&format!("{folder}/*_z*.parquet").replace("_z", "zstd")).len(), 100);
}

#[test]
fn folders_globs_and_hidden_files() {
    let folder = tempfile::tempdir().unwrap();
    let row = |text: &str| table(vec![("prompt", strings(&[text]))]);
    for name in ["b/train-1.parquet", "a/train-0.parquet", "a/.hidden.parquet", ".cache/x.parquet"] {
        parquet::write(folder.path().join(name), &row(name)).unwrap();
    }
    std::fs::write(folder.path().join("a/README.md"), "text").unwrap();
    let root = folder.path().display();
    let read = |pattern: String| -> Vec<Text> {
        schema::prompts(&pattern).unwrap().map(|record| record.unwrap().prompt).collect()
    };
    assert_eq!(read(format!("{root}")), [plain("a/train-0.parquet"), plain("b/train-1.parquet")]);
    assert_eq!(read(format!("{root}/*/train-1*")), [plain("b/train-1.parquet")]);
    for name in ["b/test-0.parquet", "b/dev/x.parquet"] {
        parquet::write(folder.path().join(name), &row(name)).unwrap();
    }
    assert_eq!(read(format!("{root}/")), [plain("a/train-0.parquet"), plain("b/train-1.parquet")]);
    assert_eq!(read(format!("{root}/b/t*")), [plain("b/test-0.parquet"), plain("b/train-1.parquet")]);
    let held_out = Pattern::evaluation(folder.path().to_str().unwrap());
    assert_eq!(schema::prompts(held_out).unwrap().next().unwrap().unwrap().prompt, plain("b/dev/x.parquet"));
    let readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: b/*\n---\n";
    std::fs::write(folder.path().join("README.md"), readme).unwrap();
    assert_eq!(read(format!("{root}")), [plain("b/test-0.parquet"), plain("b/train-1.parquet")]);
}

#[test]
fn bad_files_get_a_sentence_each() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("empty.parquet"), "").unwrap();
    std::fs::write(path("text.parquet"), "prompt,completion\nnot,parquet\n").unwrap();
    let rows = table(vec![("prompt", strings(&["a", "b"])), ("completion", strings(&["c", "d"]))]);
    parquet::write(path("good.parquet"), &rows).unwrap();
    let bytes = std::fs::read(path("good.parquet")).unwrap();
    std::fs::write(path("truncated.parquet"), &bytes[..bytes.len() * 2 / 3]).unwrap();
    let mut damaged = bytes.clone();
    let footer = bytes.len() - 8;
    damaged[footer - 200..footer - 100].fill(0xff);
    std::fs::write(path("footer.parquet"), &damaged).unwrap();
    parquet::write(path("none.parquet"), &rows.slice(0, 0)).unwrap();
    std::fs::create_dir(path("nothing")).unwrap();
    for (name, expected) in [
        ("empty.parquet", "the file is empty (0 bytes), expected rows"),
        ("text.parquet", "not a Parquet file"),
        ("truncated.parquet", "the Parquet file is truncated"),
        ("footer.parquet", "the footer of the Parquet file cannot be read"),
        ("none.parquet", "there is not a single row in it"),
        ("absent.parquet", "there is no such file or folder"),
        ("nothing", "the folder holds no data file; the forms that are read are Parquet, JSON Lines"),
        ("*.csv", "no file matches this pattern"),
    ] {
        let error = error_of(schema::demonstrations(&path(name)));
        assert!(error.starts_with(&format!("{}: {expected}", path(name))), "{error}");
    }
}

#[test]
fn damaged_pages_are_an_error_and_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let text: Vec<String> = (0..5000).map(|row| format!("row {row}, {}", row * 7919 % 4999)).collect();
    parquet::write(&path, &table(vec![("text", Arc::new(StringArray::from(text)))])).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle..middle + 64].fill(0x5a);
    std::fs::write(&path, &bytes).unwrap();
    let error = error_of(schema::demonstrations(&path.display().to_string()));
    assert!(error.contains("cannot be read") && error.contains("damaged"), "{error}");
}

#[test]
fn an_unfinished_file_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let rows = table(vec![("text", strings(&["a"]))]);
    let mut writer = ParquetWriter::create(folder.path().join("rows.parquet"), rows.schema()).unwrap();
    writer.write(&rows).unwrap();
    drop(writer);
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    // One that was killed has no time to clean up; the next run does.
    let mut writer = ParquetWriter::create(folder.path().join("rows.parquet"), rows.schema()).unwrap();
    writer.write(&rows).unwrap();
    std::mem::forget(writer);
    assert_eq!(folder.path().read_dir().unwrap().count(), 1);
    rlhf::files::sweep(folder.path()).unwrap();
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn what_is_written_is_read(rows in prop::collection::vec((".{0,40}", prop::collection::vec((".{0,20}", -3i64..3), 1..5)), 1..50)) {
        let prompts: Vec<&str> = rows.iter().map(|(prompt, _)| prompt.as_str()).collect();
        let ends: Vec<i32> = rows.iter().scan(0, |end, (_, items)| { *end += items.len() as i32; Some(*end) }).collect();
        let items: Vec<&str> = rows.iter().flat_map(|(_, items)| items).map(|(text, _)| text.as_str()).collect();
        let ranks: Vec<i64> = rows.iter().flat_map(|(_, items)| items).map(|&(_, rank)| rank).collect();
        let ranks = lists(Arc::new(Int64Array::from(ranks)), &ends);
        let (_folder, path) = file(vec![("ranks", ranks), ("prompt", strings(&prompts)), ("responses", lists(strings(&items), &ends))]);
        let read = rankings(&path);
        prop_assert_eq!(read.len(), rows.len());
        for (index, (record, (prompt, items))) in read.iter().zip(&rows).enumerate() {
            prop_assert_eq!(record.origin.row, index);
            prop_assert_eq!(&record.prompt, &plain(prompt));
            let responses: Vec<Text> = items.iter().map(|(text, _)| plain(text)).collect();
            prop_assert_eq!(&record.responses, &responses);
            let ranks: Vec<i64> = items.iter().map(|&(_, rank)| rank).collect();
            prop_assert_eq!(&record.ranks, &ranks);
        }
    }
}

// ---- layouts -----------------------------------------------------------------------------------------------------

/// Conversations as Arrow: the fields of each message, and where each conversation ends.
fn conversations(roles: &[&str], contents: &[&str], ends: &[i32]) -> ArrayRef {
    let tools: ArrayRef = Arc::new(StringArray::from(vec![None::<&str>; roles.len()]));
    let messages = StructArray::from(vec![
        (Arc::new(Field::new("tool_calls", tools.data_type().clone(), true)), tools),
        (Arc::new(Field::new("content", arrow::datatypes::DataType::Utf8, true)), strings(contents)),
        (Arc::new(Field::new("role", arrow::datatypes::DataType::Utf8, true)), strings(roles)),
    ]);
    lists(Arc::new(messages), ends)
}

#[test]
fn the_three_layouts_of_hh_rlhf_hold_the_same_prompts_and_answers() {
    let (Some(implicit), Some(explicit), Some(conversational)) = (
        shared("hh-rlhf-train.parquet"),
        shared("hh-rlhf-explicit-train.parquet"),
        shared("hh-rlhf-conversational-train.parquet"),
    ) else {
        return;
    };
    let (implicit, explicit, conversational) = (rankings(&implicit), rankings(&explicit), rankings(&conversational));
    assert_eq!((implicit.len(), explicit.len(), conversational.len()), (1874, 1874, 1874));
    let template = ChatTemplate::plain().unwrap();
    let mut same = 0;
    for ((left, middle), right) in implicit.iter().zip(&explicit).zip(&conversational) {
        assert_eq!((&left.prompt, &left.responses), (&middle.prompt, &middle.responses), "{}", left.origin);
        let (Text::Messages(prompt), Text::Plain(text)) = (&right.prompt, &left.prompt) else { panic!() };
        let rendered = template.apply(prompt, &TemplateInputs::default(), true).unwrap();
        let whole = |answer: &Text| match answer {
            Text::Messages(answer) => template
                .apply(&[prompt.messages.clone(), answer.messages.clone()].concat(), &TemplateInputs::default(), false)
                .unwrap(),
            Text::Plain(answer) => format!("{text}{answer}"),
        };
        let wholes = |record: &Ranking| record.responses.iter().map(whole).collect::<Vec<_>>();
        same += usize::from(rendered == *text && wholes(left) == wholes(right));
    }
    // The messages were trimmed when the file was made, which shows where an earlier answer begins with two spaces.
    assert_eq!(same, 1870);
}

#[test]
fn ranked_files_of_people_and_judges_are_read() {
    if let Some(path) = shared("ranked-human-train.parquet") {
        let records = rankings(&path);
        assert_eq!(records.len(), 303);
        assert!(records.iter().all(|record| (3..=9).contains(&record.responses.len())));
        assert!(records.iter().all(|record| record.ranks.iter().min() == Some(&0)));
    }
    if let Some(path) = shared("instructgpt-toxicity.parquet") {
        let records = rankings(&path);
        assert_eq!(records.len(), 156);
        assert!(records.iter().all(|record| record.responses.len() == 12 && record.ranks.contains(&0)));
    }
    if let Some(path) = shared("preferences-human-mixed-train.parquet") {
        let records = rankings(&path);
        assert_eq!(records.iter().filter(|record| record.margin.is_some()).count(), 1468 - 503);
    }
    if let Some(path) = shared("demonstrations-train.parquet") {
        assert_eq!(schema::demonstrations(&path).unwrap().filter(Result::is_ok).count(), 3281);
        assert_eq!(schema::prompts(&path).unwrap().filter(Result::is_ok).count(), 3281);
    }
    if let Some(path) = shared("t0.parquet") {
        assert_eq!(schema::demonstrations(&path).unwrap().filter(Result::is_ok).count(), 21335);
    }
    if let Some(path) = shared("preferences-dpo-demo-conversational.parquet") {
        let records = rankings(&path);
        assert_eq!(records.len(), 169);
        assert!(records.iter().all(|record| matches!(&record.prompt, Text::Messages(turns) if !turns.is_empty())));
    }
}

#[test]
fn ranks_of_people_are_the_ranks_of_their_scores() {
    let Some(path) = shared("ranked-human-train.parquet") else { return };
    let mut without_ranks = TableRows::open(&path).unwrap().only(Projection::Only(&["prompt", "responses", "scores"]));
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("scores.parquet");
    parquet::write(&copy, &without_ranks.next().unwrap().unwrap().batch).unwrap();
    let ranks = |path: &str| rankings(path).into_iter().map(|record| record.ranks).collect::<Vec<_>>();
    assert_eq!(ranks(&copy.display().to_string()), ranks(&path));
}

#[test]
fn arrow_variants_of_one_table_are_read_alike() {
    let texts = ["a", "b", "c", "d"];
    let dictionary: DictionaryArray<Int32Type> = texts.into_iter().collect();
    let inner: Vec<ArrayRef> = vec![
        strings(&texts),
        Arc::new(LargeStringArray::from(texts.to_vec())),
        Arc::new(StringViewArray::from(texts.to_vec())),
        Arc::new(dictionary),
    ];
    let scores: Vec<ArrayRef> = vec![
        Arc::new(Float32Array::from(vec![0.5, 1.5, 2.0, -1.0])),
        Arc::new(Int8Array::from(vec![0, 1, 2, -1])),
        Arc::new(UInt16Array::from(vec![1, 2, 9, 0])),
    ];
    let field = |array: &ArrayRef| Arc::new(Field::new("item", array.data_type().clone(), true));
    let offsets = || OffsetBuffer::new(ScalarBuffer::from(vec![0i64, 2, 4]));
    let views = |array: &ArrayRef| {
        let (starts, sizes) = (ScalarBuffer::from(vec![0i32, 2]), ScalarBuffer::from(vec![2i32, 2]));
        ListViewArray::new(field(array), starts, sizes, array.clone(), None)
    };
    for items in &inner {
        let responses: Vec<ArrayRef> = vec![
            lists(items.clone(), &[2, 4]),
            Arc::new(LargeListArray::new(field(items), offsets(), items.clone(), None)),
            Arc::new(FixedSizeListArray::new(field(items), 2, items.clone(), None)),
            Arc::new(views(items)),
        ];
        for (index, responses) in responses.into_iter().enumerate() {
            let scores = lists(scores[index % scores.len()].clone(), &[2, 4]);
            let prompt = items.slice(1, 2);
            let unused: ArrayRef = Arc::new(Int32Array::from(vec![1, 2]));
            let (_folder, path) =
                file(vec![("scores", scores), ("extra", unused), ("responses", responses), ("prompt", prompt)]);
            let records = rankings(&path);
            assert_eq!(records[0].prompt, plain("b"));
            assert_eq!(records[1].responses, [plain("c"), plain("d")]);
            assert_eq!((&records[0].ranks[..], &records[1].ranks[..]), (&[1, 0][..], &[0, 1][..]));
        }
    }
}

#[test]
fn messages_are_read_with_fields_in_any_order_and_null_extras() {
    let turns = conversations(&["user", "assistant", "user", "assistant"], &["Hi", "Hello", "Why?", "So"], &[2, 4]);
    let (_folder, path) = file(vec![("messages", turns)]);
    let records: Vec<Demonstration> = schema::demonstrations(&path).unwrap().collect::<Result<_, _>>().unwrap();
    let expected = Text::messages(vec![Message::user("Why?"), Message::assistant("So")]);
    assert_eq!((&records[1].prompt, &records[1].completion), (&None, &expected));
    let prompts: Vec<Prompt> = schema::prompts(&path).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(prompts[0].prompt, Text::messages(vec![Message::user("Hi")]));
}

#[test]
fn a_null_message_or_field_names_row_and_message() {
    let fields = |roles: Vec<Option<&str>>, nulls: Option<Vec<bool>>| -> ArrayRef {
        let field = |name: &str| Arc::new(Field::new(name, arrow::datatypes::DataType::Utf8, true));
        let contents = strings(&vec!["text"; roles.len()]);
        let columns = vec![Arc::new(StringArray::from(roles)) as ArrayRef, contents];
        let fields = vec![field("role"), field("content")];
        let messages = StructArray::new(fields.into(), columns, nulls.map(NullBuffer::from));
        lists(Arc::new(messages), &[2, 4])
    };
    let roles = || vec![Some("user"), Some("assistant"), Some("user"), None];
    let (_folder, path) = file(vec![("messages", fields(roles(), None))]);
    let error = error_of(schema::demonstrations(&path));
    assert_eq!(
        error,
        format!("{path}: row 1 (counted from 0), column `messages`: message 1 (counted from 0) has no role")
    );
    let (_folder, path) = file(vec![("messages", fields(roles(), Some(vec![true, false, true, true])))]);
    assert!(error_of(schema::demonstrations(&path)).ends_with("message 1 (counted from 0) is null"));
}

#[test]
fn alpaca_and_sharegpt_become_conversations() {
    let (_folder, path) = file(vec![
        ("output", strings(&["Paris", "4"])),
        ("input", Arc::new(StringArray::from(vec![Some("France"), None]))),
        ("instruction", strings(&["Name the capital.", "2 + 2?"])),
    ]);
    let records: Vec<Demonstration> = schema::demonstrations(&path).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(records[0].prompt, Some(Text::messages(vec![Message::user("Name the capital.\n\nFrance")])));
    assert_eq!(records[1].completion, Text::messages(vec![Message::assistant("4")]));

    let field = |name: &str| Arc::new(Field::new(name, arrow::datatypes::DataType::Utf8, true));
    let turns = StructArray::from(vec![
        (field("from"), strings(&["system", "human", "gpt"])),
        (field("value"), strings(&["Be kind.", "Hi", "Hello"])),
    ]);
    let (_folder, path) = file(vec![("conversations", lists(Arc::new(turns), &[3]))]);
    let record = schema::demonstrations(&path).unwrap().next().unwrap().unwrap();
    let system = Message::new("system", "Be kind.");
    assert_eq!(record.completion, Text::messages(vec![system, Message::user("Hi"), Message::assistant("Hello")]));
}

#[test]
fn columns_of_the_conversation_reach_it() {
    let history = lists(lists(strings(&["Hi", "Hello"]), &[2]), &[1]);
    let tools = r#"[{"type": "function", "function": {"name": "height"}}]"#;
    let (_folder, path) = file(vec![
        ("system", strings(&["Be brief."])),
        ("history", history),
        ("instruction", strings(&["Why?"])),
        ("output", strings(&["So"])),
        ("tools", strings(&[tools])),
        ("chat_template_kwargs", strings(&[r#"{"enable_thinking": false}"#])),
    ]);
    let turns = vec![
        Message::new("system", "Be brief."),
        Message::user("Hi"),
        Message::assistant("Hello"),
        Message::user("Why?"),
    ];
    let record = schema::demonstrations(&path).unwrap().next().unwrap().unwrap();
    let Some(Text::Messages(prompt)) = record.prompt else { panic!() };
    assert_eq!(prompt.messages, turns);
    assert_eq!(prompt.inputs.tools.as_ref().unwrap()[0]["function"]["name"], "height");
    assert_eq!(prompt.inputs.variables["enable_thinking"], false);
    assert_eq!(schema::prompts(&path).unwrap().next().unwrap().unwrap().prompt, Text::Messages(prompt.clone()));
    // What a program writes of it is read as the same.
    let text = Text::Messages(prompt);
    let form = TextForm::of([&text]);
    let columns = [vec![form.column("prompt", &[&text]).unwrap()], form.input_columns(&[&text])].concat();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prompts.parquet");
    parquet::write(&path, &batch_of(columns).unwrap()).unwrap();
    assert_eq!(schema::prompts(&path.display().to_string()).unwrap().next().unwrap().unwrap().prompt, text);
}

#[test]
fn columns_of_the_conversation_that_cannot_be_used_are_refused_by_name() {
    let turns = || conversations(&["system", "user", "assistant"], &["Be kind.", "a", "b"], &[3]);
    for (column, value, expected) in [
        ("system", "Be brief.", "differs from the system turn"),
        ("tools", "{}", "expected a list of tools"),
        ("tools", "[", "cannot be read as JSON"),
        ("chat_template_kwargs", "[]", "expected a struct"),
        ("chat_template_kwargs", r#"{"add_generation_prompt": true}"#, "holds `add_generation_prompt`"),
    ] {
        let (_folder, path) = file(vec![("messages", turns()), (column, strings(&[value]))]);
        let error = error_of(schema::demonstrations(&path));
        assert!(
            error.contains(&format!("row 0 (counted from 0), column `{column}`")) && error.contains(expected),
            "{error}"
        );
    }
    for (column, value) in [("system", "Be brief."), ("tools", "[1]"), ("chat_template_kwargs", r#"{"a": 1}"#)] {
        let plain = || [("prompt", strings(&["a"])), ("completion", strings(&["b"]))];
        let (_folder, path) = file([&plain()[..], &[(column, strings(&[value]))]].concat());
        assert!(error_of(schema::demonstrations(&path)).contains("no chat template applies"), "{column}");
        let (_folder, path) = file([&plain()[..], &[(column, strings(&[""]))]].concat());
        assert!(schema::demonstrations(&path).unwrap().next().unwrap().is_ok(), "{column}");
    }
}

#[test]
fn unpaired_preferences_are_no_demonstrations_and_can_be_scored() {
    let marks: [ArrayRef; 2] = [Arc::new(BooleanArray::from(vec![true, false])), Arc::new(Int8Array::from(vec![1, 0]))];
    for (name, mark) in ["label", "kto_tag"].into_iter().flat_map(|name| marks.iter().map(move |mark| (name, mark))) {
        let columns =
            vec![("prompt", strings(&["a", "b"])), ("completion", strings(&["c", "d"])), (name, mark.clone())];
        let (_folder, path) = file(columns);
        let error = error_of(schema::demonstrations(&path));
        assert!(error.contains(&format!("column `{name}`")) && error.contains("unpaired preferences"), "{error}");
        assert_eq!(schema::answered(&path).unwrap().next().unwrap().unwrap().records.len(), 2);
    }
}

#[test]
fn messages_are_read_from_json_of_every_form() {
    let turn = |role: &str, content: &str| format!(r#"{{"role": "{role}", "content": "{content}"}}"#);
    let both = [turn("user", "Hi"), turn("assistant", "Hello")];
    let one_by_one = lists(strings(&[&both[0], &both[1]]), &[2]);
    let expected = Text::messages(vec![Message::user("Hi"), Message::assistant("Hello")]);
    for column in [strings(&[&format!(" [{}, {}]", both[0], both[1])]), one_by_one] {
        let (_folder, path) = file(vec![("messages", column)]);
        let record = schema::demonstrations(&path).unwrap().next().unwrap().unwrap();
        assert_eq!(record.completion, expected);
    }
    let (_folder, path) = file(vec![("messages", strings(&["[1"]))]);
    assert!(error_of(schema::demonstrations(&path)).contains("or the same as JSON"));
    // A string that is no list of messages stays what it is.
    let texts = [r#"[{"a": 1}]"#, "[{", r#"[{"role": "user"}]"#, "[]"];
    let (_folder, path) = file(vec![("text", strings(&texts))]);
    let read = schema::demonstrations(&path).unwrap().map(|record| record.unwrap().completion);
    assert_eq!(read.collect::<Vec<_>>(), texts.map(plain));
}

#[test]
fn bad_rows_get_a_sentence_each() {
    let two = |items: ArrayRef| lists(items, &[2]);
    let responses = || ("responses", two(strings(&["x", "y"])));
    let prompt = || ("prompt", strings(&["p"]));
    let floats = |values: [f32; 2]| two(Arc::new(Float32Array::from(values.to_vec())));
    let cases: Vec<(Vec<(&str, ArrayRef)>, &str)> = vec![
        (vec![("question", strings(&["q"]))], ": no rankings can be made of the columns `question`; name the columns"),
        (vec![prompt(), responses()], ": `responses` has neither `ranks` (lower is better) nor `scores`"),
        (
            vec![prompt(), responses(), ("ranks", strings(&["1"]))],
            ": row 0 (counted from 0), column `ranks`: is the text \"1\", expected lists of whole numbers",
        ),
        (
            vec![prompt(), responses(), ("ranks", lists(Arc::new(Int64Array::from(vec![0, 1, 2])), &[3]))],
            ": row 0 (counted from 0), column `ranks`: has 3 items, but `responses` has 2",
        ),
        (
            vec![prompt(), responses(), ("scores", floats([1.0, f32::NAN]))],
            ": row 0 (counted from 0), column `scores`: holds an item that is no finite number",
        ),
        (
            vec![prompt(), responses(), ("scores", two(strings(&["good", "bad"])))],
            ": column `scores` holds lists of strings, expected lists of numbers",
        ),
        (
            vec![prompt(), ("responses", lists(strings(&[]), &[0])), ("scores", floats([1.0, 2.0]))],
            ": row 0 (counted from 0), column `responses`: is an empty list, expected at least one answer",
        ),
        (
            vec![
                ("prompt", Arc::new(StringArray::from(vec![None::<&str>]))),
                responses(),
                ("scores", floats([1.0, 2.0])),
            ],
            ": row 0 (counted from 0), column `prompt`: is null, expected a text",
        ),
        (
            vec![prompt(), ("chosen", Arc::new(Int64Array::from(vec![1]))), ("rejected", strings(&["r"]))],
            ": column `chosen` holds int64, expected strings or lists of {role, content}",
        ),
        (
            vec![("chosen", conversations(&[], &[], &[0])), ("rejected", conversations(&["user"], &["r"], &[1]))],
            ": row 0 (counted from 0), column `chosen`: is an empty list, expected messages",
        ),
    ];
    for (columns, expected) in cases {
        let (_folder, path) = file(columns);
        let error = error_of(schema::rankings(&path));
        assert!(error.starts_with(&format!("{path}{expected}")), "{error}\n{expected}");
        assert!(!error.contains('\n'), "one sentence: {error}");
    }
    let (_folder, path) = file(vec![("messages", conversations(&["user"], &["Hi"], &[1]))]);
    assert!(
        error_of(schema::demonstrations(&path)).ends_with("holds no message of the assistant, so nothing to learn")
    );
}

#[test]
fn answers_to_score_keep_their_rows() {
    let (_folder, path) = file(vec![
        ("id", Arc::new(Int64Array::from(vec![7, 8]))),
        ("prompt", strings(&["p", "q"])),
        ("responses", lists(strings(&["a", "b", "c"]), &[1, 3])),
    ]);
    let chunk = schema::answered(&path).unwrap().next().unwrap().unwrap();
    assert_eq!(chunk.layout, AnswerLayout::List);
    assert_eq!(chunk.rows.batch.num_columns(), 3);
    assert_eq!(chunk.records[1].answers, [plain("b"), plain("c")]);

    let (_folder, path) = file(vec![("chosen", strings(&["a b"])), ("rejected", strings(&["a c"]))]);
    let chunk = schema::answered(&path).unwrap().next().unwrap().unwrap();
    assert_eq!((chunk.layout, &chunk.records[0].answers[..]), (AnswerLayout::Pair, &[plain(" b"), plain(" c")][..]));

    let (_folder, path) = file(vec![("completion", strings(&["c"])), ("prompt", strings(&["p"]))]);
    let chunk = schema::answered(&path).unwrap().next().unwrap().unwrap();
    assert_eq!((chunk.layout, &chunk.records[0].answers[..]), (AnswerLayout::One, &[plain("c")][..]));
    let turns = conversations(&["user", "assistant", "user", "assistant"], &["a", "b", "c", "d"], &[4]);
    let (_folder, path) = file(vec![("messages", turns)]);
    let chunk = schema::answered(&path).unwrap().next().unwrap().unwrap();
    assert_eq!(chunk.records[0].answers, [Text::messages(vec![Message::assistant("d")])]);
}
