//! Data in other forms than Parquet, as people have them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use arrow::compute::concat_batches;
use rlhf::data::parquet;
use rlhf::data::row_index::RowIndex;
use rlhf::data::schema::{self, DEMONSTRATIONS};
use rlhf::data::table::TableRows;
use rlhf::data::window::WindowedRows;

use crate::common::{strings, table};
use crate::forms::{ENDINGS, bytes, gzip};
use crate::hostile::seeds::tables;
use crate::server::{Reply, Server};
use crate::workbench::{Workbench, number};

/// What is read of a file in each kind of records, without the file's name; of kinds that it does not have, `None`.
fn read(path: &str) -> Vec<Option<String>> {
    fn shown<R: std::fmt::Debug>(
        path: &str,
        records: rlhf::Result<impl Iterator<Item = rlhf::Result<R>>>,
    ) -> Option<String> {
        let records: Vec<R> = records.ok()?.collect::<Result<_, _>>().ok()?;
        Some(format!("{records:#?}").replace(path, "FILE"))
    }
    vec![
        shown(path, schema::demonstrations(path)),
        shown(path, schema::rankings(path)),
        shown(path, schema::labelled(path)),
        shown(path, schema::prompts(path)),
    ]
}

#[test]
fn every_layout_is_the_same_in_every_form() {
    let folder = tempfile::tempdir().unwrap();
    for (name, rows) in tables() {
        let path = |ending: &str| folder.path().join(format!("{name}.{ending}")).display().to_string();
        parquet::write(path("parquet"), &rows).unwrap();
        let expected = read(&path("parquet"));
        assert!(expected.iter().any(Option::is_some), "{name}");
        for ending in ENDINGS {
            std::fs::write(path(ending), bytes(&rows, ending)).unwrap();
            for (found, expected) in
                read(&path(ending)).iter().zip(&expected).filter(|(_, expected)| expected.is_some())
            {
                assert_eq!(found, expected, "{name}.{ending}");
            }
        }
    }
}

/// Prompts and completions as they are: numbers, dates, quotes, line breaks, nothing.
fn texts() -> RecordBatch {
    let completions =
        ["42", "2024-01-01", " said \"no\", twice", "line\nbreak", "true", "é 😀", "null", "[1, 2]", "0.10"];
    let prompts = ["1", "2,3", "", "\ttab", "a;b", "{}", "NaN", "007", "\"quoted\""];
    table(vec![("prompt", strings(&prompts)), ("completion", strings(&completions))])
}

const SFT: &str = "--max-steps 3 --batch-size 4 --learning-rate 3e-3 --evaluation-share 0.2 --seed 3 --quiet";

#[test]
fn one_data_set_in_every_form_gives_the_same_model() {
    let bench = Workbench::new();
    parquet::write(bench.path("texts.parquet"), &texts()).unwrap();
    bench.succeed(&format!("sft --model model --data texts.parquet --output parquet {SFT}"));
    for ending in ENDINGS {
        bench.put(&format!("texts.{ending}"), &bytes(&texts(), ending));
        bench.succeed(&format!("sft --model model --data texts.{ending} --output run-{ending} {SFT}"));
        assert!(
            bench.bytes(&format!("run-{ending}/model.safetensors")) == bench.bytes("parquet/model.safetensors"),
            "{ending}"
        );
    }
    let first = |data: &str| {
        bench.succeed(&format!("sft --model parquet --data {data} --output none --inspect 2")).replace(data, "FILE")
    };
    assert!(first("texts.parquet").contains("with loss"));
    ["texts.csv", "texts.jsonl.gz"].iter().for_each(|data| assert_eq!(first(data), first("texts.parquet")));
}

/// All rows of a file.
fn rows_of(bench: &Workbench, name: &str) -> RecordBatch {
    let rows: Vec<RecordBatch> =
        TableRows::open(&bench.path(name).display().to_string()).unwrap().map(|rows| rows.unwrap().batch).collect();
    concat_batches(&rows[0].schema(), &rows).unwrap()
}

#[test]
fn every_program_takes_every_form() {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--max-steps 1");
    for (name, ending) in
        [("rankings", "csv"), ("rankings", "json"), ("prompts", "tsv"), ("prompts", "jsonl.gz"), ("mixed", "arrow")]
    {
        bench.put(&format!("{name}.{ending}"), &bytes(&rows_of(&bench, &format!("{name}.parquet")), ending));
    }
    let reward = "--max-steps 1 --batch-size 4 --evaluation-share 0 --quiet";
    for data in ["rankings.parquet", "rankings.csv", "rankings.json"] {
        bench.succeed(&format!("reward --model sft --data {data} --output reward-{data} {reward}"));
        bench.succeed(&format!("sft --objective dpo --model sft --data {data} --output dpo-{data} {reward}"));
        for run in ["reward", "dpo"] {
            let weights = |data: &str| bench.bytes(&format!("{run}-{data}/model.safetensors"));
            assert!(weights(data) == weights("rankings.parquet"), "{run} {data}");
        }
    }
    let ppo = "--batch-size 6 --minibatches 1 --epochs 1 --max-steps 1 --response-length 4 --max-length 64 --quiet";
    for data in ["prompts.parquet", "prompts.tsv", "prompts.jsonl.gz"] {
        bench.succeed(&format!(
            "ppo --model sft --reward-model reward-rankings.csv --data {data} --output ppo-{data} {ppo}"
        ));
        bench.succeed(&format!(
            "sample --model sft --data {data} --output sample-{data}.parquet --response-length 4 --quiet"
        ));
        let weights = |data: &str| bench.bytes(&format!("ppo-{data}/model.safetensors"));
        assert!(weights(data) == weights("prompts.parquet"), "ppo {data}");
        let samples = |data: &str| rows_of(&bench, &format!("sample-{data}.parquet"));
        assert_eq!(samples(data).column_by_name("completion"), samples("prompts.parquet").column_by_name("completion"));
    }
    for data in ["mixed.parquet", "mixed.arrow"] {
        bench
            .succeed(&format!("score --model reward-rankings.csv --data {data} --output score-{data}.parquet --quiet"));
        let perplexity =
            format!("evaluate --models a=sft --perplexity {data} --output evaluate-{data} --resamples 2 --quiet");
        bench.succeed(&perplexity);
    }
    let scores = |data: &str| rows_of(&bench, &format!("score-{data}.parquet")).column_by_name("reward").cloned();
    assert!(scores("mixed.arrow").is_some() && scores("mixed.arrow") == scores("mixed.parquet"));
    bench.put("mixture.toml", b"[[source]]\ndata = \"mixed.arrow\"\ntask = \"a\"\n");
    bench.succeed(&format!("sft --model sft --data mixture.toml --output mixed {SFT}"));
}

#[test]
fn what_cannot_be_read_is_told_in_a_sentence_that_names_file_and_line() {
    let bench = Workbench::new();
    let cases: [(&str, &[u8], &[&str]); 13] = [
        (
            "a.jsonl",
            b"{\"text\": \"a\"}\n{\"text\": 42}\n",
            &["a.jsonl: column `text` holds a number in line 2 and a string in line 1"],
        ),
        ("b.jsonl", b"{\"text\": 1}\n{\"text\": 42}\n", &["b.jsonl: column `text` holds int64", "expected strings"]),
        ("c.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"b\"\n", &["c.jsonl: line 2", "not valid JSON"]),
        (
            "d.json",
            b"[{\"text\": \"a\"}, {\"text\": \"b\"}",
            &["d.json: line 1", "the file ends before the array does"],
        ),
        ("e.json", b"{\"data\": [{\"text\": \"a\"}]}", &["e.json: no ", "can be made of the columns `data`"]),
        ("f.csv", b"text\n\"a\n", &["f.csv: line 2: a quote of the row that begins here is not closed"]),
        ("g.csv", b"prompt,completion\na,b,c\n", &["g.csv: line 2", "has 3 fields, the header 2"]),
        ("h.csv", b"text\n\xff\n", &["h.csv: line 2", "UTF-8"]),
        ("i.arrow", b"ARROW1\0\0", &["i.arrow: the Arrow file cannot be read (it is truncated)"]),
        ("j.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03", &["j.jsonl.gz: cannot be decompressed (it ends too early)"]),
        ("k.txt", b"text", &["k.txt: not a file of rows", "Parquet, JSON Lines", "CSV"]),
        (
            "m.csv",
            b"prompt,completion,label\na,b,True\na,c,False\n",
            &["m.csv: column `label` marks each answer as good or bad"],
        ),
        ("l.jsonl", b"", &["l.jsonl: the file is empty"]),
    ];
    for (name, content, expected) in cases {
        bench.put(name, content);
        let output = bench.run(&format!("sft --model model --data {name} --output run {SFT}"));
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{name}: {error}");
        assert_eq!(error.lines().filter(|line| !line.starts_with("note: ")).count(), 1, "{error}");
        expected.iter().for_each(|expected| assert!(error.contains(expected), "expected {expected:?} in {error}"));
    }
    bench.sft("start", "model", "--max-steps 1 --quiet");
    bench.put("margin.csv", b"chosen,rejected,margin\na,b,0.5\na,c,large\n");
    let output = bench.run(&format!("reward --model start --data margin.csv --output run {SFT}"));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("row 1 (counted from 0), column `margin`: is the text \"large\", expected numbers"),
        "{error}"
    );
}

#[test]
fn a_field_that_comes_late_is_a_column() {
    let bench = Workbench::new();
    let mut text = String::new();
    (0..3000).for_each(|row| writeln!(text, "{{\"prompt\": \"p{row}\", \"completion\": \"c\"}}").unwrap());
    text += "{\"completion\": \"c\", \"late\": 1, \"prompt\": \"last\"}\n";
    bench.put("late.jsonl", text.as_bytes());
    let path = bench.path("late.jsonl").display().to_string();
    let rows = TableRows::open(&path).unwrap();
    assert_eq!((rows.rows(), rows.schemas()[0].1.fields().len()), (3001, 3));
    assert_eq!(schema::prompts(&path).unwrap().count(), 3001);
}

#[test]
fn windows_of_text_files_hold_every_row_once() {
    let folder = tempfile::tempdir().unwrap();
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values((0..5000).map(|row| format!("text {row}"))));
    let rows = table(vec![("text", texts)]);
    for ending in ["jsonl", "json", "csv", "arrows", "jsonl.gz"] {
        let path = folder.path().join(format!("rows.{ending}"));
        std::fs::write(&path, bytes(&rows, ending)).unwrap();
        let index = Arc::new(RowIndex::open(&path.display().to_string(), &DEMONSTRATIONS).unwrap());
        assert!(ending == "arrows" || index.groups().len() == 5);
        let mut windows = WindowedRows::new(index, vec![7, 1024], 1500, 3);
        let mut found = BTreeSet::new();
        for step in 0..50 {
            for rows in windows.at(1, step * 100..((step + 1) * 100).min(4998)).unwrap() {
                let text = rows.strings("text").unwrap().value(0).to_owned();
                assert_eq!(text, format!("text {}", rows.origin(0).row));
                assert!(found.insert(rows.origin(0).row), "{ending}: {text} twice");
            }
        }
        assert_eq!(found.len(), 4998);
        assert!(!found.contains(&7) && !found.contains(&1024));
    }
}

#[test]
fn a_text_file_that_changes_during_a_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, "{\"text\": \"a\"}\n".repeat(3000)).unwrap();
    let index = Arc::new(RowIndex::open(&path.display().to_string(), &DEMONSTRATIONS).unwrap());
    let mut rows = WindowedRows::new(index, Vec::new(), 60, 1);
    std::fs::write(&path, "{\"text\": \"ab\"}\n".repeat(3000)).unwrap();
    let error = rows.at(0, 0..4).unwrap_err().to_string();
    assert!(error.contains("the file has changed since its rows were counted"), "{error}");
}

#[test]
fn text_files_of_a_web_server_are_read_in_parts() {
    let bench = Workbench::new();
    let mut text = String::new();
    // Of two blocks.
    (0..9000).for_each(|row| {
        writeln!(text, "{{\"prompt\": \"p{row} {}\", \"completion\": \"c\"}}", "long ".repeat(30)).unwrap()
    });
    bench.put("rows.jsonl", text.as_bytes());
    let files = [("rows.jsonl", text.clone().into_bytes()), ("rows.jsonl.gz", gzip(text.as_bytes()))];
    let server = Server::start(move |request| {
        let file = files.iter().find(|(name, _)| request.path.ends_with(name));
        file.map_or(Reply::status(404), |(_, bytes)| Reply::file(request, bytes, "one"))
    });
    let line = format!("--shuffle-window 500 {SFT}");
    bench.succeed(&format!("sft --model model --data rows.jsonl --output local {line}"));
    for name in ["rows.jsonl", "rows.jsonl.gz"] {
        bench.succeed(&format!("sft --model model --data {}/{name} --output remote-{name} {line}", server.url()));
        assert!(bench.bytes(&format!("remote-{name}/model.safetensors")) == bench.bytes("local/model.safetensors"));
    }
}

#[test]
fn folders_hold_one_form() {
    let bench = Workbench::new();
    let half = |start: usize| texts().slice(start, 4);
    bench.put("two/a.jsonl", &bytes(&half(0), "jsonl"));
    bench.put("two/b.jsonl.gz", &bytes(&half(4), "jsonl.gz"));
    bench.put("two/dataset_info.json", b"{}");
    parquet::write(bench.path("one.parquet"), &texts().slice(0, 8)).unwrap();
    for data in ["one.parquet", "two", "two/*.jsonl*"] {
        let output = data.replace(['/', '*'], "-");
        let line = format!("sft --model model --data {data} --output run-{output} {SFT}");
        bench.succeed(&line);
        assert!(
            bench.bytes(&format!("run-{output}/model.safetensors")) == bench.bytes("run-one.parquet/model.safetensors")
        );
    }
    bench.put("two/c.csv", b"text\na\n");
    let output = bench.run(&format!("sft --model model --data two --output none {SFT}"));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && error.contains("several forms (CSV or TSV, JSON Lines)"), "{error}");
}

#[test]
#[cfg(target_os = "linux")]
fn memory_does_not_grow_with_the_rows_of_a_text_file() {
    let bench = Workbench::new();
    bench.sft("start", "model", "--max-steps 1 --quiet");
    let peak = |rows: usize, ending: &str| {
        let texts = |first: usize| -> ArrayRef {
            Arc::new(StringArray::from_iter_values(
                (first..first + rows).map(|row| format!("The number {row} is of the colour {}", "red ".repeat(20))),
            ))
        };
        let file = format!("{rows}.{ending}");
        bench.put(&file, &bytes(&table(vec![("prompt", texts(0)), ("completion", texts(7))]), ending));
        let line = format!("sft --model start --data {file} --output run-{file} --max-steps 3 --threads 1 --quiet");
        bench.succeed(&format!("{line} --evaluation-data demonstrations.parquet"));
        number(&bench.metrics(&format!("run-{file}"))[2], "peak_rss_mb")
    };
    for ending in ["jsonl", "csv", "jsonl.gz"] {
        let (few, many) = (peak(12_000, ending), peak(120_000, ending));
        assert!(many < 1.2 * few, "{ending}: {few} MB for 12 thousand rows, {many} MB for 120 thousand");
    }
}
