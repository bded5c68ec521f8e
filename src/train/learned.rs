//! Whether a run learned anything. One that did not is no success, however complete its files are.

use serde::{Deserialize, Serialize};

use crate::bail;
use crate::error::{Error, Result};

/// What the optimizer steps of a run did so far, and its last evaluation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Learned {
    /// Steps that changed the weights.
    pub changed: usize,
    /// Steps that changed nothing because a gradient was not finite.
    pub skipped: usize,
    /// Steps that changed nothing because the policy had gone too far.
    pub held_back: usize,
    /// Steps without an example.
    pub empty: usize,
    /// What was not finite in the first of the skipped steps.
    pub not_finite: Option<String>,
    /// The loss of the last evaluation.
    pub evaluation_loss: Option<f64>,
}

/// What one optimizer step did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It changed the weights.
    Changed,
    /// It changed nothing, as this was not finite.
    Skipped(String),
    /// It changed nothing, as there was no example.
    Empty,
}

impl Learned {
    /// Counts a step.
    pub fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Changed => self.changed += 1,
            Outcome::Empty => self.empty += 1,
            Outcome::Skipped(what) => {
                self.skipped += 1;
                self.not_finite.get_or_insert(what);
            }
        }
    }

    /// Counts the steps of an update of several.
    pub fn count_all(&mut self, update: Learned) {
        self.changed += update.changed;
        self.skipped += update.skipped;
        self.held_back += update.held_back;
        self.empty += update.empty;
        self.not_finite = self.not_finite.take().or(update.not_finite);
    }

    /// Refuses to call a run over that learned nothing, or whose last evaluation gave no number.
    ///
    /// # Errors
    /// The sentence says why, and what to try.
    pub fn check(&self) -> Result<()> {
        let Learned { changed, skipped, held_back, empty, .. } = *self;
        let steps = skipped + held_back + empty;
        if changed == 0 && skipped > 0 {
            return Err(Error::NotFinite(format!(
                "nothing was learned: all {steps} optimizer steps of the run were skipped or empty, {skipped} of them because a gradient was not \
                 finite (in the first {}), so the model is what it was. Try a smaller --learning-rate, look at the examples of these steps, or start \
                 from weights that are finite",
                self.not_finite.as_deref().unwrap_or("one")
            )));
        }
        if changed == 0 && held_back > 0 {
            return Err(Error::NotFinite(format!(
                "nothing was learned: in all {steps} minibatches of the run the policy was beyond --ratio-threshold or --early-stop-kl, so none of them \
                 changed anything; raise these, or look at val/sampler_difference in metrics.jsonl"
            )));
        }
        if changed == 0 && empty > 0 {
            bail!(
                "nothing was learned: none of the {empty} optimizer steps had an example with something to learn; check the data and --max-length, or raise --max-steps"
            );
        }
        match self.evaluation_loss {
            Some(loss) if !loss.is_finite() => Err(Error::NotFinite(format!(
                "the loss on the evaluation examples is {loss} at the end of the run, so the model that was trained is of no use; try a smaller --learning-rate"
            ))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned(outcomes: &[Outcome], evaluation_loss: Option<f64>) -> Result<()> {
        let mut learned = Learned { evaluation_loss, ..Learned::default() };
        outcomes.iter().for_each(|outcome| learned.count(outcome.clone()));
        learned.check()
    }

    fn fault(outcomes: &[Outcome], evaluation_loss: Option<f64>) -> (u8, String) {
        let error = learned(outcomes, evaluation_loss).unwrap_err();
        (error.exit_code(), error.to_string())
    }

    #[test]
    fn one_step_that_changed_the_weights_is_enough_and_none_is_an_error() {
        let skipped = |what: &str| Outcome::Skipped(what.to_string());
        learned(&[skipped("a"), Outcome::Empty, Outcome::Changed], Some(1.0)).unwrap();
        // A run that only goes on from its last step has counted nothing.
        learned(&[], None).unwrap();
        let (code, sentence) = fault(&[Outcome::Empty, skipped("that of \"a\""), skipped("b")], None);
        assert!(code == 4 && sentence.contains("all 3 optimizer steps"), "{sentence}");
        assert!(
            sentence.contains("2 of them because a gradient was not finite (in the first that of \"a\")"),
            "{sentence}"
        );
        let (code, sentence) = fault(&[Outcome::Empty], Some(1.0));
        assert!(code == 2 && sentence.contains("none of the 1 optimizer steps had an example"), "{sentence}");
        let mut held_back = Learned::default();
        held_back.count_all(Learned { held_back: 4, ..Learned::default() });
        assert!(held_back.check().unwrap_err().to_string().contains("--ratio-threshold"));
    }

    #[test]
    fn an_evaluation_that_gave_no_number_is_an_error_whatever_was_learned() {
        for loss in [f64::NAN, f64::INFINITY] {
            let (code, sentence) = fault(&[Outcome::Changed], Some(loss));
            assert!(code == 4 && sentence.contains(&format!("is {loss} at the end")), "{sentence}");
        }
    }
}
