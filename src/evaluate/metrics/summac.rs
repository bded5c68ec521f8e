//! SummaC-ZS: whether a summary follows from its source, by a model of natural language inference (Laban et al. 2022, section 3.1).
//!
//! Every sentence of the summary is a hypothesis, every sentence of the source a premise. The score lies between -1 (all is
//! contradicted) and 1 (all is entailed); where to cut it is chosen on other data ([`super::agreement::best_threshold`]).

use super::sentences::sentences;
use crate::numbers::largest;

/// What the model of inference says of one premise and one hypothesis.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Inference {
    /// The probability that the hypothesis follows.
    pub entailment: f64,
    /// The probability that it cannot be true.
    pub contradiction: f64,
}

/// A sentence has more characters than this, or it is left out.
pub const TOO_SHORT: usize = 10;

/// The sentences of a summary that are judged, and those of a source that it is judged by: those of more than [`TOO_SHORT`] characters.
///
/// The authors' package takes the first hundred of a source (`max_doc_sents`), so that a summary of what stands later is not supported; here all of them count.
pub fn judged_sentences(text: &str) -> Vec<&str> {
    sentences(text).into_iter().filter(|sentence| sentence.chars().count() > TOO_SHORT).collect()
}

/// The consistency of a summary, `mean_j (max_i e_ij - max_i c_ij)`, with `e` and `c` the probabilities of entailment and
/// contradiction of sentence `j` of the summary by sentence `i` of the source; `pairs` is `[summary sentence][source sentence]`.
///
/// The two maxima are taken separately: the sentence that entails most need not be the one that contradicts most. This is `SummaCZS`
/// of the authors' package with its defaults (`op1="max"`, `op2="mean"`, `use_ent=True`, `use_con=True`). As there, the score is 0
/// where the summary or the source has no sentences.
pub fn summac_zs(pairs: &[Vec<Inference>]) -> f64 {
    let highest = |sources: &[Inference], probability: fn(&Inference) -> f64| {
        largest(sources.iter().map(probability)).unwrap_or(0.0)
    };
    let consistency = |sources: &Vec<Inference>| {
        highest(sources, |pair| pair.entailment) - highest(sources, |pair| pair.contradiction)
    };
    pairs.iter().map(consistency).sum::<f64>() / pairs.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs() -> impl Strategy<Value = Vec<Vec<Inference>>> {
        let inference = (0.0f64..1.0, 0.0f64..1.0)
            .prop_map(|(entailment, rest)| Inference { entailment, contradiction: (1.0 - entailment) * rest });
        (1usize..5).prop_flat_map(move |sources| {
            proptest::collection::vec(proptest::collection::vec(inference.clone(), sources), 1..6)
        })
    }

    #[test]
    fn nothing_said_and_nothing_to_judge_by_are_neutral() {
        assert_eq!(summac_zs(&[]), 0.0);
        assert_eq!(summac_zs(&[vec![], vec![]]), 0.0);
    }

    #[test]
    fn the_two_maxima_may_be_of_two_sentences() {
        let entails = Inference { entailment: 0.9, contradiction: 0.05 };
        let contradicts = Inference { entailment: 0.1, contradiction: 0.7 };
        assert!((summac_zs(&[vec![entails, contradicts]]) - 0.2).abs() < 1e-12);
    }

    #[test]
    fn short_sentences_are_left_out_and_long_sources_are_not_cut() {
        assert_eq!(judged_sentences("Well, yes. It was raining in Paris."), ["It was raining in Paris."]);
        // Ten and eleven characters, of more bytes.
        assert_eq!(judged_sentences("\u{c9}t\u{e9} \u{e0} Pau.").len(), 0);
        assert_eq!(judged_sentences("\u{c9}t\u{e9} \u{e0} Lyon.").len(), 1);
        assert_eq!(judged_sentences(&"It was raining in Paris. ".repeat(120)).len(), 120);
    }

    proptest! {
        #[test]
        fn order_does_not_matter(pairs in pairs(), turn in 0usize..5) {
            let mut turned = pairs.clone();
            let (rows, columns) = (pairs.len(), pairs[0].len());
            turned.rotate_left(turn % rows);
            turned.iter_mut().for_each(|sources| sources.rotate_left(turn % columns));
            prop_assert!((summac_zs(&pairs) - summac_zs(&turned)).abs() < 1e-12);
        }

        #[test]
        fn a_sentence_that_says_nothing_of_the_summary_changes_nothing(pairs in pairs()) {
            let mut more = pairs.clone();
            more.iter_mut().for_each(|sources| sources.push(Inference::default()));
            prop_assert_eq!(summac_zs(&pairs), summac_zs(&more));
        }
    }
}
