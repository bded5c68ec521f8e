//! What goes through a model at a time: how texts lie in a pass, and how many rows they take.

use std::ops::Range;

use super::Model;
use super::adapter::{Pass, StepRows};
use super::layout::OwnRows;
use crate::data::batch::{Batch, TokenTree, split_by_budget};
use crate::random;

impl Model {
    /// Lays trees end to end in the way that the model needs: an encoder's answers stand each behind a copy of their prompt.
    pub fn pack<'a>(&self, trees: impl IntoIterator<Item = &'a TokenTree>) -> Batch {
        self.pack_stacks(trees.into_iter().map(|tree| (tree, 0)))
    }

    /// The same for trees that run each with a stack of its own.
    pub fn pack_stacks<'a>(&self, trees: impl IntoIterator<Item = (&'a TokenTree, usize)>) -> Batch {
        let trees: Vec<(&TokenTree, usize)> = trees.into_iter().collect();
        match self.layout_of(&trees) {
            PromptLayout::Pairs => Batch::pack_pairs(trees),
            PromptLayout::Apart => Batch::pack_apart(trees),
            PromptLayout::Shared => Batch::pack_stacks(trees),
        }
    }

    /// Lays texts to be classified end to end: trees of one answer, each with the types of its tokens as the tokenizer gives them.
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

    /// The rows that a tree has in the transformer where it runs with the model's own stack: those of [`Model::rows`].
    pub fn rows_of(&self, tree: &TokenTree) -> usize {
        let layout = self.layout_of(&[(tree, 0)]);
        layout.rows(tree.prompt.len(), tree.answers.iter().map(|answer| answer.tokens.len()), self.own_rows()[0])
    }

    /// The rows of a prompt and so many answers of so many tokens each.
    pub fn rows_of_answers(&self, prompt: usize, answers: usize, tokens: usize) -> usize {
        let layout = if self.architecture.causal { PromptLayout::Shared } else { PromptLayout::Pairs };
        layout.rows(prompt, std::iter::repeat_n(tokens, answers), self.own_rows()[0])
    }

    /// Splits trees into runs that go through the model at a time, each of at most `budget` rows; a tree over it goes alone.
    pub fn passes<'a>(&self, trees: impl IntoIterator<Item = &'a TokenTree>, budget: usize) -> Vec<Range<usize>> {
        self.passes_of_stacks(trees.into_iter().map(|tree| (tree, 0)), budget)
    }

    /// The same for trees that run each with a stack of its own.
    pub fn passes_of_stacks<'a>(
        &self,
        trees: impl IntoIterator<Item = (&'a TokenTree, usize)>,
        budget: usize,
    ) -> Vec<Range<usize>> {
        let trees: Vec<(&TokenTree, usize)> = trees.into_iter().collect();
        let (layout, own_rows) = (self.layout_of(&trees), self.own_rows());
        let rows = |&(tree, stack): &(&TokenTree, usize)| {
            layout.rows(tree.prompt.len(), tree.answers.iter().map(|answer| answer.tokens.len()), own_rows[stack])
        };
        split_by_budget(&trees.iter().map(rows).collect::<Vec<_>>(), budget)
    }

    /// How these trees lie in one pass.
    fn layout_of(&self, trees: &[(&TokenTree, usize)]) -> PromptLayout {
        if !self.architecture.causal {
            return PromptLayout::Pairs;
        }
        // Where rotations depend on the length of a sequence, answers of different lengths cannot share their prompt's keys.
        let own_rows = self.own_rows();
        let is_long = |&(tree, stack): &(&TokenTree, usize)| {
            let OwnRows { virtual_rows, prefix_rows } = own_rows[stack];
            let longest = tree.longest() + virtual_rows + prefix_rows;
            self.architecture.rotations_switch_after().is_some_and(|original| longest > original)
        };
        if trees.iter().any(is_long) { PromptLayout::Apart } else { PromptLayout::Shared }
    }
}

/// How the prompt of a tree stands before its answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PromptLayout {
    /// Once for all answers.
    Shared,
    /// Before each of them.
    Apart,
    /// Before each of them, as a pair of texts.
    Pairs,
}

impl PromptLayout {
    /// The rows of a prompt and answers of so many tokens, virtual tokens before each document among them.
    fn rows(self, prompt: usize, answers: impl Iterator<Item = usize>, own: OwnRows) -> usize {
        let (mut count, mut tokens) = (0, 0);
        for answer in answers {
            count += 1;
            tokens += answer;
        }
        match self {
            PromptLayout::Shared if prompt > 0 => prompt + tokens + own.virtual_rows,
            _ => tokens + count * (prompt + own.virtual_rows),
        }
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
