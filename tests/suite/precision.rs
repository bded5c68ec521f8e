//! Products in bf16: how far they are from f32, and that a run names how it makes them and keeps to it.

use candle_core::Tensor;
use rlhf::Result;
use rlhf::adapt::Head;
use rlhf::data::batch::Batch;
use rlhf::model::Model;
use rlhf::model::adapter::{Parameter, Pass};
use rlhf::ops::precision::Kernel;
use rlhf::ops::{Arithmetic, Outputs};

use crate::oracle::{documents, expected, folder, load};
use crate::workbench::Workbench;

/// Every kernel that this processor can run.
fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.into_iter().filter(|kernel| kernel.is_available())
}

/// The loss of a model's golden documents, and its gradients by parameter.
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

/// The size of the difference, relative to what is expected.
fn error(found: &Tensor, expected: &Tensor) -> Result<f32> {
    let norm = |x: &Tensor| -> Result<f32> { Ok(x.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt()) };
    Ok(norm(&(found - expected)?)? / norm(expected)?)
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

/// Each product has an error of 2.4e-3; a gradient comes through some ten of them, in models of two layers
/// with random weights.
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
