//! What the tests of the operations share: random operands, comparison with a reference and with finite differences.

use candle_core::{DType, Device, Tensor, Var};

use super::backward::{Gradients, Outputs};
use super::value::Value;
use crate::error::Result;
use crate::random;

/// The shape and seed of one operand.
#[derive(Clone)]
pub struct Operand {
    shape: Vec<usize>,
}

impl Operand {
    pub fn new(shape: &[usize]) -> Self {
        Operand { shape: shape.to_vec() }
    }
}

/// Independent normal numbers.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    random::normal(&mut random::stream(seed, "test", 0), shape, 1.0, &Device::Cpu).expect("random numbers")
}

/// Checks that two tensors agree within `tolerance` of the largest element (at least 0.05: the operands are about 1).
pub fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    if found.elem_count() == 0 {
        return;
    }
    let values = |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (found, expected) = (values(found), values(expected));
    let largest = expected.iter().fold(0.05, |largest: f64, x| largest.max(x.abs()));
    for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(
            (found - expected).abs() <= tolerance * largest,
            "{what}: element {index} is {found}, expected {expected}"
        );
    }
}

/// The gradients of `Σ projection · y`.
pub fn gradients_of(y: &Value, projection: &Tensor) -> Result<Gradients> {
    let mut outputs = Outputs::default();
    let loss = (outputs.tensor(y)? * projection)?.sum_all()?;
    outputs.gradients(&loss)
}

fn leaves(operands: &[Tensor], tracked: &[bool]) -> Vec<Tensor> {
    let leaf = |(operand, &tracked): (&Tensor, &bool)| match tracked {
        true => Var::from_tensor(operand).unwrap().as_tensor().clone(),
        false => operand.clone(),
    };
    operands.iter().zip(tracked).map(leaf).collect()
}

/// The numbers by which a value is projected.
fn projection(value: &Tensor) -> Tensor {
    random(value.dims(), 1000).to_dtype(value.dtype()).unwrap()
}

/// The value of `operation` and the gradients of a random projection of it, for the tracked operands.
pub fn run(
    operands: &[Tensor],
    tracked: &[bool],
    operation: impl Fn(&[Value]) -> Result<Value>,
) -> (Tensor, Vec<Option<Tensor>>) {
    let leaves = leaves(operands, tracked);
    let values: Vec<Value> = leaves.iter().map(Value::of).collect();
    let value = operation(&values).unwrap();
    let mut gradients = gradients_of(&value, &projection(value.tensor())).unwrap();
    let gradient = |leaf: &Tensor| gradients.take(leaf).map(|gradient| gradient.into_tensor().unwrap());
    let found = leaves.iter().map(gradient).collect();
    (value.tensor().clone(), found)
}

/// The same of an operation of candle's, by candle's backward pass.
pub fn run_reference(
    operands: &[Tensor],
    tracked: &[bool],
    operation: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> (Tensor, Vec<Option<Tensor>>) {
    let leaves = leaves(operands, tracked);
    let value = operation(&leaves).unwrap();
    let gradients = (&value * projection(&value)).unwrap().sum_all().unwrap().backward().unwrap();
    let gradients = leaves.iter().map(|leaf| gradients.get(leaf).cloned()).collect();
    (value, gradients)
}

/// Compares an operation with its reference, which runs in double precision: values and the gradient of every operand, with
/// every choice of frozen operands; a frozen one must get none.
pub fn compare(
    operands: &[Operand],
    operation: impl Fn(&[Value]) -> Result<Value>,
    reference: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let single: Vec<Tensor> = operands.iter().zip(1..).map(|(operand, seed)| random(&operand.shape, seed)).collect();
    let double: Vec<Tensor> = single.iter().map(|x| x.to_dtype(DType::F64).unwrap()).collect();
    let all = vec![true; operands.len()];
    let (expected, expected_gradients) = run_reference(&double, &all, reference);
    let shapes: Vec<&[usize]> = operands.iter().map(|operand| operand.shape.as_slice()).collect();
    for choice in 1..1_usize << operands.len() {
        let tracked: Vec<bool> = (0..operands.len()).map(|index| choice >> index & 1 == 1).collect();
        let (value, gradients) = run(&single, &tracked, &operation);
        assert_close(&format!("value for {shapes:?}"), &value, &expected, 1e-5);
        for (index, (gradient, expected)) in gradients.iter().zip(&expected_gradients).enumerate() {
            match (tracked[index], gradient, expected) {
                (true, Some(gradient), Some(expected)) => {
                    assert_close(&format!("gradient of operand {index} for {shapes:?}"), gradient, expected, 2e-5);
                }
                (true, None, _) => panic!("operand {index} is trained but has no gradient"),
                (false, Some(_), _) => panic!("operand {index} is frozen but has a gradient"),
                _ => (),
            }
        }
    }
}

/// Compares the gradients of an operation in double precision (where it runs its reference) with central differences.
pub fn compare_with_finite_differences(operands: &[Operand], operation: impl Fn(&[Value]) -> Result<Value>) {
    let operands: Vec<Tensor> = operands
        .iter()
        .zip(1..)
        .map(|(operand, seed)| random(&operand.shape, seed).to_dtype(DType::F64).unwrap())
        .collect();
    let (value, gradients) = run(&operands, &vec![true; operands.len()], &operation);
    let projection = random(value.dims(), 1000).to_dtype(DType::F64).unwrap();
    let projected = |operands: &[Tensor]| -> f64 {
        let values: Vec<Value> = operands.iter().map(Value::of).collect();
        (operation(&values).unwrap().tensor() * &projection).unwrap().sum_all().unwrap().to_scalar().unwrap()
    };
    const STEP: f64 = 1e-5;
    for (index, gradient) in gradients.iter().enumerate() {
        let shape = operands[index].dims().to_vec();
        let values: Vec<f64> = operands[index].flatten_all().unwrap().to_vec1().unwrap();
        let differences: Vec<f64> = (0..values.len())
            .map(|element| {
                let at = |shift: f64| {
                    let mut values = values.clone();
                    values[element] += shift;
                    let mut operands = operands.clone();
                    operands[index] = Tensor::from_vec(values, shape.clone(), &Device::Cpu).unwrap();
                    projected(&operands)
                };
                (at(STEP) - at(-STEP)) / (2.0 * STEP)
            })
            .collect();
        let differences = Tensor::from_vec(differences, shape.clone(), &Device::Cpu).unwrap();
        assert_close(&format!("finite differences of operand {index}"), gradient.as_ref().unwrap(), &differences, 1e-6);
    }
}

/// Checks that value and gradients have the same bits on one, two and three threads.
pub fn assert_same_bits_on_any_number_of_threads(
    operands: &[Operand],
    operation: impl Fn(&[Value]) -> Result<Value> + Sync,
) {
    let operands: Vec<Tensor> = operands.iter().zip(1..).map(|(operand, seed)| random(&operand.shape, seed)).collect();
    let bits = |threads: usize| -> Vec<Vec<u32>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (value, gradients) = pool.install(|| run(&operands, &vec![true; operands.len()], &operation));
        std::iter::once(value)
            .chain(gradients.into_iter().flatten())
            .map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect())
            .collect()
    };
    let expected = bits(1);
    assert_eq!(expected.len(), 1 + operands.len());
    for threads in [2, 3] {
        assert!(bits(threads) == expected, "{threads} threads give other bits than one");
    }
}
