//! Attention over a flat stream of tokens: each query segment names the ranges of rows that hold its keys.
//!
//! There is no padding and no mask tensor. The same operation serves training (keys are rows of the same batch, a prompt's rows
//! shared by its answers) and generation (keys are rows of a cache).

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use half::bf16;

use super::backward::{Backward, Gradient};
use super::matrix::{MatrixMut, has_kernel, with_contiguous_rows, with_matrix, with_strided, with_strided_of};
use super::value::{Source, Value, through_candle};
use crate::error::Result;
use stored::Stored;

mod backward;
mod kernel;
mod plan;
mod stored;
#[cfg(test)]
mod tests;

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
    /// Scores become `cap tanh(score / cap)` (Gemma 2, Gemma Team 2024, section 2).
    pub soft_cap: Option<f64>,
    /// A query at position `p` sees keys at positions `p - window < q <= p` only (Mistral's sliding window); where nothing is causal, at
    /// `p - window < q < p + window` (ModernBERT's local attention).
    pub window: Option<usize>,
    /// Whether a query sees nothing after itself. An encoder's segment sees all of itself.
    pub causal: bool,
}

/// `softmax(scale q kᵀ) v` for every segment and head.
///
/// `q` is `[tokens, heads * head_dim]`, `k` and `v` `[key rows, kv_heads * head_dim]`, the result `[tokens, heads * head_dim]`.
/// Operands may be column slices of one packed matrix (rows are read with their stride). Keys and values may be bf16,
/// as a cache keeps them: they are widened as they are read, and all is computed in the queries' type.
pub fn attention(q: &Value, k: &Value, v: &Value, shape: &AttentionShape, plan: &Arc<AttentionPlan>) -> Result<Value> {
    if !has_kernel_for(q, k, v) {
        return through_candle(&[q, k, v], |t| reference(&t[0], &t[1], &t[2], shape, plan));
    }
    let sources = [q, k, v].map(Value::source);
    let operation = Operation::new([q, k, v], shape, plan)?;
    let (result, log_sums) = operation.forward(sources.iter().any(Option::is_some))?;
    let Some(log_sums) = log_sums else { return Ok(Value::constant(result)) };
    let kept = result.clone();
    super::kept::note(&[&operation.q, &operation.k, &operation.v, &result]);
    Ok(Value::made(result, move |gradient, backward| {
        let [dq, dk, dv] = operation.separate(&kept, &log_sums, &gradient, [0, 1, 2].map(|i| sources[i].is_some()))?;
        let rows = [operation.q.dim(0)?, operation.k.dim(0)?, operation.k.dim(0)?];
        for ((source, values), rows) in sources.iter().zip([dq, dk, dv]).zip(rows) {
            if let (Some(source), Some(values)) = (source, values) {
                let shape = (rows, values.len().checked_div(rows).unwrap_or(0));
                backward.add(source, Gradient::new(values, shape))?;
            }
        }
        Ok(())
    }))
}

/// Whether the kernels read these operands: f32 in main memory, or queries in f32 with keys and values in bf16, where
/// nothing trains.
fn has_kernel_for(q: &Value, k: &Value, v: &Value) -> bool {
    let is_bf16 = |x: &Value| x.device().is_cpu() && x.tensor().dtype() == DType::BF16;
    let is_constant = |x: &Value| !x.is_tracked();
    has_kernel(&[q.tensor(), k.tensor(), v.tensor()])
        || has_kernel(&[q.tensor()]) && [k, v].into_iter().all(is_bf16) && [q, k, v].into_iter().all(is_constant)
}

/// [`attention`] on one packed matrix `[tokens, (heads + 2 kv_heads) * head_dim]` of queries, keys and values side by side, as GPT-2's
/// `c_attn` gives it; one gradient of the same form comes back.
pub fn attention_packed(qkv: &Value, shape: &AttentionShape, plan: &Arc<AttentionPlan>) -> Result<Value> {
    let [q, k, v] = shape.packed_columns();
    if qkv.dim(1)? != v.end {
        crate::bail!("attention: a packed matrix {:?} does not fit {shape:?}", qkv.dims());
    }
    let columns = |range: &Range<usize>| qkv.detach().narrow_columns(range.start, range.len());
    if !has_kernel(&[qkv.tensor()]) {
        return through_candle(&[qkv], |t| {
            let columns = |range: &Range<usize>| t[0].narrow(1, range.start, range.len());
            reference(&columns(&q)?, &columns(&k)?, &columns(&v)?, shape, plan)
        });
    }
    let operation = Operation::new([&columns(&q)?, &columns(&k)?, &columns(&v)?], shape, plan)?;
    let source = qkv.source();
    let (result, log_sums) = operation.forward(source.is_some())?;
    let (Some(log_sums), Some(source)) = (log_sums, source) else { return Ok(Value::constant(result)) };
    let kept = result.clone();
    super::kept::note(&[&operation.q, &operation.k, &operation.v, &result]);
    Ok(Value::made(result, move |gradient, backward| {
        operation.packed(&kept, &log_sums, &gradient, &source, [q, k, v], backward)
    }))
}

impl AttentionShape {
    /// The columns of queries, keys and values in a packed matrix.
    fn packed_columns(&self) -> [Range<usize>; 3] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [0..q, q..q + kv, q + kv..q + 2 * kv]
    }
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
            let rows = Tensor::cat(&parts, 0)?.to_dtype(q.dtype())?; // [keys, kv_heads * head_dim]
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
        let mut scores = queries.matmul(&keys.t()?)?.affine(shape.scale, 0.0)?; // [heads, len, keys]
        if let Some(cap) = shape.soft_cap {
            scores = scores.affine(1.0 / cap, 0.0)?.tanh()?.affine(cap, 0.0)?;
        }
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
            let ahead = if shape.causal { 1 } else { shape.window.unwrap_or(keys) };
            let future = key >= position + ahead;
            let past = shape.window.is_some_and(|window| key + window <= position);
            if future || past { f32::NEG_INFINITY } else { 0.0 }
        })
        .collect();
    Ok(Tensor::from_vec(mask, (len, keys), like.device())?.to_dtype(DType::F32)?.to_dtype(like.dtype())?)
}

/// The operands of one call, as matrices with contiguous rows.
struct Operation {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: AttentionShape,
    plan: Arc<AttentionPlan>,
}

impl Operation {
    fn new(operands: [&Value; 3], shape: &AttentionShape, plan: &Arc<AttentionPlan>) -> Result<Self> {
        let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let [[rows, q_width], [keys, k_width], [values, v_width]] =
            [operands[0].dims2()?, operands[1].dims2()?, operands[2].dims2()?].map(|(rows, width)| [rows, width]);
        if q_width != width || [k_width, v_width] != [kv_width; 2] || keys != values {
            crate::bail!(
                "attention: queries [{rows}, {q_width}], keys [{keys}, {k_width}] and values [{values}, {v_width}] do not fit {shape:?}"
            );
        }
        plan::check(shape, plan, rows, keys)?;
        let [q, k, v] = operands.map(|operand| with_contiguous_rows(operand.tensor()));
        Ok(Operation { q: q?, k: k?, v: v?, shape: *shape, plan: plan.clone() })
    }

    /// With keys and values of this element type, which is theirs.
    fn with_operands<N: Stored, T>(&self, run: impl FnOnce(kernel::Operands<N>) -> Result<T>) -> Result<T> {
        with_strided(&self.q, |queries| {
            with_strided_of(&self.k, |keys| {
                with_strided_of(&self.v, |values| {
                    run(kernel::Operands { queries, keys, values, shape: &self.shape, plan: &self.plan })
                })
            })
        })
    }

    /// The result, and where it trains each row's `log Σ exp(score)`, `[heads, tokens]`, from which the
    /// backward pass makes the probabilities again.
    fn forward(&self, trains: bool) -> Result<(Tensor, Option<Vec<f32>>)> {
        let (rows, width) = self.q.dims2()?;
        let (result, log_sums) = match self.k.dtype() {
            DType::BF16 => self.with_operands::<bf16, _>(|operands| Ok(kernel::forward(operands, trains)))?,
            _ => self.with_operands::<f32, _>(|operands| Ok(kernel::forward(operands, trains)))?,
        };
        Ok((Tensor::from_vec(result, (rows, width), self.q.device())?, log_sums))
    }

    fn backward(
        &self,
        result: &Tensor,
        log_sums: &[f32],
        gradient: &Gradient,
        gradients: backward::Gradients,
    ) -> Result<()> {
        let gradient = gradient.matrix()?;
        self.with_operands(|operands| {
            with_matrix(result, |result| {
                backward::backward(operands, result, gradient, log_sums, gradients);
                Ok(())
            })
        })
    }

    /// The gradients of queries, keys and values, where they are wanted.
    fn separate(
        &self,
        result: &Tensor,
        log_sums: &[f32],
        gradient: &Gradient,
        wanted: [bool; 3],
    ) -> Result<[Option<Vec<f32>>; 3]> {
        let ((tokens, width), (keys, kv_width)) = (self.q.dims2()?, self.k.dims2()?);
        let make = |index: usize, count: usize| wanted[index].then(|| vec![0.0; count]);
        let [mut dq, mut dk, mut dv] = [make(0, tokens * width), make(1, keys * kv_width), make(2, keys * kv_width)];
        let gradients = backward::Gradients {
            queries: dq.as_mut().map(|dq| MatrixMut::new(dq, tokens, width)),
            keys: dk.as_mut().map(|dk| MatrixMut::new(dk, keys, kv_width)),
            values: dv.as_mut().map(|dv| MatrixMut::new(dv, keys, kv_width)),
        };
        self.backward(result, log_sums, gradient, gradients)?;
        Ok([dq, dk, dv])
    }

    /// Adds the gradient of a packed matrix.
    fn packed(
        &self,
        result: &Tensor,
        log_sums: &[f32],
        gradient: &Gradient,
        source: &Source,
        columns: [Range<usize>; 3],
        backward: &mut Backward,
    ) -> Result<()> {
        let (tokens, width) = (self.q.dim(0)?, columns[2].end);
        let mut values = vec![0.0; tokens * width];
        let all = MatrixMut::new(&mut values, tokens, width);
        // SAFETY: three ranges of columns that do not overlap.
        let [queries, keys, values_] = columns.map(|columns| Some(unsafe { all.block(0..tokens, columns) }));
        self.backward(result, log_sums, gradient, backward::Gradients { queries, keys, values: values_ })?;
        backward.add(source, Gradient::new(values, (tokens, width)))
    }
}
