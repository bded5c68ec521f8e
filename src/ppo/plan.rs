//! What `ppo` shows before it starts.

use super::Material;
use super::roles::Roles;
use super::settings::{PpoSettings, presets};
use crate::data::tokenize_records::Truncation;
use crate::generate::MOST_ACTIVE;
use crate::train::plan::{Examples, InMemory, Plan, training_plan};

/// Parameters, data, memory by role, where the reward comes from, and what preset and algorithm set.
pub fn plan(
    settings: &PpoSettings,
    roles: &Roles,
    material: &Material,
    truncation: Truncation,
    total_updates: usize,
) -> Plan {
    let training = &settings.training;
    let prompts = &material.prompts;
    let tokens_of = |length: usize| length + settings.episode.answers * settings.sampling.response_length;
    let tokens: usize = prompts.iter().map(|prompt| tokens_of(prompt.tokens.len())).sum();
    let evaluation = material.held_out.as_ref().map_or(0, |held_out| held_out.len());
    let examples = Examples { what: "prompts", training: prompts.len(), evaluation, tokens, truncation };
    let mut models = vec![InMemory { role: "policy", model: &roles.policy.model }];
    models.extend(roles.value.iter().map(|value| InMemory { role: "value model", model: &value.model }));
    models.push(InMemory { role: "reference", model: &roles.reference });
    models.extend(roles.rewards.models().iter().map(|model| InMemory { role: "reward model", model: model.model() }));
    let at_once = settings.prompts_an_update().min(MOST_ACTIVE.div_ceil(settings.episode.answers));
    let cached_tokens = at_once * tokens.div_ceil(prompts.len());
    let mut plan = training_plan("ppo", &models, &settings.common, training, &examples, cached_tokens)
        .line("updates", format!("{total_updates} of {} answers", training.batch_size));
    for model in roles.rewards.models() {
        let reading = if model.reads_tokens() { "" } else { " (reads the answers' text)" };
        plan = plan.line("reward model", format!("{}{reading}", model.folder().display()));
    }
    if let Some(command) = &settings.rewards.reward_command {
        plan = plan.line("reward command", command);
    }
    if let Some(mix) = &material.mix {
        plan = plan.line("pretraining mix", format!("{} texts", mix.len()));
    }
    let set = presets::lines(settings);
    if !set.is_empty() {
        let name = settings.preset.map_or_else(|| settings.algorithm.name(), |preset| preset.name());
        plan = plan.line("set by", name);
    }
    set.into_iter().fold(plan, |plan, (name, value)| plan.line(&format!("  {name}"), value))
}
