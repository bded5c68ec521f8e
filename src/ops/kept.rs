//! What a pass keeps for its backward pass, counted.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Storage, Tensor};

use crate::error::Result;

thread_local! {
    /// The bytes of every storage that is kept, while they are counted.
    static COUNTED: RefCell<Option<HashMap<usize, usize>>> = const { RefCell::new(None) };
}

/// Notes tensors that an operation keeps.
pub(super) fn note(tensors: &[&Tensor]) {
    COUNTED.with_borrow_mut(|counted| {
        if let Some(counted) = counted {
            counted.extend(tensors.iter().filter_map(|tensor| storage(tensor)));
        }
    });
}

/// Runs a part of a pass whose operations keep nothing after it.
pub(super) fn without_counting<T>(run: impl FnOnce() -> T) -> T {
    let counted = COUNTED.take();
    let result = run();
    COUNTED.set(counted);
    result
}

/// Runs a pass and gives the bytes that it keeps for its backward pass: of tensors in main memory, each once,
/// weights apart. `run` holds on to what it computed until the end.
pub fn count_kept<T>(run: impl FnOnce() -> Result<T>) -> Result<usize> {
    let before = COUNTED.replace(Some(HashMap::new()));
    let result = run();
    let counted = COUNTED.replace(before).unwrap_or_default();
    result?;
    Ok(counted.values().sum())
}

/// Where the storage of a tensor lies, and its bytes.
fn storage(tensor: &Tensor) -> Option<(usize, usize)> {
    match &*tensor.storage_and_layout().0 {
        Storage::Cpu(candle_core::CpuStorage::F32(numbers)) => {
            Some((numbers.as_ptr() as usize, std::mem::size_of_val(&numbers[..])))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::ops::testing::random;
    use crate::ops::{Value, checkpoint, linear};

    #[test]
    fn what_is_kept_is_counted_once_and_of_a_part_that_is_run_again_its_input() -> Result<()> {
        let (x, frozen) = (Value::of(&random(&[6, 5], 1)), Value::of(&random(&[5, 5], 2)));
        let variable = Var::from_tensor(&random(&[5, 5], 3))?;
        let weight = Value::of(&variable);
        // The input of both trained linears is one; that of the frozen one is not kept.
        let network =
            |x: &Value| linear(x, &weight, None)?.add(&linear(x, &weight, None)?)?.add(&linear(x, &frozen, None)?);
        assert_eq!(count_kept(|| network(&x))?, 6 * 5 * 4);
        assert_eq!(count_kept(|| network(&network(&x)?))?, 2 * 6 * 5 * 4);
        let again = |x: &Value| {
            let (weight, frozen) = (weight.clone(), frozen.clone());
            checkpoint(&[x], move |x, _| linear(&linear(&linear(&x[0], &weight, None)?, &frozen, None)?, &weight, None))
        };
        assert_eq!(count_kept(|| again(&x))?, 6 * 5 * 4);
        assert_eq!(count_kept(|| linear(&x, &frozen, None))?, 0);
        Ok(())
    }
}
