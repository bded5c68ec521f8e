use candle_core::{DType, Device};

use super::*;
use crate::ops::testing::{Operand, compare, gradients_of, random};
use crate::ops::{Activation, LowRank, Weight, activate, linear, low_rank_linear};

/// A small network with a residual stream; `t` is input, weight and bias.
fn network(t: &[Value]) -> Result<Value> {
    let inner = activate(&linear(&t[0], &t[1], Some(&t[2]))?, Activation::Tanh)?;
    t[0].add(&inner)?.add(&inner)
}

fn network_in_candle(t: &[Tensor]) -> Result<Tensor> {
    let inner = t[0].matmul(&t[1].t()?)?.broadcast_add(&t[2])?.tanh()?;
    Ok(((&t[0] + &inner)? + inner)?)
}

fn operands() -> [Operand; 3] {
    [[6, 5].as_slice(), &[5, 5], &[5]].map(Operand::new)
}

#[test]
fn a_part_that_is_run_again_gives_the_gradients_of_candle() {
    compare(
        &operands(),
        |t| {
            // The weights train under the part, which reads them without being given them.
            let (weight, bias) = (t[1].clone(), t[2].clone());
            let part = move |x: &[Value], _| network(&[x[0].clone(), weight.clone(), bias.clone()]);
            checkpoint(&[&checkpoint(&[&t[0]], part.clone())?], part)
        },
        |t| network_in_candle(&[network_in_candle(t)?, t[1].clone(), t[2].clone()]),
    );
}

#[test]
fn a_part_that_is_run_again_gives_equal_bits() -> Result<()> {
    let [x, weight, bias] =
        [[6, 5].as_slice(), &[5, 5], &[5]].map(|shape| Var::from_tensor(&random(shape, 1)).unwrap());
    let values = [&x, &weight, &bias].map(|variable| Value::of(variable));
    let numbers = |y: Value| -> Result<Vec<Vec<f32>>> {
        let gradients = gradients_of(&y, &random(&[6, 5], 9))?;
        [&x, &weight, &bias].iter().map(|variable| Ok(gradients.get(variable).unwrap().values()?.to_vec())).collect()
    };
    let [_, weight_value, bias_value] = values.clone();
    let again =
        checkpoint(&[&values[0]], move |x, _| network(&[x[0].clone(), weight_value.clone(), bias_value.clone()]))?;
    assert_eq!(numbers(again)?, numbers(network(&values)?)?);
    Ok(())
}

#[test]
fn a_linear_whose_rows_are_not_read_gives_the_same_gradients_without_them() -> Result<()> {
    let shapes = [[6, 5].as_slice(), &[4, 5], &[4], &[2, 5], &[4, 2]];
    let variables = shapes.map(|shape| Var::from_tensor(&random(shape, 1)).unwrap());
    let [x, weight, bias, a, b] = [0, 1, 2, 3, 4].map(|index: usize| Value::of(&variables[index]));
    let update = LowRank { a: &a, b: &b, scale: 0.5, dropout: None };
    let weight = Weight::from(&weight);
    let last = |weight: &Weight, is_updated| match is_updated {
        true => low_rank_linear(&x, weight, Some(&bias), &update),
        false => linear(&x, weight, Some(&bias)),
    };
    for is_updated in [false, true] {
        let (read, unread) = (last(&weight, is_updated)?, last(&weight.unread(), is_updated)?);
        assert_eq!(unread.tensor().to_vec2::<f32>()?, vec![vec![0.0; 4]; 6]);
        let numbers = |y: Value| -> Result<Vec<Option<Vec<f32>>>> {
            let gradients = gradients_of(&y, &random(&[6, 4], 9))?;
            let of = |variable| gradients.get(variable).map(|found| Ok(found.values()?.to_vec())).transpose();
            variables.iter().map(|variable| of(variable.as_tensor())).collect()
        };
        let expected = numbers(read)?;
        assert_eq!(expected.iter().flatten().count(), if is_updated { 5 } else { 3 });
        assert_eq!(numbers(unread)?, expected);
    }
    Ok(())
}

#[test]
fn a_part_in_which_nothing_trains_is_a_constant() -> Result<()> {
    let x = Value::of(&random(&[3, 2], 1));
    assert!(!checkpoint(&[&x], |x, _| x[0].scale(2.0))?.is_tracked());
    Ok(())
}

/// What candle computes from variables gets its gradient from ours and gives it on.
#[test]
fn tensors_that_candle_computed_join_both_passes() -> Result<()> {
    let (x, a) = (Var::from_tensor(&random(&[4, 3], 1))?, Var::from_tensor(&random(&[3], 2))?);
    let factors = a.exp()?;
    let y =
        Value::of(&x).scale_columns(&Value::of(&factors))?.add(&Value::of(&x).scale_columns(&Value::of(&factors))?)?;
    let projection = random(&[4, 3], 3);
    let gradients = gradients_of(&y, &projection)?;
    let expected = (x.broadcast_mul(&a.exp()?)?.affine(2.0, 0.0)? * &projection)?.sum_all()?.backward()?;
    for variable in [&x, &a] {
        let (found, expected) = (gradients.get(variable).unwrap().to_tensor()?, expected.get(variable).unwrap());
        crate::ops::testing::assert_close("gradient", &found, expected, 1e-6);
    }
    Ok(())
}

#[test]
fn micro_batches_add_up_and_a_second_pass_over_the_same_operations_is_refused() -> Result<()> {
    let x = Var::from_tensor(&random(&[4, 3], 1))?;
    let mut gradients = Gradients::default();
    for _ in 0..3 {
        let mut outputs = Outputs::default();
        let loss = outputs.tensor(&Value::of(&x).scale(2.0)?)?.sum_all()?;
        outputs.backward(&loss, &mut gradients)?;
    }
    assert_eq!(gradients.get(&x).unwrap().values()?, [6.0; 12]);
    let y = Value::of(&x).scale(2.0)?;
    let ones = Tensor::ones((4, 3), DType::F32, &Device::Cpu)?;
    gradients_of(&y, &ones)?;
    assert!(gradients_of(&y, &ones).unwrap_err().to_string().contains("second backward pass"));
    Ok(())
}
