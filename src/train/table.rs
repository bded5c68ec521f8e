//! Aligned tables for the terminal.

use std::fmt;

/// A table of text: the first column flush left, the others flush right, a line below the header.
///
/// ```
/// use rlhf::train::table::Table;
/// let mut table = Table::new(["model", "accuracy"]);
/// table.row(["base", "51.0%"]).row(["reward", "7.5%"]);
/// assert_eq!(table.to_string(), "model   accuracy\n------  --------\nbase       51.0%\nreward      7.5%\n");
/// ```
#[derive(Debug, Clone, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
    has_header: bool,
}

impl Table {
    /// A table with these names of columns.
    pub fn new(header: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Table { rows: vec![header.into_iter().map(Into::into).collect()], has_header: true }
    }

    /// A table without names of columns.
    pub fn without_header() -> Self {
        Table::default()
    }

    /// Appends a row; it may be shorter or longer than the others.
    pub fn row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) -> &mut Self {
        self.rows.push(cells.into_iter().map(Into::into).collect());
        self
    }

    /// The names of the columns (none without a header), and the rows below them.
    pub fn parts(&self) -> (&[String], &[Vec<String>]) {
        match self.rows.split_first() {
            Some((header, rows)) if self.has_header => (header, rows),
            _ => (&[], &self.rows),
        }
    }

    /// The table in Markdown, numbers flush right.
    pub fn markdown(&self) -> String {
        let (header, rows) = self.parts();
        let columns = self.widths().len();
        let line = |cells: &[String]| {
            let cells =
                (0..columns).map(|column| cells.get(column).map_or(String::new(), |cell| cell.replace('|', "\\|")));
            format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
        };
        let rule = (0..columns).map(|column| if column == 0 { " --- |" } else { " ---: |" });
        let rule = format!("|{}\n", rule.collect::<String>());
        std::iter::once(line(header)).chain([rule]).chain(rows.iter().map(|row| line(row))).collect()
    }

    fn widths(&self) -> Vec<usize> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| self.rows.iter().filter_map(|row| Some(row.get(column)?.chars().count())).max();
        (0..columns).map(|column| width(column).unwrap_or(0)).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        for (index, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                line += &if column == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
            }
            writeln!(f, "{}", line.trim_end())?;
            if index == 0 && self.has_header {
                let rule: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
                writeln!(f, "{}", rule.join("  "))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_has_a_rule_below_the_header_and_no_bar_within_a_cell() {
        let mut table = Table::new(["model", "rate"]);
        table.row(["a|b", "1"]).row(["c"]);
        assert_eq!(table.markdown(), "| model | rate |\n| --- | ---: |\n| a\\|b | 1 |\n| c |  |\n");
        assert_eq!(table.parts().1.len(), 2);
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_in_characters() {
        let mut table = Table::new(["", "ä"]);
        table.row(["naïve", "1"]).row(["x"]).row(["y", "10", "extra"]);
        assert_eq!(table.to_string(), "        ä\n-----  --  -----\nnaïve   1\nx\ny      10  extra\n");
    }
}
