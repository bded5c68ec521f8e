//! Proximal policy optimisation against a reward, as InstructGPT did it (Ouyang et al. 2022), and its relatives RLOO and GRPO.
//!
//! An update: answers are sampled with the policy (`generate`); policy, reference, value model and the sources of rewards look at each once
//! (`rollout`); advantages are estimated (`advantage`, `rloo`, `grpo`); and policy and value model learn from them in epochs of minibatches
//! (`update`, by the losses of `objective`), with pretraining mixed in where it is wanted (`ptx`).

pub mod advantage;
mod course;
pub mod evaluation;
pub mod grpo;
pub mod kl;
pub mod measures;
pub mod objective;
mod plan;
pub mod ptx;
pub mod rloo;
pub mod roles;
pub mod rollout;
pub mod samples;
pub mod settings;
pub mod update;
pub mod watch;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;

use crate::adapt::{self, Bases};
use crate::bail;
use crate::data::batch::TokenTree;
use crate::data::inspect;
use crate::data::schema::Prompt;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::error::{Error, Result};
use crate::files::replace_folder_atomically;
use crate::rewards::REWARD_RULE;
use crate::say;
use crate::train::examples::{Example, Examples, values};
use crate::train::plan::{self as training_plan, check_length};
use crate::train::rounding::check_trained;
use crate::train::run::{Run, Turn, rows_named};
use crate::train::schedule::Schedule;
use course::Course;
use evaluation::HeldOut;
use measures::{Measures, metrics, source_metrics};
use ptx::PretrainingMix;
use roles::{Learner, Roles};
use rollout::{PromptExample, episodes};
use settings::PpoSettings;
use update::{Step, update};

/// Runs the whole stage: reads, samples, learns, saves.
pub fn run(settings: &PpoSettings) -> Result<()> {
    settings.check()?;
    let tokenizer = adapt::tokenizer(&settings.model.model, &settings.model.adapter)?;
    let stop = stop_tokens(settings, &tokenizer)?;
    let rules = settings.rewards.rules(REWARD_RULE);
    let prompts = Examples::open(&settings.source(), settings.prompt_layouts(), |record, truncation| {
        rules.iter().try_for_each(|rule| rule.check(&record))?;
        prompt_example(record, settings, &tokenizer, truncation).map(Some)
    })?;
    if let Some(count) = settings.inspect {
        for prompt in prompts.first(count)? {
            let tree = TokenTree { prompt: prompt.value.tokens.clone(), answers: Vec::new() };
            say!("{}", inspect::inspect(&tree, &tokenizer)?);
        }
        prompts.say_remarks();
        return Ok(());
    }
    check_minibatches(settings, prompts.len())?;
    let total_updates = prompts.total_steps(settings.epochs as f64, settings.training.max_steps);
    check_critic_warmup(settings, total_updates)?;
    let memory = plan::memory(settings, &prompts)?;
    if !settings.common.quiet {
        // Notes wait for the run, which keeps them in `warnings.txt`.
        eprintln!("{memory}");
    }
    let mut bases = Bases::of(&settings.common, Device::Cpu);
    let held_out = HeldOut::read(settings, &mut bases, &tokenizer)?;
    let mix = PretrainingMix::read(settings, &tokenizer)?;
    let mut roles = Roles::load(settings, &mut bases, &tokenizer)?;
    drop(bases);
    let schedule = settings.schedule(total_updates);
    let material = Material { tokenizer: &tokenizer, stop, held_out, mix };
    let too_long = check_lengths(settings, &roles, &prompts, &material)?;
    let plan = plan::plan(settings, &roles, &prompts, &material, &schedule)?.warning(too_long).chat_format(&tokenizer);
    let checkpoints = &settings.training.checkpoints;
    let mut run =
        Run::start(&settings.resolved(), &settings.common, checkpoints, &plan, total_updates, settings.inputs()?)?;
    if let Err((updates, error)) = train(settings, &mut roles, prompts, material, &schedule, &mut run) {
        return Err(keep_what_is_learned(&mut roles, updates, error, run));
    }
    keep(&mut roles, total_updates, None, &mut run)?;
    if let Some(value) = &roles.value {
        replace_folder_atomically(run.folder().join("value-model"), |folder| value.model.save(folder))?;
    }
    roles.with_saved_policy(|policy| check_trained(&policy.model, &mut run))?;
    run.finish()
}

/// Refuses more minibatches than an update has prompts, whose answers stay together.
fn check_minibatches(settings: &PpoSettings, prompts: usize) -> Result<()> {
    let (minibatches, prompts) = (settings.policy.minibatches, settings.prompts_an_update().min(prompts));
    if minibatches > prompts && prompts > 0 {
        bail!(
            "--minibatches {minibatches}: an update has {prompts} prompts, and the answers to a prompt are in one minibatch, so it can be divided into \
             {prompts} at most; lower it, raise --batch-size, or give more prompts"
        );
    }
    Ok(())
}

/// Refuses a run that is over before the policy begins to learn.
fn check_critic_warmup(settings: &PpoSettings, total_updates: usize) -> Result<()> {
    let warmup = settings.value.critic_warmup;
    if settings.algorithm.has_values() && warmup >= total_updates && total_updates > 0 {
        bail!(
            "--critic-warmup {warmup}: the run has {total_updates} updates, in all of which the value model would learn alone, so the policy would stay \
             as it is; lower it, or raise --epochs or --max-steps"
        );
    }
    Ok(())
}

/// Refuses models that cannot read what they will have to; gives a warning where they were not made for the
/// longest answers to some of the prompts.
fn check_lengths(
    settings: &PpoSettings,
    roles: &Roles,
    prompts: &Examples<PromptExample>,
    material: &Material,
) -> Result<Option<String>> {
    let Material { held_out, mix, .. } = material;
    let held_out_length = held_out.as_ref().map_or(0, HeldOut::longest);
    let longest = prompts.largest(|prompt| prompt.tokens.len());
    let longest = longest.map(|longest| longest.max(held_out_length) + settings.sampling.response_length);
    let judges = held_out.iter().flat_map(|held_out| held_out.judge_models());
    let reading = roles.rewards.models().iter().chain(judges).filter(|model| model.reads_tokens());
    let values = roles.value.iter().map(|value| &value.model);
    let policy = &roles.policy.model;
    for model in [policy].into_iter().chain(values).chain(reading.map(|model| model.model())) {
        check_length(model.architecture(), longest, settings.common.max_length)?;
    }
    if let Some(mix) = mix {
        check_length(policy.architecture(), mix.longest(), settings.common.max_length)?;
    }
    let with_answer = |prompt: &PromptExample| prompt.tokens.len() + settings.sampling.response_length;
    let too_long =
        training_plan::check_lengths(policy.architecture(), prompts, with_answer, settings.common.max_length)?;
    let length = settings.sampling.response_length;
    Ok(too_long.map(|warning| format!("with answers of --response-length {length} tokens, {warning}")))
}

/// What the run works with beside its models and prompts.
struct Material<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens that end an answer.
    stop: Vec<u32>,
    held_out: Option<HeldOut>,
    mix: Option<PretrainingMix<'a>>,
}

/// All updates. An error comes with the number of updates that were done.
fn train(
    settings: &PpoSettings,
    roles: &mut Roles,
    mut prompts: Examples<PromptExample>,
    mut material: Material,
    schedule: &Schedule,
    run: &mut Run,
) -> Result<(), (usize, Error)> {
    let total_updates = schedule.total_steps;
    let value_schedule = Schedule { peak: settings.value.value_learning_rate.unwrap_or(schedule.peak), ..*schedule };
    let evaluate_every = settings.observation.evaluate_every.unwrap_or(total_updates.div_ceil(10)).max(1);
    let mut course = Course::new(settings);
    let turns = run.restore(|state| course.take_from(state, roles, material.mix.as_mut(), settings));
    for Turn { step: number, is_learned } in turns.map_err(|error| (0, error))? {
        if !is_learned {
            let step = Step {
                number,
                learning_rate: schedule.learning_rate(number),
                value_learning_rate: value_schedule.learning_rate(number),
                kl_coefficient: course.kl_coefficient.value(),
            };
            let measures = prompts.during(number, total_updates, |chosen| {
                one_update(settings, roles, &chosen, &mut material, step, &mut course, run)
            });
            let measures = measures.map_err(|error| (number, error))?;
            course.kl_coefficient.update(measures.kl, measures.episodes);
        }
        let (updates, last) = (number + 1, number + 1 == total_updates);
        let evaluates = last || updates % evaluate_every == 0;
        observe(settings, roles, &mut material, updates, evaluates, &mut course, run)
            .and_then(|()| run.checkpoint(updates, |state| course.add_to(state, roles, material.mix.as_ref())))
            .map_err(|error| (updates, error))?;
    }
    Ok(())
}

/// How long the phases of an update take.
struct Phases {
    since: Instant,
    seconds: Vec<(Cow<'static, str>, f64)>,
}

impl Phases {
    fn start() -> Self {
        Phases { since: Instant::now(), seconds: Vec::new() }
    }

    /// Notes the time since the last phase.
    fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        self.seconds.push((name.into(), (now - self.since).as_secs_f64()));
        self.since = now;
    }
}

/// Samples, looks, learns, records.
fn one_update(
    settings: &PpoSettings,
    roles: &mut Roles,
    chosen: &[Arc<Example<PromptExample>>],
    material: &mut Material,
    step: Step,
    course: &mut Course,
    run: &mut Run,
) -> Result<Measures> {
    let mut phases = Phases::start();
    let chosen = values(chosen);
    let policy = roles.policy.model.frozen()?;
    if course.rollout.is_none() {
        let first = (step.number * settings.training.batch_size) as u64;
        course.rollout = Some(rollout::sample(&policy, &chosen, settings, &material.stop, first)?);
        // Nothing has been learned from them yet, so this is a point from which the run can go on.
        run.checkpoint_within(step.number, |state| course.add_to(state, roles, material.mix.as_ref()))?;
    }
    let answers = course.rollout.take().unwrap_or_default();
    phases.end("seconds/sample");
    let mut groups = rollout::groups(&chosen, answers, material.tokenizer)?;
    rollout::look(roles, &policy, &mut groups, settings)?;
    phases.end("seconds/score");
    advantage::estimate_advantages(&mut groups, settings, step.kl_coefficient);
    let origins = || groups.iter().map(|group| &group.prompt.origin);
    let report = match update(roles, material.mix.as_mut(), &groups, settings, step) {
        Err(error @ Error::NotFinite(_)) => return Err(run.gave_up(error, origins())),
        report => report?,
    };
    phases.end("seconds/update");
    if let Some(what) = &report.not_finite {
        let (update, skipped, prompts) = (step.number + 1, report.skipped, rows_named(origins()));
        run.warn(&format!(
            "update {update}: {skipped} optimizer steps changed nothing: {what} is not finite (at the first of them); its prompts: {prompts}"
        ))?;
    }
    run.count(report.learned());
    if let Some(average) = &mut roles.average {
        average.update(roles.policy.optimizer.variables())?;
    }
    let measures = Measures::new(&groups, &report, roles.rewards.truncated(), settings.algorithm);
    let (loss, mut metrics) = metrics(&groups, &measures, &report, settings, step);
    metrics.extend(source_metrics(&groups, &roles.rewards.names()));
    metrics.extend(phases.seconds);
    let warnings = course.watch.update(step.number, &measures);
    warnings.iter().try_for_each(|warning| run.warn(warning))?;
    metrics.push(("warnings".into(), warnings.len() as f64));
    run.show(format!("score {:.2}  kl {:.2}", measures.score, measures.kl));
    let tokens = groups.iter().map(|group| group.tree.tokens()).sum();
    let metrics: Vec<(&str, f64)> = metrics.iter().map(|(name, value)| (name.as_ref(), *value)).collect();
    run.step(step.number + 1, loss, tokens, &metrics)?;
    let every = settings.observation.sample_every;
    if every > 0 && (step.number + 1).is_multiple_of(every) {
        samples::write(&run.folder().join("samples"), step.number + 1, &groups, settings.observation.samples)?;
    }
    debug_assert!(episodes(&groups).all(|episode| episode.len() == episode.advantages.len()));
    Ok(measures)
}

/// Evaluates and keeps what is to be kept after this many updates.
fn observe(
    settings: &PpoSettings,
    roles: &mut Roles,
    material: &mut Material,
    updates: usize,
    evaluates: bool,
    course: &mut Course,
    run: &mut Run,
) -> Result<()> {
    let every = settings.observation.policy_every;
    if every > 0 && updates.is_multiple_of(every) {
        let folder = run.folder().join(format!("policies/step-{updates:06}"));
        roles.with_saved_policy(|policy| {
            replace_folder_atomically(&folder, |folder| {
                policy.model.save(folder)?;
                material.tokenizer.save_transcript(folder)
            })
        })?;
    }
    let Some(held_out) = material.held_out.as_mut().filter(|_| evaluates) else { return Ok(()) };
    let evaluating = run.evaluating()?;
    let evaluated = held_out.evaluate(roles, material.tokenizer, &material.stop);
    let mix = material.mix.as_ref();
    let found = run.evaluated(evaluating, evaluated, updates, |state| course.add_to(state, roles, mix))?;
    let warning = course.watch.evaluation(updates - 1, found.reward, found.judge);
    let metrics = [
        ("evaluation/judge", found.judge),
        ("evaluation/reward", found.reward),
        ("evaluation/kl", found.kl),
        ("evaluation/response_length", found.length),
        ("evaluation/warnings", f64::from(u8::from(warning.is_some()))),
    ];
    run.evaluation(updates, &metrics)?;
    warning.iter().try_for_each(|warning| run.warn(warning))?;
    keep(roles, updates, Some(-found.judge), run)
}

/// Keeps the policy as the last, and as the best where its loss (less of what the judge says) is the lowest so far.
fn keep(roles: &mut Roles, updates: usize, loss: Option<f64>, run: &mut Run) -> Result<()> {
    if run.last_kept() == Some(updates) {
        return Ok(());
    }
    roles.with_saved_policy(|Learner { model, optimizer }| {
        run.keep(updates, loss, |folder| {
            model.save(folder)?;
            if model.adapters().is_empty() { Ok(()) } else { optimizer.save(folder) }
        })
    })
}

/// After a failure: keeps the policy as it is after the updates that were done, and says where.
fn keep_what_is_learned(roles: &mut Roles, updates: usize, error: Error, mut run: Run) -> Error {
    if updates == 0 || matches!(error, Error::Stopped(_)) {
        return error;
    }
    // Not a number: the judge did not see it, and what it found best stays so.
    match keep(roles, updates, Some(f64::NAN), &mut run) {
        Ok(()) => {
            error.and(format!("the policy after {updates} updates is in {}", run.folder().join("last").display()))
        }
        Err(other) => error.and(format!("and the policy could not be saved: {other}")),
    }
}

/// Makes tokens of a prompt, of which an answer leaves so much room.
fn prompt_example(
    record: Prompt,
    settings: &PpoSettings,
    tokenizer: &Tokenizer,
    truncation: &mut Truncation,
) -> Result<PromptExample> {
    let prompt_length = settings.common.max_length - settings.sampling.response_length;
    let tokens = tokenizer.prompt(&record, prompt_length, truncation)?;
    Ok(PromptExample { record, tokens })
}

/// The tokens that end an answer: the user's, or else the tokenizer's.
fn stop_tokens(settings: &PpoSettings, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let names = &settings.episode.stop_token;
    if names.is_empty() {
        return Ok(tokenizer.stop_tokens().to_vec());
    }
    let vocabulary = tokenizer.vocabulary();
    let id = |name: &String| match vocabulary.get(name) {
        Some(&id) => Ok(id),
        None => Err(Error::input(format!(
            "--stop-token {name}: the tokenizer of {} has no such token; `--inspect 1` shows tokens as they are in the vocabulary",
            settings.model.model.display()
        ))),
    };
    names.iter().map(id).collect()
}
