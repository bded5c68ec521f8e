//! One training step of a GPT-2 of 17 million parameters, by this crate's operations and by candle's own.
//!
//! 6 layers, width 384, 6 heads, vocabulary 8192 (tied), 8 sequences of 256 tokens: once with all weights trained, once with LoRA of
//! rank 8 on every linear. Both sides start from the same weights, and their first losses are checked to agree. After the
//! times, each side's peak memory and processor time are measured in a process of its own (processor time says less than the
//! clock on a quiet machine, and more on a busy one).
//!
//! `cargo bench --bench training_step`

use std::time::Duration;

use candle_core::{D, Device, Result, Tensor, Var};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};
use criterion::{Criterion, criterion_group};
use rlhf::ops::{self, Activation, AdamwState, AdamwStep, AttentionPlan, AttentionShape, LowRank, Query, Span};
use rlhf::random;

// The programs use it, and it helps candle's own operations more than ours.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const LAYERS: usize = 6;
const WIDTH: usize = 384;
const HEADS: usize = 6;
const VOCABULARY: usize = 8192;
const SEQUENCES: usize = 8;
const LENGTH: usize = 256;
const RANK: usize = 8;
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

/// A linear with, under LoRA, its low-rank update: `x Wᵀ + b + (x Aᵀ) Bᵀ`.
struct Linear {
    weight: Tensor,
    bias: Tensor,
    update: Option<(Tensor, Tensor)>,
}

struct Norm {
    weight: Tensor,
    bias: Tensor,
}

struct Block {
    norms: [Norm; 2],
    attention_input: Linear,
    attention_output: Linear,
    up: Linear,
    down: Linear,
}

struct Gpt2 {
    embeddings: Tensor,
    positions: Tensor,
    blocks: Vec<Block>,
    final_norm: Norm,
    variables: Vec<Var>,
}

/// Makes parameters: variables or constants.
struct Maker {
    method: Method,
    stream: random::Stream,
    variables: Vec<Var>,
}

impl Maker {
    fn parameter(&mut self, shape: &[usize], mean: f64, deviation: f64, trainable: bool) -> Tensor {
        let values = random::normal(&mut self.stream, shape, deviation, &Device::Cpu).expect("random numbers");
        let values = values.affine(1.0, mean).expect("a mean");
        if !trainable {
            return values;
        }
        self.variables.push(Var::from_tensor(&values).expect("a variable"));
        self.variables[self.variables.len() - 1].as_tensor().clone()
    }

    fn linear(&mut self, d_in: usize, d_out: usize) -> Linear {
        let full = self.method == Method::Full;
        let weight = self.parameter(&[d_out, d_in], 0.0, 0.05, full);
        let bias = self.parameter(&[d_out], 0.0, 0.05, full);
        let update = (!full)
            .then(|| (self.parameter(&[RANK, d_in], 0.0, 0.05, true), self.parameter(&[d_out, RANK], 0.0, 0.05, true)));
        Linear { weight, bias, update }
    }

    fn norm(&mut self) -> Norm {
        let full = self.method == Method::Full;
        Norm { weight: self.parameter(&[WIDTH], 1.0, 0.1, full), bias: self.parameter(&[WIDTH], 0.0, 0.1, full) }
    }
}

impl Gpt2 {
    fn new(method: Method) -> Self {
        let mut maker = Maker { method, stream: random::stream(1, "benchmark", 0), variables: Vec::new() };
        let full = method == Method::Full;
        let embeddings = maker.parameter(&[VOCABULARY, WIDTH], 0.0, 0.05, full);
        let positions = maker.parameter(&[LENGTH, WIDTH], 0.0, 0.05, full);
        let blocks = (0..LAYERS)
            .map(|_| Block {
                norms: [maker.norm(), maker.norm()],
                attention_input: maker.linear(WIDTH, 3 * WIDTH),
                attention_output: maker.linear(WIDTH, WIDTH),
                up: maker.linear(WIDTH, 4 * WIDTH),
                down: maker.linear(4 * WIDTH, WIDTH),
            })
            .collect();
        let final_norm = maker.norm();
        Gpt2 { embeddings, positions, blocks, final_norm, variables: maker.variables }
    }
}

/// Token ids, and of each its successor.
fn tokens() -> (Vec<u32>, Vec<u32>) {
    let tokens: Vec<u32> = (0..SEQUENCES * LENGTH + 1).map(|index| (index * 7919 % VOCABULARY) as u32).collect();
    (tokens[..SEQUENCES * LENGTH].to_vec(), tokens[1..].to_vec())
}

/// The mean cross-entropy by this crate's operations, on a flat stream of tokens.
mod ours {
    use super::*;

    fn linear(linear: &Linear, x: &Tensor) -> rlhf::Result<Tensor> {
        let Linear { weight, bias, update } = linear;
        match update {
            Some((a, b)) => ops::low_rank_linear(x, weight, Some(bias), &LowRank { a, b, scale: 1.0, dropout: None }),
            None => ops::linear(x, weight, Some(bias)),
        }
    }

    fn norm(norm: &Norm, x: &Tensor) -> rlhf::Result<Tensor> {
        ops::layer_norm(x, &norm.weight, &norm.bias, 1e-5)
    }

    pub fn loss(model: &Gpt2) -> rlhf::Result<Tensor> {
        let (tokens, targets) = tokens();
        let span = |index| Span { start: index * LENGTH, len: LENGTH };
        let queries = (0..SEQUENCES).map(|index| Query { rows: span(index), keys: vec![span(index)] }).collect();
        let plan = AttentionPlan { queries };
        let head_dim = WIDTH / HEADS;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let shape = AttentionShape { heads: HEADS, kv_heads: HEADS, head_dim, scale, window: None, causal: true };
        let positions: Vec<u32> = (0..SEQUENCES).flat_map(|_| 0..LENGTH as u32).collect();
        let embedded = model.embeddings.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?;
        let mut x = (embedded + model.positions.index_select(&Tensor::new(positions, &Device::Cpu)?, 0)?)?; // [tokens, width]
        for block in &model.blocks {
            let qkv = linear(&block.attention_input, &norm(&block.norms[0], &x)?)?;
            x = (x + linear(&block.attention_output, &ops::attention_packed(&qkv, &shape, &plan)?)?)?;
            let inner = linear(&block.up, &norm(&block.norms[1], &x)?)?;
            x = (x + linear(&block.down, &ops::activate(&inner, Activation::GeluTanh)?)?)?;
        }
        let hidden = norm(&model.final_norm, &x)?;
        Ok(ops::log_probs(&hidden, &model.embeddings, &targets, 1.0)?.log_probs.mean_all()?.neg()?)
    }
}

/// The same by candle's differentiable operations, as a model written with candle has them.
mod candle {
    use super::*;

    fn linear(linear: &Linear, x: &Tensor) -> Result<Tensor> {
        let y =
            candle_nn::Module::forward(&candle_nn::Linear::new(linear.weight.clone(), Some(linear.bias.clone())), x)?;
        Ok(match &linear.update {
            Some((a, b)) => {
                let part = |weight: &Tensor, x: &Tensor| {
                    candle_nn::Module::forward(&candle_nn::Linear::new(weight.clone(), None), x)
                };
                (y + part(b, &part(a, x)?)?)?
            }
            None => y,
        })
    }

    fn norm(norm: &Norm, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::layer_norm_slow(x, &norm.weight, &norm.bias, 1e-5)
    }

    pub fn loss(model: &Gpt2) -> Result<Tensor> {
        let (tokens, targets) = tokens();
        let tokens = Tensor::from_vec(tokens, (SEQUENCES, LENGTH), &Device::Cpu)?;
        let embedded =
            candle_nn::Module::forward(&candle_nn::Embedding::new(model.embeddings.clone(), WIDTH), &tokens)?;
        let mut x = embedded.broadcast_add(&model.positions)?; // [sequences, length, width]
        let mask: Vec<f32> =
            (0..LENGTH * LENGTH).map(|i| if i % LENGTH > i / LENGTH { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (LENGTH, LENGTH), &Device::Cpu)?;
        for block in &model.blocks {
            let qkv = linear(&block.attention_input, &norm(&block.norms[0], &x)?)?;
            x = (x + linear(&block.attention_output, &attention(&qkv, &mask)?)?)?;
            x = (&x + linear(&block.down, &linear(&block.up, &norm(&block.norms[1], &x)?)?.gelu()?)?)?;
        }
        let hidden = norm(&model.final_norm, &x)?.flatten(0, 1)?;
        let logits = hidden.matmul(&model.embeddings.t()?)?; // [tokens, vocabulary]
        candle_nn::loss::cross_entropy(&logits, &Tensor::new(targets, &Device::Cpu)?)
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

enum Training {
    Ours { model: Gpt2, states: Vec<AdamwState>, step: u64 },
    Candle { model: Gpt2, optimizer: AdamW },
}

impl Training {
    fn new(side: Side, method: Method) -> rlhf::Result<Self> {
        let model = Gpt2::new(method);
        Ok(match side {
            Side::Ours => {
                let states = model.variables.iter().map(|_| AdamwState::default()).collect();
                Training::Ours { model, states, step: 0 }
            }
            Side::Candle => {
                let settings = ParamsAdamW { lr: LEARNING_RATE, ..Default::default() };
                let optimizer = AdamW::new(model.variables.clone(), settings)?;
                Training::Candle { model, optimizer }
            }
        })
    }

    /// Forward, backward and update; gives the loss.
    fn step(&mut self) -> rlhf::Result<f32> {
        match self {
            Training::Ours { model, states, step } => {
                let loss = ours::loss(model)?;
                let gradients = loss.backward()?;
                *step += 1;
                let update = AdamwStep {
                    learning_rate: LEARNING_RATE,
                    beta1: 0.9,
                    beta2: 0.999,
                    epsilon: 1e-8,
                    weight_decay: 0.01,
                    step: *step,
                    gradient_scale: 1.0,
                };
                for (variable, state) in model.variables.iter().zip(states) {
                    let gradient = gradients.get(variable).expect("every variable has a gradient");
                    ops::adamw(variable, gradient, state, &update)?;
                }
                Ok(loss.to_scalar()?)
            }
            Training::Candle { model, optimizer } => {
                let loss = candle::loss(model)?;
                optimizer.backward_step(&loss)?;
                Ok(loss.to_scalar()?)
            }
        }
    }
}

fn times(criterion: &mut Criterion) {
    for method in [Method::Full, Method::Lora] {
        let mut trainings =
            [Side::Ours, Side::Candle].map(|side| (side, Training::new(side, method).expect("a model")));
        let losses = trainings.each_mut().map(|(_, training)| [0, 1].map(|_| training.step().expect("a step")));
        let difference = (losses[0][1] - losses[1][1]).abs();
        assert!(difference < 1e-3, "the two sides train to different losses: {losses:?}");
        let mut group = criterion.benchmark_group(format!("training step, {method:?}"));
        group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(20));
        for (side, training) in &mut trainings {
            group.bench_function(format!("{side:?}"), |bencher| bencher.iter(|| training.step().expect("a step")));
        }
        group.finish();
    }
}

criterion_group!(benches, times);

/// The most memory this process has held, in MiB, as Linux counts it.
fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
}

/// The processor time that this process has used, in seconds, as Linux counts it (100 ticks a second).
fn processor_time() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = status.rsplit(')').next()?.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
    Some((ticks(11)? + ticks(12)?) / 100.0)
}

/// Trains a few steps and prints what they took.
fn train_alone(side: Side, method: Method) -> rlhf::Result<()> {
    const STEPS: usize = 4;
    let mut training = Training::new(side, method)?;
    training.step()?;
    let start = processor_time();
    for _ in 1..STEPS {
        training.step()?;
    }
    let seconds = processor_time().zip(start).map_or(f64::NAN, |(end, start)| (end - start) / (STEPS - 1) as f64);
    println!("peak memory {:.0} MiB, processor time {seconds:.2} s a step", peak_memory().unwrap_or(f64::NAN));
    Ok(())
}

/// Runs this program again for every side and method, to see what each takes in a process of its own.
fn alone() {
    for method in [Method::Full, Method::Lora] {
        for side in [Side::Ours, Side::Candle] {
            let program = std::env::current_exe().expect("the path of this program");
            let name = format!("{side:?} {method:?}");
            let output = std::process::Command::new(program).env(ALONE, &name).output().expect("a second process");
            println!("{name}: {}", String::from_utf8_lossy(&output.stdout).trim());
        }
    }
}

fn main() {
    let Ok(wanted) = std::env::var(ALONE) else {
        benches();
        alone();
        Criterion::default().configure_from_args().final_summary();
        return;
    };
    for method in [Method::Full, Method::Lora] {
        for side in [Side::Ours, Side::Candle] {
            if wanted == format!("{side:?} {method:?}") {
                train_alone(side, method).expect("training");
            }
        }
    }
}
