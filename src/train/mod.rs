//! What the training programs share: the optimizer and its learning rate, the order of the examples, what a run writes
//! into its folder, and what it tells the user meanwhile.

pub mod checkpoint;
pub mod ema;
pub mod examples;
pub mod inputs;
pub mod kept;
pub mod learned;
pub mod memory;
pub mod metrics;
pub mod optimizer;
pub mod order;
pub mod plan;
pub mod prepared;
pub mod progress;
pub mod resume;
pub mod rounding;
pub mod run;
pub mod schedule;
pub mod state;
mod streamed;
pub mod table;
pub mod tensorboard;
