//! One step of AdamW on one parameter, in candle's own operations.

use candle_core::{DType, Tensor, Var};

use crate::error::Result;

/// The moments of a parameter: running means of its gradient and of the square of its gradient.
#[derive(Debug, Default)]
pub struct AdamwState {
    moments: Option<(Tensor, Tensor)>,
}

/// The numbers of one step.
#[derive(Debug, Clone, Copy)]
pub struct AdamwStep {
    /// The learning rate.
    pub learning_rate: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The number of this step, the first being 1.
    pub step: u64,
    /// The gradient is multiplied by it.
    pub gradient_scale: f32,
}

/// Changes `parameter` in place by one step of AdamW (Loshchilov & Hutter 2019, algorithm 2; as `torch.optim.AdamW`).
pub fn adamw(parameter: &Var, gradient: &Tensor, state: &mut AdamwState, step: &AdamwStep) -> Result<()> {
    let gradient = (gradient * f64::from(step.gradient_scale))?;
    let (first, second) = match state.moments.take() {
        Some(moments) => moments,
        None => (gradient.zeros_like()?, gradient.zeros_like()?),
    };
    let first = ((first * step.beta1)? + (&gradient * (1.0 - step.beta1))?)?;
    let second = ((second * step.beta2)? + (gradient.sqr()? * (1.0 - step.beta2))?)?;
    let correction = |beta: f64| 1.0 - beta.powf(step.step as f64);
    let root = (second.sqrt()? / correction(step.beta2).sqrt())?;
    let change = (&first / (root + step.epsilon)?)?;
    let decayed = (parameter.as_tensor() * (1.0 - step.learning_rate * step.weight_decay))?;
    parameter.set(&(decayed - (change * (step.learning_rate / correction(step.beta1)))?)?.detach())?;
    state.moments = Some((first, second));
    Ok(())
}

/// The sum of the squares of `gradient`'s entries.
pub fn squared_norm(gradient: &Tensor) -> Result<f64> {
    Ok(gradient.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?)
}
