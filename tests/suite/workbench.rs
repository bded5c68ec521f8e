//! A working folder in which programs are run as users run them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, StringArray};
use rlhf::data::parquet;
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{lists, table};

/// A tiny model.
pub const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}"#;

/// A working folder with a bare `config.json` in `model/` and a Parquet file for each program.
pub struct Workbench {
    folder: TempDir,
}

impl Workbench {
    /// A model, demonstrations, rankings and prompts about the colours of things, and demonstrations of all answers, good and bad.
    pub fn new() -> Self {
        let bench = Workbench { folder: tempfile::tempdir().unwrap() };
        bench.put("model/config.json", CONFIG.as_bytes());
        let colours = ["red", "green", "blue", "white"];
        let things = ["boat", "lamp", "chair", "coat", "clock", "bag", "ring", "hat", "cup", "door", "tree", "bird"];
        let prompts: Vec<String> = things.iter().map(|thing| format!("The {thing} is of the colour")).collect();
        let right = |row: usize| format!(" {}.", colours[row % 4]);
        let wrong = |row: usize| format!(" {}, or so.", colours[(row + 1) % 4]);
        let prompt_column = || -> ArrayRef { Arc::new(StringArray::from(prompts.clone())) };
        let completions: Vec<String> = (0..12).map(right).collect();
        let columns = vec![("prompt", prompt_column()), ("completion", Arc::new(StringArray::from(completions)))];
        parquet::write(bench.path("demonstrations.parquet"), &table(columns)).unwrap();
        let answers: Vec<String> = (0..12).flat_map(|row| [wrong(row), right(row), " No.".to_string()]).collect();
        let columns = vec![
            (
                "prompt",
                Arc::new(StringArray::from_iter_values(prompts.iter().flat_map(|prompt| [prompt; 3]))) as ArrayRef,
            ),
            ("completion", Arc::new(StringArray::from(answers.clone()))),
        ];
        parquet::write(bench.path("mixed.parquet"), &table(columns)).unwrap();
        let ranks: Vec<i64> = (0..12).flat_map(|_| [1, 0, 2]).collect();
        let ends: Vec<i32> = (1..=12).map(|row| 3 * row).collect();
        let columns = vec![
            ("prompt", prompt_column()),
            ("responses", lists(Arc::new(StringArray::from(answers)), &ends)),
            ("ranks", lists(Arc::new(Int64Array::from(ranks)), &ends)),
        ];
        parquet::write(bench.path("rankings.parquet"), &table(columns)).unwrap();
        parquet::write(bench.path("prompts.parquet"), &table(vec![("prompt", prompt_column())])).unwrap();
        bench
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file.
    pub fn put(&self, name: &str, content: &[u8]) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// Reads a file.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Runs `program arguments` in this folder; a no-break space within an argument becomes a space.
    pub fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// The same, to be started otherwise.
    pub fn command(&self, line: &str) -> Command {
        let (program, arguments) = line.split_once(' ').unwrap();
        let executable = match program {
            "sft" => env!("CARGO_BIN_EXE_sft"),
            "reward" => env!("CARGO_BIN_EXE_reward"),
            "ppo" => env!("CARGO_BIN_EXE_ppo"),
            "sample" => env!("CARGO_BIN_EXE_sample"),
            "score" => env!("CARGO_BIN_EXE_score"),
            "evaluate" => env!("CARGO_BIN_EXE_evaluate"),
            "export" => env!("CARGO_BIN_EXE_export"),
            _ => panic!("no program {program}"),
        };
        let arguments = arguments.split_ascii_whitespace().map(|argument| argument.replace('\u{a0}', " "));
        let mut command = Command::new(executable);
        command.args(arguments).current_dir(self.folder.path());
        command
    }

    /// Runs it, expects that it succeeds, and gives what it printed on the standard output stream.
    pub fn succeed(&self, line: &str) -> String {
        let output = self.run(line);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {:?}\n{error}", output.status.code());
        String::from_utf8(output.stdout).unwrap()
    }

    /// The lines of a run's `metrics.jsonl`.
    pub fn metrics(&self, run: &str) -> Vec<BTreeMap<String, Value>> {
        let text = String::from_utf8(self.bytes(&format!("{run}/metrics.jsonl"))).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Runs `sft` as the tests do.
    pub fn sft(&self, output: &str, model: &str, more: &str) {
        self.succeed(&format!(
            "sft --model {model} --data demonstrations.parquet --output {output} --evaluation-share 0.2 --epochs 12 \
             --batch-size 4 --learning-rate 3e-3 {more}"
        ));
    }

    /// Runs `reward` as the tests do.
    pub fn reward(&self, output: &str, model: &str, more: &str) {
        self.succeed(&format!(
            "reward --model {model} --data rankings.parquet --demonstrations demonstrations.parquet --output {output} \
             --evaluation-share 0.2 --epochs 8 --batch-size 4 --learning-rate 3e-3 {more}"
        ));
    }

    /// Runs `ppo` as the tests do.
    pub fn ppo(&self, output: &str, model: &str, reward: &str, more: &str) {
        self.succeed(&format!(
            "ppo --model {model} --reward-model {reward} --data prompts.parquet --output {output} --batch-size 6 \
             --minibatches 2 --epochs 2 --response-length 8 --max-length 64 --learning-rate 1e-3 {more}"
        ));
    }
}

/// A number of a line of metrics.
pub fn number(line: &BTreeMap<String, Value>, name: &str) -> f64 {
    line.get(name).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {name} in {line:?}"))
}
