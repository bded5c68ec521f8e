//! What goes through a model at a time: how texts lie in a pass, and how many rows they take.

use std::ops::Range;

use super::Model;
use super::adapter::{Pass, StepRows};
use super::layout::OwnRows;
use crate::data::batch::{Batch, TokenTree, largest_run, split_by_budget};
use crate::random;

impl Model {
    /// Lays trees end to end in the way that the model needs: an encoder's answers stand each behind a copy of
    /// their prompt.
    pub fn pack<'a>(&self, trees: impl IntoIterator<Item = &'a TokenTree>) -> Batch {
        self.pack_stacks(trees.into_iter().map(|tree| (tree, 0)))
    }

    /// The same for trees that run each with a stack of its own.
    pub fn pack_stacks<'a>(&self, trees: impl IntoIterator<Item = (&'a TokenTree, usize)>) -> Batch {
        if !self.architecture.causal {
            return Batch::pack_pairs(trees);
        }
        let own_rows = self.own_rows();
        Batch::pack_some_apart(trees, |tree, stack| self.rotates_by_length(tree.longest(), own_rows[stack]))
    }

    /// Lays texts to be classified end to end: trees of one answer, each with the types of its tokens as the
    /// tokenizer gives them.
    pub fn pack_texts<'a>(&self, texts: impl IntoIterator<Item = (&'a TokenTree, &'a [u32])>) -> Batch {
        let (trees, types): (Vec<&TokenTree>, Vec<&[u32]>) = texts.into_iter().unzip();
        let batch = self.pack(trees);
        Batch { types: types.concat(), ..batch }
    }

    /// The rows that a batch has in the transformer: its tokens, and the virtual tokens before each document.
    pub fn rows(&self, batch: &Batch) -> usize {
        let own_rows = self.own_rows();
        let roots = batch.segments.iter().filter(|segment| segment.parent.is_none());
        batch.tokens.len() + roots.map(|segment| own_rows[segment.stack].virtual_rows).sum::<usize>()
    }

    /// The rows that a tree has in the transformer, wherever it is packed, with the model's own stack.
    pub fn rows_of(&self, tree: &TokenTree) -> usize {
        self.rows_with(tree, self.own_rows()[0])
    }

    /// The same of a prompt and so many answers, each of so many tokens.
    pub fn rows_of_answers(&self, prompt: usize, answers: usize, tokens: usize) -> usize {
        self.rows_of_lengths(prompt, std::iter::repeat_n(tokens, answers), self.own_rows()[0])
    }

    /// Splits trees into runs that go through the model at a time, each of at most `budget` rows; a tree of more
    /// goes alone.
    pub fn passes<'a>(&self, trees: impl IntoIterator<Item = &'a TokenTree>, budget: usize) -> Vec<Range<usize>> {
        self.passes_of_stacks(trees.into_iter().map(|tree| (tree, 0)), budget)
    }

    /// The rows of the largest of those runs.
    pub fn largest_pass<'a>(&self, trees: impl IntoIterator<Item = &'a TokenTree>, budget: usize) -> usize {
        let rows: Vec<usize> = trees.into_iter().map(|tree| self.rows_of(tree)).collect();
        largest_run(&rows, budget)
    }

    /// The same for trees that run each with a stack of its own.
    pub fn passes_of_stacks<'a>(
        &self,
        trees: impl IntoIterator<Item = (&'a TokenTree, usize)>,
        budget: usize,
    ) -> Vec<Range<usize>> {
        let own_rows = self.own_rows();
        let rows = trees.into_iter().map(|(tree, stack)| self.rows_with(tree, own_rows[stack]));
        split_by_budget(&rows.collect::<Vec<_>>(), budget)
    }

    fn rows_with(&self, tree: &TokenTree, own: OwnRows) -> usize {
        self.rows_of_lengths(tree.prompt.len(), tree.answers.iter().map(|answer| answer.tokens.len()), own)
    }

    /// The rows of a prompt and answers of so many tokens: virtual tokens stand before each document, and a
    /// document is a prompt with all its answers, or with one, or an answer without prompt.
    fn rows_of_lengths(&self, prompt: usize, answers: impl Iterator<Item = usize>, own: OwnRows) -> usize {
        let (mut count, mut tokens, mut longest) = (0, 0, 0);
        for answer in answers {
            (count, tokens, longest) = (count + 1, tokens + answer, answer.max(longest));
        }
        let shares = self.architecture.causal && !self.rotates_by_length(prompt + longest, own);
        if shares && prompt > 0 {
            return prompt + tokens + own.virtual_rows;
        }
        tokens + count * (prompt + own.virtual_rows)
    }

    /// Whether rotations depend on the length of a sequence of so many tokens: answers of different lengths cannot
    /// share their prompt's keys then.
    fn rotates_by_length(&self, tokens: usize, OwnRows { virtual_rows, prefix_rows }: OwnRows) -> bool {
        let length = tokens + virtual_rows + prefix_rows;
        self.architecture.rotations_switch_after().is_some_and(|original| length > original)
    }
}

/// The passes of one optimizer step, a micro-batch each.
#[derive(Debug, Clone)]
pub struct StepPasses {
    seed: u64,
    rows: usize,
}

impl StepPasses {
    /// Those of step `step` of a run with this seed.
    pub fn new(seed: u64, step: u64) -> Self {
        use rand::RngCore;
        StepPasses { seed: random::stream(seed, "dropout", step).next_u64(), rows: 0 }
    }

    /// The pass of the step's next micro-batch.
    pub fn next(&mut self, model: &Model, batch: &Batch) -> Pass {
        let rows = StepRows { seed: self.seed, first_row: self.rows };
        self.rows += model.rows(batch);
        Pass { dropout: Some(rows) }
    }
}
