//! What `ppo` shows before it starts: memory by role before a model is read, then everything else.

use clap::ValueEnum;
use indicatif::DecimalBytes;

use super::Material;
use super::roles::Roles;
use super::rollout::PromptExample;
use super::settings::{PpoSettings, ValueSource, presets};
use crate::adapt;
use crate::classifier::Classifier;
use crate::data::batch::largest_run;
use crate::data::tokenize_records::Truncation;
use crate::error::Result;
use crate::generate::CacheSize;
use crate::model::Model;
use crate::model::architecture::Architecture;
use crate::rewards::ClassifierLabel;
use crate::train::examples::Examples;
use crate::train::memory::{self, Footprint, PassRows};
use crate::train::plan::{Plan, Sizes, TrainingPlan, Workload};
use crate::train::schedule::Schedule;

/// Memory by role, from the models' configurations alone.
pub fn memory(settings: &PpoSettings, prompts: &Examples<PromptExample>) -> Result<Plan> {
    let training = Some(&settings.training);
    let form = settings.common.base_precision.form();
    let of = |role, training| {
        Footprint::before_reading(role, &settings.model.model, &settings.model.adapter, form, training)
    };
    let mut models = vec![of("policy", training)?.with_tokenizer(&settings.model.model)];
    if settings.algorithm.has_values() {
        models.push(match (settings.value_source(), settings.rewards.reward_model.first()) {
            (ValueSource::Reward, Some(folder)) => {
                Footprint::before_reading("value model", folder, &[], form, training)?
            }
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
            models.push(Footprint::before_reading(role, folder, &[], form, None)?.with_tokenizer(folder));
        }
    }
    models.extend(classifiers(settings)?);
    let (_, architecture) = adapt::base(&settings.model.model, &settings.model.adapter)?;
    let of_one = prompts.known().map(|prompt| tokens(settings, &prompt.value)).max().unwrap_or(0);
    let rows = rows_of_step(settings, settings.prompts_an_update() * tokens_of_one(settings, prompts), of_one);
    let cache = cache(settings, prompts, &architecture).bytes();
    memory::check(&models, rows, cache)?;
    let parts = memory::expected(&models, rows, cache);
    let plan = Plan::new("memory by role, before a model is read").memory(parts.iter().map(|(_, bytes)| bytes).sum());
    Ok(parts.into_iter().fold(plan, |plan, (what, bytes)| plan.line(&format!("  {what}"), DecimalBytes(bytes))))
}

/// The weights of the classifiers that judge.
fn classifiers(settings: &PpoSettings) -> Result<Vec<Footprint>> {
    let rewards = settings.rewards.reward_classifier.iter().map(|given| ("reward classifier", given));
    let judges = settings.observation.judge.judge_classifier.iter().map(|given| ("judging classifier", given));
    let of = |(role, given): (&'static str, &ClassifierLabel)| {
        // Each is read by itself.
        let copy = format!("{role} {given}");
        Ok(Footprint::of_weights(role, copy, Classifier::stored_bytes(given.folder())?))
    };
    rewards.chain(judges).map(of).collect()
}

/// Tokens of a prompt and its answers at their longest.
fn tokens(settings: &PpoSettings, prompt: &PromptExample) -> usize {
    prompt.tokens.len() + settings.episode.answers * settings.sampling.response_length
}

/// The rows at a time of an update in which there are so many, of which those of one prompt are never divided: models
/// score all of its episodes and learn from one minibatch of them after the other.
fn rows_of_step(settings: &PpoSettings, rows: usize, of_one: usize) -> PassRows {
    let most = settings.common.tokens_per_batch.max(of_one);
    let prompts = settings.prompts_an_update();
    // The largest minibatch, where prompts do not divide evenly among them.
    let learned = rows * prompts.div_ceil(settings.policy.minibatches) / prompts;
    PassRows { learned: most.min(learned.max(of_one)), forward: most.min(rows), of_one }
}

/// The mean of that.
fn tokens_of_one(settings: &PpoSettings, prompts: &Examples<PromptExample>) -> usize {
    prompts.sum(|prompt| tokens(settings, prompt)).div_ceil(prompts.len().max(1))
}

/// The rows of the same in the policy or the value model, whichever has more.
fn rows_of_prompt(settings: &PpoSettings, roles: &Roles, prompt: &PromptExample) -> usize {
    let rows = |model: &Model| rows_of_answers(settings, model, prompt, settings.episode.answers);
    rows(&roles.policy.model).max(roles.value.as_ref().map_or(0, |value| rows(&value.model)))
}

/// The rows of a prompt and so many answers at their longest in a model.
fn rows_of_answers(settings: &PpoSettings, model: &Model, prompt: &PromptExample, answers: usize) -> usize {
    model.rows_of_answers(prompt.tokens.len(), answers, settings.sampling.response_length)
}

/// The most rows at a time of what scores answers: reward models those of an update, which they may lay otherwise than
/// the policy (an encoder copies the prompt), and all who see them one answer to every held-out prompt.
fn rows_of_scores(
    settings: &PpoSettings,
    roles: &Roles,
    prompts: &Examples<PromptExample>,
    material: &Material,
    updates: usize,
) -> usize {
    let budget = settings.common.tokens_per_batch;
    let of_updates = roles.rewards.models().iter().map(|reward| {
        let answers = settings.episode.answers;
        prompts.largest_pass(|prompt| rows_of_answers(settings, reward.model(), prompt, answers), budget, updates)
    });
    let rewards = || roles.rewards.models().iter();
    let of_held_out = material.held_out.iter().flat_map(|held_out| {
        let others = rewards().chain(held_out.judge_models()).map(|model| model.model());
        [&roles.policy.model].into_iter().chain(others).map(|model| {
            let prompts = held_out.prompts().iter();
            let rows: Vec<usize> = prompts.map(|prompt| rows_of_answers(settings, model, prompt, 1)).collect();
            largest_run(&rows, budget)
        })
    });
    of_updates.chain(of_held_out).max().unwrap_or(0)
}

/// The keys and values that the sampler holds: those of an update's prompts and answers, and no more than allowed.
fn cache<'a>(
    settings: &PpoSettings,
    prompts: &Examples<PromptExample>,
    architecture: &'a Architecture,
) -> CacheSize<'a> {
    let allowed = settings.sampling.cache(architecture);
    let needed = settings.prompts_an_update() * tokens_of_one(settings, prompts);
    CacheSize { tokens: allowed.tokens.min(needed), ..allowed }
}

/// How several rewards are combined.
fn combination(settings: &PpoSettings) -> String {
    let rewards = &settings.rewards;
    let how = name(rewards.reward_combination);
    match rewards.reward_weights.is_empty() {
        true => how,
        false => {
            let weights: Vec<String> = rewards.reward_weights.iter().map(f64::to_string).collect();
            format!("{how}, weights {}", weights.join(", "))
        }
    }
}

/// The updates and what each of them is made of, in words.
fn updates(settings: &PpoSettings, total_updates: usize, prompts: usize) -> String {
    let (prompts, answers) = (settings.prompts_an_update().min(prompts), settings.episode.answers);
    let (passes, minibatches) = (settings.policy.ppo_epochs, settings.policy.minibatches);
    format!(
        "{total_updates} of {} answers ({answers} to each of {prompts} prompts), in {passes} passes of {minibatches} minibatches",
        prompts * answers
    )
}

/// The texts of the pretraining mix, and what they lost, in words.
fn pretraining_mix(count: usize, truncation: &Truncation, max_length: usize) -> String {
    let left_out = truncation.left_out;
    let left_out = (left_out > 0).then(|| format!("{left_out} more have no token to learn"));
    let parts = [Some(format!("{count} texts")), truncation.cuts(max_length), left_out];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// The plan with what becomes of the scores of answers.
fn scores(settings: &PpoSettings, mut plan: Plan) -> Plan {
    let (episode, kl) = (&settings.episode, &settings.kl);
    let missing_end = match (episode.missing_eos_score, episode.missing_eos_penalty) {
        (Some(score), _) => Some(format!("has the score {score} (--missing-eos-score)")),
        (None, penalty) => (penalty > 0.0).then(|| format!("scores {penalty} less (--missing-eos-penalty)")),
    };
    if let Some(what) = missing_end {
        plan = plan.line("missing end", format!("an answer without an end {what}"));
    }
    if episode.reward_clip > 0.0 {
        plan = plan.line("rewards clipped", format!("to [-{0}, {0}] (--reward-clip)", episode.reward_clip));
    }
    if episode.whiten_rewards {
        plan = plan.line("rewards whitened", "divided by their standard deviation (--whiten-rewards)");
    }
    if kl.kl_coefficient == 0.0 {
        return plan;
    }
    let [estimator, place, controller] = [name(kl.kl_estimator), name(kl.kl_in), name(kl.kl_controller)];
    plan.line("KL penalty", format!("{} · {estimator} in the {place}, {controller}", kl.kl_coefficient))
}

/// A value as the command line names it.
fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
}

/// Parameters, data, memory as the models are, where the reward comes from, and what preset and algorithm set.
pub fn plan(
    settings: &PpoSettings,
    roles: &Roles,
    prompts: &Examples<PromptExample>,
    material: &Material,
    schedule: &Schedule,
) -> Result<Plan> {
    let training = &settings.training;
    let evaluation = material.held_out.as_ref().map_or(0, |held_out| held_out.len());
    let evaluation_truncation = material.held_out.as_ref().map(|held_out| held_out.truncation()).unwrap_or_default();
    let rows = |prompt: &PromptExample| rows_of_prompt(settings, roles, prompt);
    let sizes = Sizes {
        tokens: &|prompt: &PromptExample| tokens(settings, prompt),
        learned: &rows,
        evaluated: &rows,
        // All of an update: what goes through a model at a time is a part of that.
        budget: usize::MAX,
    };
    let workload = Workload::new("prompts", prompts, schedule.total_steps, &sizes);
    let mut rows = rows_of_step(settings, workload.rows.learned, workload.rows.of_one);
    let scored = rows_of_scores(settings, roles, prompts, material, schedule.total_steps);
    rows.forward = rows.forward.max(scored);
    if let Some(mix) = &material.mix {
        rows.learned = rows.learned.max(mix.largest_pass(&roles.policy.model));
    }
    let workload = Workload { evaluation, evaluation_truncation, rows, ..workload };
    let mut beside: Vec<Footprint> = Vec::new();
    if let Some(value) = &roles.value {
        beside.push(Footprint::of("value model", &value.model)?);
    }
    if roles.average.is_some() {
        beside.push(Footprint::of_average(roles.policy.model.trainable_count()));
    }
    beside.push(Footprint::of("reference", &roles.reference)?);
    let judges = material.held_out.iter().flat_map(|held_out| held_out.judge_models());
    let scoring = roles.rewards.models().iter().map(|model| ("reward model", model));
    for (role, model) in scoring.chain(judges.map(|judge| ("judge", judge))) {
        beside.push(Footprint::of(role, model.model())?.with_tokenizer(model.folder()));
    }
    beside.extend(classifiers(settings)?);
    let cache = cache(settings, prompts, roles.policy.model.architecture());
    let plan = TrainingPlan {
        program: "ppo",
        model: &roles.policy.model,
        source: &settings.model,
        beside: &beside,
        common: &settings.common,
        training,
        examples: &workload,
        schedule,
        steps: ("updates", updates(settings, schedule.total_steps, prompts.len())),
        cache: cache.bytes(),
    };
    let mut plan = plan.plan()?.line("keys and values", cache).line("reference", settings.model.as_it_is());
    let others = roles.value.iter().map(|value| &value.model).chain([&roles.reference]);
    let judges = material.held_out.iter().flat_map(|held_out| held_out.judge_models());
    let judging = roles.rewards.models().iter().chain(judges).map(|model| model.model());
    others.chain(judging).try_for_each(|model| model.check_finite())?;
    for model in roles.rewards.models() {
        let reading = if model.reads_tokens() { "" } else { " (reads the answers' text)" };
        plan = plan.line("reward model", format!("{}{reading}", model.folder().display()));
        plan = plan.line("  its answers", model.endings());
    }
    for classifier in &settings.rewards.reward_classifier {
        plan = plan.line("reward classifier", classifier);
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
    plan = scores(settings, plan);
    if let Some(mix) = &material.mix {
        let max_length = settings.common.max_length;
        plan = plan.line("pretraining mix", pretraining_mix(mix.len(), &mix.truncation(), max_length));
    }
    let set = presets::lines(settings);
    if !set.is_empty() {
        let name = settings.preset.map_or_else(|| settings.algorithm.name(), |preset| preset.name());
        plan = plan.line("set by", name);
    }
    Ok(set.into_iter().fold(plan, |plan, (name, value)| plan.line(&format!("  {name}"), value)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::from_arguments;

    #[test]
    fn a_pass_of_an_update_has_the_rows_of_its_largest_minibatch_and_never_less_than_those_of_a_prompt() {
        let rows = |flags: &str, rows: usize, of_one: usize| {
            let needed = "--model m --reward-model r --data d --output o --max-length 200 --response-length 10";
            let settings = from_arguments(format!("{needed} {flags}").split(' ')).unwrap();
            let PassRows { learned, forward, of_one } = rows_of_step(&settings, rows, of_one);
            (learned, forward, of_one)
        };
        // Seven prompts in two minibatches, of four and three.
        assert_eq!(rows("--batch-size 7 --minibatches 2 --tokens-per-batch 4096", 700, 120), (400, 700, 120));
        // Two answers each.
        assert_eq!(
            rows("--batch-size 8 --answers 2 --minibatches 2 --tokens-per-batch 4096", 800, 210),
            (400, 800, 210)
        );
        // No pass has more than it may, but for one prompt that has.
        assert_eq!(rows("--batch-size 8 --minibatches 1 --tokens-per-batch 300", 800, 120), (300, 300, 120));
        assert_eq!(rows("--batch-size 8 --minibatches 8 --tokens-per-batch 100", 800, 150), (150, 150, 150));
        // A minibatch of one prompt has at most the rows of the largest.
        assert_eq!(rows("--batch-size 8 --minibatches 8 --tokens-per-batch 4096", 800, 150), (150, 800, 150));
    }
}
