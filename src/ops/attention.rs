//! Attention over a flat stream of tokens: each query segment names the ranges of rows that hold its keys.
//!
//! There is no padding and no mask tensor. The same operation serves training (keys are rows of the same batch, a prompt's rows
//! shared by its answers) and generation (keys are rows of a cache).

use std::borrow::Cow;
use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, CustomOp3, DType, Layout, Shape, Tensor, bail};

use super::matrix::{Matrix, MatrixMut, has_kernel, with_contiguous_rows, with_matrix};
use crate::error::Result;

mod kernel;
mod plan;
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
/// Operands may be column slices of one packed matrix (rows are read with their stride).
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape, plan: &AttentionPlan) -> Result<Tensor> {
    if !has_kernel(&[q, k, v]) {
        return reference(q, k, v, shape, plan);
    }
    let (q, k, v) = (with_contiguous_rows(q)?, with_contiguous_rows(k)?, with_contiguous_rows(v)?);
    Ok(match q.track_op() || k.track_op() || v.track_op() {
        true => q.apply_op3(&k, &v, Operation::for_training(shape, plan))?,
        false => q.apply_op3_no_bwd(&k, &v, &Operation::for_inference(shape, plan))?,
    })
}

/// [`attention`] on one packed matrix `[tokens, (heads + 2 kv_heads) * head_dim]` of queries, keys and values side by side, as GPT-2's
/// `c_attn` gives it; one gradient of the same form comes back.
pub fn attention_packed(qkv: &Tensor, shape: &AttentionShape, plan: &AttentionPlan) -> Result<Tensor> {
    if !has_kernel(&[qkv]) {
        let [q, k, v] = shape.packed_columns();
        let columns = |range: Range<usize>| qkv.narrow(1, range.start, range.len());
        return reference(&columns(q)?, &columns(k)?, &columns(v)?, shape, plan);
    }
    let qkv = with_contiguous_rows(qkv)?;
    Ok(match qkv.track_op() {
        true => qkv.apply_op1(Operation::for_training(shape, plan))?,
        false => qkv.apply_op1_no_bwd(&Operation::for_inference(shape, plan))?,
    })
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

struct Operation<'a> {
    shape: AttentionShape,
    plan: Cow<'a, AttentionPlan>,
    /// Each row's `log Σ exp(score)`, `[heads, tokens]`, from which the backward pass makes the probabilities again.
    log_sums: OnceLock<Vec<f32>>,
    trains: bool,
}

impl Operation<'static> {
    fn for_training(shape: &AttentionShape, plan: &AttentionPlan) -> Self {
        Operation { shape: *shape, plan: Cow::Owned(plan.clone()), log_sums: OnceLock::new(), trains: true }
    }
}

impl<'a> Operation<'a> {
    fn for_inference(shape: &AttentionShape, plan: &'a AttentionPlan) -> Self {
        Operation { shape: *shape, plan: Cow::Borrowed(plan), log_sums: OnceLock::new(), trains: false }
    }

    fn operands<'b>(&'b self, queries: Matrix<'b>, keys: Matrix<'b>, values: Matrix<'b>) -> kernel::Operands<'b> {
        kernel::Operands { queries, keys, values, shape: &self.shape, plan: &self.plan }
    }

    fn unpack<'b>(&'b self, qkv: Matrix<'b>) -> kernel::Operands<'b> {
        let [q, k, v] = self.shape.packed_columns().map(|columns| qkv.block(0..qkv.rows, columns));
        self.operands(q, k, v)
    }

    fn forward(&self, operands: kernel::Operands) -> candle_core::Result<(CpuStorage, Shape)> {
        let (queries, keys, values, shape) = (operands.queries, operands.keys, operands.values, &self.shape);
        let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        if queries.columns != width || [keys.columns, values.columns] != [kv_width; 2] || keys.rows != values.rows {
            bail!(
                "attention: queries [{}, {}], keys [{}, {}] and values [{}, {}] do not fit {shape:?}",
                queries.rows,
                queries.columns,
                keys.rows,
                keys.columns,
                values.rows,
                values.columns
            );
        }
        plan::check(shape, &self.plan, queries.rows, keys.rows)?;
        let (result, log_sums) = kernel::forward(operands, self.trains);
        if let Some(log_sums) = log_sums {
            // An operation is run forward once; were it run again, the values would be the same.
            let _ = self.log_sums.set(log_sums);
        }
        Ok((CpuStorage::F32(result), (queries.rows, width).into()))
    }

    fn backward(
        &self,
        operands: kernel::Operands,
        result: &Tensor,
        gradient: &Tensor,
        gradients: kernel::Gradients,
    ) -> candle_core::Result<()> {
        let Some(log_sums) = self.log_sums.get() else {
            bail!("attention: backward without forward");
        };
        with_matrix(result, |result| {
            with_matrix(gradient, |gradient| {
                kernel::backward(operands, result, gradient, log_sums, gradients);
                Ok(())
            })
        })
    }
}

impl CustomOp3 for Operation<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (q, k) = (Matrix::from_storage(q, q_layout)?, Matrix::from_storage(k, k_layout)?);
        self.forward(self.operands(q, k, Matrix::from_storage(v, v_layout)?))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let zeros = |x: &Tensor| x.track_op().then(|| vec![0.0; x.elem_count()]);
        let (mut dq, mut dk, mut dv) = (zeros(q), zeros(k), zeros(v));
        let (tokens, width) = q.dims2()?;
        let (key_rows, kv_width) = k.dims2()?;
        let gradients = kernel::Gradients {
            queries: dq.as_mut().map(|dq| MatrixMut::new(dq, tokens, width)),
            keys: dk.as_mut().map(|dk| MatrixMut::new(dk, key_rows, kv_width)),
            values: dv.as_mut().map(|dv| MatrixMut::new(dv, key_rows, kv_width)),
        };
        with_matrix(q, |q| {
            with_matrix(k, |k| with_matrix(v, |v| self.backward(self.operands(q, k, v), result, gradient, gradients)))
        })?;
        let tensor = |values: Option<Vec<f32>>, like: &Tensor| {
            values.map(|values| Tensor::from_vec(values, like.shape(), like.device())).transpose()
        };
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}

impl CustomOp1 for Operation<'_> {
    fn name(&self) -> &'static str {
        "attention on a packed matrix"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let qkv = Matrix::from_storage(qkv, layout)?;
        let [.., values] = self.shape.packed_columns();
        if qkv.columns != values.end {
            bail!("attention: a packed matrix [{}, {}] does not fit {:?}", qkv.rows, qkv.columns, self.shape);
        }
        self.forward(self.unpack(qkv))
    }

    fn bwd(&self, qkv: &Tensor, result: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !qkv.track_op() {
            return Ok(None);
        }
        let (tokens, width) = qkv.dims2()?;
        let mut values = vec![0.0; tokens * width];
        let all = MatrixMut::new(&mut values, tokens, width);
        // SAFETY: three ranges of columns that do not overlap.
        let [queries, keys, values_] =
            self.shape.packed_columns().map(|columns| Some(unsafe { all.block(0..tokens, columns) }));
        let gradients = kernel::Gradients { queries, keys, values: values_ };
        with_matrix(qkv, |qkv| self.backward(self.unpack(qkv), result, gradient, gradients))?;
        Ok(Some(Tensor::from_vec(values, qkv.shape(), qkv.device())?))
    }
}
