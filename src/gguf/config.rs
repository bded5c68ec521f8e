//! From metadata to the `config.json` that `transformers` would have.
//!
//! llama.cpp computes some settings from others instead of storing them; where that is so, the rule is llama.cpp's
//! (`src/models/*.cpp`), and stands as a comment.

use serde_json::{Number, Value, json};

use super::container::Gguf;
use crate::bail;
use crate::error::Result;

/// The architectures that are read, by llama.cpp's names.
const KNOWN: &str =
    "known architectures are llama, qwen2, qwen3, gemma2, gemma3, phi3, olmo2, granite, smollm3, gpt2 and gptneox";

/// Tensors that are a part of the configuration: factors of rotary frequencies.
pub const OF_ROTATIONS: [&str; 3] = ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

/// Fields below the architecture's name that every architecture here has, read by [`Settings`] or without effect on the forward pass.
const COMMON: &[&str] = &[
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    // Whether the factor was found by training: a note.
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
];

/// The `config.json` of the model in the file.
///
/// # Errors
/// Where the architecture is not one that is read, a field is missing, or one changes the forward pass in a way that is not known.
pub(super) fn config(gguf: &Gguf) -> Result<Value> {
    let Some(architecture) = gguf.optional_text("general.architecture")? else {
        return Err(gguf.missing("general.architecture"));
    };
    match gguf.optional_text("general.type")? {
        None | Some("model") => {}
        Some(other) => bail!("{}: holds \"{other}\" (general.type), expected a model", gguf.path.display()),
    }
    let settings = Settings { gguf, architecture };
    let (mut config, own): (Value, &[&str]) = match architecture {
        "llama" => (settings.llama()?, &["attention.sliding_window"]),
        "qwen2" => (settings.llama_shape("qwen2")?, &[]),
        "qwen3" => (settings.llama_shape("qwen3")?, &[]),
        "gemma2" | "gemma3" => (
            settings.gemma()?,
            &["attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base_swa"],
        ),
        "phi3" => (settings.phi3()?, &["attention.sliding_window"]),
        "olmo2" => (settings.olmo2()?, &["attention.sliding_window"]),
        "granite" => (settings.granite()?, &["attention.scale", "embedding_scale", "residual_scale", "logit_scale"]),
        "smollm3" => (settings.smollm3()?, &[]),
        "gpt2" => (settings.gpt2()?, &[]),
        "gptneox" => (settings.gpt_neox()?, &["use_parallel_residual"]),
        other => bail!("{}: architecture \"{other}\" is not known; {KNOWN}", gguf.path.display()),
    };
    settings.refuse_unknown(own)?;
    // As which the model is written: what was quantised has no type of its own.
    config["dtype"] = "float32".into();
    Ok(config)
}

struct Settings<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Settings<'_> {
    fn name(&self, field: &str) -> String {
        format!("{}.{field}", self.architecture)
    }

    fn optional_size(&self, field: &str) -> Result<Option<u64>> {
        self.gguf.optional_u64(&self.name(field))
    }

    fn size(&self, field: &str) -> Result<u64> {
        self.optional_size(field)?.ok_or_else(|| self.gguf.missing(&self.name(field)))
    }

    fn number(&self, field: &str) -> Result<Option<Number>> {
        self.gguf.optional_number(&self.name(field))
    }

    fn has(&self, tensor: &str) -> bool {
        self.gguf.tensors.contains_key(tensor)
    }

    /// Refuses a field of the architecture that neither [`COMMON`] nor `own` holds, unless it is 0, false or empty.
    fn refuse_unknown(&self, own: &[&str]) -> Result<()> {
        use super::Value as Found;
        let start = format!("{}.", self.architecture);
        for (name, value) in &self.gguf.metadata {
            let Some(field) = name.strip_prefix(&start) else { continue };
            let is_off = match value {
                Found::Number(number) => number.as_f64() == Some(0.0),
                Found::Flag(flag) => !flag,
                Found::Text(text) => text.is_empty() || text == "none",
                Found::Numbers(numbers) => numbers.is_empty(),
                Found::Texts(texts) => texts.is_empty(),
            };
            if !is_off && !COMMON.contains(&field) && !own.contains(&field) {
                bail!(
                    "{}: field \"{name}\" is not known and may change what the model computes; convert the model to a Hugging Face folder instead",
                    self.gguf.path.display()
                );
            }
        }
        if self.gguf.optional_flag(&self.name("attention.causal"))? == Some(false) {
            bail!("{}: an encoder; encoders are read from Hugging Face folders", self.gguf.path.display());
        }
        Ok(())
    }

    /// The width of a head.
    fn head_dim(&self) -> Result<u64> {
        let heads = self.size("attention.head_count")?;
        let head_dim = match self.optional_size("attention.key_length")? {
            Some(head_dim) => head_dim,
            None => self.size("embedding_length")? / heads.max(1),
        };
        match self.optional_size("attention.value_length")? {
            Some(value) if value != head_dim => bail!(
                "{}: keys have {head_dim} numbers a head and values {value}; expected as many",
                self.gguf.path.display()
            ),
            _ => Ok(head_dim),
        }
    }

    /// The rows of the embedding, which count over the field.
    fn vocabulary(&self) -> Result<usize> {
        let table = self.gguf.tensors.get("token_embd.weight").and_then(|info| info.shape.first().copied());
        match table {
            Some(rows) => Ok(rows),
            None => {
                bail!("{}: tensor \"token_embd.weight\" is missing; the file holds no model", self.gguf.path.display())
            }
        }
    }

    /// What the families of Llama's shape share.
    fn llama_shape(&self, model_type: &str) -> Result<Value> {
        let heads = self.size("attention.head_count")?;
        let mut config = json!({
            "model_type": model_type,
            "hidden_size": self.size("embedding_length")?,
            "num_hidden_layers": self.size("block_count")?,
            "intermediate_size": self.size("feed_forward_length")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.optional_size("attention.head_count_kv")?.unwrap_or(heads),
            "max_position_embeddings": self.size("context_length")?,
            "vocab_size": self.vocabulary()?,
            "tie_word_embeddings": !self.has("output.weight"),
            "rope_theta": self.number("rope.freq_base")?.unwrap_or_else(|| 10_000.into()),
        });
        let head_dim = self.head_dim()?;
        match self.number("attention.layer_norm_rms_epsilon")? {
            Some(epsilon) => config["rms_norm_eps"] = epsilon.into(),
            None => return Err(self.gguf.missing(&self.name("attention.layer_norm_rms_epsilon"))),
        }
        if matches!(model_type, "llama" | "mistral" | "qwen3" | "gemma2" | "gemma3_text") {
            config["head_dim"] = head_dim.into();
        } else if head_dim * heads != self.size("embedding_length")? {
            bail!("{}: {heads} heads of {head_dim} do not make the embedding's width", self.gguf.path.display());
        }
        match self.optional_size("rope.dimension_count")? {
            Some(rotated) if rotated < head_dim => {
                config["partial_rotary_factor"] = json!(rotated as f64 / head_dim as f64)
            }
            _ => {}
        }
        if let Some(scaling) = self.rope_scaling()? {
            config["rope_scaling"] = scaling;
        }
        self.check_shared_bias(&mut config, "attention_bias", &["attn_q", "attn_k", "attn_v", "attn_output"])?;
        self.check_shared_bias(&mut config, "mlp_bias", &["ffn_gate", "ffn_up", "ffn_down"])?;
        Ok(config)
    }

    /// Sets a flag of `config.json` where these linears have biases. Qwen2's queries, keys and values have them without a flag.
    fn check_shared_bias(&self, config: &mut Value, flag: &str, linears: &[&str]) -> Result<()> {
        let count = linears.iter().filter(|name| self.has(&format!("blk.0.{name}.bias"))).count();
        match (self.architecture, count) {
            (_, 0) | ("qwen2", _) => {}
            (_, count) if count == linears.len() => config[flag] = true.into(),
            _ => bail!(
                "{}: only some of {} have biases, expected all or none",
                self.gguf.path.display(),
                linears.join(", ")
            ),
        }
        Ok(())
    }

    /// The scaling of rotary positions. Llama 3's is stored as one factor a frequency, which is what longrope has without its factor of attention.
    fn rope_scaling(&self) -> Result<Option<Value>> {
        let factor = self.number("rope.scaling.factor")?;
        let original = self.optional_size("rope.scaling.original_context_length")?;
        let attention = self.number("rope.scaling.attn_factor")?;
        let [freqs, long, short] = OF_ROTATIONS;
        if self.has(long) {
            let mut scaling = json!({
                "rope_type": "longrope",
                "long_factor": self.factors(long)?,
                "short_factor": self.factors(short)?,
            });
            original.inspect(|&original| scaling["original_max_position_embeddings"] = original.into());
            attention.inspect(|attention| scaling["attention_factor"] = attention.clone().into());
            return Ok(Some(scaling));
        }
        if self.has(freqs) {
            let factors = self.factors(freqs)?;
            return Ok(Some(json!({
                "rope_type": "longrope",
                "long_factor": factors,
                "short_factor": factors,
                "original_max_position_embeddings": self.size("context_length")?,
                "attention_factor": 1.0,
            })));
        }
        // With long factors it is the factor of attention; elsewhere llama.cpp multiplies what follows from the lengths with it.
        if let Some(other) = attention.filter(|attention| attention.as_f64() != Some(1.0)) {
            bail!(
                "{}: field \"{}\" is {other}, which is known with long factors alone; use the model's Hugging Face folder",
                self.gguf.path.display(),
                self.name("rope.scaling.attn_factor")
            );
        }
        let Some(factor) = factor else { return Ok(None) };
        let kind = self.gguf.optional_text(&self.name("rope.scaling.type"))?.unwrap_or("linear");
        let mut scaling = json!({ "rope_type": kind, "factor": factor });
        match kind {
            "none" => return Ok(None),
            "linear" => {}
            "yarn" => {
                original.inspect(|&original| scaling["original_max_position_embeddings"] = original.into());
                for (field, name) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                    if let Some(number) = self.number(&format!("rope.scaling.{field}"))? {
                        scaling[name] = number.into();
                    }
                }
            }
            other => bail!(
                "{}: rotary scaling \"{other}\" is not known; expected none, linear, yarn or longrope",
                self.gguf.path.display()
            ),
        }
        Ok(Some(scaling))
    }

    fn factors(&self, tensor: &str) -> Result<Vec<f32>> {
        match self.gguf.tensors.get(tensor) {
            Some(info) => self.gguf.numbers(tensor, info),
            None => bail!("{}: tensor \"{tensor}\" is missing; convert the model again", self.gguf.path.display()),
        }
    }

    fn llama(&self) -> Result<Value> {
        match self.optional_size("attention.sliding_window")? {
            Some(window) if window > 0 => {
                let mut config = self.llama_shape("mistral")?;
                config["sliding_window"] = window.into();
                Ok(config)
            }
            _ => self.llama_shape("llama"),
        }
    }

    fn gemma(&self) -> Result<Value> {
        let is_third = self.architecture == "gemma3";
        let mut config = self.llama_shape(if is_third { "gemma3_text" } else { "gemma2" })?;
        let (layers, heads) = (self.size("block_count")?, self.size("attention.head_count")?);
        // llama.cpp: the 27B models scale attention by the embedding's width over the heads, the others by a head's width.
        let is_27b = layers == if is_third { 62 } else { 46 };
        let scalar = if is_27b { self.size("embedding_length")? / heads.max(1) } else { self.head_dim()? };
        config["query_pre_attn_scalar"] = scalar.into();
        config["hidden_activation"] = "gelu_pytorch_tanh".into();
        if let Some(window) = self.optional_size("attention.sliding_window")? {
            config["sliding_window"] = window.into();
        }
        for field in ["attn_logit_softcapping", "final_logit_softcapping"] {
            let cap = self.number(field)?.filter(|cap| cap.as_f64() != Some(0.0));
            match (cap, is_third) {
                (Some(cap), _) => config[field] = cap.into(),
                (None, true) => config[field] = Value::Null,
                (None, false) => {}
            }
        }
        if is_third {
            // llama.cpp: layers with a window keep their own base, and every sixth layer has none.
            config["rope_local_base_freq"] = self.number("rope.freq_base_swa")?.unwrap_or_else(|| 10_000.into()).into();
            config["sliding_window_pattern"] = 6.into();
        }
        Ok(config)
    }

    fn phi3(&self) -> Result<Value> {
        let mut config = self.llama_shape("phi3")?;
        if let Some(original) = self.optional_size("rope.scaling.original_context_length")? {
            config["original_max_position_embeddings"] = original.into();
        }
        if let Some(window) = self.optional_size("attention.sliding_window")?.filter(|&window| window > 0) {
            config["sliding_window"] = window.into();
        }
        Ok(config)
    }

    fn olmo2(&self) -> Result<Value> {
        match self.optional_size("attention.sliding_window")? {
            // llama.cpp: OLMo 3 is OLMo 2 with windows, of which every fourth layer has none.
            Some(window) if window > 0 => {
                let mut config = self.llama_shape("olmo3")?;
                config["sliding_window"] = window.into();
                Ok(config)
            }
            _ => self.llama_shape("olmo2"),
        }
    }

    fn granite(&self) -> Result<Value> {
        let mut config = self.llama_shape("granite")?;
        for (field, name) in [
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ] {
            if let Some(number) = self.number(field)? {
                config[name] = number.into();
            }
        }
        Ok(config)
    }

    fn smollm3(&self) -> Result<Value> {
        let mut config = self.llama_shape("smollm3")?;
        // llama.cpp: every fourth layer is without rotary positions.
        config["no_rope_layer_interval"] = 4.into();
        let layers = self.size("block_count")?.min(1 << 12);
        config["no_rope_layers"] = (1..=layers).map(|layer| u8::from(!layer.is_multiple_of(4))).collect();
        config["use_sliding_window"] = false.into();
        Ok(config)
    }

    fn gpt2(&self) -> Result<Value> {
        let width = self.size("embedding_length")?;
        let mut config = json!({
            "model_type": "gpt2",
            "n_embd": width,
            "n_layer": self.size("block_count")?,
            "n_head": self.size("attention.head_count")?,
            "n_inner": self.optional_size("feed_forward_length")?.unwrap_or(4 * width),
            "n_positions": self.size("context_length")?,
            "vocab_size": self.vocabulary()?,
            "tie_word_embeddings": !self.has("output.weight"),
        });
        self.set_epsilon(&mut config, "layer_norm_epsilon")?;
        Ok(config)
    }

    fn gpt_neox(&self) -> Result<Value> {
        let head_dim = self.head_dim()?;
        let rotated = self.optional_size("rope.dimension_count")?.unwrap_or(head_dim);
        let mut config = json!({
            "model_type": "gpt_neox",
            "hidden_size": self.size("embedding_length")?,
            "num_hidden_layers": self.size("block_count")?,
            "num_attention_heads": self.size("attention.head_count")?,
            "intermediate_size": self.size("feed_forward_length")?,
            "max_position_embeddings": self.size("context_length")?,
            "vocab_size": self.vocabulary()?,
            "rotary_pct": rotated as f64 / head_dim.max(1) as f64,
            "rotary_emb_base": self.number("rope.freq_base")?.unwrap_or_else(|| 10_000.into()),
            "use_parallel_residual": self.gguf.optional_flag(&self.name("use_parallel_residual"))?.unwrap_or(true),
            "tie_word_embeddings": !self.has("output.weight"),
        });
        self.set_epsilon(&mut config, "layer_norm_eps")?;
        Ok(config)
    }

    fn set_epsilon(&self, config: &mut Value, name: &str) -> Result<()> {
        match self.number("attention.layer_norm_epsilon")? {
            Some(epsilon) => config[name] = epsilon.into(),
            None => return Err(self.gguf.missing(&self.name("attention.layer_norm_epsilon"))),
        }
        Ok(())
    }
}
