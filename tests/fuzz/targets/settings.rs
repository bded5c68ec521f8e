//! A TOML file of settings, for each program in turn. What is read can be written, and is the same when it is read again.
#![no_main]

use std::sync::LazyLock;

use clap::Parser;
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use rlhf::settings;
use rlhf_fuzz::{folder, mutate, mutation, write};
use serde::Serialize;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(folder);

fn read<S: Parser + Serialize>() -> Option<S> {
    let path = FOLDER.path().join("settings.toml");
    let read: S = settings::from_arguments([std::ffi::OsString::from("--settings"), path.clone().into()]).ok()?;
    let written = |settings: &S| settings::save(settings, &path).ok().and_then(|()| std::fs::read(&path).ok());
    let first = written(&read)?;
    let arguments = [std::ffi::OsString::from("--settings"), path.clone().into()];
    let again: S = settings::from_arguments(arguments).expect("what was written is read");
    assert_eq!(first, written(&again).expect("it is written again"));
    Some(read)
}

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, mutation::text)
});

// The first byte says which program.
fuzz_target!(|data: &[u8]| {
    let Some((program, text)) = data.split_first() else { return };
    write(FOLDER.path(), "settings.toml", text);
    match program % 7 {
        0 => drop(read::<rlhf::sft::SftSettings>()),
        1 => drop(read::<rlhf::reward::RewardSettings>()),
        2 => drop(read::<rlhf::ppo::settings::PpoSettings>().map(|settings| settings.resolved().check())),
        3 => drop(read::<rlhf::sample::SampleSettings>()),
        4 => drop(read::<rlhf::score::ScoreSettings>()),
        5 => drop(read::<rlhf::evaluate::EvaluateSettings>()),
        _ => drop(read::<rlhf::export::ExportSettings>()),
    }
});
