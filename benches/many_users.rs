//! Adapters of 64 users in one batch of 64, against one adapter of the same kind that all rows share: scoring a batch, and sampling.
//!
//! `cargo bench --bench many_users`

use std::time::Instant;

use candle_core::Device;
use clap::Parser;
use mimalloc::MiMalloc;
use rlhf::adapt::{Bases, Head, Role, Training};
use rlhf::data::batch::{Batch, Continuation, TokenTree};
use rlhf::generate::{Generation, PromptTokens, SamplingSettings, Stop, generate};
use rlhf::model::Model;
use rlhf::model::adapter::Pass;
use rlhf::model::folder::{WithoutWeights, open};
use rlhf::model::weight_files;
use rlhf::ops::BaseForm;
use rlhf::random;
use rlhf::settings::{Flags, Program, TrainingSettings, from_arguments};

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

const USERS: usize = 64;
const PROMPT: usize = 32;
const RESPONSE: usize = 32;
const VOCABULARY: u32 = 8192;
const ROUNDS: usize = 7;

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    training: TrainingSettings,
}

impl Program for Settings {
    fn flags() -> Flags<Self> {
        let training = TrainingSettings::flags().never(&["pooling", "probe_hidden_size"]);
        Flags::new().of(|settings| &settings.training, training)
    }
}

/// A model of SmolLM-135M's width and 8 of its 30 layers, with one stack of adapters for each user after its own empty one.
fn model(method: &str) -> rlhf::Result<Model> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {VOCABULARY}, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": true}}"#
    );
    std::fs::write(folder.path().join("config.json"), config).expect("the folder can be written to");
    let init: &[&str] = if method.contains("prompt") { &["--prompt-tuning-init", "random"] } else { &[] };
    let settings = from_arguments::<Settings>(["--method", method].iter().chain(init))?.training;
    // Only what is trained may start without weights.
    let (base, architecture, weights) =
        open(folder.path(), WithoutWeights::NewFromSeed(1), BaseForm::F32, &Device::Cpu)?;
    weight_files::write(folder.path(), &weights, &architecture, &base.form)?;
    let role = Role { folder: folder.path(), adapters: &[], training: Training::Frozen, head: Head::Language, seed: 1 };
    let mut bases = Bases::new(Device::Cpu);
    let base = bases.load(&role)?;
    let user = |index: usize| -> rlhf::Result<Model> {
        let model = bases.load(&Role { training: Training::With(&settings), seed: index as u64, ..role })?;
        for parameter in model.trainable_parameters() {
            let mut stream = random::stream(index as u64, &parameter.name, 0);
            parameter.variable.set(&random::normal(&mut stream, parameter.variable.dims(), 0.02, &Device::Cpu)?)?;
        }
        Ok(model)
    };
    let users = (0..USERS).map(user).collect::<rlhf::Result<Vec<_>>>()?;
    base.with_stacks_of(&users)?.frozen()
}

fn tokens(seed: usize, count: usize) -> Vec<u32> {
    use rand::Rng;
    let mut stream = random::stream(seed as u64, "tokens", 0);
    (0..count).map(|_| stream.random_range(0..VOCABULARY)).collect()
}

/// Seconds of one scored batch and of one sampled one; row `i` runs with `stack(i)`.
fn seconds(model: &Model, stack: impl Fn(usize) -> usize) -> rlhf::Result<[f64; 2]> {
    let trees: Vec<TokenTree> = (0..USERS)
        .map(|row| Continuation { tokens: tokens(row, PROMPT), learned: vec![true; PROMPT] })
        .map(|answer| TokenTree { prompt: Vec::new(), answers: vec![answer] })
        .collect();
    let started = Instant::now();
    let batch = Batch::pack_stacks(trees.iter().enumerate().map(|(row, tree)| (tree, stack(row))));
    let hidden = model.hidden(&batch, &Pass::default())?;
    model.log_probs(&hidden, &batch, 1.0)?;
    let scored = started.elapsed().as_secs_f64();
    let prompts: Vec<PromptTokens> =
        (0..USERS).map(|row| PromptTokens { tokens: tokens(row, PROMPT), stack: stack(row), origin: None }).collect();
    let generation = Generation {
        answers: 1,
        sampling: SamplingSettings { response_length: RESPONSE, ..SamplingSettings::default() },
        stop: Stop::default(),
        seed: 1,
        first: 0,
        tokens_per_pass: 4096,
    };
    let started = Instant::now();
    generate(model, &prompts, &generation)?;
    Ok([scored, started.elapsed().as_secs_f64()])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> rlhf::Result<()> {
    rlhf::ops::threads::leave_threads_to_rayon();
    println!(
        "batches of {USERS} rows, {PROMPT} tokens each, {RESPONSE} sampled; medians of {ROUNDS} rounds, side by side"
    );
    for method in ["lora", "prefix-tuning"] {
        let model = model(method)?;
        // Once to warm up, then in turn.
        seconds(&model, |_| 1)?;
        let rounds = (0..ROUNDS).map(|_| Ok((seconds(&model, |_| 1)?, seconds(&model, |row| row + 1)?)));
        let rounds = rounds.collect::<rlhf::Result<Vec<_>>>()?;
        for (index, what) in ["scoring", "sampling"].into_iter().enumerate() {
            let shared = median(rounds.iter().map(|(shared, _)| shared[index]).collect());
            let own = median(rounds.iter().map(|(_, own)| own[index]).collect());
            println!(
                "{method:<14} {what:<9} one shared {shared:.3} s, {USERS} of their own {own:.3} s: {:.2} times",
                own / shared
            );
        }
    }
    Ok(())
}
