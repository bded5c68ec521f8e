//! What a plan means for the kernels: which keys a block of queries sees, and which queries share keys.

use std::ops::Range;

use candle_core::{Result, bail};

use super::{AttentionPlan, AttentionShape, Query, Span};

/// Query rows that are worked on together.
pub(super) const BLOCK_ROWS: usize = 64;

/// Some rows of one query segment.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub query: &'a Query,
    /// The first row, counted from the segment's start.
    pub first: usize,
    pub rows: usize,
}

/// Keys that lie one after another.
pub(super) struct Piece {
    /// Their rows in the matrices of keys and values.
    pub keys: Range<usize>,
    /// Where their scores begin in a row of scores.
    pub column: usize,
}

impl Piece {
    /// The columns of the keys' scores.
    pub fn columns(&self) -> Range<usize> {
        self.columns_of(0, self.keys.len())
    }

    /// The columns of the scores of some of the keys.
    pub fn columns_of(&self, first: usize, keys: usize) -> Range<usize> {
        self.column + first..self.column + first + keys
    }
}

impl Query {
    fn key_count(&self) -> usize {
        self.keys.iter().map(|span| span.len).sum()
    }

    /// The blocks of rows of this segment.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Block<'_>> {
        (0..self.rows.len).step_by(BLOCK_ROWS).map(move |first| Block {
            query: self,
            first,
            rows: BLOCK_ROWS.min(self.rows.len - first),
        })
    }
}

impl Block<'_> {
    /// The rows of the block in the matrix of queries.
    pub fn query_rows(&self) -> Range<usize> {
        let start = self.query.rows.start + self.first;
        start..start + self.rows
    }

    /// The keys that at least one row sees, counted in the order of the segment's keys.
    pub fn keys(&self, shape: &AttentionShape) -> Range<usize> {
        self.keys_of_row(shape, 0).start..self.keys_of_row(shape, self.rows - 1).end
    }

    /// The keys that one row of the block sees.
    pub fn keys_of_row(&self, shape: &AttentionShape, row: usize) -> Range<usize> {
        let keys = self.query.key_count();
        let position = keys - self.query.rows.len + self.first + row;
        let start = shape.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let end = match shape {
            AttentionShape { causal: true, .. } => position + 1,
            AttentionShape { window: Some(window), .. } => keys.min(position.saturating_add(*window)),
            AttentionShape { window: None, .. } => keys,
        };
        start..end
    }

    /// The runs of key rows that the keys `visible` of the segment lie in.
    pub fn pieces(&self, visible: &Range<usize>) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(self.query.keys.len());
        let mut before = 0;
        for span in &self.query.keys {
            let (start, end) = (visible.start.max(before), visible.end.min(before + span.len));
            if start < end {
                let row = span.start + start - before;
                pieces.push(Piece { keys: row..row + end - start, column: start - visible.start });
            }
            before += span.len;
        }
        pieces
    }
}

/// Checks that the plan covers every query row once and stays within the keys, so that the kernels may rely on it.
pub(super) fn check(shape: &AttentionShape, plan: &AttentionPlan, queries: usize, keys: usize) -> Result<()> {
    if shape.kv_heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) || shape.window == Some(0) {
        bail!("attention: {shape:?} is no form of attention");
    }
    let mut rows: Vec<Span> = plan.queries.iter().map(|query| query.rows).collect();
    rows.sort_unstable_by_key(|rows| (rows.start, rows.len));
    let covered = rows.iter().try_fold(0_usize, |end, rows| (rows.start == end).then(|| end + rows.len));
    if covered != Some(queries) {
        bail!("attention: the plan does not cover each of the {queries} query rows once");
    }
    for query in &plan.queries {
        let outside = query.keys.iter().any(|span| span.start.checked_add(span.len).is_none_or(|end| end > keys));
        if outside || query.key_count() < query.rows.len {
            bail!("attention: {query:?} names keys outside the {keys} there are, or fewer than it has rows");
        }
    }
    Ok(())
}

/// Groups the segments such that no two groups share a key row. Each group lists its segments in the order of the plan.
pub(super) fn groups_by_shared_keys(plan: &AttentionPlan) -> Vec<Vec<&Query>> {
    let mut spans: Vec<(Span, usize)> = Vec::new();
    for (index, query) in plan.queries.iter().enumerate() {
        spans.extend(query.keys.iter().filter(|span| span.len > 0).map(|&span| (span, index)));
    }
    spans.sort_unstable_by_key(|&(span, index)| (span.start, index));
    // A forest in which every segment points to an earlier one of its group.
    let mut parents: Vec<usize> = (0..plan.queries.len()).collect();
    let mut reach = None; // the end of the overlapping spans so far, and a segment of theirs
    for (span, index) in spans {
        let end = span.start + span.len;
        match &mut reach {
            Some((reached, other)) if span.start < *reached => {
                *reached = end.max(*reached);
                let (a, b) = (root(&mut parents, *other), root(&mut parents, index));
                parents[a.max(b)] = a.min(b);
            }
            _ => reach = Some((end, index)),
        }
    }
    let mut groups: Vec<Vec<&Query>> = vec![Vec::new(); plan.queries.len()];
    for (index, query) in plan.queries.iter().enumerate() {
        groups[root(&mut parents, index)].push(query);
    }
    groups.retain(|group| !group.is_empty());
    groups
}

fn root(parents: &mut [usize], mut index: usize) -> usize {
    while parents[index] != index {
        parents[index] = parents[parents[index]];
        index = parents[index];
    }
    index
}
