//! A file of data that is open for reading, on this machine or another one.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::remote::objects::{self, RemoteFile};

/// The bytes of a file, any part of which can be read.
#[derive(Debug)]
pub(super) enum DataFile {
    /// A file of this machine.
    Local(File),
    /// A file of an object store or a web server.
    Remote(Arc<RemoteFile>),
}

/// What tells a version of a file from others: its length, and when it was changed. A remote file that is open has one version, which every request checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    length: u64,
    modified: Option<SystemTime>,
}

impl Version {
    /// The length of the file in bytes.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Whether the file was last changed so long ago that another change would show in its date.
    pub(super) fn is_settled(&self) -> bool {
        let age = self.modified.map(|modified| SystemTime::now().duration_since(modified).unwrap_or_default());
        age.is_none_or(|age| age > Duration::from_secs(2))
    }
}

impl DataFile {
    /// Opens a file by its path or URL.
    pub(super) fn open(path: &Path) -> Result<Self> {
        match objects::is_remote(path) {
            true => objects::open(path).map(DataFile::Remote),
            false => File::open(path).map(DataFile::Local).map_err(Error::io(path)),
        }
    }

    /// Its length in bytes.
    pub(super) fn length(&self) -> io::Result<u64> {
        Ok(self.version()?.length)
    }

    /// The version that it is now.
    pub(super) fn version(&self) -> io::Result<Version> {
        match self {
            DataFile::Local(file) => {
                let metadata = file.metadata()?;
                Ok(Version { length: metadata.len(), modified: metadata.modified().ok() })
            }
            DataFile::Remote(file) => Ok(Version { length: file.length(), modified: None }),
        }
    }

    /// The bytes of a range.
    ///
    /// # Errors
    /// Where the file ends before it, or cannot be read.
    pub(super) fn read(&self, range: Range<u64>) -> io::Result<Bytes> {
        let length = range.end.saturating_sub(range.start);
        let beyond = || {
            io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{length} bytes from {} on are not in it", range.start),
            )
        };
        if range.end < range.start || range.end > self.length()? {
            return Err(beyond());
        }
        match self {
            DataFile::Local(_) => {
                let mut bytes = vec![0; usize::try_from(length).map_err(|_| beyond())?];
                self.reader(range.start)?.read_exact(&mut bytes)?;
                Ok(bytes.into())
            }
            DataFile::Remote(file) => file.read(range),
        }
    }

    /// Reads from a place on, independently of other readers.
    pub(super) fn reader(&self, start: u64) -> io::Result<FileReader> {
        Ok(match self {
            DataFile::Local(file) => FileReader::Local { file: file.try_clone()?, next: start },
            DataFile::Remote(file) => FileReader::Remote { file: file.clone(), next: start, bytes: Bytes::new() },
        })
    }
}

/// Reads from a place in a file on.
pub(super) enum FileReader {
    /// Of a file of this machine, without a buffer.
    Local {
        /// The file, whose own place is neither used nor moved: many may read it.
        file: File,
        /// Where to read on.
        next: u64,
    },
    /// Of a remote one.
    Remote {
        /// The file.
        file: Arc<RemoteFile>,
        /// Where to read on once `bytes` are used up.
        next: u64,
        /// Bytes that were fetched and not read yet.
        bytes: Bytes,
    },
}

impl Read for FileReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            FileReader::Local { file, next } => {
                let count = read_at(file, buffer, *next)?;
                *next += count as u64;
                Ok(count)
            }
            FileReader::Remote { file, next, bytes } => {
                if bytes.is_empty() {
                    *bytes = file.read_some(*next)?;
                    *next += bytes.len() as u64;
                }
                let part = bytes.split_to(bytes.len().min(buffer.len()));
                buffer[..part.len()].copy_from_slice(&part);
                Ok(part.len())
            }
        }
    }
}

#[cfg(unix)]
fn read_at(file: &File, buffer: &mut [u8], start: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, start)
}

#[cfg(windows)]
fn read_at(file: &File, buffer: &mut [u8], start: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, start)
}
