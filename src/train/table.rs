//! Aligned tables for the terminal.

use std::fmt;

/// A table of text: the first column flush left, the others, below a header and a line, flush right. Without a header
/// they are values of many kinds, some long, and flush left.
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

    /// Rows as columns and columns as rows, the names of the columns becoming those of the rows.
    pub fn transposed(&self) -> Table {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cell = |row: &Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
        let rows = (0..columns).map(|column| self.rows.iter().map(|row| cell(row, column)).collect()).collect();
        Table { rows, has_header: self.has_header }
    }

    /// Of each column, whether there are only numbers below its name, whatever stands behind them.
    pub fn numeric(&self) -> Vec<bool> {
        let (header, rows) = self.parts();
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(header.len());
        let is_number = |cell: &String| {
            cell.trim_start_matches(['-', '+', '−']).chars().next().is_none_or(|first| first.is_ascii_digit())
        };
        (0..columns).map(|column| rows.iter().filter_map(|row| row.get(column)).all(is_number)).collect()
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
                line += if column == 0 { "" } else { "  " };
                line += &match column == 0 || !self.has_header {
                    true => format!("{cell:<width$}"),
                    false => format!("{cell:>width$}"),
                };
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
    fn rows_become_columns_and_columns_of_numbers_are_known() {
        let mut table = Table::new(["", "a", "b"]);
        table.row(["rate", "1.0% [0.5, 2.0]", "-"]).row(["kind", "-2", "none"]).row(["short"]);
        assert_eq!(table.numeric(), [false, true, false]);
        let transposed = table.transposed();
        let expected = [["a", "1.0% [0.5, 2.0]", "-2", ""], ["b", "-", "none", ""]].map(|row| row.map(String::from));
        assert_eq!(
            (transposed.parts().0, transposed.parts().1),
            (&["", "rate", "kind", "short"].map(String::from)[..], &expected.map(Vec::from)[..])
        );
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_in_characters() {
        let mut table = Table::new(["", "ä"]);
        table.row(["naïve", "1"]).row(["x"]).row(["y", "10", "extra"]);
        assert_eq!(table.to_string(), "        ä\n-----  --  -----\nnaïve   1\nx\ny      10  extra\n");
    }
}
