//! Who attends to whom in a flat stream of tokens.

use std::sync::Arc;

use super::sites::{Group, Stack};
use crate::data::batch::Segment;
use crate::ops::{AttentionPlan, Query, Span};

/// The rows that one adapter stack places before each of its documents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OwnRows {
    /// Virtual tokens, which pass through the whole transformer.
    pub virtual_rows: usize,
    /// Keys and values before those of every layer.
    pub prefix_rows: usize,
}

impl OwnRows {
    /// Those of each stack.
    pub fn of(stacks: &[Stack]) -> Vec<Self> {
        let count = |stack: &Stack| OwnRows {
            virtual_rows: stack.iter().map(|adapter| adapter.virtual_rows()).sum(),
            prefix_rows: stack.iter().map(|adapter| adapter.prefix_rows()).sum(),
        };
        stacks.iter().map(count).collect()
    }
}

/// Positions and attention of a stream.
///
/// An adapter stack may place virtual rows before the tokens of its root segments, and a prefix before the keys of every layer: the prefixes
/// of all stacks stand at the front of each layer's key stream. A root's positions begin after its own prefix; a child's continue from its parent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    /// Position of every row of the stream.
    pub positions: Vec<u32>,
    /// For every row of the stream, the length of the longest sequence that it is a part of (rotations may depend on it).
    pub lengths: Vec<u32>,
    /// Which keys each segment's queries see.
    pub plan: Arc<AttentionPlan>,
    /// For every token of the batch, its row in the stream; `None` while they are the same.
    pub token_rows: Option<Vec<u32>>,
    /// For every row of the stream, its row in `[virtual rows of all stacks; tokens]`; `None` while there are no virtual rows.
    pub gather: Option<Vec<u32>>,
    /// Which rows of the stream run with which stack.
    pub groups: Vec<Group>,
    /// Which tokens of the batch run with which stack.
    pub token_groups: Vec<Group>,
}

impl Layout {
    /// Lays out segments that lie end to end, parents before children; `own_rows` are those of each stack.
    pub fn new(segments: &[Segment], own_rows: &[OwnRows]) -> Self {
        let mut stream = Stream::default();
        for rows in own_rows {
            stream.virtual_starts.push(stream.virtual_rows);
            stream.prefix_starts.push(stream.prefix_rows);
            stream.virtual_rows += rows.virtual_rows;
            stream.prefix_rows += rows.prefix_rows;
        }
        for segment in segments {
            stream.push(segment, own_rows[segment.stack]);
        }
        let mut layout = stream.layout;
        for (query, root) in layout.plan.queries.iter().zip(&stream.roots) {
            layout.lengths.extend(std::iter::repeat_n(stream.longest[*root] as u32, query.rows.len));
        }
        if stream.virtual_rows > 0 {
            layout.token_rows = Some(stream.token_rows);
            layout.gather = Some(stream.gather);
        }
        layout
    }
}

/// Adds `len` rows of a stack at `start`, in one group with rows of the same stack before them.
pub fn push_group(groups: &mut Vec<Group>, stack: usize, start: usize, len: usize) {
    match groups.last_mut() {
        Some(last) if last.stack == stack => last.rows.len += len,
        _ => groups.push(Group { stack, rows: Span { start, len } }),
    }
}

/// A layout in the making.
#[derive(Default)]
struct Stream {
    layout: Layout,
    token_rows: Vec<u32>,
    gather: Vec<u32>,
    /// Position after the last token of each segment.
    ends: Vec<usize>,
    /// The root of each segment, and for each root the farthest end of its segments (0 for other segments).
    roots: Vec<usize>,
    longest: Vec<usize>,
    /// Where each stack's virtual tokens and prefixes start among those of all stacks, and how many these are.
    virtual_starts: Vec<usize>,
    prefix_starts: Vec<usize>,
    virtual_rows: usize,
    prefix_rows: usize,
}

impl Stream {
    fn push(&mut self, segment: &Segment, own: OwnRows) {
        let start = self.layout.positions.len();
        let (mut keys, first_position, virtual_rows) = match segment.parent {
            Some(parent) => (self.layout.plan.queries[parent].keys.clone(), self.ends[parent], 0),
            None if own.prefix_rows > 0 => {
                let prefix = Span { start: self.prefix_starts[segment.stack], len: own.prefix_rows };
                (vec![prefix], own.prefix_rows, own.virtual_rows)
            }
            None => (Vec::new(), 0, own.virtual_rows),
        };
        let len = virtual_rows + segment.len;
        keys.push(Span { start: self.prefix_rows + start, len });
        Arc::make_mut(&mut self.layout.plan).queries.push(Query { rows: Span { start, len }, keys });
        self.layout.positions.extend((first_position..first_position + len).map(|position| position as u32));
        push_group(&mut self.layout.groups, segment.stack, start, len);
        push_group(&mut self.layout.token_groups, segment.stack, segment.start, segment.len);
        let end = first_position + len;
        let root = segment.parent.map_or(self.roots.len(), |parent| self.roots[parent]);
        self.ends.push(end);
        self.roots.push(root);
        self.longest.push(0);
        self.longest[root] = self.longest[root].max(end);
        let first_virtual = self.virtual_starts[segment.stack];
        self.gather.extend((first_virtual..first_virtual + virtual_rows).map(|row| row as u32));
        for token in 0..segment.len {
            self.token_rows.push((start + virtual_rows + token) as u32);
            self.gather.push((self.virtual_rows + segment.start + token) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(start: usize, len: usize, parent: Option<usize>) -> Segment {
        Segment { start, len, parent, stack: 0 }
    }

    #[test]
    fn answers_continue_their_prompt_and_do_not_see_each_other() {
        let segments = [segment(0, 3, None), segment(3, 2, Some(0)), segment(5, 1, Some(0))];
        let layout = Layout::new(&segments, &[OwnRows::default()]);
        assert_eq!(layout.positions, [0, 1, 2, 3, 4, 3]);
        assert_eq!(layout.lengths, [5, 5, 5, 5, 5, 5]);
        let keys: Vec<_> = layout.plan.queries.iter().map(|query| query.keys.clone()).collect();
        let prompt = Span { start: 0, len: 3 };
        assert_eq!(
            keys,
            [vec![prompt], vec![prompt, Span { start: 3, len: 2 }], vec![prompt, Span { start: 5, len: 1 }]]
        );
        assert_eq!(layout.groups, [Group { stack: 0, rows: Span { start: 0, len: 6 } }]);
    }

    #[test]
    fn virtual_rows_and_prefixes_stand_before_every_root() {
        let segments = [segment(0, 2, None), segment(2, 1, Some(0)), segment(3, 1, None)];
        let layout = Layout::new(&segments, &[OwnRows { virtual_rows: 2, prefix_rows: 3 }]);
        assert_eq!(layout.positions, [3, 4, 5, 6, 7, 3, 4, 5]);
        assert_eq!(layout.lengths, [8, 8, 8, 8, 8, 6, 6, 6]);
        assert_eq!(layout.token_rows, Some(vec![2, 3, 4, 7]));
        assert_eq!(layout.gather, Some(vec![0, 1, 2, 3, 4, 0, 1, 5]));
        assert_eq!(layout.plan.queries[2].keys, [Span { start: 0, len: 3 }, Span { start: 8, len: 3 }]);
    }

    #[test]
    fn each_stack_has_rows_of_its_own() {
        let of = |stack, start| Segment { stack, ..segment(start, 1, None) };
        let rows = |virtual_rows, prefix_rows| OwnRows { virtual_rows, prefix_rows };
        let own_rows = [rows(1, 2), rows(0, 0), rows(2, 1)];
        let layout = Layout::new(&[of(2, 0), of(1, 1), of(0, 2), of(0, 3)], &own_rows);
        assert_eq!(layout.positions, [1, 2, 3, 0, 2, 3, 2, 3]);
        assert_eq!(layout.gather, Some(vec![1, 2, 3, 4, 0, 5, 0, 6]));
        assert_eq!(layout.plan.queries[0].keys, [Span { start: 2, len: 1 }, Span { start: 3, len: 3 }]);
        assert_eq!(layout.plan.queries[1].keys, [Span { start: 6, len: 1 }]);
        assert_eq!(layout.plan.queries[2].keys, [Span { start: 0, len: 2 }, Span { start: 7, len: 2 }]);
        let group = |stack, start, len| Group { stack, rows: Span { start, len } };
        assert_eq!(layout.groups, [group(2, 0, 3), group(1, 3, 1), group(0, 4, 4)]);
        assert_eq!(layout.token_groups, [group(2, 0, 1), group(1, 1, 1), group(0, 2, 2)]);
    }
}
