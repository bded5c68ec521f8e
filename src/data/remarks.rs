//! What rankings may say beside their order: by how much, how much they count, how far labellers agreed.

use arrow::array::{Array, Float64Array};

use super::schema::{Ranking, Text};
use super::table::Rows;
use crate::error::Result;

/// The optional columns `margin`, `weight` and `agreement`.
pub(super) struct Remarks<'a> {
    rows: &'a Rows,
    margin: Option<Float64Array>,
    weight: Option<Float64Array>,
    agreement: Option<Float64Array>,
}

impl<'a> Remarks<'a> {
    pub(super) fn new(rows: &'a Rows) -> Result<Self> {
        let column = |name: &str| rows.has(name).then(|| rows.floats(name)).transpose();
        Ok(Remarks { rows, margin: column("margin")?, weight: column("weight")?, agreement: column("agreement")? })
    }

    /// The ranking of a row, with what the columns say of it.
    pub(super) fn ranking(&self, row: usize, prompt: Text, responses: Vec<Text>, ranks: Vec<i64>) -> Result<Ranking> {
        let margin = self.number(row, "margin", &self.margin, f64::MIN..=f64::MAX)?;
        let weight = self.number(row, "weight", &self.weight, 0.0..=f64::MAX)?.unwrap_or(1.0);
        let agreement = self.number(row, "agreement", &self.agreement, 0.0..=1.0)?;
        Ok(Ranking { prompt, responses, ranks, margin, weight, agreement, origin: self.rows.origin(row) })
    }

    fn number(
        &self,
        row: usize,
        name: &str,
        column: &Option<Float64Array>,
        range: std::ops::RangeInclusive<f64>,
    ) -> Result<Option<f32>> {
        let Some(column) = column.as_ref().filter(|column| column.is_valid(row)) else { return Ok(None) };
        let number = column.value(row);
        if range.contains(&number) {
            return Ok(Some(number as f32));
        }
        let expected = match name {
            "weight" => "a finite number of at least 0",
            "agreement" => "a share from 0 to 1",
            _ => "a finite number",
        };
        Err(self.rows.fault(row, name, format!("is {number}, expected {expected}")))
    }
}
