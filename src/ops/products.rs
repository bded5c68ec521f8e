//! Products with a matrix, in the precision that is set where it is a weight of the model.

use std::sync::{Arc, OnceLock};

use super::bf16::{self, Kernel, Packed};
use super::compact::{Compact, CompactForm};
use super::matrix::{Matrix, MatrixMut, Threads, multiply as multiply_f32};
use super::precision::Arithmetic;
use super::weight::Operand;

/// What a weight that does not change is packed to for `x Wᵀ` in bf16: once, and for all that share it. It
/// must not outlive a change of the weight.
///
/// It takes 2 bytes a number. What `g W` needs is another order of the same numbers, and is packed each time:
/// the backward pass has many rows, of whose product the packing is a few hundredths.
#[derive(Debug, Default)]
pub struct PackedWeight(OnceLock<(Kernel, Packed)>);

/// How products with a matrix are made.
#[derive(Debug, Clone, Default)]
pub(super) enum Products {
    /// In f32, whatever is set.
    #[default]
    Exact,
    /// In the precision that is set.
    AsSet(Arc<Kept>),
}

/// What of a matrix is kept.
#[derive(Debug, Clone, Default)]
pub(super) struct Kept {
    /// What it is packed to for `x Wᵀ`.
    transposed: Option<Arc<PackedWeight>>,
    /// And for `g W`.
    as_it_is: Option<Arc<PackedWeight>>,
}

impl Products {
    /// Those with a weight, which is kept packed where it never changes.
    pub fn of_weight(packed: Option<Arc<PackedWeight>>) -> Self {
        Products::AsSet(Arc::new(Kept { transposed: packed, as_it_is: None }))
    }

    /// These, with what is packed kept at least until they are dropped, for several products with one matrix.
    pub fn kept(&self) -> Self {
        let some = |packed: &Option<Arc<PackedWeight>>| Some(packed.clone().unwrap_or_default());
        match self {
            Products::AsSet(kept) => {
                let (transposed, as_it_is) = (some(&kept.transposed), some(&kept.as_it_is));
                Products::AsSet(Arc::new(Kept { transposed, as_it_is }))
            }
            Products::Exact => Products::Exact,
        }
    }

    /// `target = factor x Wᵀ`, or `target += factor x Wᵀ`.
    pub fn times_transposed(&self, target: MatrixMut, accumulate: bool, factor: f32, x: Matrix, weight: Operand) {
        match (self, weight) {
            (Products::AsSet(kept), Operand::Plain(weight)) => {
                as_set(kept.transposed.as_deref(), target, accumulate, factor, x, weight.t());
            }
            (Products::AsSet(kept), Operand::Compact(weight)) => {
                compact_as_set(kept.transposed.as_deref(), target, accumulate, factor, x, weight);
            }
            (Products::Exact, Operand::Plain(weight)) => {
                multiply_f32(target, accumulate, factor, x, weight.t(), Threads::All);
            }
            (Products::Exact, Operand::Compact(weight)) => weight.times_transposed(target, accumulate, factor, x),
        }
    }

    /// `target = factor g W`, or `target += factor g W`.
    pub fn times(&self, target: MatrixMut, accumulate: bool, factor: f32, g: Matrix, weight: Operand) {
        let weight = match (self, weight) {
            (Products::AsSet(kept), Operand::Plain(weight)) => {
                return as_set(kept.as_it_is.as_deref(), target, accumulate, factor, g, weight);
            }
            (Products::Exact, Operand::Plain(weight)) => {
                return multiply_f32(target, accumulate, factor, g, weight, Threads::All);
            }
            (_, Operand::Compact(weight)) => weight,
        };
        let [d_out, d_in] = weight.dims();
        assert!(g.columns == d_out);
        if let (Products::AsSet(kept), Arithmetic::Bf16(kernel)) = (self, Arithmetic::current()) {
            let packed = kept.as_it_is.as_deref().filter(|_| kernel.packs());
            if let Some(packed) = packed.and_then(|packed| packed.get(kernel, || Packed::of_compact(kernel, weight))) {
                return bf16::multiply_packed(kernel, target, accumulate, factor, g, packed);
            }
        }
        if matches!(self, Products::AsSet(_)) && needs_rounded_rows(weight) {
            let rounded = bf16::rounded(g);
            let g = Matrix::new(&rounded, g.rows, g.columns);
            return Products::Exact.times(target, accumulate, factor, g, Operand::Compact(weight));
        }
        // A sum over the parts that are widened at a time.
        for rows in weight.slabs() {
            weight.with_slab(rows.clone(), |values| {
                let (g, part) = (g.block(0..g.rows, rows.clone()), Matrix::new(values, rows.len(), d_in));
                let accumulate = accumulate || rows.start > 0;
                match self {
                    Products::AsSet(_) => as_set(None, target, accumulate, factor, g, part),
                    Products::Exact => multiply_f32(target, accumulate, factor, g, part, Threads::All),
                }
            });
        }
    }

    /// `target = factor gᵀ x`, or `target += factor gᵀ x`: the gradient of the weight.
    pub fn of_gradient(&self, target: MatrixMut, accumulate: bool, factor: f32, g: Matrix, x: Matrix) {
        match self {
            Products::AsSet(_) => as_set(None, target, accumulate, factor, g.t(), x),
            Products::Exact => multiply_f32(target, accumulate, factor, g.t(), x, Threads::All),
        }
    }
}

/// `target = factor a b`, or `target += factor a b`, in the precision that is set; `packed` is where `b` is
/// kept packed, if it is.
fn as_set(packed: Option<&PackedWeight>, target: MatrixMut, accumulate: bool, factor: f32, a: Matrix, b: Matrix) {
    let Arithmetic::Bf16(kernel) = Arithmetic::current() else {
        return multiply_f32(target, accumulate, factor, a, b, Threads::All);
    };
    let packed = packed.filter(|_| kernel.packs());
    match packed.and_then(|packed| packed.get(kernel, || Packed::new(kernel, b))) {
        Some(packed) => bf16::multiply_packed(kernel, target, accumulate, factor, a, packed),
        None => bf16::multiply(kernel, target, accumulate, factor, a, b),
    }
}

/// Whether a product in the precision that is set is one in f32 of rounded rows: the matrix is kept in bf16, and
/// the processor multiplies in f32.
fn needs_rounded_rows(weight: &Compact) -> bool {
    Arithmetic::current() == Arithmetic::Bf16(Kernel::Widened) && weight.form() == CompactForm::BF16
}

/// `target = factor x Wᵀ`, or `target += factor x Wᵀ`, in the precision that is set, of a matrix in fewer bytes.
fn compact_as_set(
    packed: Option<&PackedWeight>,
    target: MatrixMut,
    accumulate: bool,
    factor: f32,
    x: Matrix,
    weight: &Compact,
) {
    let Arithmetic::Bf16(kernel) = Arithmetic::current() else {
        return weight.times_transposed(target, accumulate, factor, x);
    };
    let packed = packed.filter(|_| kernel.packs());
    if let Some(packed) = packed.and_then(|packed| packed.get(kernel, || Packed::of_transposed(kernel, weight))) {
        return bf16::multiply_packed(kernel, target, accumulate, factor, x, packed);
    }
    if x.rows == 0 {
        return;
    }
    if needs_rounded_rows(weight) {
        let rounded = bf16::rounded(x);
        return weight.times_transposed(target, accumulate, factor, Matrix::new(&rounded, x.rows, x.columns));
    }
    for rows in weight.slabs() {
        weight.with_slab(rows.clone(), |values| {
            let part = Matrix::new(values, rows.len(), x.columns);
            // SAFETY: one block at a time.
            let target = unsafe { target.block(0..x.rows, rows.clone()) };
            bf16::multiply(kernel, target, accumulate, factor, x, part.t());
        });
    }
}

impl PackedWeight {
    /// What it is packed to for a kernel, unless it was packed for another, which is so in tests alone.
    fn get(&self, kernel: Kernel, pack: impl FnOnce() -> Packed) -> Option<&Packed> {
        if self.0.get().is_none() {
            // Packed outside of the lock: a thread that waits for the tasks of this may be given one that
            // waits for the lock.
            let packed = pack();
            let _ = self.0.set((kernel, packed));
        }
        self.0.get().filter(|(of, _)| *of == kernel).map(|(_, packed)| packed)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Tensor};

    use super::*;
    use crate::error::Result;
    use crate::ops::testing::{assert_close, random, run};
    use crate::ops::{LowRank, Value, Weight, linear, log_probs, low_rank_linear};

    fn arithmetics() -> impl Iterator<Item = Arithmetic> {
        Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()).map(Arithmetic::Bf16)
    }

    /// Rounded to bf16, in double precision.
    fn rounded(x: &Tensor) -> Tensor {
        x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F64).unwrap()
    }

    fn projection(shape: &[usize]) -> Tensor {
        random(shape, 1000)
    }

    /// A linear whose weight trains, or is frozen and kept packed.
    fn of_weight(kept: Option<&Arc<PackedWeight>>) -> impl Fn(&[Value]) -> Result<Value> {
        let kept = kept.cloned();
        move |t| linear(&t[0], Weight::new(&t[1].in_candle(), kept.as_ref()), None)
    }

    #[test]
    fn a_linear_and_its_gradients_are_products_of_rounded_operands() {
        for (tokens, d_in, d_out) in [(65, 33, 17), (130, 64, 200), (1, 700, 40)] {
            let (x, weight) = (random(&[tokens, d_in], 1), random(&[d_out, d_in], 2));
            let g = projection(&[tokens, d_out]);
            let y = rounded(&x).matmul(&rounded(&weight).t().unwrap()).unwrap();
            let dx = rounded(&g).matmul(&rounded(&weight)).unwrap();
            let dw = rounded(&g).t().unwrap().matmul(&rounded(&x)).unwrap();
            for arithmetic in arithmetics() {
                let kept = Arc::default();
                for kept in [None, Some(&kept), Some(&kept)] {
                    let run = |tracked: &[bool]| {
                        arithmetic.within(|| run(&[x.clone(), weight.clone()], tracked, of_weight(kept)))
                    };
                    let (value, gradients) = run(&[true, false]);
                    assert_close("y", &value, &y, 1e-5);
                    assert_close("dx", gradients[0].as_ref().unwrap(), &dx, 1e-5);
                    let (value, gradients) = run(&[true, true]);
                    assert_close("y", &value, &y, 1e-5);
                    assert_close("dx", gradients[0].as_ref().unwrap(), &dx, 1e-5);
                    assert_close("dW", gradients[1].as_ref().unwrap(), &dw, 1e-5);
                }
                assert_eq!(kept.0.get().is_some(), arithmetic.packs());
            }
        }
    }

    #[test]
    fn what_is_no_weight_is_multiplied_in_f32_whatever_is_set() {
        let (x, weight) = (random(&[65, 33], 1), random(&[17, 33], 2));
        let y = x.to_dtype(DType::F64).unwrap().matmul(&weight.to_dtype(DType::F64).unwrap().t().unwrap()).unwrap();
        for arithmetic in arithmetics() {
            let found = arithmetic.within(|| linear(&Value::of(&x), &Value::of(&weight), None)).unwrap();
            assert_close("y", found.tensor(), &y, 1e-6);
        }
        let found = linear(&Value::of(&x), Weight::new(&weight, Some(&Arc::default())), None).unwrap();
        assert_close("y", found.tensor(), &y, 1e-6);
    }

    #[test]
    fn a_low_rank_update_is_f32_on_a_rounded_product() -> Result<()> {
        let [x, weight, a, b] =
            [(&[65, 33], 1), (&[17, 33], 2), (&[4, 33], 3), (&[17, 4], 4)].map(|(shape, seed)| random(shape, seed));
        let in_f64 = |x: &Tensor| x.to_dtype(DType::F64);
        let inner = in_f64(&x)?.matmul(&in_f64(&a)?.t()?)?;
        let update = inner.matmul(&in_f64(&b)?.t()?)?.affine(0.5, 0.0)?;
        let y = (rounded(&x).matmul(&rounded(&weight).t()?)? + update)?;
        for arithmetic in arithmetics() {
            let [a, b] = [&a, &b].map(Value::of);
            let update = LowRank { a: &a, b: &b, scale: 0.5, dropout: None };
            let weight = Weight::new(&weight, Some(&Arc::default()));
            let found = arithmetic.within(|| low_rank_linear(&Value::of(&x), &weight, None, &update))?;
            assert_close("y", found.tensor(), &y, 1e-5);
        }
        Ok(())
    }

    #[test]
    fn log_probs_and_their_gradients_are_near_those_of_f32() {
        let (count, vocabulary, width) = (300, 65, 40);
        let operands = [random(&[count, width], 1), random(&[vocabulary, width], 2).affine(0.2, 0.0).unwrap()];
        let targets: Vec<u32> = (0..count).map(|index| (index * 7919 % vocabulary) as u32).collect();
        let operation =
            |t: &[Value]| Ok(log_probs(&t[0], Weight::new(&t[1].in_candle(), None), &targets, 0.7, None)?.log_probs);
        let (value, gradients) = run(&operands, &[true, true], operation);
        for arithmetic in arithmetics() {
            let (found, found_gradients) = arithmetic.within(|| run(&operands, &[true, true], operation));
            assert_close("log-probabilities", &found, &value, 6e-3);
            for (found, expected) in found_gradients.iter().zip(&gradients) {
                let (found, expected) = (found.as_ref().unwrap(), expected.as_ref().unwrap());
                assert_close("gradient", found, expected, 1.5e-2);
                let rms = |x: &Tensor| x.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
                let error = rms(&(found - expected).unwrap()) / rms(expected);
                assert!(error > 0.0 && error < 6e-3, "{arithmetic}: {error}");
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let operands = [random(&[130, 97], 1), random(&[161, 97], 2)];
        for arithmetic in arithmetics() {
            for kept in [None, Some(&Arc::default())] {
                let bits = |threads: usize| -> Vec<Vec<u32>> {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let (value, gradients) =
                        pool.install(|| arithmetic.within(|| run(&operands, &[true, true], of_weight(kept))));
                    let all = std::iter::once(value).chain(gradients.into_iter().flatten());
                    let bits = |x: Tensor| {
                        x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
                    };
                    all.map(bits).collect()
                };
                let expected = bits(1);
                assert!(bits(2) == expected && bits(3) == expected, "{arithmetic}");
            }
        }
    }

    #[test]
    fn a_precision_holds_for_one_thread_until_its_end() {
        let scalar = Arithmetic::Bf16(Kernel::Scalar);
        assert_eq!(Arithmetic::current(), Arithmetic::F32);
        scalar.within(|| {
            Arithmetic::F32.within(|| assert_eq!(Arithmetic::current(), Arithmetic::F32));
            assert_eq!(Arithmetic::current(), scalar);
            assert_eq!(std::thread::spawn(Arithmetic::current).join().unwrap(), Arithmetic::F32);
        });
        assert_eq!(Arithmetic::current(), Arithmetic::F32);
    }
}
