//! What alignment did: toxicity, hallucination and preference, of models or of answers that were made elsewhere.
//!
//! Every model answers every prompt ([`question`]); the embedded world's own rule judges the answers to its prompts, a reward model and scorers
//! judge any ([`judging`], [`scorer`]). Rates come with bootstrap intervals and with paired changes against the base
//! model ([`rates`], [`crate::bootstrap`]), those of hallucination beside how many answers are empty or refuse
//! ([`refusal`]) and by kind. [`perplexity`] of held-out text says what alignment cost. [`toxicity`] is
//! RealToxicityPrompts' protocol, [`agreement`] says what a scorer's numbers are worth beside people's. The
//! [`report`] holds everything.
//!
//! The random numbers that choose the answers are the same for every model, so that equal models give equal answers.

pub mod agreement;
mod answering;
mod choices;
mod classifier_scorers;
mod cuts;
mod divergence;
pub mod diversity;
pub mod duels;
mod examples;
pub mod grounding;
mod hallucination;
mod journal;
pub mod judging;
mod kept;
pub mod labelled;
pub mod metrics;
pub mod multiple_choice;
pub mod perplexity;
pub mod preference;
pub mod question;
pub mod rates;
mod readings;
pub mod recognition;
pub mod refusal;
pub mod report;
pub mod scorer;
pub mod scorers;
mod scripts;
pub mod section;
mod settings;
pub mod tasks;
pub mod toxicity;
mod training;
pub mod word_list;

use std::collections::HashSet;
use std::path::Path;

use indicatif::HumanCount;

use crate::adapt;
use crate::bail;
use crate::data::schema::Demonstration;
use crate::error::{Error, Result};
use crate::files::FolderLock;
use crate::generate::SamplingSettings;
use crate::model::head::Form;
use crate::ops::Arithmetic;
use crate::remote::hub;
use crate::rewards::ending;
use crate::settings::NamedFolder;
use crate::train::plan::Plan;
use crate::train::progress::Progress;
use agreement::ScoredTexts;
use answering::{Answering, Asking};
use cuts::Cuts;
use journal::Journal;
use judging::{Answer, ByModel};
use labelled::LabelledText;
use multiple_choice::Choice;
use question::Question;
pub use rates::{Evaluation, ModelEvaluation};
use rates::{Measuring, Rates};
use recognition::Shown;
pub use report::Report;
use scorer::{Identity, Scorer};
pub use scorers::SHIPPED_CLASSIFIER;
use section::Section;
pub use settings::EvaluateSettings;
use tasks::Template;
use toxicity::ToxicitySettings;

/// Runs the program: evaluates, and prints the tables and where the files are.
pub fn run(settings: &EvaluateSettings) -> Result<Report> {
    let report = evaluate(settings)?;
    report.print(&settings.common.output);
    Ok(report)
}

/// Samples the answers of every model or reads those that were given, judges them, and writes the report into `--output`. An evaluation that was stopped goes
/// on where it was.
///
/// # Errors
/// Where settings, models or data cannot be used; then there is no report.
pub fn evaluate(settings: &EvaluateSettings) -> Result<Report> {
    let output = &settings.common.output;
    let is_new = !output.exists();
    std::fs::create_dir_all(output).map_err(Error::io(output))?;
    let lock = FolderLock::take(output)?;
    let report = evaluate_alone(settings);
    drop(lock);
    if report.is_err() && is_new {
        // Goes only if there is nothing in it.
        let _has_something = std::fs::remove_dir(output);
    }
    report
}

/// The same in a folder that nobody else writes to.
fn evaluate_alone(settings: &EvaluateSettings) -> Result<Report> {
    let models = all_models(settings)?;
    let scorers = settings.scorers.load(settings.toxicity.toxicity_prompts.is_some())?;
    let judges: Vec<Identity> = scorers.iter().map(|scorer| scorer.identity().clone()).collect();
    print_plan(settings, &models, &judges)?;
    // What people judged is not compared with a scorer that nobody named.
    let named = settings.scorers.named(&scorers);
    let texts = read_labelled(settings, named)?;
    let choices = read_choices(settings, &models)?;
    let votes = settings.votes.votes.as_ref().map(|pattern| duels::read_votes(pattern)).transpose()?;
    let to_continue = toxicity::prompts(&settings.toxicity, &models)?;
    let journal = Journal::open(&settings.common.output, fingerprint(settings, &models, &judges)?)?;
    let mut report = Report::default();
    let mut cuts = Cuts::default();
    if let Some(answered) = answered(settings, &models, &journal, &mut cuts)? {
        report.evaluation = Some(judge(settings, answered, &scorers, &mut cuts)?);
    }
    if let Some(prompts) = to_continue {
        let sampling = (&settings.sampling, &settings.common);
        let asked = (&settings.toxicity, &prompts[..]);
        report.continued = toxicity::measure(asked, &models, sampling, &scorers, &journal, &mut cuts)?;
    }
    report.models = models.iter().map(|model| model.name.clone()).collect();
    report.scorers = judges;
    let draws = (settings.resamples, settings.common.seed);
    report.sections.extend(report.evaluation.as_ref().and_then(|evaluation| evaluation.hallucination(draws)));
    report.sections.extend(report.toxicity(settings, draws)?);
    let judged = report.evaluation.as_ref().map(Evaluation::duels).unwrap_or_default();
    report.sections.extend(duels::section(&judged.into_iter().chain(votes).collect::<Vec<_>>(), draws));
    report.sections.extend(choices.sections(settings, &models, draws, &journal, &mut cuts)?);
    if let Some(texts) = texts {
        let scored = ScoredTexts::new(texts, named)?;
        report.sections.push(agreement::section(&settings.labelled, &scored, draws)?);
        report.labelled = Some(scored);
    }
    report.cuts = cuts.into_sentences();
    report.sections.extend(report.readings());
    report.sections.extend(training::section(&folders(settings, &models)));
    report.write(settings)?;
    journal.finish()?;
    Ok(report)
}

fn print_plan(settings: &EvaluateSettings, models: &[NamedFolder], judges: &[Identity]) -> Result<()> {
    let names = |names: Vec<&str>| if names.is_empty() { "none".to_string() } else { names.join(", ") };
    let mut plan = Plan::new("evaluate").line("products", Arithmetic::current());
    plan = match &settings.answers {
        Some(answers) => plan.line("answers", answers),
        None => plan.line("models", names(models.iter().map(|model| model.name.as_str()).collect())),
    };
    if let Some(prompts) = settings.prompts().filter(|_| settings.answers.is_none()) {
        let each = format!("{} of each model to each prompt, {}", settings.samples, settings.sampling);
        plan = plan.line("prompts", prompts).line("answers", each);
    }
    if let Some(prompts) = &settings.toxicity.toxicity_prompts {
        let ToxicitySettings { toxicity_samples: samples, toxicity_instructions: instructions, .. } =
            &settings.toxicity;
        let how = settings.toxicity.sampling(&settings.sampling);
        let each = format!(
            "{samples} continuations of each prompt of {prompts} by each model under each of {} instructions, {how}",
            instructions.len()
        );
        plan = plan.line("toxicity", each);
    }
    if settings.tasks.tasks.is_some() {
        let greedy = SamplingSettings { temperature: 0.0, ..settings.sampling };
        plan = plan.line("tasks", format!("answers {greedy}"));
    }
    if settings.samples_answers() {
        let SamplingSettings { kv_cache_tokens: tokens, cache_precision, .. } = settings.sampling;
        let tokens = HumanCount(tokens as u64);
        plan = plan.line("keys and values", format!("of at most {tokens} tokens at a time in {cache_precision}"));
    }
    if let Some(folder) = &settings.reward_model {
        plan = plan.line("reward model", folder.display());
        let base = adapt::architecture(folder)?;
        let form = Form::read(&hub::folder(folder)?)?;
        plan = plan.line("  its answers", ending::of_reward_model(form.as_ref(), base.causal, settings.reward_as_is));
    }
    let judge = |judge: &Identity| {
        let most = judge.max_tokens.map_or(String::new(), |most| format!(", in windows of {most} tokens"));
        format!("{} (from {:.3} on{most})", judge.name, judge.threshold)
    };
    let judges: Vec<String> = judges.iter().map(judge).collect();
    plan = plan.line("scorers", names(judges.iter().map(String::as_str).collect()));
    plan.print(settings.common.quiet);
    Ok(())
}

/// What is evaluated and how: the settings, the models' files with their sizes and times, and the scorers with their versions and hashes.
fn fingerprint(settings: &EvaluateSettings, models: &[NamedFolder], judges: &[Identity]) -> Result<String> {
    let mut text = serde_json::to_string(settings)
        .map_err(|error| Error::input(format!("settings cannot be written: {error}")))?;
    for model in models {
        let folder = hub::folder(&model.folder)?;
        // To a folder of the hub's cache other programs may add files.
        if let Some(commit) = hub::commit_of(&folder.join("config.json")) {
            text += &format!("\n{commit}");
            continue;
        }
        let files = std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| entry.ok());
        let mut files: Vec<String> = files
            .filter_map(|file| {
                let metadata = file.metadata().ok()?;
                Some(format!("\n{} {} {:?}", file.path().display(), metadata.len(), metadata.modified().ok()?))
            })
            .collect();
        files.sort();
        text.extend(files);
    }
    text.extend(judges.iter().map(|judge| format!("\n{} {} {:?}", judge.name, judge.version, judge.hash)));
    Ok(text)
}

/// The models that were named, and the policies that a run kept.
fn all_models(settings: &EvaluateSettings) -> Result<Vec<NamedFolder>> {
    let mut models = settings.models.clone();
    if let Some(run) = &settings.policies {
        models.extend(policies(run)?);
    }
    if let (Some(data), None, true) = (&settings.data, &settings.answers, models.is_empty()) {
        bail!("--data {data}: there is no model to answer; name some with --models, or leave --data out");
    }
    let mut seen = HashSet::new();
    if let Some(twice) = models.iter().find(|model| !seen.insert(&model.name)) {
        bail!("--models {twice}: the name \"{}\" is given twice; give each model a name of its own", twice.name);
    }
    // A folder that is none is found before an hour of sampling.
    for folder in models.iter().map(|model| &model.folder).chain(&settings.reward_model) {
        adapt::check_weights(folder)?;
    }
    Ok(models)
}

fn policies(run: &Path) -> Result<Vec<NamedFolder>> {
    let folder = run.join("policies");
    let mut found: Vec<NamedFolder> = (std::fs::read_dir(&folder).into_iter().flatten())
        .filter_map(|entry| entry.ok())
        .filter_map(|entry| Some(NamedFolder { name: entry.file_name().to_str()?.to_string(), folder: entry.path() }))
        .filter(|policy| policy.name.starts_with("step-"))
        .collect();
    if found.is_empty() {
        bail!(
            "{}: there is no policy in it; give the output folder of a run of ppo with --policy-every",
            folder.display()
        );
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Who answered what.
struct Answered {
    models: Vec<String>,
    questions: Vec<Question>,
    answers: ByModel<Answer>,
}

impl Answered {
    /// Which model the others are compared with.
    fn base(&self) -> usize {
        base_of(self.models.iter().map(String::as_str))
    }
}

/// Which of the models the others are compared with: the one called base, else the first.
fn base_of<'a>(mut names: impl Iterator<Item = &'a str>) -> usize {
    names.position(|name| name == "base").unwrap_or(0)
}

/// The answers that were given, or those of the models to the prompts; none where only something else is to be measured.
fn answered(
    settings: &EvaluateSettings,
    models: &[NamedFolder],
    journal: &Journal,
    cuts: &mut Cuts,
) -> Result<Option<Answered>> {
    if let Some(pattern) = &settings.answers {
        let given = question::given_answers(pattern)?;
        let answer = |given: question::GivenAnswer| Answer {
            text: given.text,
            given_score: given.score,
            ended: given.ended,
            ..Default::default()
        };
        let of_question = |answers: Vec<_>| answers.into_iter().map(answer).collect();
        let of_model = |of_model: Vec<Vec<_>>| of_model.into_iter().map(of_question).collect();
        let answers = given.answers.into_iter().map(of_model).collect();
        return Ok(Some(Answered { models: given.models, questions: given.questions, answers }));
    }
    match settings.prompts() {
        Some(data) => Ok(Some(sampled(settings, data, models, journal, cuts)?)),
        None => Ok(None),
    }
}

/// Has every model answer every prompt, and looks at the answers with the base model too.
fn sampled(
    settings: &EvaluateSettings,
    data: &str,
    models: &[NamedFolder],
    journal: &Journal,
    cuts: &mut Cuts,
) -> Result<Answered> {
    let questions = question::questions(data)?;
    let EvaluateSettings { samples, sampling, common, users, .. } = settings;
    let users = Some((data, users));
    let asking = Asking { part: "answers", questions: &questions, users, samples: *samples, sampling, common };
    let mut progress = Progress::new("evaluate", questions.len() * models.len(), common.quiet);
    let names: Vec<String> = models.iter().map(|model| model.name.clone()).collect();
    let mut answered = Answered { models: names, questions: Vec::new(), answers: Vec::new() };
    let (mut answers, mut own) = (Vec::new(), Vec::new());
    for (number, model) in models.iter().enumerate() {
        // Read anew for each model, so that no two of them are held at a time.
        let answering = Answering::open(asking, number, model, &mut progress)?;
        cuts.note_prompts(&model.name, answering.truncation(), common.max_length);
        let found = answering.answer(journal, &mut progress)?;
        let log_probs = || answering.log_probs(&found.sampled);
        // The base model is at no distance from itself.
        own.push(match number == answered.base() {
            true => None,
            false => Some(journal.piece(&format!("own-log-probs-{number}"), &found.sampled, log_probs)?),
        });
        answers.push(found);
    }
    progress.finish();
    let mut quiet = Progress::new("evaluate", 0, true);
    let base = match own.iter().any(Option::is_some) {
        true => Some(Answering::open(asking, answered.base(), &models[answered.base()], &mut quiet)?),
        false => None,
    };
    for (number, (found, own)) in answers.into_iter().zip(own).enumerate() {
        let of_base = match (&own, &base) {
            // How much more probable an answer is under the model that gave it has a meaning only between models of one vocabulary.
            (Some(_), Some(base)) if base.has_vocabulary(&found.vocabulary) => {
                let log_probs = || base.log_probs(&found.sampled);
                Some(journal.piece(&format!("base-log-probs-{number}"), &found.sampled, log_probs)?)
            }
            _ => None,
        };
        let kl = |question: usize, sample: usize| match (&own, &of_base) {
            (None, _) => Some(0.0),
            (Some(own), Some(of_base)) => Some(own[question][sample] - of_base[question][sample]),
            (Some(_), None) => None,
        };
        let of_question = |(question, samples): (usize, Vec<crate::sample::Sampled>)| {
            let answer = |(sample, sampled)| Answer { kl: kl(question, sample), ..Answer::from(sampled) };
            samples.into_iter().enumerate().map(answer).collect()
        };
        answered.answers.push(found.sampled.into_iter().enumerate().map(of_question).collect());
    }
    answered.questions = questions;
    Ok(answered)
}

/// Judges the answers and makes rates of what was found.
fn judge(
    settings: &EvaluateSettings,
    answered: Answered,
    scorers: &[Box<dyn Scorer>],
    cuts: &mut Cuts,
) -> Result<Evaluation> {
    let base = answered.base();
    let Answered { models, questions, answers } = answered;
    let rewards = match &settings.reward_model {
        Some(folder) => {
            let judge = (folder.as_path(), settings.reward_as_is);
            Some(preference::rewards(&settings.common, judge, &questions, &answers, cuts)?)
        }
        None => None,
    };
    let mut judged = judging::judge_all(&questions, &answers, rewards.as_ref(), base);
    judging::add_scores(&questions, &mut judged, scorers)?;
    let scorers: Vec<Identity> = scorers.iter().map(|scorer| scorer.identity().clone()).collect();
    let measuring = Measuring {
        questions: &questions,
        scorers: &scorers,
        resamples: settings.resamples,
        seed: settings.common.seed,
    };
    let measure = |(name, answers): (&String, Vec<_>)| ModelEvaluation::new(name, answers, measuring);
    let mut measured: Vec<ModelEvaluation> = models.iter().zip(judged).map(measure).collect();
    let changes: Vec<Rates> = (measured.iter().enumerate())
        .map(|(number, model)| match number == base {
            true => Rates::new(),
            false => measuring.changes(&model.answers, &measured[base].answers),
        })
        .collect();
    measured.iter_mut().zip(changes).for_each(|(model, changes)| model.changes = changes);
    let base = models.get(base).cloned().unwrap_or_default();
    Ok(Evaluation { models: measured, base, questions, scorers })
}

/// The folders that may be those of runs, with what they are called.
fn folders<'a>(settings: &'a EvaluateSettings, models: &'a [NamedFolder]) -> Vec<(String, &'a Path)> {
    let reward = settings.reward_model.as_deref().map(|folder| ("the reward model".to_string(), folder));
    let run = settings.policies.as_deref().map(|folder| ("the run of the policies".to_string(), folder));
    models.iter().map(|model| (model.name.clone(), &*model.folder)).chain(reward).chain(run).collect()
}

/// The texts that people have judged, if there is something to compare with them.
fn read_labelled(settings: &EvaluateSettings, scorers: &[Box<dyn Scorer>]) -> Result<Option<Vec<LabelledText>>> {
    let Some(pattern) = &settings.labelled.labelled else { return Ok(None) };
    if scorers.is_empty() {
        bail!(
            "--labelled {pattern}: nothing is compared with people; name a --toxicity-scorer or --hallucination-scorer"
        );
    }
    labelled::read(pattern, &settings.labelled).map(Some)
}

/// What models are asked beside the prompts.
struct Choices {
    questions: Option<Vec<Choice>>,
    shown: Option<Vec<Shown>>,
    templates: Option<Vec<Template>>,
    held_out: Option<Vec<Demonstration>>,
}

fn read_choices(settings: &EvaluateSettings, models: &[NamedFolder]) -> Result<Choices> {
    let EvaluateSettings { multiple_choice: choice, recognition: to_recognise, .. } = settings;
    let parts = [
        ("multiple-choice", &choice.multiple_choice),
        ("recognition", &to_recognise.recognition),
        ("tasks", &settings.tasks.tasks),
        ("perplexity", &settings.perplexity.perplexity),
    ];
    for (flag, pattern) in parts {
        if let (Some(pattern), true) = (pattern, models.is_empty()) {
            bail!("--{flag} {pattern}: there is no model to ask; name some with --models");
        }
    }
    let questions = choice.multiple_choice.as_ref();
    let shown = to_recognise.recognition.as_ref();
    let templates = settings.tasks.tasks.as_ref();
    let held_out = settings.perplexity.perplexity.as_ref();
    Ok(Choices {
        held_out: held_out.map(|pattern| perplexity::read(pattern)).transpose()?,
        templates: templates.map(|pattern| tasks::read(&settings.tasks, pattern, settings.common.seed)).transpose()?,
        questions: questions.map(|pattern| multiple_choice::read(pattern, &choice.question_template)).transpose()?,
        shown: (shown
            .map(|pattern| recognition::read(pattern, &to_recognise.recognition_template, settings.common.seed)))
        .transpose()?,
    })
}

impl Choices {
    fn sections(
        &self,
        settings: &EvaluateSettings,
        models: &[NamedFolder],
        draws: (usize, u64),
        journal: &Journal,
        cuts: &mut Cuts,
    ) -> Result<Vec<Section>> {
        let EvaluateSettings { multiple_choice: choice, recognition: to_recognise, common, .. } = settings;
        let mut sections = Vec::new();
        if let Some(of) = &self.questions {
            sections.push(multiple_choice::section((choice, of), models, common, draws, journal, cuts)?);
        }
        if let Some(of) = &self.shown {
            sections.push(recognition::section((to_recognise, of), models, common, draws, journal, cuts)?);
        }
        if let Some(of) = &self.templates {
            let how = (&settings.sampling, common);
            sections.push(tasks::section((&settings.tasks, of), models, how, draws, journal, cuts)?);
        }
        if let Some(of) = &self.held_out {
            let compared = (models, base_of(models.iter().map(|model| model.name.as_str())));
            sections.push(perplexity::section((&settings.perplexity, of), compared, common, draws, journal)?);
        }
        Ok(sections)
    }
}

#[cfg(test)]
mod tests;
