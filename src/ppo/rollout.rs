//! A rollout: prompts with sampled answers, and everything that is known about them before the update.

use super::roles::Roles;
use super::settings::PpoSettings;
use crate::data::batch::{Batch, Continuation, TokenTree};
use crate::data::schema::Prompt;
use crate::data::tokenize::Tokenizer;
use crate::error::{Error, Result};
use crate::generate::{Answer, Generation, PromptTokens, Stop, generate};
use crate::model::Model;
use crate::model::adapter::Pass;
use crate::numbers::largest;
use crate::ops::Value;
use crate::rewards::{AnswerReward, Asked, Reply};

/// A prompt as it was read and as tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptExample {
    /// As it was read.
    pub record: Prompt,
    /// As the policy reads it.
    pub tokens: Vec<u32>,
}

/// A prompt with its answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// The prompt as it was read.
    pub prompt: Prompt,
    /// Prompt and answers as tokens.
    pub tree: TokenTree,
    /// The answers as text.
    pub replies: Vec<Reply>,
    /// What is known of each answer.
    pub episodes: Vec<Episode>,
}

/// What is known of one sampled answer. Every vector has one number a token of the answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Episode {
    /// Whether the answer ended by itself.
    pub ended: bool,
    /// `log π` as the sampler computed it, with its cache of keys and values.
    pub sampler_log_probs: Vec<f32>,
    /// `log π_old`, by the same operations as the update's, so that the first ratio of an update is 1.
    pub log_probs: Vec<f32>,
    /// `log π_ref`, under the reference.
    pub reference_log_probs: Vec<f32>,
    /// `V_old`, the value model's expectation before each token; empty without one.
    pub values: Vec<f32>,
    /// What the sources of rewards give together.
    pub reward: f32,
    /// What each source of rewards gives.
    pub source_rewards: Vec<f32>,
    /// The same after clipping and the penalty or score for a missing end.
    pub score: f32,
    /// Rewards, KL penalty included, whitened where they are to be.
    pub rewards: Vec<f32>,
    /// The sum of the rewards before whitening.
    pub objective: f64,
    /// Advantages.
    pub advantages: Vec<f32>,
    /// What the value model is trained towards; empty without one.
    pub returns: Vec<f32>,
}

impl Group {
    /// A prompt with answers of which nothing is known but their tokens and text.
    pub fn new(prompt: &PromptExample, answers: Vec<Answer>, tokenizer: &Tokenizer) -> Result<Self> {
        let mut group = Group {
            prompt: prompt.record.clone(),
            tree: TokenTree { prompt: prompt.tokens.clone(), answers: Vec::new() },
            replies: Vec::new(),
            episodes: Vec::new(),
        };
        for Answer { tokens, ended, log_probs } in answers {
            // A stop token of the user's is a part of the text, the tokenizer's own are not.
            let is_end = tokens.last().is_some_and(|token| tokenizer.stop_tokens().contains(token));
            let said = &tokens[..tokens.len() - usize::from(is_end)];
            group.replies.push(Reply { text: tokenizer.decode_answer(&prompt.tokens, said)?, ended });
            group.episodes.push(Episode { ended, sampler_log_probs: log_probs, ..Default::default() });
            group.tree.answers.push(Continuation { learned: vec![true; tokens.len()], tokens });
        }
        Ok(group)
    }

    /// What the sources of rewards see.
    pub fn asked(&self) -> Asked<'_> {
        Asked { prompt: &self.prompt, tree: Some(&self.tree), replies: &self.replies }
    }
}

impl Episode {
    /// Number of tokens of the answer.
    pub fn len(&self) -> usize {
        self.sampler_log_probs.len()
    }

    /// Whether the answer has no token, which no sampled answer is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `Σ (log π_old - log π_ref)`, the k1 estimate of the answer's divergence from the reference.
    pub fn kl(&self) -> f64 {
        let terms = self.log_probs.iter().zip(&self.reference_log_probs);
        terms.map(|(log_prob, reference)| f64::from(log_prob - reference)).sum()
    }

    /// `R`, the sum of the answer's rewards.
    pub fn total_reward(&self) -> f64 {
        self.rewards.iter().map(|&reward| f64::from(reward)).sum()
    }

    /// The largest difference of a log-probability between sampler and update.
    pub fn sampler_difference(&self) -> f32 {
        let pairs = self.sampler_log_probs.iter().zip(&self.log_probs);
        largest(pairs.map(|(sampler, update)| (sampler - update).abs())).unwrap_or(0.0)
    }

    /// Takes what the sources of rewards give, and makes a score of it.
    fn judge(&mut self, reward: AnswerReward, settings: &PpoSettings) {
        let AnswerReward { combined: reward, by_source } = reward;
        self.source_rewards = by_source;
        let clip = settings.episode.reward_clip as f32;
        let clipped = if clip > 0.0 { reward.clamp(-clip, clip) } else { reward };
        self.reward = reward;
        self.score = match (self.ended, settings.episode.missing_eos_score) {
            (true, _) => clipped,
            (false, Some(score)) => score as f32,
            (false, None) => clipped - settings.episode.missing_eos_penalty as f32,
        };
    }
}

/// All episodes of some groups, group after group.
pub fn episodes<'a>(groups: impl IntoIterator<Item = &'a Group>) -> impl Iterator<Item = &'a Episode> {
    groups.into_iter().flat_map(|group| group.episodes.iter())
}

/// Samples answers to each prompt. `first` is the number of answers sampled before, which chooses the random numbers.
pub fn sample(
    policy: &Model,
    prompts: &[&PromptExample],
    settings: &PpoSettings,
    stop: &[u32],
    first: u64,
) -> Result<Vec<Vec<Answer>>> {
    let of_policy = |prompt: &&PromptExample| PromptTokens {
        origin: Some(prompt.record.origin.clone()),
        ..PromptTokens::from(prompt.tokens.clone())
    };
    let asked: Vec<PromptTokens> = prompts.iter().map(of_policy).collect();
    let generation = Generation {
        answers: settings.episode.answers,
        sampling: settings.sampling,
        stop: Stop { tokens: stop, after: settings.episode.stop_after },
        seed: settings.common.seed,
        first,
        tokens_per_pass: settings.common.tokens_per_batch,
    };
    Ok(generate(policy, &asked, &generation)?.answers)
}

/// Prompts with answers of which nothing else is known yet.
pub fn groups(prompts: &[&PromptExample], answers: Vec<Vec<Answer>>, tokenizer: &Tokenizer) -> Result<Vec<Group>> {
    prompts.iter().zip(answers).map(|(prompt, answers)| Group::new(prompt, answers, tokenizer)).collect()
}

/// Lets policy, reference, value model and the sources of rewards look at every answer once.
///
/// # Errors
/// Where one of the models gives a number that is not finite: no penalty or clip makes one of it.
pub fn look(roles: &mut Roles, policy: &Model, groups: &mut [Group], settings: &PpoSettings) -> Result<()> {
    let (temperature, budget) = (settings.sampling.temperature, settings.common.tokens_per_batch);
    let of_policy = log_probs("policy", policy, groups, temperature, budget)?;
    let of_reference = log_probs("reference", &roles.reference, groups, temperature, budget)?;
    let of_value = match &roles.value {
        Some(value) => values(&value.model.frozen()?, groups, budget)?,
        None => vec![Vec::new(); of_policy.len()],
    };
    let asked: Vec<Asked> = groups.iter().map(Group::asked).collect();
    let rewards = roles.rewards.score(&asked, budget)?.concat();
    let episodes = groups.iter_mut().flat_map(|group| group.episodes.iter_mut());
    let known = of_policy.into_iter().zip(of_reference).zip(of_value).zip(rewards);
    for (episode, (((of_policy, of_reference), of_value), reward)) in episodes.zip(known) {
        episode.log_probs = of_policy;
        episode.reference_log_probs = of_reference;
        episode.values = of_value;
        episode.judge(reward, settings);
    }
    Ok(())
}

/// Log-probabilities of every answer's tokens under a frozen model, which is the `role`.
///
/// # Errors
/// Where one of them is not finite.
pub fn log_probs(
    role: &str,
    model: &Model,
    groups: &[Group],
    temperature: f64,
    tokens_per_batch: usize,
) -> Result<Vec<Vec<f32>>> {
    let found = over_batches(model, groups, tokens_per_batch, |hidden, batch| {
        let log_probs: Vec<f32> = model.log_probs(hidden, batch, temperature)?.log_probs.to_vec1()?;
        Ok(batch.answer_targets.iter().map(|range| log_probs[range.clone()].to_vec()).collect())
    })?;
    check_finite(&format!("the log-probability under the {role}"), model, groups, &found)?;
    Ok(found)
}

/// Refuses numbers, one a token of every answer, that are not finite; `what` they are.
fn check_finite(what: &str, model: &Model, groups: &[Group], found: &[Vec<f32>]) -> Result<()> {
    let answers = groups.iter().flat_map(|group| (0..group.episodes.len()).map(move |answer| (group, answer)));
    for ((group, answer), numbers) in answers.zip(found) {
        if let Some(place) = numbers.iter().position(|number| !number.is_finite()) {
            return Err(Error::NotFinite(format!(
                "{what} is {} at token {place} of answer {answer} to the prompt of {}: the model itself ({}) gives numbers that are not finite. Try a \
                 smaller --learning-rate, or start from weights that are finite",
                numbers[place],
                group.prompt.origin,
                model.folder().name()
            )));
        }
    }
    Ok(())
}

/// Values before every token of every answer under a frozen model.
fn values(model: &Model, groups: &[Group], tokens_per_batch: usize) -> Result<Vec<Vec<f32>>> {
    let found = over_batches(model, groups, tokens_per_batch, |hidden, batch| {
        let rows: Vec<usize> = batch.targets.iter().map(|target| target.row).collect();
        let values: Vec<f32> = model.values(hidden, &rows)?.to_vec1()?;
        Ok(batch.answer_targets.iter().map(|range| values[range.clone()].to_vec()).collect())
    })?;
    check_finite("what the value model expects", model, groups, &found)?;
    Ok(found)
}

fn over_batches<T>(
    model: &Model,
    groups: &[Group],
    tokens_per_batch: usize,
    read: impl Fn(&Value, &Batch) -> Result<Vec<T>>,
) -> Result<Vec<T>> {
    let mut results = Vec::new();
    for range in model.passes(groups.iter().map(|group| &group.tree), tokens_per_batch) {
        let batch = model.pack(groups[range].iter().map(|group| &group.tree));
        let hidden = model.hidden(&batch, &Pass::default())?; // [tokens, d_model]
        results.extend(read(&hidden, &batch)?);
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::from_arguments;

    #[test]
    fn a_score_is_clipped_and_a_missing_end_costs_or_replaces_it() {
        let score = |flags: &[&str], reward: f32, ended: bool| {
            let needed = ["--model", "m", "--reward-model", "r", "--data", "d", "--output", "o"];
            let settings: PpoSettings = from_arguments(needed.iter().chain(flags)).unwrap();
            let mut episode = Episode { ended, ..Default::default() };
            episode.judge(AnswerReward { combined: reward, by_source: vec![reward] }, &settings);
            (episode.reward, episode.score)
        };
        assert_eq!(score(&[], 3.0, true), (3.0, 3.0));
        assert_eq!(score(&[], 3.0, false), (3.0, 2.0));
        assert_eq!(score(&["--reward-clip", "2"], -3.0, true), (-3.0, -2.0));
        assert_eq!(score(&["--reward-clip", "2"], 3.0, false), (3.0, 1.0));
        assert_eq!(score(&["--missing-eos-score", "-1"], 3.0, false), (3.0, -1.0));
        assert_eq!(score(&["--missing-eos-score", "-1"], 3.0, true), (3.0, 3.0));
    }
}
