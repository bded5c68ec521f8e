//! Drawing the next token from logits.

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::Result;
use crate::random::Stream;

/// How answers are sampled.
#[derive(Debug, Clone, Copy, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct SamplingSettings {
    /// Divides the logits; 0 takes the most probable token
    #[arg(long, default_value_t = SamplingSettings::default().temperature)]
    pub temperature: f64,
    /// Samples from the most probable tokens only, this many; 0 for all
    #[arg(long, default_value_t = SamplingSettings::default().top_k)]
    pub top_k: usize,
    /// Samples from the fewest tokens that hold this share of the probability (nucleus sampling, Holtzman et al. 2019)
    #[arg(long, default_value_t = SamplingSettings::default().top_p)]
    pub top_p: f64,
    /// The most tokens that an answer may have
    #[arg(long, default_value_t = SamplingSettings::default().response_length)]
    pub response_length: usize,
}

impl Default for SamplingSettings {
    fn default() -> Self {
        SamplingSettings { temperature: 1.0, top_k: 0, top_p: 1.0, response_length: 53 }
    }
}

impl SamplingSettings {
    /// Refuses settings from which nothing can be sampled.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            bail!("--temperature is {}; expected a number of at least 0", self.temperature);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            bail!("--top-p is {}; expected a number above 0 and at most 1", self.top_p);
        }
        if self.response_length == 0 {
            bail!("--response-length is 0; expected at least 1 token");
        }
        Ok(())
    }

    /// The next token, given the logits `[vocabulary]` and the answer's own stream, and its log-probability at the temperature among all tokens,
    /// those that are not sampled from included.
    pub fn draw(&self, logits: &[f32], stream: &mut Stream) -> (u32, f32) {
        if self.temperature == 0.0 {
            return (most_probable(logits), 0.0);
        }
        let maximum = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let inverse = (1.0 / self.temperature) as f32;
        let mut weights: Vec<f32> = logits.iter().map(|&logit| ((logit - maximum) * inverse).exp()).collect();
        let whole: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
        let mut total = whole;
        if self.top_k > 0 || self.top_p < 1.0 {
            self.truncate(&mut weights);
            total = weights.iter().map(|&weight| f64::from(weight)).sum();
        }
        let mut left = stream.random::<f64>() * total;
        let mut last = 0;
        for (token, &weight) in weights.iter().enumerate() {
            if weight > 0.0 {
                last = token;
                left -= f64::from(weight);
                if left < 0.0 {
                    break;
                }
            }
        }
        (last as u32, (f64::from(weights[last]) / whole).ln() as f32)
    }

    /// Sets the weights of all tokens outside the top k and the nucleus to 0.
    fn truncate(&self, weights: &mut [f32]) {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
        let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
        let mut kept = if self.top_k > 0 { self.top_k.min(order.len()) } else { order.len() };
        let mut sum = 0.0;
        for (rank, &token) in order.iter().enumerate() {
            sum += f64::from(weights[token]);
            if sum >= self.top_p * total {
                kept = kept.min(rank + 1);
                break;
            }
        }
        order[kept..].iter().for_each(|&token| weights[token] = 0.0);
    }
}

fn most_probable(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    fn frequencies(settings: &SamplingSettings, logits: &[f32]) -> Vec<f64> {
        let mut stream = random::stream(3, "test", 0);
        let mut counts = vec![0; logits.len()];
        const DRAWS: usize = 40_000;
        (0..DRAWS).for_each(|_| counts[settings.draw(logits, &mut stream).0 as usize] += 1);
        counts.into_iter().map(|count| f64::from(count) / DRAWS as f64).collect()
    }

    #[test]
    fn draws_follow_the_softmax_at_the_temperature() {
        let logits = [0.0, 1.0, 2.0, -1.0];
        for temperature in [0.5, 1.0, 2.0] {
            let settings = SamplingSettings { temperature, ..Default::default() };
            let total: f64 = logits.iter().map(|&logit| (f64::from(logit) / temperature).exp()).sum();
            for (found, &logit) in frequencies(&settings, &logits).iter().zip(&logits) {
                assert!((found - (f64::from(logit) / temperature).exp() / total).abs() < 0.01);
            }
        }
    }

    #[test]
    fn the_log_probability_is_that_of_the_whole_softmax() {
        let logits = [0.0, 1.0, 2.0, -1.0];
        let total: f64 = logits.iter().map(|&logit| (f64::from(logit) / 0.5).exp()).sum();
        let settings = SamplingSettings { temperature: 0.5, top_k: 2, ..Default::default() };
        let (token, log_prob) = settings.draw(&logits, &mut random::stream(3, "test", 1));
        let expected = f64::from(logits[token as usize]) / 0.5 - total.ln();
        assert!((f64::from(log_prob) - expected).abs() < 1e-6);
    }

    #[test]
    fn top_k_and_top_p_leave_the_rest_out() {
        let logits = [3.0, 2.0, 1.0, 0.0]; // softmax .64 .24 .09 .03
        let top_k = SamplingSettings { top_k: 2, ..Default::default() };
        assert!(frequencies(&top_k, &logits)[2..].iter().all(|&share| share == 0.0));
        let nucleus = SamplingSettings { top_p: 0.7, ..Default::default() };
        let found = frequencies(&nucleus, &logits);
        assert!(found[1] > 0.2 && found[2] == 0.0);
        let greedy = SamplingSettings { temperature: 0.0, ..Default::default() };
        assert_eq!(frequencies(&greedy, &logits)[0], 1.0);
    }
}
