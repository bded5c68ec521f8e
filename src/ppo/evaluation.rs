//! Answers to held-out prompts, and a judge that nothing is trained against: what tells a better policy from one that exploits the reward.

use super::roles::Roles;
use super::rollout::{self, Group, PromptExample, episodes};
use super::settings::PpoSettings;
use crate::adapt::Bases;
use crate::bail;
use crate::data::schema;
use crate::data::splits::Pattern;
use crate::data::table::TableRows;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::random;
use crate::rewards::{AnswerReward, Asked, RewardModel, Rewards};
use crate::world::files::read_cases;
use crate::world::rule::{Case, judge};

/// Held-out prompts and who judges the answers to them.
pub struct HeldOut {
    prompts: Vec<PromptExample>,
    truncation: Truncation,
    judge: Judge,
    settings: PpoSettings,
}

enum Judge {
    /// The rule of the world that ships with the project.
    Rule(Vec<Case>),
    /// Reward models, classifiers, a command or rules.
    Rewards(Rewards),
}

/// What an evaluation found: means over the answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeldOutReport {
    /// What the held-out judge says.
    pub judge: f64,
    /// What the sources of rewards say, which the policy is trained against.
    pub reward: f64,
    /// Divergence from the reference, in nats.
    pub kl: f64,
    /// Tokens.
    pub length: f64,
}

impl HeldOut {
    /// Reads `--evaluation-data` and the judge, whose models share their base with others of `bases`; `None` without such data.
    pub fn read(settings: &PpoSettings, bases: &mut Bases, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let Some(pattern) = &settings.observation.evaluation_data else { return Ok(None) };
        // All of them are kept, as all are answered at every evaluation.
        let mut truncation = Truncation::default();
        let prompt = |record| super::prompt_example(record?, settings, tokenizer, &mut truncation);
        let prompts = schema::records(Pattern::evaluation(pattern), settings.prompt_layouts())?;
        let prompts = prompts.map(prompt).collect::<Result<Vec<_>>>()?;
        let limit = settings.rewards.reward_timeout;
        let (max_length, seed) = (settings.common.max_length, settings.common.seed);
        let judge = match Rewards::judge(&settings.observation.judge, limit, bases, tokenizer, max_length, seed)? {
            Some(rewards) => Judge::Rewards(rewards),
            None if is_of_the_world(pattern)? => Judge::Rule(read_cases(pattern)?),
            None => bail!(
                "{pattern}: these prompts are judged by nothing: give --judge-model, --judge-classifier, \
                 --judge-command or --judge-rule (data of the world, with the columns kind, facts and expected, is \
                 judged by its own rule)"
            ),
        };
        if let Judge::Rewards(rewards) = &judge {
            prompts.iter().try_for_each(|prompt| rewards.check_row(&prompt.record))?;
        }
        // The same random numbers each time, other ones than the rollouts'.
        let mut settings = settings.clone();
        settings.common.seed = random::named_seed(settings.common.seed, "evaluation");
        settings.episode.answers = 1;
        Ok(Some(HeldOut { prompts, truncation, judge, settings }))
    }

    /// Tokens of the longest prompt.
    pub fn longest(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.tokens.len()).max().unwrap_or(0)
    }

    /// The prompts.
    pub fn prompts(&self) -> &[PromptExample] {
        &self.prompts
    }

    /// How many prompts were cut.
    pub fn truncation(&self) -> Truncation {
        self.truncation
    }

    /// The models that judge; none where classifiers, a command or rules do.
    pub fn judge_models(&self) -> &[RewardModel] {
        match &self.judge {
            Judge::Rewards(rewards) => rewards.models(),
            Judge::Rule(_) => &[],
        }
    }

    /// Number of prompts.
    pub fn len(&self) -> usize {
        self.prompts.len()
    }

    /// Whether there is no prompt, which data that was read never has.
    pub fn is_empty(&self) -> bool {
        self.prompts.is_empty()
    }

    /// Lets the policy as it would be saved now answer, and everyone judge.
    pub fn evaluate(&mut self, roles: &mut Roles, tokenizer: &Tokenizer, stop: &[u32]) -> Result<HeldOutReport> {
        let settings = &self.settings;
        let (temperature, budget) = (settings.sampling.temperature, settings.common.tokens_per_batch);
        let prompts: Vec<&PromptExample> = self.prompts.iter().collect();
        let mut groups = roles.with_policy_as_saved(|policy| {
            let policy = policy.model.frozen()?;
            let answers = rollout::sample(&policy, &prompts, settings, stop, 0)?;
            let mut groups = rollout::groups(&prompts, answers, tokenizer)?;
            let log_probs = rollout::log_probs("policy", &policy, &groups, temperature, budget)?;
            groups.iter_mut().zip(log_probs).for_each(|(group, found)| group.episodes[0].log_probs = found);
            Ok(groups)
        })?;
        let reference = rollout::log_probs("reference", &roles.reference, &groups, temperature, budget)?;
        groups.iter_mut().zip(reference).for_each(|(group, found)| group.episodes[0].reference_log_probs = found);
        let asked: Vec<Asked> = groups.iter().map(Group::asked).collect();
        let rewards = combined(roles.rewards.score(&asked, budget)?);
        let judged: Vec<f32> = match &mut self.judge {
            Judge::Rewards(judge) => combined(judge.score(&asked, budget)?),
            Judge::Rule(cases) => {
                cases.iter().zip(&groups).map(|(case, group)| judge(case, &group.replies[0].text).utility).collect()
            }
        };
        let count = groups.len() as f64;
        let mean = |numbers: &[f32]| numbers.iter().map(|&number| f64::from(number)).sum::<f64>() / count;
        Ok(HeldOutReport {
            judge: mean(&judged),
            reward: mean(&rewards),
            kl: episodes(&groups).map(|episode| episode.kl()).sum::<f64>() / count,
            length: episodes(&groups).map(|episode| episode.len() as f64).sum::<f64>() / count,
        })
    }
}

/// What the sources give together, answer after answer.
fn combined(rewards: Vec<Vec<AnswerReward>>) -> Vec<f32> {
    rewards.into_iter().flatten().map(|reward| reward.combined).collect()
}

/// Whether the rule of the world can judge the answers to these prompts.
fn is_of_the_world(pattern: &str) -> Result<bool> {
    let rows = TableRows::open(Pattern::evaluation(pattern))?;
    let has_columns = |names: [&str; 3]| {
        rows.schemas().iter().all(|(_, schema)| names.iter().all(|name| schema.field_with_name(name).is_ok()))
    };
    Ok(has_columns(["kind", "facts", "expected"]))
}
