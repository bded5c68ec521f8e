//! What is asked, what is known of each question, and the answers that others gave.

use std::collections::HashMap;

use arrow::array::Array;

use crate::bail;
use crate::data::schema::{self, Origin, Text};
use crate::data::splits::Pattern;
use crate::data::table::{Rows, TableRows};
use crate::error::Result;
use crate::world::files::cases_of;
use crate::world::rule::Case;

/// A prompt, with what the data says of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// What the model reads.
    pub prompt: Text,
    /// What kind of prompt it is, by which rates are split: the column `prompt_type`, or the kind of a prompt of the world.
    pub group: Option<String>,
    /// What decides whether an answer is right, for a prompt of the embedded world.
    pub case: Option<Case>,
    /// How toxic the prompt itself is, from 0 to 1, where the data says so.
    pub toxicity: Option<f64>,
    /// Where it was read.
    pub origin: Origin,
}

impl Question {
    /// A prompt of which nothing more is known.
    pub fn new(prompt: Text, origin: Origin) -> Self {
        Question { prompt, group: None, case: None, toxicity: None, origin }
    }

    /// The prompt as text; of messages the contents, a line each.
    pub fn text(&self) -> String {
        self.prompt.contents().collect::<Vec<_>>().join("\n")
    }
}

/// An answer that somebody gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GivenAnswer {
    /// Its text.
    pub text: String,
    /// What the data says it is worth, where there is a column of scores.
    pub score: Option<f64>,
    /// Whether it ended by itself, where the data say so.
    pub ended: Option<bool>,
}

/// The answers of a file: who gave which to what.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GivenAnswers {
    /// Who answered, in the order in which they appear.
    pub models: Vec<String>,
    /// What was asked, in the order in which it appears.
    pub questions: Vec<Question>,
    /// `[model][question][answer]`; a model may have answered a question several times or not at all.
    pub answers: Vec<Vec<Vec<GivenAnswer>>>,
}

/// Reads prompts: any layout of prompts, with the columns `kind`, `facts` and `expected` of the world's own, `prompt_type` and `toxicity` where they are there.
pub fn questions(pattern: &str) -> Result<Vec<Question>> {
    let mut all: Vec<Question> = (schema::prompts(Pattern::evaluation(pattern))?)
        .map(|prompt| {
            let prompt = prompt?;
            Ok(Question::new(prompt.prompt, prompt.origin))
        })
        .collect::<Result<_>>()?;
    let mut rest = all.iter_mut();
    for rows in TableRows::open(Pattern::evaluation(pattern))? {
        let known = Known::of(&rows?)?;
        for (question, known) in rest.by_ref().zip(known) {
            known.add_to(question);
        }
    }
    Ok(all)
}

/// Refuses a number that is none, from which means and comparisons would be none either.
pub(super) fn check_finite(rows: &Rows, row: usize, column: &str, number: Option<f64>) -> Result<()> {
    match number {
        Some(number) if !number.is_finite() => bail!(
            "{}, column `{column}`: is {number}; expected a finite number, or null where there is none",
            rows.origin(row)
        ),
        _ => Ok(()),
    }
}

/// What a row says of its prompt.
#[derive(Debug, Clone, Default)]
struct Known {
    group: Option<String>,
    case: Option<Case>,
    toxicity: Option<f64>,
}

impl Known {
    fn of(rows: &Rows) -> Result<Vec<Known>> {
        let mut all = vec![Known::default(); rows.batch.num_rows()];
        if ["kind", "facts", "expected"].iter().all(|column| rows.has(column)) {
            for (known, case) in all.iter_mut().zip(cases_of(rows)?) {
                known.group = Some(case.kind.name().to_string());
                known.case = Some(case);
            }
        }
        if rows.has("prompt_type") {
            let groups = rows.strings("prompt_type")?;
            all.iter_mut().zip(&groups).for_each(|(known, group)| known.group = group.map(String::from));
        }
        if rows.has("toxicity") {
            let numbers = rows.floats("toxicity")?;
            for (row, number) in numbers.iter().enumerate() {
                check_finite(rows, row, "toxicity", number)?;
            }
            all.iter_mut().zip(&numbers).for_each(|(known, toxicity)| known.toxicity = toxicity);
        }
        Ok(all)
    }

    fn add_to(self, question: &mut Question) {
        let Known { group, case, toxicity } = self;
        (question.group, question.case, question.toxicity) = (group, case, toxicity);
    }
}

/// Reads answers that were made elsewhere: the columns `model`, `prompt` and `response` (or `completion`), a row an
/// answer; or `prompt` with the lists `models` and `responses` (or `completions`). Without a column of models they are
/// called by the name of their file, as those that `sample` and `score --best` write. A column of numbers `score`, or
/// of lists `scores`, is what each is worth; `ended` says whether each ended by itself; the other columns are those of
/// [`questions`].
///
/// Rows of the same prompt and kind are answers to the same question.
pub fn given_answers(pattern: &str) -> Result<GivenAnswers> {
    let mut given = GivenAnswers::default();
    let mut numbers = Numbers::default();
    for rows in TableRows::open(Pattern::all(pattern))? {
        let rows = rows?;
        let prompts = rows.texts("prompt")?;
        for (row, (known, answers)) in Known::of(&rows)?.into_iter().zip(answers_of(&rows)?).enumerate() {
            let origin = rows.origin(row);
            let prompt = match prompts.get(row) {
                Ok(Some(prompt)) => prompt,
                Ok(None) => bail!("{origin}, column `prompt`: is null; expected what was answered"),
                Err(reason) => bail!("{origin}, column `prompt`: {reason}"),
            };
            let mut question = Question::new(prompt, origin);
            known.add_to(&mut question);
            for (model, answer) in answers {
                numbers.push(&mut given, &question, model, answer);
            }
        }
    }
    Ok(given)
}

/// The numbers that models and questions have got.
#[derive(Debug, Default)]
struct Numbers {
    models: HashMap<String, usize>,
    questions: HashMap<(String, Option<String>), usize>,
}

impl Numbers {
    fn push(&mut self, given: &mut GivenAnswers, question: &Question, model: String, answer: GivenAnswer) {
        let GivenAnswers { models, questions, answers } = given;
        let number = *self.questions.entry((question.text(), question.group.clone())).or_insert_with(|| {
            questions.push(question.clone());
            questions.len() - 1
        });
        let model = *self.models.entry(model).or_insert_with_key(|model| {
            models.push(model.clone());
            answers.push(Vec::new());
            models.len() - 1
        });
        answers.iter_mut().for_each(|of_model| of_model.resize(questions.len(), Vec::new()));
        answers[model][number].push(answer);
    }
}

/// Of each row, who answered what.
fn answers_of(rows: &Rows) -> Result<Vec<Vec<(String, GivenAnswer)>>> {
    match rows.has("responses") || rows.has("completions") {
        true => listed_answers(rows),
        false => single_answers(rows),
    }
}

/// What the answers of a file are called that does not say who gave them.
fn name_of_file(rows: &Rows) -> String {
    rows.file.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}

fn single_answers(rows: &Rows) -> Result<Vec<Vec<(String, GivenAnswer)>>> {
    let column = if rows.has("completion") && !rows.has("response") { "completion" } else { "response" };
    let texts = rows.texts(column)?;
    let ended = rows.has("ended").then(|| rows.booleans("ended")).transpose()?;
    let models = rows.has("model").then(|| rows.strings("model")).transpose()?;
    let scores = rows.has("score").then(|| rows.floats("score")).transpose()?;
    let answer = |row: usize| {
        let model = match &models {
            Some(models) if models.is_null(row) => {
                bail!("{}, column `model`: is null; expected a name", rows.origin(row))
            }
            Some(models) => models.value(row).to_string(),
            None => name_of_file(rows),
        };
        let text = match texts.get(row) {
            // Messages are those of the assistant, as the best of several answers are written behind messages.
            Ok(Some(text)) => text.contents().collect::<Vec<_>>().join("\n"),
            Ok(None) => bail!("{}, column `{column}`: is null; expected a text", rows.origin(row)),
            Err(reason) => bail!("{}, column `{column}`: {reason}", rows.origin(row)),
        };
        let score = scores.as_ref().filter(|scores| scores.is_valid(row)).map(|scores| scores.value(row));
        check_finite(rows, row, "score", score)?;
        let ended = ended.as_ref().filter(|ended| ended.is_valid(row)).map(|ended| ended.value(row));
        Ok(vec![(model, GivenAnswer { text, score, ended })])
    };
    (0..rows.batch.num_rows()).map(answer).collect()
}

fn listed_answers(rows: &Rows) -> Result<Vec<Vec<(String, GivenAnswer)>>> {
    let column = if rows.has("responses") { "responses" } else { "completions" };
    let texts = rows.string_lists(column)?;
    let ended = rows.has("ended").then(|| rows.boolean_lists("ended")).transpose()?;
    let models = rows.has("models").then(|| rows.string_lists("models")).transpose()?;
    let scores = rows.has("scores").then(|| rows.float_lists("scores")).transpose()?;
    let answers = |row: usize| {
        let of_texts = texts.range(row).unwrap_or_default();
        let of_models = models.as_ref().map(|models| models.range(row).unwrap_or_default());
        let of_scores = scores.as_ref().map(|scores| scores.range(row).unwrap_or_default());
        let of_ended = ended.as_ref().map(|ended| ended.range(row).unwrap_or_default());
        for (other, range) in [("models", &of_models), ("scores", &of_scores), ("ended", &of_ended)] {
            if let Some(range) = range.as_ref().filter(|range| range.len() != of_texts.len()) {
                bail!(
                    "{}: the list `{column}` has {} items and `{other}` {}; expected as many of each",
                    rows.origin(row),
                    of_texts.len(),
                    range.len()
                );
            }
        }
        let answer = |index: usize| {
            let null =
                |column: &str| bail!("{}: item {index} of `{column}` is null; expected a text", rows.origin(row));
            let model = match of_models.as_ref().zip(models.as_ref()) {
                Some((range, models)) if models.values.is_null(range.start + index) => return null("models"),
                Some((range, models)) => models.values.value(range.start + index).to_string(),
                None => name_of_file(rows),
            };
            if texts.values.is_null(of_texts.start + index) {
                return null(column);
            }
            let scores = of_scores.as_ref().zip(scores.as_ref());
            let score = scores.map(|(range, scores)| (&scores.values, range.start + index));
            let score = score.filter(|(values, at)| values.is_valid(*at)).map(|(values, at)| values.value(at));
            check_finite(rows, row, "scores", score)?;
            let ended =
                of_ended.as_ref().zip(ended.as_ref()).map(|(range, ended)| (&ended.values, range.start + index));
            let ended = ended.filter(|(values, at)| values.is_valid(*at)).map(|(values, at)| values.value(at));
            Ok((model, GivenAnswer { text: texts.values.value(of_texts.start + index).to_string(), score, ended }))
        };
        (0..of_texts.len()).map(answer).collect()
    };
    (0..rows.batch.num_rows()).map(answers).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Float64Array, Float64Builder, ListBuilder, RecordBatch, StringArray, StringBuilder};

    use super::*;
    use crate::data::parquet;

    fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) -> String {
        parquet::write(path, &RecordBatch::try_from_iter(columns).unwrap()).unwrap();
        path.display().to_string()
    }

    fn strings(values: &[&str]) -> ArrayRef {
        Arc::new(StringArray::from(values.to_vec()))
    }

    fn string_lists(lists: &[&[&str]]) -> ArrayRef {
        let mut builder = ListBuilder::new(StringBuilder::new());
        lists.iter().for_each(|list| builder.append_value(list.iter().map(Some)));
        Arc::new(builder.finish())
    }

    fn number_lists(lists: &[&[f64]]) -> ArrayRef {
        let mut builder = ListBuilder::new(Float64Builder::new());
        lists.iter().for_each(|list| builder.append_value(list.iter().map(|&number| Some(number))));
        Arc::new(builder.finish())
    }

    #[test]
    fn rows_and_lists_of_answers_are_the_same_answers() {
        let folder = tempfile::tempdir().unwrap();
        let rows = write(
            &folder.path().join("rows.parquet"),
            vec![
                ("model", strings(&["a", "b", "b", "a"])),
                ("prompt", strings(&["p", "p", "q", "p"])),
                ("prompt_type", strings(&["basic", "basic", "basic", "biased"])),
                ("response", strings(&["1", "2", "3", "4"])),
                ("score", Arc::new(Float64Array::from(vec![Some(0.1), Some(0.2), Some(0.3), Some(0.4)]))),
            ],
        );
        let lists = write(
            &folder.path().join("lists.parquet"),
            vec![
                ("prompt", strings(&["p", "q", "p"])),
                ("prompt_type", strings(&["basic", "basic", "biased"])),
                ("models", string_lists(&[&["a", "b"], &["b"], &["a"]])),
                ("responses", string_lists(&[&["1", "2"], &["3"], &["4"]])),
                ("scores", number_lists(&[&[0.1, 0.2], &[0.3], &[0.4]])),
            ],
        );
        let (rows, lists) = (given_answers(&rows).unwrap(), given_answers(&lists).unwrap());
        assert_eq!(rows.models, ["a", "b"]);
        assert_eq!(rows.answers, lists.answers);
        let texts: Vec<(String, Option<String>)> =
            rows.questions.iter().map(|question| (question.text(), question.group.clone())).collect();
        let expected = [("p", "basic"), ("q", "basic"), ("p", "biased")];
        assert_eq!(texts, expected.map(|(prompt, group)| (prompt.to_string(), Some(group.to_string()))));
        let answer = |text: &str, score| vec![GivenAnswer { text: text.into(), score: Some(score), ended: None }];
        assert_eq!(rows.answers[0], [answer("1", 0.1), vec![], answer("4", 0.4)]);
        assert_eq!(rows.answers[1], [answer("2", 0.2), answer("3", 0.3), vec![]]);
    }

    #[test]
    fn a_score_that_is_no_number_is_refused_by_row() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.parquet");
        let texts = || strings(&["p", "q"]);
        for bad in [f64::NAN, f64::INFINITY] {
            let numbers = || -> ArrayRef { Arc::new(Float64Array::from(vec![Some(0.5), Some(bad)])) };
            let answers = write(&path, vec![("prompt", texts()), ("response", texts()), ("score", numbers())]);
            let error = given_answers(&answers).unwrap_err().to_string();
            assert!(error.contains("row 1") && error.contains("`score`"), "{error}");
            let lists = vec![
                ("prompt", strings(&["p"])),
                ("responses", string_lists(&[&["1", "2"]])),
                ("scores", number_lists(&[&[1.0, bad]])),
            ];
            assert!(given_answers(&write(&path, lists)).unwrap_err().to_string().contains("`scores`"));
            let prompts = write(&path, vec![("prompt", texts()), ("toxicity", numbers())]);
            assert!(questions(&prompts).unwrap_err().to_string().contains("`toxicity`"));
        }
    }

    #[test]
    fn lists_of_different_lengths_are_refused_by_row() {
        let folder = tempfile::tempdir().unwrap();
        let lists = write(
            &folder.path().join("lists.parquet"),
            vec![
                ("prompt", strings(&["p", "q"])),
                ("models", string_lists(&[&["a"], &["a", "b"]])),
                ("responses", string_lists(&[&["1"], &["2"]])),
            ],
        );
        let error = given_answers(&lists).unwrap_err().to_string();
        assert!(error.contains("row 1") && error.contains("1 items and `models` 2"), "{error}");
    }

    #[test]
    fn answers_of_nobody_are_called_by_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let columns = || vec![("prompt", strings(&["p"])), ("responses", string_lists(&[&["1", "2"]]))];
        for name in ["first.parquet", "second.parquet"] {
            write(&folder.path().join(name), columns());
        }
        let given = given_answers(folder.path().to_str().unwrap()).unwrap();
        assert_eq!(given.models, ["first", "second"]);
        assert_eq!((given.questions.len(), given.answers[1][0].len()), (1, 2));
    }

    #[test]
    fn an_answer_may_be_a_message_and_say_whether_it_ended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("best.jsonl");
        let row = |said: &str, ended: &str| {
            let message = |role: &str, content: &str| format!(r#"[{{"role": "{role}", "content": "{content}"}}]"#);
            let (prompt, said) = (message("user", "p"), message("assistant", said));
            format!(r#"{{"prompt": {prompt}, "completion": {said}, "ended": {ended}}}"#)
        };
        std::fs::write(&path, [row("1", "true"), row("2", "false"), row("3", "null")].join("\n")).unwrap();
        let given = given_answers(path.to_str().unwrap()).unwrap();
        let answer = |text: &str, ended| GivenAnswer { text: text.into(), score: None, ended };
        let expected = [answer("1", Some(true)), answer("2", Some(false)), answer("3", None)];
        assert_eq!((&given.models[..], &given.answers[0][0][..]), (&["best".to_string()][..], &expected[..]));
    }

    #[test]
    fn prompts_of_any_data_are_questions_with_what_the_data_says_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = write(
            &folder.path().join("prompts.parquet"),
            vec![("prompt", strings(&["p", "q"])), ("toxicity", Arc::new(Float64Array::from(vec![Some(0.7), None])))],
        );
        let found = questions(&file).unwrap();
        assert_eq!((found[0].toxicity, found[1].toxicity), (Some(0.7), None));
        assert!(found.iter().all(|question| question.case.is_none() && question.group.is_none()));
        assert_eq!(found[1].origin.row, 1);
    }
}
