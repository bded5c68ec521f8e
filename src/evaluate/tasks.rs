//! What alignment cost in other capabilities: tasks by templates, without examples of them (Sanh et al. 2022, section 6; Wei et al. 2022, section 2).
//!
//! A template whose completions are a few classes is measured by rank classification: the class that the model finds most probable after the prompt (the sum of the
//! log-probabilities of its tokens). Any other is answered greedily, and the answer compared with the completion: exact match and F1 as SQuAD defines them,
//! ROUGE-1, ROUGE-2 and ROUGE-L.

use std::collections::{BTreeMap, BTreeSet};

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::answering::{Answering, Asking};
use super::choices::{self, Found};
use super::cuts::Cuts;
use super::journal::Journal;
use super::metrics::{rouge::RougeScorer, squad};
use super::question::Question;
use super::scripts::{is_mostly_ascii, is_mostly_unspaced};
use super::section::{Section, share};
use crate::bail;
use crate::bootstrap::{self, Estimate};
use crate::data::mixture::{self, MixtureExample, Part};
use crate::data::schema::{self, Answered, Text};
use crate::data::splits::Pattern;
use crate::data::table::TableRows;
use crate::error::Result;
use crate::generate::SamplingSettings;
use crate::random;
use crate::settings::{CommonSettings, Flags, NamedFolder, at_least_one};
use crate::train::progress::Progress;
use crate::train::table::Table;

const HEADING: &str = "Capability kept";

/// Which tasks.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct TaskSettings {
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of prompts and completions with a column task, template or both; or a mixture (TOML), whose held-out tasks and templates are measured
    #[arg(long, help_heading = HEADING, value_name = "FILES")]
    pub tasks: Option<String>,
    /// Examples of each template that are measured, at most
    #[arg(long, help_heading = HEADING, default_value_t = 100, value_parser = at_least_one)]
    pub task_examples: usize,
    /// Completions of a template that count as classes, at most
    #[arg(long, help_heading = HEADING, default_value_t = 10, value_parser = at_least_one)]
    pub most_classes: usize,
}

impl TaskSettings {
    /// When they are read.
    pub(super) fn flags() -> Flags<Self> {
        let of = &["task_examples", "most_classes"];
        Flags::new().always(&["tasks"]).only("with --tasks", of, |settings: &Self| settings.tasks.is_some())
    }
}

/// The examples of a task in one template.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    task: String,
    name: String,
    examples: Vec<(Text, String)>,
    origins: Vec<schema::Origin>,
    /// The classes in the order of the alphabet; none where the completions are no classes.
    classes: Vec<String>,
}

/// Reads the tasks: the first examples of each template in an order that the seed chooses.
pub fn read(settings: &TaskSettings, pattern: &str, seed: u64) -> Result<Vec<Template>> {
    let examples = match mixture::is_mixture(pattern) {
        true => mixture::read(Pattern::evaluation(pattern), Part::HeldOut, seed)?.examples,
        false => examples_of_files(pattern)?,
    };
    let mut groups: BTreeMap<(String, String), Vec<MixtureExample>> = BTreeMap::new();
    for example in examples {
        let template = example.template.clone().unwrap_or_else(|| example.task.clone());
        groups.entry((example.task.clone(), template)).or_default().push(example);
    }
    groups.into_iter().map(|((task, name), examples)| template(settings, task, name, examples, seed)).collect()
}

fn examples_of_files(pattern: &str) -> Result<Vec<MixtureExample>> {
    let rows = TableRows::open(Pattern::evaluation(pattern))?;
    let has = |name: &str| rows.schemas().iter().all(|(_, schema)| schema.field_with_name(name).is_ok());
    let column = |name: &str| match has(name) {
        true => Ok(Some(schema::names(Pattern::evaluation(pattern), name)?)),
        false => Ok::<_, crate::Error>(None),
    };
    let (tasks, templates) = (column("task")?, column("template")?);
    if tasks.is_none() && templates.is_none() {
        bail!(
            "{pattern}: there is no column `task` or `template`; expected one that says what each row is an example of"
        );
    }
    let name = |names: &Option<Vec<(Option<String>, schema::Origin)>>, row: usize| names.as_ref()?.get(row)?.0.clone();
    let example = |(row, demonstration): (usize, Result<_>)| {
        let (task, template) = (name(&tasks, row), name(&templates, row));
        let task = task.or_else(|| template.clone()).unwrap_or_default();
        Ok(MixtureExample { task, template, demonstration: demonstration? })
    };
    schema::demonstrations(Pattern::evaluation(pattern))?.enumerate().map(example).collect()
}

fn template(
    settings: &TaskSettings,
    task: String,
    name: String,
    mut examples: Vec<MixtureExample>,
    seed: u64,
) -> Result<Template> {
    random::shuffle(&mut examples, &mut random::stream(seed, &format!("examples of {name}"), 0));
    let mut template = Template { task, name, examples: Vec::new(), origins: Vec::new(), classes: Vec::new() };
    let mut completions: BTreeMap<String, usize> = BTreeMap::new();
    for MixtureExample { demonstration, .. } in &examples {
        let (Some(prompt), Some(completion)) = (&demonstration.prompt, one_text(&demonstration.completion)) else {
            bail!("{}: expected a prompt and a completion that is one text or one message", demonstration.origin);
        };
        *completions.entry(completion.to_owned()).or_default() += 1;
        if template.examples.len() < settings.task_examples {
            template.examples.push((prompt.clone(), completion.to_owned()));
            template.origins.push(demonstration.origin.clone());
        }
    }
    // Texts that hardly ever recur are no classes, however few they are.
    let is_classes =
        (2..=settings.most_classes).contains(&completions.len()) && examples.len() >= 3 * completions.len();
    if is_classes {
        template.classes = completions.into_keys().collect();
    }
    Ok(template)
}

/// What is said in a completion, which answers to a conversation have as their one message.
fn one_text(completion: &Text) -> Option<&str> {
    let mut contents = completion.contents();
    contents.next().filter(|_| contents.next().is_none())
}

/// What was measured of one template, a number an example; which numbers depends on whether it has classes.
type Measured = Vec<(&'static str, Vec<f64>)>;

impl Template {
    fn is_classification(&self) -> bool {
        !self.classes.is_empty()
    }

    /// The share of the commonest class: what a model gets that has learned nothing but which one that is.
    fn majority(&self) -> Option<f64> {
        let count = |class: &String| self.examples.iter().filter(|(_, completion)| completion == class).count();
        let most = self.classes.iter().map(count).max()?;
        Some(most as f64 / self.examples.len() as f64)
    }

    fn questions(&self) -> impl Iterator<Item = Answered> {
        let answers: Vec<Text> = self.classes.iter().map(|class| Text::Plain(class.clone())).collect();
        (self.examples.iter().zip(&self.origins)).map(move |((prompt, _), origin)| Answered {
            prompt: prompt.clone(),
            answers: answers.clone(),
            origin: origin.clone(),
        })
    }

    /// Whether each example's class is the one that is most probable.
    fn by_rank(&self, log_probs: &[Vec<f64>]) -> Measured {
        let is_right = |((_, completion), log_probs): (&(Text, String), &Vec<f64>)| {
            let best = (0..log_probs.len()).max_by(|&a, &b| log_probs[a].total_cmp(&log_probs[b]).then(b.cmp(&a)));
            f64::from(best.is_some_and(|best| self.classes[best] == *completion))
        };
        vec![("accuracy", self.examples.iter().zip(log_probs).map(is_right).collect())]
    }

    /// How each answer compares with its completion. A completion in a script that a measure cannot divide into words has no value of it.
    fn by_text(&self, answers: &[String]) -> Measured {
        let scorer = RougeScorer::plain();
        let mut measured: Measured =
            ["exact_match", "f1", "rouge_1", "rouge_2", "rouge_l"].map(|name| (name, Vec::new())).into();
        for ((_, completion), answer) in self.examples.iter().zip(answers) {
            let exact = f64::from(squad::exact_match(answer, completion));
            let f1 = has_f1(completion).then(|| squad::f1(answer, completion));
            let rouge = has_rouge(completion).then(|| scorer.score(answer, completion));
            let of_rouge = [rouge.map(|of| of.rouge_1), rouge.map(|of| of.rouge_2), rouge.map(|of| of.rouge_l)];
            let numbers = [Some(exact), f1].into_iter().chain(of_rouge.map(|overlap| Some(overlap?.f1)));
            measured.iter_mut().zip(numbers).for_each(|((_, values), number)| values.extend(number));
        }
        measured
    }
}

/// Whether a completion can be compared by F1, which divides it into words at spaces: not one of a script that has none.
fn has_f1(completion: &str) -> bool {
    !is_mostly_unspaced(completion)
}

/// Whether a completion can be compared by ROUGE, whose words are of ASCII letters and digits: not one that is mostly of others.
fn has_rouge(completion: &str) -> bool {
    is_mostly_ascii(completion)
}

/// How many completions of the templates that are answered in words are left out of a measure, and of how many.
fn left_out(templates: &[Template], has_measure: fn(&str) -> bool) -> (usize, usize) {
    let generated = templates.iter().filter(|template| !template.is_classification());
    let completions: Vec<&String> =
        generated.flat_map(|of| of.examples.iter().map(|(_, completion)| completion)).collect();
    (completions.iter().filter(|completion| !has_measure(completion)).count(), completions.len())
}

/// What a model makes of every template.
fn measure(
    number: usize,
    model: &NamedFolder,
    templates: &[Template],
    (sampling, common): (&SamplingSettings, &CommonSettings),
    journal: &Journal,
    (cuts, progress): (&mut Cuts, &mut Progress),
) -> Result<Vec<Measured>> {
    let (classified, generated): (Vec<&Template>, Vec<&Template>) =
        templates.iter().partition(|of| of.is_classification());
    let ranked: Vec<Answered> = classified.iter().flat_map(|template| template.questions()).collect();
    let Found { log_probs, truncation } = journal
        .piece(&format!("tasks-ranked-{number}"), &ranked, || choices::log_probs(model, &ranked, common, progress))?;
    cuts.note_texts(&model.name, "tasks with classes", truncation, common.max_length);
    let question = |answered: Answered| Question::new(answered.prompt, answered.origin);
    let questions: Vec<Question> = generated.iter().flat_map(|template| template.questions()).map(question).collect();
    let mut answers = Vec::new();
    if !questions.is_empty() {
        let greedy = SamplingSettings { temperature: 0.0, ..*sampling };
        let asking =
            Asking { part: "tasks", questions: &questions, users: None, samples: 1, sampling: &greedy, common };
        let answering = Answering::open(asking, number, model, progress)?;
        cuts.note_prompts(&model.name, answering.truncation(), common.max_length);
        let sampled = answering.answer(journal, progress)?.sampled;
        answers = sampled.into_iter().flatten().map(|answer| answer.text).collect();
    }
    let (mut log_probs, mut answers) = (log_probs.into_iter(), answers.into_iter());
    let measured = |template: &Template| match template.is_classification() {
        true => template.by_rank(&log_probs.by_ref().take(template.examples.len()).collect::<Vec<_>>()),
        false => template.by_text(&answers.by_ref().take(template.examples.len()).collect::<Vec<_>>()),
    };
    Ok(templates.iter().map(measured).collect())
}

/// The mean over tasks of the mean over their templates of what the commonest class gets; none without classes.
fn majority(templates: &[&Template]) -> Option<f64> {
    let mut by_task: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (template, majority) in templates.iter().filter_map(|template| Some((template, template.majority()?))) {
        by_task.entry(&template.task).or_default().push(majority);
    }
    let mean = |values: &Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
    (!by_task.is_empty()).then(|| by_task.values().map(mean).sum::<f64>() / by_task.len() as f64)
}

/// What each measure is, in the order of the tables.
const MEASURES: [&str; 6] = ["accuracy", "exact_match", "f1", "rouge_1", "rouge_2", "rouge_l"];

/// What all models make of the templates.
struct Results<'a> {
    templates: &'a [Template],
    models: Vec<&'a str>,
    /// `[model][template]`
    measured: Vec<Vec<Measured>>,
    resamples: usize,
    seed: u64,
}

impl Results<'_> {
    /// The mean over tasks of the mean over templates, of one task or of all: every task counts once, whatever the number of its templates.
    fn estimate(&self, model: usize, measure: &str, task: Option<&str>) -> Option<Estimate> {
        let of_task = self.templates.iter().zip(&self.measured[model]);
        let of_measure = of_task.filter(|(template, _)| is_of(template, task)).filter_map(|(template, measured)| {
            let (_, values) = measured.iter().find(|(name, _)| *name == measure)?;
            Some((template.task.as_str(), values.as_slice()))
        });
        let of_measure: Vec<(&str, &[f64])> = of_measure.collect();
        let weight = |task: &str| 1.0 / of_measure.iter().filter(|(other, _)| *other == task).count() as f64;
        let weighted: Vec<(f64, &[f64])> = of_measure.iter().map(|(task, values)| (weight(task), *values)).collect();
        let mut stream = random::stream(self.seed, &format!("bootstrap of {measure}"), 0);
        bootstrap::mean_of_means(&weighted, self.resamples, &mut stream)
    }

    /// One measure: a row for each task that has it, and one for all, with the same for programs.
    fn table(&self, measure: &str, tasks: &[Option<&str>]) -> (Table, Map<String, Value>) {
        let mut table = Table::new(["task", "templates", "majority"].into_iter().chain(self.models.iter().copied()));
        let mut json = Map::new();
        for &task in tasks {
            let found: Vec<Option<Estimate>> =
                (0..self.models.len()).map(|model| self.estimate(model, measure, task)).collect();
            if found.iter().all(Option::is_none) {
                continue;
            }
            let of_task: Vec<&Template> = self.templates.iter().filter(|template| is_of(template, task)).collect();
            let majority = (measure == "accuracy").then(|| majority(&of_task)).flatten();
            let shown = majority.map_or(String::new(), |share| format!("{:.1}%", 100.0 * share));
            let cells = [task.unwrap_or(ALL).to_string(), of_task.len().to_string(), shown];
            table.row(cells.into_iter().chain(found.iter().map(|of| share(*of))));
            let by_model: Map<String, Value> =
                self.models.iter().zip(found).map(|(model, of)| (model.to_string(), json!(of))).collect();
            let of_json = json!({"templates": of_task.len(), "majority": majority, "models": by_model});
            json.insert(task.unwrap_or(ALL).to_string(), of_json);
        }
        (table, json)
    }
}

/// The row of all tasks.
const ALL: &str = "all tasks";

fn is_of(template: &Template, task: Option<&str>) -> bool {
    task.is_none_or(|task| template.task == task)
}

/// All tasks by all models, a table for each measure.
pub fn section(
    (settings, templates): (&TaskSettings, &[Template]),
    models: &[NamedFolder],
    how: (&SamplingSettings, &CommonSettings),
    (resamples, seed): (usize, u64),
    journal: &Journal,
    cuts: &mut Cuts,
) -> Result<Section> {
    let examples: usize = templates.iter().map(|template| template.examples.len()).sum();
    let mut progress = Progress::new("tasks", examples * models.len(), how.1.quiet);
    let measured = (models.iter().enumerate())
        .map(|(number, model)| measure(number, model, templates, how, journal, (&mut *cuts, &mut progress)))
        .collect::<Result<Vec<_>>>()?;
    progress.finish();
    let names = models.iter().map(|model| model.name.as_str()).collect();
    let results = Results { templates, models: names, measured, resamples, seed };
    let tasks: BTreeSet<&str> = templates.iter().map(|template| template.task.as_str()).collect();
    let rows: Vec<Option<&str>> = tasks.iter().copied().map(Some).chain([None]).collect();
    let (mut tables, mut json) = (Vec::new(), Map::new());
    for measure in MEASURES {
        let (table, found) = results.table(measure, &rows);
        if !found.is_empty() {
            tables.push((measure.replace('_', " "), table));
            json.insert(measure.to_string(), found.into());
        }
    }
    let classes = templates.iter().filter(|template| template.is_classification()).count();
    let mut notes = vec![format!(
        "{examples} examples of {} tasks in {} templates of {}, {classes} of them by rank classification, the others answered greedily. A task is the mean over its templates, \"{ALL}\" the mean over tasks; 95% bootstrap intervals in brackets.",
        tasks.len(),
        templates.len(),
        settings.tasks.as_deref().unwrap_or_default()
    )];
    let mut left_out_of = Map::new();
    for (name, has_measure, why) in [
        (
            "rouge",
            has_rouge as fn(&str) -> bool,
            "its words are of ASCII letters and digits, and most of theirs are not",
        ),
        ("f1", has_f1, "its words are divided by spaces, and their script has none"),
    ] {
        let (count, of) = left_out(templates, has_measure);
        if count > 0 {
            notes.push(format!("{count} of {of} completions are left out of {name}: {why}."));
        }
        left_out_of.insert(name.to_string(), json!({"completions": count, "of": of}));
    }
    json.insert("left_out".to_string(), left_out_of.into());
    Ok(Section::new("tasks", "Capability kept", notes, tables, json))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::data::schema::{Demonstration, Message, Origin};

    fn settings() -> TaskSettings {
        TaskSettings { tasks: None, task_examples: 6, most_classes: 3 }
    }

    fn examples(completions: &[&str]) -> Vec<MixtureExample> {
        let example = |(row, completion): (usize, &&str)| MixtureExample {
            task: "task".into(),
            template: None,
            demonstration: Demonstration {
                prompt: Some(Text::Plain(format!("p{row}"))),
                completion: Text::Plain(completion.to_string()),
                origin: Origin { file: Arc::from(Path::new("tasks.parquet")), row },
            },
        };
        completions.iter().enumerate().map(example).collect()
    }

    fn template_of(completions: &[&str]) -> Template {
        template(&settings(), "task".into(), "name".into(), examples(completions), 0).unwrap()
    }

    #[test]
    fn completions_that_recur_are_classes() {
        assert_eq!(template_of(&["no", "yes", "no", "yes", "no", "yes", "no"]).classes, ["no", "yes"]);
        assert!(template_of(&["no", "yes", "no"]).classes.is_empty());
        assert!(template_of(&["a"; 9]).classes.is_empty());
        assert_eq!(template_of(&["no", "yes", "no", "yes", "no", "yes", "no"]).examples.len(), 6);
    }

    #[test]
    fn the_most_probable_class_is_chosen_and_the_first_of_equals() {
        let template = template_of(&["no", "yes", "no", "yes", "no", "yes"]);
        // Always "no", though the last time it is as probable as "yes".
        let log_probs = [vec![vec![-1.0, -2.0]; 5], vec![vec![-1.0, -1.0]]].concat();
        let measured = template.by_rank(&log_probs);
        assert_eq!(measured[0].1.iter().sum::<f64>(), 3.0);
        assert_eq!(template.majority(), Some(0.5));
    }

    #[test]
    fn an_answer_to_a_conversation_is_the_content_of_its_one_message() {
        let completions = ["no", "yes", "no", "yes", "no", "yes"];
        let turns = |count: usize| {
            let mut examples = examples(&completions);
            for (example, completion) in examples.iter_mut().zip(completions) {
                example.demonstration.completion = Text::messages(vec![Message::assistant(completion); count]);
            }
            template(&settings(), "task".into(), "name".into(), examples, 0)
        };
        let (of_messages, of_texts) = (turns(1).unwrap(), template_of(&completions));
        assert_eq!((of_messages.classes, of_messages.examples), (of_texts.classes, of_texts.examples));
        let fault = turns(2).err().unwrap().to_string();
        assert!(fault.ends_with(": expected a prompt and a completion that is one text or one message"), "{fault}");
    }

    #[test]
    fn texts_are_compared_by_words() {
        let template = template_of(&["The red hen.", "a goat"]);
        let answers: Vec<String> =
            template.examples.iter().map(|(_, completion)| completion.replace("red ", "")).collect();
        let measured: BTreeMap<&str, f64> =
            template.by_text(&answers).into_iter().map(|(name, values)| (name, values.iter().sum())).collect();
        assert_eq!(measured["exact_match"], 1.0);
        // "hen" of "red hen" without the article: precision 1, recall 1/2.
        assert!((measured["f1"] - (1.0 + 2.0 / 3.0)).abs() < 1e-12);
        assert!((measured["rouge_1"] - (1.0 + 0.8)).abs() < 1e-12);
    }

    #[test]
    fn completions_of_other_scripts_have_no_value_of_a_measure_that_cannot_read_them() {
        let completions = ["башня", "The tower.", "塔は高い", "πύργος 5", "tháp cao"];
        let template = template(
            &TaskSettings { task_examples: 9, ..settings() },
            "task".into(),
            "name".into(),
            examples(&completions),
            0,
        )
        .unwrap();
        let answers: Vec<String> = template.examples.iter().map(|(_, completion)| completion.clone()).collect();
        let measured: BTreeMap<&str, Vec<f64>> = template.by_text(&answers).into_iter().collect();
        assert_eq!((&measured["exact_match"], &measured["f1"]), (&vec![1.0; 5], &vec![1.0; 4]));
        for rouge in ["rouge_1", "rouge_2", "rouge_l"] {
            assert_eq!(measured[rouge].len(), 2, "{rouge}");
        }
        assert!(measured["rouge_1"].iter().chain(&measured["rouge_l"]).all(|&share| share == 1.0));
        let templates = [template];
        assert_eq!((left_out(&templates, has_rouge), left_out(&templates, has_f1)), ((3, 5), (1, 5)));
    }

    #[test]
    fn every_task_counts_once_in_the_majority() {
        let of = |task: &str, completions: &[&str]| Template { task: task.into(), ..template_of(completions) };
        let (even, odd) = (["no", "yes", "no", "yes", "no", "yes"], ["no", "yes", "no", "no", "no", "no"]);
        let templates = [of("a", &even), of("a", &even), of("b", &odd)];
        assert!((majority(&templates.iter().collect::<Vec<_>>()).unwrap() - (0.5 + 5.0 / 6.0) / 2.0).abs() < 1e-12);
        assert_eq!(majority(&[]), None);
    }
}
