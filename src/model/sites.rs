//! The adapters of one pass, applied at its sites: to all rows alike, or to each group of rows its own.

use std::sync::Arc;

use super::adapter::{
    Adapter, EmbeddingChange, Linear, LinearChange, LowRankChange, NormChange, Pass, RowsNorm, SubLayer, SubLayerRows,
};
use super::linear_change::changed_linear;
use crate::error::Result;
use crate::ops::{self, RowUpdate, Span, Value, Weight};

/// Adapters that change the same rows, each on top of those before it.
pub type Stack = Vec<Arc<dyn Adapter>>;

/// Rows of a stream that run with the same stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// The index of the stack.
    pub stack: usize,
    /// The rows.
    pub rows: Span,
}

/// The norm of a sub-layer's output together with the residual stream, by the sites of the rows that it is given.
pub type SumNorm<'a> = dyn Fn(&Value, &Sites) -> Result<Value> + 'a;

/// The sites of one pass.
pub struct Sites<'a> {
    /// The stacks that rows may run with.
    pub stacks: &'a [Stack],
    /// Which rows run with which; together they cover the stream.
    pub groups: &'a [Group],
    /// The pass.
    pub pass: &'a Pass,
}

impl Sites<'_> {
    /// Runs `part` on the rows of each group, with its stack, and lays the results end to end.
    fn by_group(&self, x: &Value, part: impl Fn(&Stack, &Group, &Value) -> Result<Value>) -> Result<Value> {
        if let [group] = self.groups {
            return part(&self.stacks[group.stack], group, x);
        }
        let parts = self.groups.iter().map(|group| part(&self.stacks[group.stack], group, &rows_of(x, group)?));
        joined(parts)
    }

    fn any(&self, has: impl Fn(&dyn Adapter) -> bool) -> bool {
        self.groups.iter().any(|group| self.stacks[group.stack].iter().any(|adapter| has(adapter.as_ref())))
    }

    /// The embeddings `[tokens, d_model]` of tokens, given the base's table. Groups are those of the tokens, virtual rows left out.
    pub fn embed(&self, table: &Weight, ids: &[u32], groups: &[Group]) -> Result<Value> {
        let sites = Sites { groups, ..*self };
        if !sites.any(|adapter| adapter.embedding().is_some()) {
            return table.select_rows(ids);
        }
        let of_group = |group: &Group| {
            let ids = &ids[group.rows.start..][..group.rows.len];
            let changes = self.stacks[group.stack].iter().filter_map(|adapter| adapter.embedding());
            embed_with(table, ids, &changes.collect::<Vec<_>>())
        };
        joined(groups.iter().map(of_group))
    }

    /// The output `[rows, d_out]` of a linear.
    pub fn linear(&self, linear: &Linear, x: &Value) -> Result<Value> {
        let changes = |group: &Group| -> Vec<LinearChange> {
            self.stacks[group.stack].iter().filter_map(|adapter| adapter.linear(&linear.name)).collect()
        };
        if let [group] = self.groups {
            return changed_linear(linear, x, &changes(group), self.pass);
        }
        let changes: Vec<Vec<LinearChange>> = self.groups.iter().map(changes).collect();
        // The base's product once for all rows, where the groups' own changes can be added to it in place.
        let is_frozen = |change: &LowRankChange| !change.down.is_tracked() && !change.up.is_tracked();
        let is_added = |changes: &[LinearChange]| {
            let may_change = !x.is_tracked() && !linear.weight.is_tracked();
            may_change && changes.iter().all(|change| change.is_low_rank() && change.low_rank.iter().all(is_frozen))
        };
        let base = ops::linear(x, &linear.weight, linear.bias.as_ref())?; // [rows, d_out]
        let mut updates = Vec::new();
        for (group, changes) in self.groups.iter().zip(&changes).filter(|(_, changes)| is_added(changes)) {
            updates.extend(changes.iter().flat_map(|change| &change.low_rank).map(|low_rank| RowUpdate {
                rows: group.rows,
                a: low_rank.down.tensor(),
                b: low_rank.up.tensor(),
                scale: low_rank.scale,
            }));
        }
        ops::add_low_rank_to_rows(base.tensor(), x.tensor(), &updates)?;
        if changes.iter().all(|changes| is_added(changes)) {
            return Ok(base);
        }
        let parts = self.groups.iter().zip(&changes).map(|(group, changes)| match is_added(changes) {
            true => rows_of(&base, group),
            false => changed_linear(linear, &rows_of(x, group)?, changes, self.pass),
        });
        joined(parts)
    }

    /// The last linear of a sub-layer whose output is not read, run again for its gradients: its rows are not
    /// computed where no adapter reads them.
    pub fn unread_linear(&self, linear: &Linear, x: &Value) -> Result<Value> {
        let is_read = self.any(|adapter| {
            adapter.sub_layer_change().is_some()
                || adapter.linear(&linear.name).is_some_and(|change| change.reads_output())
        });
        match is_read {
            true => self.linear(linear, x),
            false => self.linear(&Linear { weight: linear.weight.unread(), ..linear.clone() }, x),
        }
    }

    /// The rows `[rows, d_model]` after a norm, which `run` computes from the rows and what a method has in place of its parameters.
    pub fn norm(
        &self,
        name: &str,
        x: &Value,
        run: impl Fn(&Value, Option<NormChange>) -> Result<Value>,
    ) -> Result<Value> {
        if !self.any(|adapter| adapter.norm(name).is_some()) {
            return run(x, None);
        }
        self.by_group(x, |stack, _, x| {
            let changes = stack.iter().filter_map(|adapter| adapter.norm(name));
            let last_of_each = changes.reduce(|before, change| NormChange {
                weight: change.weight.or(before.weight),
                bias: change.bias.or(before.bias),
            });
            run(x, last_of_each)
        })
    }

    /// What a sub-layer adds to the residual stream, `[rows, d_model]`; `norm` is the norm of their sum, where the family normalises it.
    pub fn sub_layer(
        &self,
        (layer, which): (usize, SubLayer),
        residual: &Value,
        output: Value,
        norm: Option<&SumNorm>,
    ) -> Result<Value> {
        if !self.any(|adapter| adapter.sub_layer_change().is_some()) {
            return Ok(output);
        }
        self.by_group(&output, |stack, group, output| {
            let alone = self.groups.len() == 1;
            let residual = if alone { residual.clone() } else { rows_of(residual, group)? };
            let groups = [Group { rows: Span { start: 0, ..group.rows }, ..*group }];
            let sites = Sites { groups: if alone { self.groups } else { &groups }, ..*self };
            let norm = norm.map(|norm| |sum: &Value| norm(sum, &sites));
            let norm = norm.as_ref().map(|norm| norm as &RowsNorm);
            let mut changes = stack.iter().filter_map(|adapter| adapter.sub_layer_change());
            changes.try_fold(output.clone(), |output, change| {
                change.output(SubLayerRows { layer, which, residual: &residual, output, norm })
            })
        })
    }

    /// The residual stream after the last block.
    pub fn last_block(&self, x: &Value) -> Result<Value> {
        self.by_group(x, |stack, _, x| stack.iter().try_fold(x.clone(), |x, adapter| adapter.last_block(x)))
    }

    /// After how many of `layers` blocks the rows of a group are taken.
    pub fn depth(&self, group: &Group, layers: usize) -> usize {
        self.stacks[group.stack].iter().filter_map(|adapter| adapter.depth()).min().unwrap_or(layers)
    }
}

/// The virtual tokens of all stacks, end to end, `[virtual rows, d_model]`.
pub fn virtual_tokens(stacks: &[Stack], pass: &Pass) -> Result<Option<Value>> {
    let mut all = Vec::new();
    for adapter in stacks.iter().flatten() {
        all.extend(adapter.virtual_tokens(pass)?);
    }
    Ok(if all.is_empty() { None } else { Some(Value::cat_rows(&all.iter().collect::<Vec<_>>())?) })
}

/// For each layer the prefixes of all stacks, end to end, `[prefix rows, kv_heads * head_dim]` each; empty without.
pub fn prefixes(stacks: &[Stack]) -> Result<Vec<(Value, Value)>> {
    let mut by_adapter = Vec::new();
    for adapter in stacks.iter().flatten().filter(|adapter| adapter.prefix_rows() > 0) {
        by_adapter.push(adapter.prefixes()?);
    }
    let layers = by_adapter.first().map_or(0, Vec::len);
    let of_layer = |layer: usize| {
        let keys: Vec<&Value> = by_adapter.iter().map(|prefixes| &prefixes[layer].0).collect();
        let values: Vec<&Value> = by_adapter.iter().map(|prefixes| &prefixes[layer].1).collect();
        Ok((Value::cat_rows(&keys)?, Value::cat_rows(&values)?))
    };
    (0..layers).map(of_layer).collect()
}

fn rows_of(x: &Value, group: &Group) -> Result<Value> {
    x.narrow_rows(group.rows.start, group.rows.len)
}

/// Rows end to end.
fn joined(parts: impl Iterator<Item = Result<Value>>) -> Result<Value> {
    let parts = parts.collect::<Result<Vec<_>>>()?;
    Value::cat_rows(&parts.iter().collect::<Vec<_>>())
}

/// The embeddings of tokens by a table and what some adapters make of it.
fn embed_with(table: &Weight, ids: &[u32], changes: &[EmbeddingChange]) -> Result<Value> {
    // A whole table takes the place of everything before it.
    let first = changes.iter().rposition(|change| change.table.is_some()).unwrap_or(0);
    let changes = &changes[first..];
    let table = changes.first().and_then(|change| change.table.as_ref()).unwrap_or(table);
    let mut x = table.select_rows(ids)?; // [tokens, d_model]
    for EmbeddingChange { low_rank, rows, .. } in changes {
        if let Some(LowRankChange { down, up, scale, .. }) = low_rank {
            let inner = down.columns_as_rows(ids)?; // [tokens, rank]
            x = x.add(&ops::linear(&inner, up, None)?.scale(*scale)?)?;
        }
        if let Some(rows) = rows {
            x = rows.of_tokens(&x, ids)?;
        }
    }
    Ok(x)
}
