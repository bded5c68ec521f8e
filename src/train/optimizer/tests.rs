//! Against the published algorithm, and what a step that is skipped leaves.

use super::*;
use crate::settings::ScheduleShape;

fn settings() -> OptimizerSettings {
    OptimizerSettings {
        max_skipped_steps: 3,
        weight_decay: 0.1,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        epsilon_place: EpsilonPlace::AfterCorrection,
        max_gradient_norm: 1.0,
        schedule: ScheduleShape::Constant,
        warmup_steps: None,
        warmup_ratio: 0.0,
        warmup_start_ratio: 0.0,
        minimum_learning_rate_ratio: 0.0,
    }
}

fn variable(values: &[f32], shape: &[usize]) -> Var {
    Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn values(variable: &Var) -> Vec<f32> {
    variable.flatten_all().unwrap().to_vec1().unwrap()
}

/// A loss with these gradients: the sum over variables of `gradient · variable`.
fn loss(of: &[(&Var, &[f32])]) -> Tensor {
    let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu).unwrap();
    for (variable, gradient) in of {
        let gradient = Tensor::from_slice(gradient, variable.shape(), &Device::Cpu).unwrap();
        loss = (loss + (variable.as_tensor() * gradient).unwrap().sum_all().unwrap()).unwrap();
    }
    loss
}

fn optimizer(named: &[(&str, &Var)]) -> Optimizer {
    Optimizer::new(named.iter().map(|&(name, variable)| adapter::Parameter::new(name, variable)).collect(), &settings())
        .unwrap()
}

/// AdamW in scalars, after the documentation of `torch.optim.AdamW`: (parameter, first moment, second moment).
fn scalar_adamw(at: (f64, f64, f64), gradient: f64, rate: f64, weight_decay: f64, step: i32) -> (f64, f64, f64) {
    let (parameter, first, second) = at;
    let first = 0.9 * first + (1.0 - 0.9) * gradient;
    let second = 0.95 * second + (1.0 - 0.95) * gradient * gradient;
    let first_hat = first / (1.0 - 0.9f64.powi(step));
    let second_hat = second / (1.0 - 0.95f64.powi(step));
    let decayed = parameter - rate * weight_decay * parameter;
    (decayed - rate * first_hat / (second_hat.sqrt() + 1e-8), first, second)
}

#[test]
fn steps_equal_clipped_adamw_with_decay_on_matrices_only() {
    let (weight, bias) = (variable(&[0.5, -1.0, 2.0, 0.1], &[2, 2]), variable(&[0.3, -0.7], &[2]));
    let mut optimizer = optimizer(&[("bias", &bias), ("weight", &weight)]);
    let mut expected: Vec<(f64, f64, f64)> =
        [0.5, -1.0, 2.0, 0.1, 0.3, -0.7].iter().map(|&start| (start, 0.0, 0.0)).collect();
    let steps = [[3.0, -1.0, 0.0, 2.0, 1.0, -1.0], [0.1, 0.2, -0.1, 0.0, 0.3, 0.1], [-2.0, 0.5, 0.5, 1.0, 0.0, 4.0]];
    for (step, gradient) in steps.iter().enumerate() {
        let rate = 0.01 * (step + 1) as f64;
        optimizer.backward(&loss(&[(&weight, &gradient[..4]), (&bias, &gradient[4..])]), Outputs::default()).unwrap();
        let report = optimizer.step(rate).unwrap();
        let norm = gradient.iter().map(|&number| f64::from(number).powi(2)).sum::<f64>().sqrt();
        let scale = if norm > 1.0 { 1.0 / (norm + 1e-6) } else { 1.0 };
        assert!((report.gradient_norm - norm).abs() < 1e-6 && (report.gradient_scale - scale).abs() < 1e-7);
        for (index, at) in expected.iter_mut().enumerate() {
            let decay = if index < 4 { 0.1 } else { 0.0 };
            *at = scalar_adamw(*at, f64::from(gradient[index]) * scale, rate, decay, step as i32 + 1);
        }
        for (found, expected) in [values(&weight), values(&bias)].concat().iter().zip(&expected) {
            assert!((f64::from(*found) - expected.0).abs() < 1e-6, "{found} is not {}", expected.0);
        }
    }
}

#[test]
fn micro_batches_give_the_step_of_the_whole_batch() {
    let step = |micro_batches: &[&[f32]]| {
        let weight = variable(&[1.0, 2.0], &[1, 2]);
        let mut optimizer = optimizer(&[("weight", &weight)]);
        for gradient in micro_batches {
            optimizer.backward(&loss(&[(&weight, gradient)]), Outputs::default()).unwrap();
        }
        (optimizer.step(0.1).unwrap(), values(&weight))
    };
    assert_eq!(step(&[&[0.25, 0.5], &[0.25, -0.25], &[-1.0, 0.5]]), step(&[&[-0.5, 0.75]]));
}

#[test]
fn a_parameter_without_gradient_is_left_alone_and_starts_when_it_gets_one() {
    let (used, unused) = (variable(&[1.0], &[1, 1]), variable(&[1.0], &[1, 1]));
    let mut both = optimizer(&[("used", &used), ("unused", &unused)]);
    for _ in 0..3 {
        both.backward(&loss(&[(&used, &[0.5])]), Outputs::default()).unwrap();
        both.step(0.1).unwrap();
    }
    assert_ne!(values(&used), [1.0]);
    assert_eq!(values(&unused), [1.0]);
    both.backward(&loss(&[(&unused, &[0.5])]), Outputs::default()).unwrap();
    both.step(0.1).unwrap();
    let fresh = variable(&[1.0], &[1, 1]);
    let mut alone = optimizer(&[("fresh", &fresh)]);
    alone.backward(&loss(&[(&fresh, &[0.5])]), Outputs::default()).unwrap();
    alone.step(0.1).unwrap();
    assert_eq!(values(&unused), values(&fresh));
}

#[test]
fn a_step_whose_gradients_are_not_finite_changes_nothing_and_is_counted() {
    let (good, bad) = (variable(&[1.0, 2.0], &[2]), variable(&[3.0], &[1]));
    let mut optimizer = optimizer(&[("good", &good), ("bad", &bad)]);
    for number in [f32::NAN, f32::INFINITY] {
        optimizer.backward(&loss(&[(&good, &[1.0, 1.0]), (&bad, &[number])]), Outputs::default()).unwrap();
        assert!(optimizer.step(0.1).unwrap().not_finite.is_some());
    }
    assert_eq!((values(&good), values(&bad), optimizer.skipped_steps()), (vec![1.0, 2.0], vec![3.0], 2));
    // The faulty gradients are gone: the next step is as the first of a new optimizer.
    optimizer.backward(&loss(&[(&bad, &[0.5])]), Outputs::default()).unwrap();
    let report = optimizer.step(0.1).unwrap();
    assert_eq!((report.gradient_norm, report.not_finite), (0.5, None));
    assert!((values(&bad)[0] - 2.9).abs() < 1e-6);
}

#[test]
fn a_step_at_the_start_of_a_warm_up_changed_nothing() {
    let weight = variable(&[1.0, 2.0], &[2]);
    let mut optimizer = optimizer(&[("weight", &weight)]);
    for (rate, changed) in [(0.0, false), (0.1, true)] {
        optimizer.backward(&loss(&[(&weight, &[1.0, 1.0])]), Outputs::default()).unwrap();
        assert_eq!(optimizer.step(rate).unwrap().changed, changed);
        assert_eq!(values(&weight) != [1.0, 2.0], changed);
    }
}

#[test]
fn too_many_skipped_steps_in_a_row_are_an_error_that_names_the_gradient() {
    let (good, bad) = (variable(&[1.0], &[1]), variable(&[3.0], &[1]));
    let mut optimizer = optimizer(&[("good", &good), ("bad", &bad)]);
    let mut step = |number| {
        optimizer.backward(&loss(&[(&good, &[1.0]), (&bad, &[number])]), Outputs::default()).unwrap();
        optimizer.step(0.1).map(|report| report.not_finite)
    };
    let in_a_row = settings().max_skipped_steps;
    for _ in 1..in_a_row {
        assert_eq!(step(f32::NAN).unwrap().as_deref(), Some("that of \"bad\""));
    }
    // One that is finite starts the count anew.
    assert_eq!(step(1.0).unwrap(), None);
    for _ in 1..in_a_row {
        assert!(step(f32::INFINITY).unwrap().is_some());
    }
    let error = step(f32::NAN).unwrap_err().to_string();
    assert!(error.contains("3 steps in a row are not finite, in the last one that of \"bad\""), "{error}");
    assert!(values(&bad)[0] > 2.8);
}

#[test]
fn the_order_in_which_parameters_are_given_does_not_matter_to_a_bit() {
    let step = |reverse: bool| {
        let variables: Vec<Var> = (0..5).map(|index| variable(&[index as f32 * 0.37, 1.0], &[2])).collect();
        let mut named: Vec<adapter::Parameter> = (variables.iter().enumerate())
            .map(|(index, variable)| adapter::Parameter::new(index.to_string(), variable))
            .collect();
        if reverse {
            named.reverse();
        }
        let mut optimizer = Optimizer::new(named, &settings()).unwrap();
        let numbers: Vec<[f32; 2]> = (0..5).map(|index| [0.1f32.powi(index), 1.7 * index as f32]).collect();
        let of: Vec<(&Var, &[f32])> = variables.iter().zip(&numbers).map(|(v, numbers)| (v, &numbers[..])).collect();
        optimizer.backward(&loss(&of), Outputs::default()).unwrap();
        (optimizer.step(0.1).unwrap(), variables.iter().map(values).collect::<Vec<_>>())
    };
    assert_eq!(step(false), step(true));
}

#[test]
fn a_parameter_with_a_scale_has_its_own_learning_rate() {
    let (plain, scaled) = (variable(&[1.0], &[1, 1]), variable(&[1.0], &[1, 1]));
    let faster = adapter::Parameter { learning_rate_scale: 3.0, ..adapter::Parameter::new("scaled", &scaled) };
    let mut settings = settings();
    settings.weight_decay = 0.0;
    let mut both = Optimizer::new(vec![adapter::Parameter::new("plain", &plain), faster], &settings).unwrap();
    both.backward(&loss(&[(&plain, &[0.5]), (&scaled, &[0.5])]), Outputs::default()).unwrap();
    both.step(0.1).unwrap();
    assert!((3.0 * (1.0 - values(&plain)[0]) - (1.0 - values(&scaled)[0])).abs() < 1e-6);
}

#[test]
fn moments_that_are_saved_and_restored_go_on_as_if_nothing_had_been() {
    let folder = tempfile::tempdir().unwrap();
    let steps = |restored: bool| {
        let weight = variable(&[0.5, -1.0], &[1, 2]);
        let mut optimizer = optimizer(&[("weight", &weight)]);
        for (step, gradient) in [[0.1f32, 0.2], [-0.3, 0.1], [0.2, 0.2]].iter().enumerate() {
            if restored && step == 2 {
                optimizer.save(folder.path()).unwrap();
                optimizer = super::tests::optimizer(&[("weight", &weight)]);
                optimizer.restore(folder.path()).unwrap();
            }
            optimizer.backward(&loss(&[(&weight, gradient)]), Outputs::default()).unwrap();
            optimizer.step(0.1).unwrap();
        }
        values(&weight)
    };
    assert_eq!(steps(true), steps(false));
    let other = variable(&[1.0], &[1]);
    let error = optimizer(&[("other", &other)]).restore(folder.path()).unwrap_err().to_string();
    assert!(error.contains("holds nothing of \"other\""), "{error}");
}

#[test]
fn nothing_to_train_or_two_of_one_name_is_an_error() {
    assert!(Optimizer::new(Vec::new(), &settings()).is_err());
    let weight = variable(&[1.0], &[1]);
    let twice = vec![adapter::Parameter::new("w", &weight), adapter::Parameter::new("w", &weight)];
    assert!(Optimizer::new(twice, &settings()).unwrap_err().to_string().contains("name w"));
}
