//! Text files of rows: split into records as they are read, and indexed, so that any part of them can be read without what comes before it.
//!
//! A text file is read through once when it is opened: this counts its rows, finds what is wrong with any of them before work begins, and notes where every
//! 1,024th row begins (or every row after 4 MiB). From then on a part is read by its place.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;

use super::batches::ROWS_PER_BATCH;
use super::data_file::{DataFile, Version};
use super::form::Source;
use super::table::{Chosen, Projection, has_changed, projection, unreadable};
use crate::error::{Error, Result};
use crate::limits;

/// Bytes after which a part ends with the row that goes beyond them.
const BYTES_PER_PART: u64 = 4 << 20;
/// Bytes that are read at a time.
const BYTES_PER_READ: usize = 256 << 10;

/// Finds the records of a text, which it sees from the start on, piece by piece.
pub(super) trait Split {
    /// Looks at bytes that follow on those seen before, as far as the next record ends.
    ///
    /// # Errors
    /// Where they cannot be: a reason, to be a part of a sentence.
    fn next(&mut self, bytes: &[u8]) -> Result<Found, String>;

    /// The same where nothing follows.
    fn end(&mut self) -> Result<(), String>;
}

/// What was found at the beginning of some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// So many bytes between records, at least one.
    Gap(usize),
    /// The record ends after so many bytes.
    Record(usize),
    /// All of them belong to a record that does not end in them, or there are none.
    More,
}

/// A row as it is written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record<'a> {
    pub(super) text: &'a str,
    /// Where it begins in the file.
    start: u64,
    /// The line of the file in which it begins, counted from 1.
    pub(super) line: u64,
}

/// The records of an input.
struct Records<R, S> {
    input: R,
    split: S,
    buffer: Vec<u8>,
    /// Where the next record begins in the buffer, and up to where it was looked for.
    start: usize,
    seen: usize,
    /// Where the buffer begins in the file.
    offset: u64,
    line: u64,
    has_ended: bool,
}

/// What is wrong with a text, and in which line.
pub(super) struct Fault {
    line: u64,
    reason: String,
}

impl Fault {
    pub(super) fn new(line: u64, reason: impl Into<String>) -> Self {
        Fault { line, reason: reason.into() }
    }

    /// The sentence for a file.
    pub(super) fn of(&self, path: &Path) -> Error {
        Error::input(format!("{}: line {}: {}", path.display(), self.line, self.reason))
    }
}

fn lines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

impl<R: Read, S: Split> Records<R, S> {
    fn new(input: R, split: S, offset: u64, line: u64) -> Self {
        Records { input, split, buffer: Vec::new(), start: 0, seen: 0, offset, line, has_ended: false }
    }

    fn next(&mut self) -> Result<Option<Record<'_>>, Fault> {
        let fault = |line, reason: String| Fault { line, reason };
        let end = loop {
            let found = self.split.next(&self.buffer[self.seen..]).map_err(|reason| fault(self.line, reason))?;
            match found {
                Found::Gap(count) => {
                    let end = self.seen + count;
                    self.line += lines(&self.buffer[self.start..end]);
                    (self.start, self.seen) = (end, end);
                }
                Found::Record(count) => break self.seen + count,
                Found::More => {
                    self.seen = self.buffer.len();
                    if self.has_ended {
                        self.split.end().map_err(|reason| fault(self.line, reason))?;
                        if self.start == self.seen {
                            return Ok(None);
                        }
                        break self.seen;
                    }
                    self.fill()?;
                }
            }
        };
        let record = self.start..end;
        let (line, start) = (self.line, self.offset + self.start as u64);
        self.line += lines(&self.buffer[record.clone()]);
        (self.start, self.seen) = (end, end);
        let text = std::str::from_utf8(&self.buffer[record]);
        let text = text.map_err(|error| {
            fault(line, format!("byte {} of it is not UTF-8 text; save the file as UTF-8", error.valid_up_to()))
        })?;
        Ok(Some(Record { text, start, line }))
    }

    /// Reads on, behind the part of a record that is there.
    fn fill(&mut self) -> Result<(), Fault> {
        let fault = |reason| Fault { line: self.line, reason };
        if self.buffer.len() - self.start > limits::TEXT_ROW {
            return Err(fault(format!(
                "a row of more than {} MiB, which is the most that is read",
                limits::TEXT_ROW >> 20
            )));
        }
        self.buffer.drain(..self.start);
        self.offset += self.start as u64;
        (self.start, self.seen) = (0, self.seen - self.start);
        let length = self.buffer.len();
        let count = (&mut self.input).take(BYTES_PER_READ as u64).read_to_end(&mut self.buffer);
        count.map_err(|error| fault(format!("cannot be read ({error})")))?;
        self.has_ended = self.buffer.len() == length;
        Ok(())
    }
}

/// Some consecutive rows of a text file.
#[derive(Debug, Clone)]
struct Part {
    /// Where they begin and end.
    start: u64,
    end: u64,
    /// The line in which they begin, counted from 1.
    line: u64,
}

/// A text file in parts.
pub(super) struct TextParts {
    pub(super) path: Arc<Path>,
    file: DataFile,
    version: Version,
    parts: Vec<Part>,
    rows: Vec<usize>,
}

impl TextParts {
    /// Reads a file through. `visit` sees every record, and says whether it is a row.
    ///
    /// # Errors
    /// Where the file cannot be read or split, and those of `visit`.
    pub(super) fn index(
        path: &Path,
        source: Source,
        split: impl Split,
        mut visit: impl FnMut(&Record) -> Result<bool, Fault>,
    ) -> Result<Self> {
        let Source { file, start, .. } = source;
        let unreadable = |error| unreadable(path, error);
        let version = file.version().map_err(unreadable)?;
        let mut records = Records::new(file.reader(start).map_err(unreadable)?, split, start, 1);
        let (mut parts, mut rows): (Vec<Part>, Vec<usize>) = (Vec::new(), Vec::new());
        while let Some(record) = records.next().map_err(|fault| fault.of(path))? {
            if !visit(&record).map_err(|fault| fault.of(path))? {
                continue;
            }
            let end = record.start + record.text.len() as u64;
            match (parts.last_mut(), rows.last_mut()) {
                (Some(part), Some(count)) if *count < ROWS_PER_BATCH && part.end - part.start < BYTES_PER_PART => {
                    part.end = end;
                    *count += 1;
                }
                _ => {
                    parts.push(Part { start: record.start, end, line: record.line });
                    rows.push(1);
                }
            }
        }
        Ok(TextParts { path: path.into(), file, version, parts, rows })
    }

    /// The number of rows of each part.
    pub(super) fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// The places of the columns that are read, in ascending order.
    ///
    /// # Errors
    /// Where this is no longer the file that was read through.
    pub(super) fn open(&self, schema: &SchemaRef, columns: Projection) -> Result<Vec<usize>> {
        if !self.is_same() {
            return Err(has_changed(&self.path));
        }
        Ok(projection(schema, columns))
    }

    fn is_same(&self) -> bool {
        self.file.version().is_ok_and(|version| version == self.version)
    }

    /// Reads a part, of which `visit` sees the chosen rows.
    ///
    /// # Errors
    /// Where the file has changed or cannot be read, and those of `visit`.
    pub(super) fn read(
        &self,
        part: usize,
        chosen: &Chosen,
        split: impl Split,
        mut visit: impl FnMut(&Record) -> Result<(), String>,
    ) -> Result<(), String> {
        let Part { start, end, line } = self.parts[part];
        let bytes = self.file.read(start..end).map_err(|error| error.to_string())?;
        let mut records = Records::new(&bytes[..], split, start, line);
        let (mut row, mut next) = (0, 0);
        let has_changed =
            || "the file has changed since its rows were counted; leave it as it is during a run".to_owned();
        while let Some(record) = records.next().map_err(|_| has_changed())? {
            if chosen.holds(row, &mut next) {
                visit(&record)?;
            }
            row += 1;
        }
        match row == self.rows[part] && self.is_same() {
            true => Ok(()),
            false => Err(has_changed()),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The records of a text, split when it is seen in pieces of so many bytes.
    pub(in crate::data) fn records(text: &[u8], piece: usize, split: impl Split) -> Result<Vec<(u64, String)>, String> {
        struct Pieces<'a>(std::slice::Chunks<'a, u8>, &'a [u8]);
        impl Read for Pieces<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                if self.1.is_empty() {
                    self.1 = self.0.next().unwrap_or_default();
                }
                self.1.read(buffer)
            }
        }
        // Whatever the pieces of an input are, a buffer is filled from several of them; so each is seen by the splitter first.
        struct InPieces<S>(S, usize);
        impl<S: Split> Split for InPieces<S> {
            fn next(&mut self, bytes: &[u8]) -> Result<Found, String> {
                let mut seen = 0;
                for piece in bytes.chunks(self.1) {
                    match self.0.next(piece)? {
                        Found::More => seen += piece.len(),
                        Found::Gap(count) => return Ok(Found::Gap(seen + count)),
                        Found::Record(count) => return Ok(Found::Record(seen + count)),
                    }
                }
                Ok(Found::More)
            }
            fn end(&mut self) -> Result<(), String> {
                self.0.end()
            }
        }
        let pieces = Pieces(text.chunks(piece), &[]);
        let mut records = Records::new(pieces, InPieces(split, piece), 0, 1);
        let mut found = Vec::new();
        loop {
            match records.next() {
                Ok(Some(record)) => found.push((record.line, record.text.to_owned())),
                Ok(None) => return Ok(found),
                Err(Fault { line, reason }) => return Err(format!("line {line}: {reason}")),
            }
        }
    }
}
