//! A file that is open for the Parquet reader.

use std::io::{self, BufReader, Read};
use std::path::Path;

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};

use crate::error::Result;

use super::data_file::{DataFile, FileReader};
use super::parquet_structs::PAGE_HEADER;
use super::thrift;

/// The bytes of a Parquet file, any part of which can be read.
#[derive(Debug)]
pub(super) struct ParquetFile(DataFile);

impl ParquetFile {
    /// Opens a file by its path or URL.
    pub(super) fn open(path: &Path) -> Result<Self> {
        DataFile::open(path).map(ParquetFile)
    }
}

impl Length for ParquetFile {
    fn len(&self) -> u64 {
        self.0.length().unwrap_or(0)
    }
}

impl ChunkReader for ParquetFile {
    type T = HeaderReader;

    /// The header of the page that begins at `start`: the Parquet reader asks in this way for those, and for all else by
    /// [`get_bytes`](ChunkReader::get_bytes).
    fn get_read(&self, start: u64) -> parquet::errors::Result<HeaderReader> {
        Ok(HeaderReader { part: BufReader::new(self.0.reader(start)?), bytes: None })
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let end = start.checked_add(length as u64).filter(|end| *end <= self.len());
        let end = end.ok_or_else(|| ParquetError::EOF(format!("{length} bytes from {start} on lie beyond its end")))?;
        Ok(self.0.read(start..end)?)
    }
}

/// Reads the header of a page at which a part of a file begins, after a look at it (see [`thrift`]).
pub(super) struct HeaderReader {
    part: BufReader<FileReader>,
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
