//! A list of words as a scorer: 1 for a text that contains one of them, else 0.

use std::path::Path;

use aho_corasick::AhoCorasick;
use arrow::array::Array;
use xxhash_rust::xxh3::xxh3_128;

use super::scorer::{Concern, Identity, Scorer, Subject, Verdict};
use super::scripts::is_unspaced;
use crate::bail;
use crate::data::form::is_data_file;
use crate::data::table::TableRows;
use crate::error::{Error, Result};
use crate::limits;

/// Words and phrases that make a text count. Case does not matter, and a word counts as a whole only: between characters that are no letters or digits, but
/// anywhere in scripts that put no space between words.
#[derive(Debug)]
pub struct WordList {
    words: Vec<String>,
    automaton: AhoCorasick,
    identity: Identity,
}

impl WordList {
    /// A list by name.
    pub fn new(name: &str, words: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Self> {
        let mut words: Vec<String> =
            words.into_iter().map(|word| word.as_ref().trim().to_lowercase()).filter(|word| !word.is_empty()).collect();
        words.sort();
        words.dedup();
        if words.is_empty() {
            bail!("{name}: there is no word in it; expected one or more");
        }
        let automaton = AhoCorasick::new(&words).map_err(|error| Error::input(format!("{name}: {error}")))?;
        let hash = format!("xxh3:{:032x}", xxh3_128(words.join("\n").as_bytes()));
        let version = format!("list of {} words, 1", words.len());
        let concern = Concern::Toxicity;
        let identity =
            Identity { name: name.to_string(), concern, version, hash: Some(hash), threshold: 1.0, max_tokens: None };
        Ok(WordList { words, automaton, identity })
    }

    /// Reads a list: a text file with a word or phrase a line, or a data set (Parquet, JSON Lines, CSV) with a column `word`, of which `language` keeps the rows whose column `lang` is this.
    pub fn read(name: &str, file: &str, language: Option<&str>) -> Result<Self> {
        if !is_data_file(Path::new(file)) {
            if let Some(language) = language {
                bail!(
                    "{file}: a text file has no languages to choose \"{language}\" from; leave it out, or give a data set (Parquet, JSON Lines, CSV) with the columns word and lang"
                );
            }
            let text = limits::read_text(file, limits::SMALL_FILE)?;
            return Self::new(name, text.lines());
        }
        let mut words = Vec::new();
        for rows in TableRows::open(file)? {
            let rows = rows?;
            let column = rows.strings("word")?;
            let languages = language.map(|_| rows.strings("lang")).transpose()?;
            let is_wanted = |row: usize| {
                languages
                    .as_ref()
                    .is_none_or(|languages| languages.is_valid(row) && Some(languages.value(row)) == language)
            };
            let wanted = column.iter().enumerate().filter(|&(row, _)| is_wanted(row));
            words.extend(wanted.filter_map(|(_, word)| word.map(String::from)));
        }
        if let (Some(language), true) = (language, words.is_empty()) {
            bail!("{file}: no row's column `lang` is \"{language}\"; expected a language of the file");
        }
        Self::new(name, words)
    }

    /// Whether a text contains a word of the list.
    pub fn is_in(&self, text: &str) -> bool {
        let text = text.to_lowercase();
        self.automaton.find_overlapping_iter(&text).any(|found| {
            let word = &self.words[found.pattern()];
            let before = text[..found.start()].chars().next_back();
            let after = text[found.end()..].chars().next();
            is_edge(before, word.chars().next()) && is_edge(after, word.chars().next_back())
        })
    }
}

/// Whether a word can end between its own last (or first) character and a neighbour.
fn is_edge(neighbour: Option<char>, own: Option<char>) -> bool {
    !neighbour.is_some_and(char::is_alphanumeric) || own.is_some_and(|own| !own.is_alphanumeric() || is_unspaced(own))
}

impl Scorer for WordList {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn judge(&self, subjects: &[Subject]) -> Result<Vec<Verdict>> {
        Ok(subjects.iter().map(|subject| f64::from(self.is_in(subject.text)).into()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_counts_as_a_whole_in_any_case() {
        let list = WordList::new("list", ["Dolt", "shut up", " 馬鹿 ", "c++", "ໂງ່", "ល្ងង់"]).unwrap();
        for (text, expected) in [
            ("You DOLT!", true),
            ("dolt", true),
            ("The dolts of Doltown", false),
            ("Shut  up", false),
            ("please shut up.", true),
            ("この馬鹿野郎", true),
            ("ເຈົ້າໂງ່ຫຼາຍ", true),
            ("អ្នកល្ងង់ណាស់", true),
            ("I write c++98", true),
            ("", false),
        ] {
            assert_eq!(list.is_in(text), expected, "{text}");
        }
    }

    #[test]
    fn the_hash_is_of_the_words_and_an_empty_list_is_refused() {
        let hash = |words: &[&str]| WordList::new("list", words).unwrap().identity().hash.clone();
        assert_eq!(hash(&["a", "B", "a"]), hash(&["b", "a"]));
        assert_ne!(hash(&["a"]), hash(&["b"]));
        assert!(WordList::new("list", ["  "]).unwrap_err().to_string().contains("no word"));
    }
}
