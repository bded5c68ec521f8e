//! The AdamW step and moving averages, in place, and the sums that an optimizer needs.

use std::sync::Mutex;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Tensor, Var, bail};
use rayon::prelude::*;

use super::backward::Gradient;
use super::matrix::{CHUNK, has_kernel, update_chunks, with_elements};
use super::simd::{LANES, vectorised};
use crate::error::Result;

/// The moments of one parameter's gradient, from before the first step (empty, which stands for zero) on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdamwState {
    /// The running mean of the gradient, in the order of the parameter's elements.
    pub first_moment: Vec<f32>,
    /// The running mean of the squared gradient.
    pub second_moment: Vec<f32>,
}

/// What one step is made with, the same for all parameters but for the weight decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwStep {
    /// The step size η.
    pub learning_rate: f64,
    /// The decay rate β₁ of the first moment, usually 0.9.
    pub beta1: f64,
    /// The decay rate β₂ of the second moment, usually 0.999 or 0.95.
    pub beta2: f64,
    /// Added to the denominator, usually 1e-8.
    pub epsilon: f64,
    /// λ: the parameter is shrunk by the factor `1 - η λ`, apart from the gradient (Loshchilov & Hutter 2019).
    pub weight_decay: f64,
    /// The number of this step, from 1 on.
    pub step: u64,
    /// What gradients are multiplied with first, for clipping by the global norm; 1 otherwise.
    pub gradient_scale: f32,
}

impl AdamwStep {
    /// The coefficients of one element's update.
    fn coefficients(&self) -> Coefficients {
        let correction = |beta: f64| 1.0 - beta.powf(self.step as f64);
        Coefficients {
            shrink: (1.0 - self.learning_rate * self.weight_decay) as f32,
            step_size: (self.learning_rate / correction(self.beta1)) as f32,
            inverse_root_correction: (1.0 / correction(self.beta2).sqrt()) as f32,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            epsilon: self.epsilon as f32,
            gradient_scale: self.gradient_scale,
        }
    }
}

/// One step of AdamW (Loshchilov & Hutter 2019, algorithm 2, as in PyTorch), in place:
///
/// ```text
/// g ← gradient_scale · gradient          p ← p (1 - η λ)
/// m ← β₁ m + (1 - β₁) g                  v ← β₂ v + (1 - β₂) g²
/// p ← p - η / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)
/// ```
///
/// `gradient` has the shape of `parameter`. Fails if `state` belongs to a parameter of another size.
pub fn adamw(parameter: &Var, gradient: &Tensor, state: &mut AdamwState, step: &AdamwStep) -> Result<()> {
    prepare(parameter, gradient.shape(), state)?;
    if !has_kernel(&[parameter, gradient]) || !parameter.is_contiguous() {
        return adamw_reference(parameter, gradient, state, step);
    }
    with_elements(gradient, |gradient| update_in_place(parameter, gradient, state, step))
}

/// What a step does to one of several parameters.
pub struct AdamwUpdate<'a> {
    /// The parameter.
    pub parameter: &'a Var,
    /// Its gradient.
    pub gradient: Gradient,
    /// Its moments.
    pub state: &'a mut AdamwState,
    /// The step.
    pub step: AdamwStep,
}

/// [`adamw`] for many parameters at once, in one parallel loop over all of them and their chunks: most of an
/// adapter's are smaller than a chunk. The parameters must not share memory.
///
/// # Errors
/// That of the first parameter that has one.
pub fn adamw_all(updates: Vec<AdamwUpdate>) -> Result<()> {
    let results = updates.into_par_iter().map(|AdamwUpdate { parameter, gradient, state, step }| {
        if !has_kernel(&[parameter]) || !parameter.is_contiguous() {
            return adamw(parameter, &gradient.into_tensor()?, state, &step);
        }
        prepare(parameter, gradient.shape(), state)?;
        update_in_place(parameter, gradient.values()?, state, &step)
    });
    let results: Vec<Result<()>> = results.collect();
    results.into_iter().collect()
}

/// Clears moments that are there for the first time, and checks that all belong together.
fn prepare(parameter: &Var, gradient: &Shape, state: &mut AdamwState) -> Result<()> {
    let count = parameter.elem_count();
    if state.first_moment.is_empty() && state.second_moment.is_empty() {
        *state = AdamwState { first_moment: vec![0.0; count], second_moment: vec![0.0; count] };
    }
    let counts = [state.first_moment.len(), state.second_moment.len(), gradient.elem_count()];
    if counts != [count; 3] || gradient != parameter.shape() {
        crate::bail!(
            "AdamW: a parameter of shape {:?} does not fit a gradient of shape {:?} and moments of {} and {} elements",
            parameter.dims(),
            gradient.dims(),
            counts[0],
            counts[1]
        );
    }
    Ok(())
}

fn update_in_place(parameter: &Var, gradient: &[f32], state: &mut AdamwState, step: &AdamwStep) -> Result<()> {
    Ok(parameter.inplace_op1(&Update { coefficients: step.coefficients(), gradient, state: Mutex::new(state) })?)
}

/// [`adamw`] in candle's own operations.
pub fn adamw_reference(parameter: &Var, gradient: &Tensor, state: &mut AdamwState, step: &AdamwStep) -> Result<()> {
    let dtype = if parameter.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let moment = |values: &[f32]| -> candle_core::Result<Tensor> {
        Tensor::from_slice(values, parameter.shape(), parameter.device())?.to_dtype(dtype)
    };
    let read = |moment: &Tensor| -> candle_core::Result<Vec<f32>> {
        moment.flatten_all()?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec1()
    };
    let g = gradient.detach().to_dtype(dtype)?.affine(f64::from(step.gradient_scale), 0.0)?;
    let m = (moment(&state.first_moment)?.affine(step.beta1, 0.0)? + g.affine(1.0 - step.beta1, 0.0)?)?;
    let v = (moment(&state.second_moment)?.affine(step.beta2, 0.0)? + g.sqr()?.affine(1.0 - step.beta2, 0.0)?)?;
    let (correction1, correction2) = (1.0 - step.beta1.powf(step.step as f64), 1.0 - step.beta2.powf(step.step as f64));
    let denominator = v.sqrt()?.affine(1.0 / correction2.sqrt(), step.epsilon)?;
    let change = (&m / denominator)?.affine(step.learning_rate / correction1, 0.0)?;
    let shrunk =
        parameter.as_detached_tensor().to_dtype(dtype)?.affine(1.0 - step.learning_rate * step.weight_decay, 0.0)?;
    parameter.set(&(shrunk - change)?.to_dtype(parameter.dtype())?)?;
    (state.first_moment, state.second_moment) = (read(&m)?, read(&v)?);
    Ok(())
}

/// `Σ gradient²`, for the norm over all parameters. The sum does not depend on the number of threads.
pub fn squared_norm(gradient: &Tensor) -> Result<f64> {
    if !has_kernel(&[gradient]) {
        return Ok(gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_device(&Device::Cpu)?.to_scalar()?);
    }
    with_elements(gradient, |values| Ok(squares(values)))
}

/// The sum of squares, which does not depend on the number of threads.
pub fn squares(values: &[f32]) -> f64 {
    if values.len() <= CHUNK {
        return sum_of_squares(values);
    }
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(sum_of_squares).collect();
    sums.iter().sum()
}

#[derive(Clone, Copy)]
struct Coefficients {
    shrink: f32,
    step_size: f32,
    inverse_root_correction: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    epsilon: f32,
    gradient_scale: f32,
}

vectorised! {
    fn update<'a>(c: Coefficients, parameter: &'a mut [f32], gradient: &'a [f32], first: &'a mut [f32], second: &'a mut [f32]) {
        for (((p, &g), m), v) in parameter.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = g * c.gradient_scale;
            *m = c.beta1 * *m + c.one_minus_beta1 * g;
            *v = c.beta2 * *v + c.one_minus_beta2 * g * g;
            let denominator = v.sqrt() * c.inverse_root_correction + c.epsilon;
            *p = *p * c.shrink - c.step_size * *m / denominator;
        }
    }

    fn move_average<'a>(decay: f32, rest: f32, average: &'a mut [f32], values: &'a [f32]) {
        for (average, &value) in average.iter_mut().zip(values) {
            *average = decay * *average + rest * value;
        }
    }

    fn sum_of_squares<'a>(x: &'a [f32]) -> f64 {
        let mut lanes = [0.0_f64; LANES];
        for chunk in x.chunks(LANES) {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(x) * f64::from(x);
            }
        }
        lanes.iter().sum()
    }
}

struct Update<'a> {
    coefficients: Coefficients,
    gradient: &'a [f32],
    /// An operation is shared by reference; the lock gives its one user the moments to change.
    state: Mutex<&'a mut AdamwState>,
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "AdamW step"
    }

    fn cpu_fwd(&self, parameter: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let parameter = elements_mut(parameter, layout)?;
        let Ok(mut state) = self.state.lock() else {
            bail!("AdamW: a step failed before");
        };
        let AdamwState { first_moment, second_moment } = &mut **state;
        if parameter.len() <= CHUNK {
            update(self.coefficients, parameter, self.gradient, first_moment, second_moment);
            return Ok(());
        }
        (parameter.par_chunks_mut(CHUNK), self.gradient.par_chunks(CHUNK))
            .into_par_iter()
            .zip((first_moment.par_chunks_mut(CHUNK), second_moment.par_chunks_mut(CHUNK)))
            .for_each(|((parameter, gradient), (first, second))| {
                update(self.coefficients, parameter, gradient, first, second);
            });
        Ok(())
    }
}

/// `a ← decay a + (1 - decay) w` for pairs of an average `a` and a variable `w`, in place, in one parallel
/// loop. The averages must not share memory.
///
/// # Errors
/// That of the first pair that has one.
pub fn move_averages<'a, 'v>(pairs: impl IntoIterator<Item = (&'a mut Tensor, &'v Var)>, decay: f64) -> Result<()> {
    let pairs: Vec<_> = pairs.into_iter().collect();
    let results = pairs.into_par_iter().map(|(average, variable)| {
        let is_plain = average.is_contiguous() && average.shape() == variable.shape();
        if !is_plain || !has_kernel(&[average, variable]) {
            let kept = average.affine(decay, 0.0)?;
            *average = (kept + variable.as_tensor().detach().affine(1.0 - decay, 0.0)?)?;
            return Ok(());
        }
        with_elements(variable, |values| Ok(average.inplace_op1(&MovingAverage { decay, values })?))
    });
    let results: Vec<Result<()>> = results.collect();
    results.into_iter().collect()
}

struct MovingAverage<'a> {
    decay: f64,
    values: &'a [f32],
}

impl InplaceOp1 for MovingAverage<'_> {
    fn name(&self) -> &'static str {
        "moving average"
    }

    fn cpu_fwd(&self, average: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (decay, rest) = (self.decay as f32, (1.0 - self.decay) as f32);
        update_chunks(elements_mut(average, layout)?, |start, chunk| {
            move_average(decay, rest, chunk, &self.values[start..][..chunk.len()]);
        });
        Ok(())
    }
}

fn elements_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => bail!("expected contiguous single-precision numbers"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};

    const STEP: AdamwStep = AdamwStep {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.98,
        epsilon: 1e-6,
        weight_decay: 0.1,
        step: 1,
        gradient_scale: 0.5,
    };

    /// Three numbers after two steps, worked out by the paper's algorithm in double precision.
    #[test]
    fn two_steps_give_the_numbers_of_the_published_algorithm() -> Result<()> {
        let parameter = Var::new(&[1.0_f32, -2.0, 0.5], &Device::Cpu)?;
        let mut state = AdamwState::default();
        for (step, gradient) in (1..).zip([[0.2_f32, -0.4, 1e-6], [0.6, 0.1, -3e-6]]) {
            adamw(&parameter, &Tensor::new(&gradient, &Device::Cpu)?, &mut state, &AdamwStep { step, ..STEP })?;
        }
        for (found, expected) in parameter.to_vec1::<f32>()?.iter().zip([0.9788684, -1.9812974, 0.4982741]) {
            assert!((found - expected).abs() < 2e-7, "{found}, expected {expected}");
        }
        Ok(())
    }

    #[test]
    fn many_steps_agree_with_the_reference() -> Result<()> {
        for shape in [vec![1], vec![33, 700], vec![3, 5, 7]] {
            let initial = random(&shape, 1);
            let (ours, theirs) = (Var::from_tensor(&initial)?, Var::from_tensor(&initial)?);
            let (mut state, mut expected) = (AdamwState::default(), AdamwState::default());
            expected.first_moment = vec![0.0; initial.elem_count()];
            expected.second_moment = vec![0.0; initial.elem_count()];
            for step in 1..6 {
                let (gradient, step) = (random(&shape, 10 + step), AdamwStep { step, ..STEP });
                adamw(&ours, &gradient, &mut state, &step)?;
                adamw_reference(&theirs, &gradient, &mut expected, &step)?;
            }
            assert_close("parameter", &ours, &theirs, 1e-6);
            let moment = |values: &[f32]| Tensor::from_slice(values, values.len(), &Device::Cpu);
            assert_close("first moment", &moment(&state.first_moment)?, &moment(&expected.first_moment)?, 1e-6);
            assert_close("second moment", &moment(&state.second_moment)?, &moment(&expected.second_moment)?, 1e-6);
        }
        Ok(())
    }

    #[test]
    fn a_transposed_gradient_and_a_double_precision_parameter_are_taken() -> Result<()> {
        let initial = random(&[4, 6], 1);
        let gradient = random(&[6, 4], 2).t()?;
        let (single, double) = (Var::from_tensor(&initial)?, Var::from_tensor(&initial.to_dtype(DType::F64)?)?);
        adamw(&single, &gradient, &mut AdamwState::default(), &STEP)?;
        adamw(&double, &gradient.to_dtype(DType::F64)?, &mut AdamwState::default(), &STEP)?;
        assert_close("parameter", &single, &double, 1e-6);
        Ok(())
    }

    #[test]
    fn state_of_another_parameter_is_an_error() -> Result<()> {
        let parameter = Var::from_tensor(&random(&[4], 1))?;
        let mut state = AdamwState { first_moment: vec![0.0; 3], second_moment: vec![0.0; 3] };
        assert!(adamw(&parameter, &random(&[4], 2), &mut state, &STEP).is_err());
        assert!(adamw(&parameter, &random(&[2, 2], 2), &mut AdamwState::default(), &STEP).is_err());
        Ok(())
    }

    #[test]
    fn squares_are_exact_and_the_same_on_any_number_of_threads() -> Result<()> {
        let x = random(&[100_003], 1);
        let expected: f64 = x.to_vec1::<f32>()?.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let norms = [1, 2, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| squared_norm(&x)).unwrap()
        });
        assert!((norms[0] / expected - 1.0).abs() < 1e-12 && norms[0] == norms[1] && norms[0] == norms[2]);
        Ok(())
    }

    #[test]
    fn many_parameters_at_once_are_as_one_after_another_on_any_number_of_threads() -> Result<()> {
        // Smaller than a chunk, larger, and one without a kernel.
        let shapes: Vec<Vec<usize>> = (0..40).map(|index| vec![index + 1, 8]).chain([vec![300, 200]]).collect();
        let initial: Vec<Tensor> = (0..).zip(&shapes).map(|(seed, shape)| random(shape, seed)).collect();
        let gradients: Vec<Tensor> = (100..).zip(&shapes).map(|(seed, shape)| random(shape, seed)).collect();
        let double = |index: usize| if index == 7 { DType::F64 } else { DType::F32 };
        let variables = || -> Result<Vec<Var>> {
            let typed = initial.iter().enumerate().map(|(index, tensor)| tensor.to_dtype(double(index)));
            typed.map(|tensor| Ok(Var::from_tensor(&tensor?)?)).collect()
        };
        let numbers = |variables: &[Var]| -> Result<Vec<Vec<f64>>> {
            variables.iter().map(|variable| Ok(variable.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)).collect()
        };
        let expected = variables()?;
        for (variable, gradient) in expected.iter().zip(&gradients) {
            let gradient = gradient.to_dtype(variable.dtype())?;
            adamw(variable, &gradient, &mut AdamwState::default(), &STEP)?;
        }
        for threads in [1, 2, 3] {
            let found = variables()?;
            let mut states = vec![AdamwState::default(); shapes.len()];
            let mut updates = Vec::new();
            for ((parameter, gradient), state) in found.iter().zip(&gradients).zip(&mut states) {
                let gradient = Gradient::of_tensor(gradient.to_dtype(parameter.dtype())?)?;
                updates.push(AdamwUpdate { parameter, gradient, state, step: STEP });
            }
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| adamw_all(updates))?;
            assert_eq!(numbers(&found)?, numbers(&expected)?, "{threads} threads");
        }
        Ok(())
    }

    #[test]
    fn of_many_parameters_the_first_that_does_not_fit_is_the_error() -> Result<()> {
        let parameters = [3, 4, 5].map(|length| Var::from_tensor(&random(&[length], 1)).unwrap());
        let mut states = vec![AdamwState::default(); 3];
        let updates = parameters.iter().zip(&mut states).map(|(parameter, state)| {
            let gradient = Gradient::of_tensor(random(&[3], 2)).unwrap();
            AdamwUpdate { parameter, gradient, state, step: STEP }
        });
        let error = adamw_all(updates.collect()).unwrap_err().to_string();
        assert!(error.contains("of shape [4] does not fit a gradient of shape [3]"), "{error}");
        Ok(())
    }

    #[test]
    fn averages_move_as_in_candles_operations() -> Result<()> {
        let shapes = [vec![3], vec![170, 200], vec![5, 4]];
        let variables: Vec<Var> = (1..)
            .zip(&shapes)
            .map(|(seed, shape)| Ok(Var::from_tensor(&random(shape, seed))?))
            .collect::<Result<_>>()?;
        let mut averages: Vec<Tensor> = (9..).zip(&shapes).map(|(seed, shape)| random(shape, seed)).collect();
        // Not contiguous, so that candle's operations have to do it.
        averages[2] = random(&[4, 5], 3).t()?;
        let expected = averages.iter().zip(&variables).map(|(average, variable)| {
            Ok((average.affine(0.9, 0.0)? + variable.as_detached_tensor().affine(1.0 - 0.9, 0.0)?)?)
        });
        let expected: Vec<Tensor> = expected.collect::<Result<_>>()?;
        move_averages(averages.iter_mut().zip(&variables), 0.9)?;
        for (found, expected) in averages.iter().zip(&expected) {
            assert_eq!(found.flatten_all()?.to_vec1::<f32>()?, expected.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(())
    }
}
