//! A Parquet file that is open for reading, here or on another machine.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parquet::file::reader::{ChunkReader, Length};

use crate::error::{Error, Result};
use crate::remote::objects::{self, RemoteFile};

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

impl ChunkReader for ParquetFile {
    type T = PartReader;

    fn get_read(&self, start: u64) -> parquet::errors::Result<PartReader> {
        Ok(match self {
            ParquetFile::Local(file) => PartReader::Local(file.get_read(start)?),
            ParquetFile::Remote(file) => PartReader::Remote { file: file.clone(), next: start, bytes: Bytes::new() },
        })
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

/// Reads from a place in a file on.
pub enum PartReader {
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
