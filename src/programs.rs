//! The programs by their names. Each is a subcommand of `rlhf` and a program of `stages/`.

mod demo;
mod overview;
mod world;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Command, CommandFactory};

use crate::error::Result;
use crate::evaluate::EvaluateSettings;
use crate::export::ExportSettings;
use crate::ppo::settings::PpoSettings;
use crate::reward::RewardSettings;
use crate::sample::SampleSettings;
use crate::score::ScoreSettings;
use crate::settings::short_help::short_help;
use crate::settings::{PipelineSettings, Program, given, use_threads};
use crate::sft::SftSettings;
use crate::world::settings::WorldSettings;
use crate::{evaluate, export, ppo, reward, sample, score, sft};

/// A program.
pub struct Entry {
    /// What it is called.
    pub name: &'static str,
    /// What it does, in a few words.
    pub summary: &'static str,
    /// Its flags.
    pub command: fn() -> Command,
    /// Its flags on one screen, under what it is called.
    pub screen: fn(&str) -> Option<String>,
    run: fn(Vec<OsString>) -> ExitCode,
}

/// An entry by name, summary, settings and main function.
macro_rules! entry {
    ($name:literal, $summary:literal, $settings:ty, $main:expr) => {
        Entry {
            name: $name,
            summary: $summary,
            command: <$settings as CommandFactory>::command,
            screen: short_help::<$settings>,
            run: |arguments| run::<$settings>(arguments, $main),
        }
    };
}

/// The demonstration, which has a name of its own in `stages/`.
const DEMO: &str = "demo";
const PIPELINE: &str = "pipeline";

/// All programs, in the order in which people meet them.
pub const ALL: [Entry; 9] = [
    entry!("demo", "Align the small model that ships with rlhf; show what that did", PipelineSettings, demo::run),
    entry!("sft", "Fine-tune on demonstrations, labelled texts, or preferences (DPO)", SftSettings, |settings| {
        sft::run(settings).map(drop)
    }),
    entry!("reward", "Train a reward model on ranked answers", RewardSettings, |settings| {
        reward::run(settings).map(drop)
    }),
    entry!("ppo", "Optimise a model against rewards by PPO, RLOO or GRPO", PpoSettings, ppo::run),
    entry!("sample", "Write answers to prompts", SampleSettings, |settings| sample::run(settings).map(drop)),
    entry!("score", "Score answers, or keep the best of several", ScoreSettings, |settings| {
        score::run(settings).map(drop)
    }),
    entry!("evaluate", "Measure toxicity, hallucination and preference", EvaluateSettings, |settings| {
        evaluate::run(settings).map(drop)
    }),
    entry!("export", "Merge an adapter into its base model", ExportSettings, |settings| {
        export::run(settings).map(drop)
    }),
    entry!("world", "Generate the data of the demonstration", WorldSettings, world::run),
];

/// The program of this name; the demonstration is `pipeline` too.
fn find(name: &str) -> Option<&'static Entry> {
    let name = if name == PIPELINE { DEMO } else { name };
    ALL.iter().find(|entry| entry.name == name)
}

/// Runs a program of `stages/` with this process's command line.
///
/// # Panics
/// Where there is no program of this name.
pub fn main_of(name: &str) -> ExitCode {
    let entry = find(name).unwrap_or_else(|| panic!("no program {name}"));
    (entry.run)(std::env::args_os().collect())
}

/// Runs `rlhf` with a command line: the subcommand that it names, or what there is to choose from.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let name = arguments.get(1).map(|name| name.to_string_lossy().into_owned());
    match name.as_deref().map(|name| (name, find(name))) {
        Some((_, Some(entry))) => {
            let called = OsString::from(format!("rlhf {}", entry.name));
            (entry.run)(std::iter::once(called).chain(arguments.into_iter().skip(2)).collect())
        }
        other => overview::main(other.map(|(name, _)| name), &arguments),
    }
}

/// Runs a program: reads its settings, sets the number of threads and the precision, calls `main`, and turns
/// an error into a sentence on the standard error stream and its exit code ([`crate::error`]).
fn run<S: Program>(arguments: Vec<OsString>, main: impl FnOnce(&S) -> Result<()>) -> ExitCode {
    crate::ops::memory::keep_freed_memory();
    crate::ops::threads::leave_threads_to_rayon();
    ended(|| {
        let given = given::<S>(arguments)?;
        use_threads(given.threads)?;
        given.precision.map_or(Ok(()), |precision| precision.set())?;
        if given.is_quiet {
            crate::remote::hub::be_quiet();
        }
        main(&given.settings)?;
        if !given.is_quiet {
            crate::data::notes::print();
        }
        Ok(())
    })
}

/// The exit code of what a program does; an error is printed.
fn ended(program: impl FnOnce() -> Result<()>) -> ExitCode {
    match program() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// The allocator of the programs.
#[doc(hidden)]
pub use mimalloc::MiMalloc;

/// Lets a program allocate as all programs of this project do.
#[macro_export]
macro_rules! use_allocator {
    () => {
        #[global_allocator]
        static ALLOCATOR: $crate::programs::MiMalloc = $crate::programs::MiMalloc;
    };
}

/// The whole of a program of `stages/`.
#[macro_export]
macro_rules! program {
    ($name:literal) => {
        $crate::use_allocator!();

        fn main() -> std::process::ExitCode {
            $crate::programs::main_of($name)
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_help_of_every_program_is_one_screen_of_flags_that_it_has() {
        for entry in &ALL {
            let Some(screen) = (entry.screen)(&format!("rlhf {}", entry.name)) else {
                // So few flags that all of them fit.
                assert!((entry.command)().get_arguments().count() <= 10, "{}", entry.name);
                continue;
            };
            assert!(screen.lines().count() <= 40, "{}: {} lines", entry.name, screen.lines().count());
            assert!(screen.lines().all(|line| line.chars().count() <= 80), "{screen}");
        }
    }

    #[test]
    fn every_program_is_found_by_its_name() {
        for entry in &ALL {
            assert!(find(entry.name).is_some_and(|found| std::ptr::eq(found, entry) || found.name == entry.name));
            assert_eq!((entry.command)().get_name(), if entry.name == DEMO { PIPELINE } else { entry.name });
        }
        assert_eq!(find(PIPELINE).map(|entry| entry.name), Some(DEMO));
        assert!(find("train").is_none());
    }
}
