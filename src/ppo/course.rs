//! How far a run has come: all that changes from update to update, as a checkpoint holds it.

use serde::{Deserialize, Serialize};

use super::kl::KlCoefficient;
use super::ptx::PretrainingMix;
use super::roles::Roles;
use super::settings::PpoSettings;
use super::watch::{Seen, Watch};
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::generate::Answer;
use crate::train::state::{StateReader, StateWriter};

/// What is carried from one update to the next, beside the models.
pub struct Course {
    /// The weight of the KL penalty.
    pub kl_coefficient: KlCoefficient,
    /// Signs of trouble.
    pub watch: Watch,
    /// The answers to each prompt of an update that was interrupted after they were sampled.
    pub rollout: Option<Vec<Vec<Answer>>>,
}

/// The same in a checkpoint, beside the optimizers.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    kl_coefficient: f64,
    seen: Seen,
    /// Minibatches that have had texts of the pretraining mix.
    pretraining: usize,
    /// Texts that reward models have had to cut.
    truncations: Vec<Truncation>,
    rollout: Option<Vec<Vec<Answer>>>,
}

const RECORD: &str = "course";
const POLICY: &str = "policy";
const VALUE: &str = "value";

impl Course {
    /// At the start.
    pub fn new(settings: &PpoSettings) -> Self {
        let watch = Watch::new(&settings.watch, Seen::default());
        Course { kl_coefficient: KlCoefficient::new(&settings.kl), watch, rollout: None }
    }

    /// Adds everything to a checkpoint's state.
    pub fn add_to<'a>(
        &self,
        state: &mut StateWriter<'a>,
        roles: &'a Roles,
        mix: Option<&PretrainingMix>,
    ) -> Result<()> {
        roles.policy.optimizer.add_to(state, POLICY)?;
        if let Some(value) = &roles.value {
            value.optimizer.add_to(state, VALUE)?;
        }
        if let Some(average) = &roles.average {
            average.add_to(state);
        }
        let record = Record {
            kl_coefficient: self.kl_coefficient.value(),
            seen: self.watch.seen().clone(),
            pretraining: mix.map_or(0, PretrainingMix::taken),
            truncations: roles.rewards.truncations(),
            rollout: self.rollout.clone(),
        };
        state.value(RECORD, &record)
    }

    /// Takes everything back.
    pub fn take_from(
        &mut self,
        state: &mut StateReader,
        roles: &mut Roles,
        mix: Option<&mut PretrainingMix>,
        settings: &PpoSettings,
    ) -> Result<()> {
        let record: Record = state.value(RECORD)?;
        roles.policy.optimizer.take_from(state, POLICY)?;
        if let Some(value) = &mut roles.value {
            value.optimizer.take_from(state, VALUE)?;
        }
        if let Some(average) = &mut roles.average {
            average.take_from(state)?;
        }
        roles.rewards.count_from(&record.truncations);
        if let Some(mix) = mix {
            mix.go_on_after(record.pretraining);
        }
        self.kl_coefficient = self.kl_coefficient.at(record.kl_coefficient);
        self.watch = Watch::new(&settings.watch, record.seen);
        self.rollout = record.rollout;
        Ok(())
    }
}
