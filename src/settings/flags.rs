//! Which flags a program reads in which mode. A flag that was given and that the chosen mode does not read is refused by its name, as
//! a run that ignores it would not be the run that was asked for.
//!
//! Every program has one table with an entry for each of its flags; the groups that programs share have theirs next to their structs.

use std::path::Path;
use std::rc::Rc;

use clap::{Command, Parser};

use crate::bail;
use crate::error::Result;
use crate::settings::short_help::Section;

/// The settings of a program: its command line, and which of its flags it reads when.
pub trait Program: Parser + 'static {
    /// An entry for every flag.
    fn flags() -> Flags<Self>;

    /// What `-h` shows; all flags where it has nothing.
    fn short_help() -> Vec<Section> {
        Vec::new()
    }
}

/// The flags of a program or of a group of settings, each with the mode that reads it.
pub struct Flags<S>(Vec<Flag<S>>);

/// A flag by the name of its field.
struct Flag<S> {
    id: &'static str,
    read: Read<S>,
}

/// When a flag is read.
enum Read<S> {
    Always,
    Never,
    Only(Mode<S>),
}

/// A mode of a program.
struct Mode<S> {
    /// It in words that follow "read only", as in `with --method lora`.
    words: &'static str,
    /// Whether the settings choose it.
    holds: Rc<dyn Fn(&S) -> bool>,
}

/// Where a flag was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source<'a> {
    /// On the command line.
    User,
    /// In a settings file, under this key.
    File {
        /// The file.
        path: &'a Path,
        /// The key as it is written there.
        key: &'a str,
    },
}

impl<'a> Source<'a> {
    fn path(self) -> Option<&'a Path> {
        match self {
            Source::User => None,
            Source::File { path, .. } => Some(path),
        }
    }
}

impl<S: 'static> Flags<S> {
    /// No flag yet.
    #[expect(clippy::new_without_default, reason = "a table without entries is only the start of one")]
    pub fn new() -> Self {
        Flags(Vec::new())
    }

    /// Flags that every mode reads.
    pub fn always(self, ids: &[&'static str]) -> Self {
        self.and(ids, || Read::Always)
    }

    /// Flags that no mode reads, of a group that the program shares with others.
    pub fn never(self, ids: &[&'static str]) -> Self {
        self.and(ids, || Read::Never)
    }

    /// Flags that are read only in the mode in which `holds` is true; `words` follow "read only".
    pub fn only(self, words: &'static str, ids: &[&'static str], holds: impl Fn(&S) -> bool + 'static) -> Self {
        let holds: Rc<dyn Fn(&S) -> bool> = Rc::new(holds);
        self.and(ids, || Read::Only(Mode { words, holds: holds.clone() }))
    }

    /// The flags of a group within these settings.
    pub fn of<G: 'static>(mut self, group: fn(&S) -> &G, flags: Flags<G>) -> Self {
        self.0.extend(flags.0.into_iter().map(|Flag { id, read }| Flag {
            id,
            read: match read {
                Read::Always => Read::Always,
                Read::Never => Read::Never,
                Read::Only(Mode { words, holds }) => {
                    Read::Only(Mode { words, holds: Rc::new(move |settings| holds(group(settings))) })
                }
            },
        }));
        self
    }

    /// Without these, for which the program has entries of its own.
    pub fn without(mut self, ids: &[&str]) -> Self {
        self.0.retain(|flag| !ids.contains(&flag.id));
        self
    }

    fn and(mut self, ids: &[&'static str], read: impl Fn() -> Read<S>) -> Self {
        self.0.extend(ids.iter().map(|&id| Flag { id, read: read() }));
        self
    }

    /// The flag's mode in words if these settings do not choose it; empty words where no mode reads it.
    fn unread(&self, settings: &S, id: &str) -> Option<&'static str> {
        match &self.0.iter().find(|flag| flag.id == id)?.read {
            Read::Always => None,
            Read::Never => Some(""),
            Read::Only(mode) if (mode.holds)(settings) => None,
            Read::Only(mode) => Some(mode.words),
        }
    }
}

/// Refuses flags that were given and that the settings' mode does not read; `given` says where each was given, if it was.
///
/// # Errors
/// The sentence names the first of them, with the others that the same mode reads.
pub(super) fn check<'a, S: Program>(
    settings: &S,
    command: &Command,
    given: impl Fn(&str) -> Option<Source<'a>>,
) -> Result<()> {
    let flags = S::flags();
    let unread = command.get_arguments().filter_map(|argument| {
        let words = flags.unread(settings, argument.get_id().as_str())?;
        let source = given(argument.get_id().as_str())?;
        let name = match source {
            Source::User => format!("--{}", argument.get_long()?),
            Source::File { key, .. } => format!("`{key}`"),
        };
        Some((words, source.path(), name))
    });
    let unread: Vec<(&str, Option<&Path>, String)> = unread.collect();
    let Some((words, path, _)) = unread.first() else { return Ok(()) };
    let same = unread.iter().filter(|(other, source, _)| other == words && source == path);
    let names: Vec<&str> = same.map(|(.., name)| name.as_str()).collect();
    let (names, [have, they_are, them]) = match &names[..] {
        [all @ .., last] if !all.is_empty() => (format!("{} and {last}", all.join(", ")), ["have", "they are", "them"]),
        one => (one.concat(), ["has", "it is", "it"]),
    };
    let reason = match *words {
        "" => format!("`{}` does not read {them}", command.get_name()),
        words => format!("{they_are} read only {words}"),
    };
    match path {
        None => bail!("{names} {have} no effect here: {reason}; leave {them} out"),
        Some(path) => bail!("{}: {names} {have} no effect here: {reason}; remove {them} from the file", path.display()),
    }
}

#[cfg(test)]
mod tests;
