//! One training step of a GPT-2 of 17 million parameters, by this crate's model and by candle's own operations.
//!
//! 6 layers, width 384, 6 heads, vocabulary 8192 (tied), 8 sequences of 256 tokens: once with all weights trained, once with LoRA of
//! rank 8 on every linear. Ours is what the programs run: [`Model`], [`Batch`] and [`Optimizer`]. Each side has a process of its own, so that its
//! peak memory and its threads are its own; both start from the same weights, and the losses of their first steps are checked to
//! agree. Processor time says less than the clock on a quiet machine, and more on a busy one.
//!
//! `cargo bench --bench training_step`

use std::collections::BTreeMap;
use std::time::Duration;

use candle_core::{D, Device, Result, Tensor, Var};
use candle_nn::optim::{AdamW, Optimizer as _, ParamsAdamW};
use criterion::{Criterion, SamplingMode};
use rlhf::adapt::{Bases, Head, Role, Training};
use rlhf::data::batch::{Batch, Continuation, TokenTree};
use rlhf::model::Model;
use rlhf::model::adapter::{Parameter, Pass};
use rlhf::ops::Outputs;
use rlhf::settings::{Flags, OptimizerSettings, Program, TrainingSettings, from_arguments};
use rlhf::train::optimizer::Optimizer;

// The programs use it, and it helps candle's own operations more than ours.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const LAYERS: usize = 6;
const WIDTH: usize = 384;
const HEADS: usize = 6;
const VOCABULARY: usize = 8192;
const SEQUENCES: usize = 8;
const LENGTH: usize = 256;
const LEARNING_RATE: f64 = 1e-4;
const ALONE: &str = "TRAINING_STEP_ALONE";

#[derive(Clone, Copy, PartialEq, Debug)]
enum Method {
    Full,
    Lora,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Side {
    Ours,
    Candle,
}

/// Token ids `[SEQUENCES][LENGTH]`.
fn sequences() -> Vec<Vec<u32>> {
    let token = |index: usize| (index * 7919 % VOCABULARY) as u32;
    (0..SEQUENCES).map(|row| (0..LENGTH).map(|column| token(row * LENGTH + column)).collect()).collect()
}

mod ours {
    use super::*;

    #[derive(clap::Parser)]
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

    /// The settings of both sides: no clipping and no weight decay, which candle's optimizer has not, or has for norms too.
    fn settings(method: Method) -> TrainingSettings {
        let method = format!("{method:?}").to_lowercase();
        let optimizer = ["--beta2", "0.999", "--max-gradient-norm", "0", "--weight-decay", "0"];
        let lora: &[&str] = match method.as_str() {
            "lora" => &["--target-modules", "all-linear", "--lora-alpha", "16"],
            _ => &[],
        };
        let arguments = ["--method", &method].into_iter().chain(optimizer).chain(lora.iter().copied());
        from_arguments::<Settings>(arguments).expect("valid arguments").training
    }

    /// A new model, made as the programs make one from a bare `config.json`.
    pub fn model(method: Method) -> rlhf::Result<(Model, OptimizerSettings)> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let config = format!(
            r#"{{"model_type": "gpt2", "vocab_size": {VOCABULARY}, "n_embd": {WIDTH}, "n_layer": {LAYERS}, "n_head": {HEADS},
            "n_positions": {LENGTH}, "initializer_range": 0.05}}"#
        );
        std::fs::write(folder.path().join("config.json"), config).expect("the folder can be written to");
        let settings = settings(method);
        let training = Training::With(&settings);
        let role = Role { folder: folder.path(), adapters: &[], training, head: Head::Language, seed: 1 };
        Ok((Bases::new(Device::Cpu).load(&role)?, settings.optimizer.clone()))
    }

    /// Forward, backward and update, as in a step of `sft`; gives the loss.
    pub fn step(model: &Model, optimizer: &mut Optimizer) -> rlhf::Result<f32> {
        let trees: Vec<TokenTree> = (sequences().into_iter())
            .map(|tokens| Continuation { learned: vec![true; tokens.len()], tokens })
            .map(|answer| TokenTree { prompt: Vec::new(), answers: vec![answer] })
            .collect();
        let batch = Batch::pack(&trees);
        let hidden = model.hidden(&batch, &Pass::default())?; // [tokens, d_model]
        let log_probs = model.log_probs(&hidden, &batch, 1.0)?.log_probs; // [targets]
        let mut outputs = Outputs::default();
        let loss = outputs.tensor(&log_probs)?.mean_all()?.neg()?;
        optimizer.backward(&loss, outputs)?;
        optimizer.step(LEARNING_RATE)?;
        Ok(loss.to_scalar()?)
    }
}

/// The same with candle's differentiable operations, as a model written with candle has them.
mod candle {
    use super::*;
    use candle_nn::Module;

    pub struct Gpt2 {
        tensors: BTreeMap<String, Tensor>,
        pub variables: Vec<Var>,
    }

    impl Gpt2 {
        /// With the weights of ours.
        pub fn copy(model: &Model) -> rlhf::Result<Self> {
            let mut copy = Gpt2 { tensors: BTreeMap::new(), variables: Vec::new() };
            for (name, tensor) in model.weights().iter() {
                copy.tensors.insert(name.clone(), tensor.detach().copy()?);
            }
            for Parameter { name, variable, .. } in model.trainable_parameters() {
                let variable = Var::from_tensor(&variable.as_tensor().copy()?)?;
                let name = name.trim_start_matches("base_model.model.").to_string();
                copy.tensors.insert(name, variable.as_tensor().clone());
                copy.variables.push(variable);
            }
            Ok(copy)
        }

        fn tensor(&self, name: &str) -> Tensor {
            self.tensors[name].clone()
        }

        fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
            let part = |weight: Tensor, bias, x: &Tensor| candle_nn::Linear::new(weight, bias).forward(x);
            let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
            let y = part(self.tensor(&weight), Some(self.tensor(&bias)), x)?;
            let Some(a) = self.tensors.get(&format!("{name}.lora_A.weight")) else { return Ok(y) };
            let b = self.tensor(&format!("{name}.lora_B.weight"));
            y + (part(b, None, &part(a.clone(), None, x)?)? * 2.0)? // alpha 16 / rank 8
        }

        fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
            let (weight, bias) = (self.tensor(&format!("{name}.weight")), self.tensor(&format!("{name}.bias")));
            candle_nn::ops::layer_norm_slow(x, &weight, &bias, 1e-5)
        }

        /// The mean cross-entropy.
        pub fn loss(&self) -> Result<Tensor> {
            let tokens = Tensor::new(sequences(), &Device::Cpu)?; // [sequences, length]
            let embeddings = self.tensor("transformer.wte.weight"); // [vocabulary, width]
            let embedded = candle_nn::Embedding::new(embeddings.clone(), WIDTH).forward(&tokens)?;
            let mut x = embedded.broadcast_add(&self.tensor("transformer.wpe.weight"))?; // [sequences, length, width]
            let mask: Vec<f32> =
                (0..LENGTH * LENGTH).map(|i| if i % LENGTH > i / LENGTH { f32::NEG_INFINITY } else { 0.0 }).collect();
            let mask = Tensor::from_vec(mask, (LENGTH, LENGTH), &Device::Cpu)?;
            for layer in 0..LAYERS {
                let name = |part: &str| format!("transformer.h.{layer}.{part}");
                let qkv = self.linear(&name("attn.c_attn"), &self.norm(&name("ln_1"), &x)?)?;
                x = (x + self.linear(&name("attn.c_proj"), &attention(&qkv, &mask)?)?)?;
                let inner = self.linear(&name("mlp.c_fc"), &self.norm(&name("ln_2"), &x)?)?.gelu()?;
                x = (&x + self.linear(&name("mlp.c_proj"), &inner)?)?;
            }
            // Every token but the first of a sequence is predicted.
            let hidden = self.norm("transformer.ln_f", &x)?.narrow(1, 0, LENGTH - 1)?.flatten(0, 1)?.contiguous()?;
            let logits = hidden.matmul(&embeddings.t()?)?; // [targets, vocabulary]
            candle_nn::loss::cross_entropy(&logits, &tokens.narrow(1, 1, LENGTH - 1)?.flatten_all()?)
        }
    }

    fn attention(qkv: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let heads = |part: usize| {
            let part = qkv.narrow(D::Minus1, part * WIDTH, WIDTH)?;
            part.reshape((SEQUENCES, LENGTH, HEADS, WIDTH / HEADS))?.transpose(1, 2)?.contiguous()
        };
        let (q, k, v) = (heads(0)?, heads(1)?, heads(2)?); // [sequences, heads, length, head_dim]
        let scores = (q.matmul(&k.t()?)? / ((WIDTH / HEADS) as f64).sqrt())?;
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(mask)?, D::Minus1)?;
        weights.matmul(&v)?.transpose(1, 2)?.reshape((SEQUENCES, LENGTH, WIDTH))
    }
}

enum Learner {
    Ours { model: Box<Model>, optimizer: Optimizer },
    Candle { model: candle::Gpt2, optimizer: AdamW },
}

impl Learner {
    fn new(side: Side, method: Method) -> rlhf::Result<Self> {
        let (model, settings) = ours::model(method)?;
        Ok(match side {
            Side::Ours => Learner::Ours {
                optimizer: Optimizer::new(model.trainable_parameters(), &settings)?,
                model: Box::new(model),
            },
            Side::Candle => {
                let model = candle::Gpt2::copy(&model)?;
                let settings = ParamsAdamW { lr: LEARNING_RATE, weight_decay: 0.0, ..Default::default() };
                Learner::Candle { optimizer: AdamW::new(model.variables.clone(), settings)?, model }
            }
        })
    }

    /// Forward, backward and update; gives the loss.
    fn step(&mut self) -> rlhf::Result<f32> {
        match self {
            Learner::Ours { model, optimizer } => ours::step(model, optimizer),
            Learner::Candle { model, optimizer } => {
                let loss = model.loss()?;
                optimizer.backward_step(&loss)?;
                Ok(loss.to_scalar()?)
            }
        }
    }
}

/// The processor time that this process has used, in seconds, as Linux counts it (100 ticks a second).
fn processor_time() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = status.rsplit(')').next()?.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / 100.0)
}

/// Measures one side in this process; the last line that it prints are the losses of the first steps.
fn measure(side: Side, method: Method) -> rlhf::Result<()> {
    if side == Side::Ours {
        // As the programs do; candle's own operations keep their pool.
        rlhf::ops::threads::leave_threads_to_rayon();
    }
    let mut learner = Learner::new(side, method)?;
    let first = learner.step()?;
    let start = processor_time();
    let (second, third) = (learner.step()?, learner.step()?);
    let seconds = processor_time().zip(start).map_or(f64::NAN, |(end, start)| (end - start) / 2.0);
    let peak = rlhf::train::metrics::peak_rss_mb().unwrap_or(f64::NAN);
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group(format!("training step, {method:?}"));
    group.sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(20));
    group.sampling_mode(SamplingMode::Flat);
    group.bench_function(format!("{side:?}"), |bencher| bencher.iter(|| learner.step().expect("a step")));
    group.finish();
    println!("peak memory {peak:.0} MB, processor time {seconds:.2} s a step");
    println!("{first} {second} {third}");
    Ok(())
}

/// Runs this program again for one side; gives the losses of its first steps.
fn measure_alone(side: Side, method: Method) -> Vec<f32> {
    let program = std::env::current_exe().expect("the path of this program");
    let mut command = std::process::Command::new(program);
    command.args(std::env::args_os().skip(1)).env(ALONE, format!("{side:?} {method:?}"));
    let output = command.stderr(std::process::Stdio::inherit()).output().expect("a second process");
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{}", text.trim_end());
    let losses = text.trim_end().lines().last().unwrap_or_default();
    losses.split(' ').map(|loss| loss.parse().expect("a loss")).collect()
}

fn main() {
    let wanted = std::env::var(ALONE).ok();
    for method in [Method::Full, Method::Lora] {
        if wanted.is_none() {
            let losses = [Side::Ours, Side::Candle].map(|side| measure_alone(side, method));
            for (ours, candle) in losses[0].iter().zip(&losses[1]) {
                assert!((ours - candle).abs() < 1e-3, "the two sides train to different losses: {losses:?}");
            }
        }
        for side in [Side::Ours, Side::Candle] {
            if wanted.as_deref() == Some(&format!("{side:?} {method:?}")) {
                measure(side, method).expect("training");
            }
        }
    }
}
