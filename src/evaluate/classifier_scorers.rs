//! Sequence classifiers as scorers: of toxicity, of entailment, of support.
//!
//! What is longer than a classifier reads is read in windows that overlap, and none of it is left out: the most toxic window of a text counts, and
//! of a source the window that supports (or contradicts) most.

use std::path::Path;

use super::metrics::summac::{Inference, judged_sentences, summac_zs};
use super::scorer::{Concern, Identity, Scorer, Subject, Verdict};
use crate::classifier::{Classifier, ClassifierInput, Windows};
use crate::error::Result;
use crate::numbers::{largest, smallest};

/// Tokens that go through a classifier at a time.
const TOKENS_PER_BATCH: usize = 4096;

/// The probability of one label: of the text alone, or of the pair of source and text.
pub struct LabelScorer {
    classifier: Classifier,
    label: usize,
    /// Whether it reads the source before the text, and says that the text is supported by it.
    is_support: bool,
    identity: Identity,
}

/// What classifiers of toxicity call it, the surest names first (Detoxify, ToxiGen and others).
const TOXIC: [&str; 10] =
    ["toxicity", "toxic", "hate", "hateful", "hate speech", "offensive", "abusive", "1", "yes", "LABEL_1"];
/// What classifiers call a claim that its document holds (MiniCheck and others).
const SUPPORTED: [&str; 7] = ["supported", "entailment", "consistent", "faithful", "1", "yes", "LABEL_1"];
const ENTAILMENT: [&str; 2] = ["entailment", "entail"];
const CONTRADICTION: [&str; 3] = ["contradiction", "contradictory", "contradict"];

impl LabelScorer {
    /// The probability that a text is toxic: of the label of this name, or of the one that is usually called so.
    pub fn toxicity(name: &str, folder: &Path, label: Option<&str>) -> Result<Self> {
        Self::load(name, folder, label, &TOXIC, false)
    }

    /// One less the probability that the source holds what the text says (Tang et al. 2024, MiniCheck).
    pub fn support(name: &str, folder: &Path, label: Option<&str>) -> Result<Self> {
        Self::load(name, folder, label, &SUPPORTED, true)
    }

    fn load(name: &str, folder: &Path, label: Option<&str>, usual: &[&str], is_support: bool) -> Result<Self> {
        let classifier = Classifier::load(folder)?;
        let label = match (label, classifier.labels()) {
            (Some(label), _) => classifier.label_index(&[label])?,
            (None, [_]) => 0,
            (None, _) => classifier.label_index(usual)?,
        };
        let concern = if is_support { Concern::Hallucination } else { Concern::Toxicity };
        let what = if is_support { "1 - p" } else { "p" };
        let version =
            format!("{what}({}) of {}, in windows, 2", classifier.labels()[label], classifier.identity().architecture);
        let identity = identity(name, concern, version, &classifier);
        Ok(LabelScorer { classifier, label, is_support, identity })
    }
}

fn identity(name: &str, concern: Concern, version: String, classifier: &Classifier) -> Identity {
    let hash = Some(classifier.identity().weights.clone());
    let max_tokens = Some(classifier.max_length()).filter(|&length| length < usize::MAX);
    Identity { name: name.to_string(), concern, version, hash, threshold: 0.5, max_tokens }
}

impl Scorer for LabelScorer {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn judge(&self, subjects: &[Subject]) -> Result<Vec<Verdict>> {
        let input = |subject: &Subject| match self.is_support {
            true => ClassifierInput { text: subject.source.to_string(), pair: Some(subject.text.to_string()) },
            false => ClassifierInput { text: subject.text.to_string(), pair: None },
        };
        let inputs: Vec<ClassifierInput> = subjects.iter().map(input).collect();
        let read = read(&self.classifier, &inputs)?;
        let verdict = |found: ReadInWindows| {
            let of_label = |window: &Vec<f32>| f64::from(window[self.label]);
            let score = match self.is_support {
                // Each part of the text has to be supported somewhere in the source: the least supported one counts.
                true => 1.0 - least(found.windows.iter().map(|sources| greatest(sources.iter().map(of_label)))),
                false => greatest(found.windows.iter().flatten().map(of_label)),
            };
            Verdict { score: Some(score), windows: found.len(), was_cut: found.was_cut }
        };
        Ok(read.into_iter().map(verdict).collect())
    }
}

/// What a classifier says of an input that it read in windows.
struct ReadInWindows {
    /// `[window of the second text][window of the first text][label]`.
    windows: Vec<Vec<Vec<f32>>>,
    was_cut: bool,
}

impl ReadInWindows {
    fn len(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }
}

/// The probabilities of every label for every window of every input.
fn read(classifier: &Classifier, inputs: &[ClassifierInput]) -> Result<Vec<ReadInWindows>> {
    let windows = inputs.iter().map(|input| classifier.windows(input)).collect::<Result<Vec<Windows>>>()?;
    let all: Vec<ClassifierInput> = windows.iter().flat_map(|of| of.inputs.iter().flatten().cloned()).collect();
    let mut probabilities = classifier.probabilities(&all, TOKENS_PER_BATCH)?.probabilities.into_iter();
    let mut row = |inputs: &Vec<ClassifierInput>| probabilities.by_ref().take(inputs.len()).collect();
    let of = |of: &Windows| ReadInWindows { windows: of.inputs.iter().map(&mut row).collect(), was_cut: of.was_cut };
    Ok(windows.iter().map(of).collect())
}

/// The greatest of probabilities; 0 of none.
fn greatest(probabilities: impl Iterator<Item = f64>) -> f64 {
    largest(probabilities).unwrap_or(0.0)
}

/// The least of probabilities; 1 of none.
fn least(probabilities: impl Iterator<Item = f64>) -> f64 {
    smallest(probabilities).unwrap_or(1.0)
}

/// SummaC-ZS (Laban et al. 2022, section 3.1) with a classifier of natural-language inference, as `(1 - consistency) / 2`: 0 where every sentence of the text follows from
/// a sentence of the source, 1 where each is contradicted, from 1/2 on more contradicted than entailed.
pub struct EntailmentScorer {
    classifier: Classifier,
    entailment: usize,
    contradiction: usize,
    identity: Identity,
}

impl EntailmentScorer {
    /// Reads the classifier, whose labels must tell entailment from contradiction.
    pub fn load(name: &str, folder: &Path) -> Result<Self> {
        let classifier = Classifier::load(folder)?;
        let (entailment, contradiction) =
            (classifier.label_index(&ENTAILMENT)?, classifier.label_index(&CONTRADICTION)?);
        let version =
            format!("SummaC-ZS of {}, of the whole source, in windows, 2", classifier.identity().architecture);
        let identity = identity(name, Concern::Hallucination, version, &classifier);
        Ok(EntailmentScorer { classifier, entailment, contradiction, identity })
    }
}

impl Scorer for EntailmentScorer {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn judge(&self, subjects: &[Subject]) -> Result<Vec<Verdict>> {
        let verdict = |subject: &Subject| {
            let (sources, sentences) = (judged_sentences(subject.source), judged_sentences(subject.text));
            let pairs = sentences.iter().flat_map(|sentence| sources.iter().map(move |source| (source, sentence)));
            let input = |(source, sentence): (&&str, &&str)| ClassifierInput {
                text: source.to_string(),
                pair: Some(sentence.to_string()),
            };
            let inputs: Vec<ClassifierInput> = pairs.map(input).collect();
            let read = read(&self.classifier, &inputs)?;
            let windows = read.iter().map(ReadInWindows::len).max().unwrap_or(1);
            let was_cut = read.iter().any(|found| found.was_cut);
            // Of a sentence in parts each has to follow; one that is contradicted contradicts.
            let inference = |found: &ReadInWindows| {
                let of = |label: usize| move |window: &Vec<f32>| f64::from(window[label]);
                let follows = found.windows.iter().map(|sources| greatest(sources.iter().map(of(self.entailment))));
                Inference {
                    entailment: least(follows),
                    contradiction: greatest(found.windows.iter().flatten().map(of(self.contradiction))),
                }
            };
            let mut all = read.iter().map(inference);
            let by_sentence: Vec<Vec<Inference>> =
                sentences.iter().map(|_| all.by_ref().take(sources.len()).collect()).collect();
            // Where there is nothing to judge, or nothing to judge it by, half is no verdict.
            let is_judged = !sentences.is_empty() && !sources.is_empty();
            let score = is_judged.then(|| (1.0 - summac_zs(&by_sentence)) / 2.0);
            Ok(Verdict { score, windows, was_cut })
        };
        subjects.iter().map(verdict).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::scorer::verdicts;
    use crate::evaluate::scorers::SHIPPED_CLASSIFIER;

    const CALM: &str = "Thank you, that helps. ";

    /// A BERT of 40 positions that tells entailment from contradiction, with random weights.
    const INFERENCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/classifiers/bert");

    fn long_source() -> String {
        (0..40).map(|number| format!("Person {number} keeps a hen and {number} cows in the barn. ")).collect()
    }

    #[test]
    fn the_most_toxic_window_of_a_long_text_counts() {
        let scorer = LabelScorer::toxicity("shipped", Path::new(SHIPPED_CLASSIFIER), None).unwrap();
        let most = scorer.identity.max_tokens.unwrap();
        let calm = CALM.repeat(most);
        let verdict = |text: &str| verdicts(&scorer, &[Subject { text, source: "" }]).unwrap()[0];
        let of_calm = verdict(&calm);
        assert!(of_calm.windows > 1 && !of_calm.was_cut && of_calm.score.unwrap() < 0.5, "{of_calm:?}");
        // At the end, which was not read: the last window holds it.
        let insulting = format!("{calm}You worthless idiot.");
        let found = verdict(&insulting);
        let windows =
            scorer.classifier.windows(&ClassifierInput { text: insulting, pair: None }).unwrap().inputs.concat();
        let alone = |window: &ClassifierInput| {
            let found = scorer.classifier.probabilities(std::slice::from_ref(window), 512).unwrap();
            assert_eq!(found.truncated, 0);
            f64::from(found.probabilities[0][scorer.label])
        };
        assert!(windows.last().unwrap().text.ends_with("idiot."));
        let most = greatest(windows.iter().map(alone));
        assert!((found.score.unwrap() - most).abs() < 1e-6 && most > of_calm.score.unwrap(), "{found:?}, {most}");
        let short = verdict(CALM);
        assert_eq!((short.windows, short.was_cut), (1, false));
    }

    #[test]
    fn of_a_long_source_the_window_that_supports_most_counts() {
        let scorer = LabelScorer::support("bert", Path::new(INFERENCE), None).unwrap();
        let (source, claim) = (long_source(), "Person 39 keeps 39 cows.");
        let input = |text: &str| ClassifierInput { text: text.to_string(), pair: Some(claim.to_string()) };
        let windows = scorer.classifier.windows(&input(&source)).unwrap();
        assert!(windows.len() > 5 && windows.inputs.len() == 1 && !windows.was_cut);
        assert!(windows.inputs[0].last().unwrap().text.ends_with("in the barn. "));
        let alone = |window: &ClassifierInput| {
            let found = scorer.classifier.probabilities(std::slice::from_ref(window), 512).unwrap();
            assert_eq!(found.truncated, 0);
            f64::from(found.probabilities[0][scorer.label])
        };
        let most = greatest(windows.inputs[0].iter().map(alone));
        let found = verdicts(&scorer, &[Subject { text: claim, source: &source }]).unwrap()[0];
        assert!((found.score.unwrap() - (1.0 - most)).abs() < 1e-6 && found.windows == windows.len());
        // A claim that fills the classifier by itself is divided too, and the part with the least support counts.
        let claims = "The baker sells bread. ".repeat(20);
        let found = verdicts(&scorer, &[Subject { text: &claims, source: &source }]).unwrap()[0];
        assert!(found.windows > windows.len() && !found.was_cut, "{found:?}");
    }

    #[test]
    fn inference_reads_the_whole_source_and_says_nothing_of_no_sentence() {
        let scorer = EntailmentScorer::load("bert", Path::new(INFERENCE)).unwrap();
        let source = "A person keeps a hen and some cows in the old barn. ".repeat(3);
        let long = "The sentence goes on and on, ".repeat(12) + "and ends here.";
        let verdict = |text: &str, source: &str| verdicts(&scorer, &[Subject { text, source }]).unwrap()[0];
        let short = verdict("He has a hen.", "He keeps hens.");
        assert!(short.score.is_some() && short.windows == 1, "{short:?}");
        let found = verdict(&long, &source);
        assert!(found.windows > 1 && !found.was_cut && found.score.is_some(), "{found:?}");
        for (text, source) in [("Yes.", &source[..]), ("", &source), ("A person keeps a hen.", "")] {
            assert_eq!(verdict(text, source).score, None, "{text}");
        }
    }
}
