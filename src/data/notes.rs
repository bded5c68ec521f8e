//! What a reader of data has to say once: which files and columns are not used, and how many rows were read otherwise than they are written.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::record::Origin;

/// What was said, is to be said, and is counted.
static NOTES: Mutex<Notes> = Mutex::new(Notes { known: BTreeSet::new(), waiting: Vec::new(), counts: BTreeMap::new() });

struct Notes {
    known: BTreeSet<String>,
    waiting: Vec<String>,
    /// The rows of a kind, and the first of them.
    counts: BTreeMap<&'static str, Counted>,
}

struct Counted {
    first: Origin,
    /// By file and number, as rows may be read more than once.
    rows: BTreeSet<(Arc<Path>, usize)>,
}

/// Rows of a kind that are counted at most.
const MOST_ROWS: usize = 100_000;

fn notes() -> MutexGuard<'static, Notes> {
    NOTES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds a sentence, unless it was added before.
pub(super) fn add(sentence: String) {
    let mut notes = notes();
    if notes.known.insert(sentence.clone()) {
        notes.waiting.push(sentence);
    }
}

/// Counts a row of which `what` holds, a sentence without its subject ("hold …").
pub(super) fn count(what: &'static str, origin: &Origin) {
    let mut notes = notes();
    let new = || Counted { first: origin.clone(), rows: BTreeSet::new() };
    let counted = notes.counts.entry(what).or_insert_with(new);
    if counted.rows.len() < MOST_ROWS {
        counted.rows.insert((origin.file.clone(), origin.row));
    }
}

/// Whether a sentence that begins so was added.
#[cfg(test)]
pub(super) fn was_added(start: &str) -> bool {
    notes().known.iter().any(|sentence| sentence.starts_with(start))
}

/// What there is to say since the last time.
pub fn take() -> Vec<String> {
    let mut notes = notes();
    let mut all = std::mem::take(&mut notes.waiting);
    for (what, Counted { first, rows }) in std::mem::take(&mut notes.counts) {
        let most = if rows.len() == MOST_ROWS { "at least " } else { "" };
        all.push(format!("{most}{} rows {what} (the first is {first})", rows.len()));
    }
    all
}

/// Prints what there is to say to the standard error stream.
pub fn print() {
    take().iter().for_each(|note| eprintln!("note: {note}"));
}

/// A number of files in words.
pub(super) fn files_of(count: usize) -> String {
    if count == 1 { "one file".to_owned() } else { format!("{count} files") }
}

/// The first of some files, and how many more there are.
pub(super) fn listed(files: &[String]) -> String {
    const SHOWN: usize = 6;
    let shown = files.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match files.len().checked_sub(SHOWN) {
        None | Some(0) => shown,
        Some(more) => format!("{shown} and {more} more"),
    }
}
