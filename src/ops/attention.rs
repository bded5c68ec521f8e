//! Attention over a flat stream of tokens: each query segment names the ranges of rows that hold its keys.
//!
//! There is no padding and no mask tensor. The same operation serves training (keys are rows of the same batch, a prompt's rows
//! shared by its answers) and generation (keys are rows of a cache).

use candle_core::{DType, Tensor};

use crate::error::Result;

/// A range of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first row.
    pub start: usize,
    /// The number of rows.
    pub len: usize,
}

/// One segment of queries and where its keys and values lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// The rows of the queries (and of the result).
    pub rows: Span,
    /// The rows of keys and values in the order of their positions. Together they hold `n` keys, the last `rows.len` of which are
    /// the segment's own: a causal query `j` (from 0) sees the first `n - rows.len + j + 1` of them.
    pub keys: Vec<Span>,
}

/// Who attends to whom in one batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttentionPlan {
    /// The segments; together their rows cover every row of the queries once.
    pub queries: Vec<Query>,
}

/// The form of the attention, the same for a whole batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads` is a multiple (grouped-query attention, Ainslie et al. 2023).
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// What scores are multiplied with, usually `1 / sqrt(head_dim)`.
    pub scale: f64,
    /// A query at position `p` sees keys at positions `p - window < q <= p` only (Mistral's sliding window).
    pub window: Option<usize>,
    /// Whether a query sees nothing after itself. An encoder's segment sees all of itself.
    pub causal: bool,
}

/// `softmax(scale q kᵀ) v` for every segment and head.
///
/// `q` is `[tokens, heads * head_dim]`, `k` and `v` `[key rows, kv_heads * head_dim]`, the result `[tokens, heads * head_dim]`.
/// Operands may be column slices of one packed matrix (rows are read with their stride).
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape, plan: &AttentionPlan) -> Result<Tensor> {
    reference(q, k, v, shape, plan)
}

/// [`attention`] on one packed matrix `[tokens, (heads + 2 kv_heads) * head_dim]` of queries, keys and values side by side, as GPT-2's
/// `c_attn` gives it; one gradient of the same form comes back.
pub fn attention_packed(qkv: &Tensor, shape: &AttentionShape, plan: &AttentionPlan) -> Result<Tensor> {
    let (q_width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let q = qkv.narrow(1, 0, q_width)?;
    let k = qkv.narrow(1, q_width, kv_width)?;
    let v = qkv.narrow(1, q_width + kv_width, kv_width)?;
    attention(&q, &k, &v, shape, plan)
}

/// The same in candle's own operations.
pub fn reference(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape, plan: &AttentionPlan) -> Result<Tensor> {
    let mut outputs = Vec::with_capacity(plan.queries.len());
    let mut order: Vec<&Query> = plan.queries.iter().collect();
    order.sort_by_key(|query| query.rows.start);
    for query in order {
        let gather = |x: &Tensor| -> Result<Tensor> {
            let parts: Vec<Tensor> =
                query.keys.iter().map(|span| x.narrow(0, span.start, span.len)).collect::<Result<_, _>>()?;
            let rows = Tensor::cat(&parts, 0)?; // [keys, kv_heads * head_dim]
            let keys = rows.dim(0)?;
            let groups = shape.heads / shape.kv_heads;
            let rows = rows.reshape((keys, shape.kv_heads, 1, shape.head_dim))?;
            let rows = rows.broadcast_as((keys, shape.kv_heads, groups, shape.head_dim))?;
            Ok(rows.reshape((keys, shape.heads, shape.head_dim))?.transpose(0, 1)?.contiguous()?) // [heads, keys, head_dim]
        };
        let Span { start, len } = query.rows;
        let queries = q.narrow(0, start, len)?.contiguous()?;
        let queries = queries.reshape((len, shape.heads, shape.head_dim))?.transpose(0, 1)?.contiguous()?; // [heads, len, head_dim]
        let (keys, values) = (gather(k)?, gather(v)?);
        let scores = queries.matmul(&keys.t()?)?.affine(shape.scale, 0.0)?; // [heads, len, keys]
        let mask = additive_mask(shape, len, keys.dim(1)?, q)?;
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, 2)?;
        let output = weights.matmul(&values)?; // [heads, len, head_dim]
        outputs.push(output.transpose(0, 1)?.reshape((len, shape.heads * shape.head_dim))?);
    }
    Ok(Tensor::cat(&outputs, 0)?)
}

/// 0 where a query sees a key and -inf where it does not: `[len, keys]`.
fn additive_mask(shape: &AttentionShape, len: usize, keys: usize, like: &Tensor) -> Result<Tensor> {
    let before = keys - len;
    let mask: Vec<f32> = (0..len * keys)
        .map(|index| {
            let (position, key) = (before + index / keys, index % keys);
            let future = shape.causal && key > position;
            let past = shape.window.is_some_and(|window| key + window <= position);
            if future || past { f32::NEG_INFINITY } else { 0.0 }
        })
        .collect();
    Ok(Tensor::from_vec(mask, (len, keys), like.device())?.to_dtype(DType::F32)?.to_dtype(like.dtype())?)
}
