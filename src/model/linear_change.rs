//! What the changes of several adapters make of one linear.

use candle_core::Tensor;

use super::adapter::{Linear, LinearChange, LowRankChange, Pass, StepRows};
use crate::error::Result;
use crate::ops::{self, LowRank, Mask, Value, Weight};
use crate::random;

impl LinearChange {
    /// Whether a gradient may depend on the numbers that the linear gives.
    pub(super) fn reads_output(&self) -> bool {
        self.magnitude.is_some() || self.rows.is_some() || self.output_scale.is_some()
    }

    /// Whether it is a plain low-rank update, which can be added to the base's output.
    pub(super) fn is_low_rank(&self) -> bool {
        self.weight.is_none()
            && self.rows.is_none()
            && self.input_scale.is_none()
            && self.magnitude.is_none()
            && self.bias.is_none()
            && self.output_scale.is_none()
    }
}

/// The linear that the changes start from, and the changes that count: a whole weight takes the place of everything before it.
fn start<'a>(linear: &Linear, changes: &'a [LinearChange]) -> (Linear, &'a [LinearChange]) {
    let Some(first) = changes.iter().rposition(|change| change.weight.is_some()) else {
        return (linear.clone(), changes);
    };
    let weight = changes[first].weight.clone().unwrap_or_else(|| linear.weight.clone());
    // A bias stays until another takes its place.
    let bias = changes[..first].iter().rev().find_map(|change| change.bias.clone()).or(linear.bias.clone());
    (Linear { name: linear.name.clone(), weight, bias }, &changes[first..])
}

/// Which of the changes of one linear has a magnitude (DoRA), where others of them update the weight that its
/// norm is taken of: such changes do not add up, and neither `changed_linear` nor `changed_weight` is
/// given them.
pub fn magnitude_beside_updates(changes: &[LinearChange]) -> Option<usize> {
    // A whole weight takes the place of everything before it.
    let first = changes.iter().rposition(|change| change.weight.is_some()).unwrap_or(0);
    let counted = &changes[first..];
    let magnitude = counted.iter().position(|change| change.magnitude.is_some())?;
    let updates =
        counted.iter().map(|change| change.low_rank.len() + usize::from(change.rows.is_some())).sum::<usize>();
    (updates > 1).then_some(first + magnitude)
}

/// A linear with changes, one on top of the other, `[rows, d_out]`.
pub(super) fn changed_linear(linear: &Linear, x: &Value, changes: &[LinearChange], pass: &Pass) -> Result<Value> {
    let (linear, changes) = &start(linear, changes);
    let mut input = x.clone();
    for scale in changes.iter().filter_map(|change| change.input_scale.as_ref()) {
        input = input.scale_columns(scale)?; // [rows, d_in]
    }
    let bias = changes.iter().rev().find_map(|change| change.bias.as_ref()).or(linear.bias.as_ref());
    let magnitude = changes.iter().find(|change| change.magnitude.is_some());
    let mut y = match magnitude {
        Some(change) => decomposed(linear, &input, bias, change, pass)?,
        None if changes.iter().any(|change| change.rows.is_some()) => with_rows(linear, &input, bias, changes, pass)?,
        None => updated(linear, &input, bias, changes.iter().flat_map(|change| &change.low_rank), pass)?,
    }; // [rows, d_out]
    for scale in changes.iter().filter_map(|change| change.output_scale.as_ref()) {
        y = y.scale_columns(scale)?;
    }
    Ok(y)
}

/// The weight `[d_out, d_in]` with which a linear without bias gives what the changes make of it, dropout
/// apart, in candle's operations.
pub(super) fn changed_weight(linear: &Linear, changes: &[LinearChange]) -> Result<Tensor> {
    let (linear, changes) = &start(linear, changes);
    let mut weight = linear.weight.in_candle()?;
    for LinearChange { low_rank, magnitude, rows, .. } in *changes {
        let base = weight.clone();
        for LowRankChange { down, up, scale, .. } in low_rank {
            weight = (weight + up.in_candle().matmul(&down.in_candle())?.affine(*scale, 0.0)?)?;
        }
        if let (Some(magnitude), Some(update)) = (magnitude, low_rank.first()) {
            let factor = magnitude.in_candle().div(&updated_row_norms(&Weight::from(&Value::of(&base)), update)?)?; // [d_out]
            weight = weight.broadcast_mul(&factor.unsqueeze(1)?)?;
        }
        if let Some(rows) = rows {
            weight = rows.applied(&weight)?;
        }
    }
    for scale in changes.iter().filter_map(|change| change.input_scale.as_ref()) {
        weight = weight.broadcast_mul(&scale.in_candle().unsqueeze(0)?)?;
    }
    for scale in changes.iter().filter_map(|change| change.output_scale.as_ref()) {
        weight = weight.broadcast_mul(&scale.in_candle().unsqueeze(1)?)?;
    }
    Ok(weight)
}

/// The linear, of one weight and bias, that computes what the changes make of this one, dropout apart: scales
/// count for all updates, whichever of them comes first, as in `changed_linear`.
pub fn folded(linear: &Linear, changes: &[LinearChange]) -> Result<Linear> {
    let weight = changed_weight(linear, changes)?;
    let (linear, changes) = &start(linear, changes);
    let bias = changes.iter().rev().find_map(|change| change.bias.as_ref()).or(linear.bias.as_ref());
    let mut bias = bias.map(|bias| bias.tensor().clone());
    for scale in changes.iter().filter_map(|change| change.output_scale.as_ref()) {
        bias = bias.map(|bias| bias.mul(scale.tensor())).transpose()?;
    }
    Ok(Linear {
        name: linear.name.clone(),
        weight: Weight::new(&weight.detach(), None),
        bias: bias.map(Value::constant),
    })
}

/// `W' x + b + Σ s B A x`, single rows of `W` replaced in `W'` where their change comes.
fn with_rows(linear: &Linear, x: &Value, bias: Option<&Value>, changes: &[LinearChange], pass: &Pass) -> Result<Value> {
    let mut y = ops::linear(x, &linear.weight, None)?; // [rows, d_out]
    for change in changes {
        for update in &change.low_rank {
            y = y.add(&product(update, linear, x, pass)?)?;
        }
        if let Some(rows) = &change.rows {
            y = rows.of_outputs(&y, x)?;
        }
    }
    bias.map_or(Ok(y.clone()), |bias| y.add_to_columns(bias))
}

/// `W x + b + Σ s B A x`.
fn updated<'a>(
    linear: &Linear,
    x: &Value,
    bias: Option<&Value>,
    mut updates: impl Iterator<Item = &'a LowRankChange>,
    pass: &Pass,
) -> Result<Value> {
    let Some(first) = updates.next() else { return ops::linear(x, &linear.weight, bias) };
    let mut y = ops::low_rank_linear(x, &linear.weight, bias, &low_rank(first, linear, pass))?; // [rows, d_out]
    for update in updates {
        y = y.add(&product(update, linear, x, pass)?)?;
    }
    Ok(y)
}

/// `s B A x`, `[rows, d_out]`.
fn product(update: &LowRankChange, linear: &Linear, x: &Value, pass: &Pass) -> Result<Value> {
    let LowRank { a, b, scale, dropout } = low_rank(update, linear, pass);
    let x = dropout.map_or_else(|| Ok(x.clone()), |mask| ops::dropout(x, &mask))?;
    ops::linear(&ops::linear(&x, a, None)?, b, None)?.scale(scale)
}

fn low_rank<'a>(change: &'a LowRankChange, linear: &Linear, pass: &Pass) -> LowRank<'a> {
    let mask = |rows: StepRows| Mask {
        probability: change.dropout as f32,
        seed: random::named_seed(rows.seed, &linear.name),
        first_row: rows.first_row,
    };
    let dropout = pass.dropout.filter(|_| change.dropout > 0.0).map(mask);
    LowRank { a: &change.down, b: &change.up, scale: change.scale, dropout }
}

/// DoRA: `f ⊙ (W x + s B A x) + b` with `f = m / |W + s B A|`, the norm a constant to the gradient (Liu et al. 2024, section 4.3). With dropout,
/// `W x + (f - 1) ⊙ W x' + f ⊙ s B A x' + b`, as in PEFT.
fn decomposed(linear: &Linear, x: &Value, bias: Option<&Value>, change: &LinearChange, pass: &Pass) -> Result<Value> {
    let (Some(update), Some(magnitude)) = (change.low_rank.first(), &change.magnitude) else {
        crate::bail!("{}: a magnitude stands beside a low-rank update", linear.name);
    };
    let factor = magnitude.in_candle().div(&updated_row_norms(&linear.weight, update)?)?; // [d_out]
    let (scaled, base) = match low_rank(update, linear, pass) {
        LowRank { dropout: None, .. } => (updated(linear, x, None, std::iter::once(update), pass)?, None),
        LowRank { a, b, scale, dropout: Some(mask) } => {
            let dropped = ops::dropout(x, &mask)?;
            let kept = ops::low_rank_linear(&dropped, &linear.weight, None, &LowRank { a, b, scale, dropout: None })?;
            let of_dropped = ops::linear(&dropped, &linear.weight, None)?;
            (kept, Some(ops::linear(x, &linear.weight, None)?.add(&of_dropped.scale(-1.0)?)?))
        }
    };
    let mut y = scaled.scale_columns(&Value::of(&factor))?; // [rows, d_out]
    if let Some(base) = base {
        y = y.add(&base)?;
    }
    bias.map_or(Ok(y.clone()), |bias| y.add_to_columns(bias))
}

/// The norm of every row of `W + s B A`, `[d_out]`, without making that matrix:
/// `|w + s b A|² = |w|² + 2 s b · (A w) + s² b (A Aᵀ) bᵀ`.
pub fn updated_row_norms(weight: &Weight, update: &LowRankChange) -> Result<Tensor> {
    let (weight, [down, up]) = (weight.detach(), [&update.down, &update.up].map(Value::detach));
    let sum_of_products = |a: &Value, b: Value| -> Result<Tensor> { Ok(a.tensor().mul(b.tensor())?.sum(1)?) };
    let of_weight = weight.row_squares()?; // [d_out]
    let crossed = ops::linear(&down, weight.exact(), None)?; // A Wᵀ, [rank, d_out]
    let crossed = sum_of_products(&up, Value::constant(crossed.tensor().t()?.contiguous()?))?; // [d_out]
    let of_update = sum_of_products(&up, ops::linear(&up, &ops::linear(&down, &down, None)?, None)?)?; // [d_out]
    let scale = update.scale;
    Ok(((of_weight + crossed.affine(2.0 * scale, 0.0)?)? + of_update.affine(scale * scale, 0.0)?)?.sqrt()?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn a_magnitude_counts_with_its_own_update_alone() -> Result<()> {
        let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).map(Value::constant);
        let update = LowRankChange { down: ones(&[1, 2])?, up: ones(&[3, 1])?, scale: 1.0, dropout: 0.0 };
        let low_rank = LinearChange { low_rank: vec![update.clone()], ..LinearChange::default() };
        let decomposed = LinearChange { magnitude: Some(ones(&[3])?), ..low_rank.clone() };
        let whole = LinearChange { weight: Some(Weight::from(&ones(&[3, 2])?)), ..LinearChange::default() };
        let scaled = LinearChange { output_scale: Some(ones(&[3])?), ..LinearChange::default() };
        let twice = LinearChange { low_rank: vec![update.clone(), update], ..decomposed.clone() };
        let found = |changes: &[&LinearChange]| {
            magnitude_beside_updates(&changes.iter().map(|change| (*change).clone()).collect::<Vec<_>>())
        };
        assert_eq!(found(&[&decomposed]), None);
        assert_eq!(found(&[&scaled, &decomposed, &scaled]), None);
        assert_eq!(found(&[&low_rank, &low_rank]), None);
        assert_eq!(found(&[&low_rank, &whole, &decomposed]), None);
        assert_eq!(found(&[&decomposed, &whole, &low_rank]), None);
        assert_eq!(found(&[&low_rank, &decomposed]), Some(1));
        assert_eq!(found(&[&whole, &decomposed, &low_rank]), Some(1));
        assert_eq!(found(&[&decomposed, &decomposed]), Some(0));
        assert_eq!(found(&[&twice]), Some(0));
        Ok(())
    }
}
