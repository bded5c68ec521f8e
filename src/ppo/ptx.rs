//! PPO-ptx: pretraining mixed into the policy's updates, so that it forgets less (Ouyang et al. 2022, equation 2).

use candle_core::Tensor;

use super::roles::Learner;
use super::settings::PpoSettings;
use crate::bail;
use crate::data::batch::{Batch, TokenTree};
use crate::data::schema::{DEMONSTRATIONS, Demonstration};
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::ops::Outputs;
use crate::random;
use crate::train::examples::{Examples, Source, values};

/// The texts that are mixed in, and how far the run has come in them.
pub struct PretrainingMix<'a> {
    texts: Examples<'a, TokenTree>,
    /// Minibatches that have had their texts.
    taken: usize,
    coefficient: f64,
    tokens_per_batch: usize,
}

impl<'a> PretrainingMix<'a> {
    /// The texts of `--ptx-data`; `None` where there are none to be mixed in.
    pub fn read(settings: &'a PpoSettings, tokenizer: &'a Tokenizer) -> Result<Option<Self>> {
        let Some(pattern) = &settings.ptx.ptx_data else { return Ok(None) };
        let episodes = settings.training.batch_size.div_ceil(settings.policy.minibatches);
        let source = Source {
            data: pattern,
            // Texts of a minibatch.
            batch_size: ((settings.ptx.ptx_ratio * episodes as f64).round() as usize).max(1),
            drops_rest: false,
            seed: random::named_seed(settings.common.seed, "ptx"),
            ..settings.source()
        };
        let texts = Examples::open(&source, DEMONSTRATIONS, |record: Demonstration, truncation| {
            let text = tokenizer.demonstration(&record, settings.common.max_length, truncation)?;
            Ok((text.learned_tokens() > 0).then_some(text))
        })?;
        if texts.is_empty() {
            bail!("{pattern}: no text is left after reading; --ptx-data needs texts or demonstrations");
        }
        let (coefficient, tokens_per_batch) = (settings.ptx.ptx_coefficient, settings.common.tokens_per_batch);
        Ok(Some(PretrainingMix { texts, taken: 0, coefficient, tokens_per_batch }))
    }

    /// Tokens of the longest text, where it is known.
    pub fn longest(&self) -> Option<usize> {
        self.texts.largest(TokenTree::longest)
    }

    /// What was cut and left out of them; where they are many, of the first.
    pub fn truncation(&self) -> Truncation {
        self.texts.truncation()
    }

    /// Number of texts.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there is no text, which a mix that was read never is.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// Minibatches that have had their texts.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Goes on after so many.
    pub fn go_on_after(&mut self, taken: usize) {
        self.taken = taken;
    }

    /// The most rows of the texts that go through the policy at a time.
    pub fn largest_pass(&self, policy: &Model) -> usize {
        self.texts.largest_pass(|text| policy.rows_of(text), self.tokens_per_batch, usize::MAX)
    }

    /// Adds the gradient of `γ` times the mean loss of a token of the next texts to the policy's, and gives that mean loss.
    pub fn accumulate(&mut self, policy: &mut Learner) -> Result<f64> {
        let (number, coefficient, tokens_per_batch) = (self.taken, self.coefficient, self.tokens_per_batch);
        self.taken += 1;
        // How many minibatches are to come is not known here, but one follows most of them.
        self.texts
            .during(number, usize::MAX, |chosen| accumulate(policy, &values(&chosen), coefficient, tokens_per_batch))
    }
}

/// Adds the gradient of `coefficient` times the mean loss of a token of these texts, and gives that mean loss.
fn accumulate(policy: &mut Learner, texts: &[&TokenTree], coefficient: f64, tokens_per_batch: usize) -> Result<f64> {
    let tokens: usize = texts.iter().map(|text| text.learned_tokens()).sum();
    let mut mean = 0.0;
    for range in policy.model.passes(texts.iter().copied(), tokens_per_batch) {
        let (loss, outputs) = loss(&policy.model, &policy.model.pack(texts[range].iter().copied()), tokens)?;
        mean += f64::from(loss.to_scalar::<f32>()?);
        policy.optimizer.backward(&loss.affine(coefficient, 0.0)?, outputs)?;
    }
    Ok(mean)
}

/// `-Σ log π(token | what stands before it) / tokens` over a micro-batch's share of `tokens` tokens, and what
/// it was computed from.
pub fn loss(model: &Model, batch: &Batch, tokens: usize) -> Result<(Tensor, Outputs)> {
    let hidden = model.hidden(batch, &Pass::default())?; // [tokens, d_model]
    let mut outputs = Outputs::default();
    let log_probs = outputs.tensor(&model.log_probs(&hidden, batch, 1.0)?.log_probs)?; // [targets]
    Ok((log_probs.sum_all()?.affine(-1.0 / tokens as f64, 0.0)?, outputs))
}
