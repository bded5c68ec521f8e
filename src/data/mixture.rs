//! Mixtures of demonstrations: several sources by tasks, with a maximum a task, weights, templates, and tasks held out, in a small TOML file:
//!
//! ```toml
//! maximum = 3000                          # examples that a task of a source gives at most
//! templates_per_example = 1               # how many of its templates an example is put in, chosen by seed
//! held_out_tasks = ["rte", "glue_*"]      # names; * stands for anything
//! held_out_templates = ["*_as_a_poem"]
//!
//! [[source]]
//! data = "boolq.parquet"                  # a file, folder or glob, seen from the folder of the mixture, or a data set of the hub
//! task = "boolq"                          # or task_column = "task", a column that names each row's task
//! weight = 2.0
//!
//! [[source.template]]                     # minijinja over the row's columns (of CSV all are texts); without templates the columns are those of demonstrations
//! name = "passage first"
//! prompt = "{{ passage }}\n{{ question }}"
//! completion = " {{ 'yes' if answer else 'no' }}"
//!
//! [[source]]                              # T0's mixture as published: a row names its template, which begins with its task
//! data = "t0.parquet"
//! task_column = "template"
//! tasks = ["ag_news", "glue_mrpc"]
//! template_column = "template"
//!
//! [[source.template]]                     # one more, around the row's own
//! name = "as text"
//! prompt = "{{ prompt }}\n"
//! completion = "{{ completion | replace('<|endoftext|>', '') }}"
//! ```
//!
//! Examples-proportional mixing with a maximum (Raffel et al. 2020, section 3.5.2; Wei et al. 2022, section 2.3; Sanh et al. 2022, section 5): a task with `e` examples
//! in a source gives `weight min(e, maximum)` of them, chosen by seed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use glob::Pattern;
use serde::Deserialize;

use super::mixture_template::RowTemplate;
use super::schema::{self, Demonstration};
use super::splits::{HubData, Pattern as DataPattern, Wanted};
use super::table::{Rows, TableRows};
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;
use crate::random::{shuffle, stream};
use crate::remote::objects;

/// A mixture as its file has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct MixtureFile {
    maximum: Option<usize>,
    #[serde(default = "one")]
    templates_per_example: usize,
    #[serde(default)]
    held_out_tasks: Vec<String>,
    #[serde(default)]
    held_out_templates: Vec<String>,
    source: Vec<Source>,
}

fn one() -> usize {
    1
}

fn unweighted() -> f64 {
    1.0
}

/// More often than this nobody wants to see an example, but for a slip of the pen.
const MOST_WEIGHT: f64 = 1000.0;

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    data: String,
    task: Option<String>,
    task_column: Option<String>,
    #[serde(default)]
    tasks: Vec<String>,
    template_column: Option<String>,
    #[serde(default = "unweighted")]
    weight: f64,
    #[serde(default)]
    template: Vec<TemplateText>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct TemplateText {
    name: String,
    prompt: String,
    completion: String,
}

/// Which part of a mixture is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What is trained on: everything that is not held out, by the rules of the mixture.
    Training,
    /// What is held out: every example of the tasks and templates that are, once for each of its templates.
    HeldOut,
}

/// An example of a mixture.
#[derive(Debug, Clone, PartialEq)]
pub struct MixtureExample {
    /// The task.
    pub task: String,
    /// The template that it is put in, where it has a name.
    pub template: Option<String>,
    /// The example.
    pub demonstration: Demonstration,
}

/// What was read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Mixture {
    /// The examples, source by source.
    pub examples: Vec<MixtureExample>,
    /// How many examples each task gave, of how many that it has.
    pub tasks: BTreeMap<String, (usize, usize)>,
    /// The tasks and templates that are held out.
    pub held_out: BTreeSet<String>,
}

impl MixtureFile {
    fn read(path: &str) -> Result<Self> {
        let text = limits::read_text(path, limits::SMALL_FILE)?;
        toml::from_str(&text).map_err(|error| Error::input(format!("{path}: {error}")))
    }
}

/// What the sources of a mixture name: files, folders and globs.
pub fn sources(path: &str) -> Result<Vec<String>> {
    let pattern = |source: &Source| pattern(folder_of(path), source);
    Ok(MixtureFile::read(path)?.source.iter().map(pattern).collect())
}

/// The folder from which a mixture's sources are seen.
fn folder_of(path: &str) -> &Path {
    Path::new(path).parent().unwrap_or(Path::new(""))
}

fn pattern(folder: &Path, source: &Source) -> String {
    if objects::is_remote(&source.data) {
        return source.data.clone();
    }
    let local = folder.join(&source.data);
    match HubData::parse(&source.data).filter(|_| !local.exists()) {
        Some(data) => data.to_string(),
        None => local.display().to_string(),
    }
}

/// Whether a pattern of data names a mixture.
pub fn is_mixture(pattern: &str) -> bool {
    pattern.ends_with(".toml")
}

/// Reads a part of a mixture.
///
/// # Errors
/// Where the file is none, a source cannot be read, a row names no task, or a template does not fit the row.
pub fn read<'p>(path: impl Into<DataPattern<'p>>, part: Part, seed: u64) -> Result<Mixture> {
    let DataPattern { text: path, wanted } = path.into();
    let file = MixtureFile::read(path)?;
    if file.templates_per_example == 0 || file.maximum == Some(0) {
        bail!("{path}: `maximum` and `templates_per_example` are expected to be at least 1");
    }
    let rules = Rules::new(path, &file, part)?;
    let folder = folder_of(path);
    let mut mixture = Mixture::default();
    for (index, source) in file.source.iter().enumerate() {
        let source = OpenSource::open(path, folder, source, index, wanted)?;
        source.add_to(&mut mixture, &rules, seed)?;
    }
    if mixture.examples.is_empty() {
        bail!("{path}: no example is left; check held_out_tasks and held_out_templates");
    }
    Ok(mixture)
}

/// What holds for all sources.
struct Rules {
    part: Part,
    maximum: usize,
    templates_per_example: usize,
    held_out_tasks: Vec<Pattern>,
    held_out_templates: Vec<Pattern>,
}

impl Rules {
    fn new(path: &str, file: &MixtureFile, part: Part) -> Result<Self> {
        let patterns = |texts: &[String]| {
            let pattern = |text: &String| {
                Pattern::new(text)
                    .map_err(|error| Error::input(format!("{path}: \"{text}\": not a valid pattern: {error}")))
            };
            texts.iter().map(pattern).collect::<Result<Vec<_>>>()
        };
        Ok(Rules {
            part,
            maximum: file.maximum.unwrap_or(usize::MAX),
            templates_per_example: file.templates_per_example,
            held_out_tasks: patterns(&file.held_out_tasks)?,
            held_out_templates: patterns(&file.held_out_templates)?,
        })
    }

    fn is_task_held_out(&self, task: &str) -> bool {
        self.held_out_tasks.iter().any(|pattern| pattern.matches(task))
    }

    fn is_template_held_out(&self, template: &str) -> bool {
        self.held_out_templates.iter().any(|pattern| pattern.matches(template))
    }

    /// Whether an example of this task in this template belongs to the part that is wanted.
    fn is_wanted(&self, task: &str, template: Option<&str>) -> bool {
        let is_held_out = self.is_task_held_out(task) || template.is_some_and(|name| self.is_template_held_out(name));
        is_held_out == (self.part == Part::HeldOut)
    }
}

/// A source with its templates compiled.
struct OpenSource<'a> {
    mixture: &'a str,
    pattern: String,
    wanted: Wanted,
    source: &'a Source,
    index: usize,
    templates: Vec<RowTemplate>,
}

impl<'a> OpenSource<'a> {
    fn open(mixture: &'a str, folder: &Path, source: &'a Source, index: usize, wanted: Wanted) -> Result<Self> {
        let pattern = pattern(folder, source);
        if source.task.is_some() == source.task_column.is_some() {
            bail!("{mixture}: source {pattern}: expected either `task`, a name, or `task_column`, a column of names");
        }
        if source.template_column.is_some() && source.template.len() > 1 {
            bail!(
                "{mixture}: source {pattern}: its rows are in a template already (`template_column`), and may be put in one more at most"
            );
        }
        if !(0.0..=MOST_WEIGHT).contains(&source.weight) {
            bail!(
                "{mixture}: source {pattern}: weight is {}; expected a number from 0 to {MOST_WEIGHT}",
                source.weight
            );
        }
        let template = |text: &TemplateText| RowTemplate::new(mixture, &text.name, &text.prompt, &text.completion);
        let templates = source.template.iter().map(template).collect::<Result<_>>()?;
        Ok(OpenSource { mixture, pattern, wanted, source, index, templates })
    }

    fn pattern(&self) -> DataPattern<'_> {
        DataPattern { text: &self.pattern, wanted: self.wanted }
    }

    /// Each row's task, and the template that it is in already.
    fn rows(&self) -> Result<Vec<(String, Option<String>)>> {
        let Source { task_column, template_column, .. } = self.source;
        let mut all = Vec::new();
        for rows in TableRows::open(self.pattern())? {
            let rows = rows?;
            let (tasks, templates) = (names(&rows, task_column.as_deref())?, names(&rows, template_column.as_deref())?);
            for row in 0..rows.batch.num_rows() {
                let task = match (&self.source.task, &tasks) {
                    (Some(task), _) => task.clone(),
                    (None, names) => self.task_of(&rows, row, names.as_ref().map_or("", |names| &names[row]))?,
                };
                all.push((task, templates.as_ref().map(|templates| templates[row].clone())));
            }
        }
        Ok(all)
    }

    /// The task that a row's name belongs to: itself, or the longest of the listed tasks that it begins with.
    fn task_of(&self, rows: &Rows, row: usize, name: &str) -> Result<String> {
        if self.source.tasks.is_empty() {
            return Ok(name.to_string());
        }
        let begun = self.source.tasks.iter().filter(|task| name.starts_with(task.as_str()));
        match begun.max_by_key(|task| task.len()) {
            Some(task) => Ok(task.clone()),
            None => bail!(
                "{}, column `{}`: \"{name}\" begins with none of the `tasks` of {}; add its task there",
                rows.origin(row),
                self.source.task_column.as_deref().unwrap_or_default(),
                self.mixture
            ),
        }
    }

    fn add_to(&self, mixture: &mut Mixture, rules: &Rules, seed: u64) -> Result<()> {
        let rows = self.rows()?;
        // What a row is in already is what can be held out; else what it is put in.
        let own: Vec<Option<&str>> = match self.templates.is_empty() || self.source.template_column.is_some() {
            true => vec![None],
            false => self.templates.iter().map(|template| Some(template.name())).collect(),
        };
        let mut by_task: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (row, (task, given)) in rows.iter().enumerate() {
            let names = || own.iter().map(|own| given.as_deref().or(*own));
            if names().any(|name| rules.is_wanted(task, name)) {
                by_task.entry(task).or_default().push(row);
            }
            if rules.is_task_held_out(task) {
                mixture.held_out.insert(format!("task {task}"));
            } else {
                let held_out = names().flatten().filter(|name| rules.is_template_held_out(name));
                mixture.held_out.extend(held_out.map(|name| format!("template {name}")));
            }
        }
        let mut times = vec![0; rows.len()];
        for (task, mut of_task) in by_task {
            let count = of_task.len();
            let wanted = match rules.part {
                Part::Training => (self.source.weight * count.min(rules.maximum) as f64).round() as usize,
                Part::HeldOut => count,
            };
            shuffle(&mut of_task, &mut stream(seed, &format!("mixture of {task}"), self.index as u64));
            (0..wanted).for_each(|number| times[of_task[number % count]] += 1);
            let entry = mixture.tasks.entry(task.to_string()).or_default();
            (entry.0, entry.1) = (entry.0 + wanted, entry.1 + count);
        }
        self.render(&rows, &times, mixture, rules, seed)
    }

    /// Puts every row that is wanted in its templates, as often as it is wanted.
    fn render(
        &self,
        rows: &[(String, Option<String>)],
        times: &[usize],
        mixture: &mut Mixture,
        rules: &Rules,
        seed: u64,
    ) -> Result<()> {
        let mut push = |row: usize, template: Option<&str>, demonstration: Demonstration| {
            let example =
                MixtureExample { task: rows[row].0.clone(), template: template.map(String::from), demonstration };
            mixture.examples.extend(std::iter::repeat_n(example, times[row]));
        };
        if self.templates.is_empty() {
            let unused = |(file, schema): &(_, _)| schema::DEMONSTRATIONS.unused_columns(file, schema);
            let is_named = |name: &String| {
                [&self.source.task_column, &self.source.template_column]
                    .into_iter()
                    .flatten()
                    .any(|known| known == name)
            };
            let unused = TableRows::open(self.pattern())?.schemas().iter().flat_map(unused).collect::<Vec<_>>();
            schema::note_unused(&self.pattern, unused.into_iter().filter(|name| !is_named(name)));
            for (row, demonstration) in schema::demonstrations(self.pattern())?.enumerate() {
                push(row, rows[row].1.as_deref(), demonstration?);
            }
            return Ok(());
        }
        let mut first = 0;
        for batch in TableRows::open(self.pattern())? {
            let batch = batch?;
            for row in 0..batch.batch.num_rows() {
                let number = first + row;
                if times[number] == 0 {
                    continue;
                }
                let (task, given) = &rows[number];
                let name = |template: &'_ RowTemplate| given.as_deref().unwrap_or(template.name()).to_string();
                let is_wanted = |template: &&RowTemplate| rules.is_wanted(task, Some(&name(template)));
                let mut chosen: Vec<&RowTemplate> = self.templates.iter().filter(is_wanted).collect();
                if rules.part == Part::Training {
                    shuffle(
                        &mut chosen,
                        &mut stream(seed, &format!("templates of source {}", self.index), number as u64),
                    );
                    chosen.truncate(rules.templates_per_example);
                }
                for template in chosen {
                    push(number, Some(&name(template)), template.render(&batch, row)?);
                }
            }
            first += batch.batch.num_rows();
        }
        Ok(())
    }
}

/// A column of names, if one is asked for; every row has one.
fn names(rows: &Rows, column: Option<&str>) -> Result<Option<Vec<String>>> {
    let Some(column) = column else { return Ok(None) };
    let names = rows.strings(column)?;
    let name = |(row, name): (usize, Option<&str>)| match name {
        Some(name) => Ok(name.to_string()),
        None => bail!("{}, column `{column}`: is null; expected a name", rows.origin(row)),
    };
    names.iter().enumerate().map(name).collect::<Result<_>>().map(Some)
}

impl Mixture {
    /// The demonstrations alone.
    pub fn into_demonstrations(self) -> impl Iterator<Item = Demonstration> {
        self.examples.into_iter().map(|example| example.demonstration)
    }

    /// Every text, prompts and completions.
    pub fn texts(&self) -> impl Iterator<Item = String> + Send {
        let demonstrations = self.examples.iter().map(|example| &example.demonstration);
        let texts = demonstrations.flat_map(|of| of.prompt.iter().chain([&of.completion]));
        texts.flat_map(|text| text.contents().map(str::to_string).collect::<Vec<String>>())
    }

    /// What is in it, in a line for the plan.
    pub fn describe(&self) -> String {
        let of = self.tasks.values().fold((0, 0), |sum, task| (sum.0 + task.0, sum.1 + task.1));
        let mut text = format!("{} tasks, {} of {} examples", self.tasks.len(), of.0, of.1);
        if !self.held_out.is_empty() {
            let names: Vec<&str> = self.held_out.iter().map(String::as_str).collect();
            text += &format!("; held out: {}", names.join(", "));
        }
        text
    }
}

#[cfg(test)]
mod tests;
