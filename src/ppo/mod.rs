//! Proximal policy optimisation against a reward model, as InstructGPT did it (Ouyang et al. 2022).
//!
//! An update: answers are sampled with the policy (`generate`); policy, reference, reward and value model look at each once
//! (`rollout`); advantages are estimated (`advantage`); and policy and value model learn from them in epochs of minibatches
//! (`update`, by the losses of `objective`).

pub mod advantage;
pub mod objective;
pub mod rollout;
pub mod settings;
pub mod update;

use candle_core::Device;

use crate::adapt::{self, Bases, Head, Role, Training};
use crate::bail;
use crate::data::batch::TokenTree;
use crate::data::tokenize::Tokenizer;
use crate::data::tokenize_records::Truncation;
use crate::data::{inspect, schema};
use crate::error::Result;
use crate::files::replace_folder_atomically;
use crate::generate::{MOST_ACTIVE, PromptTokens, generate};
use crate::model::Model;
use crate::settings::Pooling;
use crate::train::optimizer::Optimizer;
use crate::train::order::Order;
use crate::train::plan::{Examples, training_plan};
use crate::train::run::Run;
use crate::train::schedule::Schedule;
use rollout::Episode;
use settings::{LEARNING_RATE, PpoSettings};
use update::{Learner, UpdateReport, update};

/// The four models of PPO. With a lightweight method all stand on one copy of the base.
struct Roles {
    policy: Learner,
    value: Learner,
    /// The policy as it was at the start, frozen.
    reference: Model,
    /// The reward model, frozen.
    reward: Model,
}

/// Runs the whole stage: reads, samples, learns, saves.
pub fn run(settings: &PpoSettings) -> Result<()> {
    let common = &settings.common;
    settings.check()?;
    let tokenizer = Tokenizer::load(adapt::tokenizer_folder(&settings.model.model)?)?;
    let reward_tokenizer = Tokenizer::load(adapt::tokenizer_folder(&settings.reward_model)?)?;
    if tokenizer.vocabulary() != reward_tokenizer.vocabulary() {
        bail!(
            "{}: its tokenizer is another than that of {}; policy and reward model need the same vocabulary",
            settings.reward_model.display(),
            settings.model.model.display()
        );
    }
    let (prompts, truncation) = read(settings, &tokenizer)?;
    if let Some(count) = settings.inspect {
        for prompt in prompts.into_iter().take(count) {
            println!("{}", inspect::inspect(&TokenTree { prompt, answers: Vec::new() }, &tokenizer)?);
        }
        return Ok(());
    }
    let mut roles = Roles::load(settings)?;
    roles.check(settings)?;
    let longest = prompts.iter().map(|prompt| prompt.len() + settings.sampling.response_length).max();
    for model in [&roles.policy.model, &roles.reward] {
        tokenizer.fits(model.architecture().vocabulary)?;
        model.architecture().check_length(longest.unwrap_or(0))?;
    }

    let training = &settings.training;
    let mut order = Order::new((0..prompts.len()).collect(), training.batch_size, common.seed);
    let total_steps = order.total_steps(settings.epochs as f64, training.max_steps);
    let tokens = prompts.iter().map(|prompt| prompt.len() + settings.sampling.response_length).sum();
    let examples = Examples { what: "prompts", training: prompts.len(), evaluation: 0, tokens, truncation };
    let models = [&roles.policy.model, &roles.value.model, &roles.reference, &roles.reward];
    let cached_tokens = training.batch_size.min(MOST_ACTIVE) * tokens.div_ceil(prompts.len());
    let plan = training_plan("ppo", &models, common, training, &examples, cached_tokens)
        .line("reward model", settings.reward_model.display())
        .line("updates", format!("{total_steps} of {} episodes", training.batch_size));
    let mut run = Run::start(&settings.resolved(), common, &plan, total_steps)?;
    let peak = training.learning_rate(LEARNING_RATE);
    let schedule = Schedule::new(&training.optimizer, peak, total_steps);
    let value_peak = settings.value_learning_rate.unwrap_or(peak);
    let value_schedule = Schedule::new(&training.optimizer, value_peak, total_steps);
    for step in 0..total_steps {
        let chosen: Vec<Vec<u32>> = order.step(step).iter().map(|&index| prompts[index].clone()).collect();
        let episodes = roles.rollout(settings, &chosen, tokenizer.stop_tokens(), step as u64)?;
        let rates = (schedule.learning_rate(step), value_schedule.learning_rate(step));
        let report = update(&mut roles.policy, &mut roles.value, &episodes, settings, rates, step as u64)?;
        let tokens = episodes.iter().map(|episode| episode.tree.tokens()).sum();
        let (loss, metrics) = metrics(&episodes, &report, settings, rates.0);
        let of = |name: &str| metrics.iter().find(|(other, _)| *other == name).map_or(f64::NAN, |(_, value)| *value);
        run.show(format!("score {:.2}  kl {:.2}", of("objective/scores"), of("objective/kl")));
        run.step(step + 1, loss, tokens, &metrics)?;
    }
    run.keep(total_steps, None, |folder| {
        let Learner { model, optimizer } = &roles.policy;
        model.save(folder)?;
        if model.adapters().is_empty() { Ok(()) } else { optimizer.save(folder) }
    })?;
    replace_folder_atomically(run.folder().join("value-model"), |folder| roles.value.model.save(folder))?;
    run.finish()
}

/// Reads prompts; those without a token are left out.
fn read(settings: &PpoSettings, tokenizer: &Tokenizer) -> Result<(Vec<Vec<u32>>, Truncation)> {
    let mut truncation = Truncation::default();
    let prompt_length = settings.common.max_length - settings.sampling.response_length;
    let mut prompts = Vec::new();
    for prompt in schema::prompts(&settings.data)? {
        prompts.push(tokenizer.prompt(&prompt?, prompt_length, &mut truncation)?);
    }
    prompts.retain(|prompt| !prompt.is_empty());
    if prompts.is_empty() {
        bail!("{}: no prompt is left after reading; check the column prompt", settings.data);
    }
    Ok((prompts, truncation))
}

impl Roles {
    fn load(settings: &PpoSettings) -> Result<Self> {
        let mut bases = Bases::new(Device::Cpu);
        let method = &settings.training;
        let policy = Role {
            folder: &settings.model.model,
            adapters: &settings.model.adapter,
            training: Training::With(method),
            head: Head::Language,
            seed: settings.common.seed,
        };
        let reward = Role {
            folder: &settings.reward_model,
            adapters: &[],
            training: Training::Frozen,
            head: Head::Scalar,
            seed: settings.common.seed,
        };
        let model = bases.load(&policy)?;
        let learner = Learner { optimizer: Optimizer::of(&model, method, &settings.model)?, model };
        // The value model starts from the reward model, whose training is not its own.
        let model = bases.load(&Role { training: Training::With(method), ..reward })?;
        let optimizer = Optimizer::new(model.trainable_parameters(), &method.optimizer)?;
        Ok(Roles {
            policy: learner,
            value: Learner { model, optimizer },
            reference: bases.load(&Role { training: Training::Frozen, ..policy })?,
            reward: bases.load(&reward)?,
        })
    }

    /// Refuses a reward model from which no value model can start: that has to say something after every token.
    fn check(&self, settings: &PpoSettings) -> Result<()> {
        let reads_last = self.reward.head().is_some_and(|head| head.form.pooling == Pooling::Last);
        if !self.reward.architecture().causal || !reads_last {
            bail!(
                "{}: this reward model reads a text as a whole (an encoder, or a head on its first token or mean), and ppo's value model, which starts from it, has to read token by token; train one from a language model without --pooling",
                settings.reward_model.display()
            );
        }
        Ok(())
    }

    /// Samples an answer to each prompt and finds out everything about it that an update needs.
    fn rollout(&self, settings: &PpoSettings, prompts: &[Vec<u32>], stop: &[u32], step: u64) -> Result<Vec<Episode>> {
        let policy = self.policy.model.frozen()?;
        let first = step * settings.training.batch_size as u64;
        let asked: Vec<PromptTokens> = prompts.iter().cloned().map(PromptTokens::from).collect();
        let answers = generate(&policy, &asked, 1, &settings.sampling, stop, settings.common.seed, first)?;
        let mut episodes: Vec<Episode> = (prompts.iter().zip(answers))
            .flat_map(|(prompt, answers)| answers.into_iter().map(|answer| Episode::new(prompt, answer)))
            .collect();
        let (temperature, budget) = (settings.sampling.temperature, settings.common.tokens_per_batch);
        let log_probs = rollout::log_probs(&policy, &episodes, temperature, budget)?;
        let reference = rollout::log_probs(&self.reference, &episodes, temperature, budget)?;
        let values = rollout::values(&self.value.model.frozen()?, &episodes, budget)?;
        let scores = rollout::scores(&self.reward, &episodes, budget)?;
        for (index, episode) in episodes.iter_mut().enumerate() {
            episode.log_probs.clone_from(&log_probs[index]);
            episode.reference_log_probs.clone_from(&reference[index]);
            episode.values.clone_from(&values[index]);
            let penalty = if episode.ended { 0.0 } else { settings.missing_eos_penalty };
            episode.score = scores[index] - penalty as f32;
            episode.estimate_advantages(settings.kl_coefficient, settings.gamma, settings.lambda);
        }
        Ok(episodes)
    }
}

/// The total loss and everything that is recorded of an update, under the names that TRL's users know.
fn metrics(
    episodes: &[Episode],
    report: &UpdateReport,
    settings: &PpoSettings,
    learning_rate: f64,
) -> (f64, Vec<(&'static str, f64)>) {
    let mean = |of: &dyn Fn(&Episode) -> f64| episodes.iter().map(of).sum::<f64>() / episodes.len() as f64;
    let kl = mean(&Episode::kl);
    let score = mean(&|episode| f64::from(episode.score));
    let non_score = -settings.kl_coefficient * kl;
    let loss = report.policy.loss + settings.value_coefficient * report.value_loss;
    let metrics = vec![
        ("objective/kl", kl),
        ("objective/entropy", mean(&|episode| -episode.log_probs.iter().map(|&x| f64::from(x)).sum::<f64>())),
        ("objective/non_score_reward", non_score),
        ("objective/rlhf_reward", score + non_score),
        ("objective/scores", score),
        ("policy/approxkl_avg", report.policy.approximate_kl),
        ("policy/clipfrac_avg", report.policy.clipped),
        ("policy/entropy_avg", report.policy.entropy),
        ("loss/policy_avg", report.policy.loss),
        ("loss/value_avg", report.value_loss),
        ("val/clipfrac_avg", report.value_clip_fraction),
        ("val/ratio", report.policy.ratio),
        ("val/first_ratio", report.first.ratio),
        ("val/num_eos_tokens", episodes.iter().filter(|episode| episode.ended).count() as f64),
        ("val/response_length", mean(&|episode| episode.len() as f64)),
        ("policy/gradient_norm", report.policy_gradient_norm),
        ("val/gradient_norm", report.value_gradient_norm),
        ("skipped_steps", report.skipped as f64),
        ("lr", learning_rate),
        ("episodes", episodes.len() as f64),
    ];
    (loss, metrics)
}
