//! Log-probabilities of target tokens, fused over hidden state, output matrix and target.

use std::ops::Range;

use candle_core::{D, Tensor};
use rayon::prelude::*;

use super::backward::{Backward, Gradient};
use super::matrix::{Matrix, MatrixMut, has_kernel, update_chunks, with_contiguous_rows, with_matrix};
use super::products::Products;
use super::simd::{LANES, exp, maximum_of, tanh, vectorised};
use super::value::{Source, Value, through_candle};
use super::weight::{Operand, Weight};
use crate::error::Result;

/// Rows whose logits are held at a time. Fixed, so that sums over targets do not depend on the number of threads.
pub const ROWS_OF_LOGITS: usize = 256;

/// What [`log_probs`] gives.
#[derive(Debug, Clone)]
pub struct LogProbs {
    /// `log softmax(z)[target]`, `[targets]`.
    pub log_probs: Value,
    /// `-Σ p log p` of the distribution the target was drawn from, `[targets]`.
    pub entropy: Value,
}

/// Log-probability of each target and entropy of its distribution, with logits `z = hidden Wᵀ / temperature`, or, with a soft cap (Gemma 2),
/// `z = cap tanh(hidden Wᵀ / cap) / temperature`.
///
/// `hidden` is `[targets, d_model]`, `weight` `[vocabulary, d_model]`. `[targets, vocabulary]` is never held: logits are made
/// in chunks, and again in the backward pass.
pub fn log_probs(
    hidden: &Value,
    weight: impl Into<Weight>,
    targets: &[u32],
    temperature: f64,
    soft_cap: Option<f64>,
) -> Result<LogProbs> {
    let both = both(hidden, &weight.into(), targets, temperature, soft_cap)?; // [2, targets]
    let row = |index: usize| both.narrow_rows(index, 1)?.reshape(targets.len());
    Ok(LogProbs { log_probs: row(0)?, entropy: row(1)? })
}

/// Log-probabilities and entropies, `[2, targets]`.
fn both(hidden: &Value, weight: &Weight, targets: &[u32], temperature: f64, soft_cap: Option<f64>) -> Result<Value> {
    if !has_kernel(&[hidden.tensor()]) || !weight.has_kernel() {
        return through_candle(&[hidden, &weight.to_value()?], |t| {
            reference(&t[0], &t[1], targets, temperature, soft_cap)
        });
    }
    let operation = Operation {
        targets: targets.to_vec(),
        inverse_temperature: (1.0 / temperature) as f32,
        soft_cap: soft_cap.map(|cap| cap as f32),
        products: weight.products().clone(),
    };
    let (hidden_rows, weight) = (with_contiguous_rows(hidden.tensor())?, weight.clone());
    let forward = with_matrix(&hidden_rows, |hidden| weight.with_operand(|weight| operation.forward(hidden, weight)))?;
    let Forward { result, log_sums, entropies } = forward;
    let result = Tensor::from_vec(result, (2, targets.len()), hidden.device())?;
    let sources = [hidden.source(), weight.source()];
    if sources.iter().all(Option::is_none) {
        return Ok(Value::constant(result));
    }
    Ok(Value::made_keeping(result, &[&hidden_rows.clone()], move |gradient, backward| {
        let given = Given { log_sums: &log_sums, entropies: &entropies, gradient: gradient.values()? };
        with_matrix(&hidden_rows, |hidden| {
            weight.with_operand(|weight| operation.backward(hidden, weight, &given, &sources, backward))
        })
    }))
}

/// The same in candle's own operations, `[2, targets]`.
pub fn reference(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    temperature: f64,
    soft_cap: Option<f64>,
) -> Result<Tensor> {
    let mut logits = hidden.matmul(&weight.t()?)?; // [targets, vocabulary]
    if let Some(cap) = soft_cap {
        logits = logits.affine(1.0 / cap, 0.0)?.tanh()?.affine(cap, 0.0)?;
    }
    let logits = logits.affine(1.0 / temperature, 0.0)?;
    let log_softmax = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
    let log_probs = log_softmax.gather(&index, 1)?.squeeze(1)?; // [targets]
    let entropy = (log_softmax.exp()? * &log_softmax)?.sum(D::Minus1)?.neg()?; // [targets]
    Ok(Tensor::stack(&[log_probs, entropy], 0)?)
}

vectorised! {
    /// `log Σ exp(z)` and the entropy of `softmax(z)`: with `m = max(z)` and `s = Σ exp(z - m)`, `m + log s` and
    /// `log s - Σ exp(z - m) (z - m) / s`.
    fn log_sum_and_entropy<'a>(logits: &'a [f32]) -> (f32, f32) {
        let maximum = maximum_of(logits);
        let (mut sums, mut weighted) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        let chunks = logits.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for lane in 0..LANES {
                let shifted = chunk[lane] - maximum;
                let power = exp(shifted);
                sums[lane] += power;
                weighted[lane] = power.mul_add(shifted, weighted[lane]);
            }
        }
        for (lane, &logit) in rest.iter().enumerate() {
            let shifted = logit - maximum;
            let power = exp(shifted);
            sums[lane] += power;
            weighted[lane] = power.mul_add(shifted, weighted[lane]);
        }
        let sum = sums.iter().map(|&x| f64::from(x)).sum::<f64>();
        let weighted = weighted.iter().map(|&x| f64::from(x)).sum::<f64>();
        ((f64::from(maximum) + sum.ln()) as f32, (sum.ln() - weighted / sum) as f32)
    }

    /// Turns logits into the gradient with respect to them, but for the `1[target]` of the log-probability:
    /// `-p (g_log_prob + g_entropy (log p + H))`.
    fn logit_gradients<'a>(logits: &'a mut [f32], log_sum: f32, entropy: f32, log_prob_gradient: f32, entropy_gradient: f32) {
        if entropy_gradient == 0.0 {
            for z in logits {
                *z = -log_prob_gradient * exp(*z - log_sum);
            }
        } else {
            let constant = entropy_gradient.mul_add(entropy, log_prob_gradient);
            for z in logits {
                let log_prob = *z - log_sum;
                *z = -exp(log_prob) * entropy_gradient.mul_add(log_prob, constant);
            }
        }
    }

    /// The same for capped logits, times the cap's derivative `1 - (z factor)²`.
    fn capped_logit_gradients<'a>(
        logits: &'a mut [f32], log_sum: f32, entropy: f32, log_prob_gradient: f32, entropy_gradient: f32, factor: f32
    ) {
        let constant = entropy_gradient.mul_add(entropy, log_prob_gradient);
        for z in logits {
            let (log_prob, tangent) = (*z - log_sum, *z * factor);
            *z = -exp(log_prob) * entropy_gradient.mul_add(log_prob, constant) * (1.0 - tangent * tangent);
        }
    }

    /// `cap tanh(z / cap) / temperature` in place of every logit `z`.
    fn cap_logits<'a>(logits: &'a mut [f32], cap: f32, inverse_temperature: f32) {
        let (inverse_cap, scale) = (1.0 / cap, cap * inverse_temperature);
        for z in logits {
            *z = scale * tanh(*z * inverse_cap);
        }
    }
}

struct Operation {
    targets: Vec<u32>,
    inverse_temperature: f32,
    soft_cap: Option<f32>,
    /// Those with the output matrix.
    products: Products,
}

/// What the forward pass computes.
struct Forward {
    /// Log-probabilities and entropies, `[2, targets]`.
    result: Vec<f32>,
    /// `log Σ exp(z)` of every target's logits, kept for the backward pass.
    log_sums: Vec<f32>,
    /// The entropies once more, for the same.
    entropies: Vec<f32>,
}

/// What the backward pass is given.
struct Given<'a> {
    log_sums: &'a [f32],
    entropies: &'a [f32],
    /// Of log-probabilities and entropies, `[2, targets]`.
    gradient: &'a [f32],
}

impl Operation {
    /// The logits of a chunk of rows, `[rows, vocabulary]`.
    fn logits(&self, products: &Products, hidden: Matrix, weight: Operand, rows: &Range<usize>, chunk: &mut [f32]) {
        let target = MatrixMut::new(chunk, rows.len(), weight.dims()[0]);
        let factor = if self.soft_cap.is_some() { 1.0 } else { self.inverse_temperature };
        products.times_transposed(target, false, factor, hidden.rows(rows.clone()), weight);
        if let Some(cap) = self.soft_cap {
            update_chunks(chunk, |_, logits| cap_logits(logits, cap, self.inverse_temperature));
        }
    }

    /// What a capped logit is multiplied with to have the tangent that it came from: `1 - (z factor)²` is then the cap's derivative.
    fn cap_factor(&self) -> Option<f32> {
        self.soft_cap.map(|cap| 1.0 / (cap * self.inverse_temperature))
    }

    fn check(&self, hidden: &Matrix, weight: &Operand) -> Result<()> {
        let [vocabulary, columns] = weight.dims();
        if hidden.columns != columns || hidden.rows != self.targets.len() {
            let (rows, width) = (hidden.rows, hidden.columns);
            crate::bail!(
                "log_probs: hidden [{rows}, {width}], weight [{vocabulary}, {columns}] and {} targets do not fit",
                self.targets.len()
            );
        }
        if let Some(target) = self.targets.iter().find(|&&target| target as usize >= vocabulary) {
            crate::bail!("log_probs: target {target} is outside the vocabulary of {vocabulary}");
        }
        Ok(())
    }
}

/// The chunks of rows and a buffer for the logits of one.
fn chunks(targets: usize, vocabulary: usize) -> (impl Iterator<Item = Range<usize>>, Vec<f32>) {
    let ranges = (0..targets).step_by(ROWS_OF_LOGITS).map(move |start| start..(start + ROWS_OF_LOGITS).min(targets));
    (ranges, vec![0.0; ROWS_OF_LOGITS.min(targets) * vocabulary])
}

impl Operation {
    fn forward(&self, hidden: Matrix, weight: Operand) -> Result<Forward> {
        self.check(&hidden, &weight)?;
        let (targets, [vocabulary, _]) = (hidden.rows, weight.dims());
        let mut result = vec![0.0; 2 * targets];
        let mut log_sums = vec![0.0; targets];
        let (log_probs, entropies) = result.split_at_mut(targets);
        let (ranges, mut buffer) = chunks(targets, vocabulary);
        let products = self.products.kept();
        for rows in ranges {
            let logits = &mut buffer[..rows.len() * vocabulary];
            self.logits(&products, hidden, weight, &rows, logits);
            (&mut log_probs[rows.clone()], &mut entropies[rows.clone()], &mut log_sums[rows.clone()])
                .into_par_iter()
                .zip(logits.par_chunks_exact(vocabulary))
                .zip(&self.targets[rows])
                .for_each(|(((log_prob, entropy, log_sum), logits), &target)| {
                    (*log_sum, *entropy) = log_sum_and_entropy(logits);
                    *log_prob = logits[target as usize] - *log_sum;
                });
        }
        let entropies = entropies.to_vec();
        Ok(Forward { result, log_sums, entropies })
    }

    /// Adds the gradients of `hidden` and of `weight`, where they have `sources`.
    fn backward(
        &self,
        hidden: Matrix,
        weight: Operand,
        given: &Given,
        sources: &[Option<Source>; 2],
        backward: &mut Backward,
    ) -> Result<()> {
        let (targets, [vocabulary, width]) = (hidden.rows, weight.dims());
        let (ranges, mut buffer) = chunks(targets, vocabulary);
        let products = self.products.kept();
        let ranges: Vec<Range<usize>> = ranges.collect();
        let mut d_hidden = sources[0].is_some().then(|| vec![0.0; targets * width]);
        let mut run = |d_weight: &mut Option<&mut [f32]>, accumulate: bool| {
            for rows in &ranges {
                let logits = &mut buffer[..rows.len() * vocabulary];
                self.logits(&products, hidden, weight, rows, logits);
                self.logit_gradients(rows, given, logits, vocabulary);
                let d_logits = Matrix::new(logits, rows.len(), vocabulary);
                if let Some(d_hidden) = &mut d_hidden {
                    let target = MatrixMut::new(&mut d_hidden[rows.start * width..rows.end * width], rows.len(), width);
                    products.times(target, false, self.inverse_temperature, d_logits, weight);
                }
                if let Some(d_weight) = d_weight {
                    let target = MatrixMut::new(d_weight, vocabulary, width);
                    let (hidden, adds) = (hidden.rows(rows.clone()), accumulate || rows.start > 0);
                    products.of_gradient(target, adds, self.inverse_temperature, d_logits, hidden);
                }
            }
            if let Some(d_weight) = d_weight.as_mut().filter(|_| ranges.is_empty() && !accumulate) {
                d_weight.fill(0.0);
            }
        };
        match &sources[1] {
            // SAFETY: the first product sets every number, or there is none and they are cleared.
            Some(source) => unsafe {
                backward.write(source, (vocabulary, width), |d_weight, accumulate| {
                    run(&mut Some(d_weight), accumulate);
                })
            }?,
            None => run(&mut None, false),
        }
        match (&sources[0], d_hidden) {
            (Some(source), Some(d_hidden)) => backward.add(source, Gradient::new(d_hidden, (targets, width))),
            _ => Ok(()),
        }
    }

    /// Turns the logits of some rows into the gradient with respect to them.
    fn logit_gradients(&self, rows: &Range<usize>, given: &Given, logits: &mut [f32], vocabulary: usize) {
        let (of_log_probs, of_entropies) = given.gradient.split_at(self.targets.len());
        logits.par_chunks_exact_mut(vocabulary).zip(rows.clone()).for_each(|(logits, row)| {
            let (log_prob_gradient, entropy_gradient) = (of_log_probs[row], of_entropies[row]);
            let target = self.targets[row] as usize;
            let slope = |z: f32| self.cap_factor().map_or(1.0, |factor| 1.0 - (z * factor) * (z * factor));
            let of_target = log_prob_gradient * slope(logits[target]);
            let (log_sum, entropy) = (given.log_sums[row], given.entropies[row]);
            match self.cap_factor() {
                None => logit_gradients(logits, log_sum, entropy, log_prob_gradient, entropy_gradient),
                Some(factor) => {
                    capped_logit_gradients(logits, log_sum, entropy, log_prob_gradient, entropy_gradient, factor);
                }
            }
            logits[target] += of_target;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        Operand, assert_same_bits_on_any_number_of_threads, compare, compare_with_finite_differences, random, run,
    };

    fn targets(count: usize, vocabulary: usize) -> Vec<u32> {
        (0..count).map(|index| (index * 7919 % vocabulary) as u32).collect()
    }

    #[test]
    fn values_and_gradients_are_those_of_the_reference() {
        for (count, vocabulary, width) in [(1, 2, 1), (7, 33, 5), (300, 65, 16), (513, 31, 8), (3, 1000, 24)] {
            let operands = [Operand::new(&[count, width]), Operand::new(&[vocabulary, width])];
            let targets = targets(count, vocabulary);
            for (temperature, cap) in [(1.0, None), (0.7, None), (0.7, Some(2.0))] {
                compare(
                    &operands,
                    |t| both(&t[0], &Weight::from(&t[1]), &targets, temperature, cap),
                    |t| reference(&t[0], &t[1], &targets, temperature, cap),
                );
                // Only the log-probability is used: the entropy's gradient is 0.
                compare(
                    &operands,
                    |t| Ok(log_probs(&t[0], &t[1], &targets, temperature, cap)?.log_probs),
                    |t| Ok(reference(&t[0], &t[1], &targets, temperature, cap)?.get(0)?),
                );
            }
        }
    }

    #[test]
    fn reference_agrees_with_finite_differences() {
        let operands = [Operand::new(&[3, 4]), Operand::new(&[5, 4])];
        for cap in [None, Some(1.5)] {
            compare_with_finite_differences(&operands, |t| both(&t[0], &Weight::from(&t[1]), &[0, 4, 2], 0.8, cap));
        }
    }

    #[test]
    fn large_logits_neither_overflow_nor_lose_the_entropy() -> Result<()> {
        let hidden = Tensor::new(&[[1000.0_f32], [0.0]], &candle_core::Device::Cpu)?;
        let weight = Tensor::new(&[[1.0_f32], [1.0], [-1.0], [-1.0]], &candle_core::Device::Cpu)?;
        let result = log_probs(&Value::of(&hidden), &Value::of(&weight), &[0, 0], 1.0, None)?;
        let (log_probs, entropy) =
            (result.log_probs.tensor().to_vec1::<f32>()?, result.entropy.tensor().to_vec1::<f32>()?);
        for (found, expected) in
            log_probs.iter().chain(&entropy).zip([-(2f32.ln()), -(4f32.ln()), 2f32.ln(), 4f32.ln()])
        {
            assert!((found - expected).abs() < 1e-4, "{found}, expected {expected}");
        }
        Ok(())
    }

    #[test]
    fn no_targets_give_no_values_and_zero_gradients() {
        let operands = [random(&[0, 4], 1), random(&[6, 4], 2)];
        let (value, gradients) = run(&operands, &[true, true], |t| both(&t[0], &Weight::from(&t[1]), &[], 1.0, None));
        assert_eq!(value.dims(), [2, 0]);
        assert!(
            gradients[1].as_ref().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|&x| x == 0.0)
        );
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_an_error() {
        let [hidden, weight] = [[1, 4], [6, 4]].map(|shape| Value::of(&random(&shape, 1)));
        let error = log_probs(&hidden, &weight, &[6], 1.0, None).unwrap_err().to_string();
        assert!(error.contains("target 6"), "{error}");
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let targets = targets(600, 300);
        let operands = [Operand::new(&[600, 96]), Operand::new(&[300, 96])];
        assert_same_bits_on_any_number_of_threads(&operands, |t| {
            both(&t[0], &Weight::from(&t[1]), &targets, 1.0, None)
        });
    }
}
