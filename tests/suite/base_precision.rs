//! Bases whose matrices are kept in fewer bytes than f32: what is computed with them is what the same numbers
//! in f32 give.

use candle_core::{DType, Device, Tensor};
use rlhf::Result;
use rlhf::adapt::{Bases, Head, Role, Training};
use rlhf::ops::BaseForm;
use rlhf::settings::BasePrecision;

use crate::workbench::Workbench;

const SFT: &str =
    "sft --data demonstrations.parquet --evaluation-share 0 --epochs 1 --batch-size 4 --max-steps 2 --quiet";

/// A bench with a base in bf16, `base`, and what it is when it is quantised, in f32, `widened-q8_0` and so on.
fn bench() -> Workbench {
    let bench = Workbench::new();
    bench.succeed(&format!("{SFT} --method full --model model --save-dtype bf16 --output base"));
    for precision in [BasePrecision::Q8_0, BasePrecision::Q4K] {
        widen(&bench, precision).unwrap();
    }
    bench
}

fn name(precision: BasePrecision) -> &'static str {
    match precision {
        BasePrecision::Stored => "stored",
        BasePrecision::F32 => "f32",
        BasePrecision::Q8_0 => "q8_0",
        BasePrecision::Q4K => "q4_k",
    }
}

fn widen(bench: &Workbench, precision: BasePrecision) -> Result<()> {
    let (base, folder) = (bench.path("base"), bench.path(&format!("widened-{}", name(precision))));
    let role = Role { folder: &base, adapters: &[], training: Training::Frozen, head: Head::Language, seed: 0 };
    let model = Bases::new(Device::Cpu).keeping(precision.form()).load(&role)?;
    let forms: Vec<String> = model.weights().forms().into_iter().map(|(form, _)| form).collect();
    // Rows of 32 do not divide into blocks of 256, and those of 48 into none.
    let expected = if precision == BasePrecision::Q8_0 { ["q8_0", "bf16", "f32"] } else { ["q5_0", "q8_0", "bf16"] };
    assert!(expected.iter().all(|form| forms.iter().any(|found| found == form)), "{forms:?}");
    std::fs::create_dir_all(&folder).unwrap();
    model.stored_as(DType::F32).save(&folder)
}

const METHODS: [&str; 11] = [
    "lora",
    "lora --use-dora",
    "lora --init-lora-weights pissa",
    "lora --target-modules q_proj,embed_tokens,lm_head",
    "prefix-tuning",
    "p-tuning-v2",
    "prompt-tuning",
    "p-tuning",
    "adapters",
    "ia3",
    "bitfit",
];

#[test]
fn every_method_learns_the_same_on_the_same_numbers_however_they_are_kept() {
    let bench = bench();
    for (index, method) in METHODS.iter().enumerate() {
        let learned = |model: &str, precision: &str| {
            let output = format!("{index}-{model}-{precision}");
            bench.succeed(&format!(
                "{SFT} --method {method} --model {model} --base-precision {precision} --output {output}"
            ));
            let file = if *method == "adapters" { "adapter" } else { "adapter_model" };
            bench.bytes(&format!("{output}/{file}.safetensors"))
        };
        let [stored, widened] = ["stored", "f32"].map(|precision| learned("base", precision));
        assert!(stored == widened, "{method}");
        for precision in ["q8_0", "q4_k"] {
            let quantised = learned("base", precision);
            assert!(quantised != stored, "{method}: {precision} changes nothing");
            assert!(quantised == learned(&format!("widened-{precision}"), "stored"), "{method} on {precision}");
        }
    }
}

#[test]
fn an_adapter_of_a_quantised_base_fits_the_base_and_is_folded_into_what_it_was_trained_on() {
    let bench = bench();
    for (model, precision) in [("base", "q8_0"), ("widened-q8_0", "stored")] {
        bench.succeed(&format!(
            "{SFT} --method lora --learning-rate 0.05 --model {model} --base-precision {precision} --output on-{model}"
        ));
        bench.succeed(&format!(
            "export --model {model} --adapter on-{model} --base-precision {precision} --dtype f32 \
             --output merged-{model} --quiet"
        ));
    }
    let merged = |model: &str| bench.bytes(&format!("merged-{model}/model.safetensors"));
    assert!(merged("base") == merged("widened-q8_0"));
    // By its hash the adapter knows the base as it is stored.
    for precision in ["stored", "f32", "q8_0", "q4_k"] {
        bench.succeed(&format!(
            "score --model base --adapter on-base --base-precision {precision} --data demonstrations.parquet \
             --output {precision}.parquet --quiet"
        ));
    }
    let output =
        bench.run("score --model widened-q8_0 --adapter on-base --data demonstrations.parquet --output x.parquet");
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn every_stage_runs_on_a_quantised_base_and_says_so() {
    let bench = bench();
    let lora = "--method lora --base-precision q8_0 --batch-size 4";
    let output = bench.run(&format!(
        "sft --data demonstrations.parquet --evaluation-share 0 --max-steps 2 {lora} --model base --output sft"
    ));
    let plan = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && plan.contains("base kept in"), "{plan}");
    let line = plan.lines().find(|line| line.contains("base kept in")).unwrap();
    assert!(line.contains("q8_0 (") && line.contains("bf16 (") && line.contains("f32 ("), "{line}");
    bench.succeed(&format!(
        "reward --data rankings.parquet --evaluation-share 0 --max-steps 2 {lora} --model base --output reward --quiet"
    ));
    bench.succeed(
        "ppo --data prompts.parquet --model base --adapter sft --reward-model reward --method lora \
         --base-precision q8_0 --max-steps 1 --batch-size 4 --response-length 4 --output ppo --quiet",
    );
    // What trains as a whole is f32, and a run keeps to the form that it began with.
    let full = bench.run(&format!("{SFT} --method full --model base --base-precision q8_0 --output full"));
    let fault = String::from_utf8(full.stderr).unwrap();
    assert_eq!(full.status.code(), Some(2), "{fault}");
    assert!(fault.contains("--base-precision q8_0: quantised weights cannot train"), "{fault}");
    let run = format!("{SFT} --method lora --model base --checkpoint-every 1 --output run");
    bench.succeed(&format!("{run} --base-precision q8_0"));
    let other = bench.run(&format!("{run} --resume"));
    let fault = String::from_utf8(other.stderr).unwrap();
    assert!(fault.contains("--base-precision: was \"q8_0\" when the run began, now it is \"stored\""), "{fault}");
}

#[test]
fn a_base_takes_the_bytes_of_its_form() -> Result<()> {
    let bench = bench();
    let base = bench.path("base");
    let role = Role { folder: &base, adapters: &[], training: Training::Frozen, head: Head::Language, seed: 0 };
    let bytes =
        |form: BaseForm| -> Result<usize> { Ok(Bases::new(Device::Cpu).keeping(form).load(&role)?.weights().bytes()) };
    let [f32, stored, q8_0] = [BaseForm::F32, BaseForm::Stored, BasePrecision::Q8_0.form()].map(bytes);
    let (f32, stored, q8_0) = (f32?, stored?, q8_0?);
    // Five norms of 32 numbers stay f32.
    assert_eq!(stored, (f32 - 5 * 32 * 4) / 2 + 5 * 32 * 4);
    let down = 2 * 48 * 32 * 2;
    assert_eq!(q8_0, (stored - 5 * 32 * 4 - down) / 64 * 34 + 5 * 32 * 4 + down);
    Ok(())
}

#[test]
fn a_matrix_that_is_not_finite_is_refused_and_not_quantised() {
    let bench = bench();
    let path = bench.path("base/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let broken = tensors[name].to_dtype(DType::F32).unwrap();
    let nan = Tensor::new(&[[f32::NAN]], &Device::Cpu).unwrap();
    let broken = broken.slice_assign(&[2..3, 5..6], &nan).unwrap().to_dtype(DType::BF16).unwrap();
    tensors.insert(name.to_string(), broken);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    for precision in ["q8_0", "q4_k", "stored"] {
        let output = bench.run(&format!("{SFT} --method lora --model base --base-precision {precision} --output run"));
        let fault = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{precision}: {fault}");
        assert!(fault.contains(name) && fault.contains("not finite"), "{fault}");
    }
}
