//! Differentiable operations that carry a transformer.
//!
//! candle drops the gradients of many of its fused operations without a word, computes those of frozen
//! weights, clears and adds a tensor for each gradient on one thread, and keeps every operand until the loss
//! is dropped. So the stream through a transformer is made of [`Value`]s, whose backward pass ([`backward`])
//! is ours: an operation keeps what its gradients need and no more, adds gradients in place, in parallel,
//! with the same bits on any number of threads, and skips what is frozen. Beside each operation stands a
//! reference in candle's own differentiable operations, which is the oracle of its tests and the path on
//! devices for which no kernel is written. Losses are small and stay in candle's operations ([`Outputs`]).
//! Nothing outside this module may call a candle function that loses gradients.
#![allow(unsafe_code)] // Here alone; each block says why it is sound.

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod backward;
mod bf16;
pub mod compact;
mod dot_products;
pub mod dropout;
mod elementwise;
mod kept;
pub mod linear;
pub mod logprob;
pub mod low_rank;
mod matrix;
pub mod memory;
pub mod norm;
pub mod pooling;
pub mod precision;
mod products;
pub mod rotary;
pub mod row_updates;
pub mod rows;
mod simd;
#[cfg(test)]
mod testing;
pub mod threads;
pub mod value;
pub mod weight;

pub use activation::{Activation, activate, gated, softplus};
pub use adamw::{AdamwState, AdamwStep, AdamwUpdate, adamw, adamw_all, move_averages, squared_norm, squares};
pub use attention::{AttentionPlan, AttentionShape, Query, Span, attention, attention_packed};
pub use backward::{Gradient, Gradients, Outputs, checkpoint};
pub use compact::{BaseForm, Compact, CompactBuilder, CompactForm};
pub use dropout::{Mask, dropout};
pub use kept::count_kept;
pub use linear::linear;
pub use logprob::{LogProbs, ROWS_OF_LOGITS, log_probs};
pub use low_rank::{LowRank, low_rank_linear};
pub use norm::{layer_norm, rms_norm};
pub use pooling::{mean_rows, sum_ranges};
pub use precision::Arithmetic;
pub use products::PackedWeight;
pub use rotary::rotary;
pub use row_updates::{RowUpdate, add_low_rank_to_rows};
pub use rows::{with_numbers, write_rows};
pub use value::Value;
pub use weight::Weight;
