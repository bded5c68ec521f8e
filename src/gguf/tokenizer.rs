//! From metadata to the tokenizer's files: `tokenizer.json` as the library `tokenizers` reads it, and the
//! settings next to it.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};

use super::container::Gguf;
use crate::bail;
use crate::error::Result;

/// Token types of `tokenizer.ggml.token_type`.
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// How text is split before its pieces are merged, by the names of `tokenizer.ggml.pre`.
const GPT2: &[&str] =
    &["gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "exaone4", "trillion", "granite-docling"];
const SINGLE_DIGITS: &[&str] = &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"];
const LLAMA3: &[&str] = &["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"];
/// Llama 3's way to split, without its habit to take a piece that is a token whole.
const LLAMA3_MERGED: &[&str] = &["dbrx", "smaug-bpe"];
const QWEN2: &[&str] = &["qwen2", "deepseek-r1-qwen", "kormo", "stablelm2", "hunyuan", "megrez"];
const GPT4O: &[&str] = &["gpt-4o", "llama4"];
const TEKKEN: &[&str] = &["tekken"];

/// Tokens that end a turn, by their texts.
const END_OF_TURN: [&str; 6] = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>"];

const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const UPPER: &str = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]";
const LOWER: &str = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]";

/// The tokenizer's files.
///
/// # Errors
/// Where the kind of tokenizer, or its way to split text, is not known.
pub(super) fn files(gguf: &Gguf) -> Result<BTreeMap<String, Vec<u8>>> {
    let Some(tokens) = gguf.optional_texts("tokenizer.ggml.tokens")? else {
        return Err(gguf.missing("tokenizer.ggml.tokens"));
    };
    let parts = Parts { gguf, tokens };
    let tokenizer = match gguf.optional_text("tokenizer.ggml.model")? {
        Some("gpt2") => parts.byte_level()?,
        Some("llama") => parts.sentencepiece()?,
        Some(other) => bail!(
            "{}: tokenizers of the kind \"{other}\" are not read from GGUF; expected gpt2 (byte-level) or llama (SentencePiece)",
            gguf.path.display()
        ),
        None => return Err(gguf.missing("tokenizer.ggml.model")),
    };
    let mut settings = parts.special_tokens()?;
    let mut files = BTreeMap::new();
    if let Some(template) = gguf.optional_text("tokenizer.chat_template")? {
        files.insert("chat_template.jinja".to_string(), template.as_bytes().to_vec());
    }
    settings.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    settings.insert("clean_up_tokenization_spaces".into(), false.into());
    files.insert("tokenizer_config.json".into(), Value::Object(settings).to_string().into_bytes());
    files.insert("generation_config.json".into(), parts.generation()?.to_string().into_bytes());
    files.insert("tokenizer.json".into(), tokenizer.to_string().into_bytes());
    Ok(files)
}

struct Parts<'a> {
    gguf: &'a Gguf,
    tokens: &'a [String],
}

impl Parts<'_> {
    fn flag(&self, name: &str, default: bool) -> Result<bool> {
        Ok(self.gguf.optional_flag(&format!("tokenizer.ggml.{name}"))?.unwrap_or(default))
    }

    /// The token whose id the file gives under this name; ids that no token has count as none.
    fn special(&self, name: &str) -> Result<Option<(u64, &String)>> {
        let id = self.gguf.optional_u64(&format!("tokenizer.ggml.{name}_token_id"))?;
        Ok(id.and_then(|id| Some((id, self.tokens.get(usize::try_from(id).ok()?)?))))
    }

    fn special_tokens(&self) -> Result<Map<String, Value>> {
        let mut settings = Map::new();
        for (name, own) in
            [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
        {
            if let Some((_, token)) = self.special(own)? {
                settings.insert(name.into(), token.as_str().into());
            }
        }
        Ok(settings)
    }

    /// The tokens that end an answer: those that end a text, a turn or a message.
    fn generation(&self) -> Result<Value> {
        let mut ends: Vec<u64> = Vec::new();
        for name in ["eos", "eot", "eom"] {
            ends.extend(self.special(name)?.map(|(id, _)| id).filter(|id| !ends.contains(id)));
        }
        if self.special("eot")?.is_none() {
            // Older files do not say which token ends a turn; llama.cpp knows it by its text.
            let by_text = END_OF_TURN.iter().filter_map(|text| self.tokens.iter().position(|token| token == text));
            let by_text: Vec<u64> = by_text.map(|id| id as u64).collect();
            if !by_text.iter().any(|id| ends.contains(id)) {
                ends.extend(by_text.first());
            }
        }
        let mut config = Map::new();
        if let Some((id, _)) = self.special("bos")? {
            config.insert("bos_token_id".into(), id.into());
        }
        match ends.as_slice() {
            [] => {}
            [end] => drop(config.insert("eos_token_id".into(), (*end).into())),
            _ => drop(config.insert("eos_token_id".into(), ends.into())),
        }
        if let Some((id, _)) = self.special("padding")? {
            config.insert("pad_token_id".into(), id.into());
        }
        Ok(Value::Object(config))
    }

    fn vocabulary(&self) -> Result<Map<String, Value>> {
        let mut vocabulary = Map::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(other) = vocabulary.insert(token.clone(), id.into()) {
                bail!(
                    "{}: token {token:?} has the ids {other} and {id}; convert the model again",
                    self.gguf.path.display()
                );
            }
        }
        Ok(vocabulary)
    }

    /// Tokens that are found in text before it is split.
    fn added_tokens(&self) -> Result<Vec<Value>> {
        let Some(types) = self.gguf.optional_numbers("tokenizer.ggml.token_type")? else { return Ok(Vec::new()) };
        if types.len() != self.tokens.len() {
            bail!(
                "{}: \"tokenizer.ggml.token_type\" has {} items for {} tokens; convert the model again",
                self.gguf.path.display(),
                types.len(),
                self.tokens.len()
            );
        }
        let added = types
            .iter()
            .zip(self.tokens)
            .enumerate()
            .filter(|(_, (kind, token))| (**kind == CONTROL || **kind == USER_DEFINED) && !token.is_empty());
        let added = added.map(|(id, (kind, token))| {
            json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                    "special": *kind == CONTROL })
        });
        Ok(added.collect())
    }

    fn tokenizer(
        &self,
        model: Value,
        normalizer: Value,
        pre_tokenizer: Value,
        decoder: Value,
        adds_bos: bool,
    ) -> Result<Value> {
        let bos = if adds_bos { self.special("bos")? } else { None };
        let eos = if self.flag("add_eos_token", false)? { self.special("eos")? } else { None };
        let around = |token: Option<(u64, &String)>| {
            token.map(|(_, name)| json!({ "SpecialToken": { "id": name, "type_id": 0 } }))
        };
        let sequence = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
        let put = |names: &[&str]| -> Vec<Value> {
            let inner = names.iter().map(|name| sequence(name));
            around(bos).into_iter().chain(inner).chain(around(eos)).collect()
        };
        let special: Map<String, Value> = (bos.into_iter().chain(eos))
            .map(|(id, name)| (name.clone(), json!({ "id": name, "ids": [id], "tokens": [name] })))
            .collect();
        let post_processor = match special.is_empty() {
            true => Value::Null,
            false => {
                json!({ "type": "TemplateProcessing", "single": put(&["A"]), "pair": put(&["A", "B"]), "special_tokens": special })
            }
        };
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens()?,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": post_processor,
            "decoder": decoder,
            "model": model,
        }))
    }

    /// Byte-level pieces, merged by a list.
    fn byte_level(&self) -> Result<Value> {
        let Some(merges) = self.gguf.optional_texts("tokenizer.ggml.merges")? else {
            return Err(self.gguf.missing("tokenizer.ggml.merges"));
        };
        let pre = self.gguf.optional_text("tokenizer.ggml.pre")?.unwrap_or("");
        let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
        let split = |pattern: String| {
            json!({ "type": "Sequence", "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false },
                byte_level(false),
            ] })
        };
        let is = |names: &[&str]| names.contains(&pre);
        let pre_tokenizer = if is(GPT2) {
            byte_level(true)
        } else if is(SINGLE_DIGITS) {
            json!({ "type": "Sequence", "pretokenizers": [{ "type": "Digits", "individual_digits": true }, byte_level(true)] })
        } else if is(LLAMA3) || is(LLAMA3_MERGED) {
            split(words(r"\p{N}{1,3}"))
        } else if is(QWEN2) {
            split(words(r"\p{N}"))
        } else if is(GPT4O) {
            split(cased_words(&format!("{CONTRACTIONS}?"), r"\p{N}{1,3}"))
        } else if is(TEKKEN) {
            split(cased_words("", r"\p{N}"))
        } else {
            bail!(
                "{}: the way \"{pre}\" to split text (\"tokenizer.ggml.pre\") is not known, and another one would give other tokens; use the model's Hugging \
                 Face folder",
                self.gguf.path.display()
            )
        };
        let ignores_merges = is(LLAMA3) || is(TEKKEN);
        let merges: Vec<Value> = merges.iter().map(|merge| merge.as_str().into()).collect();
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignores_merges, "vocab": self.vocabulary()?, "merges": merges,
        });
        let adds_bos = self.flag("add_bos_token", ignores_merges)?;
        self.tokenizer(model, Value::Null, pre_tokenizer, byte_level(true), adds_bos)
    }

    /// SentencePiece's byte-pair encoding, whose merges follow from the tokens' scores.
    fn sentencepiece(&self) -> Result<Value> {
        if self.flag("remove_extra_whitespaces", false)? {
            bail!(
                "{}: \"tokenizer.ggml.remove_extra_whitespaces\" is true, which is not done here; use the model's Hugging Face folder",
                self.gguf.path.display()
            );
        }
        let adds_space = self.flag("add_space_prefix", true)?;
        let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
        let prepend = adds_space.then(|| json!({ "type": "Prepend", "prepend": "▁" }));
        let normalizers: Vec<Value> = prepend.into_iter().chain([replace(" ", "▁")]).collect();
        let strip = adds_space.then(|| json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        let decoders: Vec<Value> = [replace("▁", " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })]
            .into_iter()
            .chain(strip)
            .collect();
        let unknown = self.special("unknown")?.map(|(_, token)| token.clone());
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": self.vocabulary()?, "merges": self.merges()?,
        });
        let normalizer = json!({ "type": "Sequence", "normalizers": normalizers });
        let decoder = json!({ "type": "Sequence", "decoders": decoders });
        self.tokenizer(model, normalizer, Value::Null, decoder, self.flag("add_bos_token", true)?)
    }

    /// Every pair of tokens that make a third, the best scores of what they make first, as `transformers`
    /// finds them.
    fn merges(&self) -> Result<Vec<Value>> {
        let Some(scores) =
            self.gguf.optional_numbers("tokenizer.ggml.scores")?.filter(|scores| scores.len() == self.tokens.len())
        else {
            bail!(
                "{}: \"tokenizer.ggml.scores\" does not hold one number for each of the {} tokens; convert the model again",
                self.gguf.path.display(),
                self.tokens.len()
            );
        };
        let ids: HashMap<&str, usize> =
            self.tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
        // The score of what two tokens make, and their ids.
        let mut found: Vec<(f64, usize, usize)> = Vec::new();
        for (token, &score) in self.tokens.iter().zip(scores) {
            for (split, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(split);
                if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                    found.push((score, left, right));
                }
            }
        }
        found.sort_by(|left, right| right.0.total_cmp(&left.0).then((left.1, left.2).cmp(&(right.1, right.2))));
        Ok(found.iter().map(|&(_, left, right)| json!([self.tokens[left], self.tokens[right]])).collect())
    }
}

/// Words with a character before them, numbers by `numbers`, punctuation, line breaks, white space (Llama 3,
/// Qwen 2).
fn words(numbers: &str) -> String {
    format!(
        r"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

/// The same, where words end before a capital letter, with `end` behind them.
fn cased_words(end: &str, numbers: &str) -> String {
    let before = r"[^\r\n\p{L}\p{N}]?";
    let rest = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    format!("{before}{UPPER}*{LOWER}+{end}|{before}{UPPER}+{LOWER}*{end}|{numbers}|{rest}")
}
