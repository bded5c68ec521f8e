//! The embedded world: a small, invented domain in which hallucination and rudeness are exactly decidable.
//!
//! A seeded generator makes everything that ships in `data/`: raw text by writers some of whom invent facts and some of whom are rude,
//! demonstrations, answers ranked by **simulated** labellers, prompts, and evaluation prompts whose people, places and facts occur in no
//! training file. `rule` decides what an answer is worth; nothing of it enters training except through the simulated rankings.

pub mod facts;
pub mod files;
pub mod invention;
pub mod labellers;
pub mod names;
pub mod prompts;
pub mod rule;
pub mod settings;
pub mod talk;
pub mod writers;

use rand::Rng;

use crate::random::Stream;

/// One of `items`, all equally likely.
pub(crate) fn choose<'a, T>(items: &'a [T], stream: &mut Stream) -> &'a T {
    &items[stream.random_range(0..items.len())]
}

/// One of `items` by weight.
pub(crate) fn choose_weighted<T: Copy>(items: &[(T, f64)], stream: &mut Stream) -> T {
    let total: f64 = items.iter().map(|(_, weight)| weight).sum();
    let mut left = stream.random::<f64>() * total;
    for &(item, weight) in items {
        left -= weight;
        if left < 0.0 {
            return item;
        }
    }
    items[items.len() - 1].0
}
