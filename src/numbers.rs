//! Extremes of numbers, some of which may be none.
//!
//! `f32::max` and `f32::min` drop NaN, so that a fold by them says that all is well of numbers that are lost. These do not.

/// A floating-point number.
pub trait Number: Copy + PartialOrd {
    /// Whether it is NaN.
    fn is_nan(self) -> bool;
}

impl Number for f32 {
    fn is_nan(self) -> bool {
        f32::is_nan(self)
    }
}

impl Number for f64 {
    fn is_nan(self) -> bool {
        f64::is_nan(self)
    }
}

/// The largest of some numbers, NaN if one of them is; `None` where there are none.
pub fn largest<N: Number>(numbers: impl IntoIterator<Item = N>) -> Option<N> {
    extreme(numbers, |number, found| number > found)
}

/// The smallest of some numbers, NaN if one of them is; `None` where there are none.
pub fn smallest<N: Number>(numbers: impl IntoIterator<Item = N>) -> Option<N> {
    extreme(numbers, |number, found| number < found)
}

fn extreme<N: Number>(numbers: impl IntoIterator<Item = N>, is_beyond: impl Fn(N, N) -> bool) -> Option<N> {
    let further = |found: N, number: N| if number.is_nan() || is_beyond(number, found) { number } else { found };
    // Nothing is larger or smaller than NaN, so it stays once it is found.
    numbers.into_iter().reduce(further)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn extremes_are_those_of_a_sorted_list_unless_a_number_is_none(mut numbers in prop::collection::vec(-9f32..9.0, 1..9), place in 0usize..9) {
            let found = (largest(numbers.iter().copied()), smallest(numbers.iter().copied()));
            let mut sorted = numbers.clone();
            sorted.sort_by(f32::total_cmp);
            prop_assert_eq!(found, (sorted.last().copied(), sorted.first().copied()));
            numbers.insert(place.min(numbers.len()), f32::NAN);
            prop_assert!(largest(numbers.iter().copied()).is_some_and(f32::is_nan));
            prop_assert!(smallest(numbers.iter().copied()).is_some_and(f32::is_nan));
        }
    }

    #[test]
    fn there_is_no_extreme_of_nothing() {
        assert_eq!(largest(Vec::<f64>::new()), None);
    }
}
