//! What `tokenizer_config.json` sets of a tokenizer that `tokenizer.json` describes, by the rule of
//! `transformers` 5.
//!
//! There, `tokenizer.json` decides nearly everything: `add_bos_token` and `add_eos_token` are ignored next to
//! it, as its post-processor says what is put around a text. What still counts is listed in [`KNOWN`]; a
//! field that is not known there is named in a note.

use serde_json::{Map, Value};
use tokenizers::{ModelWrapper, NormalizerWrapper, PreTokenizerWrapper};

use super::notes;
use super::tokenizer_files::TokenizerFiles;
use crate::bail;
use crate::error::{Error, Result};

const CONFIG: &str = "tokenizer_config.json";

/// Fields that are read here or elsewhere, or that change no token of a tokenizer with a `tokenizer.json`.
/// Named tokens (`*_token`) are known too.
const KNOWN: &[&str] = &[
    // Tokens: `special_tokens`.
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
    // Templates: `template`.
    "chat_template",
    "response_schema",
    "response_template",
    "chat_control_tokens",
    "use_default_system_prompt",
    // Lengths: `tokenize`.
    "model_max_length",
    "max_len",
    "truncation_side",
    // Settings that are read below.
    "split_special_tokens",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
    "add_prefix_space",
    "fast_tokenizer_files",
    "fix_mistral_regex",
    "tokenizer_class",
    // Ignored by transformers 5 next to a tokenizer.json.
    "add_bos_token",
    "add_eos_token",
    // Padding, which there is none of here.
    "padding_side",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding",
    // Truncation is done by --max-length.
    "max_length",
    "stride",
    "truncation",
    "truncation_strategy",
    // What only tokenizers without a tokenizer.json read: the conversion of other files into one.
    "legacy",
    "sp_model_kwargs",
    "errors",
    "from_slow",
    "do_basic_tokenize",
    "do_split_by_punct",
    "never_split",
    "wordpieces_prefix",
    "keep_accents",
    "remove_space",
    "split_by_punct",
    "spaces_between_special_tokens",
    "trim_offsets",
    "vocab_type",
    "vocab_file",
    "merges_file",
    "tokenizer_file",
    "special_tokens_map_file",
    "clean_text",
    "handle_chinese_chars",
    // How a file was made and is loaded.
    "auto_map",
    "backend",
    "device_map",
    "files_loaded",
    "init_inputs",
    "is_local",
    "local_files_only",
    "model_input_names",
    "model_type",
    "name_or_path",
    "processor_class",
    "return_token_type_ids",
    "slow_tokenizer_class",
    "tokenizer_type",
    "transformers_version",
    "trust_remote_code",
    "unk_id",
    // Ids are the model's to set.
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "return_tensors",
    "add_special_tokens",
    "use_fast",
    "verbose",
    "vocab_size",
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
];

/// Classes of `transformers` that take `tokenizer.json` as it is; the others build the normaliser and the
/// splitting into words from their settings.
const AS_IN_THE_FILE: [&str; 4] =
    ["PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer", "PythonBackend"];

/// Makes the settings those of the tokenizer; says whether decoded texts lose the spaces before punctuation.
///
/// # Errors
/// Where a setting that changes tokens is not supported, or is of another type.
pub(super) fn apply(tokenizer: &mut tokenizers::Tokenizer, files: &TokenizerFiles) -> Result<bool> {
    let Some(Value::Object(fields)) = files.json(CONFIG)? else { return Ok(false) };
    let flag = |name: &str| match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => bail!("{}: field \"{name}\" is {other}, expected true or false", files.path(CONFIG)),
    };
    if flag("fix_mistral_regex")? == Some(true) {
        bail!(
            "{}: field \"fix_mistral_regex\" is true, which changes how texts are split and is not supported; save the tokenizer with transformers' \
             `save_pretrained`, which writes the change into tokenizer.json, and take the field out",
            files.path(CONFIG)
        );
    }
    if let Some(other) = fields
        .get("fast_tokenizer_files")
        .and_then(Value::as_array)
        .and_then(|names| names.iter().find(|name| *name != "tokenizer.json"))
    {
        bail!(
            "{}: field \"fast_tokenizer_files\" names {other} in place of tokenizer.json; keep one of them, as tokenizer.json, and take the field out",
            files.path(CONFIG)
        );
    }
    if flag("split_special_tokens")? == Some(true) {
        tokenizer.set_encode_special_tokens(true);
    }
    if is_built_from_settings(&fields, files)? {
        let [lowercase, accents, chinese] = ["do_lower_case", "strip_accents", "tokenize_chinese_chars"].map(flag);
        set_normalizer(tokenizer, [lowercase?, accents?, chinese?]).map_err(|error| {
            Error::input(format!("{}: its settings cannot be applied ({error})", files.path(CONFIG)))
        })?;
        if let Some(space) = flag("add_prefix_space")? {
            set_prefix_space(tokenizer, space);
        }
    }
    let unknown = |(name, value): &(&String, &Value)| {
        let is_set = !matches!(value, Value::Null | Value::Bool(false));
        is_set && !name.ends_with("_token") && !KNOWN.contains(&name.as_str())
    };
    let unknown: Vec<&str> = fields.iter().filter(unknown).map(|(name, _)| name.as_str()).take(8).collect();
    if !unknown.is_empty() {
        notes::add(format!("{}: the settings {unknown:?} are not known and have no effect", files.path(CONFIG)));
    }
    let is_bpe = matches!(tokenizer.get_model(), ModelWrapper::BPE(_));
    let for_bpe = flag("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")? == Some(true);
    Ok(flag("clean_up_tokenization_spaces")? == Some(true) && (!is_bpe || for_bpe))
}

/// Whether `transformers` builds the normaliser and the splitting into words from the settings: in the class
/// that a file names, or without one in the class of the model's type.
fn is_built_from_settings(fields: &Map<String, Value>, files: &TokenizerFiles) -> Result<bool> {
    let config = files.json("config.json")?.unwrap_or_default();
    let class = fields.get("tokenizer_class").or(config.get("tokenizer_class")).and_then(Value::as_str);
    Ok(match class {
        Some(class) => !AS_IN_THE_FILE.contains(&class),
        None => config.get("model_type").is_some(),
    })
}

/// BERT's settings count over those in the file.
fn set_normalizer(
    tokenizer: &mut tokenizers::Tokenizer,
    [lowercase, accents, chinese]: [Option<bool>; 3],
) -> Result<(), tokenizers::Error> {
    let Some(NormalizerWrapper::BertNormalizer(normalizer)) = tokenizer.get_normalizer() else { return Ok(()) };
    let mut changed = *normalizer;
    changed.lowercase = lowercase.unwrap_or(changed.lowercase);
    changed.strip_accents = accents.or(changed.strip_accents);
    changed.handle_chinese_chars = chinese.unwrap_or(changed.handle_chinese_chars);
    tokenizer.with_normalizer(Some(NormalizerWrapper::BertNormalizer(changed))).map(drop)
}

/// Whether byte-level tokenizers put a space before a text.
fn set_prefix_space(tokenizer: &mut tokenizers::Tokenizer, space: bool) {
    let Some(mut splitting) = tokenizer.get_pre_tokenizer().cloned() else { return };
    let parts = match &mut splitting {
        PreTokenizerWrapper::Sequence(parts) => parts.as_mut(),
        one => std::slice::from_mut(one),
    };
    for part in parts {
        if let PreTokenizerWrapper::ByteLevel(bytes) = part {
            bytes.add_prefix_space = space;
        }
    }
    tokenizer.with_pre_tokenizer(Some(splitting));
}

/// What `clean_up_tokenization_spaces` takes out of a decoded text.
pub(super) fn without_spaces_before_punctuation(text: &str) -> String {
    let mut text = text.to_string();
    for (spaced, closed) in [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ] {
        text = text.replace(spaced, closed);
    }
    text
}
