//! Examples laid end to end: a flat stream of tokens, without padding, filled to a budget of rows.

use std::ops::Range;

/// A run of tokens that attends to itself (causally, unless the model is an encoder) and to its ancestors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its first row in the stream.
    pub start: usize,
    /// Its number of tokens.
    pub len: usize,
    /// The segment it continues (an earlier index), or `None` for the start of a document.
    pub parent: Option<usize>,
    /// Which of the model's adapter stacks it runs with; a child's is its parent's.
    pub stack: usize,
}

/// A token to be predicted: the hidden state at `row` is to give `token`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The row before the target's own (for the first token of an answer: the last row of its prompt).
    pub row: usize,
    /// The token to predict.
    pub token: u32,
}

/// A prompt and the answers that continue it, as token ids. A plain document has an empty prompt and one answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenTree {
    /// Tokens that all answers share; computed once.
    pub prompt: Vec<u32>,
    /// The continuations.
    pub answers: Vec<Continuation>,
}

/// One continuation of a prompt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Continuation {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Which of them are to be learned (carry loss).
    pub learned: Vec<bool>,
}

impl TokenTree {
    /// The number of its tokens, those of the prompt once.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.answers.iter().map(|answer| answer.tokens.len()).sum::<usize>()
    }

    /// The number of tokens of the prompt with the longest answer.
    pub fn longest(&self) -> usize {
        self.prompt.len() + self.answers.iter().map(|answer| answer.tokens.len()).max().unwrap_or(0)
    }

    /// The number of tokens that carry loss: the first of a document without prompt has nothing before it to be predicted from.
    pub fn learned_tokens(&self) -> usize {
        let unpredicted = usize::from(self.prompt.is_empty());
        let learned = self.answers.iter().flat_map(|answer| answer.learned.iter().skip(unpredicted));
        learned.filter(|&&learned| learned).count()
    }
}

/// A flat stream of tokens with its segments and targets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// All tokens, segment after segment.
    pub tokens: Vec<u32>,
    /// For every token, 1 if it belongs to an answer that follows a prompt and 0 otherwise: the second text of a pair, as encoders are told
    /// it. Where texts are classified, what the tokenizer says in its place. Empty where prompts are shared, which no encoder's are.
    pub types: Vec<u32>,
    /// The segments, parents before children.
    pub segments: Vec<Segment>,
    /// Every learned token, answer after answer.
    pub targets: Vec<Target>,
    /// For each answer, in order: its range in `targets`.
    pub answer_targets: Vec<Range<usize>>,
    /// For each answer, in order: the row of its last token.
    pub last_rows: Vec<usize>,
    /// For each answer, in order: the rows of its prompt and its own.
    pub answer_rows: Vec<[Range<usize>; 2]>,
    /// For each answer, in order: the adapter stack that it runs with.
    pub answer_stacks: Vec<usize>,
    /// For each tree, in order: its range of answers.
    pub trees: Vec<Range<usize>>,
}

impl Batch {
    /// Lays the trees end to end, each prompt once, all for the model's first adapter stack.
    pub fn pack<'a>(trees: impl IntoIterator<Item = &'a TokenTree>) -> Self {
        Self::pack_stacks(trees.into_iter().map(|tree| (tree, 0)))
    }

    /// Lays trees end to end, each prompt once, each tree with the index of the adapter stack that it runs with.
    pub fn pack_stacks<'a>(trees: impl IntoIterator<Item = (&'a TokenTree, usize)>) -> Self {
        Self::pack_some_apart(trees, |_, _| false)
    }

    /// Lays trees end to end, each answer behind a copy of its prompt: an encoder's prompt sees the answer, so that answers cannot share it.
    pub fn pack_pairs<'a>(trees: impl IntoIterator<Item = (&'a TokenTree, usize)>) -> Self {
        let mut batch = Batch::default();
        for (tree, stack) in trees {
            let first_answer = batch.last_rows.len();
            for answer in &tree.answers {
                batch.push_pair(&tree.prompt, &answer.tokens, stack);
            }
            batch.trees.push(first_answer..batch.last_rows.len());
        }
        batch
    }

    /// The same, where answers of those trees that stand `apart` have each a copy of their prompt: what is computed
    /// of it depends on the answer's length.
    pub fn pack_some_apart<'a>(
        trees: impl IntoIterator<Item = (&'a TokenTree, usize)>,
        apart: impl Fn(&TokenTree, usize) -> bool,
    ) -> Self {
        let mut batch = Batch::default();
        for (tree, stack) in trees {
            if !apart(tree, stack) {
                batch.push(tree, stack);
                continue;
            }
            let first_answer = batch.last_rows.len();
            for answer in &tree.answers {
                batch.push(&TokenTree { prompt: tree.prompt.clone(), answers: vec![answer.clone()] }, stack);
                batch.trees.pop();
            }
            batch.trees.push(first_answer..batch.last_rows.len());
        }
        batch
    }

    /// Runs of answers that follow each other and run with the same stack: the stack, and the answers.
    pub fn runs(&self) -> Vec<(usize, Range<usize>)> {
        let mut runs: Vec<(usize, Range<usize>)> = Vec::new();
        for (answer, &stack) in self.answer_stacks.iter().enumerate() {
            match runs.last_mut() {
                Some((last, answers)) if *last == stack => answers.end = answer + 1,
                _ => runs.push((stack, answer..answer + 1)),
            }
        }
        runs
    }

    fn push(&mut self, tree: &TokenTree, stack: usize) {
        let first_answer = self.last_rows.len();
        let parent = (!tree.prompt.is_empty()).then(|| self.push_segment(&tree.prompt, None, stack));
        let prompt_rows = parent.map_or(0..0, |parent| self.rows(parent));
        for answer in &tree.answers {
            let first_target = self.targets.len();
            // An empty answer ends where its prompt ends.
            let mut previous = prompt_rows.end.checked_sub(1);
            let mut own_rows = 0..0;
            if !answer.tokens.is_empty() {
                let segment = self.push_segment(&answer.tokens, parent, stack);
                own_rows = self.rows(segment);
                for (row, (&token, &learned)) in own_rows.clone().zip(answer.tokens.iter().zip(&answer.learned)) {
                    if let (true, Some(row)) = (learned, previous) {
                        self.targets.push(Target { row, token });
                    }
                    previous = Some(row);
                }
            }
            self.answer_targets.push(first_target..self.targets.len());
            self.last_rows.push(previous.expect("a tree has a prompt or an answer with tokens"));
            self.answer_rows.push([prompt_rows.clone(), own_rows]);
            self.answer_stacks.push(stack);
        }
        self.trees.push(first_answer..self.last_rows.len());
    }

    fn push_pair(&mut self, prompt: &[u32], answer: &[u32], stack: usize) {
        let segment = self.push_segment(&[prompt, answer].concat(), None, stack);
        let rows = self.rows(segment);
        let second = rows.start + prompt.len();
        let type_of_answer = u32::from(!prompt.is_empty());
        self.types.extend(rows.clone().map(|row| if row < second { 0 } else { type_of_answer }));
        self.answer_targets.push(self.targets.len()..self.targets.len());
        self.last_rows.push(rows.end - 1);
        self.answer_rows.push([rows.start..second, second..rows.end]);
        self.answer_stacks.push(stack);
    }

    fn push_segment(&mut self, tokens: &[u32], parent: Option<usize>, stack: usize) -> usize {
        self.segments.push(Segment { start: self.tokens.len(), len: tokens.len(), parent, stack });
        self.tokens.extend_from_slice(tokens);
        self.segments.len() - 1
    }

    fn rows(&self, segment: usize) -> Range<usize> {
        let Segment { start, len, .. } = self.segments[segment];
        start..start + len
    }
}

/// Splits `0..sizes.len()` into runs whose sizes add up to at most `budget`; an item over the budget stands alone.
pub fn split_by_budget(sizes: &[usize], budget: usize) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut total) = (0, 0);
    for (index, &size) in sizes.iter().enumerate() {
        if index > start && total + size > budget {
            runs.push(start..index);
            (start, total) = (index, 0);
        }
        total += size;
    }
    if start < sizes.len() {
        runs.push(start..sizes.len());
    }
    runs
}

/// The sum of the largest of those runs; 0 where there are none.
pub fn largest_run(sizes: &[usize], budget: usize) -> usize {
    let runs = split_by_budget(sizes, budget).into_iter();
    runs.map(|run| sizes[run].iter().sum()).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_of_every_answer_is_predicted_at_the_prompts_last_row() {
        let answer = |tokens: &[u32]| Continuation { tokens: tokens.to_vec(), learned: vec![true; tokens.len()] };
        let tree = TokenTree { prompt: vec![1, 2, 3], answers: vec![answer(&[4, 5]), answer(&[6]), answer(&[])] };
        let batch = Batch::pack([&tree, &tree]);
        assert_eq!(batch.tokens, [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]);
        let rows: Vec<(usize, u32)> = batch.targets.iter().map(|target| (target.row, target.token)).collect();
        assert_eq!(rows, [(2, 4), (3, 5), (2, 6), (8, 4), (9, 5), (8, 6)]);
        assert_eq!(batch.last_rows, [4, 5, 2, 10, 11, 8]);
        assert_eq!(batch.trees, [0..3, 3..6]);
        let apart = Batch::pack_some_apart([(&tree, 0)], |_, _| true);
        assert_eq!(apart.tokens, [1, 2, 3, 4, 5, 1, 2, 3, 6, 1, 2, 3]);
        let rows: Vec<(usize, u32)> = apart.targets.iter().map(|target| (target.row, target.token)).collect();
        assert_eq!(rows, [(2, 4), (3, 5), (7, 6)]);
        assert_eq!(apart.last_rows, [4, 8, 11]);
        assert_eq!((apart.trees.len(), &apart.trees[0]), (1, &(0..3)));
    }

    #[test]
    fn budget_is_kept_and_an_oversized_item_stands_alone() {
        assert_eq!(split_by_budget(&[3, 3, 9, 2, 2], 6), [0..2, 2..3, 3..5]);
        assert_eq!(split_by_budget(&[], 6), Vec::<std::ops::Range<usize>>::new());
        assert_eq!((largest_run(&[3, 3, 9, 2, 2], 6), largest_run(&[3, 2, 2], 6), largest_run(&[], 6)), (9, 5, 0));
    }
}
