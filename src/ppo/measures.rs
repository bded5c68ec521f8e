//! What is measured of an update, and the names under which it is recorded: TRL's, where TRL has them.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::rollout::{Episode, Group, episodes};
use super::settings::PpoSettings;
use super::update::{Step, UpdateReport};

/// A number with the name that it is recorded under.
pub type Metric = (Cow<'static, str>, f64);

/// What the warnings look at.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// Answers of the rollout.
    pub episodes: usize,
    /// Mean divergence of an answer from the reference, in nats (k1).
    pub kl: f64,
    /// Mean score of an answer.
    pub score: f64,
    /// Mean entropy of the policy at a token, in nats.
    pub entropy: f64,
    /// `1 - Var(R - V) / Var(R)` over the tokens of the rollout; none without a value model.
    pub explained_variance: Option<f64>,
    /// Share of answers that did not end by themselves.
    pub no_eos: f64,
    /// Mean number of tokens of an answer.
    pub length: f64,
    /// Texts that lost a part to the greatest length before a reward model read them, so far.
    pub truncated: usize,
    /// Share of answers whose text an answer to another prompt of the rollout has too.
    pub repeated: f64,
}

impl Measures {
    /// Of a rollout and its update, and of the texts that reward models have had to cut.
    pub fn new(groups: &[Group], report: &UpdateReport, truncated: usize) -> Self {
        let mean = |of: &dyn Fn(&Episode) -> f64| {
            episodes(groups).map(of).sum::<f64>() / episodes(groups).count().max(1) as f64
        };
        Measures {
            episodes: episodes(groups).count(),
            kl: mean(&Episode::kl),
            score: mean(&|episode| f64::from(episode.score)),
            entropy: report.policy.entropy,
            explained_variance: explained_variance(groups),
            no_eos: mean(&|episode| f64::from(u8::from(!episode.ended))),
            length: mean(&|episode| episode.len() as f64),
            truncated,
            repeated: repeated(groups),
        }
    }
}

fn explained_variance(groups: &[Group]) -> Option<f64> {
    let pairs: Vec<(f64, f64)> = episodes(groups)
        .flat_map(|episode| episode.returns.iter().zip(&episode.values))
        .map(|(&expected, &value)| (f64::from(expected), f64::from(value)))
        .collect();
    let variance = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let mean = pairs.iter().map(of).sum::<f64>() / pairs.len() as f64;
        pairs.iter().map(|pair| (of(pair) - mean).powi(2)).sum::<f64>()
    };
    (!pairs.is_empty()).then(|| {
        1.0 - variance(&|(expected, value)| expected - value) / variance(&|(expected, _)| *expected).max(1e-12)
    })
}

/// The share of answers whose text an answer to another prompt of the rollout has too.
fn repeated(groups: &[Group]) -> f64 {
    let mut prompts_of: HashMap<&str, HashSet<usize>> = HashMap::new();
    let texts = || {
        groups
            .iter()
            .enumerate()
            .flat_map(|(index, group)| group.replies.iter().map(move |reply| (index, reply.text.trim())))
    };
    for (prompt, text) in texts() {
        prompts_of.entry(text).or_default().insert(prompt);
    }
    texts().filter(|(_, text)| prompts_of[text].len() > 1).count() as f64 / texts().count().max(1) as f64
}

/// The total loss and everything that is recorded of an update.
pub fn metrics(
    groups: &[Group],
    measures: &Measures,
    report: &UpdateReport,
    settings: &PpoSettings,
    step: Step,
) -> (f64, Vec<Metric>) {
    let count = episodes(groups).count() as f64;
    let mean = |of: &dyn Fn(&Episode) -> f64| episodes(groups).map(of).sum::<f64>() / count;
    let Step { learning_rate, value_learning_rate, kl_coefficient, .. } = step;
    let in_reward = mean(&|episode| episode.objective);
    let loss_kl = settings.loss_kl(kl_coefficient);
    let loss = report.policy.loss + settings.value.value_coefficient * report.value_loss + loss_kl * report.policy.kl
        - settings.policy.entropy_coefficient * report.policy.entropy
        + settings.ptx.ptx_coefficient * report.ptx_loss;
    let mut metrics = vec![
        ("objective/kl", measures.kl),
        ("objective/kl_coefficient", kl_coefficient),
        ("objective/entropy", mean(&|episode| -episode.log_probs.iter().map(|&x| f64::from(x)).sum::<f64>())),
        ("objective/non_score_reward", in_reward - measures.score),
        ("objective/rlhf_reward", in_reward),
        ("objective/scores", measures.score),
        ("objective/rewards", mean(&|episode| f64::from(episode.reward))),
        ("policy/approxkl_avg", report.policy.approximate_kl),
        ("policy/clipfrac_avg", report.policy.clipped),
        ("policy/entropy_avg", report.policy.entropy),
        ("policy/gradient_norm", report.policy_gradient_norm),
        ("loss/policy_avg", report.policy.loss),
        ("val/ratio", report.policy.ratio),
        ("val/first_ratio", report.first.ratio),
        (
            "val/sampler_difference",
            episodes(groups).map(|episode| f64::from(episode.sampler_difference())).fold(0.0, f64::max),
        ),
        ("val/num_eos_tokens", count * (1.0 - measures.no_eos)),
        ("val/no_eos_share", measures.no_eos),
        ("val/response_length", measures.length),
        ("val/repeated_share", measures.repeated),
        ("val/truncated_for_reward", measures.truncated as f64),
        ("minibatches", report.minibatches as f64),
        ("minibatches_over_ratio", report.over_ratio as f64),
        ("stopped_early", f64::from(u8::from(report.stopped_early))),
        ("skipped_steps", report.skipped as f64),
        ("lr", learning_rate),
        ("episodes", count),
    ];
    if let Some(explained) = measures.explained_variance {
        metrics.extend([
            ("loss/value_avg", report.value_loss),
            ("val/clipfrac_avg", report.value_clipped),
            ("val/gradient_norm", report.value_gradient_norm),
            ("val/explained_variance", explained),
            ("value_lr", value_learning_rate),
        ]);
    }
    if loss_kl > 0.0 {
        metrics.push(("loss/kl_avg", report.policy.kl));
    }
    if settings.ptx.ptx_data.is_some() {
        metrics.push(("loss/ptx_avg", report.ptx_loss));
    }
    (loss, metrics.into_iter().map(|(name, value)| (name.into(), value)).collect())
}

/// Of each source of rewards, where there are several, the mean and the standard deviation (of the population) of what it gave, under TRL's names.
pub fn source_metrics(groups: &[Group], names: &[String]) -> Vec<Metric> {
    if names.len() < 2 {
        return Vec::new();
    }
    let count = episodes(groups).count().max(1) as f64;
    let of_source = |(source, name): (usize, &String)| {
        let rewards = || episodes(groups).map(move |episode| f64::from(episode.source_rewards[source]));
        let mean = rewards().sum::<f64>() / count;
        let variance = rewards().map(|reward| (reward - mean).powi(2)).sum::<f64>() / count;
        [(format!("rewards/{name}/mean").into(), mean), (format!("rewards/{name}/std").into(), variance.sqrt())]
    };
    names.iter().enumerate().flat_map(of_source).collect()
}
