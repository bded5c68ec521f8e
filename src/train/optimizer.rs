//! AdamW over a model's trainable parameters, with gradients summed over micro-batches and clipped by their global norm.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::state::{StateReader, StateWriter};
use crate::error::{Error, Result};
use crate::model::{Model, adapter, weight_files};
use crate::ops::adamw::{AdamwState, AdamwStep, AdamwUpdate, adamw_all};
use crate::ops::{Gradients, Outputs};
use crate::remote::hub;
use crate::settings::{EpsilonPlace, ModelSettings, OptimizerSettings, TrainingSettings};

/// The optimizer of one model: its parameters, the sum of their gradients, and AdamW's moments.
///
/// A step is any number of [`backward`](Optimizer::backward)s, one a micro-batch, and one
/// [`step`](Optimizer::step). Parameters are visited in the order of their names, so the global norm is the
/// same in every run.
pub struct Optimizer {
    parameters: Vec<Parameter>,
    /// The sums of the gradients since the last step.
    gradients: Gradients,
    settings: OptimizerSettings,
    skipped_steps: usize,
    skipped_in_a_row: usize,
}

struct Parameter {
    name: String,
    variable: Var,
    weight_decay: f64,
    learning_rate_scale: f64,
    moments: AdamwState,
    /// The steps that changed it, which AdamW's correction of its moments counts.
    updates: u64,
}

/// The file of an optimizer's moments, beside the adapter that they are of.
const FILE: &str = "optimizer.safetensors";
const FIRST: &str = "first_moment";
const SECOND: &str = "second_moment";
const UPDATES: &str = "updates";

/// What a checkpoint holds of an optimizer beside its tensors.
#[derive(Debug, Serialize, Deserialize)]
struct Counts {
    /// Of each parameter, in the order of their names.
    updates: Vec<u64>,
    skipped_steps: usize,
    skipped_in_a_row: usize,
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// The norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// What the gradients were multiplied by: 1, or less if they were clipped.
    pub gradient_scale: f64,
    /// Which gradient was not finite, in words, where the step therefore changed nothing.
    pub not_finite: Option<String>,
    /// Whether it changed the weights: not with a learning rate of 0, with which a warm-up begins.
    pub changed: bool,
}

impl Optimizer {
    /// An optimizer of these named parameters. Weight decay spares those of fewer than two dimensions: norms and biases.
    ///
    /// # Errors
    /// If there is no parameter, or two have the same name.
    pub fn new(parameters: Vec<adapter::Parameter>, settings: &OptimizerSettings) -> Result<Self> {
        let mut parameters: Vec<Parameter> = parameters
            .into_iter()
            .map(|adapter::Parameter { name, variable, learning_rate_scale }| {
                let weight_decay = if variable.rank() < 2 { 0.0 } else { settings.weight_decay };
                let moments = AdamwState::default();
                Parameter { name, variable, weight_decay, learning_rate_scale, moments, updates: 0 }
            })
            .collect();
        parameters.sort_by(|a, b| a.name.cmp(&b.name));
        if parameters.is_empty() {
            crate::bail!("the model has no parameter to train");
        }
        if let Some(pair) = parameters.windows(2).find(|pair| pair[0].name == pair[1].name) {
            crate::bail!("two parameters to train have the name {}", pair[0].name);
        }
        let settings = settings.clone();
        let gradients = Gradients::default();
        Ok(Optimizer { parameters, gradients, settings, skipped_steps: 0, skipped_in_a_row: 0 })
    }

    /// The optimizer of what trains in a model; with `--resume-optimizer` it goes on from the moments beside the adapter that was given.
    pub fn of(model: &Model, training: &TrainingSettings, given: &ModelSettings) -> Result<Self> {
        let mut optimizer = Self::new(model.trainable_parameters(), &training.optimizer)?;
        if training.resume_optimizer {
            optimizer.restore(&hub::folder(given.adapter.last().unwrap_or(&given.model))?)?;
        }
        Ok(optimizer)
    }

    /// Writes the moments into a folder.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let mut tensors = BTreeMap::new();
        for Parameter { name, variable, moments, updates, .. } in &self.parameters {
            let device = variable.device();
            for (part, values) in [(FIRST, &moments.first_moment), (SECOND, &moments.second_moment)] {
                // A parameter that no gradient has reached has none.
                if !values.is_empty() {
                    let tensor = Tensor::from_slice(values, variable.shape(), device)?;
                    tensors.insert(format!("{name}.{part}"), tensor);
                }
            }
            tensors.insert(format!("{name}.{UPDATES}"), Tensor::new(&[*updates as f32], device)?);
        }
        weight_files::write_file(&folder.join(FILE), &tensors, DType::F32)
    }

    fn restore(&mut self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        if !path.is_file() {
            crate::bail!(
                "{}: there is no such file, so --resume-optimizer has nothing to go on from; leave the flag out",
                path.display()
            );
        }
        let mut tensors = weight_files::read_file(&path, &Device::Cpu)?;
        for Parameter { name, variable, moments, updates, .. } in &mut self.parameters {
            let Some(count) = tensors.remove(&format!("{name}.{UPDATES}")) else {
                crate::bail!(
                    "{}: holds nothing of \"{name}\", which trains now; leave --resume-optimizer out",
                    path.display()
                );
            };
            *updates = count.to_vec1::<f32>()?[0] as u64;
            for (part, values) in [(FIRST, &mut moments.first_moment), (SECOND, &mut moments.second_moment)] {
                let Some(tensor) = tensors.remove(&format!("{name}.{part}")) else { continue };
                if tensor.dims() != variable.dims() {
                    crate::bail!(
                        "{}: tensor \"{name}.{part}\" has shape {:?}, expected {:?}; leave --resume-optimizer out",
                        path.display(),
                        tensor.dims(),
                        variable.dims()
                    );
                }
                *values = tensor.flatten_all()?.to_vec1()?;
            }
        }
        Ok(())
    }

    /// Adds what it trains and all that it needs to go on to a state, under names that begin with `scope`.
    pub fn add_to<'a>(&'a self, state: &mut StateWriter<'a>, scope: &str) -> Result<()> {
        for Parameter { name, variable, moments, .. } in &self.parameters {
            state.tensor(format!("{scope}/{name}"), variable.as_tensor());
            for (part, values) in [(FIRST, &moments.first_moment), (SECOND, &moments.second_moment)] {
                // A parameter that no gradient has reached has none.
                if !values.is_empty() {
                    state.numbers(format!("{scope}/{name}.{part}"), variable.dims(), values);
                }
            }
        }
        let updates = self.parameters.iter().map(|parameter| parameter.updates).collect();
        let Optimizer { skipped_steps, skipped_in_a_row, .. } = *self;
        state.value(scope, &Counts { updates, skipped_steps, skipped_in_a_row })
    }

    /// Takes all of it back.
    pub fn take_from(&mut self, state: &mut StateReader, scope: &str) -> Result<()> {
        let Counts { updates, skipped_steps, skipped_in_a_row } = state.value(scope)?;
        (self.skipped_steps, self.skipped_in_a_row) = (skipped_steps, skipped_in_a_row);
        for (parameter, updates) in self.parameters.iter_mut().zip(updates) {
            let Parameter { name, variable, moments, .. } = parameter;
            let values = state.numbers(&format!("{scope}/{name}"), variable.dims())?;
            variable.set(&Tensor::from_vec(values, variable.shape(), variable.device())?)?;
            for (part, values) in [(FIRST, &mut moments.first_moment), (SECOND, &mut moments.second_moment)] {
                let name = format!("{scope}/{name}.{part}");
                *values = if state.has_tensor(&name) { state.numbers(&name, variable.dims())? } else { Vec::new() };
            }
            parameter.updates = updates;
        }
        Ok(())
    }

    /// Adds the gradients of a micro-batch's loss, which was computed from `outputs`, to those of the step.
    /// The loss is to be weighted by the caller, as the sum over the step's micro-batches is what is
    /// minimised.
    pub fn backward(&mut self, loss: &Tensor, outputs: Outputs) -> Result<()> {
        outputs.backward(loss, &mut self.gradients)
    }

    /// Clips the summed gradients to the global norm `max_gradient_norm`, changes the parameters by AdamW, and clears the sums.
    ///
    /// The scale is `min(1, max_norm / (norm + 1e-6))`, as in `torch.nn.utils.clip_grad_norm_`. A parameter without a gradient is
    /// left alone, its moments too. If the norm is not finite nothing is changed: the report names the cause, and the step is
    /// counted in [`skipped_steps`](Optimizer::skipped_steps).
    ///
    /// # Errors
    /// After `max_skipped_steps` such steps in a row: what made them so does not go away by itself.
    pub fn step(&mut self, learning_rate: f64) -> Result<StepReport> {
        let squared_norms = self.squared_norms()?;
        let gradient_norm = squared_norms.iter().flatten().sum::<f64>().sqrt();
        let max_norm = self.settings.max_gradient_norm;
        let gradient_scale = if max_norm > 0.0 { (max_norm / (gradient_norm + 1e-6)).min(1.0) } else { 1.0 };
        if !gradient_norm.is_finite() {
            let not_finite = self.not_finite(&squared_norms);
            self.discard();
            self.skipped_steps += 1;
            self.skipped_in_a_row += 1;
            if self.skipped_in_a_row >= self.settings.max_skipped_steps {
                return Err(Error::NotFinite(format!(
                    "the gradients of {} steps in a row are not finite, in the last one {not_finite}; they changed nothing. Try a smaller --learning-rate, look at the examples of these steps, or start from weights that are finite",
                    self.skipped_in_a_row
                )));
            }
            return Ok(StepReport { gradient_norm, gradient_scale: 0.0, not_finite: Some(not_finite), changed: false });
        }
        self.skipped_in_a_row = 0;
        let mut updates = Vec::with_capacity(self.parameters.len());
        for parameter in &mut self.parameters {
            let Some(gradient) = self.gradients.take(&parameter.variable) else { continue };
            parameter.updates += 1;
            let step = parameter.step(&self.settings, learning_rate, gradient_scale);
            let Parameter { variable, moments, .. } = parameter;
            updates.push(AdamwUpdate { parameter: variable, gradient, state: moments, step });
        }
        adamw_all(updates)?;
        self.gradients.clear();
        Ok(StepReport { gradient_norm, gradient_scale, not_finite: None, changed: learning_rate != 0.0 })
    }

    /// Forgets the gradients since the last step.
    pub fn discard(&mut self) {
        self.gradients.clear();
    }

    /// What it trains.
    pub fn variables(&self) -> impl Iterator<Item = &Var> {
        self.parameters.iter().map(|parameter| &parameter.variable)
    }

    /// The number of steps so far that were skipped because their gradients were not finite.
    pub fn skipped_steps(&self) -> usize {
        self.skipped_steps
    }

    /// What of the gradients is not finite, in words.
    fn not_finite(&self, squared_norms: &[Option<f64>]) -> String {
        let mut norms = self.parameters.iter().zip(squared_norms);
        match norms.find(|(_, norm)| norm.is_some_and(|norm| !norm.is_finite())) {
            Some((Parameter { name, .. }, _)) => format!("that of \"{name}\""),
            None => "their norm, though no single one".to_string(),
        }
    }

    /// `Σ g²` of each parameter's gradient, where there is one. Their sum is made in the order of the
    /// parameters, so that it is the same on any number of threads.
    fn squared_norms(&self) -> Result<Vec<Option<f64>>> {
        let norm = |parameter: &Parameter| {
            self.gradients.get(&parameter.variable).map(|gradient| gradient.squared_norm()).transpose()
        };
        let norms: Vec<Result<Option<f64>>> = self.parameters.par_iter().map(norm).collect();
        norms.into_iter().collect()
    }
}

impl Parameter {
    /// What the update that was just counted is made with.
    fn step(&self, settings: &OptimizerSettings, learning_rate: f64, gradient_scale: f64) -> AdamwStep {
        let OptimizerSettings { beta1, beta2, epsilon, epsilon_place, .. } = *settings;
        AdamwStep {
            learning_rate: learning_rate * self.learning_rate_scale,
            beta1,
            beta2,
            epsilon: match epsilon_place {
                EpsilonPlace::AfterCorrection => epsilon,
                // The same as adding it to √v, before both are divided.
                EpsilonPlace::BeforeCorrection => epsilon / (1.0 - beta2.powf(self.updates as f64)).sqrt(),
            },
            weight_decay: self.weight_decay,
            step: self.updates,
            gradient_scale: gradient_scale as f32,
        }
    }
}

impl fmt::Debug for Optimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        f.debug_struct("Optimizer").field("parameters", &names).field("settings", &self.settings).finish()
    }
}

#[cfg(test)]
mod tests;
