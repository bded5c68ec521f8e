//! Sentences of English text.

/// The sentences of a text in its order, each without the space around it; empty ones are left out.
///
/// By the rules of the `sentencex` library of the Wikimedia Foundation. A full stop after an abbreviation (`Mr.`, `e.g.`, `No. 5`),
/// an initial or within a number ends no sentence, nor does one inside a quotation that its sentence goes on after. An empty line
/// ends a sentence, a single line break does not, but for the items of a list. The field's usual tool, NLTK's Punkt (Kiss and Strunk
/// 2006), gives the same on most text; it also ends sentences after `e.g.` and `i.e.`, and where a lower-case word follows a
/// quotation.
pub fn sentences(text: &str) -> Vec<&str> {
    sentencex::segment("en", text).into_iter().map(str::trim).filter(|sentence| !sentence.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sentences_end_at_full_stops_question_and_exclamation_marks() {
        assert_eq!(sentences("It rained. Did it? It did! Yes"), ["It rained.", "Did it?", "It did!", "Yes"]);
        assert_eq!(sentences("What?! Really...  Yes."), ["What?!", "Really...", "Yes."]);
        assert!(sentences("").is_empty() && sentences(" \n\n ").is_empty());
    }

    #[test]
    fn abbreviations_initials_and_numbers_end_no_sentence() {
        for whole in [
            "Mr. Smith and Dr. J. R. Jones of Acme Inc. met Mrs. Brown.",
            "It rose 3.5% vs. last year, i.e. in Jan. 2020.",
            "Fruit, e.g. apples, is No. 5 of the list.",
            "Ph.D. students visited the U.S. Senate at 5 p.m. on Monday.",
            "Visit www.example.com or write to a.b@example.com today.",
        ] {
            assert_eq!(sentences(whole), [whole]);
        }
        assert_eq!(sentences("He lives in the U.S. He likes it."), ["He lives in the U.S.", "He likes it."]);
        assert_eq!(sentences("It ends at 6 p.m. Bring food."), ["It ends at 6 p.m.", "Bring food."]);
    }

    #[test]
    fn quotations_belong_to_their_sentences() {
        let text = "\"I won't go,\" she said. \"It is late.\" He asked \"Why?\" and left.";
        assert_eq!(sentences(text), ["\"I won't go,\" she said.", "\"It is late.\"", "He asked \"Why?\" and left."]);
    }

    #[test]
    fn empty_lines_and_items_of_lists_separate_and_line_breaks_do_not() {
        assert_eq!(sentences("A heading\n\nOne sentence\nin two lines."), ["A heading", "One sentence\nin two lines."]);
        assert_eq!(sentences("- one\n- two\n- three"), ["- one", "- two", "- three"]);
    }

    proptest! {
        #[test]
        fn nothing_but_space_is_lost(text in any::<String>()) {
            check_that_nothing_is_lost(&text)?;
        }

        #[test]
        fn nothing_but_space_is_lost_among_many_marks(
            text in "([A-Za-z]{0,4}[ .?!\"'()\u{201c}\u{201d}\u{2026}\n\r\t1-3*\u{a0}\u{e9}-]{0,3}){0,40}",
        ) {
            check_that_nothing_is_lost(&text)?;
        }
    }

    fn check_that_nothing_is_lost(text: &str) -> Result<(), TestCaseError> {
        let visible = |text: &str| text.chars().filter(|character| !character.is_whitespace()).collect::<String>();
        prop_assert_eq!(visible(&sentences(text).concat()), visible(text));
        Ok(())
    }
}
