//! Sequence classifiers as scorers: of toxicity, of entailment, of support.

use std::path::Path;

use super::metrics::summac::{Inference, source_sentences, summac_zs, summary_sentences};
use super::scorer::{Concern, Identity, Scorer, Subject};
use crate::classifier::{Classifier, ClassifierInput};
use crate::error::Result;

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
        let version = format!("{what}({}) of {}, 1", classifier.labels()[label], classifier.identity().architecture);
        let identity = identity(name, concern, version, &classifier);
        Ok(LabelScorer { classifier, label, is_support, identity })
    }
}

fn identity(name: &str, concern: Concern, version: String, classifier: &Classifier) -> Identity {
    let hash = Some(classifier.identity().weights.clone());
    Identity { name: name.to_string(), concern, version, hash, threshold: 0.5 }
}

impl Scorer for LabelScorer {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn scores(&self, subjects: &[Subject]) -> Result<Vec<f64>> {
        let input = |subject: &Subject| match self.is_support {
            true => ClassifierInput { text: subject.source.to_string(), pair: Some(subject.text.to_string()) },
            false => ClassifierInput { text: subject.text.to_string(), pair: None },
        };
        let inputs: Vec<ClassifierInput> = subjects.iter().map(input).collect();
        let probabilities = self.classifier.probabilities(&inputs, TOKENS_PER_BATCH)?.probabilities;
        let score = |of_text: &Vec<f32>| {
            let probability = f64::from(of_text[self.label]);
            if self.is_support { 1.0 - probability } else { probability }
        };
        Ok(probabilities.iter().map(score).collect())
    }
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
        let version = format!("SummaC-ZS of {}, 1", classifier.identity().architecture);
        let identity = identity(name, Concern::Hallucination, version, &classifier);
        Ok(EntailmentScorer { classifier, entailment, contradiction, identity })
    }
}

impl Scorer for EntailmentScorer {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn scores(&self, subjects: &[Subject]) -> Result<Vec<f64>> {
        let score = |subject: &Subject| {
            let (sources, sentences) = (source_sentences(subject.source), summary_sentences(subject.text));
            let pairs = sentences.iter().flat_map(|sentence| sources.iter().map(move |source| (source, sentence)));
            let input = |(source, sentence): (&&str, &&str)| ClassifierInput {
                text: source.to_string(),
                pair: Some(sentence.to_string()),
            };
            let inputs: Vec<ClassifierInput> = pairs.map(input).collect();
            let probabilities = self.classifier.probabilities(&inputs, TOKENS_PER_BATCH)?.probabilities;
            let inference = |of: &Vec<f32>| Inference {
                entailment: f64::from(of[self.entailment]),
                contradiction: f64::from(of[self.contradiction]),
            };
            let mut all = probabilities.iter().map(inference);
            let by_sentence: Vec<Vec<Inference>> =
                sentences.iter().map(|_| all.by_ref().take(sources.len()).collect()).collect();
            Ok((1.0 - summac_zs(&by_sentence)) / 2.0)
        };
        subjects.iter().map(score).collect()
    }
}
