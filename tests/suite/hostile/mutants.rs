//! Ten thousand broken inputs through the programs' own entry points: files of every kind, each broken in its own form from a seed.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rlhf::Error;
use rlhf::settings::{Program, from_arguments};

use super::seeds::{parquet_bytes, tables};
use super::tables::odd_table;
use crate::workbench::Workbench;
use crate::{forms, mutation};

/// Broken inputs.
const MUTANTS: usize = 10_000;
/// What one may take, on a machine that does other things too.
const DEADLINE: Duration = Duration::from_secs(60);
/// What the memory of the process may grow by while they run, other tests beside them.
const MEMORY: usize = 1 << 30;

type Change = fn(&mut Vec<u8>, &mut ChaCha8Rng);

/// A program that reads a file that is broken.
struct Case {
    line: &'static str,
    file: &'static str,
    change: Change,
    /// Of this many in all.
    share: usize,
}

const SFT: &str = "sft --model @sft --data @messages.parquet --output @out --max-steps 1 --batch-size 2 --evaluation-share 0 --quiet --max-length 64";
const ADAPTED: &str =
    "score --model @sft --adapter @adapter --data @completion.parquet --output @out.parquet --quiet --max-length 64";
const SCORE: &str = "score --model @sft --data @completion.parquet --output @out.parquet --quiet --max-length 64";
const REWARD: &str = "reward --model @sft --data @ranks.parquet --output @out --max-steps 1 --batch-size 2 --evaluation-share 0 --quiet --max-length 64";
const PPO: &str = "ppo --model @sft --reward-model @reward --data @prompts.parquet --output @out --max-steps 1 --batch-size 2 --minibatches 1 --epochs 1 --response-length 4 --max-length 32 --quiet";
const SAMPLE: &str =
    "sample --model @sft --data @prompts.parquet --output @out.parquet --response-length 4 --max-length 32 --quiet";
const EVALUATE: &str = "evaluate --models a=@sft --data @prompts.parquet --output @out --response-length 4 --max-length 32 --resamples 2 --quiet";
const SCORE_GGUF: &str =
    "score --model @model.gguf --data @completion.parquet --output @out.parquet --quiet --max-length 64";
const EXPORT_GGUF: &str = "export --model @model.gguf --output @out --quiet";
const EXPORT: &str = "export --model @sft --adapter @adapter --output @out --quiet";

/// The same of data in other forms than Parquet.
macro_rules! sft_of {
    ($data:literal) => {
        concat!(
            "sft --model @sft --data @",
            $data,
            " --output @out --max-steps 1 --batch-size 2 --evaluation-share 0 --quiet --max-length 64"
        )
    };
}
macro_rules! reward_of {
    ($data:literal) => {
        concat!(
            "reward --model @sft --data @",
            $data,
            " --output @out --max-steps 1 --batch-size 2 --evaluation-share 0 --quiet --max-length 64"
        )
    };
}
macro_rules! score_of {
    ($data:literal) => {
        concat!("score --model @sft --data @", $data, " --output @out.parquet --quiet --max-length 64")
    };
}
const SFT_LINES: &str = sft_of!("text.jsonl");
const SFT_GZIP: &str = sft_of!("text.jsonl.gz");
const SFT_ZSTD: &str = sft_of!("text.jsonl.zst");
const SCORE_ARRAY: &str = score_of!("completion.json");
const SCORE_CSV: &str = score_of!("completion.csv");
const SCORE_ARROW: &str = score_of!("completion.arrow");
const REWARD_CSV: &str = reward_of!("ranks.csv");
const REWARD_STREAM: &str = reward_of!("ranks.arrows");
const REWARD_LZ4: &str = reward_of!("ranks.lz4.arrow");

const fn case(line: &'static str, file: &'static str, change: Change, share: usize) -> Case {
    Case { line, file, change, share }
}

const CASES: [Case; 42] = [
    case(SFT, "messages.parquet", mutation::parquet, 8),
    case(REWARD, "ranks.parquet", mutation::parquet, 6),
    case(SCORE, "completion.parquet", mutation::parquet, 6),
    case(SAMPLE, "prompts.parquet", mutation::parquet, 3),
    case(EVALUATE, "prompts.parquet", mutation::parquet, 3),
    case(PPO, "prompts.parquet", mutation::parquet, 3),
    case(SFT, "messages.parquet", odd_table, 6),
    case(REWARD, "ranks.parquet", odd_table, 6),
    case(SCORE, "completion.parquet", odd_table, 6),
    case(SAMPLE, "prompts.parquet", odd_table, 2),
    case(EVALUATE, "prompts.parquet", odd_table, 2),
    case(PPO, "prompts.parquet", odd_table, 2),
    case(SFT_LINES, "text.jsonl", mutation::json_rows, 8),
    case(SCORE_ARRAY, "completion.json", mutation::json_rows, 6),
    case(REWARD_CSV, "ranks.csv", mutation::csv, 6),
    case(SCORE_CSV, "completion.csv", mutation::csv, 4),
    case(SCORE_ARROW, "completion.arrow", mutation::arrow_ipc, 6),
    case(REWARD_STREAM, "ranks.arrows", mutation::arrow_ipc, 6),
    case(REWARD_LZ4, "ranks.lz4.arrow", mutation::arrow_ipc, 3),
    case(SFT_GZIP, "text.jsonl.gz", mutation::compressed, 4),
    case(SFT_ZSTD, "text.jsonl.zst", mutation::compressed, 4),
    case(SCORE, "sft/config.json", mutation::json_text, 6),
    case(SAMPLE, "sft/config.json", mutation::json_text, 3),
    case(EXPORT, "sft/config.json", mutation::json_text, 2),
    case(SCORE, "sft/model.safetensors", mutation::safetensors, 6),
    case(SAMPLE, "sft/model.safetensors", mutation::safetensors, 2),
    case(SCORE_GGUF, "model.gguf", mutation::gguf, 6),
    case(EXPORT_GGUF, "model.gguf", mutation::gguf, 3),
    case(SCORE, "sft/tokenizer.json", mutation::json_text, 6),
    case(SFT, "sft/tokenizer.json", mutation::json_text, 2),
    case(SAMPLE, "sft/tokenizer.json", mutation::json_text, 2),
    case(SFT, "sft/tokenizer_config.json", mutation::json_text, 3),
    case(SFT, "sft/chat_template.jinja", mutation::text, 8),
    case(ADAPTED, "adapter/adapter_config.json", mutation::json_text, 6),
    case(ADAPTED, "adapter/adapter_model.safetensors", mutation::safetensors, 6),
    case(EXPORT, "adapter/adapter_config.json", mutation::json_text, 2),
    case(EXPORT, "adapter/adapter_model.safetensors", mutation::safetensors, 2),
    case(PPO, "reward/head.json", mutation::json_text, 1),
    case(PPO, "reward/model.safetensors", mutation::safetensors, 1),
    case(SFT, "settings.toml", mutation::text, 3),
    case(PPO, "settings.toml", mutation::text, 3),
    case(EVALUATE, "settings.toml", mutation::text, 3),
];

fn with<S: Program>(arguments: &[String], main: impl FnOnce(&S) -> rlhf::Result<()>) -> rlhf::Result<()> {
    from_arguments(arguments).and_then(|settings| main(&settings))
}

/// Runs a program as its `main` does.
fn run(line: &str, folder: &Path, settings_alone: bool) -> rlhf::Result<()> {
    let path = |word: &str| word.replace('@', &format!("{}/", folder.display()));
    let mut words = line.split(' ').map(path);
    let program = words.next().unwrap_or_default();
    let mut arguments: Vec<String> = words.collect();
    if settings_alone {
        arguments.extend(["--settings".to_string(), path("@settings.toml")]);
    }
    // Settings of a file may be sound and ask for a week's work: those are read and checked, no more.
    let go = !settings_alone;
    match program.as_str() {
        "sft" => with(&arguments, |settings| if go { rlhf::sft::run(settings).map(drop) } else { Ok(()) }),
        "reward" => with(&arguments, |settings| rlhf::reward::run(settings).map(drop)),
        "ppo" => with(
            &arguments,
            |settings: &rlhf::ppo::settings::PpoSettings| {
                if go { rlhf::ppo::run(settings) } else { settings.resolved().check() }
            },
        ),
        "sample" => with(&arguments, |settings| rlhf::sample::run(settings).map(drop)),
        "score" => with(&arguments, |settings| rlhf::score::run(settings).map(drop)),
        "evaluate" => with(
            &arguments,
            |settings: &rlhf::evaluate::EvaluateSettings| {
                if go { rlhf::evaluate::run(settings).map(drop) } else { Ok(()) }
            },
        ),
        "export" => with(&arguments, |settings| rlhf::export::run(settings).map(drop)),
        other => panic!("no program {other}"),
    }
}

/// Files of rows in other forms than Parquet.
const OTHER_FORMS: [&str; 9] = [
    "text.jsonl",
    "text.jsonl.gz",
    "text.jsonl.zst",
    "completion.json",
    "completion.csv",
    "completion.arrow",
    "ranks.csv",
    "ranks.arrows",
    "ranks.lz4.arrow",
];

/// A folder with all that the programs read.
fn whole_inputs() -> Workbench {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--max-steps 1");
    bench.reward("reward", "sft", "--max-steps 1");
    bench.sft("adapter", "sft", "--method lora --max-steps 1");
    for (index, (name, rows)) in tables().into_iter().enumerate() {
        bench.put(&format!("{name}.parquet"), &parquet_bytes(&rows, index));
        for file in OTHER_FORMS.iter().filter_map(|file| file.strip_prefix(&format!("{name}."))) {
            bench.put(&format!("{name}.{file}"), &forms::bytes(&rows, file));
        }
    }
    let template = "{% for message in messages %}<{{ message.role }}>{{ message['content'] | trim }}</s>{% endfor %}\
                    {% if add_generation_prompt %}<assistant>{% endif %}";
    bench.put("sft/chat_template.jinja", template.as_bytes());
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/sentencepiece.gguf");
    bench.put("model.gguf", &std::fs::read(gguf).unwrap());
    bench.put("settings.toml", b"learning-rate = 1e-3\nseed = 3\ntokens_per_batch = 512\nresponse-length = 4\n");
    bench
}

/// Copies the files that the cases need.
fn copy_inputs(from: &Path, to: &Path) {
    let tokenizer = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    let of = |folder: &str, names: &[&str]| names.iter().map(|name| format!("{folder}/{name}")).collect::<Vec<_>>();
    let mut files = ["messages", "ranks", "completion", "prompts"].map(|name| format!("{name}.parquet")).to_vec();
    files.extend(OTHER_FORMS.map(str::to_owned));
    files.extend(of("sft", &[&tokenizer[..], &["chat_template.jinja"]].concat()));
    files.extend(of("reward", &[&tokenizer[..], &["head.json"]].concat()));
    files.extend(of("adapter", &["adapter_config.json", "adapter_model.safetensors"]));
    files.extend(["model.gguf", "settings.toml"].map(str::to_owned));
    for file in files {
        let target = to.join(&file);
        std::fs::create_dir_all(target.parent().expect("a file lies in a folder")).unwrap();
        std::fs::copy(from.join(&file), target).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
}

/// What is wrong with how a program took a broken file, if anything is.
fn fault(case: &Case, outcome: &rlhf::Result<()>) -> Option<String> {
    let error = outcome.as_ref().err()?;
    let sentence = error.to_string();
    let folder = case.file.split_once('/').map(|(folder, _)| format!("/{folder}"));
    let named = sentence.contains(case.file) || folder.is_some_and(|folder| sentence.contains(&folder));
    // A base that was broken into another sound one and an adapter do not fit each other: it is the adapter that is named.
    let misfits = case.line.contains("@adapter") && case.file.starts_with("sft/");
    let named = named || misfits && sentence.contains("/adapter/");
    match error {
        Error::Tensor(_) => Some(format!("not a sentence: {sentence}")),
        _ if sentence.contains('\n') => Some(format!("more than a line: {sentence}")),
        _ if sentence.len() > 2000 => {
            Some(format!("{} bytes long: {}", sentence.len(), sentence.chars().take(500).collect::<String>()))
        }
        _ if !named => Some(format!("names no file: {sentence}")),
        _ => None,
    }
}

/// Breaks the file of a mutant's case, and says what is wrong with what came of it.
fn run_mutant(mutant: usize, folder: &Path) -> Option<String> {
    let total: usize = CASES.iter().map(|case| case.share).sum();
    let mut place = mutant % total;
    let case = CASES.iter().find(|case| match place.checked_sub(case.share) {
        Some(rest) => {
            place = rest;
            false
        }
        None => true,
    })?;
    let path = folder.join(case.file);
    let whole = std::fs::read(&path).unwrap();
    let mut broken = whole.clone();
    (case.change)(&mut broken, &mut ChaCha8Rng::seed_from_u64(mutant as u64));
    std::fs::write(&path, &broken).unwrap();
    let (sender, receiver) = channel();
    let own = folder.to_path_buf();
    let line = case.line;
    let settings_alone = case.file == "settings.toml";
    let thread = std::thread::spawn(move || drop(sender.send(run(line, &own, settings_alone))));
    let fault = match receiver.recv_timeout(DEADLINE) {
        Ok(outcome) => fault(case, &outcome),
        Err(RecvTimeoutError::Timeout) => Some(format!("not done after {DEADLINE:?}")),
        Err(RecvTimeoutError::Disconnected) => {
            let panic = thread.join().expect_err("the sender was dropped");
            let message = panic.downcast_ref::<String>().cloned();
            let message = message.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
            Some(format!("a panic: {}", message.unwrap_or_default()))
        }
    };
    std::fs::write(&path, &whole).unwrap();
    for name in ["out", "out.parquet"] {
        let path = folder.join(name);
        drop(if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) });
    }
    fault.map(|fault| format!("mutant {mutant}, {} ({line}): {fault}", case.file))
}

/// The most memory that the process has held, in bytes; 0 where the system does not say.
fn peak_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<usize>().ok()).unwrap_or(0) << 10
}

/// In a process of its own, so that the memory that is measured is that of the mutants.
#[test]
fn ten_thousand_broken_inputs_end_in_a_sentence() {
    const ALONE: &str = "RLHF_MUTANTS_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = "hostile::mutants::ten_thousand_broken_inputs_end_in_a_sentence";
        let mut alone = Command::new(std::env::current_exe().unwrap());
        let output = alone.args(["--exact", name, "--nocapture"]).env(ALONE, "yes").output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        return assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    }
    let inputs = whole_inputs();
    let memory = peak_memory();
    let (next, faults) = (AtomicUsize::new(0), std::sync::Mutex::new(Vec::new()));
    let only: Option<usize> = std::env::var("RLHF_MUTANT").ok().and_then(|mutant| mutant.parse().ok());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let shared = Path::new("/dev/shm");
                let parent = if shared.is_dir() { shared.to_path_buf() } else { std::env::temp_dir() };
                let folder = tempfile::tempdir_in(parent).unwrap();
                copy_inputs(&inputs.path(""), folder.path());
                loop {
                    let mutant = next.fetch_add(1, Ordering::Relaxed);
                    if mutant >= MUTANTS || faults.lock().unwrap().len() >= 40 {
                        break;
                    }
                    if only.is_none_or(|only| only == mutant) {
                        faults.lock().unwrap().extend(run_mutant(mutant, folder.path()));
                    }
                }
            });
        }
    });
    let faults: Vec<String> = faults.into_inner().unwrap();
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));
    let growth = peak_memory().saturating_sub(memory);
    assert!(growth < MEMORY, "memory grew by {} MiB", growth >> 20);
}
