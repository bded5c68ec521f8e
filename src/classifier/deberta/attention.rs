//! Disentangled attention (He et al. 2021, DeBERTa, section 3.1): what a token says and where it stands are two vectors.

use std::ops::Range;

use candle_core::{D, Tensor};
use rayon::prelude::*;

use crate::error::Result;

/// How far apart two tokens stand, as the model tells it: distances one by one, or, from half the number of buckets on, in logarithmic steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RelativePositions {
    /// Number of buckets; `None` where every distance counts by itself.
    pub(super) buckets: Option<usize>,
    /// Distances of this many positions and more are alike.
    pub(super) longest: usize,
}

impl RelativePositions {
    /// Half the rows of the table of relative positions: the row of distance 0.
    pub(super) fn span(&self) -> usize {
        self.buckets.unwrap_or(self.longest)
    }

    /// The row of the table for a query that stands `distance` positions after its key.
    fn row(&self, distance: i64) -> usize {
        let bucket = self.buckets.map_or(distance, |buckets| bucket(distance, buckets, self.longest));
        let span = self.span() as i64;
        (bucket + span).clamp(0, 2 * span - 1) as usize
    }

    /// The rows for the distances `1 - length` to `length - 1`, in that order, which never falls.
    fn rows(&self, length: usize) -> Vec<usize> {
        let length = length as i64;
        (1 - length..length).map(|distance| self.row(distance)).collect()
    }
}

/// `sign(d) (⌈ln(|d| / m) / ln((longest - 1) / m) (m - 1)⌉ + m)` with `m` half the buckets, and `d` itself up to `m`. In f32 as in PyTorch, whose
/// rounding decides at the borders of buckets.
fn bucket(distance: i64, buckets: usize, longest: usize) -> i64 {
    let middle = (buckets / 2) as i64;
    let length = distance.abs();
    if length <= middle {
        return distance;
    }
    let whole = (((longest as f64 - 1.0) / middle as f64) as f32).ln();
    let steps = ((length as f32 / middle as f32).ln() / whole * (middle - 1) as f32).ceil();
    distance.signum() * (steps as i64 + middle)
}

/// What the attention of a layer knows of relative positions, `[heads, 2 span, head_dim]` each; it does not depend on the text.
pub(super) struct PositionProjections {
    /// As keys: what a query's content finds at a distance (`c2p`).
    pub(super) keys: Option<Tensor>,
    /// As queries: what a key's content is asked from a distance (`p2c`).
    pub(super) queries: Option<Tensor>,
}

/// The attention of a layer over texts that lie end to end.
pub(super) struct Attention<'a> {
    /// Number of heads.
    pub(super) heads: usize,
    /// What scores are multiplied with.
    pub(super) scale: f32,
    /// How distances are told apart, and this layer's projections of them.
    pub(super) relative: Option<(RelativePositions, &'a PositionProjections)>,
}

impl Attention<'_> {
    /// Every token's mean of values, `[tokens, heads * head_dim]`, for queries, keys and values of that shape; a text attends to itself alone.
    pub(super) fn forward(&self, qkv: [&Tensor; 3], texts: &[Range<usize>]) -> Result<Tensor> {
        let of_text = |text: &Range<usize>| self.of_text(qkv, text);
        let parts = texts.par_iter().map(of_text).collect::<Result<Vec<Tensor>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// The same for one text, `[length, heads * head_dim]`.
    fn of_text(&self, qkv: [&Tensor; 3], text: &Range<usize>) -> Result<Tensor> {
        let length = text.len();
        let by_head = |x: &Tensor| -> Result<Tensor> {
            let rows = x.narrow(0, text.start, length)?.reshape((length, self.heads, ()))?;
            Ok(rows.transpose(0, 1)?.contiguous()?) // [heads, length, head_dim]
        };
        let [q, k, v] = [by_head(qkv[0])?, by_head(qkv[1])?, by_head(qkv[2])?];
        let content = values(&q.matmul(&k.t()?)?)?; // [heads, length, length]
        let positions = match &self.relative {
            Some((positions, projections)) => Some(OfText::new(*positions, projections, &q, &k)?),
            None => None,
        };
        let mut weights = content;
        for (index, row) in weights.chunks_exact_mut(length).enumerate() {
            let (head, query) = (index / length, index % length);
            if let Some(positions) = &positions {
                positions.add_to(row, head, query);
            }
            softmax(row, self.scale);
        }
        let weights = Tensor::from_vec(weights, (self.heads, length, length), v.device())?;
        let mean = weights.matmul(&v)?; // [heads, length, head_dim]
        Ok(mean.transpose(0, 1)?.flatten_from(1)?) // [length, heads * head_dim]
    }
}

/// The scores of positions within one text.
struct OfText {
    length: usize,
    /// For every distance from `1 - length` on: the column of its row of the table.
    columns: Vec<usize>,
    /// Number of columns: of the table's rows, those that the text's distances use.
    width: usize,
    /// Of every query with every column's key, `[heads, length, width]`.
    content_to_position: Option<Vec<f32>>,
    /// Of every key with every column's query, `[heads, length, width]`.
    position_to_content: Option<Vec<f32>>,
}

impl OfText {
    fn new(positions: RelativePositions, projections: &PositionProjections, q: &Tensor, k: &Tensor) -> Result<Self> {
        let length = q.dim(1)?;
        let rows = positions.rows(length);
        let (first, last) = (rows[0], rows[rows.len() - 1]);
        let width = last + 1 - first;
        let scores = |x: &Tensor, table: &Option<Tensor>| -> Result<Option<Vec<f32>>> {
            let Some(table) = table else { return Ok(None) };
            let used = table.narrow(1, first, width)?.contiguous()?; // [heads, width, head_dim]
            values(&x.matmul(&used.t()?)?).map(Some)
        };
        let columns = rows.iter().map(|row| row - first).collect();
        Ok(OfText {
            length,
            columns,
            width,
            content_to_position: scores(q, &projections.keys)?,
            position_to_content: scores(k, &projections.queries)?,
        })
    }

    /// Adds to the scores of one query with every key, `[length]`, those of their positions.
    fn add_to(&self, scores: &mut [f32], head: usize, query: usize) {
        let column = |key: usize| self.columns[self.length - 1 + query - key];
        if let Some(table) = &self.content_to_position {
            let of_query = &table[(head * self.length + query) * self.width..][..self.width];
            scores.iter_mut().enumerate().for_each(|(key, score)| *score += of_query[column(key)]);
        }
        if let Some(table) = &self.position_to_content {
            let of_head = &table[head * self.length * self.width..];
            scores.iter_mut().enumerate().for_each(|(key, score)| *score += of_head[key * self.width + column(key)]);
        }
    }
}

/// `exp(scale z_i) / Σ exp(scale z_j)` in place.
fn softmax(scores: &mut [f32], scale: f32) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = ((*score - largest) * scale).exp();
        sum += *score;
    }
    scores.iter_mut().for_each(|score| *score /= sum);
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

/// Projections of relative positions, `[heads, 2 span, head_dim]`, from `[2 span, heads * head_dim]`.
pub(super) fn by_head(x: &Tensor, heads: usize) -> Result<Tensor> {
    let head_dim = x.dim(D::Minus1)? / heads;
    Ok(x.reshape((x.dim(0)?, heads, head_dim))?.transpose(0, 1)?.contiguous()?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn buckets_of_distances_equal_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/classifiers/buckets.json");
        let text = std::fs::read_to_string(path).expect("a golden file");
        let tables: BTreeMap<String, Vec<i64>> = serde_json::from_str(&text).expect("tables of numbers");
        for (name, table) in tables {
            let (buckets, longest) = name.split_once(',').expect("two numbers");
            let (buckets, longest) = (buckets.parse().unwrap(), longest.parse().unwrap());
            for (distance, &expected) in table.iter().enumerate() {
                let distance = distance as i64;
                assert_eq!(bucket(distance, buckets, longest), expected, "{name}: {distance}");
                assert_eq!(bucket(-distance, buckets, longest), -expected, "{name}: -{distance}");
            }
        }
    }

    #[test]
    fn rows_never_fall_and_stay_within_the_table() {
        for positions in [
            RelativePositions { buckets: Some(8), longest: 48 },
            RelativePositions { buckets: Some(4), longest: 9 },
            RelativePositions { buckets: None, longest: 12 },
        ] {
            let rows = positions.rows(100);
            assert!(rows.is_sorted() && rows[198] == 2 * positions.span() - 1, "{positions:?}");
            assert_eq!(rows[99], positions.span());
        }
    }
}
