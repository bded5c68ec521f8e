//! The tokens that a tokenizer's files declare next to `tokenizer.json`, by the rule of `transformers` 5
//! (`PreTrainedTokenizerFast`).
//!
//! Which file counts: with an `added_tokens_decoder`, `tokenizer_config.json` alone; without one,
//! `special_tokens_map.json` counts over it, and `added_tokens.json` gives ids. What `tokenizer.json` lacks
//! is added, in this order: the tokens with a declared id, by their ids; the named special tokens
//! (`bos_token` and so on); the further ones (`extra_special_tokens`, formerly `additional_special_tokens`).
//! A declared token's flags count over those in `tokenizer.json`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::tokenizer_files::TokenizerFiles;
use crate::bail;
use crate::error::Result;

const CONFIG: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";
const EXTRA: &str = "extra_special_tokens";
const OLD_EXTRA: &str = "additional_special_tokens";
/// The special tokens that every tokenizer may name, in the order in which they are added.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What the files declare.
#[derive(Debug, Clone, Default)]
pub(super) struct DeclaredTokens {
    /// Tokens with their ids.
    by_id: BTreeMap<u32, AddedToken>,
    /// The file that gives these ids.
    ids_from: &'static str,
    /// By their names, in the order in which they are added.
    named: Vec<(String, AddedToken)>,
    /// Special tokens without a name.
    extra: Vec<AddedToken>,
}

impl DeclaredTokens {
    /// Reads what the files declare.
    pub(super) fn of(files: &TokenizerFiles) -> Result<Self> {
        let mut fields = object(files, CONFIG)?;
        let is_empty = |value: &Value| match value {
            Value::Array(items) => items.is_empty(),
            Value::Object(items) => items.is_empty(),
            other => other.is_null(),
        };
        // The older name of the field.
        if fields.get(EXTRA).is_none_or(is_empty)
            && let Some(older) = fields.shift_remove(OLD_EXTRA)
        {
            fields.insert(EXTRA.to_string(), older);
        }
        let mut declared = DeclaredTokens { ids_from: CONFIG, ..Default::default() };
        match fields.shift_remove("added_tokens_decoder") {
            Some(Value::Object(by_id)) => {
                for (id, value) in &by_id {
                    let (Ok(id), Some(token)) = (id.parse(), token(value, false)) else {
                        bail!(
                            "{}: field \"added_tokens_decoder\" has the entry \"{id}\": {value}, expected an id and an object with a \"content\"",
                            files.path(CONFIG)
                        );
                    };
                    declared.by_id.insert(id, token);
                }
            }
            _ => {
                declared.ids_from = ADDED;
                for (name, value) in object(files, MAP)? {
                    match (name.as_str(), &value) {
                        (EXTRA, Value::Array(more)) => extend(&mut fields, EXTRA, more),
                        _ => drop(fields.insert(name, value)),
                    }
                }
            }
        }
        declared.extra = tokens(fields.get(EXTRA).filter(|value| value.is_array()).or(fields.get(OLD_EXTRA)));
        declared.named = named(&fields);
        if declared.ids_from == ADDED {
            // Those of the older field of the map are none, as in transformers.
            let extra = tokens(fields.get(EXTRA));
            let named = declared.named.iter().map(|(_, token)| token);
            let special: BTreeSet<&String> = named.chain(&extra).map(|token| &token.content).collect();
            let mut by_id = BTreeMap::new();
            for (content, id) in object(files, ADDED)? {
                let Some(id) = id.as_u64().and_then(|id| u32::try_from(id).ok()) else {
                    bail!("{}: the id of \"{content}\" is {id}, expected a whole number", files.path(ADDED));
                };
                let is_special = special.contains(&content);
                by_id.insert(id, AddedToken::from(content, is_special));
            }
            declared.by_id = by_id;
        }
        Ok(declared)
    }

    /// The special tokens by their names, as chat templates know them.
    pub(super) fn by_name(&self) -> BTreeMap<String, String> {
        self.named.iter().map(|(name, token)| (name.clone(), token.content.clone())).collect()
    }

    /// Adds to a tokenizer what it lacks.
    ///
    /// # Errors
    /// Where a token cannot have the id that a file gives it, and where the token that ends texts is in none
    /// of the files: a model has learned nothing of it.
    pub(super) fn add_to(&self, tokenizer: &mut tokenizers::Tokenizer, files: &TokenizerFiles) -> Result<()> {
        let known: BTreeSet<&String> = self.by_id.values().map(|token| &token.content).collect();
        if let Some((_, eos)) = self.named.iter().find(|(name, _)| name == "eos_token")
            && tokenizer.token_to_id(&eos.content).is_none()
            && !known.contains(&eos.content)
            && !eos.content.is_empty()
        {
            bail!(
                "{}: `eos_token` is \"{}\", which neither tokenizer.json nor added_tokens.json has, so no model has learned to end with it; name a token of \
                 the vocabulary",
                files.path(if files.files.contains_key(CONFIG) { CONFIG } else { MAP }),
                eos.content
            );
        }
        let mut there: BTreeMap<String, AddedToken> =
            tokenizer.get_added_tokens_decoder().into_values().map(|token| (token.content.clone(), token)).collect();
        let mut tokens: Vec<AddedToken> = Vec::new();
        // What added_tokens.json says of a token is its id alone, so that it changes no flags.
        let is_as_declared = |token: &&AddedToken| match there.get(&token.content) {
            Some(found) => self.ids_from == ADDED || found == *token,
            None => false,
        };
        for token in self.by_id.values().filter(|token| !is_as_declared(token)) {
            // A named token is special, whatever its flag.
            let special = token.special || self.named.iter().any(|(_, named)| named.content == token.content);
            tokens.push(AddedToken { special, ..token.clone() });
        }
        there.extend(tokens.iter().map(|token| (token.content.clone(), token.clone())));
        for token in self.named.iter().map(|(_, token)| token).chain(&self.extra) {
            if !there.contains_key(&token.content) {
                there.insert(token.content.clone(), token.clone());
                tokens.push(token.clone());
            }
        }
        tokenizer.add_tokens(tokens).map_err(|error| {
            crate::error::Error::input(format!("{}: its tokens cannot be added ({error})", files.path(self.ids_from)))
        })?;
        for (&id, token) in &self.by_id {
            let found = tokenizer.token_to_id(&token.content);
            if found != Some(id) {
                bail!(
                    "{}: \"{}\" is declared with the id {id}, but in tokenizer.json it has, or would come next with, the id {}; save the tokenizer again with \
                     `save_pretrained`, so that its files agree",
                    files.path(self.ids_from),
                    token.content,
                    found.map_or("none".to_string(), |found| found.to_string())
                );
            }
        }
        Ok(())
    }
}

/// A file's fields; none where there is no such file.
fn object(files: &TokenizerFiles, name: &str) -> Result<Map<String, Value>> {
    match files.json(name)? {
        None => Ok(Map::new()),
        Some(Value::Object(fields)) => Ok(fields),
        Some(_) => bail!("{}: expected a JSON object", files.path(name)),
    }
}

/// A token as a string, or as an object with flags. `is_special` says whether it is, where the object does
/// not.
fn token(value: &Value, is_special: bool) -> Option<AddedToken> {
    if let Value::String(content) = value {
        return Some(AddedToken::from(content, true));
    }
    let content = value.get("content")?.as_str()?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(is_special);
    Some(AddedToken {
        single_word: flag("single_word").unwrap_or(false),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        normalized: flag("normalized").unwrap_or(!special),
        ..AddedToken::from(content, special)
    })
}

fn extend(fields: &mut Map<String, Value>, name: &str, more: &[Value]) {
    let mut all = fields.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    more.iter().for_each(|token| {
        if !all.contains(token) {
            all.push(token.clone())
        }
    });
    fields.insert(name.to_string(), Value::Array(all));
}

/// The tokens of a list, all of them special.
fn tokens(list: Option<&Value>) -> Vec<AddedToken> {
    let items = list.and_then(Value::as_array).into_iter().flatten();
    items.filter_map(|value| token(value, true)).collect()
}

/// The special tokens with a name: those that every tokenizer may have, then those that models have of their
/// own.
fn named(fields: &Map<String, Value>) -> Vec<(String, AddedToken)> {
    let fields_of = |name: &str| fields.get(name).and_then(Value::as_object).into_iter().flatten();
    // First those that are objects, as in transformers.
    let own = fields.iter().filter(|(name, _)| name.ends_with("_token") && !NAMED.contains(&name.as_str()));
    let (texts, objects): (Vec<_>, Vec<_>) = own.partition(|(_, value)| value.is_string());
    let standard = NAMED.into_iter().filter_map(|name| fields.get_key_value(name));
    let all = (standard.chain(objects).chain(texts))
        .chain(fields_of(EXTRA))
        .chain(fields_of("model_specific_special_tokens"));
    all.filter_map(|(name, value)| Some((name.clone(), token(value, true)?))).collect()
}
