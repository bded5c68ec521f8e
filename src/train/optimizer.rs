//! AdamW over a model's trainable parameters, with gradients summed over micro-batches and clipped by their global norm.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::state::{StateReader, StateWriter};
use crate::error::{Error, Result};
use crate::model::{Model, adapter, weight_files};
use crate::ops::adamw::{AdamwState, AdamwStep, adamw, add_in_place, squared_norm};
use crate::remote::hub;
use crate::settings::{EpsilonPlace, ModelSettings, OptimizerSettings, TrainingSettings};

/// The optimizer of one model: its parameters, the sum of their gradients, and AdamW's moments.
///
/// A step is any number of [`accumulate`](Optimizer::accumulate)s, one a micro-batch, and one [`step`](Optimizer::step). Parameters
/// are visited in the order of their names, so the global norm is the same in every run.
pub struct Optimizer {
    parameters: Vec<Parameter>,
    settings: OptimizerSettings,
    skipped_steps: usize,
    skipped_in_a_row: usize,
}

struct Parameter {
    name: String,
    variable: Var,
    weight_decay: f64,
    learning_rate_scale: f64,
    /// The sum of the gradients since the last step.
    gradient: Option<Tensor>,
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
                Parameter { name, variable, weight_decay, learning_rate_scale, gradient: None, moments, updates: 0 }
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
        Ok(Optimizer { parameters, settings, skipped_steps: 0, skipped_in_a_row: 0 })
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

    /// Adds a micro-batch's gradients to those of the step. Its loss is to be weighted by the caller, as the sum over the step's
    /// micro-batches is what is minimised.
    pub fn accumulate(&mut self, gradients: &GradStore) -> Result<()> {
        for parameter in &mut self.parameters {
            let Some(gradient) = gradients.get(parameter.variable.as_tensor()) else { continue };
            let gradient = gradient.detach();
            parameter.gradient = Some(match parameter.gradient.take() {
                Some(sum) => add_in_place(sum, &gradient)?,
                None => gradient,
            });
        }
        Ok(())
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
        let gradient_norm = self.gradient_norm()?;
        let max_norm = self.settings.max_gradient_norm;
        let gradient_scale = if max_norm > 0.0 { (max_norm / (gradient_norm + 1e-6)).min(1.0) } else { 1.0 };
        if !gradient_norm.is_finite() {
            let not_finite = self.not_finite()?;
            self.discard();
            self.skipped_steps += 1;
            self.skipped_in_a_row += 1;
            if self.skipped_in_a_row >= self.settings.max_skipped_steps {
                return Err(Error::NotFinite(format!(
                    "the gradients of {} steps in a row are not finite, in the last one {not_finite}; they changed nothing. Try a smaller --learning-rate, look at the examples of these steps, or start from weights that are finite",
                    self.skipped_in_a_row
                )));
            }
            return Ok(StepReport { gradient_norm, gradient_scale: 0.0, not_finite: Some(not_finite) });
        }
        self.skipped_in_a_row = 0;
        for parameter in &mut self.parameters {
            let Some(gradient) = parameter.gradient.take() else { continue };
            parameter.updates += 1;
            let OptimizerSettings { beta1, beta2, epsilon, epsilon_place, .. } = self.settings;
            let step = AdamwStep {
                learning_rate: learning_rate * parameter.learning_rate_scale,
                beta1,
                beta2,
                epsilon: match epsilon_place {
                    EpsilonPlace::AfterCorrection => epsilon,
                    // The same as adding it to √v, before both are divided.
                    EpsilonPlace::BeforeCorrection => epsilon / (1.0 - beta2.powf(parameter.updates as f64)).sqrt(),
                },
                weight_decay: parameter.weight_decay,
                step: parameter.updates,
                gradient_scale: gradient_scale as f32,
            };
            adamw(&parameter.variable, &gradient.contiguous()?, &mut parameter.moments, &step)?;
        }
        Ok(StepReport { gradient_norm, gradient_scale, not_finite: None })
    }

    /// Forgets the gradients since the last step.
    pub fn discard(&mut self) {
        self.parameters.iter_mut().for_each(|parameter| parameter.gradient = None);
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
    fn not_finite(&self) -> Result<String> {
        for Parameter { name, gradient, .. } in &self.parameters {
            if let Some(gradient) = gradient
                && !squared_norm(&gradient.contiguous()?)?.is_finite()
            {
                return Ok(format!("that of \"{name}\""));
            }
        }
        Ok("their norm, though no single one".to_string())
    }

    fn gradient_norm(&self) -> Result<f64> {
        let mut sum = 0.0;
        for gradient in self.parameters.iter().filter_map(|parameter| parameter.gradient.as_ref()) {
            sum += squared_norm(&gradient.contiguous()?)?;
        }
        Ok(sum.sqrt())
    }
}

impl fmt::Debug for Optimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        f.debug_struct("Optimizer").field("parameters", &names).field("settings", &self.settings).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::ScheduleShape;

    fn settings() -> OptimizerSettings {
        OptimizerSettings {
            max_skipped_steps: 3,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            epsilon_place: EpsilonPlace::AfterCorrection,
            max_gradient_norm: 1.0,
            schedule: ScheduleShape::Constant,
            warmup_steps: None,
            warmup_ratio: 0.0,
            warmup_start_ratio: 0.0,
            minimum_learning_rate_ratio: 0.0,
        }
    }

    fn variable(values: &[f32], shape: &[usize]) -> Var {
        Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
    }

    fn values(variable: &Var) -> Vec<f32> {
        variable.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// A store with these gradients: those of the sum over variables of `gradient · variable`.
    fn gradients(of: &[(&Var, &[f32])]) -> GradStore {
        let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu).unwrap();
        for (variable, gradient) in of {
            let gradient = Tensor::from_slice(gradient, variable.shape(), &Device::Cpu).unwrap();
            loss = (loss + (variable.as_tensor() * gradient).unwrap().sum_all().unwrap()).unwrap();
        }
        loss.backward().unwrap()
    }

    fn optimizer(named: &[(&str, &Var)]) -> Optimizer {
        Optimizer::new(
            named.iter().map(|&(name, variable)| adapter::Parameter::new(name, variable)).collect(),
            &settings(),
        )
        .unwrap()
    }

    /// AdamW in scalars, after the documentation of `torch.optim.AdamW`: (parameter, first moment, second moment).
    fn scalar_adamw(at: (f64, f64, f64), gradient: f64, rate: f64, weight_decay: f64, step: i32) -> (f64, f64, f64) {
        let (parameter, first, second) = at;
        let first = 0.9 * first + (1.0 - 0.9) * gradient;
        let second = 0.95 * second + (1.0 - 0.95) * gradient * gradient;
        let first_hat = first / (1.0 - 0.9f64.powi(step));
        let second_hat = second / (1.0 - 0.95f64.powi(step));
        let decayed = parameter - rate * weight_decay * parameter;
        (decayed - rate * first_hat / (second_hat.sqrt() + 1e-8), first, second)
    }

    #[test]
    fn steps_equal_clipped_adamw_with_decay_on_matrices_only() {
        let (weight, bias) = (variable(&[0.5, -1.0, 2.0, 0.1], &[2, 2]), variable(&[0.3, -0.7], &[2]));
        let mut optimizer = optimizer(&[("bias", &bias), ("weight", &weight)]);
        let mut expected: Vec<(f64, f64, f64)> =
            [0.5, -1.0, 2.0, 0.1, 0.3, -0.7].iter().map(|&start| (start, 0.0, 0.0)).collect();
        let steps =
            [[3.0, -1.0, 0.0, 2.0, 1.0, -1.0], [0.1, 0.2, -0.1, 0.0, 0.3, 0.1], [-2.0, 0.5, 0.5, 1.0, 0.0, 4.0]];
        for (step, gradient) in steps.iter().enumerate() {
            let rate = 0.01 * (step + 1) as f64;
            optimizer.accumulate(&gradients(&[(&weight, &gradient[..4]), (&bias, &gradient[4..])])).unwrap();
            let report = optimizer.step(rate).unwrap();
            let norm = gradient.iter().map(|&number| f64::from(number).powi(2)).sum::<f64>().sqrt();
            let scale = if norm > 1.0 { 1.0 / (norm + 1e-6) } else { 1.0 };
            assert!((report.gradient_norm - norm).abs() < 1e-6 && (report.gradient_scale - scale).abs() < 1e-7);
            for (index, at) in expected.iter_mut().enumerate() {
                let decay = if index < 4 { 0.1 } else { 0.0 };
                *at = scalar_adamw(*at, f64::from(gradient[index]) * scale, rate, decay, step as i32 + 1);
            }
            for (found, expected) in [values(&weight), values(&bias)].concat().iter().zip(&expected) {
                assert!((f64::from(*found) - expected.0).abs() < 1e-6, "{found} is not {}", expected.0);
            }
        }
    }

    #[test]
    fn micro_batches_give_the_step_of_the_whole_batch() {
        let step = |micro_batches: &[&[f32]]| {
            let weight = variable(&[1.0, 2.0], &[1, 2]);
            let mut optimizer = optimizer(&[("weight", &weight)]);
            for gradient in micro_batches {
                optimizer.accumulate(&gradients(&[(&weight, gradient)])).unwrap();
            }
            (optimizer.step(0.1).unwrap(), values(&weight))
        };
        assert_eq!(step(&[&[0.25, 0.5], &[0.25, -0.25], &[-1.0, 0.5]]), step(&[&[-0.5, 0.75]]));
    }

    #[test]
    fn a_parameter_without_gradient_is_left_alone_and_starts_when_it_gets_one() {
        let (used, unused) = (variable(&[1.0], &[1, 1]), variable(&[1.0], &[1, 1]));
        let mut both = optimizer(&[("used", &used), ("unused", &unused)]);
        for _ in 0..3 {
            both.accumulate(&gradients(&[(&used, &[0.5])])).unwrap();
            both.step(0.1).unwrap();
        }
        assert_ne!(values(&used), [1.0]);
        assert_eq!(values(&unused), [1.0]);
        both.accumulate(&gradients(&[(&unused, &[0.5])])).unwrap();
        both.step(0.1).unwrap();
        let fresh = variable(&[1.0], &[1, 1]);
        let mut alone = optimizer(&[("fresh", &fresh)]);
        alone.accumulate(&gradients(&[(&fresh, &[0.5])])).unwrap();
        alone.step(0.1).unwrap();
        assert_eq!(values(&unused), values(&fresh));
    }

    #[test]
    fn a_step_whose_gradients_are_not_finite_changes_nothing_and_is_counted() {
        let (good, bad) = (variable(&[1.0, 2.0], &[2]), variable(&[3.0], &[1]));
        let mut optimizer = optimizer(&[("good", &good), ("bad", &bad)]);
        for number in [f32::NAN, f32::INFINITY] {
            optimizer.accumulate(&gradients(&[(&good, &[1.0, 1.0]), (&bad, &[number])])).unwrap();
            assert!(optimizer.step(0.1).unwrap().not_finite.is_some());
        }
        assert_eq!((values(&good), values(&bad), optimizer.skipped_steps()), (vec![1.0, 2.0], vec![3.0], 2));
        // The faulty gradients are gone: the next step is as the first of a new optimizer.
        optimizer.accumulate(&gradients(&[(&bad, &[0.5])])).unwrap();
        let report = optimizer.step(0.1).unwrap();
        assert_eq!((report.gradient_norm, report.not_finite), (0.5, None));
        assert!((values(&bad)[0] - 2.9).abs() < 1e-6);
    }

    #[test]
    fn too_many_skipped_steps_in_a_row_are_an_error_that_names_the_gradient() {
        let (good, bad) = (variable(&[1.0], &[1]), variable(&[3.0], &[1]));
        let mut optimizer = optimizer(&[("good", &good), ("bad", &bad)]);
        let mut step = |number| {
            optimizer.accumulate(&gradients(&[(&good, &[1.0]), (&bad, &[number])])).unwrap();
            optimizer.step(0.1).map(|report| report.not_finite)
        };
        let in_a_row = settings().max_skipped_steps;
        for _ in 1..in_a_row {
            assert_eq!(step(f32::NAN).unwrap().as_deref(), Some("that of \"bad\""));
        }
        // One that is finite starts the count anew.
        assert_eq!(step(1.0).unwrap(), None);
        for _ in 1..in_a_row {
            assert!(step(f32::INFINITY).unwrap().is_some());
        }
        let error = step(f32::NAN).unwrap_err().to_string();
        assert!(error.contains("3 steps in a row are not finite, in the last one that of \"bad\""), "{error}");
        assert!(values(&bad)[0] > 2.8);
    }

    #[test]
    fn the_order_in_which_parameters_are_given_does_not_matter_to_a_bit() {
        let step = |reverse: bool| {
            let variables: Vec<Var> = (0..5).map(|index| variable(&[index as f32 * 0.37, 1.0], &[2])).collect();
            let mut named: Vec<adapter::Parameter> = (variables.iter().enumerate())
                .map(|(index, variable)| adapter::Parameter::new(index.to_string(), variable))
                .collect();
            if reverse {
                named.reverse();
            }
            let mut optimizer = Optimizer::new(named, &settings()).unwrap();
            let numbers: Vec<[f32; 2]> = (0..5).map(|index| [0.1f32.powi(index), 1.7 * index as f32]).collect();
            let of: Vec<(&Var, &[f32])> =
                variables.iter().zip(&numbers).map(|(v, numbers)| (v, &numbers[..])).collect();
            optimizer.accumulate(&gradients(&of)).unwrap();
            (optimizer.step(0.1).unwrap(), variables.iter().map(values).collect::<Vec<_>>())
        };
        assert_eq!(step(false), step(true));
    }

    #[test]
    fn a_parameter_with_a_scale_has_its_own_learning_rate() {
        let (plain, scaled) = (variable(&[1.0], &[1, 1]), variable(&[1.0], &[1, 1]));
        let faster = adapter::Parameter { learning_rate_scale: 3.0, ..adapter::Parameter::new("scaled", &scaled) };
        let mut settings = settings();
        settings.weight_decay = 0.0;
        let mut both = Optimizer::new(vec![adapter::Parameter::new("plain", &plain), faster], &settings).unwrap();
        both.accumulate(&gradients(&[(&plain, &[0.5]), (&scaled, &[0.5])])).unwrap();
        both.step(0.1).unwrap();
        assert!((3.0 * (1.0 - values(&plain)[0]) - (1.0 - values(&scaled)[0])).abs() < 1e-6);
    }

    #[test]
    fn moments_that_are_saved_and_restored_go_on_as_if_nothing_had_been() {
        let folder = tempfile::tempdir().unwrap();
        let steps = |restored: bool| {
            let weight = variable(&[0.5, -1.0], &[1, 2]);
            let mut optimizer = optimizer(&[("weight", &weight)]);
            for (step, gradient) in [[0.1f32, 0.2], [-0.3, 0.1], [0.2, 0.2]].iter().enumerate() {
                if restored && step == 2 {
                    optimizer.save(folder.path()).unwrap();
                    optimizer = super::tests::optimizer(&[("weight", &weight)]);
                    optimizer.restore(folder.path()).unwrap();
                }
                optimizer.accumulate(&gradients(&[(&weight, gradient)])).unwrap();
                optimizer.step(0.1).unwrap();
            }
            values(&weight)
        };
        assert_eq!(steps(true), steps(false));
        let other = variable(&[1.0], &[1]);
        let error = optimizer(&[("other", &other)]).restore(folder.path()).unwrap_err().to_string();
        assert!(error.contains("holds nothing of \"other\""), "{error}");
    }

    #[test]
    fn nothing_to_train_or_two_of_one_name_is_an_error() {
        assert!(Optimizer::new(Vec::new(), &settings()).is_err());
        let weight = variable(&[1.0], &[1]);
        let twice = vec![adapter::Parameter::new("w", &weight), adapter::Parameter::new("w", &weight)];
        assert!(Optimizer::new(twice, &settings()).unwrap_err().to_string().contains("name w"));
    }
}
