use serde_json::{Value, json};

use super::*;
use crate::model::architecture::{Architecture, Positions, Rotary};
use crate::model::rotary::{Frequencies, frequencies};

fn read(config: &Value) -> Result<Architecture> {
    let config = text_part(config.clone(), "config.json")?;
    architecture(&Config::new(&config, "config.json"))
}

fn refusal(config: &Value) -> String {
    read(config).map(drop).expect_err(&config.to_string()).to_string()
}

/// A small decoder of a family, with other fields.
fn decoder(family: &str, fields: Value) -> Value {
    let base = json!({"model_type": family, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64});
    with(base, fields)
}

fn with(mut base: Value, fields: Value) -> Value {
    base.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    base
}

fn rotations(config: &Value) -> Rotary {
    match read(config).unwrap().positions {
        Positions::Rotary(rotary) => rotary,
        Positions::Learned => panic!("{config} rotates"),
    }
}

fn fixed(config: &Value) -> Vec<f32> {
    match &rotations(config).forms[0].frequencies {
        Frequencies::Fixed(frequencies) => frequencies.clone(),
        other => panic!("{other:?}"),
    }
}

/// `config.json` files of published models, as their makers wrote them.
fn published() -> Vec<Value> {
    let tokens = json!({"bos_token_id": 1, "eos_token_id": [1, 106], "pad_token_id": 0, "torch_dtype": "bfloat16", "transformers_version": "4.50.0",
        "use_cache": true, "attention_dropout": 0.0, "initializer_range": 0.02, "_name_or_path": "x"});
    let models = [
        // Llama 3.2 1B; SmolLM2; a quantizing and fine-tuning tool's copy.
        json!({"architectures": ["LlamaForCausalLM"], "attention_bias": false, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
            "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": {"factor": 32.0,
            "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500000.0, "tie_word_embeddings": true, "vocab_size": 128256}),
        json!({"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": true,
            "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
            "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
            "tie_word_embeddings": true, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "vocab_size": 49152,
            "unsloth_fixed": true, "unsloth_version": "2025.1"}),
        json!({"architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false, "vocab_size": 32000}),
        json!({"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
            "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
            "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}),
        json!({"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
            "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
            "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 1000000,
            "sliding_window": null, "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936}),
        json!({"architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
            "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "sliding_window": 4096, "sliding_window_size": 4096, "vocab_size": 256000}),
        json!({"architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attn_logit_softcapping": null, "cache_implementation": "hybrid",
            "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
            "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
            "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000,
            "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144}),
        json!({"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
            "image_token_index": 262144, "mm_tokens_per_image": 256, "model_type": "gemma3", "text_config": {"hidden_size": 2560,
            "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0,
            "rope_type": "linear"}, "sliding_window": 1024}, "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"}}),
        json!({"architectures": ["SmolLM3ForCausalLM"], "attention_bias": false, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 11008, "layer_types": vec!["full_attention"; 36], "max_position_embeddings": 65536, "max_window_layers": 28,
            "mlp_bias": false, "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": vec![1; 36], "num_attention_heads": 16,
            "num_hidden_layers": 36, "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": null,
            "rope_theta": 5000000.0, "sliding_window": null, "use_sliding_window": false, "vocab_size": 128256}),
        json!({"architectures": ["Olmo2ForCausalLM"], "attention_bias": false, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 16, "num_hidden_layers": 16,
            "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 500000, "tie_word_embeddings": false,
            "vocab_size": 100352}),
        json!({"architectures": ["Olmo3ForCausalLM"], "attention_bias": false, "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 11008, "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 65536,
            "model_type": "olmo3", "num_attention_heads": 32, "num_hidden_layers": 2, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
            "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
            "original_max_position_embeddings": 8192, "rope_type": "yarn"}, "rope_theta": 500000, "sliding_window": 4096,
            "tie_word_embeddings": false, "vocab_size": 100278}),
        json!({"architectures": ["Phi3ForCausalLM"], "attention_bias": false, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
            "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
            "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 10000.0,
            "sliding_window": 2047, "tie_word_embeddings": false, "vocab_size": 32064}),
        json!({"architectures": ["Phi3ForCausalLM"], "attention_bias": false, "embd_pdrop": 0.0, "full_attn_mod": 1, "hidden_act": "silu",
            "hidden_size": 3072, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": false, "max_position_embeddings": 131072,
            "mlp_bias": false, "model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5,
            "rope_scaling": {"long_factor": vec![1.5; 48], "short_factor": vec![1.0; 48], "type": "longrope"}, "rope_theta": 10000.0,
            "sliding_window": 262144, "tie_word_embeddings": true, "vocab_size": 200064}),
        json!({"architectures": ["GraniteForCausalLM"], "attention_bias": false, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
            "mlp_bias": false, "model_type": "granite", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 10000000.0, "tie_word_embeddings": true,
            "vocab_size": 49159}),
        json!({"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
            "layer_norm_epsilon": 1e-5, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
            "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
            "summary_type": "cls_index", "summary_use_proj": true, "task_specific_params": {"text-generation": {"max_length": 50}},
            "_num_labels": 1, "vocab_size": 50257}),
        json!({"architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "hidden_size": 512, "intermediate_size": 2048,
            "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
            "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false, "use_parallel_residual": true, "vocab_size": 50304}),
        json!({"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "directionality": "bidi", "gradient_checkpointing": false,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pooler_fc_size": 768,
            "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "pooler_type": "first_token_transform",
            "position_embedding_type": "absolute", "type_vocab_size": 2, "vocab_size": 119547}),
        json!({"architectures": ["XLMRobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
            "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-5, "max_position_embeddings": 514, "model_type": "xlm-roberta",
            "num_attention_heads": 12, "num_hidden_layers": 12, "output_past": true, "position_embedding_type": "absolute", "type_vocab_size": 1,
            "vocab_size": 250002}),
        json!({"architectures": ["ModernBertForMaskedLM"], "attention_bias": false, "classifier_activation": "gelu", "classifier_bias": false,
            "classifier_dropout": 0.0, "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": true,
            "deterministic_flash_attn": false, "embedding_dropout": 0.0, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
            "gradient_checkpointing": false, "hidden_activation": "gelu", "hidden_size": 768, "initializer_cutoff_factor": 2.0,
            "intermediate_size": 1152, "layer_norm_eps": 1e-5, "local_attention": 128, "local_rope_theta": 10000.0,
            "max_position_embeddings": 8192, "mlp_bias": false, "mlp_dropout": 0.0, "model_type": "modernbert", "norm_bias": false,
            "norm_eps": 1e-5, "num_attention_heads": 12, "num_hidden_layers": 22, "position_embedding_type": "absolute",
            "reference_compile": true, "repad_logits_with_grad": false, "sep_token_id": 50282, "sparse_pred_ignore_index": -100,
            "sparse_prediction": false, "vocab_size": 50368}),
    ];
    models.into_iter().map(|model| with(model, tokens.clone())).collect()
}

#[test]
fn published_models_are_read_and_a_field_that_none_knows_is_refused_by_its_name() {
    for config in published() {
        let architecture = read(&config).unwrap_or_else(|error| panic!("{}: {error}", config["model_type"]));
        assert_eq!(architecture.windows.len(), architecture.layers, "{config}");
        let refused = refusal(&with(config.clone(), json!({"attention_temperature": 0.7})));
        assert!(refused.contains("field \"attention_temperature\" is 0.7"), "{refused}");
        let quantized =
            with(config, json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}));
        assert!(refusal(&quantized).contains("quantization_config"), "{}", refusal(&quantized));
    }
}

#[test]
fn a_family_that_is_not_there_is_refused_with_those_that_are() {
    let refused = refusal(&json!({"model_type": "falcon"}));
    for known in ["falcon", "llama", "gemma3_text", "smollm3", "olmo3", "phi3", "granite", "modernbert"] {
        assert!(refused.contains(known), "{refused}");
    }
}

#[test]
fn rope_scaling_counts_whole_over_rope_parameters() {
    let both = json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 100.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}});
    let quarter: Vec<f32> = frequencies(100.0, 8).iter().map(|frequency| frequency / 4.0).collect();
    assert_eq!(fixed(&decoder("llama", both)), quarter);
    let empty = json!({"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}});
    assert_eq!(fixed(&decoder("llama", empty)), frequencies(7.0, 8));
    // By kinds of layers it counts field by field, and of full layers alone.
    let kinds = json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 100.0, "rope_local_base_freq": 5.0});
    let rotary = rotations(&decoder(
        "gemma3_text",
        with(kinds, json!({"head_dim": 8, "layer_types": ["full_attention", "sliding_attention"]})),
    ));
    assert_eq!(rotary.of_layer, [Some(0), Some(1)]);
    assert_eq!(rotary.forms[0].frequencies, Frequencies::Fixed(quarter));
    assert_eq!(rotary.forms[1].frequencies, Frequencies::Fixed(frequencies(5.0, 8)));
}

#[test]
fn the_original_length_is_that_of_the_file_of_the_description_or_the_longest() {
    let scaling = |original: Value| {
        with(json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}), original)
    };
    let of = |scaling: Value, fields: Value| fixed(&decoder("llama", with(json!({"rope_scaling": scaling}), fields)));
    let (named, none) = (json!({"original_max_position_embeddings": 16}), json!({}));
    let by_description = of(scaling(named.clone()), none.clone());
    assert_eq!(of(scaling(none.clone()), with(none.clone(), json!({"max_position_embeddings": 16}))), by_description);
    assert_eq!(of(scaling(json!({"original_max_position_embeddings": 50})), named), by_description);
    assert_ne!(of(scaling(none.clone()), none), by_description);
}

#[test]
fn rotations_that_cannot_be_computed_are_refused_by_field_and_value() {
    for (family, fields, part) in [
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "mrope", "mrope_section": [1, 1, 2]}}),
            "rope_type is \"mrope\"",
        ),
        ("llama", json!({"rope_scaling": {"rope_type": "linear"}}), "field \"factor\" is missing"),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}),
            "field \"beta_fast\" is 3",
        ),
        ("llama", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
            "partial_rotary_factor",
        ),
        ("llama", json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "field \"full_attention\""),
        ("llama", json!({"rope_scaling": "linear"}), "expected an object"),
        ("gemma3_text", json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}), "field \"rope_type\""),
        ("phi3", json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}), "default and longrope"),
        (
            "phi3",
            json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}),
            "list of 4 numbers",
        ),
        ("gpt_neox", json!({"rotary_pct": 1.5}), "expected a number from 0 to 1"),
        ("qwen2", json!({"layer_types": ["sliding_attention", "full_attention"]}), "layer_types"),
        ("mistral", json!({"layer_types": ["full_attention", "full_attention"], "sliding_window": 4}), "layer_types"),
        ("gemma3_text", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
        ("smollm3", json!({"no_rope_layers": [1]}), "no_rope_layers"),
    ] {
        let refused = refusal(&decoder(family, fields));
        assert!(refused.starts_with("config.json") && refused.contains(part), "{part}: {refused}");
    }
}

#[test]
fn absent_fields_are_what_transformers_takes_them_for() {
    let windows = |family: &str, fields: Value| read(&decoder(family, fields)).unwrap().windows;
    assert_eq!(windows("mistral", json!({})), [Some(4096); 2]);
    assert_eq!(windows("mistral", json!({"sliding_window": null})), [None; 2]);
    assert_eq!(windows("qwen2", json!({"use_sliding_window": true, "max_window_layers": 1})), [None, Some(4096)]);
    assert_eq!(windows("olmo3", json!({"sliding_window": 8})), [Some(8); 2]);
    let theta = |family: &str| fixed(&decoder(family, json!({})));
    assert_eq!(theta("llama"), frequencies(10_000.0, 8));
    assert_eq!(theta("smollm3"), frequencies(2_000_000.0, 8));
    let scale = |scaled: bool| {
        let config = json!({"model_type": "gpt2", "vocab_size": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8,
            "scale_attn_weights": scaled});
        read(&config).unwrap().attention_scale
    };
    assert_eq!((scale(true), scale(false)), (0.5, 1.0));
}

#[test]
fn positions_of_roberta_are_counted_from_its_padding() {
    let encoder = |family: &str, fields: Value| {
        let base = json!({"model_type": family, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "max_position_embeddings": 64});
        with(base, fields)
    };
    for family in ["roberta", "xlm-roberta"] {
        assert_eq!(default_pad_token_id(family), Some(1));
        for (fields, offset) in [(json!({}), 2), (json!({"pad_token_id": 0}), 1), (json!({"pad_token_id": 5}), 6)] {
            let architecture = read(&encoder(family, fields)).unwrap();
            assert!(architecture.position_offset == offset && architecture.positions_follow_padding());
        }
        let sentence = refusal(&encoder(family, json!({"pad_token_id": null})));
        assert!(sentence.contains("\"pad_token_id\" is null"), "{sentence}");
    }
    for pad in [json!(0), json!(null)] {
        assert!(!read(&encoder("bert", json!({"pad_token_id": pad}))).unwrap().positions_follow_padding());
    }
}
