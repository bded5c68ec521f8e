//! Rows of many files in random order, in memory that does not grow with their number.
//!
//! An epoch lays the row groups of all files end to end in random order, cuts that sequence into windows of a given number of rows, and
//! shuffles the rows of each window. So a row mixes with those of its window, which come from about window / (rows of a group) row groups,
//! wherever in the files these lie; row groups larger than a window are gone through piece by piece. The buffer of Hugging Face's
//! `datasets`, from which a random row is taken and replaced by the next of the stream, mixes about as many rows at a time, but to go on in
//! the middle it has to read again all that came before.
//!
//! Where all rows fit in one window, the row groups stay in their order and the permutation is one of all rows.
//!
//! The rows of a window are held as they were decoded, up to 512 MiB of them. Rows beyond that, of texts of 50 kB and more in windows of 10,000, are
//! read from their files when their turn comes, which takes longer and changes nothing else.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayData, RecordBatch};

use super::row_index::{RowIndex, RowReader, single};
use super::table::Rows;
use crate::error::Result;
use crate::random::{shuffle, stream};

/// Bytes of a window's rows that are held.
const MOST_BYTES: usize = 512 << 20;

/// Which row stands where in an epoch: a function of the seed, the epoch and the files.
#[derive(Debug, Clone)]
pub struct WindowedOrder {
    /// The rows of each group, numbered through.
    groups: Vec<Range<usize>>,
    /// The rows that are left out, ascending.
    left_out: Vec<usize>,
    rows: usize,
    window: usize,
    seed: u64,
    epoch: Option<Epoch>,
}

/// The order of an epoch's row groups.
#[derive(Debug, Clone)]
struct Epoch {
    number: usize,
    groups: Vec<u32>,
    /// Rows, but those left out, up to the end of each group, in this order.
    ends: Vec<usize>,
}

/// The rows of a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Where they lie: ranges within row groups, which may hold rows that are left out.
    pub ranges: Vec<Range<usize>>,
    /// The rows in their random order.
    pub rows: Vec<usize>,
}

impl WindowedOrder {
    /// The order of the rows of `groups`, which follow one another, but for `left_out` (ascending), in windows of `window` rows.
    pub fn new(groups: Vec<Range<usize>>, left_out: Vec<usize>, window: usize, seed: u64) -> Self {
        let rows = groups.last().map_or(0, |group| group.end) - left_out.len();
        WindowedOrder { groups, left_out, rows, window: window.max(1), seed, epoch: None }
    }

    /// The number of rows of an epoch.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of windows of an epoch.
    pub fn windows(&self) -> usize {
        self.rows.div_ceil(self.window)
    }

    /// Window `window` of an epoch, both counted from 0.
    pub fn window(&mut self, epoch: usize, window: usize) -> Window {
        let positions = window * self.window..self.rows.min((window + 1) * self.window);
        let order = self.epoch.take().filter(|order| order.number == epoch).unwrap_or_else(|| self.order(epoch));
        let first = order.ends.partition_point(|&end| end <= positions.start);
        let mut found = Window { ranges: Vec::new(), rows: Vec::with_capacity(positions.len()) };
        let mut start = positions.start;
        for (index, &group) in order.groups.iter().enumerate().skip(first) {
            if start == positions.end {
                break;
            }
            let begin = if index == 0 { 0 } else { order.ends[index - 1] };
            let end = order.ends[index].min(positions.end);
            if start < end {
                self.add(&mut found, group as usize, start - begin..end - begin);
                start = end;
            }
        }
        self.epoch = Some(order);
        // With one window an epoch this is the stream of a permutation of all rows.
        let number = epoch as u64 * self.windows() as u64 + window as u64;
        shuffle(&mut found.rows, &mut stream(self.seed, "order of examples", number));
        found
    }

    /// The order of an epoch's row groups.
    fn order(&self, epoch: usize) -> Epoch {
        let mut groups: Vec<u32> = (0..self.groups.len() as u32).collect();
        if self.windows() > 1 {
            shuffle(&mut groups, &mut stream(self.seed, "order of row groups", epoch as u64));
        }
        let mut end = 0;
        let ends = groups.iter().map(|&group| {
            let rows = &self.groups[group as usize];
            end += rows.len() - self.left_out_of(rows).len();
            end
        });
        let ends = ends.collect();
        Epoch { number: epoch, groups, ends }
    }

    /// The rows among `rows` that are left out.
    fn left_out_of(&self, rows: &Range<usize>) -> &[usize] {
        let at = |row| self.left_out.partition_point(|&left_out| left_out < row);
        &self.left_out[at(rows.start)..at(rows.end)]
    }

    /// Adds some of the rows that a group has without those left out, given by their place among them, which must not be empty.
    fn add(&self, window: &mut Window, group: usize, places: Range<usize>) {
        let rows = &self.groups[group];
        let left_out = self.left_out_of(rows);
        let row_at = |place: usize| {
            // Before left_out[i] stand left_out[i] - rows.start - i rows that are not left out.
            let places = left_out.iter().enumerate().map(|(index, row)| row - rows.start - index);
            let before = places.take_while(|&before| before <= place).count();
            rows.start + place + before
        };
        let range = row_at(places.start)..row_at(places.end - 1) + 1;
        let kept = range.clone().filter(|row| left_out.binary_search(row).is_err());
        window.rows.extend(kept);
        window.ranges.push(range);
    }
}

/// The rows of many files in a [`WindowedOrder`], one window of them in memory.
pub struct WindowedRows {
    order: WindowedOrder,
    reader: RowReader,
    most_bytes: usize,
    loaded: Option<Loaded>,
}

/// A window's rows.
struct Loaded {
    epoch: usize,
    window: usize,
    rows: Vec<usize>,
    /// What is held of them, by the number of the first row.
    held: BTreeMap<usize, Rows>,
}

impl WindowedRows {
    /// The rows of the indexed files but for `left_out` (ascending), in windows of `window` rows.
    pub fn new(index: Arc<RowIndex>, left_out: Vec<usize>, window: usize, seed: u64) -> Self {
        let groups = index.groups().iter().map(|group| group.rows.clone()).collect();
        let order = WindowedOrder::new(groups, left_out, window, seed);
        WindowedRows { order, reader: RowReader::new(index), most_bytes: MOST_BYTES, loaded: None }
    }

    /// The number of rows of an epoch.
    pub fn rows(&self) -> usize {
        self.order.rows()
    }

    /// The rows at `positions` of an epoch's order, each by itself.
    ///
    /// # Errors
    /// Where a file is damaged or has changed since it was indexed.
    pub fn at(&mut self, epoch: usize, positions: Range<usize>) -> Result<Vec<Rows>> {
        let mut found = Vec::with_capacity(positions.len());
        let mut start = positions.start;
        while start < positions.end {
            let window = start / self.order.window;
            let first = window * self.order.window;
            let end = positions.end.min(first + self.order.window);
            self.load(epoch, window)?;
            self.single_rows(start - first..end - first, &mut found)?;
            start = end;
        }
        Ok(found)
    }

    /// Makes a window the one in memory.
    fn load(&mut self, epoch: usize, window: usize) -> Result<()> {
        if self.loaded.as_ref().is_some_and(|loaded| (loaded.epoch, loaded.window) == (epoch, window)) {
            return Ok(());
        }
        // What was held goes before the next is read.
        self.loaded = None;
        let Window { ranges, rows } = self.order.window(epoch, window);
        let (mut held, mut buffers, mut bytes) = (BTreeMap::new(), HashSet::new(), 0);
        for mut range in ranges {
            while !range.is_empty() && bytes < self.most_bytes {
                let rows = self.reader.read(range.clone())?;
                bytes += bytes_of(&rows.batch, &mut buffers);
                let first = range.start;
                range.start += rows.batch.num_rows();
                held.insert(first, rows);
            }
        }
        self.loaded = Some(Loaded { epoch, window, rows, held });
        Ok(())
    }

    /// Adds the rows that stand at `places` of the window in memory.
    fn single_rows(&mut self, places: Range<usize>, found: &mut Vec<Rows>) -> Result<()> {
        let Some(loaded) = &self.loaded else { return Ok(()) };
        let wanted = &loaded.rows[places];
        let mut missing = Vec::new();
        let mut by_row = BTreeMap::new();
        for &row in wanted {
            let held = loaded.held.range(..=row).next_back();
            match held.filter(|(first, rows)| row - **first < rows.batch.num_rows()) {
                Some((first, rows)) => {
                    by_row.insert(row, single(rows, row - first, rows.first_row + (row - first))?);
                }
                None => missing.push(row),
            }
        }
        missing.sort_unstable();
        let mut numbers = missing.iter();
        self.reader.read_each(&missing, |rows| {
            by_row.extend(numbers.next().map(|&row| (row, rows)));
            Ok(())
        })?;
        found.extend(wanted.iter().filter_map(|row| by_row.remove(row)));
        Ok(())
    }
}

/// The bytes of the buffers of a batch that are not among `counted` already, as batches of one page may share them.
fn bytes_of(batch: &RecordBatch, counted: &mut HashSet<usize>) -> usize {
    batch.columns().iter().map(|column| bytes_of_data(&column.to_data(), counted)).sum()
}

fn bytes_of_data(data: &ArrayData, counted: &mut HashSet<usize>) -> usize {
    let new = data.buffers().iter().filter(|buffer| counted.insert(buffer.data_ptr().as_ptr() as usize));
    let own: usize = new.map(|buffer| buffer.capacity()).sum();
    own + data.child_data().iter().map(|child| bytes_of_data(child, counted)).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use arrow::array::StringArray;

    use super::*;
    use crate::data::parquet;
    use crate::data::schema::DEMONSTRATIONS;

    #[test]
    fn rows_beyond_what_is_held_are_read_from_their_files() {
        let folder = tempfile::tempdir().unwrap();
        for file in 0..3 {
            let texts: Vec<String> = (0..5000).map(|row| format!("{file} {row}")).collect();
            let batch = RecordBatch::try_from_iter([("text", Arc::new(StringArray::from(texts)) as _)]).unwrap();
            parquet::write(folder.path().join(format!("{file}.parquet")), &batch).unwrap();
        }
        let index = Arc::new(RowIndex::open(&folder.path().display().to_string(), &DEMONSTRATIONS).unwrap());
        let read = |most_bytes, step: usize| {
            let mut rows = WindowedRows { most_bytes, ..WindowedRows::new(index.clone(), vec![7, 8, 6000], 4000, 1) };
            let found: Vec<_> = rows.at(1, step * 300..(step + 1) * 300).unwrap();
            let held = rows.loaded.map_or(0, |loaded| loaded.held.len());
            let found = found.iter().map(|rows| (rows.origin(0), rows.strings("text").unwrap().value(0).to_owned()));
            (held, found.collect::<Vec<_>>())
        };
        for step in [0, 13, 48] {
            let [(most, all), (some, same), (none, alike)] = [MOST_BYTES, 10_000, 0].map(|bytes| read(bytes, step));
            assert!(none == 0 && some > 0 && some < most, "{none} {some} {most}");
            assert!(all == same && all == alike, "step {step}");
        }
    }
}
