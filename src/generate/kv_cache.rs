//! Keys and values of what was computed, kept in rows that segments borrow and give back.

use std::fmt;

use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;
use indicatif::{DecimalBytes, HumanCount};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::model::architecture::Architecture;
use crate::model::transformer::KeyValueStore;
use crate::ops::{self, Span, Value};

/// In which precision keys and values are kept while answers are sampled. Attention widens them to f32 as it reads
/// them; everything else is f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePrecision {
    /// 32 bits
    #[default]
    F32,
    /// Rounded to 16 bits with the range of 32, to nearest, ties to even: half the memory
    Bf16,
}

impl CachePrecision {
    /// The element type of the cache.
    pub fn dtype(self) -> DType {
        match self {
            CachePrecision::F32 => DType::F32,
            CachePrecision::Bf16 => DType::BF16,
        }
    }
}

impl fmt::Display for CachePrecision {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            CachePrecision::F32 => "f32",
            CachePrecision::Bf16 => "bf16",
        })
    }
}

/// How much the cache of a model may hold, as plans say it.
#[derive(Debug, Clone, Copy)]
pub struct CacheSize<'a> {
    /// The model's.
    pub architecture: &'a Architecture,
    /// Tokens whose keys and values are kept at a time.
    pub tokens: usize,
    /// In which precision.
    pub precision: CachePrecision,
}

impl CacheSize<'_> {
    /// Bytes of keys and values, of every layer.
    pub fn bytes(&self) -> u64 {
        let numbers = (2 * self.architecture.layers * self.architecture.kv_width()).saturating_mul(self.tokens);
        (numbers as u64).saturating_mul(self.precision.dtype().size_in_bytes() as u64)
    }
}

impl fmt::Display for CacheSize<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tokens, bytes) = (HumanCount(self.tokens as u64), DecimalBytes(self.bytes()));
        write!(formatter, "of at most {tokens} tokens at a time in {}, {bytes}", self.precision)
    }
}

/// Keys and values of every layer, `[capacity, kv_heads * head_dim]` each.
pub struct KeyValueCache {
    layers: Vec<(Tensor, Tensor)>,
    free: FreeRows,
    capacity: usize,
    /// The rows that the tokens of the next pass go to.
    write: Vec<u32>,
}

impl KeyValueCache {
    /// A cache whose first rows are the adapters' prefixes (one pair of keys and values a layer, or none at all), and
    /// `capacity` more that are free; all of them in this precision.
    pub fn new(
        architecture: &Architecture,
        capacity: usize,
        prefixes: &[(Value, Value)],
        precision: CachePrecision,
        device: &Device,
    ) -> Result<Self> {
        let width = architecture.kv_width();
        let prefix_rows = prefixes.first().map_or(Ok(0), |(keys, _)| keys.dim(0))?;
        let layers = (0..architecture.layers).map(|layer| {
            let free = Tensor::zeros((capacity, width), precision.dtype(), device)?;
            let behind = |prefix: &Value| -> Result<Tensor> {
                Ok(Tensor::cat(&[&prefix.tensor().to_dtype(precision.dtype())?, &free], 0)?)
            };
            Ok(match prefixes.get(layer) {
                Some((keys, values)) => (behind(keys)?, behind(values)?),
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
    use crate::model::architecture::Config;
    use crate::model::family;
    use proptest::prelude::*;

    #[test]
    fn a_cache_in_bf16_has_half_the_bytes_and_gives_rows_and_prefixes_back_rounded() -> Result<()> {
        let json = serde_json::json!({ "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2 });
        let architecture = family::architecture(&Config::new(&json, "config.json"))?;
        let rows = |number: f32| Tensor::full(number, (1, 32), &Device::Cpu);
        // bf16 has a mantissa of 8 bits.
        let (long, rounded) = (1.0 + 1.0 / 1024.0, 1.0);
        let prefix = |number: f32| Ok::<_, crate::Error>(Value::constant(rows(number)?));
        let prefixes = [(prefix(long)?, prefix(-long)?), (prefix(0.5)?, prefix(long)?)];
        let mut bytes = Vec::new();
        for (precision, expected) in [(CachePrecision::F32, long), (CachePrecision::Bf16, rounded)] {
            let mut cache = KeyValueCache::new(&architecture, 9, &prefixes, precision, &Device::Cpu)?;
            cache.write_next_to(vec![4]);
            let (keys, values) = cache.extend(0, rows(3.0 * long)?, rows(long)?)?;
            let number = |x: &Tensor, row: usize| x.to_dtype(DType::F32)?.get(row)?.get(31)?.to_scalar::<f32>();
            // 3 + 3/1024 is nearer to 3 than to 3 + 1/64.
            let kept = [number(&keys, 0)?, number(&values, 0)?, number(&keys, 4)?, number(&values, 4)?];
            assert_eq!(kept, [expected, -expected, 3.0 * expected, expected], "{precision}");
            let of = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
            let held: usize = cache.layers.iter().map(|(keys, values)| of(keys) + of(values)).sum();
            let size = CacheSize { architecture: &architecture, tokens: 9 + 1, precision };
            assert_eq!(held as u64, size.bytes());
            bytes.push(held);
        }
        assert_eq!(bytes[0], 2 * bytes[1]);
        Ok(())
    }

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
