//! Means and sums over groups of rows.

use std::ops::Range;

use candle_core::Tensor;

use super::matrix::{fill_rows, has_kernel, with_matrix};
use super::simd::add_to;
use super::value::{Value, through_candle};
use crate::error::Result;

/// Row `i` of the result is the mean of the rows of `x` that the parts of `groups[i]` name: `x` is `[rows, d]`, the result `[groups, d]`. A group
/// without rows is an error.
pub fn mean_rows<const PARTS: usize>(x: &Value, groups: &[[Range<usize>; PARTS]]) -> Result<Value> {
    let rows = x.dim(0)?;
    for group in groups {
        if group.iter().all(Range::is_empty) || group.iter().any(|part| part.end > rows) {
            crate::bail!("mean of rows: {group:?} of {rows} rows");
        }
    }
    if !has_kernel(&[x.tensor()]) {
        return through_candle(&[x], |t| reference(&t[0], groups));
    }
    let groups: Vec<Vec<usize>> = groups.iter().map(|group| group.iter().cloned().flatten().collect()).collect();
    let columns = x.dim(1)?;
    let means = with_matrix(x.tensor(), |x| {
        Ok::<_, candle_core::Error>(fill_rows(groups.len(), columns, |first, chunk| {
            for (group, mean) in groups[first..].iter().zip(chunk.chunks_exact_mut(columns)) {
                mean.fill(0.0);
                group.iter().for_each(|&row| add_to(mean, x.row(row)));
                mean.iter_mut().for_each(|mean| *mean /= group.len() as f32);
            }
        }))
    })?;
    let means = Tensor::from_vec(means, (groups.len(), columns), x.device())?;
    let Some(source) = x.source() else { return Ok(Value::constant(means)) };
    // Each row gets its group's gradient, divided by the number of rows.
    Ok(Value::made(means, move |gradient, backward| {
        let gradient = gradient.matrix()?;
        backward.accumulate(&source, (rows, columns), |dx| {
            for (index, group) in groups.iter().enumerate() {
                let scaled: Vec<f32> = gradient.row(index).iter().map(|g| g / group.len() as f32).collect();
                group.iter().for_each(|&row| add_to(&mut dx[row * columns..][..columns], &scaled));
            }
        })
    }))
}

/// The sum over each range of a vector: `x` is `[n]`, the result `[ranges]`.
pub fn sum_ranges(x: &Tensor, ranges: &[Range<usize>]) -> Result<Tensor> {
    let count = x.dim(0)?;
    let mut members = vec![0f32; ranges.len() * count];
    for (index, range) in ranges.iter().enumerate() {
        members[index * count..][range.clone()].fill(1.0);
    }
    let members = Tensor::from_vec(members, (ranges.len(), count), x.device())?; // [ranges, n]
    Ok(members.matmul(&x.unsqueeze(1)?)?.squeeze(1)?)
}

/// [`mean_rows`] in candle's own operations.
pub fn reference<const PARTS: usize>(x: &Tensor, groups: &[[Range<usize>; PARTS]]) -> Result<Tensor> {
    let mean = |group: &[Range<usize>; PARTS]| -> Result<Tensor> {
        let rows: Vec<u32> = group.iter().cloned().flatten().map(|row| row as u32).collect();
        Ok(x.index_select(&Tensor::from_slice(&rows, rows.len(), x.device())?, 0)?.mean_keepdim(0)?)
    };
    Ok(Tensor::cat(&groups.iter().map(mean).collect::<Result<Vec<_>>>()?, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Operand, assert_same_bits_on_any_number_of_threads, compare, random};

    #[test]
    fn values_and_gradients_are_those_of_the_reference() {
        for groups in [vec![[0..1, 3..7]], vec![[0..3, 3..4], [0..3, 4..9], [9..9, 9..10]]] {
            compare(&[Operand::new(&[10, 7])], |t| mean_rows(&t[0], &groups), |t| reference(&t[0], &groups));
            assert_same_bits_on_any_number_of_threads(&[Operand::new(&[10, 7])], |t| mean_rows(&t[0], &groups));
        }
    }

    #[test]
    fn the_order_of_the_rows_does_not_matter_where_they_are_the_same() -> Result<()> {
        let row = random(&[1, 5], 1);
        let x = row.broadcast_as((4, 5))?.contiguous()?;
        let means = mean_rows(&Value::of(&x), &[[0..4, 0..0], [1..2, 2..3]])?.tensor().to_vec2::<f32>()?;
        for mean in means {
            for (found, expected) in mean.iter().zip(&row.to_vec2::<f32>()?[0]) {
                assert!((found - expected).abs() < 1e-6);
            }
        }
        Ok(())
    }

    #[test]
    fn a_group_without_rows_or_beyond_them_is_an_error() {
        let x = Value::of(&random(&[3, 2], 1));
        assert!(mean_rows(&x, &[[1..1, 2..2]]).is_err() && mean_rows(&x, &[[0..4, 0..0]]).is_err());
    }
}
