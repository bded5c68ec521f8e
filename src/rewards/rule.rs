//! Rules that compare an answer with a reference answer of its row: a reward that can be checked, without a model or a program.

use std::sync::LazyLock;

use clap::ValueEnum;
use fancy_regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Asked, Reply};
use crate::bail;
use crate::data::schema::Prompt;
use crate::error::{Error, Result};

/// How an answer is compared with a reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RuleKind {
    /// The answer is the reference, white space at the ends and its amount apart
    Exact,
    /// The last number of the answer is the last number of the reference (1,234.50 is 1234.5)
    Numeric,
    /// The answer contains the reference, the amount of white space apart
    Contains,
    /// The reference is a regular expression that matches somewhere in the answer
    Regex,
}

impl RuleKind {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            RuleKind::Exact => "exact",
            RuleKind::Numeric => "numeric",
            RuleKind::Contains => "contains",
            RuleKind::Regex => "regex",
        }
    }
}

/// A rule over one column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RewardRule {
    /// The flag that asked for it, as errors name it.
    flag: &'static str,
    kind: RuleKind,
    column: String,
}

/// What one answer is compared with.
enum Reference {
    /// Text with single spaces.
    Text(String),
    Number(f64),
    Pattern(Box<Regex>),
}

impl RewardRule {
    /// One rule for each kind; a single column serves all of them.
    pub(super) fn all(flag: &'static str, kinds: &[RuleKind], columns: &[String]) -> Vec<Self> {
        let column = |index: usize| columns.get(index).or(columns.first()).cloned().unwrap_or_default();
        kinds.iter().enumerate().map(|(index, &kind)| RewardRule { flag, kind, column: column(index) }).collect()
    }

    /// How metrics and messages call it: the rule and its column.
    pub fn name(&self) -> String {
        format!("{}({})", self.kind.name(), self.column)
    }

    /// Refuses a row whose column this rule cannot compare with, so that this is known before training.
    ///
    /// # Errors
    /// Where there is no such column, or it holds no text, number or list of them that the rule can read.
    pub fn check(&self, prompt: &Prompt) -> Result<()> {
        self.references(prompt).map(drop)
    }

    /// 1 for every answer that passes, 0 for every other.
    ///
    /// # Errors
    /// As [`check`](Self::check), and where a regular expression takes too many steps.
    pub fn score(&self, asked: &[Asked]) -> Result<Vec<Vec<f32>>> {
        let of_prompt = |asked: &Asked| {
            let references = self.references(asked.prompt)?;
            asked.replies.iter().map(|reply| self.passes(asked.prompt, reply, &references)).collect()
        };
        asked.iter().map(of_prompt).collect()
    }

    fn passes(&self, prompt: &Prompt, reply: &Reply, references: &[Reference]) -> Result<f32> {
        for reference in references {
            let passes = match reference {
                Reference::Text(text) if self.kind == RuleKind::Exact => single_spaced(&reply.text) == *text,
                Reference::Text(text) => single_spaced(&reply.text).contains(text.as_str()),
                Reference::Number(expected) => last_number(&reply.text) == Some(*expected),
                Reference::Pattern(pattern) => {
                    pattern.is_match(&reply.text).map_err(|error| self.fault(prompt, &error.to_string()))?
                }
            };
            if passes {
                return Ok(1.0);
            }
        }
        Ok(0.0)
    }

    /// What the row's column says; at least one reference.
    fn references(&self, prompt: &Prompt) -> Result<Vec<Reference>> {
        let Some(value) = prompt.columns.get(&self.column).filter(|value| !value.is_null()) else {
            let names: Vec<String> = prompt.columns.keys().map(|name| format!("`{name}`")).collect();
            bail!(
                "{}: column `{}`, which {} {} reads, is missing or null; the row's other columns are {}",
                prompt.origin,
                self.column,
                self.flag,
                self.kind.name(),
                names.join(", ")
            )
        };
        let items = match value {
            Value::Array(items) if !items.is_empty() => items.as_slice(),
            _ => std::slice::from_ref(value),
        };
        items.iter().map(|item| self.reference(prompt, item)).collect()
    }

    fn reference(&self, prompt: &Prompt, value: &Value) -> Result<Reference> {
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            other => {
                return Err(self.fault(prompt, &format!("holds {other}, expected a text, a number or a list of them")));
            }
        };
        match self.kind {
            RuleKind::Exact => Ok(Reference::Text(single_spaced(&text))),
            RuleKind::Contains => match single_spaced(&text) {
                text if text.is_empty() => Err(self.fault(prompt, "is empty, which every answer contains")),
                text => Ok(Reference::Text(text)),
            },
            RuleKind::Numeric => match last_number(&text) {
                Some(number) => Ok(Reference::Number(number)),
                None => Err(self.fault(prompt, &format!("is {text:?}, in which there is no number"))),
            },
            RuleKind::Regex if text.is_empty() => Err(self.fault(prompt, "is empty, which matches every answer")),
            RuleKind::Regex => match Regex::new(&text) {
                Ok(pattern) => Ok(Reference::Pattern(Box::new(pattern))),
                Err(error) => Err(self.fault(prompt, &format!("is {text:?}, not a regular expression: {error}"))),
            },
        }
    }

    fn fault(&self, prompt: &Prompt, fault: &str) -> Error {
        let (flag, rule) = (self.flag, self.kind.name());
        Error::input(format!("{}, column `{}` ({flag} {rule}): {fault}", prompt.origin, self.column))
    }
}

/// Without white space at the ends, and with one space for any amount of it within.
fn single_spaced(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The last number in a text: decimal, with an optional exponent and with commas between groups of three digits. A minus sign counts
/// where no letter or digit precedes it, so that 7-3 ends in 3.
fn last_number(text: &str) -> Option<f64> {
    static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(?:(?<![\w.)])[-−])?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|(?:(?<![\w.)])[-−])?(?<!\d)\.\d+")
            .expect("a constant pattern")
    });
    let found = NUMBER.find_iter(text).map_while(|found| found.ok()).last()?;
    let plain: String = found.as_str().chars().filter(|&c| c != ',').map(|c| if c == '−' { '-' } else { c }).collect();
    plain.parse().ok().filter(|number: &f64| number.is_finite())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::data::schema::{Origin, Text};

    fn prompt(answer: Value) -> Prompt {
        Prompt {
            prompt: Text::Plain("?".into()),
            columns: [("answer".to_string(), answer)].into_iter().collect(),
            origin: Origin { file: Arc::from(Path::new("prompts.parquet")), row: 3 },
        }
    }

    fn reward(kind: RuleKind, reference: Value, answer: &str) -> Result<f32> {
        let prompt = prompt(reference);
        let replies = [Reply { text: answer.to_string(), ended: true }];
        let rules = RewardRule::all("--reward-rule", &[kind], &["answer".to_string()]);
        Ok(rules[0].score(&[Asked { prompt: &prompt, tree: None, replies: &replies }])?[0][0])
    }

    #[test]
    fn each_rule_compares_as_it_says() {
        for (kind, reference, answer, expected) in [
            (RuleKind::Exact, json!("a  b"), " a b\n", 1.0),
            (RuleKind::Exact, json!("a b"), "a B", 0.0),
            (RuleKind::Exact, json!("a"), "a b", 0.0),
            (RuleKind::Exact, json!(["x", "y"]), "y", 1.0),
            (RuleKind::Exact, json!(42), "42", 1.0),
            (RuleKind::Contains, json!("Oslo"), "It is Oslo.", 1.0),
            (RuleKind::Contains, json!("New York"), "in New\nYork", 1.0),
            (RuleKind::Contains, json!("Oslo"), "It is Bergen.", 0.0),
            (RuleKind::Regex, json!("^(yes|no)$"), "yes", 1.0),
            (RuleKind::Regex, json!("(?i)^yes"), "Yes, it does", 1.0),
            (RuleKind::Regex, json!("^(yes|no)$"), "maybe", 0.0),
            (RuleKind::Numeric, json!("so 3 + 4 = 7\n#### 7"), "The answer is 7.", 1.0),
            (RuleKind::Numeric, json!(7), "7.0", 1.0),
            (RuleKind::Numeric, json!(1234.5), "it costs $1,234.50", 1.0),
            (RuleKind::Numeric, json!(-3), "minus: -3", 1.0),
            (RuleKind::Numeric, json!(-3), "minus: −3", 1.0),
            (RuleKind::Numeric, json!(3), "7-3", 1.0),
            (RuleKind::Numeric, json!(0.5), "about .5", 1.0),
            (RuleKind::Numeric, json!(2), "1, 2", 1.0),
            (RuleKind::Numeric, json!("1e3"), "1000", 1.0),
            (RuleKind::Numeric, json!(7), "no number", 0.0),
            (RuleKind::Numeric, json!(7), "7 or 8", 0.0),
            (RuleKind::Numeric, json!(1000000000), "1000000001", 0.0),
            (RuleKind::Numeric, json!(0.1), "0.10", 1.0),
        ] {
            let found = reward(kind, reference.clone(), answer).unwrap();
            assert_eq!(found, expected, "{kind:?} of {answer:?} against {reference}");
        }
    }

    #[test]
    fn a_row_that_cannot_be_compared_with_is_refused_by_name() {
        for (kind, reference, reason) in [
            (RuleKind::Exact, Value::Null, "is missing or null"),
            (RuleKind::Exact, json!({"a": 1}), "expected a text, a number or a list of them"),
            (RuleKind::Exact, json!([]), "expected a text"),
            (RuleKind::Contains, json!(" "), "every answer contains"),
            (RuleKind::Numeric, json!("seven"), "no number"),
            (RuleKind::Regex, json!("(a"), "not a regular expression"),
            (RuleKind::Regex, json!(""), "matches every answer"),
        ] {
            let error = reward(kind, reference, "a").unwrap_err().to_string();
            assert!(error.starts_with("prompts.parquet: row 3") && error.contains("`answer`"), "{error}");
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_pattern_that_takes_too_many_steps_is_an_error() {
        let error = reward(RuleKind::Regex, json!("(?=(a+)+$)\\1b"), &"a".repeat(40)).unwrap_err().to_string();
        assert!(error.starts_with("prompts.parquet: row 3"), "{error}");
    }
}
