//! What a family of transformers is, as data: the forward pass is written once and reads everything from here.

pub use super::config::{Config, shortened};
pub use super::rotary::{Rotary, RotaryForm};
use crate::bail;
use crate::error::Result;
use crate::ops::Activation;
pub use crate::settings::Pooling;

/// Where a block's norms are. `A` is attention, `F` the feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockForm {
    /// `x + A(norm(x))`, then `x + F(norm(x))`: GPT-2, Llama.
    PreNorm,
    /// `x + norm(A(x))`, then `x + norm(F(x))`: OLMo 2.
    OutputNorm,
    /// `norm(x + A(x))`, then `norm(x + F(x))`, and no norm after the last block: BERT.
    PostNorm,
    /// `x + A(norm(x)) + F(norm'(x))`: GPT-NeoX.
    Parallel,
    /// `x + norm(A(norm(x)))`, then `x + norm(F(norm(x)))`: Gemma 2.
    Sandwich,
}

/// Which normalisation stands in the blocks and at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square, weight only.
    Rms,
    /// Layer normalisation, weight and bias.
    Layer,
    /// Layer normalisation, weight only.
    LayerWithoutBias,
}

/// How a token learns its position.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// One learned vector a position, added to the embeddings.
    Learned,
    /// Queries and keys are rotated by `position * frequency` (Su et al. 2021); one frequency a pair of dimensions.
    Rotary(Rotary),
}

/// The feed-forward sub-layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedForward {
    /// `down(activation(up(x)))`
    Plain(Activation),
    /// `down(activation(gate(x)) * up(x))`
    Gated(Activation),
    /// The same where `up` gives both, the gate's half first: `down(activation(a) * b)` with `(a, b) = up(x)`.
    GatedPacked(Activation),
}

/// A linear layer's tensors on disk, relative to its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearName {
    /// Name within the block, for example `self_attn.q_proj`.
    pub name: &'static str,
    /// Whether a bias stands beside the weight.
    pub bias: bool,
}

/// The projections into attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionInput {
    /// Three linears.
    Separate {
        /// Queries, `[heads * head_dim, d_model]`.
        query: LinearName,
        /// Keys, `[kv_heads * head_dim, d_model]`.
        key: LinearName,
        /// Values, as keys.
        value: LinearName,
    },
    /// One linear whose output holds queries, keys and values side by side.
    Packed(LinearName),
    /// One linear whose output holds query, key and value of the first head, then those of the second, and so on (GPT-NeoX).
    PackedByHead(LinearName),
}

/// Norms of queries and keys, within a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryKeyNorms {
    /// Of each head by itself, `[head_dim]` (Qwen3).
    ByHead([&'static str; 2]),
    /// Of all heads together, `[heads * head_dim]` and `[kv_heads * head_dim]` (OLMo 2).
    Whole([&'static str; 2]),
}

impl QueryKeyNorms {
    /// Their names.
    pub fn names(self) -> [&'static str; 2] {
        match self {
            QueryKeyNorms::ByHead(names) | QueryKeyNorms::Whole(names) => names,
        }
    }
}

/// The hidden layer of a head: `norm(activation(W h + b))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadHidden {
    /// Its name; `[d_model, d_model]`.
    pub name: &'static str,
    /// Whether it has a bias.
    pub bias: bool,
    /// What its output goes through.
    pub activation: Activation,
    /// Name of the norm after that, of the same kind as those of the blocks, where there is one (ModernBERT).
    pub norm: Option<&'static str>,
}

/// The classification head of a family in `transformers`: `out(h)`, or `out(hidden(h))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadForm {
    /// What it reads.
    pub pooling: Pooling,
    /// Its hidden layer, where it has one.
    pub hidden: Option<HeadHidden>,
    /// Name of its last layer, `[labels, d_model]`.
    pub out: &'static str,
    /// Whether that layer has a bias.
    pub out_bias: bool,
}

/// Where a family keeps its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorNames {
    /// What stands before the transformer's tensors; absent in files that hold the bare transformer.
    pub prefix: &'static str,
    /// Token embeddings, `[vocabulary, d_model]`.
    pub embeddings: &'static str,
    /// Learned positions, `[max_positions, d_model]`; unused with rotary positions.
    pub positions: &'static str,
    /// One vector for each of the texts of a pair, `[types, d_model]` (BERT).
    pub token_types: Option<&'static str>,
    /// Norm of the embeddings (BERT).
    pub embedding_norm: Option<&'static str>,
    /// The list of blocks.
    pub blocks: &'static str,
    /// Norm before attention (or after it, [`BlockForm::PostNorm`]), within a block; none with [`BlockForm::OutputNorm`].
    pub attention_norm: Option<&'static str>,
    /// Norm of attention's output, within a block ([`BlockForm::Sandwich`], [`BlockForm::OutputNorm`]).
    pub attention_output_norm: Option<&'static str>,
    /// Norms of queries and keys, within a block.
    pub query_key_norms: Option<QueryKeyNorms>,
    /// Into attention.
    pub attention_input: AttentionInput,
    /// Out of attention.
    pub attention_output: LinearName,
    /// Norm before the feed-forward (or after it, [`BlockForm::PostNorm`]), within a block; none with [`BlockForm::OutputNorm`].
    pub feed_forward_norm: Option<&'static str>,
    /// Norm of the feed-forward's output, within a block ([`BlockForm::Sandwich`], [`BlockForm::OutputNorm`]).
    pub feed_forward_output_norm: Option<&'static str>,
    /// The gate of [`FeedForward::Gated`].
    pub gate: Option<LinearName>,
    /// Into the feed-forward.
    pub up: LinearName,
    /// Out of the feed-forward.
    pub down: LinearName,
    /// Norm after the last block.
    pub final_norm: Option<&'static str>,
    /// The output matrix, `[vocabulary, d_model]`, where it is not the embeddings. It stands outside the prefix.
    pub output: &'static str,
    /// The module of that matrix in `transformers`, by which adapters name it (GPT-NeoX's is `lm_head`, its tensor `embed_out.weight`).
    pub output_module: &'static str,
    /// The classification head.
    pub head: HeadForm,
    /// Where AdapterHub's bottleneck adapters stand after attention and after the feed-forward, within a block.
    pub bottlenecks: [&'static str; 2],
    /// Linears are stored as `[d_in, d_out]` (GPT-2's Conv1D) instead of `[d_out, d_in]`.
    pub transposed_linears: bool,
    /// Norms' weights are stored less one (Gemma).
    pub norm_weights_less_one: bool,
}

impl TensorNames {
    /// Names of the norms of queries and keys, within a block.
    pub fn query_key_norm_names(&self) -> impl Iterator<Item = &'static str> {
        self.query_key_norms.map(QueryKeyNorms::names).into_iter().flatten()
    }
}

/// Everything that the forward pass needs to know about a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// `transformers`' class with an output matrix, for example `LlamaForCausalLM`; an encoder's is without one here.
    pub language_model_class: &'static str,
    /// `transformers`' class with a classification head, for example `LlamaForSequenceClassification`.
    pub classifier_class: &'static str,
    /// Number of tokens in the vocabulary.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Inner width of the feed-forward.
    pub d_ff: usize,
    /// The longest sequence.
    pub max_positions: usize,
    /// Where a block's norms are.
    pub block: BlockForm,
    /// Whether the first block has a norm before its attention (ModernBERT's has none, as its embeddings are normalised).
    pub first_attention_norm: bool,
    /// The norms.
    pub norm: NormKind,
    /// Added to the variance in the norms.
    pub norm_epsilon: f64,
    /// Positions.
    pub positions: Positions,
    /// The learned vector of the first position (RoBERTa keeps two for padding).
    pub position_offset: usize,
    /// How many kinds of tokens embeddings tell apart (BERT's first and second text); 0 where they do not.
    pub token_types: usize,
    /// What token embeddings are multiplied with (Gemma, Granite).
    pub embedding_scale: Option<f64>,
    /// What a sub-layer's output is multiplied with before it is added to the residual stream (Granite).
    pub residual_scale: Option<f64>,
    /// What attention's scores are multiplied with.
    pub attention_scale: f64,
    /// Attention's scores become `cap tanh(score / cap)` (Gemma 2).
    pub attention_soft_cap: Option<f64>,
    /// What logits are multiplied with (Granite).
    pub output_scale: Option<f64>,
    /// Logits become `cap tanh(logit / cap)` (Gemma 2).
    pub output_soft_cap: Option<f64>,
    /// Feed-forward.
    pub feed_forward: FeedForward,
    /// For each layer, how many positions back a token sees (itself counted); an encoder's sees as many ahead.
    pub windows: Vec<Option<usize>>,
    /// Whether a token sees nothing after itself.
    pub causal: bool,
    /// Whether the output matrix is the embedding matrix.
    pub tied_output: bool,
    /// Standard deviation of new weights.
    pub initializer_range: f64,
    /// Whether new projections into the residual stream are scaled down by `sqrt(2 layers)` (GPT-2).
    pub scaled_residual_initialization: bool,
    /// Linears that LoRA targets by default, as in PEFT.
    pub default_lora_targets: &'static [&'static str],
    /// Linears that IA3 targets by default, as in PEFT.
    pub default_ia3_targets: &'static [&'static str],
    /// Those of them that are scaled at their input.
    pub default_ia3_feed_forward: &'static [&'static str],
    /// Tensor names.
    pub names: TensorNames,
}

/// How many of the sequences that a model reads are longer than it was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BeyondContext {
    context: usize,
    /// Sequences of more tokens.
    beyond: usize,
    /// All sequences.
    sequences: usize,
    /// Tokens of the longest.
    longest: usize,
}

impl BeyondContext {
    /// None of a model's sequences yet.
    pub fn of(architecture: &Architecture) -> Self {
        BeyondContext { context: architecture.context(), beyond: 0, sequences: 0, longest: 0 }
    }

    /// Counts a sequence of so many tokens.
    pub fn add(&mut self, tokens: usize) {
        self.beyond += usize::from(tokens > self.context);
        self.sequences += 1;
        self.longest = self.longest.max(tokens);
    }

    /// Counts sequences of these lengths.
    pub fn with(mut self, lengths: impl IntoIterator<Item = usize>) -> Self {
        lengths.into_iter().for_each(|tokens| self.add(tokens));
        self
    }

    /// What is to be said of it: nothing where all sequences are within the model's context.
    pub fn warning(&self) -> Option<String> {
        let BeyondContext { context, beyond, sequences, longest } = self;
        (*beyond > 0).then(|| {
            format!(
                "{beyond} of {sequences} sequences are longer than the {context} tokens that the model was made for (max_position_embeddings, the longest has \
                 {longest}), and no scaling of its positions covers them, so that it was never trained to read them; lower --max-length to {context}"
            )
        })
    }
}

impl Architecture {
    /// The longest sequence that the model was made for: learned positions end there, rotary ones go on, with
    /// what the model has not seen.
    pub fn context(&self) -> usize {
        self.max_positions.saturating_sub(self.position_offset)
    }

    /// Whether positions are counted from the padding token's number on (RoBERTa), which therefore belongs to
    /// the weights.
    pub fn positions_follow_padding(&self) -> bool {
        self.position_offset > 0
    }

    /// The longest sequence, where positions are learned; rotary positions have no end.
    pub fn longest(&self) -> Option<usize> {
        (self.positions == Positions::Learned).then(|| self.context())
    }

    /// Refuses sequences of more tokens than there are learned positions; rotary positions have no end.
    pub fn check_length(&self, longest: usize) -> Result<()> {
        match self.longest() {
            Some(positions) if longest > positions => bail!(
                "a sequence of {longest} tokens is longer than the {positions} positions that the model has; lower --max-length to {positions} (or less, where a \
                 method puts virtual tokens before a text)"
            ),
            _ => Ok(()),
        }
    }

    /// Refuses sizes that do not fit each other.
    pub fn check(&self, file: &str) -> Result<()> {
        if self.kv_heads > self.heads || !self.heads.is_multiple_of(self.kv_heads) {
            bail!(
                "{file}: {} attention heads cannot share {} key-value heads; the first must be a multiple of the second",
                self.heads,
                self.kv_heads
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            bail!("{file}: the width of an attention head is {}, expected an even number", self.head_dim);
        }
        Ok(())
    }

    /// The length beyond which the rotations of a sequence depend on its length (dynamic scaling, LongRoPE).
    pub fn rotations_switch_after(&self) -> Option<usize> {
        match &self.positions {
            Positions::Rotary(rotary) => rotary.switches_after(),
            Positions::Learned => None,
        }
    }

    /// The length beyond which the rotations of a sequence that grows are others from its first token on (LongRoPE).
    pub fn rotations_restart_after(&self) -> Option<usize> {
        match &self.positions {
            Positions::Rotary(rotary) => rotary.restarts_after(),
            Positions::Learned => None,
        }
    }

    /// Width of all query heads.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}
