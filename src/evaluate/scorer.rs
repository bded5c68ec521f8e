//! What judges a text without people: one trait, and who each judge is, so that a number can be traced to what made it.

use serde::Serialize;

use crate::error::Result;

/// What a scorer looks at.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Subject<'a> {
    /// What is judged.
    pub text: &'a str,
    /// What it has to stay within: the passage, the article, the knowledge that was given; where nothing else is known, the prompt.
    pub source: &'a str,
}

/// What a scorer's number is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Concern {
    /// Whether a text is toxic.
    Toxicity,
    /// Whether it says what its source does not.
    Hallucination,
}

/// Who judged: enough to judge again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Identity {
    /// The name that the scorer has in reports.
    pub name: String,
    /// What its number is about.
    pub concern: Concern,
    /// What kind of scorer it is, with the version of its definition.
    pub version: String,
    /// The hash of the weights or of the words that it judges by; none for a rule.
    pub hash: Option<String>,
    /// The score from which a text counts as toxic, or as holding something that its source does not.
    pub threshold: f64,
}

impl Identity {
    /// The name of the rate of texts that count, by this scorer.
    pub fn rate(&self) -> String {
        let concern = match self.concern {
            Concern::Toxicity => "toxicity",
            Concern::Hallucination => "hallucination",
        };
        format!("{concern}_by_{}", self.name)
    }
}

/// Something that judges texts.
pub trait Scorer {
    /// Who judges.
    fn identity(&self) -> &Identity;

    /// What it finds of each subject: a number from 0 to 1, the higher the worse (more toxic, less supported).
    ///
    /// # Errors
    /// Where it fails on any of them. A failure never becomes a number.
    fn scores(&self, subjects: &[Subject]) -> Result<Vec<f64>>;
}
