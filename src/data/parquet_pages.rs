//! The pages of a Parquet file, looked at before they are decoded: a page must not count more values than its header says, nor unfold to more bytes than
//! there is room for, where each value repeats most of the one before.
//!
//! Decoders of delta encodings make room for as many values as the first bytes of a page announce. Where damage made that number impossible
//! the program would end at once, without a word; here it is an error like others.
//! Source: "Parquet encoding definitions", `DELTA_BINARY_PACKED`, `DELTA_LENGTH_BYTE_ARRAY`, `DELTA_BYTE_ARRAY`.

use std::sync::Arc;

use arrow::datatypes::Fields;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReader, RowGroups, RowSelection};
use parquet::arrow::{ProjectionMask, parquet_to_arrow_field_levels};
use parquet::basic::Encoding;
use parquet::column::page::{Page, PageIterator, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::ColumnDescriptor;

use super::parquet_file::ParquetFile;
use super::thrift::{uleb128, zigzag};

/// Bytes to which the values of a page may unfold: the format's limit of those that a page itself has.
const MOST_BYTES_OF_A_PAGE: u64 = i32::MAX as u64;

/// Reads the chosen row groups, columns and rows (all of them without a choice) of a file, so many rows at a time, as columns of these types.
pub(super) fn read(
    file: ParquetFile,
    footer: &ArrowReaderMetadata,
    fields: &Fields,
    groups: Vec<usize>,
    columns: ProjectionMask,
    rows: Option<RowSelection>,
    batch_size: usize,
) -> Result<ParquetRecordBatchReader> {
    let levels = parquet_to_arrow_field_levels(footer.parquet_schema(), columns, Some(fields))?;
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
    let has_lengths = matches!(
        encoding,
        Encoding::DELTA_BINARY_PACKED | Encoding::DELTA_LENGTH_BYTE_ARRAY | Encoding::DELTA_BYTE_ARRAY
    );
    if !has_lengths {
        return Ok(());
    }
    let impossible = || {
        ParquetError::General(format!(
            "a page of the encoding {encoding} counts more values than it has, or ends too early"
        ))
    };
    let mut lengths = values(page, column).ok_or_else(impossible)?;
    if encoding == Encoding::DELTA_BYTE_ARRAY {
        // How many bytes a value shares with the one before; then how many it has beyond.
        let (shared, behind) = sum_of_lengths(lengths, count).ok_or_else(impossible)?;
        if shared > MOST_BYTES_OF_A_PAGE {
            return Err(ParquetError::General(format!(
                "the values of a page of the encoding {encoding} are {} MiB long; at most {} MiB are read",
                shared >> 20,
                MOST_BYTES_OF_A_PAGE >> 20
            )));
        }
        lengths = behind;
    }
    after_deltas(lengths, count, |_| Some(())).map(|_| ()).ok_or_else(impossible)
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

/// What follows on at most `most` integers in `DELTA_BINARY_PACKED`, which `visit` sees in their order; `None` where there are more, or fewer bytes than
/// they take, or where `visit` says so.
///
/// They are `block size, miniblocks in a block, count, first value`, then blocks of `least difference, a width of each miniblock, the miniblocks`.
fn after_deltas(bytes: &[u8], most: u64, mut visit: impl FnMut(Deltas) -> Option<()>) -> Option<&[u8]> {
    let mut rest = bytes;
    let [block, miniblocks, count, first] = [(); 4].map(|()| integer(&mut rest));
    let (block, miniblocks, count, first) = (block?, miniblocks?, count?, first?);
    let in_miniblock = block.checked_div(miniblocks).filter(|&values| values > 0)?;
    if count > most {
        return None;
    }
    // The first value is its difference to 0.
    visit(Deltas { count: count.min(1), least: zigzag(first), width: 0, packed: &[] })?;
    let mut left = count.saturating_sub(1);
    while left > 0 {
        let least = zigzag(integer(&mut rest)?);
        let (widths, miniblocks) = rest.split_at_checked(usize::try_from(miniblocks).ok()?)?;
        rest = miniblocks;
        // Miniblocks behind the last value have a width, but no bytes.
        for &width in widths.iter().take(usize::try_from(left.div_ceil(in_miniblock)).ok()?) {
            let bits = u64::from(width).checked_mul(in_miniblock)?;
            let (packed, behind) = rest.split_at_checked(usize::try_from(bits / 8).ok()?)?;
            rest = behind;
            let count = left.min(in_miniblock);
            visit(Deltas { count, least, width, packed })?;
            left -= count;
        }
    }
    Some(rest)
}

/// A miniblock: differences of values to those before.
struct Deltas<'a> {
    count: u64,
    /// The least of them, over which the others are packed.
    least: i64,
    /// Bits of each that is packed.
    width: u8,
    packed: &'a [u8],
}

/// The sum of lengths in `DELTA_BINARY_PACKED`, and what follows on them; `None` as in [`after_deltas`], and where one is negative.
fn sum_of_lengths(bytes: &[u8], most: u64) -> Option<(u64, &[u8])> {
    let possible = |length: i128| (0..=i128::from(i64::MAX)).contains(&length);
    let (mut length, mut sum) = (0i128, 0i128);
    let rest = after_deltas(bytes, most, |Deltas { count, least, width, packed }| {
        let least = i128::from(least);
        if width == 0 {
            // However many they are, no byte is spent on them: they must not take time either.
            let (count, first) = (i128::from(count), length + least);
            length += least * count;
            sum += (first + length) * count / 2;
            return (count == 0 || possible(first) && possible(length)).then_some(());
        }
        (0..count as usize).try_for_each(|index| {
            length += least + i128::from(unpack(packed, width, index));
            sum += length;
            possible(length).then_some(())
        })
    })?;
    Some((u64::try_from(sum).unwrap_or(u64::MAX), rest))
}

/// Number `index` of those packed in `width` bits each (none is wider than 64), from the lowest bit of the first byte on.
fn unpack(packed: &[u8], width: u8, index: usize) -> u64 {
    let bit = index * usize::from(width);
    let bytes = packed.get(bit / 8..).unwrap_or_default();
    let mut word = [0; 16];
    let length = bytes.len().min(word.len());
    word[..length].copy_from_slice(&bytes[..length]);
    let word = (u128::from_le_bytes(word) >> (bit % 8)) as u64;
    word & u64::MAX.checked_shl(u32::from(width)).map_or(u64::MAX, |beyond| !beyond)
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
            assert_eq!(sum_of_lengths(&[0x80, 1, 4, count, 10, 77], 3), Some((5 * u64::from(count), &[77][..])));
        }
        // Miniblocks of 1 bit, of which the second has no values and thus no bytes.
        let deltas = [0x80, 1, 4, 3, 10, 0, 1, 1, 0, 0, 0b10, 9, 9, 9, 77];
        assert_eq!(sum_of_lengths(&deltas, 3), Some((5 + 5 + 6, &[77][..])));
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

    #[test]
    fn a_page_whose_values_repeat_more_than_fits_is_refused() {
        // Each of three values shares 2^30 bytes with the one before.
        let long = [&[0x80, 1, 4, 3, 0x80, 0x80, 0x80, 0x80, 8], &[0, 0, 0, 0, 0][..]].concat();
        let page = page(Encoding::DELTA_BYTE_ARRAY, &[long.clone(), fives(&[3])].concat());
        let error = check(&page, &column(0)).unwrap_err().to_string();
        assert!(error.contains("3072 MiB") && error.contains("2047 MiB"), "{error}");
        assert_eq!(sum_of_lengths(&long, 3).map(|(sum, _)| sum), Some(3 << 30));
        // Four billion values of a few bytes take no time: 1 + 2 + ... of them in one miniblock without bits.
        let count = [0xff, 0xff, 0xff, 0xff, 0x0f];
        let many = [&[0x80, 0x80, 0x80, 0x80, 0x40, 1], &count[..], &[2], &[2, 0]].concat();
        let last = u64::from(u32::MAX);
        assert_eq!(sum_of_lengths(&many, last), Some((last * (last + 1) / 2, &[][..])));
        // Lengths below zero: the first, and one on the way.
        for negative in [&[0x80, 1, 4, 3, 1, 0, 0, 0, 0, 0][..], &[0x80, 1, 4, 3, 10, 15, 0, 0, 0, 0]] {
            assert_eq!(sum_of_lengths(negative, 3), None);
        }
    }

    #[test]
    fn numbers_are_unpacked_from_the_lowest_bit_on() {
        let packed = [0b1110_0100, 0xff, 0x01, 0, 0, 0, 0, 0, 0x80, 0x7f];
        assert_eq!([0, 1, 2, 3].map(|index| unpack(&packed, 2, index)), [0, 1, 2, 3]);
        assert_eq!([0, 1].map(|index| unpack(&packed, 12, index)), [0xfe4, 0x01f]);
        assert_eq!(unpack(&packed, 64, 0), 0x01_ffe4);
        assert_eq!(unpack(&packed[1..], 63, 1), 0xff);
    }
}
