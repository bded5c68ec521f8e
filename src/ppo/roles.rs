//! The models of PPO in their roles. With a lightweight method all stand on one copy of the base.

use std::path::Path;

use super::settings::{PpoSettings, ValueHead, ValueSource};
use crate::adapt::{Bases, Head, Role, Training};
use crate::bail;
use crate::data::tokenize::Tokenizer;
use crate::error::Result;
use crate::model::Model;
use crate::rewards::Rewards;
use crate::settings::Pooling;
use crate::train::ema::MovingAverage;
use crate::train::optimizer::Optimizer;

/// A model that trains, with its optimizer.
pub struct Learner {
    /// The model.
    pub model: Model,
    /// Its optimizer.
    pub optimizer: Optimizer,
}

/// Policy, value model, reference and rewards.
pub struct Roles {
    /// The policy.
    pub policy: Learner,
    /// The moving average of its weights, where one is wanted.
    pub average: Option<MovingAverage>,
    /// The value model, where the algorithm has one.
    pub value: Option<Learner>,
    /// The policy as it was at the start, frozen.
    pub reference: Model,
    /// What judges, frozen.
    pub rewards: Rewards,
}

impl Roles {
    /// Reads all models, each base once.
    pub fn load(settings: &PpoSettings, bases: &mut Bases, tokenizer: &Tokenizer) -> Result<Self> {
        let (training, seed) = (&settings.training, settings.common.seed);
        let policy_role = Role {
            folder: &settings.model.model,
            adapters: &settings.model.adapter,
            training: Training::With(training),
            head: Head::Language,
            seed,
        };
        let model = bases.load(&policy_role)?;
        let policy = Learner { optimizer: Optimizer::of(&model, training, &settings.model)?, model };
        let decay = settings.policy.ema_decay;
        let average = (decay > 0.0).then(|| MovingAverage::new(policy.optimizer.variables(), decay)).transpose()?;
        let reference = bases.load(&Role { training: Training::Frozen, ..policy_role })?;
        let rewards = Rewards::open(&settings.rewards, bases, tokenizer, settings.common.max_length, seed)?;
        let value = match settings.algorithm.has_values() {
            true => Some(value_model(settings, &policy_role, &rewards, bases)?),
            false => None,
        };
        Ok(Roles { policy, average, value, reference, rewards })
    }

    /// Runs `with` on the policy that is saved and judged: the moving average of its weights where there is one.
    pub fn with_saved_policy<T>(&mut self, with: impl FnOnce(&Learner) -> Result<T>) -> Result<T> {
        let Roles { policy, average, .. } = self;
        if let Some(average) = average {
            average.swap(policy.optimizer.variables())?;
        }
        let result = with(policy);
        if let Some(average) = average {
            average.swap(policy.optimizer.variables())?;
        }
        result
    }
}

/// The value model: from the first reward model, head and all, or from the policy with a new head. Its training is its own.
fn value_model(settings: &PpoSettings, policy: &Role, rewards: &Rewards, bases: &mut Bases) -> Result<Learner> {
    let training = &settings.training;
    let model = match (settings.value_source(), rewards.models().first()) {
        (ValueSource::Policy, _) => {
            let mut model = bases.load(&Role { head: Head::ScalarOrNew, ..*policy })?;
            if let (ValueHead::Zero, Some(head)) = (settings.value.value_head, model.head_mut()) {
                head.set_to_zero()?;
            }
            model
        }
        (ValueSource::Reward, Some(reward)) => {
            if !reward.reads_tokens() {
                bail!(
                    "{}: this reward model has another tokenizer than the policy, or is an encoder, so no value model can start from it: that has to say \
                     something after every token of the policy's; give --value-from policy",
                    reward.folder().display()
                );
            }
            let role = Role { folder: reward.folder(), adapters: &[], head: Head::Scalar, ..*policy };
            let model = bases.load(&role)?;
            check_reads_last(&model, reward.folder())?;
            model
        }
        (ValueSource::Reward, None) => {
            bail!("there is no --reward-model that the value model could start from; give --value-from policy")
        }
    };
    let optimizer = Optimizer::new(model.trainable_parameters(), &training.optimizer)?;
    Ok(Learner { model, optimizer })
}

fn check_reads_last(model: &Model, folder: &Path) -> Result<()> {
    if model.head().is_some_and(|head| head.form.pooling != Pooling::Last) {
        bail!(
            "{}: the head of this reward model reads a text's first token or mean, and the value model has to say something after every token; give \
             --value-from policy, or train a reward model without --pooling",
            folder.display()
        );
    }
    Ok(())
}
