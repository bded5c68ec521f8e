//! From rows to records: demonstrations, rankings and prompts, in the layouts that TRL and Hugging Face data sets use.
//!
//! | record | columns |
//! | --- | --- |
//! | [`Demonstration`] | `prompt` + `completion` (or `response`); `messages`; `conversations` (ShareGPT); `instruction` + `input` + `output` (Alpaca; Dolly's `context` and `response`); `text` |
//! | [`Ranking`] | `prompt` + `responses` + `ranks` or `scores`; `prompt` + `chosen` + `rejected`; `chosen` + `rejected`, whose common start is the prompt; each with an optional `margin`, `weight` and `agreement` |
//! | [`Labelled`] | `text` + `label`; `text` + `text_pair` + `label`; `sentence1` + `sentence2` + `label` |
//! | [`Prompt`] | `prompt`; `messages` or `conversations` (without the last answer); `instruction` + `input` |
//!
//! Columns of other names are not used, which training programs note once by name.
//!
//! A text is a string, taken as it is, or a list of `{role, content}`, to which the chat template applies. The two may be
//! mixed in a row (a `prompt` string beside `chosen` messages): then strings become messages. Answers that hold the whole conversation are not put behind
//! the prompt again. Messages may be JSON, as one text or one by one; a content may be a list of `{type: text, text}`; other fields of a message
//! (`tool_calls`, `reasoning_content`, `name`, ...) are given to the chat template as they are.
//!
//! Where texts are messages, `system` is the first turn unless there is one, Alpaca's `history` the turns before the instruction, `tools` and
//! `chat_template_kwargs` (structs or JSON) are variables of the chat template. Beside strings they are an error unless they are empty.
//!
//! Where a folder holds several splits, the one for training is read, or for evaluation that of validation or test (see [`super::splits`]).

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, RecordBatch};
use arrow::datatypes::SchemaRef;

use super::column::columns_used;
use super::labels;
use super::layout;
use super::notes;
pub use super::record::{
    Answered, Conversation, Demonstration, Labelled, Message, Origin, Prompt, Ranking, TemplateInputs, Text,
};
use super::splits::Pattern;
pub use super::table::Projection;
use super::table::{Rows, TableRows};
use crate::error::Result;

/// Some rows as they were read, with the answers found in them.
#[derive(Debug, Clone)]
pub struct AnsweredRows {
    /// The rows with all their columns.
    pub rows: Rows,
    /// The form of the answers.
    pub layout: AnswerLayout,
    /// One record a row.
    pub records: Vec<Answered>,
}

/// How many answers a row holds, and so which form their scores take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerLayout {
    /// One answer: one number a row.
    One,
    /// A list of answers: a list of numbers a row.
    List,
    /// The columns `chosen` and `rejected`: two numbers a row, in two columns.
    Pair,
}

/// The layouts of one kind of record: which columns they use, and how rows become records.
#[derive(Debug)]
pub struct Layouts<R> {
    /// Which columns are read.
    pub columns: Projection,
    decode: fn(&Rows) -> Result<Vec<R>>,
}

/// The layouts of demonstrations.
pub const DEMONSTRATIONS: Layouts<Demonstration> =
    Layouts { columns: Projection::Only(layout::DEMONSTRATION_COLUMNS), decode: layout::demonstrations };
/// The layouts of rankings.
pub const RANKINGS: Layouts<Ranking> =
    Layouts { columns: Projection::Only(layout::RANKING_COLUMNS), decode: layout::rankings };
/// The layouts of labelled texts.
pub const LABELLED: Layouts<Labelled> =
    Layouts { columns: Projection::Only(labels::COLUMNS), decode: labels::labelled };
/// The layouts of prompts.
pub const PROMPTS: Layouts<Prompt> =
    Layouts { columns: Projection::Only(layout::PROMPT_COLUMNS), decode: layout::prompts };
/// The same with the other columns of each row ([`Prompt::columns`]).
pub const PROMPTS_WITH_COLUMNS: Layouts<Prompt> =
    Layouts { columns: Projection::All, decode: layout::prompts_with_columns };

impl<R> Layouts<R> {
    /// One record a row, in their order; the first layout that the columns allow.
    ///
    /// # Errors
    /// Where no layout fits, or a row is not what its column promises.
    pub fn records(&self, rows: &Rows) -> Result<Vec<R>> {
        (self.decode)(rows)
    }

    /// Decodes no rows of a file, which finds missing columns and wrong types before work begins.
    pub(super) fn check(&self, file: &Arc<Path>, schema: &SchemaRef) -> Result<()> {
        self.records(&no_rows(file, schema)).map(drop)
    }

    /// The columns of a file that its records are not made of, but for those that only say where a row comes from.
    pub(super) fn unused_columns(&self, file: &Arc<Path>, schema: &SchemaRef) -> Vec<String> {
        if self.columns == Projection::All {
            // They are handed on with the record.
            return Vec::new();
        }
        let (_, used) = columns_used(|| self.records(&no_rows(file, schema)));
        let names = schema.fields().iter().map(|field| field.name());
        names.filter(|name| !used.contains(*name) && !is_provenance(name)).cloned().collect()
    }
}

/// The demonstrations in the files that `pattern` names (a file, a folder or a glob), in order.
///
/// # Errors
/// At once, where a file cannot be read or has none of the layouts; with the first record that is not what its column
/// promises (a null, a conversation in which the assistant does not speak), after which the iterator ends.
pub fn demonstrations<'p, P: Into<Pattern<'p>>>(
    pattern: P,
) -> Result<impl Iterator<Item = Result<Demonstration>> + use<'p, P>> {
    records(pattern.into(), DEMONSTRATIONS)
}

/// The rankings in the files that `pattern` names; errors as for [`demonstrations`].
pub fn rankings<'p, P: Into<Pattern<'p>>>(pattern: P) -> Result<impl Iterator<Item = Result<Ranking>> + use<'p, P>> {
    records(pattern.into(), RANKINGS)
}

/// The strings of one column of the files that `pattern` names, with where each stands.
pub fn names<'p>(pattern: impl Into<Pattern<'p>>, column: &str) -> Result<Vec<(Option<String>, Origin)>> {
    let mut all = Vec::new();
    for rows in TableRows::open(pattern)? {
        let rows = rows?;
        let names = rows.strings(column)?;
        let name = |row: usize| names.is_valid(row).then(|| names.value(row).to_string());
        all.extend((0..rows.batch.num_rows()).map(|row| (name(row), rows.origin(row))));
    }
    Ok(all)
}

/// The labelled texts in the files that `pattern` names; errors as for [`demonstrations`].
pub fn labelled<'p, P: Into<Pattern<'p>>>(pattern: P) -> Result<impl Iterator<Item = Result<Labelled>> + use<'p, P>> {
    records(pattern.into(), LABELLED)
}

/// The classes of the labelled texts in the files that `pattern` names, of which the column `label` alone is read.
///
/// # Errors
/// Where a file cannot be read or has none of the layouts, and where a row has no class.
pub fn classes(pattern: &str) -> Result<BTreeSet<String>> {
    let rows = TableRows::open(pattern)?;
    for (file, schema) in rows.schemas() {
        LABELLED.check(file, schema)?;
    }
    let mut found = BTreeSet::new();
    for rows in rows.only(Projection::Only(&["label"])) {
        found.extend(labels::classes(&rows?)?);
    }
    Ok(found)
}

/// The prompts in the files that `pattern` names; errors as for [`demonstrations`].
pub fn prompts<'p, P: Into<Pattern<'p>>>(pattern: P) -> Result<impl Iterator<Item = Result<Prompt>> + use<'p, P>> {
    records(pattern.into(), PROMPTS)
}

/// The rows of the files that `pattern` names, with all their columns and the prompt and answers found in them:
/// `prompt` + `completion`, `response`, `completions` or `responses`; or any layout of demonstrations or pairs.
pub fn answered<'p, P: Into<Pattern<'p>>>(
    pattern: P,
) -> Result<impl Iterator<Item = Result<AnsweredRows>> + use<'p, P>> {
    let rows = TableRows::open(pattern)?;
    for (file, schema) in rows.schemas() {
        layout::answered(&no_rows(file, schema))?;
    }
    Ok(until_error(rows.map(|rows| {
        let rows = rows?;
        let (layout, records) = layout::answered(&rows)?;
        Ok(AnsweredRows { rows, layout, records })
    })))
}

/// Adds a note with the columns of the files that are not used.
pub(super) fn note_unused(pattern: &str, unused: impl IntoIterator<Item = String>) {
    let names: BTreeSet<String> = unused.into_iter().map(|name| format!("`{name}`")).collect();
    if !names.is_empty() {
        let names = names.into_iter().collect::<Vec<_>>().join(", ");
        notes::add(format!("{pattern}: columns that are not used: {names}"));
    }
}

/// Whether a column of this name says where a row comes from and no more.
fn is_provenance(name: &str) -> bool {
    const NAMES: [&str; 12] =
        ["id", "idx", "index", "uuid", "source", "url", "license", "dataset", "language", "lang", "timestamp", "date"];
    NAMES.contains(&name) || name.ends_with("_id") || name.starts_with("__index_level_")
}

/// A file's columns without its rows.
fn no_rows(file: &Arc<Path>, schema: &SchemaRef) -> Rows {
    Rows { file: file.clone(), first_row: 0, batch: RecordBatch::new_empty(schema.clone()) }
}

/// The records in the files that `pattern` names; errors as for [`demonstrations`].
pub fn records<R: 'static>(pattern: Pattern, layouts: Layouts<R>) -> Result<impl Iterator<Item = Result<R>> + use<R>> {
    let rows = TableRows::open(pattern)?.only(layouts.columns);
    for (file, schema) in rows.schemas() {
        layouts.check(file, schema)?;
    }
    Ok(until_error(rows.flat_map(move |rows| match rows.and_then(|rows| layouts.records(&rows)) {
        Ok(records) => records.into_iter().map(Ok).collect::<Vec<_>>(),
        Err(error) => vec![Err(error)],
    })))
}

/// Ends an iterator after its first error.
fn until_error<T>(items: impl Iterator<Item = Result<T>>) -> impl Iterator<Item = Result<T>> {
    let mut failed = false;
    items.take_while(move |item| !std::mem::replace(&mut failed, item.is_err()))
}
