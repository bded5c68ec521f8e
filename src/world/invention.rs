//! What kind of thing a hallucinated answer makes up.

use super::facts::Fact;
use super::rule::{Case, REFUSAL, sentences};

/// What a sentence is that its passage does not hold (Maynez et al. 2020, section 2, call the first intrinsic and the others extrinsic).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invention {
    /// It contradicts the passage: a value other than the one that the passage gives for this person and relation.
    Contradiction,
    /// It adds to the passage: a relation of one of its people of which it does not speak.
    Addition,
    /// It speaks of a person of whom the passage does not.
    Person,
    /// It is no sentence of the world's form: garbled, or cut off.
    Garbled,
}

/// What kinds of things an answer to a closed-domain prompt makes up, each once, by the same sentences as the rule ([`judge`](super::rule::judge)): some exactly if it is
/// hallucinated.
pub fn inventions(case: &Case, answer: &str) -> Vec<Invention> {
    if !case.kind.is_closed_domain() {
        return Vec::new();
    }
    let line = answer.trim().split('\n').next().unwrap_or_default();
    let held: Vec<Fact> = case.facts.iter().filter_map(|fact| Fact::parse(fact)).collect();
    let invention = |sentence: &str| match Fact::parse(sentence) {
        None => Invention::Garbled,
        Some(said) => {
            let of_person: Vec<&Fact> = held.iter().filter(|fact| fact.person == said.person).collect();
            match of_person.iter().any(|fact| fact.relation == said.relation) {
                _ if of_person.is_empty() => Invention::Person,
                true => Invention::Contradiction,
                false => Invention::Addition,
            }
        }
    };
    let is_invented = |sentence: &&str| *sentence != REFUSAL && !case.facts.iter().any(|fact| fact == sentence);
    let mut found: Vec<Invention> = sentences(line).into_iter().filter(is_invented).map(invention).collect();
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::rule::{Kind, judge};

    fn case(kind: Kind) -> Case {
        let facts = ["Vubek lives in Dradale.", "Vubek keeps a hen.", "Zotan drinks tea."].map(String::from).to_vec();
        Case { prompt: "Passage: ...".into(), kind, facts, expected: None }
    }

    #[test]
    fn every_kind_is_told_from_the_others() {
        use Invention::{Addition, Contradiction, Garbled, Person};
        for (answer, expected) in [
            (" Vubek keeps a hen. The passage does not say.", &[][..]),
            ("", &[]),
            (" Vubek keeps a goat.", &[Contradiction]),
            (" Zotan keeps a hen.", &[Addition]),
            (" Vubak keeps a hen.", &[Person]),
            (" Vubek keeps a", &[Garbled]),
            (
                " Hello. Vubek likes soup. Vubek likes fish. Vubek lives in Dradham.",
                &[Contradiction, Addition, Garbled],
            ),
            // What follows the first line is no part of the answer.
            (" Vubek keeps a hen.\nVubek keeps a goat.", &[]),
        ] {
            assert_eq!(inventions(&case(Kind::Summary), answer), expected, "{answer}");
            assert_eq!(judge(&case(Kind::Summary), answer).hallucinated, !expected.is_empty(), "{answer}");
        }
        assert!(inventions(&case(Kind::Provocation), " Vubek keeps a goat.").is_empty());
    }
}
