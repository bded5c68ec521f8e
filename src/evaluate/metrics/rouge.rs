//! ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004, sections 2 and 3), equal to Google's `rouge_score`.

use std::collections::HashMap;

use nltk_porter::{Mode, PorterStemmer};

/// One kind of overlap between a prediction and a reference.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Overlap {
    /// The share of the prediction that the reference has.
    pub precision: f64,
    /// The share of the reference that the prediction has.
    pub recall: f64,
    /// Their harmonic mean; 0 where both are 0.
    pub f1: f64,
}

impl Overlap {
    fn new(common: usize, of_prediction: usize, of_reference: usize) -> Self {
        let precision = common as f64 / of_prediction.max(1) as f64;
        let recall = common as f64 / of_reference.max(1) as f64;
        let f1 = if precision + recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 };
        Overlap { precision, recall, f1 }
    }
}

/// The three kinds of overlap.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rouge {
    /// Of words.
    pub rouge_1: Overlap,
    /// Of pairs of neighbouring words.
    pub rouge_2: Overlap,
    /// Of the longest common subsequence of words.
    pub rouge_l: Overlap,
}

/// Computes ROUGE, of words as they are or of their stems.
pub struct RougeScorer {
    stemmer: Option<PorterStemmer>,
}

impl RougeScorer {
    /// Words as they are: `use_stemmer=False`.
    pub fn plain() -> Self {
        RougeScorer { stemmer: None }
    }

    /// The stems of words of more than three characters, by Porter's algorithm (1980) as NLTK extends it: `use_stemmer=True`.
    pub fn stemming() -> Self {
        RougeScorer { stemmer: Some(PorterStemmer::new(Mode::Nltk)) }
    }

    /// The overlap of a prediction with one reference.
    pub fn score(&self, prediction: &str, reference: &str) -> Rouge {
        let (prediction, reference) = (self.tokens(prediction), self.tokens(reference));
        let common = longest_common_subsequence(&prediction, &reference);
        Rouge {
            rouge_1: overlap_of_ngrams(&prediction, &reference, 1),
            rouge_2: overlap_of_ngrams(&prediction, &reference, 2),
            rouge_l: Overlap::new(common, prediction.len(), reference.len()),
        }
    }

    /// The overlap with the best of several references, for each kind the one with the highest F1 (the first of equals), as in
    /// `score_multi`. `None` without a reference.
    pub fn best<R: AsRef<str>>(&self, prediction: &str, references: &[R]) -> Option<Rouge> {
        let better = |best: Overlap, other: Overlap| if other.f1 > best.f1 { other } else { best };
        references.iter().map(|reference| self.score(prediction, reference.as_ref())).reduce(|best, other| Rouge {
            rouge_1: better(best.rouge_1, other.rouge_1),
            rouge_2: better(best.rouge_2, other.rouge_2),
            rouge_l: better(best.rouge_l, other.rouge_l),
        })
    }

    /// Runs of ASCII letters and digits, in lower case. Letters of other scripts separate words; a text that has no others scores 0: whoever averages leaves such references out.
    fn tokens(&self, text: &str) -> Vec<String> {
        let lower = text.to_lowercase();
        let words = lower.split(|character: char| !character.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
        let stem = |word: &str| match &self.stemmer {
            Some(stemmer) if word.len() > 3 => stemmer.stem(word),
            _ => word.to_string(),
        };
        words.map(stem).filter(|word| !word.is_empty()).collect()
    }
}

/// Sequences of `length` words that both have, each as often as both have it.
fn overlap_of_ngrams(prediction: &[String], reference: &[String], length: usize) -> Overlap {
    let mut unmatched: HashMap<&[String], usize> = HashMap::new();
    for ngram in reference.windows(length) {
        *unmatched.entry(ngram).or_default() += 1;
    }
    let mut common = 0;
    for ngram in prediction.windows(length) {
        if let Some(left) = unmatched.get_mut(ngram).filter(|left| **left > 0) {
            *left -= 1;
            common += 1;
        }
    }
    Overlap::new(common, prediction.windows(length).len(), reference.windows(length).len())
}

/// The length of the longest sequence of words that both have in this order, with any words between.
fn longest_common_subsequence(first: &[String], second: &[String]) -> usize {
    // `lengths[j]` is that of the words of `first` so far and the first j of `second`.
    let mut lengths = vec![0; second.len() + 1];
    for word in first {
        let mut diagonal = 0;
        for (index, other) in second.iter().enumerate() {
            let above = lengths[index + 1];
            lengths[index + 1] = if word == other { diagonal + 1 } else { above.max(lengths[index]) };
            diagonal = above;
        }
    }
    lengths[second.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_are_runs_of_ascii_letters_and_digits() {
        assert_eq!(
            RougeScorer::plain().tokens("The na\u{ef}ve re-run: 3.5%"),
            ["the", "na", "ve", "re", "run", "3", "5"]
        );
    }

    #[test]
    fn stems_are_those_of_nltk_and_short_words_have_none() {
        // Snowball's stemmer leaves `dying`; the algorithm of 1980 makes `ski` of `skies`. `was` would become `wa`.
        assert_eq!(RougeScorer::stemming().tokens("dying skies was flies"), ["die", "sky", "was", "fli"]);
    }

    #[test]
    fn each_kind_has_the_reference_that_suits_it() {
        let found = RougeScorer::plain().best("a b c", &["c b a", "a b x y"]).unwrap();
        assert_eq!(found.rouge_1.f1, 1.0);
        assert_eq!((found.rouge_2.precision, found.rouge_2.recall), (0.5, 1.0 / 3.0));
        assert_eq!(found.rouge_l.recall, 0.5);
        assert_eq!(RougeScorer::plain().best::<&str>("a", &[]), None);
    }

    #[test]
    fn texts_without_words_have_no_overlap() {
        assert_eq!(RougeScorer::plain().score("", "a b"), Rouge::default());
        assert_eq!(RougeScorer::plain().score("\u{4f60}\u{597d}", "\u{4f60}\u{597d}"), Rouge::default());
    }

    proptest! {
        #[test]
        fn a_text_is_all_of_itself(text in "[a-e]{1,6}( [a-e]{1,6}){1,10}") {
            for scorer in [RougeScorer::plain(), RougeScorer::stemming()] {
                let found = scorer.score(&text, &text);
                prop_assert_eq!((found.rouge_1.f1, found.rouge_2.f1, found.rouge_l.f1), (1.0, 1.0, 1.0));
            }
        }

        #[test]
        fn exchanged_texts_exchange_precision_and_recall(a in "([a-c] ){0,12}", b in "([a-c] ){0,12}") {
            let (found, exchanged) = (RougeScorer::plain().score(&a, &b), RougeScorer::plain().score(&b, &a));
            let kinds = |rouge: Rouge| [rouge.rouge_1, rouge.rouge_2, rouge.rouge_l];
            for (one, other) in kinds(found).into_iter().zip(kinds(exchanged)) {
                prop_assert_eq!((one.precision, one.recall), (other.recall, other.precision));
            }
        }

        #[test]
        fn any_text_can_be_scored(a in any::<String>(), b in any::<String>()) {
            let found = RougeScorer::stemming().score(&a, &b);
            prop_assert!((0.0..=1.0).contains(&found.rouge_l.f1));
            // A subsequence is a set of common words.
            prop_assert!(found.rouge_l.recall <= found.rouge_1.recall);
        }
    }
}
