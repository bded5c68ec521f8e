//! How well texts were classified.

use crate::bootstrap::{self, Cluster, Estimate};
use crate::random;

/// What a model says of texts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Predictions {
    /// For each text the log-probability of every class.
    pub log_probs: Vec<Vec<f32>>,
    /// For each text its class.
    pub labels: Vec<usize>,
}

/// How many texts of each class were taken for which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    /// `[class][taken for]`.
    pub counts: Vec<Vec<usize>>,
}

impl Predictions {
    /// The confusion matrix of the most probable classes.
    pub fn confusion(&self, classes: usize) -> Confusion {
        let mut counts = vec![vec![0; classes]; classes];
        for (log_probs, &label) in self.log_probs.iter().zip(&self.labels) {
            let best = log_probs.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
            counts[label][best.map_or(0, |(index, _)| index)] += 1;
        }
        Confusion { counts }
    }

    /// Mean cross-entropy.
    pub fn loss(&self) -> f64 {
        let terms = self.log_probs.iter().zip(&self.labels).map(|(log_probs, &label)| f64::from(-log_probs[label]));
        terms.sum::<f64>() / self.labels.len() as f64
    }

    /// By the names under which they are recorded; nothing where there are no texts.
    pub fn metrics(&self, classes: usize) -> Vec<(&'static str, f64)> {
        if self.labels.is_empty() {
            return Vec::new();
        }
        let (loss, confusion) = (self.loss(), self.confusion(classes));
        // Of log-probabilities that are no numbers none is the highest.
        let [accuracy, f1] = match loss.is_nan() {
            true => [f64::NAN; 2],
            false => [confusion.accuracy(), confusion.macro_f1()],
        };
        vec![("evaluation_loss", loss), ("evaluation_accuracy", accuracy), ("evaluation_macro_f1", f1)]
    }
}

impl Confusion {
    fn total(&self) -> usize {
        self.counts.iter().flatten().sum()
    }

    fn right(&self) -> usize {
        (0..self.counts.len()).map(|class| self.counts[class][class]).sum()
    }

    /// Share of texts that were taken for what they are.
    pub fn accuracy(&self) -> f64 {
        self.right() as f64 / self.total().max(1) as f64
    }

    /// The same with its interval over texts; nothing where there are none.
    pub fn accuracy_interval(&self, seed: u64) -> Option<Estimate> {
        let right = self.right();
        let texts: Vec<Cluster> =
            (0..self.total()).map(|text| Cluster::from_iter([f64::from(u8::from(text < right))])).collect();
        bootstrap::rate(&texts, bootstrap::RESAMPLES, &mut random::stream(seed, "bootstrap of accuracy", 0))
    }

    /// Share of the most common class: what one who always says it gets right.
    pub fn most_common(&self) -> f64 {
        let largest = self.counts.iter().map(|row| row.iter().sum::<usize>()).max().unwrap_or(0);
        largest as f64 / self.total().max(1) as f64
    }

    /// `2 p r / (p + r)` of a class, with precision `p` and recall `r`: `2 right / (taken for it + of it)`; 0 where there is neither.
    pub fn f1(&self, class: usize) -> f64 {
        let right = self.counts[class][class];
        let of_it: usize = self.counts[class].iter().sum();
        let taken_for_it: usize = self.counts.iter().map(|row| row[class]).sum();
        2.0 * right as f64 / (of_it + taken_for_it).max(1) as f64
    }

    /// The mean of the classes' F1.
    pub fn macro_f1(&self) -> f64 {
        let classes = self.counts.len();
        (0..classes).map(|class| self.f1(class)).sum::<f64>() / classes as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f1_and_accuracy_are_those_of_the_confusion_matrix() {
        // 3 of class 0, one taken for 1; 2 of class 1, one taken for 2; 1 of class 2, right.
        let confusion = Confusion { counts: vec![vec![2, 1, 0], vec![0, 1, 1], vec![0, 0, 1]] };
        assert!((confusion.accuracy() - 4.0 / 6.0).abs() < 1e-12 && (confusion.most_common() - 0.5).abs() < 1e-12);
        // Precision 1 and recall 2/3; precision 1/2 and recall 1/2; precision 1/2 and recall 1.
        for (class, (precision, recall)) in [(1.0, 2.0 / 3.0), (0.5, 0.5), (0.5, 1.0)].into_iter().enumerate() {
            let expected = 2.0 * precision * recall / (precision + recall);
            assert!((confusion.f1(class) - expected).abs() < 1e-12);
        }
        // As for four of six texts that are right; the same draws for the same seed.
        let interval = confusion.accuracy_interval(1).unwrap();
        assert!(interval.value == confusion.accuracy() && interval.low < 0.5 && interval.high > 0.8, "{interval:?}");
        assert_eq!(confusion.accuracy_interval(1), Some(interval));
        let empty = Confusion { counts: vec![vec![0, 0], vec![0, 0]] };
        assert_eq!((empty.accuracy(), empty.macro_f1(), empty.accuracy_interval(1)), (0.0, 0.0, None));
    }

    #[test]
    fn of_equally_probable_classes_the_first_is_taken() {
        let predictions = Predictions { log_probs: vec![vec![-1.0, -1.0], vec![-2.0, -1.0]], labels: vec![0, 0] };
        assert_eq!(predictions.confusion(2).counts, [[1, 1], [0, 0]]);
        assert!((predictions.loss() - 1.5).abs() < 1e-12);
    }
}
