//! How a program's settings are read, and the groups of settings that programs share.
//!
//! A program's settings are one plain struct that derives [`clap::Parser`] and serde's `Serialize` and `Deserialize`: the
//! same struct is the command line, the TOML file given by `--settings`, and the record written into the run's folder. The
//! keys of the file are the names of the flags, with `-` or `_`. What the user gives on the command line wins over the
//! file, and the file wins over the defaults. The file's values become arguments placed before the user's own, so that clap checks
//! both alike; what it finds wrong in the file is reported with the file and the key. A flag that was given and that the chosen
//! mode does not read is refused ([`Flags`]); a value of the file that is what it would be without the file is no such flag, as a
//! recorded file holds every default.
//!
//! ```
//! use clap::Parser;
//! use rlhf::settings::{self, CommonSettings, Flags, Program, TrainingSettings};
//!
//! /// Fine-tunes a model.
//! #[derive(Debug, Clone, Parser, serde::Serialize, serde::Deserialize)]
//! #[command(name = "tune")]
//! struct Tune {
//!     #[command(flatten)]
//!     #[serde(flatten)]
//!     common: CommonSettings,
//!     #[command(flatten)]
//!     #[serde(flatten)]
//!     training: TrainingSettings,
//! }
//!
//! impl Program for Tune {
//!     fn flags() -> Flags<Self> {
//!         let training = TrainingSettings::flags().never(&["pooling", "probe_hidden_size"]);
//!         Flags::new()
//!             .of(|tune: &Self| &tune.common, CommonSettings::flags())
//!             .of(|tune: &Self| &tune.training, training)
//!     }
//! }
//!
//! let tune: Tune = settings::from_arguments(["--output", "runs/tune", "--method", "lora"])?;
//! assert_eq!(tune.training.learning_rate(1e-5), 1e-4);
//! assert_eq!(settings::command_line(&tune)?, "tune --output runs/tune --method lora");
//! let unread = settings::from_arguments::<Tune>(["--output", "runs/tune", "--lora-r", "4"]).unwrap_err().to_string();
//! assert_eq!(unread, "--lora-r has no effect here: it is read only with --method lora; leave it out");
//! # Ok::<(), rlhf::Error>(())
//! ```

mod file;
mod flags;
mod groups;
mod methods;
mod named;
mod pipeline;
pub mod short_help;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgMatches, Parser};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::say;

pub use flags::{Flags, Program};
pub use groups::{
    BasePrecision, CheckpointSettings, CommonSettings, ElementType, EpsilonPlace, ExampleSettings,
    GradientCheckpointing, Interval, ModelSettings, OptimizerSettings, Precision, SHUFFLE_WINDOW, ScheduleShape,
    TrainingSettings, at_least_one, below_one, learning_rate_help, not_negative, ratio,
};
pub use methods::{
    BiasGroup, BottleneckSettings, LoraBias, LoraInit, LoraSettings, Method, MethodSettings, Methods, Pattern,
    Placement, Pooling, ProbeSettings, PromptEncoder, PromptInit, PromptSettings,
};
pub use named::{NamedFolder, UserSettings};
pub use pipeline::PipelineSettings;
pub use short_help::{Section, ShortFlag};

/// What a command line asks of the process itself, next to the program's settings.
pub(crate) struct Given<S> {
    /// The settings.
    pub settings: S,
    /// `--threads`.
    pub threads: Option<usize>,
    /// `--precision`, where the program has it.
    pub precision: Option<Precision>,
    /// `--quiet`, where the program has it.
    pub is_quiet: bool,
}

/// Reads a command line, whose first word is what the program is called. A usage error, `--help` and `--version` end
/// the process as clap does.
pub(crate) fn given<S: Program>(arguments: Vec<OsString>) -> Result<Given<S>> {
    let called =
        arguments.first().map(|name| Path::new(name).file_name().unwrap_or(name).to_string_lossy().into_owned());
    if short_help::is_asked(&arguments)
        && let Some(screen) = short_help::short_help::<S>(&called.unwrap_or_default())
    {
        say!("{}", screen.trim_end());
        std::process::exit(0);
    }
    let resolved = resolve::<S>(arguments)?.unwrap_or_else(|error| error.exit());
    let matches = &resolved.matches;
    Ok(Given {
        settings: resolved.checked()?,
        threads: matches.try_get_one::<usize>("threads").ok().flatten().copied(),
        precision: matches.try_get_one::<Precision>("precision").ok().flatten().copied(),
        is_quiet: matches!(matches.try_get_one::<bool>("quiet"), Ok(Some(true))),
    })
}

/// The settings given on this process's command line. A usage error, `--help` and `--version` end the process as clap does.
pub fn parse<S: Program>() -> Result<S> {
    Ok(given(std::env::args_os().collect())?.settings)
}

/// The settings given by `arguments`, without the program's name: how one program prepares the settings of another.
pub fn from_arguments<S: Program>(arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Result<S> {
    resolved_from::<S>(arguments)?.checked()
}

/// The same with flags that have no effect.
fn resolved_from<S: Parser>(arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Resolved> {
    let name = OsString::from(S::command().get_name());
    let arguments = std::iter::once(name).chain(arguments.into_iter().map(Into::into)).collect();
    resolve::<S>(arguments)?.map_err(|error| Error::input(file::first_paragraph(&error)))
}

/// Writes the settings, defaults and all, as TOML that `--settings` reads again.
pub fn save(settings: &impl Serialize, path: impl AsRef<Path>) -> Result<()> {
    let text =
        toml::to_string(settings).map_err(|error| Error::input(format!("{}: {error}", path.as_ref().display())))?;
    write_atomically(path, |file| std::io::Write::write_all(file, text.as_bytes()))
}

/// The settings by their names, as they are written.
pub fn table(settings: &impl Serialize) -> Result<toml::Table> {
    toml::Table::try_from(settings).map_err(|error| Error::input(format!("settings cannot be written: {error}")))
}

/// The command that runs the program with these settings: every flag whose value is not the default.
pub fn command_line<S: Parser + Serialize>(settings: &S) -> Result<String> {
    let mut command = S::command();
    command.build();
    let table = table(settings)?;
    let mut flags = Vec::new();
    for (key, value) in &table {
        let argument = file::find(&command, key)
            .ok_or_else(|| Error::input(format!("setting `{key}` belongs to no flag of {}", command.get_name())))?;
        let arguments =
            file::arguments(argument, value).map_err(|reason| Error::input(format!("`{key}`: {reason}")))?;
        flags.push((argument.get_id().as_str(), arguments));
    }
    // In the order of the help text, so that the command reads as the documentation does.
    let order: Vec<&str> = command.get_arguments().map(|argument| argument.get_id().as_str()).collect();
    flags.sort_by_key(|(id, _)| order.iter().position(|other| other == id));
    // A flag is needless if the settings are the same without it; leaving out one may make another needed, so in turn.
    let mut index = 0;
    while index < flags.len() {
        let others = flags.iter().enumerate().filter(|&(other, _)| other != index).flat_map(|(_, flag)| &flag.1);
        match resolved_from::<S>(others).and_then(|resolved| resolved.settings::<S>()) {
            Ok(without) if self::table(&without)? == table => drop(flags.remove(index)),
            _ => index += 1,
        }
    }
    let words = flags.iter().flat_map(|(_, arguments)| arguments).flat_map(|argument| match argument.split_once('=') {
        Some((flag, value)) => vec![flag.to_string(), quote(value)],
        None => vec![argument.clone()],
    });
    Ok(std::iter::once(command.get_name().to_string()).chain(words).collect::<Vec<_>>().join(" "))
}

/// A word as a POSIX shell reads it back.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_string()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Sets the number of threads of this process's parallel operations (as many as the machine has cores, or as
/// `RAYON_NUM_THREADS` says, where none is given), of which this thread is one; can be done once, before the
/// first of them.
///
/// An operation that begins on a thread outside of the pool has to wake one inside, and to be woken at its end: a
/// fifth of the time of sampling one answer from a model of 135 M parameters, some hundredths of that of training
/// one of 1 M. What other threads give to the pool is done by its other threads, or while this one waits for its
/// own operations, so this thread must not wait for such work otherwise where it is the only one.
pub fn use_threads(threads: Option<usize>) -> Result<()> {
    rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).use_current_thread().build_global().map_err(
        |error| {
            let given = threads.map_or("one per core".to_string(), |threads| threads.to_string());
            Error::input(format!("--threads {given}: the threads cannot be started: {error}; give fewer"))
        },
    )
}

/// What clap makes of the user's arguments with those of the settings file before them.
struct Resolved {
    matches: ArgMatches,
    /// The user's, the program's name first.
    user: Vec<OsString>,
    file: Option<SettingsFile>,
}

/// The keys of a settings file that the user's flags do not win over.
struct SettingsFile {
    path: PathBuf,
    keys: Vec<file::Key>,
}

/// Resolves the user's arguments (the first is the program's name). The outer error is one of the settings file, the inner one of the command line.
fn resolve<S: Parser>(arguments: Vec<OsString>) -> Result<Result<Resolved, clap::Error>> {
    // What the user gave can be read only with nothing required: the rest may be in the file.
    let lenient = S::command().mut_args(|argument| argument.required(false));
    let mut command = S::command();
    let alone = |mut command: clap::Command, user: Vec<OsString>| {
        command.try_get_matches_from_mut(&user).map(|matches| Resolved { matches, user, file: None })
    };
    let Ok(given) = lenient.try_get_matches_from(&arguments) else {
        // `--help` or a fault, which clap words better when it knows what is required.
        return Ok(alone(command, arguments));
    };
    let Ok(Some(path)) = given.try_get_one::<PathBuf>("settings") else {
        return Ok(alone(command, arguments));
    };
    let by_user = |id: &str| given.value_source(id) == Some(ValueSource::CommandLine);
    let file = SettingsFile { path: path.clone(), keys: file::read(&command, path, by_user)? };
    let matches = command.try_get_matches_from_mut(with_keys(&arguments, &file.keys, |_| true));
    Ok(matches.map(|matches| Resolved { matches, user: arguments, file: Some(file) }))
}

/// The user's arguments, after the program's name those of the keys that are wanted.
fn with_keys(user: &[OsString], keys: &[file::Key], is_wanted: impl Fn(&file::Key) -> bool) -> Vec<OsString> {
    let of_file = keys.iter().filter(|key| is_wanted(key)).flat_map(|key| &key.arguments).map(OsString::from);
    user.iter().take(1).cloned().chain(of_file).chain(user.iter().skip(1).cloned()).collect()
}

impl Resolved {
    fn settings<S: Parser>(&self) -> Result<S> {
        S::from_arg_matches(&self.matches).map_err(|error| Error::input(file::first_paragraph(&error)))
    }

    /// The settings, of which nothing that was given is without effect.
    fn checked<S: Program>(&self) -> Result<S> {
        let settings = self.settings()?;
        flags::check(&settings, &S::command(), |id| self.given::<S>(id))?;
        Ok(settings)
    }

    /// Where a flag was given, if it was: in the file it is only where the value would be another without the key.
    fn given<S: Parser>(&self, id: &str) -> Option<flags::Source<'_>> {
        if !matches!(self.matches.try_contains_id(id), Ok(true))
            || self.matches.value_source(id) != Some(ValueSource::CommandLine)
        {
            return None;
        }
        let Some(file) = &self.file else { return Some(flags::Source::User) };
        let Some(key) = file.keys.iter().find(|key| key.id == id) else { return Some(flags::Source::User) };
        let others = with_keys(&self.user, &file.keys, |other| other.id != id);
        let without = S::command().try_get_matches_from(others).ok();
        let is_same = without.is_some_and(|without| are_equal(values(&without, id), values(&self.matches, id)));
        (!is_same).then_some(flags::Source::File { path: &file.path, key: &key.name })
    }
}

/// The values of an argument as they were written.
fn values(matches: &ArgMatches, id: &str) -> Vec<String> {
    let raw = matches.try_get_raw(id).ok().flatten();
    raw.map_or_else(Vec::new, |values| values.map(|value| value.to_string_lossy().into_owned()).collect())
}

/// Whether values are the same, numbers in any form.
fn are_equal(one: Vec<String>, other: Vec<String>) -> bool {
    let is_same = |(one, other): (&String, &String)| {
        one == other || one.parse::<f64>().is_ok_and(|one| other.parse::<f64>() == Ok(one))
    };
    one.len() == other.len() && one.iter().zip(&other).all(is_same)
}

/// What the tests of this crate share.
#[cfg(test)]
pub(crate) mod testing {
    use super::{Flags, Program, TrainingSettings};

    /// The settings of a training alone.
    #[derive(clap::Parser, serde::Serialize)]
    pub struct OnlyTraining {
        /// The settings.
        #[command(flatten)]
        pub training: TrainingSettings,
    }

    impl Program for OnlyTraining {
        fn flags() -> Flags<Self> {
            // No program: every flag is taken.
            Flags::new()
        }
    }
}

#[cfg(test)]
mod tests;
