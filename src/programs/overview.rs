//! What `rlhf` says by itself: what there is, shell completions, manual pages.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Command, CommandFactory, Parser};
use clap_complete::Shell;

use super::{ALL, ended};
use crate::bail;
use crate::error::{Error, Result};
use crate::say;

const COMPLETIONS: &str = "completions";
const MAN: &str = "man";
const HELP: &str = "help";

/// Print a script that completes the flags of rlhf on a shell's command line
#[derive(Debug, Parser)]
#[command(name = COMPLETIONS)]
struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Write manual pages, one for each command
#[derive(Debug, Parser)]
#[command(name = MAN)]
struct Man {
    /// Folder to write to, such as ~/.local/share/man/man1
    folder: PathBuf,
}

/// Runs `rlhf` where its first word names no program.
pub(super) fn main(name: Option<&str>, arguments: &[OsString]) -> ExitCode {
    let rest = || {
        let called = OsString::from(format!("rlhf {}", name.unwrap_or_default()));
        std::iter::once(called).chain(arguments.iter().skip(2).cloned())
    };
    ended(|| {
        match name {
            None | Some(HELP | "-h" | "--help") => say!("{}", overview()),
            Some("-V" | "--version") => say!("rlhf {}", env!("CARGO_PKG_VERSION")),
            Some(COMPLETIONS) => completions(Completions::parse_from(rest()).shell),
            Some(MAN) => manual(Man::parse_from(rest()).folder)?,
            Some(name) => bail!("there is no command `{name}`; {}", expected()),
        }
        Ok(())
    })
}

/// What could have been given.
fn expected() -> String {
    let names: Vec<&str> = ALL.iter().map(|entry| entry.name).chain([COMPLETIONS, MAN]).collect();
    format!("expected one of {}; `rlhf` alone says what each does", names.join(", "))
}

/// What there is and what to try first.
fn overview() -> String {
    let mut text = format!(
        "rlhf {}: align language models with human feedback\n\nUsage: rlhf COMMAND [OPTIONS]\n\nCommands:\n",
        env!("CARGO_PKG_VERSION")
    );
    let own =
        [(COMPLETIONS, "Print a script that completes commands and flags in a shell"), (MAN, "Write manual pages")];
    for (name, summary) in ALL.iter().map(|entry| (entry.name, entry.summary)).chain(own) {
        writeln!(text, "  {name:<12} {summary}").expect("a string takes every text");
    }
    text += "\nTry first:\n  rlhf demo         no other file is needed; a few minutes on two cores\n  rlhf sft -h       \
             what a command takes, on one screen; --help has all\n";
    text
}

/// All of `rlhf` as clap knows it.
fn definition() -> Command {
    let about = "Align language models with human feedback";
    let command = Command::new("rlhf").version(env!("CARGO_PKG_VERSION")).about(about).subcommand_required(true);
    let programs = ALL.iter().map(|entry| (entry.command)().name(entry.name).about(entry.summary));
    let own = [Completions::command(), Man::command()];
    command.subcommands(programs).subcommands(own)
}

fn completions(shell: Shell) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut definition(), "rlhf", &mut script);
    say!("{}", String::from_utf8_lossy(&script).trim_end());
}

fn manual(folder: PathBuf) -> Result<()> {
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    clap_mangen::generate_to(definition(), &folder).map_err(Error::io(&folder))?;
    say!("manual pages in {}", folder.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overview_names_every_command_in_a_few_lines() {
        let text = overview();
        assert!(text.lines().count() <= 22 && text.lines().all(|line| line.len() <= 80), "{text}");
        for name in ALL.iter().map(|entry| entry.name).chain([COMPLETIONS, MAN]) {
            assert!(text.contains(&format!("\n  {name} ")), "{name}");
        }
    }

    #[test]
    fn completions_and_manual_pages_cover_every_command_and_flag() {
        definition().debug_assert();
        let mut script = Vec::new();
        clap_complete::generate(Shell::Bash, &mut definition(), "rlhf", &mut script);
        let script = String::from_utf8(script).unwrap();
        let folder = tempfile::tempdir().unwrap();
        manual(folder.path().to_path_buf()).unwrap();
        for entry in &ALL {
            let page = std::fs::read_to_string(folder.path().join(format!("rlhf-{}.1", entry.name))).unwrap();
            let command = (entry.command)();
            let shown = command.get_arguments().filter(|argument| !argument.is_hide_set());
            for argument in shown.filter_map(|argument| argument.get_long()) {
                assert!(script.contains(&format!("--{argument}")), "{} --{argument}", entry.name);
                assert!(page.contains(&argument.replace('-', "\\-")), "{} --{argument}", entry.name);
            }
        }
    }
}
