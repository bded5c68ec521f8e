//! A `config.json`: its fields, with errors that name file and field, and the rule that no field is passed over unread.
//!
//! A field either is read by the family, or is known to change no number that is computed here, or is refused by its name.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::Value;

use crate::bail;
use crate::error::Result;
use crate::ops::Activation;

/// The largest size that a `config.json` may ask for: no product of two overflows, and none makes a list that memory cannot hold.
pub const LARGEST_SIZE: usize = 1 << 24;
/// The most blocks.
pub const MOST_LAYERS: usize = 1 << 12;

/// Fields of any family that do not change what the model computes from tokens: where the file comes from, ids of
/// special tokens and labels (read elsewhere), dropout (training-time regularisation, which is not applied here),
/// what a forward pass returns, how it is computed, and settings of generation, which `generation_config.json` replaced.
const HARMLESS: &[&str] = &[
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "transformers_weights",
    "transformers.js_config",
    "adapters",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "torch_dtype",
    "dtype",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "max_seq_len",
    "finetuning_task",
    "task_specific_params",
    "tokenizer_class",
    "language",
    "license",
    "sentence_transformers",
    "sbert_ce_default_activation_function",
    "bos_token",
    "eos_token",
    "pad_token",
    "padding",
    "truncation",
    // Special tokens and labels.
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "unk_token_id",
    "decoder_start_token_id",
    "id2label",
    "label2id",
    "num_labels",
    "_num_labels",
    "problem_type",
    // Training.
    "ignore_index",
    "loss_type",
    "neftune_noise_alpha",
    // Dropout.
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "classifier_dropout_prob",
    "dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "mlp_dropout",
    "pooler_dropout",
    "resid_pdrop",
    // How a forward pass is computed and what it returns.
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "attn_implementation",
    "_flash_attn_2_enabled",
    "use_flash_attention_2",
    "use_flash_attn",
    "use_memory_efficient_attention",
    "cache_implementation",
    "chunk_size_feed_forward",
    "gradient_checkpointing",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pretraining_tp",
    "return_dict",
    "tie_last_hidden_states",
    "tf_legacy_loss",
    "torchscript",
    "use_bfloat16",
    "use_cache",
    // Generation.
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

/// Beginnings of the names of fields that tools leave behind and that change no number.
const HARMLESS_BEGINNINGS: [&str; 1] = ["unsloth_"];

/// A JSON value as a message shows it: a long one loses its end.
pub fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Fields of a `config.json`, with errors that name file and field. It remembers which fields were asked for, so that
/// [`Config::check_all_read`] can refuse the others.
pub struct Config<'a> {
    /// The parsed file, or an object within it.
    pub json: &'a Value,
    /// How the file is called in errors.
    pub file: String,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Config<'a> {
    /// The fields of `json`, which errors name by `file`.
    pub fn new(json: &'a Value, file: impl Into<String>) -> Self {
        Config { json, file: file.into(), read: RefCell::default() }
    }

    /// The field, null where the file says so.
    pub fn raw(&self, field: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(field.to_string());
        self.json.get(field)
    }

    /// The field, unless it is absent or null.
    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.raw(field).filter(|value| !value.is_null())
    }

    /// The fields of an object within, unless it is absent or null.
    pub fn object(&self, field: &str) -> Result<Option<Config<'a>>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) if value.is_object() => Ok(Some(Config::new(value, format!("{} ({field})", self.file)))),
            Some(value) => bail!("{}: field \"{field}\" is {}, expected an object", self.file, shortened(value)),
        }
    }

    /// Marks fields as known: whatever they hold, it changes no number.
    pub fn ignore(&self, fields: &[&str]) {
        self.read.borrow_mut().extend(fields.iter().map(|field| field.to_string()));
    }

    /// Refuses fields that nobody has read, that are not known to be harmless and that hold something (anything but null, false, 0, or an
    /// empty text, list or object); `reader` is what they are not known to, for example "model type llama".
    pub fn check_all_read(&self, reader: &str) -> Result<()> {
        let read = self.read.borrow();
        for (field, value) in self.json.as_object().into_iter().flatten() {
            let known = read.contains(field)
                || HARMLESS.contains(&field.as_str())
                || HARMLESS_BEGINNINGS.iter().any(|beginning| field.starts_with(beginning));
            if known || is_nothing(value) {
                continue;
            }
            if matches!(field.as_str(), "quantization_config" | "compression_config") {
                bail!(
                    "{}: field \"{field}\" says that the weights are quantized ({}), which is not read; give the model's folder with weights of f32, bf16 or f16",
                    self.file,
                    shortened(value)
                );
            }
            bail!(
                "{}: field \"{field}\" is {}, which is not known to {reader} here and may change what the model computes; remove it if it does not",
                self.file,
                shortened(value)
            );
        }
        Ok(())
    }

    /// A size that must be there and at least 1.
    pub fn size(&self, field: &str) -> Result<usize> {
        match self.optional_size(field)? {
            Some(size) => Ok(size),
            None => bail!("{}: field \"{field}\" is missing; it is expected to be a positive integer", self.file),
        }
    }

    /// A size that may be absent; at least 1 and at most [`LARGEST_SIZE`] where it is there.
    pub fn optional_size(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size @ 1..=LARGEST_SIZE) => Ok(Some(size)),
            Some(size) if size > LARGEST_SIZE => {
                bail!(
                    "{}: field \"{field}\" is {value}, expected at most {LARGEST_SIZE}; no model is that large",
                    self.file
                )
            }
            _ => bail!("{}: field \"{field}\" is {}, expected a positive integer", self.file, shortened(value)),
        }
    }

    /// A size where null means none and absence means `default`, as for a field with a default in `transformers`.
    pub fn size_or_none(&self, field: &str, default: Option<usize>) -> Result<Option<usize>> {
        match self.raw(field) {
            None => Ok(default),
            Some(_) => self.optional_size(field),
        }
    }

    /// The number of blocks, at most [`MOST_LAYERS`].
    pub fn layers(&self, field: &str) -> Result<usize> {
        match self.size(field)? {
            layers if layers > MOST_LAYERS => {
                bail!(
                    "{}: field \"{field}\" is {layers}, expected at most {MOST_LAYERS}; no model is that deep",
                    self.file
                )
            }
            layers => Ok(layers),
        }
    }

    /// A number, if it is there.
    pub fn optional_number(&self, field: &str) -> Result<Option<f64>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() => Ok(Some(number)),
                _ => bail!("{}: field \"{field}\" is {}, expected a number", self.file, shortened(value)),
            },
        }
    }

    /// A number, or `default` where it is absent.
    pub fn number(&self, field: &str, default: f64) -> Result<f64> {
        Ok(self.optional_number(field)?.unwrap_or(default))
    }

    /// A number above 0, if it is there.
    pub fn optional_positive(&self, field: &str) -> Result<Option<f64>> {
        match self.optional_number(field)? {
            Some(number) if number <= 0.0 => {
                bail!("{}: field \"{field}\" is {number}, expected a number above 0", self.file)
            }
            number => Ok(number),
        }
    }

    /// A number above 0, or `default` where it is absent.
    pub fn positive(&self, field: &str, default: f64) -> Result<f64> {
        Ok(self.optional_positive(field)?.unwrap_or(default))
    }

    /// A number above 0 that must be there.
    pub fn needed_positive(&self, field: &str) -> Result<f64> {
        match self.optional_positive(field)? {
            Some(number) => Ok(number),
            None => bail!("{}: field \"{field}\" is missing; it is expected to be a number above 0", self.file),
        }
    }

    /// A number of at least 0, or `default` where it is absent.
    pub fn not_negative(&self, field: &str, default: f64) -> Result<f64> {
        match self.number(field, default)? {
            number if number >= 0.0 => Ok(number),
            number => bail!("{}: field \"{field}\" is {number}, expected a number of at least 0", self.file),
        }
    }

    /// A list of exactly `count` numbers above 0, which must be there.
    pub fn positive_list(&self, field: &str, count: usize) -> Result<Vec<f32>> {
        let Some(value) = self.get(field) else {
            bail!("{}: field \"{field}\" is missing; it is expected to be a list of {count} numbers", self.file);
        };
        let number = |item: &Value| item.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        let list: Option<Vec<f32>> =
            value.as_array().and_then(|items| items.iter().map(|item| number(item).map(|x| x as f32)).collect());
        match list {
            Some(list) if list.len() == count => Ok(list),
            _ => bail!(
                "{}: field \"{field}\" is {}, expected a list of {count} numbers above 0",
                self.file,
                shortened(value)
            ),
        }
    }

    /// True or false, or `default` where it is absent.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => {
                bail!("{}: field \"{field}\" is {}, expected true or false", self.file, shortened(value))
            }
        }
    }

    /// `tie_word_embeddings`, which as null is an error for `transformers` too.
    pub fn tied_output(&self, default: bool) -> Result<bool> {
        let field = "tie_word_embeddings";
        if self.raw(field).is_some_and(Value::is_null) {
            bail!(
                "{}: field \"{field}\" is null, expected true or false; remove it for the default of the family",
                self.file
            );
        }
        self.flag(field, default)
    }

    /// A text, or `default` where it is absent.
    pub fn text<'b>(&'b self, field: &str, default: &'b str) -> Result<&'b str> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::String(text)) => Ok(text),
            Some(value) => bail!("{}: field \"{field}\" is {}, expected a text", self.file, shortened(value)),
        }
    }

    /// The non-linearity named by `field`.
    pub fn activation(&self, field: &str, default: &str) -> Result<Activation> {
        let name = self.text(field, default)?;
        match Activation::named(name) {
            Some(activation) => Ok(activation),
            None => bail!(
                "{}: field \"{field}\" is \"{name}\"; known activations are gelu, gelu_new, gelu_pytorch_tanh, silu, relu and tanh",
                self.file
            ),
        }
    }

    /// Refuses a flag that is set; `what` says why it cannot be computed.
    pub fn refuse_flag(&self, field: &str, what: &str) -> Result<()> {
        if self.flag(field, false)? {
            bail!("{}: \"{field}\": true is not supported; {what}", self.file);
        }
        Ok(())
    }
}

/// Whether a value says as much as an absent field.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_field_is_read_or_harmless_or_nothing_or_refused_by_its_name() {
        let check = |json: Value| {
            let config = Config::new(&json, "config.json");
            config.size("hidden_size").unwrap();
            config.check_all_read("model type x")
        };
        let known =
            json!({"hidden_size": 8, "transformers_version": "5", "unsloth_fixed": true, "id2label": {"0": "a"}});
        check(known).unwrap();
        let nothing = json!({"hidden_size": 8, "a": null, "b": false, "c": 0, "d": 0.0, "e": "", "f": [], "g": {}});
        check(nothing).unwrap();
        for value in [json!(true), json!(1), json!(-0.5), json!("x"), json!([0]), json!({"a": null})] {
            let error = check(json!({"hidden_size": 8, "odd_field": value})).unwrap_err().to_string();
            assert!(
                error.starts_with("config.json: field \"odd_field\" is ") && error.contains("model type x"),
                "{error}"
            );
        }
        let quantized = json!({"hidden_size": 8, "quantization_config": {"quant_method": "gptq"}});
        let error = check(quantized).unwrap_err().to_string();
        assert!(error.contains("quantization_config") && error.contains("quantized"), "{error}");
    }

    #[test]
    fn absence_is_the_default_and_null_is_none() {
        let json = json!({"window": null, "other": 3});
        let config = Config::new(&json, "config.json");
        assert_eq!(config.size_or_none("window", Some(4)).unwrap(), None);
        assert_eq!(config.size_or_none("absent", Some(4)).unwrap(), Some(4));
        assert_eq!(config.size_or_none("other", Some(4)).unwrap(), Some(3));
    }
}
