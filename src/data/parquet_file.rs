//! A Parquet file that is open for reading, here or on another machine.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parquet::file::reader::{ChunkReader, Length};

use crate::error::{Error, Result};
use crate::remote::objects::{self, RemoteFile};

use super::parquet_structs::PAGE_HEADER;
use super::thrift;

/// The bytes of a file, any part of which can be read.
#[derive(Debug)]
pub enum ParquetFile {
    /// A file of this machine.
    Local(File),
    /// A file of an object store or a web server.
    Remote(Arc<RemoteFile>),
}

impl ParquetFile {
    /// Opens a file by its path or URL.
    pub fn open(path: &Path) -> Result<Self> {
        match objects::is_remote(path) {
            true => objects::open(path).map(ParquetFile::Remote),
            false => File::open(path).map(ParquetFile::Local).map_err(Error::io(path)),
        }
    }
}

impl Length for ParquetFile {
    fn len(&self) -> u64 {
        match self {
            ParquetFile::Local(file) => file.len(),
            ParquetFile::Remote(file) => file.length(),
        }
    }
}

impl ParquetFile {
    /// The bytes from `start` on.
    fn part(&self, start: u64) -> parquet::errors::Result<PartReader> {
        Ok(match self {
            ParquetFile::Local(file) => PartReader::Local(file.get_read(start)?),
            ParquetFile::Remote(file) => PartReader::Remote { file: file.clone(), next: start, bytes: Bytes::new() },
        })
    }
}

impl ChunkReader for ParquetFile {
    type T = HeaderReader;

    /// The header of the page that begins at `start`: the Parquet reader asks in this way for those, and for all else by
    /// [`get_bytes`](ChunkReader::get_bytes).
    fn get_read(&self, start: u64) -> parquet::errors::Result<HeaderReader> {
        Ok(HeaderReader { part: self.part(start)?, bytes: None })
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        match self {
            ParquetFile::Local(file) => file.get_bytes(start, length),
            ParquetFile::Remote(file) => {
                let end = start.checked_add(length as u64).filter(|end| *end <= file.length());
                let end = end.ok_or_else(|| {
                    parquet::errors::ParquetError::EOF(format!("{length} bytes from {start} on lie beyond its end"))
                })?;
                Ok(file.read(start..end)?)
            }
        }
    }
}

/// Reads the header of a page at which a part of a file begins, after a look at it (see [`thrift`]).
pub struct HeaderReader {
    part: PartReader,
    /// The header, once it was asked for: often it is not.
    bytes: Option<io::Cursor<Vec<u8>>>,
}

impl Read for HeaderReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = match self.bytes.take() {
            Some(bytes) => bytes,
            None => io::Cursor::new(thrift::read_struct(&mut self.part, PAGE_HEADER)?),
        };
        self.bytes.insert(bytes).read(buffer)
    }
}

/// Reads from a place in a file on.
enum PartReader {
    /// Of a file of this machine.
    Local(BufReader<File>),
    /// Of a remote one.
    Remote {
        /// The file.
        file: Arc<RemoteFile>,
        /// Where to go on once `bytes` are used up.
        next: u64,
        /// Bytes that were fetched and not read yet.
        bytes: Bytes,
    },
}

impl Read for PartReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            PartReader::Local(reader) => reader.read(buffer),
            PartReader::Remote { file, next, bytes } => {
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
