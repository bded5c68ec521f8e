//! Rotary positions (Su et al. 2021): how far each pair of a head's dimensions turns from one position to the next.

use std::borrow::Cow;
use std::collections::BTreeMap;

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
}

impl RotaryForm {
    /// A form that changes with no length and scales nothing.
    pub fn fixed(frequencies: Vec<f32>) -> Self {
        RotaryForm { frequencies: Frequencies::Fixed(frequencies), amplitude: 1.0 }
    }

    /// Cosines and sines of rows at these positions of sequences of these lengths, `[rows, rotary dimensions / 2]` each.
    pub fn cos_sin(&self, positions: &[u32], lengths: &[u32]) -> [Vec<f32>; 2] {
        /// Sequences with the same frequencies.
        struct Alike<'a> {
            frequencies: Cow<'a, [f32]>,
            rows: usize,
            positions: usize,
            /// Cosine and sine at every position, `[positions, rotary dimensions / 2]`, where there are more rows than positions.
            table: Vec<(f32, f32)>,
        }
        let mut groups: BTreeMap<usize, Alike> = BTreeMap::new();
        let rows = || positions.iter().zip(lengths).map(|(&position, &length)| (position as usize, length as usize));
        for (position, length) in rows() {
            let alike = groups.entry(self.frequencies.key(length)).or_insert_with(|| Alike {
                frequencies: self.frequencies.of_length(length),
                rows: 0,
                positions: 0,
                table: Vec::new(),
            });
            alike.rows += 1;
            alike.positions = alike.positions.max(position + 1);
        }
        let turned = |position: usize, frequency: &f32| {
            let (sin, cos) = (position as f32 * frequency).sin_cos();
            (self.amplitude * cos, self.amplitude * sin)
        };
        for Alike { frequencies, positions, table, .. } in
            groups.values_mut().filter(|alike| alike.rows > alike.positions)
        {
            let at = |position| frequencies.iter().map(move |frequency| turned(position, frequency));
            *table = (0..*positions).flat_map(at).collect();
        }
        let half = groups.values().next().map_or(0, |alike| alike.frequencies.len());
        let mut cos_sin = [(); 2].map(|()| Vec::with_capacity(positions.len() * half));
        let mut push = |(cos, sin): (f32, f32)| {
            cos_sin[0].push(cos);
            cos_sin[1].push(sin);
        };
        for (position, length) in rows() {
            let Alike { frequencies, table, .. } = &groups[&self.frequencies.key(length)];
            match table.get(position * half..(position + 1) * half) {
                Some(row) => row.iter().copied().for_each(&mut push),
                None => frequencies.iter().map(|frequency| turned(position, frequency)).for_each(&mut push),
            }
        }
        cos_sin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sequence_has_the_rotations_of_its_own_length() {
        let long = Frequencies::Long { short: vec![1.0, 0.1], long: vec![0.5, 0.05], original: 4 };
        let form = RotaryForm { frequencies: long, amplitude: 2.0 };
        let [cos, sin] = form.cos_sin(&[3, 3, 0], &[4, 5, 5]);
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
}
