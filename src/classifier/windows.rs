//! Texts that are longer than a classifier reads, as windows that together hold all of them.

use super::{Classifier, ClassifierInput};
use crate::error::Result;

/// A text, or a pair of texts, as the inputs that a classifier can read whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// `[window of the second text][window of the first text]`; of a text alone one row.
    pub inputs: Vec<Vec<ClassifierInput>>,
    /// Whether even a window of a single character loses something: the classifier reads fewer tokens than that has.
    pub was_cut: bool,
}

impl Windows {
    /// How many inputs there are; 1 for a text that is read at once.
    pub fn len(&self) -> usize {
        self.inputs.iter().map(Vec::len).sum()
    }

    /// Whether there is none, which never is so.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Of a window the part that the next one repeats, so that what stands at an edge is read with what is around it.
const OVERLAP: f64 = 0.25;
/// A word of more characters may be divided: so it is in scripts that put no space between words.
const LONGEST_WORD: usize = 16;
/// Words that a first window is tried with.
const FIRST_GUESS: usize = 256;

impl Classifier {
    /// The windows of a text, or of both texts of a pair, in their order; neighbours overlap by a quarter. A second text that fills the classifier by
    /// itself is divided too, into windows of at most half of what it reads.
    pub fn windows(&self, input: &ClassifierInput) -> Result<Windows> {
        let fits = |text: &str, pair: Option<&str>| {
            let input = ClassifierInput { text: text.to_string(), pair: pair.map(str::to_string) };
            Ok(!self.encode(&input)?.was_cut)
        };
        if fits(&input.text, input.pair.as_deref())? {
            return Ok(Windows { inputs: vec![vec![input.clone()]], was_cut: false });
        }
        let Some(pair) = &input.pair else {
            let (windows, was_cut) = divided(&input.text, |text| fits(text, None))?;
            let input = |text: &str| ClassifierInput { text: text.to_string(), pair: None };
            return Ok(Windows { inputs: vec![windows.into_iter().map(input).collect()], was_cut });
        };
        // A second text leaves the first at least as much room as it takes: written twice it fits.
        let (pairs, mut was_cut) = divided(pair, |part| fits(part, Some(part)))?;
        let mut inputs = Vec::with_capacity(pairs.len());
        for pair in pairs {
            let (texts, text_was_cut) = divided(&input.text, |text| fits(text, Some(pair)))?;
            was_cut |= text_was_cut;
            let input = |text: &str| ClassifierInput { text: text.to_string(), pair: Some(pair.to_string()) };
            inputs.push(texts.into_iter().map(input).collect());
        }
        Ok(Windows { inputs, was_cut })
    }
}

/// The longest parts of a text that fit, each from a word's beginning to another's, neighbours overlapping by a quarter; and whether one of them does
/// not fit though it is as short as can be. `fits` holds for shorter parts where it holds for longer ones, nearly.
fn divided(text: &str, fits: impl Fn(&str) -> Result<bool>) -> Result<(Vec<&str>, bool)> {
    let places = places(text);
    let last = places.len() - 1;
    let (mut parts, mut was_cut, mut first, mut guess) = (Vec::new(), false, 0, FIRST_GUESS);
    while first < last || parts.is_empty() {
        let part = |end: usize| &text[places[first]..places[end.min(last)]];
        // Between `low`, which fits (or is a single step, which has to do), and `high`, which does not.
        let (mut low, mut high) = ((first + 1).min(last), last + 1);
        let mut end = (first + guess).min(last);
        while low + 1 < high {
            if fits(part(end))? {
                low = end
            } else {
                high = end
            }
            // Twice as far until it is too far.
            end = if high > last { (2 * low - first).min(last) } else { low + (high - low) / 2 };
        }
        was_cut |= !fits(part(low))?;
        parts.push(part(low));
        if low >= last {
            break;
        }
        guess = low - first;
        first = low - ((guess as f64 * OVERLAP) as usize).min(guess - 1);
        // Less of it where else the next window would go no further.
        while first < low && !fits(&text[places[first]..places[low + 1]])? {
            first += 1;
        }
    }
    Ok((parts, was_cut))
}

/// Where a text can be divided: the beginnings of its words, every character of a very long one, and the end.
fn places(text: &str) -> Vec<usize> {
    let mut places = vec![0];
    let (mut word, mut after_space) = (0, false);
    for (index, character) in text.char_indices() {
        if after_space && !character.is_whitespace() {
            places.push(index);
            word = index;
        } else if index > word && text[word..index].chars().nth(LONGEST_WORD).is_some() {
            places.push(index);
        }
        after_space = character.is_whitespace();
    }
    places.push(text.len());
    places.dedup();
    places
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As a classifier that reads so many characters.
    fn parts(text: &str, most: usize) -> (Vec<&str>, bool) {
        divided(text, |part| Ok(part.chars().count() <= most)).unwrap()
    }

    #[test]
    fn windows_are_whole_words_that_overlap() {
        assert_eq!(parts("one two", 20), (vec!["one two"], false));
        assert_eq!(parts("a b c d e f g h", 8), (vec!["a b c d ", "d e f g ", "g h"], false));
        assert_eq!(parts("", 3), (vec![""], false));
        assert_eq!(parts("abc", 2), (vec!["abc"], true));
        let unspaced = "字".repeat(100);
        let (found, was_cut) = parts(&unspaced, 40);
        assert!(found.len() > 2 && !was_cut && found.iter().all(|part| part.chars().count() <= 40), "{found:?}");
    }

    proptest! {
        #[test]
        fn windows_hold_the_whole_text_and_each_fits(text in "([a-z]{1,6}|[\u{4e00}-\u{4e20}]{0,50}|[ \n]{1,3}){0,60}", most in 31usize..60) {
            let (found, was_cut) = parts(&text, most);
            prop_assert!(!was_cut);
            let mut reached = 0;
            for part in &found {
                prop_assert!(part.chars().count() <= most);
                let start = part.as_ptr() as usize - text.as_ptr() as usize;
                // No gap, and each goes further than the one before.
                prop_assert!(start <= reached && (start + part.len() > reached || text.is_empty()));
                reached = start + part.len();
            }
            prop_assert_eq!(reached, text.len());
        }
    }
}
