//! TMP
use super::Span;
use crate::error::Result;
use candle_core::Tensor;
/// TMP
pub struct RowUpdate<'a> {
    pub rows: Span,
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub scale: f64,
}
/// TMP
pub fn add_low_rank_to_rows(y: &Tensor, x: &Tensor, updates: &[RowUpdate]) -> Result<()> {
    for u in updates {
        let x = x.narrow(0, u.rows.start, u.rows.len)?;
        let c = super::linear(&super::linear(&x, u.a, None)?, u.b, None)?.affine(u.scale, 0.0)?;
        let rows: Vec<u32> = (u.rows.start..u.rows.start + u.rows.len).map(|r| r as u32).collect();
        super::write_rows(y, &(y.narrow(0, u.rows.start, u.rows.len)? + c)?, &rows)?;
    }
    Ok(())
}
