//! Which fields of an `adapter_config.json` are understood: a field that nothing here knows may change what the adapter computes, so it is
//! refused unless it says nothing.

use serde_json::Value;

use crate::bail;
use crate::error::Result;
use crate::model::architecture::{Config, shortened};

/// What a file of one form may say.
pub struct Fields {
    /// Honoured where the method reads its configuration.
    pub read: &'static [&'static str],
    /// Without effect on what a trained adapter computes: where its numbers began, how it was trained or stored, who wrote it.
    pub without_effect: &'static [&'static str],
}

/// Of every method of PEFT (`PeftConfig`, 0.21).
const PEFT: Fields = Fields {
    read: &["peft_type", "base_model_name_or_path", "revision", "task_type", "modules_to_save"],
    without_effect: &["auto_mapping", "peft_version", "inference_mode"],
};

/// Of a method of PEFT by its `peft_type`, the common ones apart; `None` if the method is not known.
///
/// `fan_in_fan_out` says how the base stores its linears, which PEFT corrects by the linear's class. The settings of starts (`loftq_config` and
/// the like) count with their `init_lora_weights` alone, which [`super::lora`] reads. `velora_config` changes the backward pass only.
fn of_method(peft_type: &str) -> Option<Fields> {
    let (read, without_effect): (&[&str], &[&str]) = match peft_type {
        "LORA" => (
            &[
                "r",
                "lora_alpha",
                "lora_dropout",
                "use_rslora",
                "use_dora",
                "rank_pattern",
                "alpha_pattern",
                "bias",
                "init_lora_weights",
                "target_modules",
                "exclude_modules",
                "layers_to_transform",
                "layers_pattern",
                "trainable_token_indices",
                "ensure_weight_tying",
            ],
            &[
                "fan_in_fan_out",
                "loftq_config",
                "eva_config",
                "corda_config",
                "lora_ga_config",
                "velora_config",
                "runtime_config",
                "megatron_core",
                "qalora_group_size",
                "merge_weights",
            ],
        ),
        "IA3" => (
            &["target_modules", "feedforward_modules", "exclude_modules", "layers_to_transform", "layers_pattern"],
            &["fan_in_fan_out", "init_ia3_weights"],
        ),
        "TRAINABLE_TOKENS" => (&["token_indices", "target_modules"], &["init_weights"]),
        "PROMPT_TUNING" => (
            &VIRTUAL_TOKENS,
            &[
                "token_dim",
                "num_attention_heads",
                "num_layers",
                "prompt_tuning_init",
                "prompt_tuning_init_text",
                "tokenizer_name_or_path",
                "tokenizer_kwargs",
            ],
        ),
        "P_TUNING" => (
            &[
                "num_virtual_tokens",
                "num_transformer_submodules",
                "encoder_reparameterization_type",
                "encoder_num_layers",
            ],
            &["token_dim", "num_attention_heads", "num_layers", "encoder_hidden_size", "encoder_dropout"],
        ),
        "PREFIX_TUNING" => (
            &VIRTUAL_TOKENS,
            &[
                "token_dim",
                "num_attention_heads",
                "num_layers",
                "encoder_hidden_size",
                "prefix_projection",
                "init_weights",
            ],
        ),
        "BITFIT" => (&[], &[]),
        "PROBING" => (&["layer"], &[]),
        _ => return None,
    };
    Some(Fields { read, without_effect })
}

const VIRTUAL_TOKENS: [&str; 2] = ["num_virtual_tokens", "num_transformer_submodules"];

/// Refuses a configuration of PEFT's form that says what nothing here reads. A `peft_type` that is not known is left to the caller.
pub fn check_peft(config: &Config) -> Result<()> {
    let Some(of_method) = of_method(config.text("peft_type", "")?) else { return Ok(()) };
    check(config, &[&PEFT, &of_method])?;
    match config.text("task_type", "CAUSAL_LM")? {
        "CAUSAL_LM" | "SEQ_CLS" | "FEATURE_EXTRACTION" => {}
        other => bail!(
            "{}: task_type is \"{other}\", which is not supported; expected CAUSAL_LM, SEQ_CLS or FEATURE_EXTRACTION",
            config.file
        ),
    }
    match config.optional_size("num_transformer_submodules")? {
        None | Some(1) => Ok(()),
        Some(other) => bail!(
            "{}: num_transformer_submodules is {other}, which is not supported; expected 1, as no model here has an encoder and a decoder",
            config.file
        ),
    }
}

/// Refuses a field that none of `known` has, unless it is null, false or empty.
///
/// # Errors
/// The sentence names the field.
pub fn check(config: &Config, known: &[&Fields]) -> Result<()> {
    for (name, value) in config.json.as_object().into_iter().flatten() {
        let is_known = known
            .iter()
            .any(|fields| fields.read.contains(&name.as_str()) || fields.without_effect.contains(&name.as_str()));
        if !is_known && !says_nothing(value) {
            bail!(
                "{}: field \"{name}\" is {}, which is not supported and may change what the adapter computes; expected null, false or no such field",
                config.file,
                shortened(value)
            );
        }
    }
    Ok(())
}

fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sentence(json: Value) -> Option<String> {
        check_peft(&Config::new(&json, "adapter_config.json")).err().map(|error| error.to_string())
    }

    #[test]
    fn unknown_fields_pass_where_they_say_nothing_and_are_named_where_they_say_something() {
        for empty in [json!(null), json!(false), json!(""), json!([]), json!({})] {
            assert_eq!(sentence(json!({ "peft_type": "LORA", "r": 2, "use_magic": empty })), None);
        }
        for full in [json!(true), json!(0), json!("x"), json!([1]), json!({ "a": 1 })] {
            for peft_type in ["LORA", "IA3", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "TRAINABLE_TOKENS"] {
                let found = sentence(json!({ "peft_type": peft_type, "use_magic": full })).expect("a refusal");
                assert!(found.contains("\"use_magic\"") && found.contains("not supported"), "{found}");
            }
        }
        assert!(sentence(json!({ "peft_type": "LORA", "task_type": "TOKEN_CLS" })).unwrap().contains("TOKEN_CLS"));
        let two = json!({ "peft_type": "PREFIX_TUNING", "num_transformer_submodules": 2 });
        assert!(sentence(two).unwrap().contains("num_transformer_submodules"));
    }

    /// Every field of PEFT 0.21.2's dataclasses with its default, as `to_dict` gives it.
    #[test]
    fn the_defaults_of_peft_pass() {
        let defaults: Value = serde_json::from_str(include_str!("../../tests/golden/peft_defaults.json")).unwrap();
        for (peft_type, config) in defaults.as_object().unwrap() {
            assert_eq!(sentence(config.clone()), None, "{peft_type}");
        }
    }
}
