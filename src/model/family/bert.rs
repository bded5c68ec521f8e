//! BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2020): encoders with learned positions and norms after the sub-layers.

use serde_json::Value;

use crate::bail;
use crate::error::Result;
use crate::model::architecture::{
    Architecture, AttentionInput, BlockForm, Config, FeedForward, HeadForm, HeadHidden, LinearName, NormKind, Pooling,
    Positions, TensorNames,
};
use crate::ops::Activation;

/// BERT's classifier reads the pooler, which is a part of the pretrained model.
const BERT_HEAD: HeadForm = head("bert.pooler.dense", "classifier");

/// RoBERTa's has a hidden layer of its own.
const ROBERTA_HEAD: HeadForm = head("classifier.dense", "classifier.out_proj");

const fn head(name: &'static str, out: &'static str) -> HeadForm {
    let hidden = HeadHidden { name, bias: true, activation: Activation::Tanh, norm: None };
    HeadForm { pooling: Pooling::First, hidden: Some(hidden), out, out_bias: true }
}

/// Module and tensor of the matrix of masked language modelling, which nothing here reads but as the embeddings that it is tied to.
const BERT_OUTPUT: [&str; 2] = ["cls.predictions.decoder", "cls.predictions.decoder.weight"];
const ROBERTA_OUTPUT: [&str; 2] = ["lm_head.decoder", "lm_head.decoder.weight"];

pub(super) fn bert(config: &Config) -> Result<Architecture> {
    encoder(config, ("BertModel", "BertForSequenceClassification"), names("bert.", BERT_OUTPUT, BERT_HEAD), 0)
}

pub(super) fn roberta(config: &Config) -> Result<Architecture> {
    like_roberta(config, ("RobertaModel", "RobertaForSequenceClassification"))
}

/// XLM-RoBERTa is RoBERTa over many languages: another vocabulary and other names of the classes.
pub(super) fn xlm_roberta(config: &Config) -> Result<Architecture> {
    like_roberta(config, ("XLMRobertaModel", "XLMRobertaForSequenceClassification"))
}

/// `pad_token_id` of RoBERTa where the file has none.
pub(super) const ROBERTA_PADDING: u32 = 1;

/// Positions are counted from the one after padding's.
fn like_roberta(config: &Config, classes: (&'static str, &'static str)) -> Result<Architecture> {
    let padding = match config.raw("pad_token_id") {
        None => ROBERTA_PADDING as usize,
        Some(padding) if padding.as_u64() == Some(0) => 0,
        Some(Value::Null) => bail!(
            "{}: field \"pad_token_id\" is null, after which positions cannot be counted; give the one that the model was trained with ({ROBERTA_PADDING} \
             if nothing else is known)",
            config.file
        ),
        Some(_) => config.size("pad_token_id")?,
    };
    encoder(config, classes, names("roberta.", ROBERTA_OUTPUT, ROBERTA_HEAD), padding + 1)
}

fn encoder(
    config: &Config,
    classes: (&'static str, &'static str),
    names: TensorNames,
    position_offset: usize,
) -> Result<Architecture> {
    let d_model = config.size("hidden_size")?;
    let layers = config.layers("num_hidden_layers")?;
    let heads = config.size("num_attention_heads")?;
    if !d_model.is_multiple_of(heads) {
        bail!("{}: hidden_size {d_model} is not a multiple of num_attention_heads {heads}", config.file);
    }
    let positions = config.text("position_embedding_type", "absolute")?;
    if positions != "absolute" {
        bail!("{}: position_embedding_type is \"{positions}\"; expected absolute", config.file);
    }
    config.refuse_flag("is_decoder", "this family is an encoder here")?;
    config.refuse_flag("add_cross_attention", "this family is an encoder here")?;
    // Of BERT's first files, and of the output matrix, which is not read.
    config.ignore(&["directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"]);
    config.ignore(&["pooler_size_per_head", "pooler_type"]);
    Ok(Architecture {
        language_model_class: classes.0,
        classifier_class: classes.1,
        vocabulary: config.size("vocab_size")?,
        d_model,
        layers,
        heads,
        kv_heads: heads,
        head_dim: d_model / heads,
        d_ff: config.size("intermediate_size")?,
        max_positions: config.optional_size("max_position_embeddings")?.unwrap_or(512),
        block: BlockForm::PostNorm,
        first_attention_norm: true,
        norm: NormKind::Layer,
        norm_epsilon: config.positive("layer_norm_eps", 1e-12)?,
        positions: Positions::Learned,
        position_offset,
        token_types: config.optional_size("type_vocab_size")?.unwrap_or(2),
        embedding_scale: None,
        residual_scale: None,
        attention_scale: 1.0 / ((d_model / heads) as f64).sqrt(),
        attention_soft_cap: None,
        output_scale: None,
        output_soft_cap: None,
        feed_forward: FeedForward::Plain(config.activation("hidden_act", "gelu")?),
        windows: vec![None; layers],
        causal: false,
        tied_output: config.tied_output(true)?,
        initializer_range: config.not_negative("initializer_range", 0.02)?,
        scaled_residual_initialization: false,
        default_lora_targets: &["query", "value"],
        default_ia3_targets: &["key", "value", "output.dense"],
        default_ia3_feed_forward: &["output.dense"],
        names,
    })
}

fn names(prefix: &'static str, [output_module, output]: [&'static str; 2], head: HeadForm) -> TensorNames {
    let linear = |name: &'static str| LinearName { name, bias: true };
    TensorNames {
        prefix,
        embeddings: "embeddings.word_embeddings.weight",
        positions: "embeddings.position_embeddings.weight",
        token_types: Some("embeddings.token_type_embeddings.weight"),
        embedding_norm: Some("embeddings.LayerNorm"),
        blocks: "encoder.layer",
        attention_norm: Some("attention.output.LayerNorm"),
        attention_output_norm: None,
        query_key_norms: None,
        attention_input: AttentionInput::Separate {
            query: linear("attention.self.query"),
            key: linear("attention.self.key"),
            value: linear("attention.self.value"),
        },
        attention_output: linear("attention.output.dense"),
        feed_forward_norm: Some("output.LayerNorm"),
        feed_forward_output_norm: None,
        gate: None,
        up: linear("intermediate.dense"),
        down: linear("output.dense"),
        final_norm: None,
        output,
        output_module,
        head,
        bottlenecks: ["attention.output", "output"],
        transposed_linears: false,
        norm_weights_less_one: false,
    }
}
