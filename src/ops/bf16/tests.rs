//! Every kernel that this processor can run, against products in double precision of operands that candle rounded.

use candle_core::{DType, Device, Tensor};

use super::pack::{Form, HALF, SIDE, Tile, pack, round, widen};
use super::*;
use crate::ops::testing::{assert_close, random};

/// The kernels that can run here.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.into_iter().filter(|kernel| kernel.is_available())
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// A matrix of these numbers, the transpose of the one that is in memory where `is_transposed`.
struct Operand {
    values: Vec<f32>,
    rows: usize,
    columns: usize,
    is_transposed: bool,
}

impl Operand {
    fn new(x: &Tensor, is_transposed: bool) -> Self {
        let (rows, columns) = x.dims2().unwrap();
        let values = values(&if is_transposed { x.t().unwrap().contiguous().unwrap() } else { x.clone() });
        Operand { values, rows, columns, is_transposed }
    }

    fn matrix(&self) -> Matrix<'_> {
        match self.is_transposed {
            true => Matrix::new(&self.values, self.columns, self.rows).t(),
            false => Matrix::new(&self.values, self.rows, self.columns),
        }
    }
}

/// `rounded(a) rounded(b)` in double precision.
fn expected(a: &Tensor, b: &Tensor) -> Tensor {
    let rounded = |x: &Tensor| x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F64).unwrap();
    rounded(a).matmul(&rounded(b)).unwrap()
}

/// Rows, columns and depths with edges on each side, and depths of more than one block.
const SHAPES: [(usize, usize, usize); 12] = [
    (1, 1, 1),
    (7, 5, 3),
    (33, 31, 65),
    (2, 97, 64),
    (3, 300, 700),
    (4, 32, 31),
    (5, 33, 33),
    (6, 16, 16),
    (64, 64, 64),
    (130, 70, 1300),
    (300, 600, 40),
    (40, 1100, 90),
];

#[test]
fn products_are_those_of_rounded_operands() {
    for (rows, columns, depth) in SHAPES {
        let (a, b) = (random(&[rows, depth], 1), random(&[depth, columns], 2));
        let expected = expected(&a, &b);
        for kernel in kernels() {
            for transposed in [[false, false], [false, true], [true, false], [true, true]] {
                let (a, b) = (Operand::new(&a, transposed[0]), Operand::new(&b, transposed[1]));
                // 1 + 1 + 2 - 0.5 times the product: set, added to without and with a factor.
                let mut found = vec![f32::NAN; rows * columns];
                for (accumulate, factor) in [(false, 1.0), (true, 1.0), (true, 2.0), (true, -0.5)] {
                    let target = MatrixMut::new(&mut found, rows, columns);
                    multiply(kernel, target, accumulate, factor, a.matrix(), b.matrix());
                }
                let found = Tensor::from_vec(found, (rows, columns), &Device::Cpu).unwrap();
                let what = format!("{kernel:?}, {rows} x {columns} x {depth}, {transposed:?}");
                assert_close(&what, &found, &expected.affine(3.5, 0.0).unwrap(), 1e-5);
            }
        }
    }
}

#[test]
fn a_product_set_with_a_factor_is_not_read_before() {
    let (a, b) = (random(&[34, 50], 1), random(&[50, 70], 2));
    let expected = expected(&a, &b).affine(0.7, 0.0).unwrap();
    let (a, b) = (Operand::new(&a, false), Operand::new(&b, false));
    for kernel in kernels() {
        let mut found = vec![f32::NAN; 34 * 70];
        multiply(kernel, MatrixMut::new(&mut found, 34, 70), false, 0.7, a.matrix(), b.matrix());
        assert_close("product", &Tensor::from_vec(found, (34, 70), &Device::Cpu).unwrap(), &expected, 1e-5);
        // An empty sum is 0, or nothing to add.
        let (a, b) = (Matrix::new(&[], 3, 0), Matrix::new(&[], 0, 2));
        let mut found = vec![5.0; 6];
        multiply(kernel, MatrixMut::new(&mut found, 3, 2), true, 1.0, a, b);
        assert_eq!(found, [5.0; 6]);
        multiply(kernel, MatrixMut::new(&mut found, 3, 2), false, 1.0, a, b);
        assert_eq!(found, [0.0; 6]);
    }
}

#[test]
fn bits_depend_neither_on_the_number_of_threads_nor_on_other_rows_and_columns() {
    for (rows, columns, depth) in [(130, 161, 700), (9, 700, 700), (700, 40, 97)] {
        let (a, b) = (random(&[rows, depth], 1), random(&[depth, columns], 2));
        let (a, b) = (Operand::new(&a, false), Operand::new(&b, true));
        for kernel in kernels().filter(|&kernel| kernel != Kernel::Widened) {
            let bits = |threads: usize| -> Vec<u32> {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut found = vec![0.0; rows * columns];
                let target = MatrixMut::new(&mut found, rows, columns);
                pool.install(|| multiply(kernel, target, false, 1.0, a.matrix(), b.matrix()));
                found.into_iter().map(f32::to_bits).collect()
            };
            let whole = bits(1);
            assert!(bits(2) == whole && bits(3) == whole, "{kernel:?}");
            // Some rows of the result, alone.
            let part = 1..6;
            let mut found = vec![0.0; part.len() * columns];
            let target = MatrixMut::new(&mut found, part.len(), columns);
            multiply(kernel, target, false, 1.0, a.matrix().rows(part.clone()), b.matrix());
            let found: Vec<u32> = found.into_iter().map(f32::to_bits).collect();
            assert!(found == whole[part.start * columns..part.end * columns], "{kernel:?}");
        }
    }
}

/// Numbers of every kind, and ties.
fn special() -> Vec<f32> {
    let edges = [0.0, -0.0, 1.0, f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN_POSITIVE];
    let bits = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff, 0xbf80_8000, 0x0000_0001, 0x807f_ffff, 0x7f7f_ffff];
    edges.into_iter().chain(bits.map(f32::from_bits)).collect()
}

#[test]
fn rounding_is_to_nearest_with_ties_to_even() {
    for x in values(&random(&[4000], 3)).into_iter().chain(special()) {
        let expected = half::bf16::from_f32(x);
        match x {
            _ if x.is_nan() => assert!(widen(round(x)).is_nan()),
            // As the processors' instructions do.
            _ if x.abs() < f32::MIN_POSITIVE => assert_eq!(widen(round(x)).to_bits(), 0.0_f32.copysign(x).to_bits()),
            _ => assert_eq!(round(x), expected.to_bits(), "{x:e}"),
        }
    }
}

#[test]
fn vector_instructions_pack_the_same_bits_as_plain_code() {
    if !avx512::is_available() {
        return;
    }
    let special = special();
    for (rows, columns) in [(1, 1), (16, 32), (33, 65), (70, 31), (5, 100)] {
        let numbers: Vec<f32> = values(&random(&[rows * columns], 4));
        let numbers: Vec<f32> = (numbers.into_iter().enumerate())
            .map(|(index, x)| if index % 3 == 0 { special[index % special.len()] } else { x })
            .collect();
        let x = Matrix::new(&numbers, rows, columns);
        for x in [x, x.t()] {
            for form in [Form::Rows, Form::Pairs] {
                let count = x.rows.div_ceil(SIDE) * x.columns.div_ceil(SIDE) * 2;
                let tiles = |vectors: bool| {
                    let mut tiles = vec![Tile([7; HALF * SIDE]); count];
                    pack(x, 0..x.rows, 0..x.columns, form, vectors, &mut tiles);
                    tiles.iter().flat_map(|tile| tile.0).collect::<Vec<u16>>()
                };
                assert!(tiles(true) == tiles(false), "{rows} x {columns}, {form:?}");
            }
        }
    }
}
