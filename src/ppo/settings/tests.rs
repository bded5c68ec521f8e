use clap::{CommandFactory, ValueEnum};

use super::*;
use crate::settings::{command_line, from_arguments};

fn settings(arguments: &[&str]) -> Result<PpoSettings> {
    let needed = ["--model", "m", "--reward-model", "r", "--data", "d", "--output", "o"];
    from_arguments(needed.iter().chain(arguments))
}

#[test]
fn a_preset_sets_what_the_user_does_not() {
    let plain = settings(&[]).unwrap();
    assert_eq!((plain.policy.ppo_epochs, plain.kl.kl_coefficient, plain.training.batch_size), (4, 0.05, 32));
    let preset = settings(&["--preset", "instructgpt", "--kl-coefficient", "0.1"]).unwrap();
    assert_eq!((preset.policy.ppo_epochs, preset.kl.kl_coefficient, preset.training.batch_size), (1, 0.1, 512));
    assert_eq!((preset.policy.ema_decay, preset.training.optimizer.warmup_start_ratio), (0.992, 0.1));
    let shown = presets::lines(&preset);
    assert!(shown.contains(&("kl-coefficient".into(), "0.1 (given; the preset has 0.02)".into())), "{shown:?}");
    assert!(shown.contains(&("minibatches".into(), "8".into())));
    let estimator = |flags: &[&str]| settings(flags).unwrap().kl.kl_estimator;
    assert_eq!(estimator(&[]), KlEstimator::K1);
    assert_eq!(estimator(&["--kl-in", "loss"]), KlEstimator::K3);
    assert_eq!(estimator(&["--kl-in", "loss", "--kl-estimator", "k2"]), KlEstimator::K2);
    let trick = settings(&["--preset", "n-plus"]).unwrap();
    assert_eq!(trick.episode.missing_eos_score, Some(-1.0));
}

#[test]
fn every_setting_of_a_preset_is_a_flag_whose_value_it_can_be() {
    let command = PpoSettings::command();
    for preset in Preset::value_variants() {
        for (name, _) in preset.settings() {
            assert!(command.get_arguments().any(|argument| argument.get_id() == name), "{name}");
        }
        let resolved = settings(&["--preset", preset.name()]).unwrap();
        assert!(presets::lines(&resolved).iter().all(|(_, value)| !value.contains("given")), "{preset:?}");
    }
    for algorithm in Algorithm::value_variants() {
        let resolved = settings(&["--algorithm", algorithm.name()]).unwrap();
        assert_eq!(presets::lines(&resolved).len(), algorithm.settings().len());
        assert!(resolved.check().is_ok(), "{algorithm:?}");
    }
}

#[test]
fn the_command_of_a_preset_is_short_and_gives_the_same() {
    let resolved = settings(&["--preset", "trl", "--lambda", "1"]).unwrap();
    let command = command_line(&resolved).unwrap();
    assert_eq!(command, "ppo --model m --data d --reward-model r --preset trl --output o --lambda 1");
    let again: PpoSettings = from_arguments(command.split(' ').skip(1)).unwrap();
    assert_eq!(again, resolved);
}

#[test]
fn settings_that_do_not_fit_are_refused_with_a_sentence() {
    for (arguments, reason) in [
        (&["--temperature", "0"][..], "--temperature is 0"),
        (&["--answers", "3"], "--batch-size 32 counts answers"),
        (&["--algorithm", "grpo", "--answers", "1"], "--answers is 1"),
        (&["--kl-controller", "adaptive", "--kl-coefficient", "0"], "--kl-coefficient is 0"),
        (&["--kl-controller", "adaptive", "--kl-horizon", "6.4"], "give more than 6.4"),
        (&["--temperature", "1e-40"], "--temperature is 0.00000"),
    ] {
        let error = settings(arguments).unwrap().check().unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}
