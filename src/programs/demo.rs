//! The demonstration: `sft`, `reward`, `ppo` and `evaluate` in order, on the data that ships with the project.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use crate::error::Result;
use crate::evaluate::{self, EvaluateSettings};
use crate::ppo::settings::PpoSettings;
use crate::reward::RewardSettings;
use crate::say;
use crate::settings::{PipelineSettings, Precision, Program, command_line, from_arguments};
use crate::sft::SftSettings;

/// The arguments of a stage.
struct Arguments(Vec<String>);

impl Arguments {
    fn flag(mut self, name: &str, value: impl ToString) -> Self {
        self.0.push(format!("--{name}={}", value.to_string()));
        self
    }

    fn path(self, name: &str, value: &Path) -> Self {
        self.flag(name, value.display())
    }
}

/// Runs the four stages.
pub(super) fn run(settings: &PipelineSettings) -> Result<()> {
    let started = Instant::now();
    let base = settings.data.join("base");
    let [sft, reward, ppo, evaluation] =
        ["sft", "reward", "ppo", "evaluation"].map(|stage| settings.output.join(stage));
    let file = |name: &str| settings.data.join(name);
    let stage = |output: &Path| {
        let arguments =
            Arguments(Vec::new()).path("output", output).flag("seed", settings.seed).flag("max-length", 256);
        let arguments = match settings.precision {
            Precision::F32 => arguments,
            Precision::Bf16 => arguments.flag("precision", "bf16"),
        };
        settings.threads.iter().fold(arguments, |arguments, threads| arguments.flag("threads", threads))
    };
    let training = |output: &Path, full: f64| {
        let learning_rate = settings.method.learning_rate(full);
        let arguments =
            stage(output).flag("method", &settings.method).flag("learning-rate", format!("{learning_rate:.1e}"));
        if settings.resume { arguments.flag("resume", "auto") } else { arguments }
    };

    let arguments = training(&sft, 5e-4)
        .path("model", &base)
        .path("data", &file("demonstrations.parquet"))
        .path("evaluation-data", &file("demonstrations-test.parquet"))
        .flag("batch-size", 16)
        .flag("epochs", 3);
    let stage_settings: SftSettings = announce(1, "supervised fine-tuning", arguments)?;
    crate::sft::run(&stage_settings)?;

    let arguments = training(&reward, 1e-3)
        .path("model", &sft)
        .path("data", &file("rankings.parquet"))
        .path("evaluation-data", &file("rankings-test.parquet"))
        .path("demonstrations", &file("demonstrations.parquet"));
    let stage_settings: RewardSettings = announce(2, "reward model", arguments)?;
    crate::reward::run(&stage_settings)?;

    let arguments = training(&ppo, 1e-4)
        .path("model", &sft)
        .path("reward-model", &reward)
        .path("data", &file("prompts.parquet"))
        .flag("batch-size", 128)
        .flag("max-steps", 46)
        .flag("ppo-epochs", 2)
        .flag("response-length", 40);
    let stage_settings: PpoSettings = announce(3, "proximal policy optimisation", arguments)?;
    crate::ppo::run(&stage_settings)?;

    let arguments = stage(&evaluation)
        .flag("models", format!("base={}", base.display()))
        .flag("models", format!("sft={}", sft.display()))
        .flag("models", format!("ppo={}", ppo.display()))
        .path("reward-model", &reward)
        .path("data", &file("evaluation.parquet"))
        .flag("response-length", 40);
    let stage_settings: EvaluateSettings = announce(4, "evaluation", arguments)?;
    evaluate::run(&stage_settings)?;

    say!("aligned model      {}", ppo.display());
    say!("reward model       {}", reward.display());
    say!("supervised model   {}", sft.display());
    say!("everything else    {}", settings.output.display());
    say!("took {:.0} seconds", started.elapsed().as_secs_f64());
    Ok(())
}

/// Prints the stage's title and the command that runs it alone, and gives its settings.
fn announce<S: Program + Serialize>(number: usize, title: &str, arguments: Arguments) -> Result<S> {
    let settings: S = from_arguments(arguments.0)?;
    let command = command_line(&settings)?;
    say!("\n{number}. {title}\n   rlhf {command}\n");
    Ok(settings)
}
