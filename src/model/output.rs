//! What a model says of the next token: its output matrix, with the changes that adapters make of it.

use std::sync::Arc;

use candle_core::Tensor;

use super::adapter::{Adapter, Linear, LinearChange, Pass};
use super::linear_change::{changed_linear, changed_weight};
use super::{Model, weights};
use crate::data::batch::{Batch, Target};
use crate::error::Result;
use crate::ops::{self, LogProbs, Value, Weight};

impl Model {
    /// Whether it can tell the probability of a token: a classifier may be without an output matrix, and an encoder is.
    pub fn has_output_matrix(&self) -> bool {
        let architecture = &self.architecture;
        let stored = weights::output_name(architecture).is_some_and(|name| self.weights.has(name));
        architecture.causal && (architecture.tied_output || stored)
    }

    /// Log-probability and entropy of every target of a batch, given its hidden states: `[targets]` each.
    pub fn log_probs(&self, hidden: &Value, batch: &Batch, temperature: f64) -> Result<LogProbs> {
        if !(1..self.stacks.len()).any(|stack| self.changes_output(stack)) {
            return self.log_probs_of(hidden, &batch.targets, 0, temperature);
        }
        // Some rows have an output matrix of their own.
        let (mut log_probs, mut entropy) = (Vec::new(), Vec::new());
        for (stack, answers) in batch.runs() {
            let targets = batch.answer_targets[answers.start].start..batch.answer_targets[answers.end - 1].end;
            let part = self.log_probs_of(hidden, &batch.targets[targets], stack, temperature)?;
            log_probs.push(part.log_probs);
            entropy.push(part.entropy);
        }
        let joined = |parts: &[Value]| Value::cat_rows(&parts.iter().collect::<Vec<_>>());
        Ok(LogProbs { log_probs: joined(&log_probs)?, entropy: joined(&entropy)? })
    }

    fn log_probs_of(&self, hidden: &Value, targets: &[Target], stack: usize, temperature: f64) -> Result<LogProbs> {
        let rows: Vec<u32> = targets.iter().map(|target| target.row as u32).collect();
        let tokens: Vec<u32> = targets.iter().map(|target| target.token).collect();
        let hidden = self.scaled_for_output(hidden.select_rows(&rows)?)?; // [targets, d_model]
        let soft_cap = self.architecture.output_soft_cap;
        // The operation is fused over the matrix, so that all changes have to be in it.
        let matrix = match &self.output_changes(stack)[..] {
            [] => self.output().weight,
            changes => Weight::new(&changed_weight(&self.output(), changes)?, None),
        }; // [vocabulary, d_model]
        ops::log_probs(&hidden, &matrix, &tokens, temperature, soft_cap)
    }

    /// The logits `[rows, vocabulary]` at some rows, as constants. The rows run with these stacks (all with
    /// the model's own where there are none).
    pub fn logits(&self, hidden: &Value, rows: &[u32], stacks: &[usize]) -> Result<Tensor> {
        let hidden = self.scaled_for_output(hidden.detach().select_rows(rows)?)?; // [rows, d_model]
        let output = self.output();
        let of_rows = |hidden: &Value, stack: usize| -> Result<Tensor> {
            let logits = changed_linear(&output, hidden, &self.output_changes(stack), &Pass::default())?;
            Ok(logits.tensor().clone())
        };
        let logits = match stacks {
            [] => of_rows(&hidden, 0)?,
            stacks if stacks.iter().any(|&stack| self.changes_output(stack)) => {
                // Rows of one stack follow each other, so that each run of them is one product.
                let (mut logits, mut row) = (Vec::new(), 0);
                for run in stacks.chunk_by(|one, next| one == next) {
                    logits.push(of_rows(&hidden.narrow_rows(row, run.len())?, run[0])?); // [run, vocabulary]
                    row += run.len();
                }
                Tensor::cat(&logits, 0)?
            }
            _ => ops::linear(&hidden, output.weight.detach(), None)?.tensor().clone(),
        }; // [rows, vocabulary]
        Ok(match self.architecture.output_soft_cap {
            Some(cap) => {
                let capped = ops::activate(&Value::constant((logits / cap)?), ops::Activation::Tanh)?;
                capped.scale(cap)?.tensor().clone()
            }
            None => logits,
        })
    }

    /// Hidden states whose products with the output matrix are the logits.
    fn scaled_for_output(&self, hidden: Value) -> Result<Value> {
        self.architecture.output_scale.map_or(Ok(hidden.clone()), |scale| hidden.scale(scale))
    }

    /// The base's output matrix, as the linear that it is.
    fn output(&self) -> Linear {
        let name = self.architecture.names.output_module.to_string();
        Linear { name, weight: self.transformer.output().clone(), bias: None }
    }

    /// What the adapters of a stack make of it.
    fn output_changes(&self, stack: usize) -> Vec<LinearChange> {
        let module = self.architecture.names.output_module;
        let change = |adapter: &Arc<dyn Adapter>| adapter.linear(module);
        self.stacks[stack].iter().filter_map(change).collect()
    }

    fn changes_output(&self, stack: usize) -> bool {
        !self.output_changes(stack).is_empty()
    }
}
