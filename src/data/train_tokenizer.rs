//! A byte-level byte-pair tokenizer made from text (Sennrich et al. 2016; over bytes as in GPT-2).

use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PreTokenizerWrapper};

use super::schema::{self, Text};
use super::tokenize::Tokenizer;
use super::tokenizer_files::TokenizerFiles;
use crate::bail;
use crate::error::{Error, Result};

/// The special tokens of a tokenizer to be made. They get the first ids, in the order of the fields.
#[derive(Debug, Clone)]
pub struct SpecialTokens {
    /// Fills up rows in other programs.
    pub pad: Option<String>,
    /// Put before every text.
    pub bos: Option<String>,
    /// Ends a text.
    pub eos: String,
    /// Further tokens that are never split, such as the marks of a chat template.
    pub others: Vec<String>,
}

impl Default for SpecialTokens {
    /// `<pad>`, `<s>` and `</s>`: ids 0, 1 and 2, of which the last two are what a Llama's `config.json` has by default.
    fn default() -> Self {
        Self { pad: Some("<pad>".into()), bos: Some("<s>".into()), eos: "</s>".into(), others: Vec::new() }
    }
}

/// Trains a tokenizer on `texts`. Merges are made until there are `vocabulary_size` tokens or no pair occurs twice. The
/// result depends on nothing but the texts: not on their order, not on the number of threads.
///
/// [`Tokenizer::save`] writes it so that this crate and `transformers` read it.
///
/// # Errors
/// If `vocabulary_size` does not hold the 256 bytes and the special tokens.
pub fn train_bpe(
    texts: impl Iterator<Item = String> + Send,
    vocabulary_size: usize,
    special_tokens: &SpecialTokens,
) -> Result<Tokenizer> {
    let SpecialTokens { pad, bos, eos, others } = special_tokens;
    let mut special: Vec<&String> = pad.iter().chain(bos).chain([eos]).chain(others).collect();
    let mut seen = std::collections::HashSet::new();
    special.retain(|token| seen.insert(*token));
    let smallest = 256 + special.len();
    if vocabulary_size < smallest {
        bail!("a vocabulary of {vocabulary_size} tokens is too small: bytes and special tokens alone are {smallest}");
    }
    let failed = |error: tokenizers::Error| Error::input(format!("the tokenizer cannot be trained ({error})"));
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    let bytes = ByteLevel::new(false, false, true);
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::from(bytes))).with_decoder(Some(bytes));
    let trainer = BpeTrainer::builder()
        .vocab_size(vocabulary_size)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special.iter().map(|token| AddedToken::from(token.as_str(), true)).collect())
        .build();
    tokenizer.train(&mut TrainerWrapper::from(trainer), texts).map_err(failed)?;
    if let Some(bos) = bos {
        let id = tokenizer.token_to_id(bos).unwrap_or_default();
        let processor = TemplateProcessing::builder()
            .try_single(vec![bos.clone(), "$A".to_owned()])
            .and_then(|builder| {
                let special = vec![(bos.clone(), id)];
                builder.special_tokens(special).build().map_err(|error| error.to_string())
            })
            .map_err(|error| failed(error.into()))?;
        tokenizer.with_post_processor(Some(processor));
    }
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "eos_token": eos,
    });
    for (key, token) in [("bos_token", bos), ("pad_token", pad)] {
        if let Some(token) = token {
            config[key] = json!(token);
        }
    }
    let mut files = TokenizerFiles { folder: "the trained tokenizer".to_owned(), ..Default::default() };
    files.files.insert("tokenizer.json".into(), tokenizer.to_string(true).map_err(failed)?.into_bytes());
    files.files.insert("tokenizer_config.json".into(), format!("{config:#}\n").into_bytes());
    Tokenizer::from_files(files)
}

/// As [`train_bpe`], on every text of the files that `pattern` names: prompts and answers in any of the layouts of
/// [`schema::answered`], or prompts alone. Each prompt, answer and message is a text of its own.
pub fn train_bpe_on_files(pattern: &str, vocabulary_size: usize, special_tokens: &SpecialTokens) -> Result<Tokenizer> {
    let mut failure = None;
    let texts: Box<dyn Iterator<Item = Result<Vec<Text>>> + Send> = match schema::answered(pattern) {
        Ok(chunks) => Box::new(chunks.map(|chunk| {
            let records = chunk?.records.into_iter();
            Ok(records.flat_map(|record| std::iter::once(record.prompt).chain(record.answers)).collect())
        })),
        Err(error) => match schema::prompts(pattern) {
            Ok(prompts) => Box::new(prompts.map(|prompt| Ok(vec![prompt?.prompt]))),
            Err(_) => return Err(error),
        },
    };
    let good = texts.map_while(|texts| texts.map_err(|error| failure = Some(error)).ok());
    let strings = good.flatten().flat_map(|text| text.contents().map(str::to_string).collect::<Vec<String>>());
    let tokenizer = train_bpe(strings, vocabulary_size, special_tokens);
    failure.map_or(tokenizer, Err)
}
