//! Text to token ids and back.
//!
//! A [`Tokenizer`] is read from a model's folder. It puts the token that begins a text (BOS) in front once, if the
//! post-processor of `tokenizer.json` does, and never twice; the token that ends a text (EOS) is added where records
//! become trees (`tokenize_records`).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use tokenizers::utils::truncation::{TruncationDirection, TruncationParams, truncate_encodings};
use tokenizers::{Encoding, PostProcessor};

use super::special_tokens::DeclaredTokens;
use super::template::ChatTemplate;
use super::tokenizer_files::TokenizerFiles;
use super::tokenizer_settings;
use crate::bail;
use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::limits;

/// A tokenizer with the special tokens and the chat template that belong to it.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// What the file would have put around a text, or between two.
    around: Option<tokenizers::PostProcessorWrapper>,
    /// On which side a text that is to be classified is cut.
    truncation_direction: TruncationDirection,
    files: TokenizerFiles,
    template: ChatTemplate,
    has_template: bool,
    /// The source of the template for a model that has none.
    transcript: String,
    /// Whether a conversation was written by that.
    has_transcribed: AtomicBool,
    /// What stands before every text.
    prefix: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    stop_tokens: Vec<u32>,
    stop_texts: Vec<String>,
    vocabulary_size: usize,
    /// Rows of the embedding of the model that reads the ids, where one is known.
    rows: Option<usize>,
    /// Whether decoded texts lose the spaces before punctuation.
    cleans_up: bool,
}

/// Tokens of a prompt that its answer is decoded behind: more than a character can be made of.
const CONTEXT: usize = 8;

/// A text, or a pair of texts, as a classifier reads it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncodedTexts {
    /// Token ids, those around and between the texts among them.
    pub tokens: Vec<u32>,
    /// For every token its type, by which encoders tell the texts of a pair apart (all 0 where the tokenizer's file does not).
    pub types: Vec<u32>,
    /// Where the second text begins; the number of tokens where there is none.
    pub second: usize,
    /// Whether a text was too long and lost its end.
    pub was_cut: bool,
}

/// Token ids, and for each the bytes of the text that it stands for.
pub(super) struct Encoded {
    pub(super) ids: Vec<u32>,
    pub(super) bytes: Vec<(usize, usize)>,
}

impl Tokenizer {
    /// Reads the tokenizer of a model's folder: `tokenizer.json`, and beside it `tokenizer_config.json`,
    /// `special_tokens_map.json`, `config.json`, `generation_config.json` and `chat_template.jinja` where they are.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        Self::open(&[folder.as_ref().to_path_buf()])
    }

    /// Reads the tokenizer of a model with adapters: `folders` are theirs, the one that counts most first,
    /// and the model's last. The tokenizer is that of the first that has one, and the model's settings
    /// (`config.json`, `generation_config.json`) are those of the first that has each.
    pub fn open(folders: &[PathBuf]) -> Result<Self> {
        Self::from_files(TokenizerFiles::read(folders)?)
    }

    /// The same for a model whose embedding has this many rows: a text with a token beyond them is an error,
    /// a token that no text holds is none.
    pub fn for_rows(self, rows: usize) -> Self {
        Tokenizer { rows: Some(rows), ..self }
    }

    pub(super) fn from_files(files: TokenizerFiles) -> Result<Self> {
        let path = files.path("tokenizer.json");
        let Some(json) = files.files.get("tokenizer.json") else {
            bail!(
                "{path}: there is no such file; a model's folder needs one (transformers writes it with `save_pretrained`)"
            );
        };
        let invalid = |error: tokenizers::Error| Error::input(format!("{path}: not a valid tokenizer ({error})"));
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(json)).map_err(invalid)?;
        let truncation_direction = truncation_direction(&files, inner.get_truncation())?;
        // Lengths are ours to handle: a limit or padding kept in the file would act unseen.
        inner.with_truncation(None).map_err(invalid)?.with_padding(None);
        let declared = DeclaredTokens::of(&files)?;
        let cleans_up = tokenizer_settings::apply(&mut inner, &files)?;
        limits::without_panic(|| declared.add_to(&mut inner, &files))
            .unwrap_or_else(|| Err(Error::input(format!("{path}: what its files say cannot be"))))?;
        let prefix = guarded(|| added_in_front(&inner)).map_err(invalid)?;
        // What is left for a post-processor to do is to move offsets off white space, which would move boundaries too.
        let around = inner.get_post_processor().cloned();
        inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);

        let special = declared.by_name();
        let named = |key: &str, id_key: &str| -> Result<Option<u32>> {
            let by_name = special.get(key).and_then(|token| inner.token_to_id(token));
            Ok(by_name.or(files.model_ids(id_key)?.first().copied().filter(|&id| inner.id_to_token(id).is_some())))
        };
        let bos = named("bos_token", "bos_token_id")?;
        let eos = named("eos_token", "eos_token_id")?;
        let pad = named("pad_token", "pad_token_id")?;
        let mut stop_tokens: Vec<u32> = eos.into_iter().chain(files.model_ids("eos_token_id")?).collect();
        stop_tokens.retain(|&id| inner.id_to_token(id).is_some());
        let mut seen = std::collections::HashSet::new();
        stop_tokens.retain(|&id| seen.insert(id));
        let stop_texts = stop_tokens.iter().filter_map(|&id| inner.id_to_token(id)).collect();
        let vocabulary_size = inner.get_vocab(true).values().max().map_or(0, |&largest| largest as usize + 1);
        let template = ChatTemplate::find(&files)?;
        let has_template = template.is_some();
        let transcript =
            ChatTemplate::transcript(bos.filter(|bos| prefix.contains(bos)).and_then(|id| inner.id_to_token(id)));
        let template = template.map_or_else(|| ChatTemplate::from_transcript(&transcript), Ok)?;
        Ok(Self {
            inner,
            around,
            truncation_direction,
            files,
            template,
            has_template,
            transcript,
            has_transcribed: AtomicBool::new(false),
            prefix,
            bos,
            eos,
            pad,
            stop_tokens,
            stop_texts,
            vocabulary_size,
            rows: None,
            cleans_up,
        })
    }

    /// Writes the tokenizer's files into `folder`, as they were read.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.files.write(folder.as_ref())?;
        self.save_transcript(folder.as_ref())
    }

    /// The token ids of a text; BOS first, if this tokenizer begins texts with it and the text does not.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode_with_bytes(text, false)?.ids)
    }

    /// As [`encode`](Self::encode), with the bytes of each token; those of a BOS put in front are none. What a chat template wrote has all the special tokens
    /// that it wants, so nothing is put in front of it.
    pub(super) fn encode_with_bytes(&self, text: &str, is_chat: bool) -> Result<Encoded> {
        let failed =
            |error: tokenizers::Error| Error::input(format!("{}: cannot encode a text ({error})", self.files.folder));
        let encoding = guarded(|| self.inner.encode(text, false)).map_err(failed)?;
        let has_all = is_chat || encoding.get_ids().starts_with(&self.prefix);
        let prefix = if has_all { &[][..] } else { &self.prefix };
        let ids: Vec<u32> = prefix.iter().chain(encoding.get_ids()).copied().collect();
        self.check_rows(&ids)?;
        let bytes = prefix.iter().map(|_| (0, 0)).chain(encoding.get_offsets().iter().copied()).collect();
        Ok(Encoded { ids, bytes })
    }

    /// A text, or a pair of texts, with what the tokenizer's file puts around and between them (BERT's `[CLS] a [SEP] b [SEP]`, RoBERTa's
    /// `<s> a </s></s> b </s>`). Of more than `max_length` tokens a single text loses its end, and of a pair the longer one first, as with
    /// `transformers`' `truncation=True` (or the start, where the tokenizer's files say that it is the left side that is cut).
    pub fn encode_texts(&self, text: &str, pair: Option<&str>, max_length: usize) -> Result<EncodedTexts> {
        let failed =
            |error: tokenizers::Error| Error::input(format!("{}: cannot encode a text ({error})", self.files.folder));
        let encode = |text: &str| guarded(|| self.inner.encode(text, false)).map_err(failed);
        let first = encode(text)?;
        let mut second = pair.map(encode).transpose()?;
        if let Some(second) = &mut second {
            // What a post-processor without types of its own leaves as it is.
            second.set_type_ids(vec![1; second.len()]);
        }
        let length =
            |first: &Encoding, second: &Option<Encoding>| first.len() + second.as_ref().map_or(0, Encoding::len);
        let whole = length(&first, &second);
        let added = self.around.as_ref().map_or(self.prefix.len(), |around| around.added_tokens(pair.is_some()));
        let longest_first = TruncationParams {
            max_length: max_length.saturating_sub(added),
            direction: self.truncation_direction,
            ..TruncationParams::default()
        };
        let (first, second) = guarded(|| truncate_encodings(first, second, &longest_first)).map_err(failed)?;
        let was_cut = length(&first, &second) < whole;
        let Some(around) = &self.around else {
            let start = self.prefix.len() + first.len();
            let tokens = [&self.prefix[..], first.get_ids(), second.as_ref().map_or(&[], Encoding::get_ids)].concat();
            self.check_rows(&tokens)?;
            let types = (0..tokens.len()).map(|token| u32::from(token >= start)).collect();
            return Ok(EncodedTexts { tokens, types, second: start, was_cut });
        };
        let both = guarded(|| around.process(first, second, true)).map_err(failed)?;
        let (tokens, types) = (both.get_ids().to_vec(), both.get_type_ids().to_vec());
        self.check_rows(&tokens)?;
        // An empty second text has no token of its own; what stands behind it is of its type.
        let begins = both.get_sequence_ids().iter().position(|sequence| *sequence == Some(1));
        let begins = begins.or_else(|| types.iter().position(|&kind| kind == 1));
        Ok(EncodedTexts { second: begins.unwrap_or(tokens.len()), tokens, types, was_cut })
    }

    /// The token ids of words that stand within a text: nothing is put in front.
    pub fn encode_words(&self, text: &str) -> Result<Vec<u32>> {
        let failed =
            |error: tokenizers::Error| Error::input(format!("{}: cannot encode a text ({error})", self.files.folder));
        let ids = guarded(|| self.inner.encode(text, false)).map_err(failed)?.get_ids().to_vec();
        self.check_rows(&ids)?;
        Ok(ids)
    }

    /// The rows of the embedding of the model that reads the ids, where one is known.
    pub fn rows(&self) -> Option<usize> {
        self.rows
    }

    /// Refuses token ids for which the model's embedding has no row.
    fn check_rows(&self, ids: &[u32]) -> Result<()> {
        match (self.rows, ids.iter().max()) {
            (Some(rows), Some(&largest)) if largest as usize >= rows => bail!(
                "{}: the text holds the token {:?} (id {largest}), for which the model's embedding of {rows} rows has none; take it out of the text, or \
                 use the tokenizer that belongs to the model",
                self.files.path("tokenizer.json"),
                self.inner.id_to_token(largest).unwrap_or_default()
            ),
            _ => Ok(()),
        }
    }

    /// The `count` most common tokens of the vocabulary that are no special ones. Byte-pair merges, word pieces and unigrams are numbered from the
    /// most common on.
    pub fn common_tokens(&self, count: usize) -> Vec<u32> {
        let added = self.inner.get_added_tokens_decoder();
        let is_word = |id: &u32| self.inner.id_to_token(*id).is_some() && !added.contains_key(id);
        (0..self.vocabulary_size as u32).filter(is_word).take(count).collect()
    }

    /// The text of token ids, without special tokens if these are to be skipped.
    pub fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String> {
        let failed =
            |error: tokenizers::Error| Error::input(format!("{}: cannot decode tokens ({error})", self.files.folder));
        let text = guarded(|| self.inner.decode(tokens, skip_special_tokens)).map_err(failed)?;
        Ok(if self.cleans_up { tokenizer_settings::without_spaces_before_punctuation(&text) } else { text })
    }

    /// The text of an answer's tokens behind its prompt's, without special tokens. Tokenizers of the SentencePiece kind drop the space that begins a text, which the
    /// space between prompt and answer is not.
    pub fn decode_answer(&self, prompt: &[u32], answer: &[u32]) -> Result<String> {
        let context = &prompt[prompt.len().saturating_sub(CONTEXT)..];
        let before = self.decode(context, true)?;
        let both = self.decode(&[context, answer].concat(), true)?;
        match both.strip_prefix(&before) {
            Some(text) => Ok(text.to_string()),
            // The prompt's last bytes make a character together with the answer's first.
            None => self.decode(answer, true),
        }
    }

    /// The name of a token in the vocabulary, as the tokenizer's file has it (`Ġhello`).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Every token with its id: models that are to read the same ids need the same.
    pub fn vocabulary(&self) -> std::collections::HashMap<String, u32> {
        self.inner.get_vocab(true)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text; an error where the folder names none.
    pub fn eos(&self) -> Result<u32> {
        match (self.eos, self.rows) {
            (Some(eos), Some(rows)) if eos as usize >= rows => bail!(
                "{}: `eos_token` {:?} has the id {eos}, for which the model's embedding of {rows} rows has none; name a token that the model knows",
                self.files.path("tokenizer_config.json"),
                self.inner.id_to_token(eos).unwrap_or_default()
            ),
            (Some(eos), _) => Ok(eos),
            (None, _) => bail!(
                "{}: no token ends a text; name one of the vocabulary as `eos_token`",
                self.files.path("tokenizer_config.json")
            ),
        }
    }

    /// The token that fills up rows in other programs; here nothing is padded.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Every token at which an answer ends: EOS and the others that `generation_config.json` or `config.json` name.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// The texts of [`stop_tokens`](Self::stop_tokens).
    pub(super) fn stop_texts(&self) -> &[String] {
        &self.stop_texts
    }

    /// The chat template; the plain one of [`ChatTemplate::plain`] where the folder has none.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// The chat template, to be applied to a conversation of the data; that it is the one of models without a template is noted.
    pub(super) fn chat_template(&self) -> &ChatTemplate {
        if !self.has_template {
            self.has_transcribed.store(true, Ordering::Relaxed);
        }
        &self.template
    }

    /// The source of the template by which conversations of the data were written, if the model has no template of its own: to be saved with what learns
    /// from them.
    pub fn transcript(&self) -> Option<&str> {
        self.has_transcribed.load(Ordering::Relaxed).then_some(self.transcript.as_str())
    }

    /// Writes [`transcript`](Self::transcript), if there is one, as the chat template of a model's folder.
    pub fn save_transcript(&self, folder: &Path) -> Result<()> {
        let Some(source) = self.transcript() else { return Ok(()) };
        write_atomically(folder.join("chat_template.jinja"), |file| file.write_all(source.as_bytes()))
    }

    /// Whether a token was added to the vocabulary, so that texts are split at it.
    pub(super) fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// Whether the folder holds a chat template.
    pub fn has_template(&self) -> bool {
        self.has_template
    }

    /// The longest sequence that the model was made for, where `tokenizer_config.json` names one.
    pub fn model_max_length(&self) -> Result<Option<usize>> {
        let config = self.files.json("tokenizer_config.json")?;
        let length = config.as_ref().and_then(|config| config.get("model_max_length")?.as_f64());
        // transformers writes 1e30 for "no limit".
        Ok(length.filter(|&length| (1.0..1e9).contains(&length)).map(|length| length as usize))
    }

    /// One more than the largest token id: the rows that a model's embedding must have at least.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }
}

/// Runs a step of the tokenizer, which panics at some of what a file may say.
fn guarded<T>(step: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T, tokenizers::Error> {
    limits::without_panic(step).unwrap_or_else(|| Err("what its file says cannot be".into()))
}

/// The side on which texts are cut: what `tokenizer_config.json` says, or else what the limit kept in `tokenizer.json` says.
fn truncation_direction(files: &TokenizerFiles, kept: Option<&TruncationParams>) -> Result<TruncationDirection> {
    let config = files.json("tokenizer_config.json")?;
    match config.as_ref().and_then(|config| config.get("truncation_side")?.as_str()) {
        Some("left") => Ok(TruncationDirection::Left),
        Some(_) => Ok(TruncationDirection::Right),
        None => Ok(kept.map_or(TruncationDirection::Right, |kept| kept.direction)),
    }
}

/// The special tokens that the post-processor of a tokenizer puts before a text.
fn added_in_front(tokenizer: &tokenizers::Tokenizer) -> Result<Vec<u32>, tokenizers::Error> {
    let plain = tokenizer.encode("a", false)?;
    let processed = tokenizer.encode("a", true)?;
    let first = plain.get_ids().first();
    let in_front = processed.get_ids().iter().zip(processed.get_special_tokens_mask());
    Ok(in_front.take_while(|(id, mask)| **mask == 1 && Some(*id) != first).map(|(id, _)| *id).collect())
}
