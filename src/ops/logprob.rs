//! Log-probabilities of target tokens, fused over hidden state, output matrix and target.

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, D, Layout, Shape, Tensor, bail};
use rayon::prelude::*;

use super::matrix::{
    Matrix, MatrixMut, Threads, has_kernel, multiply, update_chunks, with_contiguous_rows, with_elements, with_matrix,
};
use super::simd::{LANES, exp, maximum_of, tanh, vectorised};
use crate::error::Result;

/// Rows whose logits are held at a time. Fixed, so that sums over targets do not depend on the number of threads.
const ROWS: usize = 256;

/// What [`log_probs`] gives.
#[derive(Debug, Clone)]
pub struct LogProbs {
    /// `log softmax(z)[target]`, `[targets]`.
    pub log_probs: Tensor,
    /// `-Σ p log p` of the distribution the target was drawn from, `[targets]`.
    pub entropy: Tensor,
}

/// Log-probability of each target and entropy of its distribution, with logits `z = hidden Wᵀ / temperature`, or, with a soft cap (Gemma 2),
/// `z = cap tanh(hidden Wᵀ / cap) / temperature`.
///
/// `hidden` is `[targets, d_model]`, `weight` `[vocabulary, d_model]`. `[targets, vocabulary]` is never held: logits are made
/// in chunks, and again in the backward pass.
pub fn log_probs(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    temperature: f64,
    soft_cap: Option<f64>,
) -> Result<LogProbs> {
    if !has_kernel(&[hidden, weight]) {
        return reference(hidden, weight, targets, temperature, soft_cap);
    }
    let operation = Operation {
        targets: targets.to_vec(),
        inverse_temperature: (1.0 / temperature) as f32,
        soft_cap: soft_cap.map(|cap| cap as f32),
        log_sums: OnceLock::new(),
    };
    let both = with_contiguous_rows(hidden)?.apply_op2(&with_contiguous_rows(weight)?, operation)?; // [2, targets]
    Ok(LogProbs { log_probs: both.get(0)?, entropy: both.get(1)? })
}

/// The same in candle's own operations.
pub fn reference(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    temperature: f64,
    soft_cap: Option<f64>,
) -> Result<LogProbs> {
    let mut logits = hidden.matmul(&weight.t()?)?; // [targets, vocabulary]
    if let Some(cap) = soft_cap {
        logits = logits.affine(1.0 / cap, 0.0)?.tanh()?.affine(cap, 0.0)?;
    }
    let logits = logits.affine(1.0 / temperature, 0.0)?;
    let log_softmax = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
    let index = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
    let log_probs = log_softmax.gather(&index, 1)?.squeeze(1)?; // [targets]
    let entropy = (log_softmax.exp()? * &log_softmax)?.sum(D::Minus1)?.neg()?; // [targets]
    Ok(LogProbs { log_probs, entropy })
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
    /// `log Σ exp(z)` of every target's logits, kept for the backward pass.
    log_sums: OnceLock<Vec<f32>>,
}

impl Operation {
    /// The logits of a chunk of rows, `[rows, vocabulary]`.
    fn logits(&self, hidden: Matrix, weight: Matrix, rows: &Range<usize>, chunk: &mut [f32]) {
        let target = MatrixMut::new(chunk, rows.len(), weight.rows);
        let factor = if self.soft_cap.is_some() { 1.0 } else { self.inverse_temperature };
        multiply(target, false, factor, hidden.rows(rows.clone()), weight.t(), Threads::All);
        if let Some(cap) = self.soft_cap {
            update_chunks(chunk, |_, logits| cap_logits(logits, cap, self.inverse_temperature));
        }
    }

    /// What a capped logit is multiplied with to have the tangent that it came from: `1 - (z factor)²` is then the cap's derivative.
    fn cap_factor(&self) -> Option<f32> {
        self.soft_cap.map(|cap| 1.0 / (cap * self.inverse_temperature))
    }

    fn check(&self, hidden: &Matrix, weight: &Matrix) -> candle_core::Result<()> {
        let vocabulary = weight.rows;
        if hidden.columns != weight.columns || hidden.rows != self.targets.len() {
            let (rows, width) = (hidden.rows, hidden.columns);
            bail!(
                "log_probs: hidden [{rows}, {width}], weight [{vocabulary}, {}] and {} targets do not fit",
                weight.columns,
                self.targets.len()
            );
        }
        if let Some(target) = self.targets.iter().find(|&&target| target as usize >= vocabulary) {
            bail!("log_probs: target {target} is outside the vocabulary of {vocabulary}");
        }
        Ok(())
    }
}

/// The chunks of rows and a buffer for the logits of one.
fn chunks(targets: usize, vocabulary: usize) -> (impl Iterator<Item = Range<usize>>, Vec<f32>) {
    let ranges = (0..targets).step_by(ROWS).map(move |start| start..(start + ROWS).min(targets));
    (ranges, vec![0.0; ROWS.min(targets) * vocabulary])
}

impl CustomOp2 for Operation {
    fn name(&self) -> &'static str {
        "log_probs"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (hidden, weight) =
            (Matrix::from_storage(hidden, hidden_layout)?, Matrix::from_storage(weight, weight_layout)?);
        self.check(&hidden, &weight)?;
        let (targets, vocabulary) = (hidden.rows, weight.rows);
        let mut result = vec![0.0; 2 * targets];
        let mut log_sums = vec![0.0; targets];
        let (log_probs, entropies) = result.split_at_mut(targets);
        let (ranges, mut buffer) = chunks(targets, vocabulary);
        for rows in ranges {
            let logits = &mut buffer[..rows.len() * vocabulary];
            self.logits(hidden, weight, &rows, logits);
            (&mut log_probs[rows.clone()], &mut entropies[rows.clone()], &mut log_sums[rows.clone()])
                .into_par_iter()
                .zip(logits.par_chunks_exact(vocabulary))
                .zip(&self.targets[rows])
                .for_each(|(((log_prob, entropy, log_sum), logits), &target)| {
                    (*log_sum, *entropy) = log_sum_and_entropy(logits);
                    *log_prob = logits[target as usize] - *log_sum;
                });
        }
        // Set once a forward pass, and an operation is run forward once.
        let _ = self.log_sums.set(log_sums);
        Ok((CpuStorage::F32(result), (2, targets).into()))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(log_sums) = self.log_sums.get() else {
            bail!("log_probs: backward without forward");
        };
        let (d_hidden, d_weight) = with_matrix(hidden, |h| {
            with_matrix(weight, |w| {
                with_elements(result, |result| {
                    with_elements(gradient, |gradient| {
                        let entropies = &result[self.targets.len()..];
                        Ok(self.backward(h, w, log_sums, entropies, gradient, (hidden.track_op(), weight.track_op())))
                    })
                })
            })
        })?;
        let tensor = |values: Option<Vec<f32>>, like: &Tensor| {
            values.map(|values| Tensor::from_vec(values, like.shape(), like.device())).transpose()
        };
        Ok((tensor(d_hidden, hidden)?, tensor(d_weight, weight)?))
    }
}

impl Operation {
    /// The gradients of `hidden` and of `weight`, where `tracked`.
    fn backward(
        &self,
        hidden: Matrix,
        weight: Matrix,
        log_sums: &[f32],
        entropies: &[f32],
        gradient: &[f32],
        tracked: (bool, bool),
    ) -> (Option<Vec<f32>>, Option<Vec<f32>>) {
        let (targets, vocabulary, width) = (hidden.rows, weight.rows, weight.columns);
        let (log_prob_gradient, entropy_gradient) = gradient.split_at(targets);
        let mut d_hidden = tracked.0.then(|| vec![0.0; targets * width]);
        let mut d_weight = tracked.1.then(|| vec![0.0; vocabulary * width]);
        let (ranges, mut buffer) = chunks(targets, vocabulary);
        for rows in ranges {
            let logits = &mut buffer[..rows.len() * vocabulary];
            self.logits(hidden, weight, &rows, logits);
            logits.par_chunks_exact_mut(vocabulary).zip(rows.clone()).for_each(|(logits, row)| {
                let (log_prob_gradient, entropy_gradient) = (log_prob_gradient[row], entropy_gradient[row]);
                let target = self.targets[row] as usize;
                let slope = |z: f32| self.cap_factor().map_or(1.0, |factor| 1.0 - (z * factor) * (z * factor));
                let of_target = log_prob_gradient * slope(logits[target]);
                let (log_sum, entropy) = (log_sums[row], entropies[row]);
                match self.cap_factor() {
                    None => logit_gradients(logits, log_sum, entropy, log_prob_gradient, entropy_gradient),
                    Some(factor) => {
                        capped_logit_gradients(logits, log_sum, entropy, log_prob_gradient, entropy_gradient, factor);
                    }
                }
                logits[target] += of_target;
            });
            let d_logits = Matrix::new(logits, rows.len(), vocabulary);
            if let Some(d_hidden) = &mut d_hidden {
                let target = MatrixMut::new(&mut d_hidden[rows.start * width..rows.end * width], rows.len(), width);
                multiply(target, false, self.inverse_temperature, d_logits, weight, Threads::All);
            }
            if let Some(d_weight) = &mut d_weight {
                let target = MatrixMut::new(d_weight, vocabulary, width);
                let hidden = hidden.rows(rows.clone());
                multiply(target, rows.start > 0, self.inverse_temperature, d_logits.t(), hidden, Threads::All);
            }
        }
        (d_hidden, d_weight)
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

    fn stacked(result: Result<LogProbs>) -> Result<Tensor> {
        let LogProbs { log_probs, entropy } = result?;
        Ok(Tensor::stack(&[log_probs, entropy], 0)?)
    }

    #[test]
    fn values_and_gradients_are_those_of_the_reference() {
        for (count, vocabulary, width) in [(1, 2, 1), (7, 33, 5), (300, 65, 16), (513, 31, 8), (3, 1000, 24)] {
            let operands = [Operand::new(&[count, width]), Operand::new(&[vocabulary, width])];
            let targets = targets(count, vocabulary);
            for (temperature, cap) in [(1.0, None), (0.7, None), (0.7, Some(2.0))] {
                compare(
                    &operands,
                    |t| stacked(log_probs(&t[0], &t[1], &targets, temperature, cap)),
                    |t| stacked(reference(&t[0], &t[1], &targets, temperature, cap)),
                );
                // Only the log-probability is used: the entropy's gradient is 0.
                compare(
                    &operands,
                    |t| Ok(log_probs(&t[0], &t[1], &targets, temperature, cap)?.log_probs),
                    |t| Ok(reference(&t[0], &t[1], &targets, temperature, cap)?.log_probs),
                );
            }
        }
    }

    #[test]
    fn reference_agrees_with_finite_differences() {
        let operands = [Operand::new(&[3, 4]), Operand::new(&[5, 4])];
        for cap in [None, Some(1.5)] {
            compare_with_finite_differences(&operands, |t| stacked(log_probs(&t[0], &t[1], &[0, 4, 2], 0.8, cap)));
        }
    }

    #[test]
    fn large_logits_neither_overflow_nor_lose_the_entropy() -> Result<()> {
        let hidden = Tensor::new(&[[1000.0_f32], [0.0]], &candle_core::Device::Cpu)?;
        let weight = Tensor::new(&[[1.0_f32], [1.0], [-1.0], [-1.0]], &candle_core::Device::Cpu)?;
        let result = log_probs(&hidden, &weight, &[0, 0], 1.0, None)?;
        let (log_probs, entropy) = (result.log_probs.to_vec1::<f32>()?, result.entropy.to_vec1::<f32>()?);
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
        let (value, gradients) = run(&operands, &[true, true], |t| stacked(log_probs(&t[0], &t[1], &[], 1.0, None)));
        assert_eq!(value.dims(), [2, 0]);
        assert!(
            gradients[1].as_ref().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|&x| x == 0.0)
        );
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_an_error() {
        let error = log_probs(&random(&[1, 4], 1), &random(&[6, 4], 2), &[6], 1.0, None).unwrap_err().to_string();
        assert!(error.contains("target 6"), "{error}");
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let targets = targets(600, 300);
        let operands = [Operand::new(&[600, 96]), Operand::new(&[300, 96])];
        assert_same_bits_on_any_number_of_threads(&operands, |t| stacked(log_probs(&t[0], &t[1], &targets, 1.0, None)));
    }
}
