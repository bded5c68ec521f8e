//! Text for the terminal: aligned tables, and the plan that a program shows before it starts.

use std::fmt;

use indicatif::{DecimalBytes, HumanCount};

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

/// What a program is about to do, shown before it starts.
#[derive(Debug, Clone)]
pub struct Plan {
    title: String,
    lines: Table,
}

impl Plan {
    /// A plan under this title, such as the program's name and model.
    pub fn new(title: impl Into<String>) -> Self {
        Plan { title: title.into(), lines: Table::without_header() }
    }

    /// What the plan is of.
    pub fn title(&self) -> &str {
        &self.title
    }

    /// Adds a line: what, and how much or which.
    pub fn line(mut self, label: &str, value: impl fmt::Display) -> Self {
        self.lines.row([format!("  {label}"), value.to_string()]);
        self
    }

    /// Adds the number of the model's parameters and the share that is trained.
    pub fn parameters(self, all: usize, trainable: usize) -> Self {
        let share = 100.0 * trainable as f64 / (all.max(1)) as f64;
        self.line("parameters", HumanCount(all as u64))
            .line("trainable", format!("{} ({share:.2}%)", HumanCount(trainable as u64)))
    }

    /// Adds a count of tokens.
    pub fn tokens(self, label: &str, tokens: usize) -> Self {
        self.line(label, HumanCount(tokens as u64))
    }

    /// Adds the memory that the run is expected to need at its peak, in bytes.
    pub fn memory(self, bytes: u64) -> Self {
        self.line("memory expected", DecimalBytes(bytes))
    }

    /// Prints the plan to the standard error stream, unless `quiet`.
    pub fn print(&self, quiet: bool) {
        if !quiet {
            eprintln!("{self}");
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.title)?;
        self.lines.fmt(f)
    }
}

/// The bytes that training holds at its peak: the weights, for each trained parameter its gradient, the sum of the gradients
/// of earlier micro-batches and two moments of AdamW, and the activations of one micro-batch, all in `f32`.
pub fn training_memory(parameters: usize, trainable: usize, activations: usize) -> u64 {
    4 * (parameters as u64 + 4 * trainable as u64 + activations as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_in_characters() {
        let mut table = Table::new(["", "ä"]);
        table.row(["naïve", "1"]).row(["x"]).row(["y", "10", "extra"]);
        assert_eq!(table.to_string(), "        ä\n-----  --  -----\nnaïve   1\nx\ny      10  extra\n");
    }

    #[test]
    fn the_plan_states_parameters_trainable_share_tokens_and_memory() {
        let plan =
            Plan::new("sft").parameters(17_040_000, 170_400).tokens("training tokens", 1_250).memory(1_500_000_000);
        let expected = "sft
  parameters            17,040,000
  trainable        170,400 (1.00%)
  training tokens            1,250
  memory expected          1.50 GB
";
        assert_eq!(plan.to_string(), expected);
    }

    #[test]
    fn full_training_needs_five_numbers_a_parameter_beside_the_activations() {
        assert_eq!(training_memory(100, 100, 0), 2000);
        assert_eq!(training_memory(100, 1, 10), 456);
    }
}
