//! Rows in place: writing them into a buffer, reading them from a result.

use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};
use half::bf16;

use super::matrix::{has_kernel, with_elements};
use crate::error::Result;

/// Writes row `i` of `values` `[n, d]` over row `rows[i]` of `buffer` `[capacity, d]`, rounded to the nearest where
/// that is bf16 (ties to even). Neither may be part of a graph.
pub fn write_rows(buffer: &Tensor, values: &Tensor, rows: &[u32]) -> Result<()> {
    if buffer.device().is_cpu() {
        return Ok(buffer.inplace_op2(&values.contiguous()?, &WriteRows { rows })?);
    }
    let values = values.to_dtype(buffer.dtype())?.contiguous()?;
    for (index, &row) in rows.iter().enumerate() {
        buffer.slice_set(&values.narrow(0, index, 1)?, 0, row as usize)?;
    }
    Ok(())
}

/// Runs `read` on the numbers of a tensor, row by row, which are copied only where they are not such in main memory.
pub fn with_numbers<T>(x: &Tensor, read: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    if has_kernel(&[x]) {
        return with_elements(x, read);
    }
    read(&x.flatten_all()?.to_vec1::<f32>()?)
}

struct WriteRows<'a> {
    rows: &'a [u32],
}

impl InplaceOp2 for WriteRows<'_> {
    fn name(&self) -> &'static str {
        "write-rows"
    }

    fn cpu_fwd(
        &self,
        buffer: &mut CpuStorage,
        buffer_layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (capacity, width) = buffer_layout.shape().dims2()?;
        let (Some((buffer_start, buffer_end)), Some((start, end))) =
            (buffer_layout.contiguous_offsets(), values_layout.contiguous_offsets())
        else {
            candle_core::bail!("write-rows needs contiguous tensors");
        };
        if values_layout.dims() != [self.rows.len(), width] || self.rows.iter().any(|&row| row as usize >= capacity) {
            candle_core::bail!("write-rows: {:?} does not fit {:?}", values_layout.shape(), buffer_layout.shape());
        }
        let CpuStorage::F32(values) = values else { candle_core::bail!("write-rows is for rows of f32") };
        let rows = self.rows.iter().map(|&row| row as usize).zip(values[start..end].chunks_exact(width));
        match buffer {
            CpuStorage::F32(buffer) => {
                let buffer = &mut buffer[buffer_start..buffer_end];
                rows.for_each(|(row, values)| buffer[row * width..][..width].copy_from_slice(values));
            }
            CpuStorage::BF16(buffer) => {
                let buffer = &mut buffer[buffer_start..buffer_end];
                rows.for_each(|(row, values)| {
                    let kept = buffer[row * width..][..width].iter_mut();
                    kept.zip(values).for_each(|(kept, &value)| *kept = bf16::from_f32(value));
                });
            }
            _ => candle_core::bail!("write-rows is for buffers of f32 or bf16"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn rows_are_rounded_to_the_nearest_where_the_buffer_is_bf16() -> Result<()> {
        let buffer = Tensor::zeros((2, 5), candle_core::DType::BF16, &Device::Cpu)?;
        // Of 8 bits of mantissa: one that is held, two halfway between neighbours (to the even one), just
        // above halfway, and -0.
        let (half_to_one, half_to_two) = (1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0);
        let values = Tensor::new(&[[-2.5f32, half_to_one, half_to_two, half_to_one + 1e-6, -0.0]], &Device::Cpu)?;
        write_rows(&buffer, &values, &[1])?;
        let rows = buffer.to_dtype(candle_core::DType::F32)?.to_vec2::<f32>()?;
        assert_eq!(rows, [[0.0; 5], [-2.5, 1.0, 1.0 + 4.0 / 256.0, 1.0 + 2.0 / 256.0, 0.0]]);
        assert!(rows[1][4].is_sign_negative());
        Ok(())
    }

    #[test]
    fn only_the_named_rows_change() -> Result<()> {
        let buffer = Tensor::zeros((4, 2), candle_core::DType::F32, &Device::Cpu)?;
        let values = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?;
        write_rows(&buffer, &values, &[2, 0])?;
        assert_eq!(buffer.to_vec2::<f32>()?, [[3., 4.], [0., 0.], [1., 2.], [0., 0.]]);
        assert!(write_rows(&buffer, &values, &[1, 4]).is_err());
        Ok(())
    }
}
