//! What a reader of data has to say once: which files and columns are not used, and how many rows were read otherwise than they are written.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::record::Origin;

/// What was said, is to be said, and is counted.
static NOTES: Mutex<Notes> = Mutex::new(Notes::new());

struct Notes {
    known: BTreeSet<String>,
    waiting: Vec<String>,
    /// The rows of a kind.
    counts: BTreeMap<&'static str, Counted>,
}

#[derive(Default)]
struct Counted {
    /// By file and number, as rows may be read more than once.
    rows: BTreeSet<(Arc<Path>, usize)>,
    /// How many of them were not said yet, and the first of these.
    unsaid: usize,
    first: Option<Origin>,
}

/// Rows of a kind that are counted at most.
const MOST_ROWS: usize = 100_000;

impl Notes {
    const fn new() -> Self {
        Notes { known: BTreeSet::new(), waiting: Vec::new(), counts: BTreeMap::new() }
    }

    fn add(&mut self, sentence: String) {
        if !self.known.contains(&sentence) {
            self.known.insert(sentence.clone());
            self.waiting.push(sentence);
        }
    }

    fn count(&mut self, what: &'static str, origin: &Origin) {
        let counted = self.counts.entry(what).or_default();
        if counted.rows.len() < MOST_ROWS && counted.rows.insert((origin.file.clone(), origin.row)) {
            counted.unsaid += 1;
            counted.first.get_or_insert_with(|| origin.clone());
        }
    }

    fn take(&mut self) -> Vec<String> {
        let mut all = std::mem::take(&mut self.waiting);
        for (what, Counted { rows, unsaid, first }) in &mut self.counts {
            if let Some(first) = first.take() {
                let most = if rows.len() == MOST_ROWS { "at least " } else { "" };
                all.push(format!("{most}{} rows {what} (the first is {first})", std::mem::take(unsaid)));
            }
        }
        all
    }
}

fn notes() -> MutexGuard<'static, Notes> {
    NOTES.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// What is not said yet of what this thread reads.
    static HELD: RefCell<Option<Vec<Note>>> = const { RefCell::new(None) };
}

enum Note {
    Sentence(String),
    Row(&'static str, Origin),
}

impl Note {
    fn say(self) {
        if let Some(note) = self.kept_back() {
            match note {
                Note::Sentence(sentence) => notes().add(sentence),
                Note::Row(what, origin) => notes().count(what, &origin),
            }
        }
    }

    /// Puts it with what the thread holds, if it holds notes.
    fn kept_back(self) -> Option<Note> {
        HELD.with_borrow_mut(|held| match held {
            Some(held) => {
                held.push(self);
                None
            }
            None => Some(self),
        })
    }
}

/// Notes that are not said yet; without [`say`](Held::say) they never are.
pub struct Held(Vec<Note>);

impl Held {
    /// Says them.
    pub fn say(self) {
        self.0.into_iter().for_each(Note::say);
    }
}

/// Holds what `step` notes on this thread: for rows that are read before their turn, or not in their order.
pub fn held<T>(step: impl FnOnce() -> T) -> (T, Held) {
    /// Also where `step` panics, the thread notes for itself again.
    struct Outer(Option<Vec<Note>>);
    impl Drop for Outer {
        fn drop(&mut self) {
            HELD.set(self.0.take());
        }
    }
    let outer = Outer(HELD.replace(Some(Vec::new())));
    let result = step();
    let held = HELD.take().unwrap_or_default();
    drop(outer);
    (result, Held(held))
}

/// Adds a sentence, unless it was added before.
pub(super) fn add(sentence: String) {
    Note::Sentence(sentence).say();
}

/// Counts a row of which `what` holds, a sentence without its subject ("hold …"). A row counts once, however
/// often it is read.
pub(super) fn count(what: &'static str, origin: &Origin) {
    Note::Row(what, origin.clone()).say();
}

/// Whether a sentence that begins so was added.
#[cfg(test)]
pub(super) fn was_added(start: &str) -> bool {
    notes().known.iter().any(|sentence| sentence.starts_with(start))
}

/// What there is to say since the last time.
pub fn take() -> Vec<String> {
    notes().take()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_said_once_and_a_row_is_counted_once_however_often_it_is_read() {
        let mut notes = Notes::new();
        let file: Arc<Path> = Path::new("a.jsonl").into();
        let mut read = |rows: std::ops::Range<usize>| {
            notes.add("a.jsonl: columns that are not used: id".to_owned());
            rows.for_each(|row| notes.count("are odd", &Origin { file: file.clone(), row }));
            notes.take()
        };
        let first =
            ["a.jsonl: columns that are not used: id", "2 rows are odd (the first is a.jsonl: row 3 (counted from 0))"];
        assert_eq!(read(3..5), first);
        assert!(read(3..5).is_empty());
        assert_eq!(read(3..6), ["1 rows are odd (the first is a.jsonl: row 5 (counted from 0))"]);
    }

    #[test]
    fn what_is_held_is_said_in_its_turn_or_never() {
        let said = || was_added("held: the second");
        let (result, held) = held(|| {
            add("held: the second".to_owned());
            // Held within what is held, and let go.
            drop(super::held(|| add("held: never".to_owned())));
            let (_, inner) = super::held(|| add("held: the third".to_owned()));
            inner.say();
            7
        });
        assert!(result == 7 && !said());
        assert!(std::panic::catch_unwind(|| super::held(|| panic!("in a step"))).is_err());
        add("held: the first".to_owned());
        held.say();
        assert!(said() && was_added("held: the first") && was_added("held: the third") && !was_added("held: never"));
        let notes = notes();
        let place = |text: &str| notes.waiting.iter().position(|sentence| sentence == text);
        // Another test may have taken what was waiting.
        assert!(place("held: the first").is_none() || place("held: the first") < place("held: the second"));
    }
}
