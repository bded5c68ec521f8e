//! Prompts that begin alike (a system prompt, a template, the examples of a task): which of them share how much.

use super::PromptTokens;

/// The fewest tokens that a beginning has.
const FEWEST_TOKENS: usize = 16;

/// The fewest tokens that are saved by a beginning: it is computed in a pass alone, which reads all weights
/// once more.
const FEWEST_SAVED: usize = 32;

/// A beginning that several prompts of one stack share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beginning {
    /// Its tokens. Each of the prompts is longer.
    pub length: usize,
    /// The prompts, by their index.
    pub prompts: Vec<usize>,
}

/// The beginnings that prompts share, no prompt having more than one; `may_share` says which prompts may.
///
/// Prompts in the order of their tokens are divided into runs; a run goes on as long as this saves more
/// tokens than it loses by shortening what the run shares.
pub fn shared(prompts: &[PromptTokens], may_share: impl Fn(&PromptTokens) -> bool) -> Vec<Beginning> {
    let mut order: Vec<usize> = (0..prompts.len()).filter(|&index| may_share(&prompts[index])).collect();
    order.sort_by(|&a, &b| (prompts[a].stack, &prompts[a].tokens).cmp(&(prompts[b].stack, &prompts[b].tokens)));
    let mut found: Vec<Beginning> = Vec::new();
    for index in order {
        // The last token is computed for each prompt: from it the answer's first token is drawn.
        let alone = Beginning { length: prompts[index].tokens.len().saturating_sub(1), prompts: vec![index] };
        let Some(run) = found.last_mut() else {
            found.push(alone);
            continue;
        };
        let first = &prompts[run.prompts[0]];
        let pairs = first.tokens[..run.length].iter().zip(&prompts[index].tokens[..alone.length]);
        let common = pairs.take_while(|(a, b)| a == b).count();
        let (saved, saved_before) = (common * run.prompts.len(), run.length * (run.prompts.len() - 1));
        if first.stack == prompts[index].stack && common >= FEWEST_TOKENS && saved >= saved_before {
            run.length = common;
            run.prompts.push(index);
        } else {
            found.push(alone);
        }
    }
    found.retain(|run| run.length * (run.prompts.len() - 1) >= FEWEST_SAVED);
    found.iter_mut().for_each(|run| run.prompts.sort_unstable());
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prompt(beginning: u32, length: usize, end: &[u32]) -> PromptTokens {
        [&vec![beginning; length][..], end].concat().into()
    }

    fn all(prompts: &[PromptTokens]) -> Vec<Beginning> {
        shared(prompts, |_| true)
    }

    #[test]
    fn prompts_behind_one_system_prompt_share_it() {
        let prompts = [prompt(5, 20, &[1, 2]), prompt(6, 30, &[]), prompt(5, 20, &[2, 2]), prompt(5, 20, &[3])];
        assert_eq!(all(&prompts), [Beginning { length: 20, prompts: vec![0, 2, 3] }]);
        // Equal prompts keep their last token each.
        let twice = [prompt(5, 40, &[]), prompt(5, 40, &[])];
        assert_eq!(all(&twice), [Beginning { length: 39, prompts: vec![0, 1] }]);
        assert_eq!(all(&[prompt(5, 20, &[]), prompt(5, 20, &[])]), []);
        let of_two_users = [prompt(5, 40, &[]), PromptTokens { stack: 1, ..prompt(5, 40, &[]) }];
        assert_eq!(all(&of_two_users), []);
        assert_eq!(shared(&prompts, |prompt| prompt.tokens.len() == 21), []);
    }

    #[test]
    fn a_long_beginning_of_many_is_not_given_up_for_a_short_one_of_few() {
        let mut prompts: Vec<PromptTokens> = (0..10).map(|end| prompt(5, 200, &[end])).collect();
        prompts.push(prompt(5, 20, &[9, 9]));
        prompts.push(prompt(5, 10, &[]));
        assert_eq!(all(&prompts), [Beginning { length: 200, prompts: (0..10).collect() }]);
    }

    proptest! {
        #[test]
        fn what_is_shared_is_the_same_and_shorter_than_each(
            prompts in prop::collection::vec((0usize..2, prop::collection::vec(0u32..2, 1..40)), 0..30)
        ) {
            let beginning = [7; 14];
            let prompts: Vec<PromptTokens> = prompts.into_iter()
                .map(|(stack, tokens)| PromptTokens { stack, ..[&beginning[..], &tokens].concat().into() })
                .collect();
            let mut seen = vec![false; prompts.len()];
            for Beginning { length, prompts: members } in all(&prompts) {
                prop_assert!(length >= FEWEST_TOKENS && length * (members.len() - 1) >= FEWEST_SAVED);
                let first = &prompts[members[0]];
                for index in members {
                    prop_assert!(!std::mem::replace(&mut seen[index], true));
                    prop_assert!(prompts[index].stack == first.stack && prompts[index].tokens.len() > length);
                    prop_assert_eq!(&prompts[index].tokens[..length], &first.tokens[..length]);
                }
            }
        }
    }
}
