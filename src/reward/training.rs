//! The optimizer steps of a reward model, its evaluations, and which model is kept.

use std::sync::Arc;

use super::evaluation::{evaluate, score};
use super::{RankedTree, RewardSettings, agreement, normalization};
use crate::data::batch::TokenTree;
use crate::error::Result;
use crate::model::Model;
use crate::model::passes::StepPasses;
use crate::train::examples::{Example, Examples, values};
use crate::train::optimizer::Optimizer;
use crate::train::rounding::as_saved;
use crate::train::run::{Run, Turn};
use crate::train::schedule::Schedule;
use crate::train::state::StateWriter;

/// Names in a checkpoint's state.
const SHIFT_AND_DIVISOR: &str = "shift_and_divisor";
const OPTIMIZER: &str = "optimizer";

/// A reward model that is trained.
pub(super) struct Trainer<'a> {
    /// How.
    pub settings: &'a RewardSettings,
    /// The model.
    pub model: Model,
    /// Its optimizer.
    pub optimizer: Optimizer,
    /// The learning rate of its steps.
    pub schedule: Schedule,
    /// The trees whose mean reward becomes 0 in the model that is kept.
    pub zero_point: Vec<TokenTree>,
}

impl Trainer<'_> {
    /// Trains, and keeps the model whose evaluation loss is the lowest, and the last.
    pub fn train(&mut self, examples: &mut Examples<RankedTree>, run: &mut Run) -> Result<()> {
        let Trainer { model, optimizer, .. } = self;
        let turns = run.restore(|state| {
            if let Some(head) = model.head_mut() {
                (head.form.shift, head.form.divisor) = state.value(SHIFT_AND_DIVISOR)?;
            }
            optimizer.take_from(state, OPTIMIZER)
        })?;
        let settings = self.settings;
        if settings.normalize_first && turns.is_start() {
            let (model, tokens) = (&mut self.model, settings.common.tokens_per_batch);
            run.heeding(|| normalization::normalize(model, &self.zero_point, settings.normalize, tokens))?;
        }
        let total_steps = self.schedule.total_steps;
        let evaluate_every = settings.examples.evaluate_every.unwrap_or(examples.steps_per_epoch());
        for Turn { step, is_learned } in turns {
            if !is_learned {
                examples.during(step, total_steps, |chosen| self.learn(step, &chosen, run))?;
            }
            if step + 1 == total_steps || (step + 1) % evaluate_every == 0 {
                let evaluating = run.evaluating()?;
                let evaluated = self.evaluate_and_keep(step + 1, examples, run);
                run.evaluated(evaluating, evaluated, step + 1, |state| {
                    add_to_state(state, &self.model, &self.optimizer)
                })?;
            }
            run.checkpoint(step + 1, |state| add_to_state(state, &self.model, &self.optimizer))?;
        }
        Ok(())
    }

    /// Evaluates the model after so many steps, and keeps it if it is the best or the last.
    fn evaluate_and_keep(&self, steps: usize, examples: &mut Examples<RankedTree>, run: &mut Run) -> Result<()> {
        let common = &self.settings.common;
        let evaluation = values(examples.evaluation()?);
        let is_last = steps == self.schedule.total_steps;
        let kept = as_saved(&self.model, || {
            let mut loss = None;
            if !evaluation.is_empty() {
                let found = evaluate(&self.model.frozen()?, &evaluation, &self.settings.loss, common)?;
                run.evaluation(steps, &found.metrics())?;
                loss = Some(found.loss);
            }
            if !is_last && (loss.is_none() || !run.is_better(loss)) {
                return Ok(None);
            }
            // The scores of the model that trains stay as they are.
            let mut normalized = self.model.clone();
            let normalization = self.settings.normalize;
            normalization::normalize(&mut normalized, &self.zero_point, normalization, common.tokens_per_batch)?;
            Ok(Some((normalized, loss)))
        })?;
        let Some((normalized, loss)) = kept else { return Ok(()) };
        run.keep(steps, loss, |folder| {
            normalized.save(folder)?;
            // What an adapter needs to train on; of full weights it would be twice the model.
            if normalized.adapters().is_empty() { Ok(()) } else { self.optimizer.save(folder) }
        })
    }

    /// One optimizer step, recorded. Of streamed data all rows of a step may hold nothing to learn: it changes nothing then and has no loss.
    fn learn(&mut self, step: usize, chosen: &[Arc<Example<RankedTree>>], run: &mut Run) -> Result<()> {
        let learning_rate = self.schedule.learning_rate(step);
        let ranked = values(chosen);
        let (loss, accuracy) = match &ranked[..] {
            [] => (f64::NAN, f64::NAN),
            ranked => self.accumulate(ranked, step as u64)?,
        };
        let stepped = self.optimizer.step(learning_rate);
        let origins = chosen.iter().map(|example| &example.origin);
        let stepped = run.stepped(step, stepped, origins, |state| add_to_state(state, &self.model, &self.optimizer))?;
        let tokens = ranked.iter().map(|ranked| ranked.tree.tokens()).sum();
        let metrics = [
            ("accuracy", accuracy),
            ("learning_rate", learning_rate),
            ("gradient_norm", stepped.gradient_norm),
            ("skipped_steps", self.optimizer.skipped_steps() as f64),
        ];
        run.step(step + 1, loss, tokens, &metrics)
    }

    /// Adds the gradient of one optimizer step's mean loss a prompt, and gives the loss and the accuracy before the step.
    fn accumulate(&mut self, ranked: &[&RankedTree], step: u64) -> Result<(f64, f64)> {
        let common = &self.settings.common;
        let trees = ranked.iter().map(|ranked| &ranked.tree);
        let weight: f64 = ranked.iter().map(|ranked| f64::from(ranked.weight)).sum();
        let (mut total, mut judged) = (0.0, Vec::new());
        let mut passes = StepPasses::new(common.seed, step);
        for range in self.model.passes(trees, common.tokens_per_batch) {
            let ranked = &ranked[range];
            let batch = self.model.pack(ranked.iter().map(|ranked| &ranked.tree));
            let pass = passes.next(&self.model, &batch);
            let scored = score(&self.model, batch, ranked, &self.settings.loss, &pass)?;
            judged.extend(scored.pairs_by_prompt(ranked).concat());
            let loss = scored.loss.affine(1.0 / weight.max(f64::MIN_POSITIVE), 0.0)?;
            self.optimizer.backward(&loss, scored.outputs)?;
            total += f64::from(loss.to_scalar::<f32>()?);
        }
        Ok((total, agreement::accuracy(&judged).accuracy))
    }
}

/// What a checkpoint holds of the training.
fn add_to_state<'a>(state: &mut StateWriter<'a>, model: &Model, optimizer: &'a Optimizer) -> Result<()> {
    if let Some(head) = model.head() {
        state.value(SHIFT_AND_DIVISOR, &(head.form.shift, head.form.divisor))?;
    }
    optimizer.add_to(state, OPTIMIZER)
}
