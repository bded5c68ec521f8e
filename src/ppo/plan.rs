//! What `ppo` shows before it starts: memory by role before a model is read, then everything else.

use indicatif::DecimalBytes;

use super::Material;
use super::roles::Roles;
use super::rollout::PromptExample;
use super::settings::{PpoSettings, ValueSource, presets};
use crate::adapt;
use crate::error::Result;
use crate::generate::MOST_ACTIVE;
use crate::train::examples::Examples;
use crate::train::memory::{self, Footprint};
use crate::train::plan::{Plan, Workload, training_plan};

/// Memory by role, from the models' configurations alone.
pub fn memory(settings: &PpoSettings, prompts: &Examples<PromptExample>) -> Result<Plan> {
    let training = Some(&settings.training);
    let of = |role, training| Footprint::before_reading(role, &settings.model.model, &settings.model.adapter, training);
    let mut models = vec![of("policy", training)?];
    if settings.algorithm.has_values() {
        models.push(match (settings.value_source(), settings.rewards.reward_model.first()) {
            (ValueSource::Reward, Some(folder)) => Footprint::before_reading("value model", folder, &[], training)?,
            _ => of("value model", training)?,
        });
    }
    if settings.policy.ema_decay > 0.0 {
        models.push(Footprint::of_average(models[0].trained));
    }
    models.push(of("reference", None)?);
    for (role, folders) in
        [("reward model", &settings.rewards.reward_model), ("judge", &settings.observation.judge.judge_model)]
    {
        for folder in folders {
            models.push(Footprint::before_reading(role, folder, &[], None)?);
        }
    }
    let (_, architecture) = adapt::base(&settings.model.model, &settings.model.adapter)?;
    let step = settings.prompts_an_update() * tokens_of_one(settings, prompts);
    let micro_batch = settings.common.tokens_per_batch.min(step);
    let sampler = (&architecture, cached_tokens(settings, prompts));
    memory::check(&models, micro_batch, sampler)?;
    let parts = memory::expected(&models, micro_batch, sampler);
    let plan = Plan::new("memory by role, before a model is read").memory(parts.iter().map(|(_, bytes)| bytes).sum());
    Ok(parts.into_iter().fold(plan, |plan, (what, bytes)| plan.line(&format!("  {what}"), DecimalBytes(bytes))))
}

/// Tokens of a prompt and its answers at their longest.
fn tokens(settings: &PpoSettings, prompt: &PromptExample) -> usize {
    prompt.tokens.len() + settings.episode.answers * settings.sampling.response_length
}

/// The mean of that.
fn tokens_of_one(settings: &PpoSettings, prompts: &Examples<PromptExample>) -> usize {
    prompts.sum(|prompt| tokens(settings, prompt)).div_ceil(prompts.len().max(1))
}

/// Tokens whose keys and values the sampler holds.
fn cached_tokens(settings: &PpoSettings, prompts: &Examples<PromptExample>) -> usize {
    let at_once = settings.prompts_an_update().min(MOST_ACTIVE.div_ceil(settings.episode.answers));
    at_once * tokens_of_one(settings, prompts)
}

/// How several rewards are combined.
fn combination(settings: &PpoSettings) -> String {
    let rewards = &settings.rewards;
    let how = rewards.reward_combination.name();
    match rewards.reward_weights.is_empty() {
        true => how.to_string(),
        false => {
            let weights: Vec<String> = rewards.reward_weights.iter().map(f64::to_string).collect();
            format!("{how}, weights {}", weights.join(", "))
        }
    }
}

/// Parameters, data, memory as the models are, where the reward comes from, and what preset and algorithm set.
pub fn plan(settings: &PpoSettings, roles: &Roles, material: &Material, total_updates: usize) -> Result<Plan> {
    let training = &settings.training;
    let prompts = &material.prompts;
    let evaluation = material.held_out.as_ref().map_or(0, |held_out| held_out.len());
    let workload = Workload { evaluation, ..Workload::new("prompts", prompts, |prompt| tokens(settings, prompt)) };
    let mut beside: Vec<Footprint> =
        roles.value.iter().map(|value| Footprint::of("value model", &value.model)).collect();
    if roles.average.is_some() {
        beside.push(Footprint::of_average(roles.policy.model.trainable_count()));
    }
    beside.push(Footprint::of("reference", &roles.reference));
    beside.extend(roles.rewards.models().iter().map(|model| Footprint::of("reward model", model.model())));
    let judges = material.held_out.iter().flat_map(|held_out| held_out.judge_models());
    beside.extend(judges.map(|judge| Footprint::of("judge", judge.model())));
    let cached_tokens = cached_tokens(settings, prompts);
    let mut plan =
        training_plan("ppo", &roles.policy.model, &beside, &settings.common, training, &workload, cached_tokens)?
            .line("updates", format!("{total_updates} of {} answers", training.batch_size));
    for model in roles.rewards.models() {
        let reading = if model.reads_tokens() { "" } else { " (reads the answers' text)" };
        plan = plan.line("reward model", format!("{}{reading}", model.folder().display()));
    }
    if let Some(command) = &settings.rewards.reward_command {
        plan = plan.line("reward command", command);
    }
    for (index, rule) in roles.rewards.rules().iter().enumerate() {
        plan = plan.line(if index == 0 { "reward rules" } else { "" }, rule.name());
    }
    if settings.rewards.sources() > 1 {
        plan = plan.line("rewards together", combination(settings));
    }
    if let Some(mix) = &material.mix {
        plan = plan.line("pretraining mix", format!("{} texts", mix.len()));
    }
    let set = presets::lines(settings);
    if !set.is_empty() {
        let name = settings.preset.map_or_else(|| settings.algorithm.name(), |preset| preset.name());
        plan = plan.line("set by", name);
    }
    Ok(set.into_iter().fold(plan, |plan, (name, value)| plan.line(&format!("  {name}"), value)))
}
