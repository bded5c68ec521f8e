//! Texts that people have judged: what a scorer's numbers are worth.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BooleanArray, Float64Array, LargeStringArray, RecordBatch, StringArray};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::agreement::ScoredTexts;
use super::kept::verdict_columns;
use super::question::check_finite;
use super::scorer::{Subject, Verdict};
use crate::bail;
use crate::data::column::Lists;
use crate::data::parquet;
use crate::data::splits::Pattern;
use crate::data::table::{Rows, TableRows};
use crate::error::{Error, Result};
use crate::settings::Flags;

const HEADING: &str = "Agreement of the scorers with people";

/// Where labels are and what they mean.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct LabelledSettings {
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of texts that people have judged; the scorers are compared with them
    #[arg(long, help_heading = HEADING, value_name = "FILES")]
    pub labelled: Option<String>,
    /// Column of the judged texts, or of lists of them [default: the first of text, response, responses, claim, summary, continuation, answer that there is]
    #[arg(long, help_heading = HEADING, value_name = "COLUMN")]
    pub text_column: Option<String>,
    /// Column of what each text has to stay within [default: the first of source_document, document, knowledge, passage, context, prompt that there is]
    #[arg(long, help_heading = HEADING, value_name = "COLUMN")]
    pub source_column: Option<String>,
    /// Column of the labels, or of lists of them
    #[arg(long, help_heading = HEADING, value_name = "COLUMN", default_value = "label")]
    pub label_column: String,
    /// Labels of the texts that are toxic or hallucinated: values, as in yes or 1,2, or a bound, as in '>=0.5' or '<=-0.5'
    #[arg(long, help_heading = HEADING, value_name = "LABELS", default_value = "1", allow_hyphen_values = true)]
    pub positive: Positive,
    /// Columns by which the texts are split too, as in category, source, models
    #[arg(long, help_heading = HEADING, value_name = "COLUMN", num_args = 1..)]
    #[serde(default)]
    pub group_columns: Vec<String>,
}

impl LabelledSettings {
    /// When they are read.
    pub(super) fn flags() -> Flags<Self> {
        let of = &["text_column", "source_column", "label_column", "positive", "group_columns"];
        Flags::new().always(&["labelled"]).only("with --labelled", of, |settings: &Self| settings.labelled.is_some())
    }
}

/// Which labels count as toxic or hallucinated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Positive {
    /// These.
    AnyOf(Vec<String>),
    /// Numbers from this one on.
    AtLeast(f64),
    /// Numbers up to this one: the label says how good a text is.
    AtMost(f64),
}

impl FromStr for Positive {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| match text.trim().parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(number),
            _ => Err(format!("\"{text}\" is no number; expected a bound as in >=0.5")),
        };
        if let Some(bound) = text.strip_prefix(">=") {
            return number(bound).map(Positive::AtLeast);
        }
        if let Some(bound) = text.strip_prefix("<=") {
            return number(bound).map(Positive::AtMost);
        }
        match text.split(',').map(|label| label.trim().to_string()).collect::<Vec<_>>() {
            labels if labels.iter().any(String::is_empty) => Err("expected labels between the commas".to_string()),
            labels => Ok(Positive::AnyOf(labels)),
        }
    }
}

impl TryFrom<String> for Positive {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Positive {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Positive::AnyOf(labels) => formatter.write_str(&labels.join(",")),
            Positive::AtLeast(bound) => write!(formatter, ">={bound}"),
            Positive::AtMost(bound) => write!(formatter, "<={bound}"),
        }
    }
}

impl From<Positive> for String {
    fn from(positive: Positive) -> Self {
        positive.to_string()
    }
}

/// A text that people have judged.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelledText {
    /// The text.
    pub text: String,
    /// What it has to stay within; empty where nothing is given.
    pub source: String,
    /// Whether people call it toxic or hallucinated.
    pub is_positive: bool,
    /// The label as a number that is the higher the worse, where it is one.
    pub severity: Option<f64>,
    /// What it is by each of the columns to split by.
    pub groups: Vec<String>,
}

impl LabelledText {
    /// What a scorer sees of it.
    pub fn subject(&self) -> Subject<'_> {
        Subject { text: &self.text, source: &self.source }
    }
}

const TEXT_COLUMNS: [&str; 7] = ["text", "response", "responses", "claim", "summary", "continuation", "answer"];
const SOURCE_COLUMNS: [&str; 6] = ["source_document", "document", "knowledge", "passage", "context", "prompt"];
/// A right and a wrong answer to a question, as HaluEval has them: two texts a row, whose labels need no column.
const RIGHT_AND_WRONG: [&str; 2] = ["right_answer", "hallucinated_answer"];

/// Reads the texts. Those without text or label are left out.
pub fn read(pattern: &str, settings: &LabelledSettings) -> Result<Vec<LabelledText>> {
    let mut all = Vec::new();
    for rows in TableRows::open(Pattern::evaluation(pattern))? {
        all.extend(texts_of(&rows?, settings)?);
    }
    let positives = all.iter().filter(|text| text.is_positive).count();
    if positives == 0 || positives == all.len() {
        bail!(
            "{pattern}: {positives} of {} texts have a label of --positive {}; expected some and not all of them",
            all.len(),
            settings.positive
        );
    }
    Ok(all)
}

fn texts_of(rows: &Rows, settings: &LabelledSettings) -> Result<Vec<LabelledText>> {
    let source_column = match &settings.source_column {
        Some(column) => Some(column.as_str()),
        None => SOURCE_COLUMNS.into_iter().find(|column| rows.has(column)),
    };
    let sources = source_column.map(|column| rows.strings(column)).transpose()?;
    let groups = settings.group_columns.iter().map(|column| Cells::of(rows, column)).collect::<Result<Vec<_>>>()?;
    let text = |row: usize, index: usize, text: &str, label: Label| LabelledText {
        text: text.to_string(),
        source: sources.as_ref().filter(|of| of.is_valid(row)).map_or(String::new(), |of| of.value(row).to_string()),
        is_positive: label.is_positive(&settings.positive),
        severity: label.severity(&settings.positive),
        groups: groups
            .iter()
            .map(|cells| cells.get(row, index).map_or("none".to_string(), |label| label.to_string()))
            .collect(),
    };
    let mut all = Vec::new();
    if settings.text_column.is_none() && RIGHT_AND_WRONG.iter().all(|column| rows.has(column)) {
        for (column, is_positive) in RIGHT_AND_WRONG.into_iter().zip([false, true]) {
            let texts = rows.strings(column)?;
            let found =
                texts.iter().enumerate().filter_map(|(row, found)| Some(text(row, 0, found?, Label::Number(0.0))));
            all.extend(found.map(|text| LabelledText { is_positive, severity: None, ..text }));
        }
        return Ok(all);
    }
    let column = match &settings.text_column {
        Some(column) => column.as_str(),
        None => match TEXT_COLUMNS.into_iter().find(|column| rows.has(column)) {
            Some(column) => column,
            None => bail!(
                "{}: there is none of the columns {}; name the texts' with --text-column (the columns are {})",
                rows.file.display(),
                TEXT_COLUMNS.join(", "),
                rows.column_names()
            ),
        },
    };
    let (texts, labels) = (Cells::of(rows, column)?, Cells::of(rows, &settings.label_column)?);
    for row in 0..rows.batch.num_rows() {
        for index in 0..texts.count(row) {
            if let (Some(Label::Name(found)), Some(label)) = (texts.get(row, index), labels.get(row, index)) {
                if let Label::Number(number) = label {
                    check_finite(rows, row, &settings.label_column, Some(number))?;
                }
                all.push(text(row, index, &found, label));
            }
        }
    }
    Ok(all)
}

/// Every text with its label and all its scores, a row each: a column `text`, `source`, `label` (whether people call it toxic or hallucinated), `severity`, one for each of the columns to
/// split by, and one for each scorer, called as its rate.
pub const FILE: &str = "labelled.parquet";

/// Writes the texts into `folder`.
pub fn write(settings: &LabelledSettings, scored: &ScoredTexts, folder: &Path) -> Result<()> {
    let ScoredTexts { texts, scorers, verdicts } = scored;
    let strings = |of: &dyn Fn(&LabelledText) -> String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(texts.iter().map(of)))
    };
    let mut columns: Vec<(String, ArrayRef)> = vec![
        ("text".to_string(), strings(&|text| text.text.clone())),
        ("source".to_string(), strings(&|text| text.source.clone())),
        ("label".to_string(), Arc::new(texts.iter().map(|text| Some(text.is_positive)).collect::<BooleanArray>())),
        ("severity".to_string(), Arc::new(texts.iter().map(|text| text.severity).collect::<Float64Array>())),
    ];
    for (index, name) in settings.group_columns.iter().enumerate() {
        // A column by which texts are split may be called as one of ours, or be given twice.
        let mut name = name.clone();
        while columns.iter().any(|(taken, _)| *taken == name) || scorers.iter().any(|scorer| scorer.rate() == name) {
            name.push_str(" (group)");
        }
        columns.push((name, strings(&|text| text.groups[index].clone())));
    }
    for (scorer, verdicts) in scorers.iter().zip(verdicts) {
        let verdicts: Vec<Option<Verdict>> = verdicts.iter().copied().map(Some).collect();
        columns.extend(verdict_columns(scorer, &verdicts));
    }
    let columns = columns.into_iter().map(|(name, column)| (name, column, true));
    let batch =
        RecordBatch::try_from_iter_with_nullable(columns).map_err(|error| Error::input(format!("{FILE}: {error}")))?;
    parquet::write(folder.join(FILE), &batch)
}

/// What people say of a text.
#[derive(Debug, Clone, PartialEq)]
enum Label {
    Number(f64),
    Name(String),
}

impl fmt::Display for Label {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Label::Number(number) => number.fmt(formatter),
            Label::Name(name) => name.fmt(formatter),
        }
    }
}

impl Label {
    fn is_positive(&self, positive: &Positive) -> bool {
        match (positive, self) {
            (Positive::AnyOf(labels), label) => labels.contains(&label.to_string()),
            (Positive::AtLeast(bound), Label::Number(number)) => number >= bound,
            (Positive::AtMost(bound), Label::Number(number)) => number <= bound,
            (_, Label::Name(_)) => false,
        }
    }

    fn severity(&self, positive: &Positive) -> Option<f64> {
        match (positive, self) {
            (Positive::AtMost(_), Label::Number(number)) => Some(-number),
            (_, Label::Number(number)) => Some(*number),
            (_, Label::Name(_)) => None,
        }
    }
}

/// A column of texts or numbers, or of lists of them.
enum Cells {
    Texts(LargeStringArray),
    Numbers(Float64Array),
    TextLists(Lists<LargeStringArray>),
    NumberLists(Lists<Float64Array>),
}

impl Cells {
    fn of(rows: &Rows, column: &str) -> Result<Self> {
        if let Ok(texts) = rows.strings(column) {
            return Ok(Cells::Texts(texts));
        }
        if let Ok(lists) = rows.string_lists(column) {
            return Ok(Cells::TextLists(lists));
        }
        if let Ok(lists) = rows.float_lists(column) {
            return Ok(Cells::NumberLists(lists));
        }
        if let Ok(truths) = rows.booleans(column) {
            return Ok(Cells::Numbers(truths.iter().map(|truth| truth.map(f64::from)).collect()));
        }
        rows.floats(column).map(Cells::Numbers)
    }

    /// How many texts a row has.
    fn count(&self, row: usize) -> usize {
        match self {
            Cells::Texts(_) | Cells::Numbers(_) => 1,
            Cells::TextLists(lists) => lists.range(row).map_or(0, |range| range.len()),
            Cells::NumberLists(lists) => lists.range(row).map_or(0, |range| range.len()),
        }
    }

    /// The item of this index, or what holds for the whole row; `None` where there is none.
    fn get(&self, row: usize, index: usize) -> Option<Label> {
        let name =
            |texts: &LargeStringArray, at: usize| texts.is_valid(at).then(|| Label::Name(texts.value(at).to_string()));
        let number = |numbers: &Float64Array, at: usize| numbers.is_valid(at).then(|| Label::Number(numbers.value(at)));
        match self {
            Cells::Texts(texts) => name(texts, row),
            Cells::Numbers(numbers) => number(numbers, row),
            Cells::TextLists(lists) => name(&lists.values, lists.range(row)?.nth(index)?),
            Cells::NumberLists(lists) => number(&lists.values, lists.range(row)?.nth(index)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::Int64Array;
    use clap::Parser;

    use super::*;
    use crate::evaluate::grounding::Grounding;
    use crate::evaluate::scorer::Scorer;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        labelled: LabelledSettings,
    }

    fn settings(flags: &[&str]) -> LabelledSettings {
        Only::parse_from(["evaluate"].iter().chain(flags)).labelled
    }

    fn file_of(path: &Path, columns: Vec<(&str, ArrayRef)>) -> String {
        parquet::write(path, &RecordBatch::try_from_iter(columns).unwrap()).unwrap();
        path.display().to_string()
    }

    fn strings(values: &[Option<&str>]) -> ArrayRef {
        Arc::new(StringArray::from(values.to_vec()))
    }

    #[test]
    fn labels_are_positive_by_value_or_bound_and_as_severe_as_they_are_bad() {
        let number = Label::Number(-0.7);
        for (text, is_positive, severity) in
            [("-0.7", true, -0.7), (">=-0.5", false, -0.7), ("<=-0.5", true, 0.7), ("yes, -0.7", true, -0.7)]
        {
            let positive: Positive = text.parse().unwrap();
            assert_eq!(
                (number.is_positive(&positive), number.severity(&positive)),
                (is_positive, Some(severity)),
                "{text}"
            );
            assert_eq!(positive.to_string().parse::<Positive>().unwrap(), positive);
        }
        assert!(["", "a,,b", ">=x", "<=inf"].iter().all(|text| text.parse::<Positive>().is_err()));
    }

    #[test]
    fn columns_are_found_by_their_usual_names_and_texts_without_label_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let file = file_of(
            &folder.path().join("labelled.parquet"),
            vec![
                ("knowledge", strings(&[Some("k"), None, Some("l")])),
                ("response", strings(&[Some("one"), Some("two"), Some("three")])),
                ("label", Arc::new(Int64Array::from(vec![Some(1), Some(0), None]))),
                ("kind", strings(&[Some("x"), None, Some("y")])),
            ],
        );
        let found = read(&file, &settings(&["--group-columns", "kind"])).unwrap();
        let shown: Vec<_> =
            found.iter().map(|text| (&*text.text, &*text.source, text.is_positive, &*text.groups[0])).collect();
        assert_eq!(shown, [("one", "k", true, "x"), ("two", "", false, "none")]);
        let error = read(&file, &settings(&["--positive", "2"])).unwrap_err().to_string();
        assert!(error.contains("0 of 2 texts"), "{error}");
        let error = read(&file, &settings(&["--text-column", "texts"])).unwrap_err().to_string();
        assert!(error.contains("`texts`"), "{error}");
    }

    #[test]
    fn a_right_and_a_wrong_answer_are_two_texts() {
        let folder = tempfile::tempdir().unwrap();
        let file = file_of(
            &folder.path().join("pairs.parquet"),
            vec![
                ("knowledge", strings(&[Some("k")])),
                ("right_answer", strings(&[Some("one")])),
                ("hallucinated_answer", strings(&[Some("two")])),
            ],
        );
        let found = read(&file, &settings(&[])).unwrap();
        let shown: Vec<_> = found.iter().map(|text| (&*text.text, text.is_positive)).collect();
        assert_eq!(shown, [("one", false), ("two", true)]);
    }
    #[test]
    fn every_text_is_kept_with_its_label_and_its_scores() {
        let folder = tempfile::tempdir().unwrap();
        let text = |text: &str, is_positive: bool, severity: Option<f64>| LabelledText {
            text: text.to_string(),
            source: "Anna met Boris.".to_string(),
            is_positive,
            severity,
            groups: vec!["x".to_string()],
        };
        let texts = vec![text("They met Clara.", true, Some(2.0)), text("They met Boris.", false, None)];
        let scorers: [Box<dyn Scorer>; 1] = [Box::new(Grounding::default())];
        let scored = ScoredTexts::new(texts, &scorers).unwrap();
        super::write(&settings(&["--group-columns", "label"]), &scored, folder.path()).unwrap();
        let path = folder.path().join(FILE);
        let rows = TableRows::open(path.to_str().unwrap()).unwrap().next().unwrap().unwrap();
        assert_eq!(rows.floats("hallucination_by_grounding").unwrap().values(), &[1.0, 0.0]);
        assert_eq!(rows.booleans("label").unwrap().iter().collect::<Vec<_>>(), [Some(true), Some(false)]);
        assert_eq!(rows.floats("severity").unwrap().iter().collect::<Vec<_>>(), [Some(2.0), None]);
        assert_eq!(
            (rows.strings("text").unwrap().value(1), rows.strings("label (group)").unwrap().value(0)),
            ("They met Boris.", "x")
        );
        assert_eq!(rows.strings("source").unwrap().value(0), "Anna met Boris.");
    }
}
