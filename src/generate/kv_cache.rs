//! Keys and values of what was computed, kept in rows that segments borrow and give back.

use candle_core::{DType, Device, Tensor};

use crate::error::Result;
use crate::model::architecture::Architecture;
use crate::model::transformer::KeyValueStore;
use crate::ops::{self, Span, Value};

/// Keys and values of every layer, `[capacity, kv_heads * head_dim]` each.
pub struct KeyValueCache {
    layers: Vec<(Tensor, Tensor)>,
    free: FreeRows,
    capacity: usize,
    /// The rows that the tokens of the next pass go to.
    write: Vec<u32>,
}

impl KeyValueCache {
    /// A cache whose first rows are the adapters' prefixes (one pair of keys and values a layer, or none at all), and `capacity` more that are
    /// free.
    pub fn new(
        architecture: &Architecture,
        capacity: usize,
        prefixes: &[(Value, Value)],
        device: &Device,
    ) -> Result<Self> {
        let width = architecture.kv_width();
        let prefix_rows = prefixes.first().map_or(Ok(0), |(keys, _)| keys.dim(0))?;
        let layers = (0..architecture.layers).map(|layer| {
            let free = Tensor::zeros((capacity, width), DType::F32, device)?;
            Ok(match prefixes.get(layer) {
                Some((keys, values)) => {
                    (Tensor::cat(&[keys.tensor(), &free], 0)?, Tensor::cat(&[values.tensor(), &free], 0)?)
                }
                None => (free.copy()?, free),
            })
        });
        Ok(KeyValueCache {
            layers: layers.collect::<Result<_>>()?,
            free: FreeRows { spans: vec![Span { start: prefix_rows, len: capacity }] },
            capacity,
            write: Vec::new(),
        })
    }

    /// Its rows, prefixes apart.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Those that nobody has borrowed.
    pub fn free_rows(&self) -> usize {
        self.free.spans.iter().map(|span| span.len).sum()
    }

    /// Borrows `len` rows that lie together, if there are any.
    pub fn take(&mut self, len: usize) -> Option<Span> {
        self.free.take(len)
    }

    /// Gives rows back.
    pub fn give_back(&mut self, span: Span) {
        self.free.give_back(span);
    }

    /// Says which rows the tokens of the next pass go to, in the order of the stream.
    pub fn write_next_to(&mut self, rows: Vec<u32>) {
        self.write = rows;
    }
}

impl KeyValueStore for KeyValueCache {
    fn extend(&mut self, layer: usize, keys: Tensor, values: Tensor) -> Result<(Tensor, Tensor)> {
        let (all_keys, all_values) = &self.layers[layer];
        ops::write_rows(all_keys, &keys, &self.write)?;
        ops::write_rows(all_values, &values, &self.write)?;
        Ok((all_keys.clone(), all_values.clone()))
    }
}

/// Rows that nobody uses, as spans in order that do not touch.
struct FreeRows {
    spans: Vec<Span>,
}

impl FreeRows {
    /// The first span that is long enough loses its front.
    fn take(&mut self, len: usize) -> Option<Span> {
        let index = self.spans.iter().position(|span| span.len >= len)?;
        let found = &mut self.spans[index];
        let taken = Span { start: found.start, len };
        found.start += len;
        found.len -= len;
        if found.len == 0 {
            self.spans.remove(index);
        }
        Some(taken)
    }

    fn give_back(&mut self, span: Span) {
        let index = self.spans.partition_point(|free| free.start < span.start);
        self.spans.insert(index, span);
        // Merge with the next, then with the previous.
        for left in [index, index.wrapping_sub(1)] {
            let (Some(&a), Some(&b)) = (self.spans.get(left), self.spans.get(left.wrapping_add(1))) else { continue };
            if a.start + a.len == b.start {
                self.spans[left].len += b.len;
                self.spans.remove(left + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_are_never_lent_twice_and_all_come_back(sizes in prop::collection::vec(1usize..20, 1..30), order in any::<u64>()) {
            let mut free = FreeRows { spans: vec![Span { start: 3, len: 100 }] };
            let mut lent: Vec<Span> = Vec::new();
            for (index, size) in sizes.into_iter().enumerate() {
                if let Some(span) = free.take(size) {
                    prop_assert!(lent.iter().all(|other| span.start + span.len <= other.start || other.start + other.len <= span.start));
                    lent.push(span);
                }
                if order >> (index % 64) & 1 == 1 && !lent.is_empty() {
                    free.give_back(lent.swap_remove(order as usize % lent.len()));
                }
            }
            lent.into_iter().for_each(|span| free.give_back(span));
            prop_assert_eq!(free.spans, vec![Span { start: 3, len: 100 }]);
        }
    }
}
