//! The pages of a Parquet file, looked at before they are decoded: a page must not count more values than its header says.
//!
//! Decoders of delta encodings make room for as many values as the first bytes of a page announce. Where damage made that number impossible
//! the program would end at once, without a word; here it is an error like others.
//! Source: "Parquet encoding definitions", `DELTA_BINARY_PACKED`, `DELTA_LENGTH_BYTE_ARRAY`, `DELTA_BYTE_ARRAY`.

use std::sync::Arc;

use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReader, RowGroups, RowSelection};
use parquet::arrow::{ProjectionMask, parquet_to_arrow_field_levels};
use parquet::basic::Encoding;
use parquet::column::page::{Page, PageIterator, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::ColumnDescriptor;

use super::parquet_file::ParquetFile;
use super::thrift::uleb128;

/// Reads the chosen row groups, columns and rows (all of them without a choice) of a file, so many rows at a time.
pub(super) fn read(
    file: ParquetFile,
    footer: &ArrowReaderMetadata,
    groups: Vec<usize>,
    columns: ProjectionMask,
    rows: Option<RowSelection>,
    batch_size: usize,
) -> Result<ParquetRecordBatchReader> {
    let levels = parquet_to_arrow_field_levels(footer.parquet_schema(), columns, Some(footer.schema().fields()))?;
    let pages = CheckedGroups { file: Arc::new(file), footer: footer.metadata().clone(), groups };
    let batch_size = batch_size.min(pages.num_rows());
    ParquetRecordBatchReader::try_new_with_row_groups(&levels, &pages, batch_size, rows)
}

/// Some row groups of a file.
#[derive(Clone)]
struct CheckedGroups {
    file: Arc<ParquetFile>,
    footer: Arc<ParquetMetaData>,
    groups: Vec<usize>,
}

impl RowGroups for CheckedGroups {
    fn num_rows(&self) -> usize {
        self.row_groups().map(|group| group.num_rows() as usize).sum()
    }

    fn column_chunks(&self, column: usize) -> Result<Box<dyn PageIterator>> {
        let groups = self.groups.clone().into_iter();
        Ok(Box::new(CheckedChunks { file: self.file.clone(), footer: self.footer.clone(), column, groups }))
    }

    fn row_groups(&self) -> Box<dyn Iterator<Item = &RowGroupMetaData> + '_> {
        Box::new(self.groups.iter().map(|&group| self.footer.row_group(group)))
    }

    fn metadata(&self) -> &ParquetMetaData {
        &self.footer
    }
}

/// The parts of one column, a row group each.
struct CheckedChunks {
    file: Arc<ParquetFile>,
    footer: Arc<ParquetMetaData>,
    column: usize,
    groups: std::vec::IntoIter<usize>,
}

impl Iterator for CheckedChunks {
    type Item = Result<Box<dyn PageReader>>;

    fn next(&mut self) -> Option<Self::Item> {
        let group = self.footer.row_group(self.groups.next()?);
        let chunk = group.column(self.column);
        let pages = SerializedPageReader::new(self.file.clone(), chunk, group.num_rows() as usize, None);
        let column = chunk.column_descr_ptr();
        Some(pages.map(|pages| Box::new(CheckedPages { pages, column }) as Box<dyn PageReader>))
    }
}

impl PageIterator for CheckedChunks {}

/// The pages of one column in one row group.
struct CheckedPages {
    pages: SerializedPageReader<ParquetFile>,
    column: Arc<ColumnDescriptor>,
}

impl Iterator for CheckedPages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for CheckedPages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        if let Some(page) = &page {
            check(page, &self.column)?;
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }

    fn supports_deferred_dictionary(&self) -> bool {
        self.pages.supports_deferred_dictionary()
    }

    fn take_deferred_dictionary(&mut self) -> Result<Option<Page>> {
        self.pages.take_deferred_dictionary()
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        self.pages.at_record_boundary()
    }
}

fn check(page: &Page, column: &ColumnDescriptor) -> Result<()> {
    let (encoding, count) = (page.encoding(), u64::from(page.num_values()));
    let lengths = match encoding {
        Encoding::DELTA_BINARY_PACKED | Encoding::DELTA_LENGTH_BYTE_ARRAY => 1,
        // Of what a value shares with the one before, and of the rest.
        Encoding::DELTA_BYTE_ARRAY => 2,
        _ => return Ok(()),
    };
    let mut rest = values(page, column).ok_or_else(|| impossible(encoding))?;
    for _ in 0..lengths {
        rest = after_deltas(rest, count).ok_or_else(|| impossible(encoding))?;
    }
    Ok(())
}

fn impossible(encoding: Encoding) -> ParquetError {
    ParquetError::General(format!(
        "a page of the encoding {encoding} counts more values than it has, or ends too early"
    ))
}

/// The bytes of a data page behind its repetition and definition levels.
fn values<'a>(page: &'a Page, column: &ColumnDescriptor) -> Option<&'a [u8]> {
    match page {
        Page::DataPage { buf, num_values, def_level_encoding, rep_level_encoding, .. } => {
            let levels = [(column.max_rep_level(), rep_level_encoding), (column.max_def_level(), def_level_encoding)];
            levels.into_iter().filter(|(highest, _)| *highest > 0).try_fold(&buf[..], |rest, (highest, encoding)| {
                let length = match encoding {
                    Encoding::RLE => 4 + u32::from_le_bytes(*rest.first_chunk()?) as usize,
                    // Levels packed by bits, as early writers had them.
                    _ => (*num_values as usize * (16 - highest.leading_zeros() as usize)).div_ceil(8),
                };
                rest.get(length..)
            })
        }
        Page::DataPageV2 { buf, def_levels_byte_len, rep_levels_byte_len, .. } => {
            buf.get(*def_levels_byte_len as usize + *rep_levels_byte_len as usize..)
        }
        Page::DictionaryPage { buf, .. } => Some(buf),
    }
}

/// What follows on at most `most` integers in `DELTA_BINARY_PACKED`; `None` where there are more, or fewer bytes than they take.
///
/// They are `block size, miniblocks in a block, count, first value`, then blocks of `least difference, a width of each miniblock, the miniblocks`.
fn after_deltas(bytes: &[u8], most: u64) -> Option<&[u8]> {
    let mut rest = bytes;
    let [block, miniblocks, count, first] = [(); 4].map(|()| integer(&mut rest));
    let (block, miniblocks, count, _) = (block?, miniblocks?, count?, first?);
    let in_miniblock = block.checked_div(miniblocks).filter(|&values| values > 0)?;
    if count > most {
        return None;
    }
    let mut left = count.saturating_sub(1);
    while left > 0 {
        integer(&mut rest)?;
        let (widths, miniblocks) = rest.split_at_checked(usize::try_from(miniblocks).ok()?)?;
        rest = miniblocks;
        // Miniblocks behind the last value have a width, but no bytes.
        for &width in widths.iter().take(usize::try_from(left.div_ceil(in_miniblock)).ok()?) {
            let bits = u64::from(width).checked_mul(in_miniblock)?;
            rest = rest.get(usize::try_from(bits / 8).ok()?..)?;
        }
        left = left.saturating_sub(block);
    }
    Some(rest)
}

/// Takes a number from the front.
fn integer(bytes: &mut &[u8]) -> Option<u64> {
    let next = || {
        let byte;
        (byte, *bytes) = bytes.split_first().ok_or(())?;
        Ok::<u8, ()>(*byte)
    };
    uleb128(next).ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use parquet::basic::Type as Physical;
    use parquet::schema::types::{ColumnPath, Type};

    fn column(highest_level: i16) -> ColumnDescriptor {
        let kind = Type::primitive_type_builder("text", Physical::BYTE_ARRAY).build().unwrap();
        ColumnDescriptor::new(Arc::new(kind), highest_level, 0, ColumnPath::from("text"))
    }

    fn page(encoding: Encoding, values: &[u8]) -> Page {
        Page::DataPage {
            buf: Bytes::copy_from_slice(values),
            num_values: 3,
            encoding,
            def_level_encoding: Encoding::RLE,
            rep_level_encoding: Encoding::RLE,
            statistics: None,
        }
    }

    /// Integers in blocks of 128, in four miniblocks: so many, all of them 5.
    fn fives(count: &[u8]) -> Vec<u8> {
        [&[0x80, 1, 4], count, &[10], &[0, 0, 0, 0, 0]].concat()
    }

    #[test]
    fn a_page_with_as_many_values_as_its_header_says_is_taken() {
        let (lengths, both) = (fives(&[3]), [fives(&[3]), fives(&[3])].concat());
        assert!(check(&page(Encoding::DELTA_LENGTH_BYTE_ARRAY, &lengths), &column(0)).is_ok());
        assert!(check(&page(Encoding::DELTA_BYTE_ARRAY, &both), &column(0)).is_ok());
        // Behind two bytes of definition levels.
        let levels = [&[2, 0, 0, 0, 6, 1], &both[..]].concat();
        assert!(check(&page(Encoding::DELTA_BYTE_ARRAY, &levels), &column(1)).is_ok());
        // One value and none have no block.
        for count in [0, 1] {
            assert_eq!(after_deltas(&[0x80, 1, 4, count, 10, 77], 3), Some(&[77][..]));
        }
        // Miniblocks of 1 bit, of which the second has no values and thus no bytes.
        assert_eq!(after_deltas(&[0x80, 1, 4, 3, 10, 0, 1, 1, 0, 0, 9, 9, 9, 9, 77], 3), Some(&[77][..]));
    }

    #[test]
    fn a_page_that_counts_more_values_than_its_header_is_refused() {
        let many = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        for count in [&[4][..], &many] {
            let wrong = fives(count);
            let second = [fives(&[3]), fives(count)].concat();
            let cases = [
                (Encoding::DELTA_BINARY_PACKED, &wrong),
                (Encoding::DELTA_LENGTH_BYTE_ARRAY, &wrong),
                (Encoding::DELTA_BYTE_ARRAY, &wrong),
                (Encoding::DELTA_BYTE_ARRAY, &second),
            ];
            for (encoding, values) in cases {
                let error = check(&page(encoding, values), &column(0)).unwrap_err().to_string();
                assert!(error.contains("counts more values"), "{encoding}: {error}");
            }
        }
    }

    #[test]
    fn a_page_that_ends_too_early_or_has_impossible_blocks_is_refused() {
        let whole = [fives(&[3]), fives(&[3])].concat();
        for length in 0..whole.len() {
            assert!(check(&page(Encoding::DELTA_BYTE_ARRAY, &whole[..length]), &column(0)).is_err(), "{length}");
        }
        // Levels that are longer than the page; blocks without values or without miniblocks.
        for (bytes, highest_level) in
            [(&[255, 255, 255, 255, 1][..], 1), (&[0, 4, 3, 10], 0), (&[0x80, 1, 0, 3, 10], 0)]
        {
            assert!(check(&page(Encoding::DELTA_BYTE_ARRAY, bytes), &column(highest_level)).is_err());
        }
    }
}
