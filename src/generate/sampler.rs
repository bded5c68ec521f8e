//! Drawing the next token from logits.

use std::fmt;

use rand::Rng;
use serde::{Deserialize, Serialize};

use super::kv_cache::{CachePrecision, CacheSize};
use super::truncation;
use crate::bail;
use crate::error::Result;
use crate::model::architecture::Architecture;
use crate::random::Stream;
use crate::settings::{Flags, at_least_one};

/// How answers are sampled.
#[derive(Debug, Clone, Copy, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct SamplingSettings {
    /// Divides the logits; 0 takes the most probable token
    #[arg(long, default_value_t = SamplingSettings::default().temperature)]
    pub temperature: f64,
    /// Samples from the most probable tokens only, this many and those as probable as the last of them; 0 for all
    #[arg(long, default_value_t = SamplingSettings::default().top_k)]
    pub top_k: usize,
    /// Samples from the fewest most probable tokens that hold this share of the probability of those that --top-k leaves (nucleus sampling, Holtzman et al. 2019)
    #[arg(long, default_value_t = SamplingSettings::default().top_p)]
    pub top_p: f64,
    /// The most tokens that an answer may have
    #[arg(long, default_value_t = SamplingSettings::default().response_length)]
    pub response_length: usize,
    /// Tokens of prompts and answers whose keys and values are kept at a time: sets the memory needed and how
    /// many answers are sampled together, not the answers, but for rounding
    #[arg(long, value_name = "TOKENS", default_value_t = SamplingSettings::default().kv_cache_tokens, value_parser = at_least_one)]
    #[serde(default = "kv_cache_tokens")]
    pub kv_cache_tokens: usize,
    /// In which precision keys and values are kept while answers are sampled: f32, or rounded to bf16, which is
    /// half the memory. Attention and everything else stay f32
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub cache_precision: CachePrecision,
}

impl Default for SamplingSettings {
    fn default() -> Self {
        SamplingSettings {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            response_length: 53,
            kv_cache_tokens: kv_cache_tokens(),
            cache_precision: CachePrecision::F32,
        }
    }
}

/// The default of `--kv-cache-tokens`.
fn kv_cache_tokens() -> usize {
    32_768
}

impl fmt::Display for SamplingSettings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SamplingSettings { temperature, top_k, top_p, response_length, .. } = self;
        write!(formatter, "of at most {response_length} tokens, ")?;
        if self.is_greedy() {
            return formatter.write_str("the most probable token each time");
        }
        write!(formatter, "at temperature {temperature}")?;
        if *top_k > 0 {
            write!(formatter, ", top-k {top_k}")?;
        }
        if *top_p < 1.0 {
            write!(formatter, ", top-p {top_p}")?;
        }
        Ok(())
    }
}

impl SamplingSettings {
    /// When they are read.
    pub fn flags() -> Flags<Self> {
        Flags::new().always(&["temperature", "response_length", "kv_cache_tokens", "cache_precision"]).only(
            "with a --temperature above 0",
            &["top_k", "top_p"],
            |sampling: &Self| !sampling.is_greedy(),
        )
    }

    /// How much the cache of a model of this architecture may hold.
    pub fn cache<'a>(&self, architecture: &'a Architecture) -> CacheSize<'a> {
        CacheSize { architecture, tokens: self.kv_cache_tokens, precision: self.cache_precision }
    }

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

    /// Whether the most probable token is taken: at temperature 0, and at one so small that dividing by it overflows.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || !self.inverse_temperature().is_finite()
    }

    fn inverse_temperature(&self) -> f32 {
        (1.0 / self.temperature) as f32
    }

    /// What the next token is drawn from, given the logits `[vocabulary]`.
    ///
    /// # Errors
    /// Where a logit is no number or infinite, or none is above `-∞`: there is no distribution to draw from.
    pub fn distribution(&self, logits: &[f32]) -> Result<Distribution, NotFinite> {
        let maximum = maximum(logits)?;
        if self.is_greedy() {
            let first = logits.iter().position(|&logit| logit == maximum).ok_or(NotFinite::All)?;
            return Ok(Distribution::Certain(first as u32));
        }
        let inverse = self.inverse_temperature();
        let weights: Vec<f32> = logits.iter().map(|&logit| ((logit - maximum) * inverse).exp()).collect();
        let whole = sum(&weights);
        if self.top_k == 0 && self.top_p >= 1.0 {
            return Ok(Distribution::Weighted { tokens: None, weights, total: whole, whole });
        }
        let tokens = truncation::kept(logits, &weights, whole, self.top_k, self.top_p);
        let weights: Vec<f32> = tokens.iter().map(|&token| weights[token as usize]).collect();
        let total = sum(&weights);
        Ok(Distribution::Weighted { tokens: Some(tokens), weights, total, whole })
    }
}

/// What a token is drawn from.
#[derive(Debug, Clone, PartialEq)]
pub enum Distribution {
    /// Always this token.
    Certain(u32),
    /// A token with a probability in proportion to its weight.
    Weighted {
        /// The tokens that may be drawn, in the order of the vocabulary; all where there are none.
        tokens: Option<Vec<u32>>,
        /// Their weights.
        weights: Vec<f32>,
        /// The sum of these.
        total: f64,
        /// The sum of the weights of all tokens, those that may not be drawn included.
        whole: f64,
    },
}

impl Distribution {
    /// A token, and its log-probability at the temperature among all tokens, those that are not sampled from
    /// included. Takes one number of the stream, or none where there is nothing to choose.
    pub fn draw(&self, stream: &mut Stream) -> (u32, f32) {
        let (tokens, weights, total, whole) = match self {
            &Distribution::Certain(token) => return (token, 0.0),
            Distribution::Weighted { tokens, weights, total, whole } => (tokens, weights, total, whole),
        };
        let mut left = stream.random::<f64>() * total;
        let mut last = 0;
        for (index, &weight) in weights.iter().enumerate() {
            if weight > 0.0 {
                last = index;
                left -= f64::from(weight);
                if left < 0.0 {
                    break;
                }
            }
        }
        let token = tokens.as_ref().map_or(last as u32, |tokens| tokens[last]);
        (token, (f64::from(weights[last]) / whole).ln() as f32)
    }
}

fn sum(weights: &[f32]) -> f64 {
    weights.iter().map(|&weight| f64::from(weight)).sum()
}

/// Why nothing can be drawn from logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NotFinite {
    /// The first token whose logit is no number or `+∞`, and the logit.
    Token(usize, f32),
    /// Every logit is `-∞`.
    All,
}

impl fmt::Display for NotFinite {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotFinite::Token(token, logit) => write!(formatter, "the logit of token {token} is {logit}"),
            NotFinite::All => formatter.write_str("every logit is -inf"),
        }
    }
}

/// The greatest logit, which is finite; others may be `-∞`.
fn maximum(logits: &[f32]) -> Result<f32, NotFinite> {
    // Both loops are such that the compiler makes vector instructions of them.
    let is_bad = |logit: f32| logit.is_nan() || logit == f32::INFINITY;
    if logits.iter().fold(false, |found, &logit| found | is_bad(logit)) {
        let first = logits.iter().position(|&logit| is_bad(logit)).unwrap_or(0);
        return Err(NotFinite::Token(first, logits[first]));
    }
    let greater = |a: f32, b: f32| if a > b { a } else { b };
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &logit)| *lane = greater(logit, *lane));
    }
    let maximum = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, greater);
    if maximum.is_finite() { Ok(maximum) } else { Err(NotFinite::All) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    fn frequencies(settings: &SamplingSettings, logits: &[f32]) -> Vec<f64> {
        let mut stream = random::stream(3, "test", 0);
        let mut counts = vec![0; logits.len()];
        const DRAWS: usize = 40_000;
        (0..DRAWS).for_each(|_| counts[settings.distribution(logits).unwrap().draw(&mut stream).0 as usize] += 1);
        counts.into_iter().map(|count| f64::from(count) / DRAWS as f64).collect()
    }

    fn draw(settings: &SamplingSettings, logits: &[f32]) -> (u32, f32) {
        settings.distribution(logits).unwrap().draw(&mut random::stream(1, "test", 0))
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
        let (token, log_prob) = settings.distribution(&logits).unwrap().draw(&mut random::stream(3, "test", 1));
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
    #[test]
    fn what_is_no_number_is_never_drawn_nor_chosen() {
        let cases = [
            (vec![0.0, f32::NAN, 2.0], NotFinite::Token(1, f32::NAN)),
            (vec![f32::NAN; 3], NotFinite::Token(0, f32::NAN)),
            (vec![1.0, 2.0, f32::INFINITY], NotFinite::Token(2, f32::INFINITY)),
            (vec![f32::NEG_INFINITY; 2], NotFinite::All),
            (vec![], NotFinite::All),
        ];
        let modes = [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 2, 1.0), (0.5, 0, 0.7), (1.0, 1, 0.5)];
        for (logits, expected) in cases {
            for (temperature, top_k, top_p) in modes {
                let settings = SamplingSettings { temperature, top_k, top_p, ..Default::default() };
                let found = settings.distribution(&logits).unwrap_err();
                assert_eq!(format!("{found:?}"), format!("{expected:?}"), "{logits:?} at {temperature}");
            }
        }
        // A token that is impossible takes nothing from the others.
        let masked = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY];
        for temperature in [0.0, 1.0] {
            let settings = SamplingSettings { temperature, ..Default::default() };
            assert_eq!(draw(&settings, &masked), (1, 0.0));
        }
    }

    #[test]
    fn a_temperature_whose_inverse_overflows_is_greedy() {
        let logits = [0.5, 3.0, -1.0];
        for temperature in [1e-40, 1e-300, f64::MIN_POSITIVE, 1e-39] {
            let settings = SamplingSettings { temperature, ..Default::default() };
            assert!(settings.is_greedy() && settings.check().is_ok());
            assert_eq!(draw(&settings, &logits), (1, 0.0));
        }
        // The smallest that is no overflow differs in nothing.
        let settings = SamplingSettings { temperature: 1e-38, ..Default::default() };
        assert_eq!(draw(&settings, &logits), (1, 0.0));
    }

    /// The tokens that a transformers pipeline of temperature, top-k and top-p leaves (`tests/golden/sampling.py`).
    #[test]
    fn what_top_k_and_top_p_leave_is_what_transformers_leaves() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/sampling.json");
        let cases: Vec<serde_json::Value> = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        assert!(cases.len() > 100);
        for case in cases {
            let logits: Vec<f32> = serde_json::from_value(case["logits"].clone()).unwrap();
            let settings = SamplingSettings {
                temperature: case["temperature"].as_f64().unwrap(),
                top_k: case["top_k"].as_u64().unwrap() as usize,
                top_p: case["top_p"].as_f64().unwrap(),
                ..Default::default()
            };
            let Distribution::Weighted { tokens, .. } = settings.distribution(&logits).unwrap() else {
                panic!("nothing to choose: {case}")
            };
            let kept: Vec<u64> =
                tokens.map_or((0..logits.len() as u64).collect(), |tokens| tokens.into_iter().map(u64::from).collect());
            let expected: Vec<u64> = serde_json::from_value(case["kept"].clone()).unwrap();
            assert_eq!(kept, expected, "{case}");
        }
    }
}
