//! Rotary positions (Su et al. 2021): how far each pair of a head's dimensions turns from one position to the next.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

/// The rotations of a model: one or more forms, and which of them each layer has.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// The forms.
    pub forms: Vec<RotaryForm>,
    /// For each layer its form; none where the layer does not rotate (SmolLM3).
    pub of_layer: Vec<Option<usize>>,
}

/// One way of rotating.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryForm {
    /// Radians a position.
    pub frequencies: Frequencies,
    /// What cosines and sines are multiplied with (YaRN's and LongRoPE's attention factor).
    pub amplitude: f32,
}

/// Radians a position for each pair of rotated dimensions.
#[derive(Debug, Clone, PartialEq)]
pub enum Frequencies {
    /// The same for all sequences, `[rotary dimensions / 2]`, any scaling applied.
    Fixed(Vec<f32>),
    /// NTK-aware scaling by the sequence's length: beyond `original` tokens the base grows to
    /// `theta (factor length / original - (factor - 1))^(d / (d - 2))`.
    Dynamic {
        /// The base.
        theta: f32,
        /// Rotary dimensions `d`.
        dimensions: usize,
        /// The scaling factor.
        factor: f32,
        /// The length up to which nothing is scaled.
        original: usize,
    },
    /// LongRoPE (Ding et al. 2024): one set for sequences of at most `original` tokens, another for longer ones.
    Long {
        /// Frequencies of short sequences.
        short: Vec<f32>,
        /// Frequencies of long ones.
        long: Vec<f32>,
        /// The longest short sequence.
        original: usize,
    },
}

/// `theta^-(2 i / dimensions)`, in f32 as in `transformers`, so that angles agree at large positions too.
pub fn frequencies(theta: f32, dimensions: usize) -> Vec<f32> {
    (0..dimensions.div_ceil(2)).map(|index| 1.0 / theta.powf((2 * index) as f32 / dimensions as f32)).collect()
}

impl Rotary {
    /// Layers that all rotate in the same way.
    pub fn alike(form: RotaryForm, layers: usize) -> Self {
        Rotary { forms: vec![form], of_layer: vec![Some(0); layers] }
    }

    /// The length at whose end all rotations of a sequence are others (LongRoPE), its keys too; none where they never are. Dynamic scaling changes
    /// them a little with every token, and keeps the keys that are there, as `transformers` does.
    pub fn restarts_after(&self) -> Option<usize> {
        let original = |form: &RotaryForm| match form.frequencies {
            Frequencies::Long { original, .. } => Some(original),
            Frequencies::Fixed(_) | Frequencies::Dynamic { .. } => None,
        };
        self.forms.iter().filter_map(original).min()
    }

    /// The length beyond which a sequence's rotations depend on its length; none where they never do.
    pub fn switches_after(&self) -> Option<usize> {
        self.forms.iter().filter_map(|form| form.frequencies.original()).min()
    }
}

impl Frequencies {
    /// Those of a sequence of this many tokens.
    pub fn of_length(&self, length: usize) -> Cow<'_, [f32]> {
        match self {
            Frequencies::Fixed(frequencies) => Cow::Borrowed(frequencies),
            Frequencies::Long { short, long, original } => Cow::Borrowed(if length > *original { long } else { short }),
            &Frequencies::Dynamic { theta, dimensions, factor, original } => {
                let grown = factor * length.max(original) as f32 / original as f32 - (factor - 1.0);
                let exponent = dimensions as f32 / (dimensions as f32 - 2.0);
                Cow::Owned(frequencies(theta * grown.powf(exponent), dimensions))
            }
        }
    }

    /// The longest sequence whose frequencies do not depend on its length.
    fn original(&self) -> Option<usize> {
        match self {
            Frequencies::Fixed(_) => None,
            Frequencies::Dynamic { original, .. } | Frequencies::Long { original, .. } => Some(*original),
        }
    }

    /// Lengths with the same frequencies have the same key.
    fn key(&self, length: usize) -> usize {
        match self {
            Frequencies::Fixed(_) => 0,
            Frequencies::Long { original, .. } => usize::from(length > *original),
            Frequencies::Dynamic { original, .. } => length.max(*original),
        }
    }

    /// Whether the frequencies with this key are those of many passes. Beyond its original length, dynamic
    /// scaling has others for every length.
    fn recur(&self, key: usize) -> bool {
        match self {
            Frequencies::Fixed(_) | Frequencies::Long { .. } => true,
            Frequencies::Dynamic { original, .. } => key == *original,
        }
    }
}

impl RotaryForm {
    /// A form that changes with no length and scales nothing.
    pub fn fixed(frequencies: Vec<f32>) -> Self {
        RotaryForm { frequencies: Frequencies::Fixed(frequencies), amplitude: 1.0 }
    }

    /// Cosines and sines of rows at these positions of sequences of these lengths, `[rows, rotary dimensions
    /// / 2]` each; what `tables` hold is not computed again.
    pub fn cos_sin(&self, positions: &[u32], lengths: &[u32], tables: &RotaryTables) -> [Vec<f32>; 2] {
        let mut alike: BTreeMap<usize, Alike> = BTreeMap::new();
        for (&position, &length) in positions.iter().zip(lengths) {
            let alike = alike.entry(self.frequencies.key(length as usize)).or_insert_with(|| Alike {
                frequencies: self.frequencies.of_length(length as usize),
                positions: 0,
                table: None,
            });
            alike.positions = alike.positions.max(position as usize + 1);
        }
        for (_, alike) in alike.iter_mut().filter(|(key, _)| self.frequencies.recur(**key)) {
            alike.table = Some(tables.of(&alike.frequencies, self.amplitude, alike.positions));
        }
        let half = alike.values().next().map_or(0, |alike| alike.frequencies.len());
        let mut cos_sin = [(); 2].map(|()| vec![0.0; positions.len() * half]);
        let [cos, sin] = &mut cos_sin;
        let set = |row: usize, cos: &mut [f32], sin: &mut [f32]| {
            let (position, length) = (positions[row] as usize, lengths[row] as usize);
            let Alike { frequencies, table, .. } = &alike[&self.frequencies.key(length)];
            match table {
                Some(table) => {
                    let row = position * half..(position + 1) * half;
                    cos.copy_from_slice(&table.cos[row.clone()]);
                    sin.copy_from_slice(&table.sin[row]);
                }
                None => turn(position, frequencies, self.amplitude, cos, sin),
            }
        };
        by_rows(cos, sin, half, 0, set);
        cos_sin
    }
}

/// Sequences with the same frequencies.
struct Alike<'a> {
    frequencies: Cow<'a, [f32]>,
    /// Beyond the last position that occurs.
    positions: usize,
    table: Option<Arc<Table>>,
}

/// Cosines and sines that were computed once, for the forms of one model. They grow with the positions that occur.
#[derive(Debug, Clone, Default)]
pub struct RotaryTables(Arc<Mutex<Vec<Arc<Table>>>>);

/// Cosines and sines at every position from 0, `[positions, rotary dimensions / 2]` each.
#[derive(Debug)]
struct Table {
    frequencies: Vec<f32>,
    amplitude: f32,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Positions of the smallest table.
const FEWEST_POSITIONS: usize = 256;

impl RotaryTables {
    /// The table of these frequencies for at least so many positions.
    fn of(&self, frequencies: &[f32], amplitude: f32, positions: usize) -> Arc<Table> {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |table: &Arc<Table>| table.frequencies == frequencies && table.amplitude == amplitude;
        let index = tables.iter().position(is_it).unwrap_or_else(|| {
            tables.push(Arc::new(Table {
                frequencies: frequencies.to_vec(),
                amplitude,
                cos: Vec::new(),
                sin: Vec::new(),
            }));
            tables.len() - 1
        });
        if tables[index].cos.len() < positions * frequencies.len() {
            tables[index] = Arc::new(tables[index].grown(positions.next_power_of_two().max(FEWEST_POSITIONS)));
        }
        tables[index].clone()
    }
}

impl Table {
    /// The same for so many positions.
    fn grown(&self, positions: usize) -> Self {
        let half = self.frequencies.len();
        let first = self.cos.len().checked_div(half).unwrap_or(0);
        let [mut cos, mut sin] = [&self.cos, &self.sin].map(|known| {
            let mut values = Vec::with_capacity(positions * half);
            values.extend_from_slice(known);
            values.resize(positions * half, 0.0);
            values
        });
        let set = |row: usize, cos: &mut [f32], sin: &mut [f32]| turn(row, &self.frequencies, self.amplitude, cos, sin);
        by_rows(&mut cos[first * half..], &mut sin[first * half..], half, first, set);
        Table { frequencies: self.frequencies.clone(), amplitude: self.amplitude, cos, sin }
    }
}

/// The cosines and sines of one position.
fn turn(position: usize, frequencies: &[f32], amplitude: f32, cos: &mut [f32], sin: &mut [f32]) {
    for ((frequency, cos), sin) in frequencies.iter().zip(cos).zip(sin) {
        let (sine, cosine) = (position as f32 * frequency).sin_cos();
        (*cos, *sin) = (amplitude * cosine, amplitude * sine);
    }
}

/// Sets the rows of two matrices, in parallel where there are many; the first has this number.
fn by_rows(
    cos: &mut [f32],
    sin: &mut [f32],
    columns: usize,
    first: usize,
    set: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    if columns > 0 {
        let rows = cos.par_chunks_mut(columns).zip(sin.par_chunks_mut(columns)).with_min_len(ROWS_A_TASK).enumerate();
        rows.for_each(|(row, (cos, sin))| set(first + row, cos, sin));
    }
}

/// Rows that are worth a task.
const ROWS_A_TASK: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sequence_has_the_rotations_of_its_own_length() {
        let long = Frequencies::Long { short: vec![1.0, 0.1], long: vec![0.5, 0.05], original: 4 };
        let form = RotaryForm { frequencies: long, amplitude: 2.0 };
        let [cos, sin] = form.cos_sin(&[3, 3, 0], &[4, 5, 5], &RotaryTables::default());
        let wanted: Vec<f32> = [3.0, 0.3, 1.5, 0.15, 0.0, 0.0].iter().map(|angle: &f32| 2.0 * angle.cos()).collect();
        assert_eq!(cos, wanted);
        assert_eq!(sin[..2], [2.0 * 3f32.sin(), 2.0 * 0.3f32.sin()]);
    }

    #[test]
    fn dynamic_scaling_begins_beyond_the_original_length() {
        let dynamic = Frequencies::Dynamic { theta: 100.0, dimensions: 4, factor: 3.0, original: 10 };
        assert_eq!(dynamic.of_length(3), dynamic.of_length(10));
        assert_eq!(dynamic.of_length(10)[..], frequencies(100.0, 4)[..]);
        // theta (3 * 20 / 10 - 2)^(4 / 2) = 100 * 16
        assert_eq!(dynamic.of_length(20)[..], frequencies(1600.0, 4)[..]);
        let rotary = Rotary::alike(RotaryForm { frequencies: dynamic, amplitude: 1.0 }, 2);
        assert_eq!(rotary.switches_after(), Some(10));
        assert_eq!(Rotary::alike(RotaryForm::fixed(vec![1.0]), 2).switches_after(), None);
    }

    #[test]
    fn tables_that_grow_hold_what_is_computed_for_a_single_row() {
        let dynamic = Frequencies::Dynamic { theta: 100.0, dimensions: 6, factor: 3.0, original: 300 };
        let long = Frequencies::Long { short: vec![1.0, 0.1, 0.01], long: vec![0.5, 0.05, 0.005], original: 400 };
        let forms = [
            RotaryForm { frequencies: dynamic, amplitude: 1.0 },
            RotaryForm { frequencies: long, amplitude: 1.5 },
            RotaryForm::fixed(frequencies(10_000.0, 6)),
            RotaryForm { amplitude: 0.5, ..RotaryForm::fixed(frequencies(10_000.0, 6)) },
        ];
        // The tables of all forms are in one place, as those of a model are.
        let tables = RotaryTables::default();
        for (rows, step) in [(3u32, 1), (40, 7), (1000, 1), (2, 3000)] {
            for form in &forms {
                let positions: Vec<u32> = (0..rows).map(|row| row * step).collect();
                let lengths: Vec<u32> = positions.iter().map(|position| position + 1 + position % 5).collect();
                let [cos, sin] = form.cos_sin(&positions, &lengths, &tables);
                for (row, (&position, &length)) in positions.iter().zip(&lengths).enumerate() {
                    for (index, frequency) in form.frequencies.of_length(length as usize).iter().enumerate() {
                        let angle = position as f32 * frequency;
                        assert_eq!(cos[3 * row + index], form.amplitude * angle.cos(), "{form:?}, row {row}");
                        assert_eq!(sin[3 * row + index], form.amplitude * angle.sin(), "{form:?}, row {row}");
                    }
                }
            }
        }
    }
}
