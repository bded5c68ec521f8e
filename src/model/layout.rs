//! Who attends to whom in a flat stream of tokens.

use crate::data::batch::Segment;
use crate::ops::{AttentionPlan, Query, Span};

/// Positions and attention of a stream.
///
/// An adapter may place rows of its own before the tokens of every root segment (`virtual_rows`, which pass through the whole
/// transformer) and keys and values before those of every layer (`prefix_rows`, at the front of each layer's key stream). A root's positions
/// begin after both; a child's continue from its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Position of every row of the stream.
    pub positions: Vec<u32>,
    /// Which keys each segment's queries see.
    pub plan: AttentionPlan,
    /// For every token of the batch, its row in the stream; `None` while they are the same.
    pub token_rows: Option<Vec<u32>>,
    /// For every row of the stream, its row in `[virtual rows; tokens]`; `None` while there are no virtual rows.
    pub gather: Option<Vec<u32>>,
}

impl Layout {
    /// Lays out segments that lie end to end, parents before children.
    pub fn new(segments: &[Segment], virtual_rows: usize, prefix_rows: usize) -> Self {
        let mut stream = Stream::default();
        for segment in segments {
            stream.push(segment, virtual_rows, prefix_rows);
        }
        let virtual_rows_used = virtual_rows > 0;
        Layout {
            positions: stream.positions,
            plan: AttentionPlan { queries: stream.queries },
            token_rows: virtual_rows_used.then_some(stream.token_rows),
            gather: virtual_rows_used.then_some(stream.gather),
        }
    }
}

/// A layout in the making.
#[derive(Default)]
struct Stream {
    positions: Vec<u32>,
    queries: Vec<Query>,
    token_rows: Vec<u32>,
    gather: Vec<u32>,
    /// Position after the last token of each segment.
    ends: Vec<usize>,
}

impl Stream {
    fn push(&mut self, segment: &Segment, virtual_rows: usize, prefix_rows: usize) {
        let start = self.positions.len();
        let (mut keys, first_position, own_virtual_rows) = match segment.parent {
            Some(parent) => (self.queries[parent].keys.clone(), self.ends[parent], 0),
            None if prefix_rows > 0 => (vec![Span { start: 0, len: prefix_rows }], prefix_rows, virtual_rows),
            None => (Vec::new(), 0, virtual_rows),
        };
        let len = own_virtual_rows + segment.len;
        keys.push(Span { start: prefix_rows + start, len });
        self.queries.push(Query { rows: Span { start, len }, keys });
        self.positions.extend((first_position..first_position + len).map(|position| position as u32));
        self.ends.push(first_position + len);
        self.gather.extend(0..own_virtual_rows as u32);
        for token in 0..segment.len {
            self.token_rows.push((start + own_virtual_rows + token) as u32);
            self.gather.push((virtual_rows + segment.start + token) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(start: usize, len: usize, parent: Option<usize>) -> Segment {
        Segment { start, len, parent }
    }

    #[test]
    fn answers_continue_their_prompt_and_do_not_see_each_other() {
        let layout = Layout::new(&[segment(0, 3, None), segment(3, 2, Some(0)), segment(5, 1, Some(0))], 0, 0);
        assert_eq!(layout.positions, [0, 1, 2, 3, 4, 3]);
        let keys: Vec<_> = layout.plan.queries.iter().map(|query| query.keys.clone()).collect();
        let prompt = Span { start: 0, len: 3 };
        assert_eq!(
            keys,
            [vec![prompt], vec![prompt, Span { start: 3, len: 2 }], vec![prompt, Span { start: 5, len: 1 }]]
        );
    }

    #[test]
    fn virtual_rows_and_prefixes_stand_before_every_root() {
        let layout = Layout::new(&[segment(0, 2, None), segment(2, 1, Some(0)), segment(3, 1, None)], 2, 3);
        assert_eq!(layout.positions, [3, 4, 5, 6, 7, 3, 4, 5]);
        assert_eq!(layout.token_rows, Some(vec![2, 3, 4, 7]));
        assert_eq!(layout.gather, Some(vec![0, 1, 2, 3, 4, 0, 1, 5]));
        assert_eq!(layout.plan.queries[2].keys, [Span { start: 0, len: 3 }, Span { start: 8, len: 3 }]);
    }
}
