//! A part of the report: what one kind of measurement found, for the terminal, for files and for the page.

use serde_json::Value;

use crate::bootstrap::Estimate;
use crate::figure::Figure;
use crate::train::table::Table;

/// What one kind of measurement found.
#[derive(Debug, Clone, Default)]
pub struct Section {
    /// Its name in `evaluation.json`.
    pub key: &'static str,
    /// Its title.
    pub title: String,
    /// What was measured and how, a paragraph each.
    pub notes: Vec<String>,
    /// Tables, each with its caption.
    pub tables: Vec<(String, Table)>,
    /// Figures.
    pub figures: Vec<Figure>,
    /// Figures that were drawn before, as SVG, each with its caption.
    pub drawn: Vec<(String, String)>,
    /// Everything, for programs.
    pub json: Value,
}

impl Section {
    /// Notes and tables, with the same for programs.
    pub(super) fn new(
        key: &'static str,
        title: &str,
        notes: Vec<String>,
        tables: Vec<(String, Table)>,
        json: impl Into<Value>,
    ) -> Self {
        Section { key, title: title.to_string(), notes, tables, json: json.into(), ..Section::default() }
    }
}

/// A share with its interval, in a table.
pub(super) fn share(estimate: Option<Estimate>) -> String {
    estimate.map_or(String::new(), |Estimate { value, low, high }| {
        format!("{:.1}% [{:.1}, {:.1}]", 100.0 * value, 100.0 * low, 100.0 * high)
    })
}

/// A number with its interval, in a table.
pub(super) fn number(estimate: Option<Estimate>) -> String {
    estimate.map_or(String::new(), |Estimate { value, low, high }| format!("{value:.3} [{low:.3}, {high:.3}]"))
}
