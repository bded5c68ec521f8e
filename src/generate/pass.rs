//! What goes through the model at a time while answers are generated: prompts, or the newest token of each answer.

use std::sync::Arc;

use crate::data::batch::Segment;
use crate::model::layout::{Layout, OwnRows, push_group};
use crate::ops::{Query, Span};

/// A sequence from its start, and the rows of the cache that it begins at.
pub(super) struct Root<'a> {
    pub(super) tokens: &'a [u32],
    pub(super) stack: usize,
    pub(super) rows: Span,
}

/// What goes through the model at a time.
#[derive(Default)]
pub(super) struct Pass {
    pub(super) tokens: Vec<u32>,
    pub(super) layout: Layout,
}

impl Pass {
    /// That of sequences from their start; `own_rows` are those that each stack places before them.
    pub(super) fn of_roots(roots: &[Root], own_rows: &[OwnRows]) -> Self {
        let mut tokens = Vec::new();
        let mut segments = Vec::new();
        for root in roots {
            segments.push(Segment { start: tokens.len(), len: root.tokens.len(), parent: None, stack: root.stack });
            tokens.extend_from_slice(root.tokens);
        }
        let mut layout = Layout::new(&segments, own_rows);
        for (query, root) in Arc::make_mut(&mut layout.plan).queries.iter_mut().zip(roots) {
            *query.keys.last_mut().expect("a segment sees itself") =
                Span { start: root.rows.start, len: query.rows.len };
        }
        Pass { tokens, layout }
    }

    /// The rows of the cache that the pass's own keys go to: the end of the last span of each segment.
    pub(super) fn newest_keys(&self) -> Vec<u32> {
        let spans = self.layout.plan.queries.iter().filter_map(|query| query.keys.last().zip(Some(query.rows.len)));
        let rows = spans.flat_map(|(span, len)| span.start + span.len - len..span.start + span.len);
        rows.map(|row| row as u32).collect()
    }

    /// Adds the newest tokens of a sequence. They see the keys of its context, and its own up to themselves,
    /// which go to the end of `own`.
    pub(super) fn push(&mut self, stack: usize, tokens: &[u32], context: &[Span], own: Span) {
        let end = context.iter().map(|span| span.len).sum::<usize>() + own.len;
        let layout = &mut self.layout;
        layout.positions.extend((end - tokens.len()..end).map(|position| position as u32));
        layout.lengths.extend(std::iter::repeat_n(end as u32, tokens.len()));
        let rows = Span { start: self.tokens.len(), len: tokens.len() };
        let keys = [context, &[own]].concat();
        Arc::make_mut(&mut layout.plan).queries.push(Query { rows, keys });
        push_group(&mut layout.groups, stack, rows.start, rows.len);
        push_group(&mut layout.token_groups, stack, rows.start, rows.len);
        self.tokens.extend_from_slice(tokens);
    }
}
