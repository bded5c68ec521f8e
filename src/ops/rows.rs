//! Rows in place: writing them into a buffer, reading them from a result.

use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};

use super::matrix::{has_kernel, with_elements};
use crate::error::Result;

/// Writes row `i` of `values` `[n, d]` over row `rows[i]` of `buffer` `[capacity, d]`. Neither may be part of a graph.
pub fn write_rows(buffer: &Tensor, values: &Tensor, rows: &[u32]) -> Result<()> {
    if buffer.device().is_cpu() {
        return Ok(buffer.inplace_op2(&values.contiguous()?, &WriteRows { rows })?);
    }
    let values = values.contiguous()?;
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
        let (CpuStorage::F32(buffer), CpuStorage::F32(values)) = (buffer, values) else {
            candle_core::bail!("write-rows is for f32");
        };
        let buffer = &mut buffer[buffer_start..buffer_end];
        for (row, values) in self.rows.iter().zip(values[start..end].chunks_exact(width)) {
            buffer[*row as usize * width..][..width].copy_from_slice(values);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

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
