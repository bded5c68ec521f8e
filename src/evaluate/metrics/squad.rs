//! Exact match and F1 of tokens, as SQuAD's official evaluation has them (Rajpurkar et al. 2016, section 6.1; 2018 for questions
//! without an answer).

use std::collections::HashMap;

use crate::numbers::largest;

/// How well an answer agrees with its references, each of the two with the reference that suits it best.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Agreement {
    /// 1 where the answer is one of the references but for what [`normalize_answer`] removes, else 0.
    pub exact_match: f64,
    /// The highest [`f1`].
    pub f1: f64,
}

/// What is compared: lower case, without ASCII punctuation, without the articles `a`, `an` and `the`, words separated by single
/// spaces.
///
/// Punctuation goes first and leaves no space behind: `well-known` is `wellknown`, and `a.` is an article.
pub fn normalize_answer(text: &str) -> String {
    let bare: String = text.to_lowercase().chars().filter(|character| !character.is_ascii_punctuation()).collect();
    let mut without_articles = String::with_capacity(bare.len());
    let mut rest = bare.as_str();
    while let Some(first) = rest.chars().next() {
        // A word ends at any sign that is neither letter nor digit, as at an em dash, which is no ASCII punctuation.
        let is_word = first.is_alphanumeric();
        let end = rest.find(|character: char| character.is_alphanumeric() != is_word).unwrap_or(rest.len());
        let (run, after) = rest.split_at(end);
        without_articles.push_str(if matches!(run, "a" | "an" | "the") { " " } else { run });
        rest = after;
    }
    without_articles.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Python's `str.split` takes the four separators of ASCII for space too, which Unicode does not.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// Whether both are the same after [`normalize_answer`].
pub fn exact_match(answer: &str, reference: &str) -> bool {
    normalize_answer(answer) == normalize_answer(reference)
}

/// The harmonic mean of precision and recall of the answer's words, each of which counts as often as both texts have it.
///
/// Where one of the two has no words after [`normalize_answer`], 1 if neither has, else 0 (SQuAD 2.0; version 1.1 gives 0 to both).
pub fn f1(answer: &str, reference: &str) -> f64 {
    let (answer, reference) = (normalize_answer(answer), normalize_answer(reference));
    if answer.is_empty() || reference.is_empty() {
        return f64::from(answer == reference);
    }
    let mut unmatched: HashMap<&str, usize> = HashMap::new();
    for word in reference.split(' ') {
        *unmatched.entry(word).or_default() += 1;
    }
    let mut common = 0usize;
    for word in answer.split(' ') {
        if let Some(left) = unmatched.get_mut(word).filter(|left| **left > 0) {
            *left -= 1;
            common += 1;
        }
    }
    if common == 0 {
        return 0.0;
    }
    let precision = common as f64 / answer.split(' ').count() as f64;
    let recall = common as f64 / reference.split(' ').count() as f64;
    2.0 * precision * recall / (precision + recall)
}

/// The best agreement with any reference, by the rule of SQuAD 2.0: references without words are left out, and a question that has
/// no other is one without an answer, to which the right answer is an empty one.
pub fn best<R: AsRef<str>>(answer: &str, references: &[R]) -> Agreement {
    let mut references: Vec<&str> = references.iter().map(AsRef::as_ref).collect();
    references.retain(|reference| !normalize_answer(reference).is_empty());
    if references.is_empty() {
        references.push("");
    }
    let exact = references.iter().any(|reference| exact_match(answer, reference));
    let highest = largest(references.iter().map(|reference| f1(answer, reference))).unwrap_or(0.0);
    Agreement { exact_match: f64::from(exact), f1: highest }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn articles_go_only_as_whole_words() {
        assert_eq!(normalize_answer("The theatre, an  Anthem & a.m."), "theatre anthem am");
        assert_eq!(normalize_answer("a\u{2014}the\u{1f}an b"), "\u{2014} b");
    }

    #[test]
    fn a_word_counts_as_often_as_both_have_it() {
        // Two of three words of the answer, two of two words of the reference.
        assert!((f1("red red red", "red red") - 0.8).abs() < 1e-12);
    }

    #[test]
    fn an_empty_answer_is_right_where_there_is_none() {
        let none: [&str; 0] = [];
        assert_eq!(best("The.", &none), Agreement { exact_match: 1.0, f1: 1.0 });
        assert_eq!(best("yes", &["", "the"]), Agreement { exact_match: 0.0, f1: 0.0 });
        // A reference without words does not make an empty answer right where another has words.
        assert_eq!(best("", &["", "red"]), Agreement { exact_match: 0.0, f1: 0.0 });
    }

    proptest! {
        #[test]
        fn normalising_twice_changes_nothing_more(text in "[a-cTheAn .,\u{2014}\u{e9}\u{3a3}]{0,30}") {
            let once = normalize_answer(&text);
            prop_assert_eq!(normalize_answer(&once), once);
        }

        #[test]
        fn f1_is_symmetric_and_1_for_the_same_words(a in "([a-c] ?){0,8}", b in "([a-c] ?){0,8}") {
            prop_assert!((f1(&a, &b) - f1(&b, &a)).abs() < 1e-12);
            prop_assert!((f1(&a, &a) - 1.0).abs() < 1e-12);
        }

        #[test]
        fn a_further_reference_never_lowers_the_best(
            answer in "([b-d] ?){0,6}", one in "[b-d] ([b-d] ?){0,6}", two in "([b-d] ?){0,6}",
        ) {
            let (with_one, with_both) = (best(&answer, &[&one]), best(&answer, &[&one, &two]));
            prop_assert!(with_both.f1 >= with_one.f1 && with_both.exact_match >= with_one.exact_match);
        }
    }
}
