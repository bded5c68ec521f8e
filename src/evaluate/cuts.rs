//! What `--max-length` took away, in sentences for the report.

use crate::data::tokenize_records::Truncation;

/// The sentences, each once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cuts(Vec<String>);

impl Cuts {
    /// Prompts that a model answers.
    pub fn note_prompts(&mut self, model: &str, truncation: Truncation, max_length: usize) {
        if let Some(cuts) = truncation.cuts(max_length) {
            self.note(format!("{model}: {cuts}."));
        }
    }

    /// Prompts with answers that a model reads; `what` they are.
    pub fn note_texts(&mut self, model: &str, what: &str, truncation: Truncation, max_length: usize) {
        if let Some(cuts) = truncation.cuts(max_length) {
            self.note(format!("{model}: of the {what}, {cuts}, or to as many positions as the model has."));
        }
    }

    fn note(&mut self, sentence: String) {
        if !self.0.contains(&sentence) {
            self.0.push(sentence);
        }
    }

    /// All of them.
    pub fn into_sentences(self) -> Vec<String> {
        self.0
    }
}
