//! What judges a text without people: one trait, and who each judge is, so that a number can be traced to what made it.

use serde::{Deserialize, Serialize};

use crate::bail;
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
    /// The most tokens that it reads at once, where it reads tokens; of longer texts it reads windows.
    pub max_tokens: Option<usize>,
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

/// What a scorer says of a text, and how much of it it read.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// A number from 0 to 1, the higher the worse (more toxic, less supported); none where the scorer cannot judge such a text.
    pub score: Option<f64>,
    /// In how many windows text and source were read; 1 where they were read at once.
    pub windows: usize,
    /// Whether a part was not read at all.
    pub was_cut: bool,
}

impl From<f64> for Verdict {
    /// Of a text that was read at once.
    fn from(score: f64) -> Self {
        Verdict { score: Some(score), windows: 1, was_cut: false }
    }
}

/// Something that judges texts.
pub trait Scorer {
    /// Who judges.
    fn identity(&self) -> &Identity;

    /// What it finds of each subject. Called by [`verdicts`], which checks it.
    ///
    /// # Errors
    /// Where it fails on any of them. A failure never becomes a number.
    fn judge(&self, subjects: &[Subject]) -> Result<Vec<Verdict>>;
}

/// What a scorer finds of each subject.
///
/// # Errors
/// Where it fails, or gives a score that is no number from 0 to 1.
pub fn verdicts(scorer: &dyn Scorer, subjects: &[Subject]) -> Result<Vec<Verdict>> {
    let verdicts = scorer.judge(subjects)?;
    let name = &scorer.identity().name;
    if verdicts.len() != subjects.len() {
        bail!("scorer {name}: gave {} verdicts of {} texts", verdicts.len(), subjects.len());
    }
    for (Verdict { score, .. }, subject) in verdicts.iter().zip(subjects) {
        if let Some(score) = score.filter(|score| !(0.0..=1.0).contains(score)) {
            bail!("scorer {name}: gave {score} for the text {:?}; expected a number from 0 to 1", subject.text);
        }
    }
    Ok(verdicts)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Constant(Identity, f64);

    impl Scorer for Constant {
        fn identity(&self) -> &Identity {
            &self.0
        }

        fn judge(&self, subjects: &[Subject]) -> Result<Vec<Verdict>> {
            Ok(subjects.iter().map(|_| self.1.into()).collect())
        }
    }

    #[test]
    fn a_score_that_is_no_number_from_0_to_1_is_an_error() {
        let identity = Identity {
            name: "constant".to_string(),
            concern: Concern::Toxicity,
            version: "1".to_string(),
            hash: None,
            threshold: 0.5,
            max_tokens: None,
        };
        let of = |score: f64| verdicts(&Constant(identity.clone(), score), &[Subject { text: "a", source: "" }]);
        for score in [0.0, 0.5, 1.0] {
            assert_eq!(of(score).unwrap(), [score.into()]);
        }
        for score in [f64::NAN, f64::INFINITY, -0.1, 1.1] {
            assert!(of(score).unwrap_err().to_string().contains("constant"), "{score}");
        }
    }
}
