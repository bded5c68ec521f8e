//! Sums, products with constants, and parts of values: what joins the operations of a transformer.

use candle_core::Tensor;

use super::backward::Gradient;
use super::matrix::{
    Matrix, MatrixMut, fill, fill_rows, has_kernel, update_chunks, update_rows, with_elements, with_matrix,
};
use super::simd::{add_to, vectorised};
use super::value::{Source, Value, through_candle};
use crate::error::Result;

vectorised! {
    fn sum<'a>(x: &'a [f32], y: &'a [f32], sum: &'a mut [f32]) {
        for ((sum, &x), &y) in sum.iter_mut().zip(x).zip(y) {
            *sum = x + y;
        }
    }

    fn scaled<'a>(x: &'a [f32], factor: f32, y: &'a mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * factor;
        }
    }

    fn product<'a>(x: &'a [f32], factors: &'a [f32], y: &'a mut [f32]) {
        for ((y, &x), &factor) in y.iter_mut().zip(x).zip(factors) {
            *y = x * factor;
        }
    }

    fn add_product<'a>(x: &'a [f32], factors: &'a [f32], y: &'a mut [f32]) {
        for ((y, &x), &factor) in y.iter_mut().zip(x).zip(factors) {
            *y += x * factor;
        }
    }
}

impl Value {
    /// `x + y`, of one shape.
    pub fn add(&self, other: &Value) -> Result<Value> {
        if self.dims() != other.dims() {
            crate::bail!("a sum of values of the shapes {:?} and {:?}", self.dims(), other.dims());
        }
        if !has_kernel(&[self.tensor(), other.tensor()]) {
            return through_candle(&[self, other], |t| Ok((&t[0] + &t[1])?));
        }
        let values = with_elements(self.tensor(), |x| {
            with_elements(other.tensor(), |y| {
                Ok::<_, candle_core::Error>(fill(x.len(), |start, target| {
                    let range = start..start + target.len();
                    sum(&x[range.clone()], &y[range], target);
                }))
            })
        })?;
        let result = Tensor::from_vec(values, self.shape(), self.device())?;
        let sources: Vec<Source> = [self.source(), other.source()].into_iter().flatten().collect();
        if sources.is_empty() {
            return Ok(Value::constant(result));
        }
        Ok(Value::made(result, move |gradient, backward| {
            if let [first, second] = &sources[..] {
                backward.add(first, gradient.clone())?;
                return backward.add(second, gradient);
            }
            backward.add(&sources[0], gradient)
        }))
    }

    /// `factor x`.
    pub fn scale(&self, factor: f64) -> Result<Value> {
        if !has_kernel(&[self.tensor()]) {
            return through_candle(&[self], |t| Ok(t[0].affine(factor, 0.0)?));
        }
        let factor = factor as f32;
        let values = with_elements(self.tensor(), |x| {
            Ok::<_, candle_core::Error>(fill(x.len(), |start, y| scaled(&x[start..][..y.len()], factor, y)))
        })?;
        let result = Tensor::from_vec(values, self.shape(), self.device())?;
        let Some(source) = self.source() else { return Ok(Value::constant(result)) };
        Ok(Value::made(result, move |mut gradient, backward| {
            if let Some(values) = gradient.unshared() {
                update_chunks(values, |_, chunk| chunk.iter_mut().for_each(|g| *g *= factor));
                return backward.add(&source, gradient);
            }
            let g = gradient.values()?;
            let values = fill(g.len(), |start, y| scaled(&g[start..][..y.len()], factor, y));
            backward.add(&source, Gradient::new(values, gradient.shape()))
        }))
    }

    /// Every row of `x` `[rows, d]` times `factors` `[d]`, element by element.
    pub fn scale_columns(&self, factors: &Value) -> Result<Value> {
        if !has_kernel(&[self.tensor(), factors.tensor()]) {
            return through_candle(&[self, factors], |t| Ok(t[0].broadcast_mul(&t[1])?));
        }
        let (rows, columns) = self.dims2()?;
        check_columns("factors", columns, factors)?;
        let values = with_matrix(self.tensor(), |x| {
            with_elements(factors.tensor(), |factors| {
                Ok::<_, candle_core::Error>(by_row(rows, columns, |row, y| product(x.row(row), factors, y)))
            })
        })?;
        let result = Tensor::from_vec(values, self.shape(), self.device())?;
        let (of_x, of_factors) = (self.source(), factors.source());
        if of_x.is_none() && of_factors.is_none() {
            return Ok(Value::constant(result));
        }
        let x = of_factors.is_some().then(|| self.tensor().clone());
        let factors = factors.tensor().clone();
        super::kept::note(&x.iter().collect::<Vec<_>>());
        Ok(Value::made(result, move |gradient, backward| {
            let g = gradient.matrix()?;
            if let (Some(source), Some(x)) = (&of_factors, &x) {
                with_matrix(x, |x| {
                    backward.accumulate(source, columns, |sums| add_column_sums_of_products(g, x, sums))
                })?;
            }
            let Some(source) = of_x else { return Ok(()) };
            with_elements(&factors, |factors| {
                let values = by_row(rows, columns, |row, dx| product(g.row(row), factors, dx));
                backward.add(&source, Gradient::new(values, (rows, columns)))
            })
        }))
    }

    /// `bias` `[d]` added to every row of `x` `[rows, d]`.
    pub fn add_to_columns(&self, bias: &Value) -> Result<Value> {
        if !has_kernel(&[self.tensor(), bias.tensor()]) {
            return through_candle(&[self, bias], |t| Ok(t[0].broadcast_add(&t[1])?));
        }
        let (rows, columns) = self.dims2()?;
        check_columns("bias", columns, bias)?;
        let values = with_matrix(self.tensor(), |x| {
            with_elements(bias.tensor(), |bias| {
                Ok::<_, candle_core::Error>(by_row(rows, columns, |row, y| sum(x.row(row), bias, y)))
            })
        })?;
        let result = Tensor::from_vec(values, self.shape(), self.device())?;
        let (of_x, of_bias) = (self.source(), bias.source());
        if of_x.is_none() && of_bias.is_none() {
            return Ok(Value::constant(result));
        }
        Ok(Value::made(result, move |gradient, backward| {
            if let Some(source) = &of_bias {
                super::linear::gradient_of_bias(source, &gradient, backward)?;
            }
            of_x.map_or(Ok(()), |source| backward.add(&source, gradient))
        }))
    }

    /// `len` columns from `start` on of a matrix, without a copy.
    pub fn narrow_columns(&self, start: usize, len: usize) -> Result<Value> {
        self.part(1, start, len)
    }

    /// `len` rows from `start` on, without a copy.
    pub fn narrow_rows(&self, start: usize, len: usize) -> Result<Value> {
        self.part(0, start, len)
    }

    fn part(&self, dimension: usize, start: usize, len: usize) -> Result<Value> {
        if !has_kernel(&[self.tensor()]) {
            return through_candle(&[self], |t| Ok(t[0].narrow(dimension, start, len)?));
        }
        let result = self.tensor().narrow(dimension, start, len)?;
        let Some(source) = self.source() else { return Ok(Value::constant(result)) };
        let shape = self.shape().clone();
        // As a matrix, of which a vector is one row.
        let (rows, columns) = if shape.rank() == 1 { (1, shape.elem_count()) } else { shape.dims2()? };
        let dimension = if shape.rank() == 1 { 1 } else { dimension };
        Ok(Value::made(result, move |gradient, backward| {
            let g = gradient.values()?;
            backward.accumulate(&source, shape, |dx| {
                if dimension == 0 {
                    let part = &mut dx[start * columns..][..len * columns];
                    update_chunks(part, |first, chunk| add_to(chunk, &g[first..][..chunk.len()]));
                } else {
                    debug_assert_eq!(dx.len(), rows * columns);
                    update_rows(dx, columns, |row, dx| add_to(&mut dx[start..][..len], &g[row * len..][..len]));
                }
            })
        }))
    }

    /// The same numbers in another shape of as many elements.
    pub fn reshape(&self, shape: impl Into<candle_core::Shape>) -> Result<Value> {
        let before = self.shape().clone();
        let result = self.tensor().contiguous()?.reshape(shape.into())?;
        let Some(source) = self.source() else { return Ok(Value::constant(result)) };
        Ok(Value::made(result, move |gradient, backward| backward.add(&source, gradient.reshaped(before))))
    }

    /// The rows of several matrices of as many columns, or the elements of several vectors, end to end.
    pub fn cat_rows(parts: &[&Value]) -> Result<Value> {
        if let [one] = parts {
            return Ok((*one).clone());
        }
        let tensors: Vec<&Tensor> = parts.iter().map(|part| part.tensor()).collect();
        if !has_kernel(&tensors) {
            return through_candle(parts, |t| Ok(Tensor::cat(t, 0)?));
        }
        let result = Tensor::cat(&tensors, 0)?;
        if !parts.iter().any(|part| part.is_tracked()) {
            return Ok(Value::constant(result));
        }
        let mut place = 0;
        let sources: Vec<_> = (parts.iter())
            .map(|part| {
                let start = place;
                place += part.shape().elem_count();
                (part.source(), part.shape().clone(), start)
            })
            .collect();
        Ok(Value::made(result, move |gradient, backward| {
            let g = gradient.values()?;
            for (source, shape, start) in sources {
                if let Some(source) = source {
                    let values = g[start..][..shape.elem_count()].to_vec();
                    backward.add(&source, Gradient::new(values, shape))?;
                }
            }
            Ok(())
        }))
    }

    /// Columns of `self` and `other` `[rows, ..]`, which are counted on from it: column `i` of the result is
    /// `columns[i]` of both side by side. In candle's operations: it is for single columns of what is small.
    pub fn select_columns(&self, other: &Value, columns: &[u32]) -> Result<Value> {
        let index = Tensor::from_slice(columns, columns.len(), self.device())?;
        through_candle(&[self, other], |t| Ok(Tensor::cat(t, 1)?.index_select(&index, 1)?))
    }

    /// Some columns of a matrix as rows: row `i` of the result is column `columns[i]` of `self`. In candle's
    /// operations.
    pub fn columns_as_rows(&self, columns: &[u32]) -> Result<Value> {
        let index = Tensor::from_slice(columns, columns.len(), self.device())?;
        through_candle(&[self], |t| Ok(t[0].index_select(&index, 1)?.t()?.contiguous()?))
    }

    /// Some rows of a matrix, any number of times each: row `i` of the result is row `rows[i]` of `self`.
    pub fn select_rows(&self, rows: &[u32]) -> Result<Value> {
        if !has_kernel(&[self.tensor()]) {
            let index = Tensor::from_slice(rows, rows.len(), self.device())?;
            return through_candle(&[self], |t| Ok(t[0].index_select(&index, 0)?));
        }
        let (count, columns) = self.dims2()?;
        if let Some(row) = rows.iter().find(|&&row| row as usize >= count) {
            crate::bail!("row {row} of a matrix of {count} rows was asked for");
        }
        let values = with_matrix(self.tensor(), |x| {
            Ok::<_, candle_core::Error>(by_row(rows.len(), columns, |row, y| {
                y.copy_from_slice(x.row(rows[row] as usize));
            }))
        })?;
        let result = Tensor::from_vec(values, (rows.len(), columns), self.device())?;
        let Some(source) = self.source() else { return Ok(Value::constant(result)) };
        let rows = rows.to_vec();
        Ok(Value::made(result, move |gradient, backward| {
            let g = gradient.matrix()?;
            backward.accumulate(&source, (count, columns), |dx| add_selected(g, &rows, dx))
        }))
    }
}

/// Adds row `i` of `gradient` to row `rows[i]`. Each row gets its terms in their order, by one task.
fn add_selected(gradient: Matrix, rows: &[u32], target: &mut [f32]) {
    use rayon::prelude::*;
    let columns = gradient.columns;
    // The places of each row, in order.
    let mut order: Vec<(u32, u32)> = rows.iter().copied().zip(0..).collect();
    order.sort_unstable();
    let runs: Vec<&[(u32, u32)]> = order.chunk_by(|a, b| a.0 == b.0).collect();
    let target = MatrixMut::new(target, target.len().checked_div(columns).unwrap_or(0), columns);
    let add = |run: &&[(u32, u32)]| {
        // SAFETY: each run has a row of its own.
        let row = unsafe { target.row(run[0].0 as usize) };
        run.iter().for_each(|&(_, place)| add_to(row, gradient.row(place as usize)));
    };
    match rows.len() * columns < super::matrix::CHUNK {
        true => runs.iter().for_each(add),
        false => runs.par_iter().with_min_len((super::matrix::CHUNK / columns.max(1)).max(1)).for_each(add),
    }
}

fn check_columns(what: &str, columns: usize, vector: &Value) -> Result<()> {
    if vector.dims() != [columns] {
        crate::bail!("{what} of shape {:?} do not fit rows of {columns}", vector.dims());
    }
    Ok(())
}

/// A matrix made row by row.
fn by_row(rows: usize, columns: usize, write: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    fill_rows(rows, columns, |first, chunk| {
        (first..).zip(chunk.chunks_exact_mut(columns.max(1))).for_each(|(row, y)| write(row, y));
    })
}

/// Adds `Σ g x` over rows, by column.
fn add_column_sums_of_products(g: Matrix, x: Matrix, sums: &mut [f32]) {
    let of_rows = super::matrix::sum_over_rows(g.rows, g.columns, |rows, partial| {
        rows.for_each(|row| add_product(g.row(row), x.row(row), partial));
    });
    add_to(sums, &of_rows);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Operand, assert_same_bits_on_any_number_of_threads, compare, random};

    #[test]
    fn values_and_gradients_are_those_of_candle() {
        for (rows, columns) in [(1, 1), (7, 5), (300, 130), (0, 4)] {
            let (x, y, v) = (Operand::new(&[rows, columns]), Operand::new(&[rows, columns]), Operand::new(&[columns]));
            compare(&[x.clone(), y.clone()], |t| t[0].add(&t[1]), |t| Ok((&t[0] + &t[1])?));
            compare(std::slice::from_ref(&x), |t| t[0].scale(0.3), |t| Ok(t[0].affine(0.3, 0.0)?));
            let both = [x.clone(), v];
            compare(&both, |t| t[0].scale_columns(&t[1]), |t| Ok(t[0].broadcast_mul(&t[1])?));
            compare(&both, |t| t[0].add_to_columns(&t[1]), |t| Ok(t[0].broadcast_add(&t[1])?));
            compare(
                &[x, y],
                |t| Value::cat_rows(&[&t[0], &t[1], &t[0]]),
                |t| Ok(Tensor::cat(&[&t[0], &t[1], &t[0]], 0)?),
            );
        }
    }

    #[test]
    fn a_value_that_is_read_twice_gets_the_sum_of_both_gradients() {
        let run = |t: &[Value]| t[0].add(&t[0])?.add(&t[0].scale(0.5)?);
        compare(&[Operand::new(&[20, 30])], run, |t| Ok((((&t[0] + &t[0])?) + t[0].affine(0.5, 0.0)?)?));
    }

    #[test]
    fn parts_and_selected_rows_give_their_gradients_back_to_their_places() {
        let x = [Operand::new(&[40, 12])];
        let parts = |t: &[Value]| t[0].narrow_columns(3, 4)?.add(&t[0].narrow_columns(5, 4)?)?.narrow_rows(7, 20);
        compare(&x, parts, |t| Ok((t[0].narrow(1, 3, 4)? + t[0].narrow(1, 5, 4)?)?.narrow(0, 7, 20)?));
        let rows: Vec<u32> = (0..700).map(|index| (index * index + 3) % 40).collect();
        let index = Tensor::from_slice(&rows, rows.len(), &candle_core::Device::Cpu).unwrap();
        compare(&x, |t| t[0].select_rows(&rows), |t| Ok(t[0].index_select(&index, 0)?));
        compare(&x, |t| t[0].reshape((20, 24)), |t| Ok(t[0].reshape((20, 24))?));
        assert_same_bits_on_any_number_of_threads(&x, |t| t[0].select_rows(&rows));
        let vector = [Operand::new(&[50])];
        compare(&vector, |t| t[0].narrow_rows(8, 30), |t| Ok(t[0].narrow(0, 8, 30)?));
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let of = |shape: &[usize]| Value::constant(random(shape, 1));
        assert!(of(&[3, 2]).add(&of(&[2, 3])).is_err() && of(&[3, 2]).scale_columns(&of(&[3])).is_err());
        assert!(of(&[3, 2]).add_to_columns(&of(&[1])).is_err() && of(&[3, 2]).select_rows(&[3]).is_err());
    }
}
