//! An oracle without files: the models of `candle-transformers` over the same random weights, at sizes and settings that proptest draws.
//!
//! The weights go through `model.safetensors` as we write it. Where candle's model lacks something or differs from `transformers`, the range that
//! is drawn says so. The golden files cover what is left out here.

use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::smol::smollm3;
use candle_transformers::models::{bert, gemma2, gemma3, granite, llama, mistral, modernbert, olmo2, phi3};
use candle_transformers::models::{qwen2, qwen3, xlm_roberta};
use proptest::prelude::*;
use rlhf::Result;
use rlhf::adapt::Head;
use rlhf::data::batch::{Batch, Continuation, TokenTree};
use rlhf::model::Model;
use rlhf::model::adapter::{Parameter, Pass};
use rlhf::random;
use serde_json::{Value, json};

use crate::oracle::{assert_close, load};

const VOCABULARY: usize = 61;

/// Sizes and settings of a model, and what it reads.
#[derive(Debug, Clone)]
struct Drawn {
    /// Width of a head, even.
    head_dim: usize,
    heads: usize,
    kv_heads: usize,
    /// `hidden_size` over `num_attention_heads`, where a head's width does not follow from it.
    width: usize,
    d_ff: usize,
    layers: usize,
    tied: bool,
    biased: bool,
    theta: f64,
    window: Option<usize>,
    length: usize,
    seed: u64,
}

prop_compose! {
    fn drawn()(
        (half, groups, kv_heads, width) in (1..6_usize, 1..4_usize, 1..4_usize, 4..9_usize),
        (d_ff, layers, tied, biased) in (1..40_usize, 1..4_usize, any::<bool>(), any::<bool>()),
        (theta, window) in (prop::sample::select(vec![3.0, 100.0, 10_000.0, 1_000_000.0]), prop::option::of(1..12_usize)),
        (length, seed) in (2..24_usize, any::<u64>()),
    ) -> Drawn {
        let heads = groups * kv_heads;
        // At least four numbers a token: a norm of one gives its sign, and no two implementations need agree
        // on that of a sum near zero.
        let half = if heads == 1 { half.max(2) } else { half };
        Drawn { head_dim: 2 * half, heads, kv_heads, width, d_ff, layers, tied, biased, theta, window, length, seed }
    }
}

impl Drawn {
    /// A decoder's `config.json`; `free` says that a head's width does not follow from `hidden_size`.
    fn config(&self, family: &str, free: bool) -> Value {
        let d_model = self.heads * if free { self.width } else { self.head_dim };
        let mut config = json!({
            "model_type": family, "vocab_size": VOCABULARY, "hidden_size": d_model, "intermediate_size": self.d_ff,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 32, "rms_norm_eps": 1e-3, "rope_theta": self.theta, "hidden_act": "silu",
            "tie_word_embeddings": self.tied, "initializer_range": 0.3,
        });
        if free {
            config["head_dim"] = json!(self.head_dim);
        }
        config
    }

    fn tokens(&self) -> Vec<u32> {
        let mut stream = random::stream(self.seed, "tokens", 0);
        // 0 and 1 are padding somewhere.
        (0..self.length).map(|_| 2 + rand::Rng::random_range(&mut stream, 0..VOCABULARY as u32 - 2)).collect()
    }

    /// The window by which candle's models say the same: they see one token more than `transformers` says.
    fn candle_window(&self) -> Option<usize> {
        self.window.map(|window| window - 1)
    }
}

/// `base` with other fields.
fn with(mut base: Value, fields: Value) -> Value {
    let fields = fields.as_object().expect("an object").clone();
    base.as_object_mut().expect("an object").extend(fields);
    base
}

/// candle's form of a configuration.
fn parsed<C: serde::de::DeserializeOwned>(config: Value) -> C {
    serde_json::from_value(config).expect("a configuration of candle's")
}

/// Our model of this `config.json`, no number of which is left at 0 or 1, and its tensors as they are on disk.
fn random_model(config: &Value, head: Head, seed: u64) -> Result<(Model, VarBuilder<'static>)> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("the folder can be written to");
    let model = load(folder.path(), Some(&["--method", "full"]), head)?;
    for (index, Parameter { variable, .. }) in model.trainable_parameters().into_iter().enumerate() {
        let mut stream = random::stream(seed, "weights", index as u64);
        let noise = random::normal(&mut stream, variable.dims(), 0.3, &Device::Cpu)?;
        variable.set(&(variable.as_tensor() + noise)?)?;
    }
    model.save(folder.path())?;
    let tensors = candle_core::safetensors::load(folder.path().join("model.safetensors"), &Device::Cpu)?;
    Ok((model, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)))
}

fn alone(tokens: &[u32]) -> Batch {
    let answer = Continuation { tokens: tokens.to_vec(), learned: vec![true; tokens.len()] };
    Batch::pack([&TokenTree { prompt: Vec::new(), answers: vec![answer] }])
}

/// Compares the logits at the last token of the whole text and of its first half; `oracle` gives candle's.
fn compare(
    drawn: &Drawn,
    config: &Value,
    oracle: impl Fn(VarBuilder, &Tensor) -> candle_core::Result<Tensor>,
) -> Result<()> {
    let (model, tensors) = random_model(config, Head::Language, drawn.seed)?;
    let tokens = drawn.tokens();
    for length in [tokens.len(), tokens.len().div_ceil(2)] {
        let batch = alone(&tokens[..length]);
        let hidden = model.hidden(&batch, &Pass::default())?;
        let found = model.logits(&hidden, &[length as u32 - 1], &[])?.flatten_all()?.to_vec1()?;
        let input = Tensor::new(&tokens[..length], &Device::Cpu)?.unsqueeze(0)?;
        let wanted: Vec<f32> = oracle(tensors.clone(), &input)?.flatten_all()?.to_vec1()?;
        assert_close(&format!("{config} at {length}"), &found, &wanted, 1e-4);
    }
    Ok(())
}

/// Compares the hidden states of an encoder.
fn compare_hidden(
    drawn: &Drawn,
    config: &Value,
    oracle: impl Fn(VarBuilder, &Tensor) -> candle_core::Result<Tensor>,
) -> Result<()> {
    let (model, tensors) = random_model(config, Head::AsFound, drawn.seed)?;
    let tokens = drawn.tokens();
    let found = model.hidden(&alone(&tokens), &Pass::default())?.tensor().flatten_all()?.to_vec1()?;
    let input = Tensor::new(&tokens[..], &Device::Cpu)?.unsqueeze(0)?;
    let wanted: Vec<f32> = oracle(tensors, &input)?.flatten_all()?.to_vec1()?;
    assert_close(&config.to_string(), &found, &wanted, 1e-4);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// candle's Llama knows Llama 3's scaling and no biases.
    #[test]
    fn llama_equals_candles(drawn in drawn(), scaled in any::<bool>()) {
        let scaling = json!({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
            "original_max_position_embeddings": 12});
        let config = with(drawn.config("llama", false), json!({"rope_scaling": if scaled { scaling } else { Value::Null }}));
        compare(&drawn, &config, |weights, tokens| {
            let config = parsed::<llama::LlamaConfig>(config.clone()).into_config(false);
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
            llama::Llama::load(weights, &config)?.forward(tokens, 0, &mut cache)
        }).unwrap();
    }

    /// candle's Mistral has an output matrix of its own always.
    #[test]
    fn mistral_equals_candles(drawn in drawn()) {
        let drawn = Drawn { tied: false, ..drawn };
        let config = with(drawn.config("mistral", true), json!({"sliding_window": drawn.window}));
        compare(&drawn, &config, |weights, tokens| {
            let config = with(config.clone(), json!({"sliding_window": drawn.candle_window(), "use_flash_attn": false}));
            mistral::Model::new(&parsed(config), weights)?.forward(tokens, 0)
        }).unwrap();
    }

    /// candle's Qwen2 has its window in every layer, whatever `use_sliding_window` says.
    #[test]
    fn qwen2_equals_candles(drawn in drawn()) {
        let window = json!({"use_sliding_window": drawn.window.is_some(), "sliding_window": drawn.window, "max_window_layers": 0});
        let config = with(drawn.config("qwen2", false), window);
        compare(&drawn, &config, |weights, tokens| {
            let config = with(config.clone(), json!({"sliding_window": drawn.candle_window().unwrap_or(32)}));
            qwen2::ModelForCausalLM::new(&parsed(config), weights)?.forward(tokens, 0)
        }).unwrap();
    }

    /// candle's Qwen3 reads no window, and its biases are without that of the output.
    #[test]
    fn qwen3_equals_candles(drawn in drawn()) {
        let config = with(drawn.config("qwen3", true), json!({"attention_bias": false}));
        compare(&drawn, &config, |weights, tokens| {
            let config = with(config.clone(), json!({"sliding_window": null, "max_window_layers": 0, "use_sliding_window": false}));
            qwen3::ModelForCausalLM::new(&parsed(config), weights)?.forward(tokens, 0)
        }).unwrap();
    }

    /// candle's Gemma 2 has its window in every layer, ours as `layer_types` says, and scales scores by the width of a head.
    #[test]
    fn gemma2_equals_candles(drawn in drawn(), caps in prop::option::of((1.0..9.0_f64, 1.0..9.0_f64))) {
        let drawn = Drawn { tied: true, ..drawn };
        let fields = json!({
            "hidden_activation": "gelu_pytorch_tanh", "attention_bias": drawn.biased, "sliding_window": drawn.window,
            "layer_types": vec!["sliding_attention"; drawn.layers], "query_pre_attn_scalar": drawn.head_dim,
            "attn_logit_softcapping": caps.map(|caps| caps.0), "final_logit_softcapping": caps.map(|caps| caps.1),
        });
        let config = with(drawn.config("gemma2", true), fields);
        compare(&drawn, &config, |weights, tokens| {
            let config = with(config.clone(), json!({"sliding_window": drawn.candle_window()}));
            gemma2::Model::new(false, &parsed(config), weights)?.forward(tokens, 0)
        }).unwrap();
    }

    /// candle's Gemma 3 keeps keys of a single head only on the CPU (its cache refuses others), and scales scores by the width of a head.
    #[test]
    fn gemma3_equals_candles(drawn in drawn(), cap in prop::option::of(1.0..9.0_f64), pattern in 1..4_usize, local in 2.0..900.0_f64) {
        let drawn = Drawn { tied: true, kv_heads: 1, window: Some(drawn.window.unwrap_or(30)), ..drawn };
        let fields = json!({
            "hidden_activation": "gelu_pytorch_tanh", "attention_bias": drawn.biased, "sliding_window": drawn.window,
            "sliding_window_pattern": pattern, "query_pre_attn_scalar": drawn.head_dim, "final_logit_softcapping": cap,
            "rope_local_base_freq": local,
        });
        let config = with(drawn.config("gemma3_text", true), fields);
        compare(&drawn, &config, |weights, tokens| {
            let config = with(config.clone(), json!({"sliding_window": drawn.candle_window(), "attn_logit_softcapping": null}));
            gemma3::Model::new(false, &parsed(config), weights)?.forward(tokens, 0)
        }).unwrap();
    }

    #[test]
    fn olmo2_equals_candles(drawn in drawn()) {
        let config = with(drawn.config("olmo2", false), json!({"attention_bias": drawn.biased}));
        compare(&drawn, &config, |weights, tokens| olmo2::Model::new(&parsed(config.clone()), weights)?.forward(tokens, 0)).unwrap();
    }

    /// candle's LongRoPE multiplies where the paper divides, and mixes both lists in one sequence: it is left out, and so are windows.
    #[test]
    fn phi3_equals_candles(drawn in drawn(), pairs in 1..6_usize) {
        let rotated = (2 * pairs).min(drawn.head_dim);
        let share = rotated as f64 / drawn.head_dim as f64;
        let config = with(drawn.config("phi3", false), json!({"partial_rotary_factor": share}));
        compare(&drawn, &config, |weights, tokens| phi3::Model::new(&parsed(config.clone()), weights)?.forward(tokens, 0)).unwrap();
    }

    /// candle's Granite has none of its multipliers, no biases and an output matrix of its own.
    #[test]
    fn granite_equals_candles(drawn in drawn()) {
        let drawn = Drawn { tied: false, ..drawn };
        let scale = 1.0 / (drawn.head_dim as f64).sqrt();
        let config = with(drawn.config("granite", false), json!({"attention_multiplier": scale}));
        compare(&drawn, &config, |weights, tokens| {
            let config = parsed::<granite::GraniteConfig>(config.clone()).into_config(false);
            let mut cache = granite::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
            granite::Granite::load(weights, &config)?.forward(tokens, 0, &mut cache)
        }).unwrap();
    }

    /// candle's SmolLM3 reads no window.
    #[test]
    fn smollm3_equals_candles(drawn in drawn(), interval in 1..5_usize, mlp_bias in any::<bool>(), listed in any::<bool>()) {
        let layers = if listed { json!((0..drawn.layers).map(|layer| layer % 2).collect::<Vec<_>>()) } else { Value::Null };
        let fields = json!({"attention_bias": drawn.biased, "mlp_bias": mlp_bias, "no_rope_layer_interval": interval, "no_rope_layers": layers});
        let config = with(drawn.config("smollm3", false), fields);
        compare(&drawn, &config, |weights, tokens| {
            smollm3::ModelForCausalLM::new(&parsed(config.clone()), weights)?.forward(tokens, 0)
        }).unwrap();
    }

    #[test]
    fn bert_and_xlm_roberta_equal_candles(drawn in drawn(), multilingual in any::<bool>()) {
        let config = json!({
            "model_type": if multilingual { "xlm-roberta" } else { "bert" }, "vocab_size": VOCABULARY,
            "hidden_size": drawn.heads * drawn.head_dim, "intermediate_size": drawn.d_ff, "num_hidden_layers": drawn.layers,
            "num_attention_heads": drawn.heads, "max_position_embeddings": 32, "layer_norm_eps": 1e-3, "hidden_act": "gelu",
            "type_vocab_size": 2, "pad_token_id": usize::from(multilingual), "initializer_range": 0.3, "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1, "position_embedding_type": "absolute",
        });
        compare_hidden(&drawn, &config, |weights, tokens| {
            let (types, mask) = (tokens.zeros_like()?, tokens.ones_like()?);
            match multilingual {
                true => xlm_roberta::XLMRobertaModel::new(&parsed(config.clone()), weights.pp("roberta"))?
                    .forward(tokens, &mask, &types, None, None, None),
                false => bert::BertModel::load(weights, &parsed(config.clone()))?.forward(tokens, &types, None),
            }
        }).unwrap();
    }

    /// candle's ModernBERT has no biases; its classifier gives probabilities.
    #[test]
    fn modernbert_equals_candles(drawn in drawn(), every in 1..4_usize, local in 2.0..900.0_f64, mean in any::<bool>()) {
        let config = json!({
            "model_type": "modernbert", "vocab_size": VOCABULARY, "hidden_size": drawn.heads * drawn.head_dim,
            "intermediate_size": drawn.d_ff, "num_hidden_layers": drawn.layers, "num_attention_heads": drawn.heads,
            "max_position_embeddings": 32, "norm_eps": 1e-3, "layer_norm_eps": 1e-3, "pad_token_id": 0, "initializer_range": 0.3,
            "global_attn_every_n_layers": every, "global_rope_theta": drawn.theta, "local_rope_theta": local,
            "local_attention": 2 * drawn.window.unwrap_or(30), "classifier_pooling": if mean { "mean" } else { "cls" },
        });
        modernbert_equals(&drawn, &config).unwrap();
    }
}

fn modernbert_equals(drawn: &Drawn, config: &Value) -> Result<()> {
    let labels = ["a", "b", "c"].map(String::from);
    let (model, tensors) = random_model(config, Head::Classes(&labels), drawn.seed)?;
    let tokens = drawn.tokens();
    let answer = Continuation { tokens: tokens.clone(), learned: vec![false; tokens.len()] };
    let batch = model.pack([&TokenTree { prompt: Vec::new(), answers: vec![answer] }]);
    let hidden = model.hidden(&batch, &Pass::default())?;
    let found = candle_nn::ops::softmax(model.classes(&hidden, &batch)?.tensor(), 1)?;
    let ids = json!({"0": "a", "1": "b", "2": "c"});
    let config = with(config.clone(), json!({"id2label": ids, "label2id": {"a": "0", "b": "1", "c": "2"}}));
    let input = Tensor::new(&tokens[..], &Device::Cpu)?.unsqueeze(0)?;
    let oracle = modernbert::ModernBertForSequenceClassification::load(tensors, &parsed(config.clone()))?;
    let wanted = oracle.forward(&input, &input.ones_like()?)?.i(0)?;
    assert_close(&config.to_string(), &found.flatten_all()?.to_vec1()?, &wanted.to_vec1()?, 1e-4);
    Ok(())
}
