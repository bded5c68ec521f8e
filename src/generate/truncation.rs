//! The tokens that top-k and nucleus sampling leave, found by selection: the vocabulary is never sorted.

use std::cmp::Ordering;

/// The tokens, in the order of the vocabulary, that the top k and then the nucleus of what these leave hold,
/// with the ties of transformers and vLLM: every token that is as probable as the k-th stays; of those at the
/// edge of the nucleus that are equally probable the last ones of the vocabulary stay. Tokens of weight 0 are
/// never among them.
///
/// `weights` are probabilities times `whole`, their sum. A `top_k` of 0 and a `top_p` of 1 leave everything.
pub fn kept(logits: &[f32], weights: &[f32], whole: f64, top_k: usize, top_p: f64) -> Vec<u32> {
    let is_cut = top_k > 0 && top_k < logits.len();
    let least_logit = if is_cut { greatest(logits, top_k) } else { f32::NEG_INFINITY };
    let in_top_k = TopK { logits, weights, least_logit };
    if top_p >= 1.0 {
        return in_top_k.tokens(0.0);
    }
    let left = if is_cut { in_top_k.tokens(0.0).iter().map(|&token| in_top_k.weight(token)).sum() } else { whole };
    in_top_k.nucleus(left, top_p).unwrap_or_else(|| in_top_k.sorted_nucleus(top_p))
}

/// The k-th greatest of some numbers, `k` being at least 1 and at most their count.
fn greatest(numbers: &[f32], k: usize) -> f32 {
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let mut top: Vec<f32> = Vec::with_capacity(2 * k);
    let mut least = f32::NEG_INFINITY;
    for &number in numbers {
        // Once there are k, one that is no greater than the least of them changes nothing.
        if top.len() < k || number > least {
            top.push(number);
            if top.len() == 2 * k {
                least = *top.select_nth_unstable_by(k - 1, descending).1;
                top.truncate(k);
            }
        }
    }
    *top.select_nth_unstable_by(k - 1, descending).1
}

/// The tokens of at least some logit.
struct TopK<'a> {
    logits: &'a [f32],
    weights: &'a [f32],
    least_logit: f32,
}

impl TopK<'_> {
    fn weight(&self, token: u32) -> f64 {
        f64::from(self.weights[token as usize])
    }

    /// Those of at least some weight, and of more than 0.
    fn tokens(&self, least_weight: f32) -> Vec<u32> {
        let is_in = |token: &u32| {
            let weight = self.weights[*token as usize];
            weight >= least_weight && weight > 0.0 && self.logits[*token as usize] >= self.least_logit
        };
        (0..self.weights.len() as u32).filter(is_in).collect()
    }

    /// The most probable first, of equals the last of the vocabulary.
    fn order(&self, a: u32, b: u32) -> Ordering {
        self.logits[b as usize].total_cmp(&self.logits[a as usize]).then(b.cmp(&a))
    }

    /// The nucleus, `left` being the sum of all weights; none where the order in which weights are summed
    /// could decide at its edge.
    ///
    /// A token stays while those before it hold less than the share, so the most probable one always does.
    fn nucleus(&self, left: f64, top_p: f64) -> Option<Vec<u32>> {
        let count = self.weights.len() as f64;
        // More than two orders of summing can differ by, as a part of the sum.
        let doubt = 4.0 * count * f64::EPSILON;
        let beyond = 1.0 - top_p;
        if beyond <= 4.0 * doubt {
            return None;
        }
        // All tokens below this weight hold less than half of what is beyond the share, so that none of them
        // is in the nucleus.
        let least_weight = (0.5 * beyond * left / count) as f32;
        let mut candidates = self.tokens(least_weight);
        let (share, doubt) = (top_p * left, doubt * left);
        // Of the candidates in order, the one at `first` is in the nucleus, the one at `end` is not, and
        // those before `first` hold `before`.
        let (mut first, mut end, mut before) = (0, candidates.len(), 0.0);
        while end - first > 1 {
            let rest = &mut candidates[first..end];
            let middle = rest.len() / 2;
            rest.select_nth_unstable_by(middle, |&a, &b| self.order(a, b));
            let mass = before + rest[..middle].iter().map(|&token| self.weight(token)).sum::<f64>();
            if (mass - share).abs() <= doubt {
                return None;
            }
            if mass < share {
                (first, before) = (first + middle, mass);
            } else {
                end = first + middle;
            }
        }
        let last = *candidates.get(first)?;
        let mut kept = self.tokens(least_weight);
        kept.retain(|&token| self.order(token, last).is_le());
        Some(kept)
    }

    /// The same by sorting.
    fn sorted_nucleus(&self, top_p: f64) -> Vec<u32> {
        let mut tokens = self.tokens(0.0);
        tokens.sort_unstable_by(|&a, &b| self.order(a, b));
        let left: f64 = tokens.iter().map(|&token| self.weight(token)).sum();
        let mut before = 0.0;
        let is_beyond = |&token: &u32| {
            let is_beyond = before >= top_p * left;
            before += self.weight(token);
            is_beyond
        };
        let end = tokens.iter().position(is_beyond).unwrap_or(tokens.len());
        tokens.truncate(end);
        tokens.sort_unstable();
        tokens
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same by sorting the whole vocabulary.
    fn reference(logits: &[f32], weights: &[f32], top_k: usize, top_p: f64) -> Vec<u32> {
        let mut weights = weights.to_vec();
        if top_k > 0 && top_k < logits.len() {
            let mut ordered = logits.to_vec();
            ordered.sort_by(|a, b| b.total_cmp(a));
            for (weight, logit) in weights.iter_mut().zip(logits) {
                *weight = if *logit < ordered[top_k - 1] { 0.0 } else { *weight };
            }
        }
        let mut order: Vec<usize> = (0..weights.len()).filter(|&token| weights[token] > 0.0).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(b.cmp(&a)));
        if top_p < 1.0 {
            let left: f64 = order.iter().map(|&token| f64::from(weights[token])).sum();
            let mut before = 0.0;
            for token in order {
                let weight = f64::from(weights[token]);
                weights[token] = if before >= top_p * left { 0.0 } else { weights[token] };
                before += weight;
            }
        }
        (0..weights.len() as u32).filter(|&token| weights[token as usize] > 0.0).collect()
    }

    fn assert_same(logits: &[f32], top_k: usize, top_p: f64) {
        let maximum = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = logits.iter().map(|logit| (logit - maximum).exp()).collect();
        let whole = weights.iter().map(|&weight| f64::from(weight)).sum();
        let found = kept(logits, &weights, whole, top_k, top_p);
        assert_eq!(found, reference(logits, &weights, top_k, top_p), "top-k {top_k}, top-p {top_p}, {logits:?}");
    }

    proptest! {
        #[test]
        fn selection_leaves_what_sorting_leaves(
            logits in prop::collection::vec(-20f32..20.0, 1..400),
            top_k in prop_oneof![Just(0), 1usize..450],
            top_p in prop_oneof![0.001f64..1.0, Just(1.0), Just(0.5), Just(1.0 - 1e-15)],
        ) {
            assert_same(&logits, top_k, top_p);
        }

        /// Equal logits at every edge, zeros of both signs and impossible tokens among them; masses that meet
        /// the share but for rounding.
        #[test]
        fn selection_keeps_the_same_ones_of_equals(
            logits in prop::collection::vec(
                prop::sample::select(vec![-2.0, -1.0, -0.0, 0.0, 1.0, 1.0, f32::NEG_INFINITY, -200.0]), 0..60),
            top_k in 0usize..20,
            top_p in prop::sample::select(vec![0.1, 0.25, 1.0 / 3.0, 0.5, 0.6, 0.75, 0.9, 0.99, 1.0]),
        ) {
            assert_same(&[&logits[..], &[1.0]].concat(), top_k, top_p);
        }
    }

    #[test]
    fn an_even_distribution_and_one_of_a_large_vocabulary_are_cut_where_sorting_cuts_them() {
        let wave = |token: u32| 3.0 * (token as f32 * 0.37).sin() - (token % 1000) as f32 * 0.01;
        let logits: Vec<f32> = (0..50_000).map(wave).collect();
        for top_p in [0.01, 0.5, 0.9, 0.999_999] {
            for top_k in [0, 1, 50, 20_000] {
                assert_same(&logits, top_k, top_p);
                assert_same(&[0.25; 4096], top_k, top_p);
            }
        }
    }
}
