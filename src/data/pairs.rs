//! Pairs of ranked answers, of which one is better: what reward models and DPO learn from.
//!
//! Two answers that are the same tokens say nothing, however they are ranked: their scores are equal whatever the weights, so a pair of them would
//! be a constant in the loss (ln 2) and half a hit in the accuracy. Some answers become the same only when `--max-length` cuts them.

use super::batch::{Continuation, TokenTree};
use super::schema::Ranking;
use super::tokenize_records::Truncation;
use crate::error::Result;

/// Two answers to one prompt of which the first is ranked better, by their index within the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// The answer with the lower rank.
    pub better: usize,
    /// The answer with the higher rank.
    pub worse: usize,
    /// By how many ranks they differ.
    pub distance: i64,
}

impl Pair {
    /// The same pair, the other answer being the better.
    pub fn reversed(self) -> Self {
        Pair { better: self.worse, worse: self.better, ..self }
    }
}

/// All pairs of answers that are no tie, by their better answer and then by the worse.
pub fn pairs(ranks: &[i64]) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for (better, &low) in ranks.iter().enumerate() {
        for (worse, &high) in ranks.iter().enumerate() {
            if low < high {
                pairs.push(Pair { better, worse, distance: high - low });
            }
        }
    }
    pairs
}

/// All pairs of answers that are no tie and differ; `same_as` has for each answer the first one that is the same.
pub fn differing_pairs(ranks: &[i64], same_as: &[usize]) -> Vec<Pair> {
    pairs(ranks).into_iter().filter(|pair| same_as[pair.better] != same_as[pair.worse]).collect()
}

/// A ranking as tokens, with what can be learned from it.
#[derive(Debug, Clone, PartialEq)]
pub struct RankedTokens {
    /// Prompt and answers.
    pub tree: TokenTree,
    /// For each answer the first one that is the same.
    pub same_as: Vec<usize>,
    /// The pairs of answers that are no tie and differ; at least one.
    pub pairs: Vec<Pair>,
}

/// What two answers are compared by: one for which there is nothing is the same as any other such.
pub type Compared = for<'a> fn(&'a Continuation) -> Option<(&'a [u32], &'a [bool])>;

/// A longest sequence that cuts nothing, with room for what is added to it.
const WHOLE: usize = usize::MAX / 4;

/// Makes tokens of a ranking by `tokenize`, which is given the longest sequence allowed. Nothing comes back where its answers are one tie or,
/// compared by `compared`, all the same. `truncation` counts what is left out.
pub fn ranked_tokens(
    ranking: &Ranking,
    max_length: usize,
    truncation: &mut Truncation,
    tokenize: impl Fn(&Ranking, usize, &mut Truncation) -> Result<TokenTree>,
    compared: Compared,
) -> Result<Option<RankedTokens>> {
    let all = pairs(&ranking.ranks);
    if all.is_empty() {
        truncation.ties += 1;
        return Ok(None);
    }
    let cut_before = truncation.answers;
    let tree = tokenize(ranking, max_length, truncation)?;
    let same_as = first_same(&tree, compared);
    let (differing, same): (Vec<Pair>, Vec<Pair>) =
        all.into_iter().partition(|pair| same_as[pair.better] != same_as[pair.worse]);
    truncation.same_pairs += same.len();
    if !same.is_empty() && truncation.answers > cut_before {
        let whole = first_same(&tokenize(ranking, WHOLE, &mut Truncation::default())?, compared);
        truncation.same_when_cut += same.iter().filter(|pair| whole[pair.better] != whole[pair.worse]).count();
    }
    if differing.is_empty() {
        truncation.without_pairs += 1;
        return Ok(None);
    }
    Ok(Some(RankedTokens { tree, same_as, pairs: differing }))
}

/// For each answer the first one that is the same.
fn first_same(tree: &TokenTree, compared: Compared) -> Vec<usize> {
    let first = |answer: &Continuation| {
        let mut answers = tree.answers.iter();
        answers.position(|other| compared(other) == compared(answer)).unwrap_or_default()
    };
    tree.answers.iter().map(first).collect()
}

/// Compares answers by their tokens, as scores do.
pub fn by_tokens(answer: &Continuation) -> Option<(&[u32], &[bool])> {
    Some((&answer.tokens[..], &[][..]))
}

/// Compares answers by their tokens and by which of them are learned, as log-probabilities do; an answer of which nothing is learned has none.
pub fn by_learned_tokens(answer: &Continuation) -> Option<(&[u32], &[bool])> {
    answer.learned.contains(&true).then_some((&answer.tokens[..], &answer.learned[..]))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::data::schema::{Origin, Text};

    fn ranking(answers: &[&str], ranks: &[i64]) -> Ranking {
        Ranking {
            prompt: Text::Plain(String::new()),
            responses: answers.iter().map(|answer| Text::Plain(answer.to_string())).collect(),
            ranks: ranks.to_vec(),
            margin: None,
            weight: 1.0,
            agreement: None,
            origin: Origin { file: Arc::from(Path::new("a")), row: 0 },
        }
    }

    /// A token a byte, spaces at the end apart, at most `max_length`.
    fn tokenize(ranking: &Ranking, max_length: usize, truncation: &mut Truncation) -> Result<TokenTree> {
        let mut answer = |text: &Text| {
            let Text::Plain(text) = text else { unreachable!("answers are plain here") };
            let mut tokens: Vec<u32> = text.trim_end().bytes().map(u32::from).collect();
            truncation.answers += usize::from(tokens.len() > max_length);
            tokens.truncate(max_length);
            let learned = tokens.iter().map(|&token| token != u32::from(b'-')).collect();
            Continuation { tokens, learned }
        };
        Ok(TokenTree { prompt: vec![0], answers: ranking.responses.iter().map(&mut answer).collect() })
    }

    fn read(answers: &[&str], ranks: &[i64], compared: Compared) -> (Option<Vec<(usize, usize)>>, Truncation) {
        let mut truncation = Truncation::default();
        let found = ranked_tokens(&ranking(answers, ranks), 4, &mut truncation, tokenize, compared).unwrap();
        let pairs = |ranked: RankedTokens| ranked.pairs.iter().map(|pair| (pair.better, pair.worse)).collect();
        (found.map(pairs), truncation)
    }

    #[test]
    fn a_ranking_keeps_the_pairs_whose_answers_differ_and_counts_the_others() {
        let (pairs, counts) = read(&["abc", "abc ", "abd"], &[0, 1, 2], by_tokens);
        assert_eq!(pairs, Some(vec![(0, 2), (1, 2)]));
        assert_eq!((counts.same_pairs, counts.same_when_cut, counts.without_pairs), (1, 0, 0));
        // Two are the same only because they are cut, and a tie is no pair at all.
        let (pairs, counts) = read(&["abcdX", "abcdY", "abcdX", "b"], &[0, 1, 2, 2], by_tokens);
        assert_eq!(pairs, Some(vec![(0, 3), (1, 3)]));
        assert_eq!((counts.answers, counts.same_pairs, counts.same_when_cut), (3, 3, 2));
        let (pairs, counts) = read(&["abcdX", "abcdY"], &[1, 0], by_tokens);
        assert_eq!((pairs, counts.without_pairs, counts.same_when_cut, counts.ties), (None, 1, 1, 0));
        assert_eq!(read(&["a", "b"], &[3, 3], by_tokens), (None, Truncation { ties: 1, ..Truncation::default() }));
    }

    #[test]
    fn answers_of_which_nothing_is_learned_do_not_differ_to_a_language_model() {
        assert_eq!(read(&["--", "-"], &[0, 1], by_learned_tokens).0, None);
        assert_eq!(read(&["--", "-"], &[0, 1], by_tokens).0, Some(vec![(0, 1)]));
        assert_eq!(read(&["--a", "-"], &[0, 1], by_learned_tokens).0, Some(vec![(0, 1)]));
    }

    #[test]
    fn ties_are_no_pairs() {
        assert_eq!(pairs(&[1, 0, 1]).len(), 2);
    }
}
