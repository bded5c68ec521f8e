//! Invented names of people and places, divided at random among training, testing and evaluation.

use super::choose;
use crate::random::{self, Stream, shuffle};

const FIRST: [&str; 44] = [
    "Ba", "Be", "Bo", "Bru", "Da", "De", "Do", "Dra", "Fe", "Fi", "Ga", "Go", "Gri", "Ha", "He", "Hu", "Ja", "Jo",
    "Ka", "Ke", "Kra", "La", "Le", "Lu", "Ma", "Me", "Mo", "Na", "Ne", "Ni", "Pa", "Pe", "Po", "Ra", "Ri", "Ro", "Sa",
    "Se", "Ta", "Te", "Tu", "Va", "Vu", "Zo",
];

const PERSON_LAST: [&str; 36] = [
    "bek", "bin", "car", "dan", "del", "dun", "fen", "fox", "gar", "gim", "kel", "kus", "lan", "lix", "lop", "mar",
    "mel", "min", "nak", "nor", "pak", "pim", "quil", "rak", "ren", "rus", "san", "sik", "tan", "tel", "tix", "van",
    "vik", "wen", "zan", "zil",
];

const PLACE_LAST: [&str; 24] = [
    "berg", "bury", "dale", "field", "ford", "gate", "ham", "holm", "land", "ley", "mere", "mont", "moor", "mouth",
    "port", "shaw", "sted", "stow", "thorp", "ton", "vale", "wick", "wold", "worth",
];

/// Which names a text may use. No name is in two of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Raw text, demonstrations, rankings and prompts to train on.
    Training,
    /// Held-out files of the same kinds.
    Test,
    /// The prompts of `evaluate`.
    Evaluation,
}

/// The names of one split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// People.
    pub people: Vec<String>,
    /// Places.
    pub places: Vec<String>,
}

impl Names {
    /// The names of a split under a seed: of all combinations of syllables, drawn at random, 80% are for training and 10%
    /// each for testing and evaluation.
    pub fn of(split: Split, seed: u64) -> Self {
        let part = |last: &[&str], purpose: &str| {
            let mut all: Vec<String> =
                FIRST.iter().flat_map(|first| last.iter().map(move |last| format!("{first}{last}"))).collect();
            shuffle(&mut all, &mut random::stream(seed, purpose, 0));
            let (eight, nine) = (all.len() * 8 / 10, all.len() * 9 / 10);
            match split {
                Split::Training => all[..eight].to_vec(),
                Split::Test => all[eight..nine].to_vec(),
                Split::Evaluation => all[nine..].to_vec(),
            }
        };
        Names { people: part(&PERSON_LAST, "people of the world"), places: part(&PLACE_LAST, "places of the world") }
    }

    /// A person other than `but`.
    pub fn person(&self, but: &[&str], stream: &mut Stream) -> String {
        loop {
            let person = choose(&self.people, stream);
            if !but.contains(&person.as_str()) {
                return person.clone();
            }
        }
    }

    /// Another name of the same split that shares a syllable with this one, as a writer who copies carelessly would write it.
    pub fn misspelt(&self, name: &str, stream: &mut Stream) -> String {
        let pool = if self.places.iter().any(|place| place == name) { &self.places } else { &self.people };
        let endings = if std::ptr::eq(pool, &self.places) { &PLACE_LAST[..] } else { &PERSON_LAST[..] };
        let ending = endings.iter().find(|ending| name.ends_with(**ending)).copied().unwrap_or_default();
        let beginning = name.strip_suffix(ending).unwrap_or(name);
        loop {
            let other = choose(pool, stream);
            if other != name && (other.ends_with(ending) || other.starts_with(beginning)) {
                return other.clone();
            }
        }
    }

    /// A place.
    pub fn place(&self, stream: &mut Stream) -> String {
        choose(&self.places, stream).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_name_is_in_two_splits_and_none_is_missing() {
        let splits = [Split::Training, Split::Test, Split::Evaluation].map(|split| Names::of(split, 5));
        let all: Vec<&String> = splits.iter().flat_map(|names| names.people.iter().chain(&names.places)).collect();
        assert_eq!(all.len(), FIRST.len() * (PERSON_LAST.len() + PLACE_LAST.len()));
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
    }
}
