//! The words that virtual tokens start from.

use candle_core::{DType, Tensor};
use rand::Rng;

use super::base::Base;
use crate::bail;
use crate::data::tokenize::Tokenizer;
use crate::error::Result;
use crate::random;
use crate::settings::{PromptInit, PromptSettings};

/// Lester et al. 2021 (section 3.2.1) draw from the 5,000 most common tokens.
const COMMON: usize = 5_000;

/// The tokens of each of the virtual tokens, whose embeddings' mean it starts from; `None` where it starts from no words.
fn words(settings: &PromptSettings, base: &Base, name: &str) -> Result<Option<Vec<Vec<u32>>>> {
    let count = settings.num_virtual_tokens;
    let repeated = |words: Vec<Vec<u32>>| words.into_iter().cycle().take(count).collect();
    Ok(match settings.prompt_tuning_init {
        PromptInit::Random | PromptInit::Zero => None,
        PromptInit::SampleVocab => {
            let common = match base.tokenizer()? {
                Some(tokenizer) => tokenizer.common_tokens(COMMON),
                None => (0..base.architecture().vocabulary.min(COMMON) as u32).collect(),
            };
            let mut stream = base.stream(name);
            Some((0..count).map(|_| vec![common[stream.random_range(0..common.len())]]).collect())
        }
        PromptInit::Text => {
            let (tokenizer, text) = tokenizer_and_text(settings, base)?;
            let tokens = tokenizer.encode_words(text)?;
            if tokens.is_empty() {
                bail!("--prompt-tuning-init-text: the text has no token; expected at least one word");
            }
            Some(repeated(tokens.into_iter().map(|token| vec![token]).collect()))
        }
        PromptInit::ClassLabels => {
            let (tokenizer, text) = tokenizer_and_text(settings, base)?;
            let labels = text.split(',').map(str::trim).filter(|label| !label.is_empty());
            let labels: Vec<Vec<u32>> = labels.map(|label| tokenizer.encode_words(label)).collect::<Result<_>>()?;
            if labels.iter().all(Vec::is_empty) {
                bail!(
                    "--prompt-tuning-init-text: there is no label; expected words separated by commas, as in good,bad"
                );
            }
            Some(shared(labels, count))
        }
    })
}

/// Labels for `count` places: one after the other and again, or, where they are more than the places, neighbours together.
fn shared(labels: Vec<Vec<u32>>, count: usize) -> Vec<Vec<u32>> {
    if labels.len() <= count {
        return labels.into_iter().cycle().take(count).collect();
    }
    let place = |index: usize| labels[index * labels.len() / count..(index + 1) * labels.len() / count].concat();
    (0..count).map(place).collect()
}

fn tokenizer_and_text<'a>(settings: &'a PromptSettings, base: &Base) -> Result<(Tokenizer, &'a str)> {
    let Some(text) = &settings.prompt_tuning_init_text else {
        bail!("--prompt-tuning-init text and class-labels need --prompt-tuning-init-text");
    };
    match base.tokenizer()? {
        Some(tokenizer) => Ok((tokenizer, text)),
        None => bail!(
            "{}: there is no tokenizer.json, so --prompt-tuning-init-text cannot be read; use --prompt-tuning-init random",
            base.model.folder().path.display()
        ),
    }
}

/// The embeddings that virtual tokens start from, `[virtual tokens, d_model]`.
pub fn embeddings(settings: &PromptSettings, base: &Base, name: &str) -> Result<Tensor> {
    let table = base.model.transformer().embeddings(); // [vocabulary, d_model]
    let shape = [settings.num_virtual_tokens, base.architecture().d_model];
    let scale = base.architecture().embedding_scale.unwrap_or(1.0);
    if let Some(words) = words(settings, base, name)? {
        let mean = |tokens: &Vec<u32>| -> Result<Tensor> {
            // Virtual tokens stand where words do after their scaling.
            Ok(table.select_rows(tokens)?.tensor().mean_keepdim(0)?.affine(scale, 0.0)?)
        };
        return Ok(Tensor::cat(&words.iter().map(mean).collect::<Result<Vec<_>>>()?, 0)?);
    }
    if settings.prompt_tuning_init == PromptInit::Zero {
        return Ok(Tensor::zeros(&shape, DType::F32, base.device())?);
    }
    // At the table's own scale; PEFT's standard normal numbers are some fifty times larger than a word's embedding.
    let table = table.to_tensor()?;
    let mean = f64::from(table.mean_all()?.to_scalar::<f32>()?);
    let deviation = f64::from(table.affine(1.0, -mean)?.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt();
    Ok(random::normal(&mut base.stream(name), &shape, scale * deviation, base.device())?.affine(1.0, scale * mean)?)
}

/// One word for each virtual token, for a prefix that starts from their keys and values; `None` where it starts from no words.
pub fn tokens(settings: &PromptSettings, base: &Base, name: &str) -> Result<Option<Vec<u32>>> {
    let words = words(settings, base, name)?;
    Ok(words.map(|words| words.into_iter().filter_map(|tokens| tokens.first().copied()).collect()))
}

#[cfg(test)]
mod tests {
    use super::shared;

    #[test]
    fn labels_are_repeated_or_put_together() {
        let labels = |count: u32| (0..count).map(|label| vec![label]).collect::<Vec<_>>();
        assert_eq!(shared(labels(2), 5), [[0], [1], [0], [1], [0]]);
        assert_eq!(shared(labels(5), 2), [vec![0, 1], vec![2, 3, 4]]);
    }
}
