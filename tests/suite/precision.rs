//! Products in bf16: how far they are from f32, and that a run names how it makes them and keeps to it.

use candle_core::{Device, Tensor};
use rlhf::Result;
use rlhf::adapt::Head;
use rlhf::data::batch::Batch;
use rlhf::model::Model;
use rlhf::model::adapter::{Parameter, Pass};
use rlhf::ops::precision::Kernel;
use rlhf::ops::{Arithmetic, Outputs};

use crate::golden::FAMILIES;
use crate::methods::ADAPTERS;
use crate::oracle::{Tensors, as_ours, documents, expected, floats, folder, load, logits};
use crate::workbench::Workbench;

/// Every kernel that this processor can run.
fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.into_iter().filter(|kernel| kernel.is_available())
}

/// The loss of documents, and its gradients by parameter.
fn step(model: &Model, batch: &Batch) -> Result<(f32, Vec<(String, Tensor)>)> {
    let hidden = model.hidden(batch, &Pass::default())?;
    let mut outputs = Outputs::default();
    let log_probs = outputs.tensor(&model.log_probs(&hidden, batch, 1.0)?.log_probs)?;
    let loss = log_probs.mean_all()?.neg()?;
    let gradients = outputs.gradients(&loss)?;
    let of = |Parameter { name, variable, .. }: Parameter| -> Result<(String, Tensor)> {
        Ok((name, gradients.get(&variable).expect("a gradient").to_tensor()?))
    };
    Ok((loss.to_scalar()?, model.trainable_parameters().into_iter().map(of).collect::<Result<_>>()?))
}

fn norm(x: &Tensor) -> Result<f32> {
    Ok(x.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt())
}

/// The size of the difference, relative to what is expected.
fn error(found: &Tensor, expected: &Tensor) -> Result<f32> {
    Ok(norm(&(found - expected)?)? / norm(expected)?)
}

/// PyTorch's gradients, in the order and the shapes of what was found.
fn gradients_of(name: &str, tensors: &Tensors, found: &[(String, Tensor)]) -> Result<Vec<Tensor>> {
    let of = |(parameter, gradient): &(String, Tensor)| -> Result<Tensor> {
        let key = parameter.trim_start_matches("prompt_encoder.");
        let wanted = tensors.get(&format!("grad.{key}")).unwrap_or_else(|| panic!("{name}: {key} is not trained"));
        as_ours(key, wanted)?.reshape(gradient.dims()).map_err(Into::into)
    };
    found.iter().map(of).collect()
}

/// The error of every gradient relative to its size, or to a hundredth of all gradients' size where it is
/// smaller, the largest; and that of all of them.
fn errors(found: &[(String, Tensor)], wanted: &[Tensor]) -> Result<(f32, f32)> {
    let all = |sizes: &[f32]| sizes.iter().map(|size| size.powi(2)).sum::<f32>().sqrt();
    let sizes = wanted.iter().map(norm).collect::<Result<Vec<f32>>>()?;
    let differences = found.iter().zip(wanted).map(|((_, found), wanted)| norm(&(found - wanted)?));
    let differences = differences.collect::<Result<Vec<f32>>>()?;
    let least = 0.01 * all(&sizes);
    let largest = differences.iter().zip(&sizes).map(|(difference, size)| difference / size.max(least));
    Ok((largest.fold(0.0, f32::max), all(&differences) / all(&sizes)))
}

/// Every family and every method's adapter, against PyTorch's numbers in f32. A product has an error of 2.4e-3,
/// and a gradient comes through some ten of them, in models of two layers with random weights.
#[test]
fn golden_files_hold_in_bf16_with_every_kernel() -> Result<()> {
    let families = FAMILIES.into_iter().map(|name| (name, "full"));
    for (name, method) in families.chain(ADAPTERS) {
        let tensors = expected(name)?;
        let model = load(&folder(name), Some(&["--method", method]), Head::Language)?;
        let batch = Batch::pack(&documents(&tensors)?);
        // A neuron that turns off or on for one of these few tokens changes its whole gradient.
        let has_relu = name.starts_with("adapter-pfeiffer") || name.starts_with("adapter-parallel");
        let (of_each, of_all) = if has_relu { (0.4, 0.25) } else { (0.15, 0.1) };
        for kernel in kernels() {
            let what = format!("{name}, {kernel:?}");
            let (found, (loss, gradients)) = Arithmetic::Bf16(kernel)
                .within(|| -> Result<_> { Ok((logits(&model, &batch)?, step(&model, &batch)?)) })?;
            assert!(found != logits(&model, &batch)?, "{what}: as in f32");
            let wanted = Tensor::new(floats(&tensors, "logits")?, &Device::Cpu)?;
            let error = error(&Tensor::new(found, &Device::Cpu)?, &wanted)?;
            assert!(error < 0.02, "{what}: logits, error {error}");
            let wanted = floats(&tensors, "loss")?[0];
            assert!((loss - wanted).abs() < 3e-3 * wanted, "{what}: loss {loss}, expected {wanted}");
            let (largest, all) = errors(&gradients, &gradients_of(name, &tensors, &gradients)?)?;
            assert!(largest < of_each && all < of_all, "{what}: gradients, error {largest}, of all {all}");
        }
    }
    Ok(())
}

#[test]
fn a_training_step_in_bf16_is_near_that_in_f32_with_every_kernel() -> Result<()> {
    for name in ["llama", "gpt2", "gemma2", "qwen3"] {
        for method in ["full", "lora"] {
            let model = load(&folder(name), Some(&["--method", method]), Head::Language)?;
            let batch = Batch::pack(&documents(&expected(name)?)?);
            let (loss, gradients) = step(&model, &batch)?;
            for kernel in kernels() {
                let (found, found_gradients) = Arithmetic::Bf16(kernel).within(|| step(&model, &batch))?;
                assert!(found != loss && (found - loss).abs() < 1e-2 * loss, "{name}, {kernel:?}: {found}, f32 {loss}");
                for ((parameter, expected), (_, found)) in gradients.iter().zip(&found_gradients) {
                    // Of a new LoRA, B is 0 and the gradient of A with it.
                    if expected.abs()?.max_all()?.to_scalar::<f32>()? < 1e-6 {
                        continue;
                    }
                    let error = error(found, expected)?;
                    assert!(error < LARGEST_ERROR, "{name}, {kernel:?}, gradient of {parameter}: {error}");
                }
            }
        }
    }
    Ok(())
}

/// Each product has an error of 2.4e-3; a gradient comes through some ten of them, in models of two layers with
/// random weights.
const LARGEST_ERROR: f32 = 0.05;

#[test]
fn a_run_names_its_products_and_keeps_to_its_precision() {
    let bench = Workbench::new();
    let line = "sft --model model --data demonstrations.parquet --evaluation-share 0 --epochs 4 --batch-size 4 --checkpoint-every 1 --output run";
    let said = |line: &str, kernel: &str| {
        let output = bench.command(line).env("RLHF_KERNEL", kernel).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let bf16 = format!("{line} --precision bf16");
    let (code, plan) = said(&format!("{bf16} --max-steps 3"), "widened");
    assert_eq!(code, Some(0), "{plan}");
    assert!(plan.contains("products") && plan.contains("bf16 (rounded, multiplied in f32)"), "{plan}");
    let finished = String::from_utf8(bench.bytes("run/finished.json")).unwrap();
    assert!(finished.contains("bf16 (rounded, multiplied in f32)"), "{finished}");
    // Another precision is refused, another kernel is said.
    let (code, fault) = said(&format!("{line} --max-steps 6 --resume"), "widened");
    assert_eq!(code, Some(2));
    assert!(fault.contains("--precision: was \"bf16\" when the run began, now it is \"f32\""), "{fault}");
    let (code, other) = said(&format!("{bf16} --max-steps 6 --resume --quiet"), "scalar");
    assert_eq!(code, Some(0), "{other}");
    let warnings = String::from_utf8(bench.bytes("run/warnings.txt")).unwrap();
    let expected =
        "products are now made in bf16 (tiles in plain code) and were made in bf16 (rounded, multiplied in f32)";
    assert!(warnings.contains(expected), "{warnings}");
    // A kernel that is not one.
    let (code, fault) = said(&bf16, "cuda");
    assert_eq!(code, Some(2));
    assert!(
        fault.contains("RLHF_KERNEL: there is no kernel cuda; expected one of amx, avx512, widened, scalar"),
        "{fault}"
    );
}
