//! A sequence classifier as a source of rewards: how sure it is of a label.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Asked;
use crate::bail;
use crate::classifier::{Classifier, ClassifierInput};
use crate::error::Result;
use crate::files::warn_once;
use crate::numbers::smallest;

/// A classifier's folder and a label of it, which answers are to have, or not to have: `FOLDER@LABEL`,
/// `FOLDER@-LABEL`. The label stands behind the last `@`, as a folder of the hub may have a revision. Of a
/// classifier of a single label that label is meant where none is named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClassifierLabel {
    folder: PathBuf,
    label: Option<String>,
    is_unwanted: bool,
}

impl ClassifierLabel {
    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl FromStr for ClassifierLabel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (folder, label) = text.rsplit_once('@').unwrap_or((text, ""));
        if folder.is_empty() {
            return Err("expected FOLDER@LABEL, or FOLDER@-LABEL for a label that answers are not to have".to_string());
        }
        let is_unwanted = label.starts_with('-');
        let label = Some(&label[usize::from(is_unwanted)..]).filter(|label| !label.is_empty());
        Ok(ClassifierLabel { folder: PathBuf::from(folder), label: label.map(str::to_string), is_unwanted })
    }
}

impl fmt::Display for ClassifierLabel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.is_unwanted { "-" } else { "" };
        let label = self.label.as_deref().unwrap_or_default();
        let folder = self.folder.display().to_string();
        match sign.len() + label.len() {
            0 if !folder.contains('@') => formatter.write_str(&folder),
            _ => write!(formatter, "{folder}@{sign}{label}"),
        }
    }
}

impl TryFrom<String> for ClassifierLabel {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ClassifierLabel> for String {
    fn from(label: ClassifierLabel) -> Self {
        label.to_string()
    }
}

/// The logarithm of the odds of a label of the answer's text, `log(p / (1 - p))`, or, of a label that is not
/// wanted, of the odds against it. It reads the answer alone, one that is longer than it can read in windows that
/// overlap, of which the one with the lowest reward counts.
pub struct RewardClassifier {
    given: ClassifierLabel,
    classifier: Classifier,
    label: usize,
}

impl RewardClassifier {
    /// Reads the classifier.
    ///
    /// # Errors
    /// Where the folder holds none, or none with this label, or where none is named of several.
    pub fn load(given: &ClassifierLabel) -> Result<Self> {
        let classifier = Classifier::load(&given.folder)?;
        let label = match (&given.label, classifier.labels()) {
            (Some(label), _) => classifier.label_index(&[label])?,
            (None, [_]) => 0,
            (None, labels) => {
                let (folder, first) = (given.folder.display(), &labels[0]);
                bail!(
                    "{folder}: this classifier has the labels {}; name the one that answers are to have, as in \
                     {folder}@{first}, or are not to have, as in {folder}@-{first}",
                    labels.join(", ")
                )
            }
        };
        Ok(RewardClassifier { given: given.clone(), classifier, label })
    }

    /// What metrics call it: the last part of its folder and the label.
    pub fn name(&self) -> String {
        let folder = self.given.folder.file_name().map_or_else(|| "classifier".into(), |name| name.to_string_lossy());
        let sign = if self.given.is_unwanted { "-" } else { "" };
        format!("{folder}@{sign}{}", self.classifier.labels()[self.label])
    }

    /// The reward of every answer of every prompt.
    pub fn score(&self, asked: &[Asked], tokens_per_batch: usize) -> Result<Vec<Vec<f32>>> {
        let (mut inputs, mut ends) = (Vec::new(), Vec::new());
        for reply in asked.iter().flat_map(|asked| asked.replies) {
            // Of nothing at all some tokenizers make no token.
            let text = if reply.text.is_empty() { " ".to_string() } else { reply.text.clone() };
            let windows = self.classifier.windows(&ClassifierInput { text, pair: None })?;
            if windows.was_cut {
                let folder = self.given.folder.display();
                warn_once(&format!(
                    "warning: {folder}: reads fewer tokens than a character of an answer has, so it lost a part"
                ));
            }
            inputs.extend(windows.inputs.into_iter().flatten());
            ends.push(inputs.len());
        }
        let sign = if self.given.is_unwanted { -1.0 } else { 1.0 };
        let rewards = self.classifier.log_odds(&inputs, self.label, tokens_per_batch)?;
        let rewards: Vec<f64> = rewards.into_iter().map(|odds| sign * odds).collect();
        let mut start = 0;
        let mut of_answers = ends.into_iter().map(|end| {
            let windows = &rewards[std::mem::replace(&mut start, end)..end];
            smallest(windows.iter().copied()).expect("a window of every text") as f32
        });
        Ok(asked.iter().map(|asked| of_answers.by_ref().take(asked.replies.len()).collect()).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::data::schema::{Origin, Prompt, Text};
    use crate::rewards::Reply;

    const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/toxicity");

    fn scores(label: &str, texts: &[&str]) -> Vec<f32> {
        let classifier = RewardClassifier::load(&format!("{SHIPPED}@{label}").parse().unwrap()).unwrap();
        let origin = Origin { file: Arc::from(Path::new("prompts.parquet")), row: 0 };
        let prompt = Prompt::new(Text::Plain("He said".into()), origin);
        let reply = |text: &&str| Reply { text: text.to_string(), ended: true };
        let replies: Vec<Reply> = texts.iter().map(reply).collect();
        // Two prompts, the first with all answers but the last.
        let (first, second) = replies.split_at(texts.len() - 1);
        let asked = [first, second].map(|replies| Asked { prompt: &prompt, tree: None, replies });
        classifier.score(&asked, 64).unwrap().concat()
    }

    #[test]
    fn a_reward_is_the_logarithm_of_the_odds_of_the_label() {
        let texts = ["You worthless idiot.", "Thank you, that helps.", "", "Thank you, that helps."];
        let inputs = texts.map(|text| ClassifierInput { text: text.to_string(), pair: None });
        let classified = Classifier::load(Path::new(SHIPPED)).unwrap().probabilities(&inputs, 64).unwrap();
        let found = scores("harmless", &texts);
        for (reward, probabilities) in found.iter().zip(&classified.probabilities) {
            let [harmless, toxic] = [0, 1].map(|label| f64::from(probabilities[label]));
            assert!((f64::from(*reward) - (harmless / toxic).ln()).abs() < 1e-3, "{reward} {probabilities:?}");
        }
        assert!(found[0] < 0.0 && found[1] > 2.0 && found[1] == found[3], "{found:?}");
        // Of two labels one is the other's opposite.
        for (one, other) in found.iter().zip(scores("-toxic", &texts)) {
            assert!((one - other).abs() < 1e-5);
        }
    }

    #[test]
    fn of_a_long_answer_the_worst_part_counts() {
        let calm = "Thank you, that helps. ".repeat(100);
        let found = scores("harmless", &[&calm, &format!("{calm}You worthless idiot. "), "Thank you."]);
        assert!(found[1] < found[0] - 1.0, "{found:?}");
    }

    #[test]
    fn a_label_is_named_as_it_is_written_and_has_to_be_there() {
        for text in [
            "models/a",
            "models/a@toxic",
            "models/a@-toxic",
            "models/a@severe_toxicity",
            "a/b@main@-toxic",
            "a/b@main@",
        ] {
            assert_eq!(text.parse::<ClassifierLabel>().unwrap().to_string(), text);
        }
        let of_the_hub: ClassifierLabel = "a/b@main@-toxic".parse().unwrap();
        assert!(of_the_hub.folder() == Path::new("a/b@main") && of_the_hub.is_unwanted);
        assert!("@toxic".parse::<ClassifierLabel>().is_err());
        let refusal = |text: String| RewardClassifier::load(&text.parse().unwrap()).err().unwrap().to_string();
        assert!(refusal(format!("{SHIPPED}@-rude")).contains("no label called rude; its labels are harmless, toxic"));
        assert!(refusal(SHIPPED.to_string()).contains("has the labels harmless, toxic; name the one"));
    }
}
