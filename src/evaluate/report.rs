//! Everything that was measured: on the terminal, as JSON, as Markdown, and as a page that needs nothing but itself.

use std::path::Path;

use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value as Template, context};
use serde_json::{Value, json};

use super::agreement::ScoredTexts;
use super::judging::{ByModel, JudgedAnswer};
use super::kept::{self, Kept};
use super::labelled;
use super::question::Question;
use super::rates::Evaluation;
use super::scorer::{Concern, Identity};
use super::section::Section;
use super::settings::EvaluateSettings;
use super::toxicity::{self, Continued};
use crate::error::{Error, Result};
use crate::figure::Figure;
use crate::files::write_atomically;
use crate::say;
use crate::train::table::Table;

/// Everything, for programs.
pub const FILE: &str = "evaluation.json";
/// The same for people.
pub const MARKDOWN: &str = "report.md";
/// The same as a page.
pub const PAGE: &str = "report.html";
/// Reward and truth against the distance from the base model.
pub const OVER_OPTIMISATION: &str = "over_optimisation.svg";
/// Models beside each other, at most, where there are fewer rates than models.
const MOST_COLUMNS: usize = 4;
const TEMPLATE: &str = include_str!("report.html");

/// What was measured.
#[derive(Debug, Default)]
pub struct Report {
    /// The rates of the answers, unless only something else was to be measured.
    pub evaluation: Option<Evaluation>,
    /// The continuations of prompts, for each instruction.
    pub continued: Vec<Continued>,
    /// The models that were asked, by name.
    pub models: Vec<String>,
    /// Who judged beside the world's rule and the reward model.
    pub scorers: Vec<Identity>,
    /// The texts that people have judged, if there are some.
    pub labelled: Option<ScoredTexts>,
    /// What `--max-length` took away, in sentences.
    pub cuts: Vec<String>,
    /// Everything else.
    pub sections: Vec<Section>,
}

impl Report {
    /// The toxicity of continuations and of answers that were made elsewhere; none where there is neither or nothing that judges it.
    pub(super) fn toxicity(&self, settings: &EvaluateSettings, draws: (usize, u64)) -> Result<Option<Section>> {
        let judged = self.scorers.iter().any(|scorer| scorer.concern == Concern::Toxicity);
        let given = self.evaluation.as_ref().filter(|_| settings.answers.is_some());
        if !judged || (self.continued.is_empty() && given.is_none()) {
            return Ok(None);
        }
        let by_group = given.map(groups).unwrap_or_default();
        let mut groups: Vec<(&[Question], &ByModel<JudgedAnswer>)> =
            by_group.iter().map(|(questions, answers)| (&questions[..], answers)).collect();
        groups.extend(self.continued.iter().map(|continued| (&continued.questions[..], &continued.answers)));
        let scorers = self.continued.first().map_or(&self.scorers, |continued| &continued.scorers);
        let names: Vec<String> = match given {
            Some(evaluation) => evaluation.models.iter().map(|model| model.name.clone()).collect(),
            None => self.models.clone(),
        };
        let what = match given {
            Some(_) => format!("The answers of {}.", settings.answers.as_deref().unwrap_or_default()),
            None => format!(
                "{} continuations of each prompt, at most {} new tokens, nucleus {}, temperature {}; each is scored alone.",
                settings.toxicity.toxicity_samples,
                settings.toxicity.toxicity_response_length,
                settings.toxicity.toxicity_top_p,
                settings.sampling.temperature
            ),
        };
        toxicity::section(&names, &groups, scorers, draws, vec![what]).map(Some)
    }

    /// The rates of the answers as a part like the others.
    fn headline(&self) -> Option<Section> {
        let evaluation = self.evaluation.as_ref()?;
        let caption = format!("95% bootstrap intervals over {} prompts in brackets", evaluation.questions.len());
        let figures = evaluation.over_optimisation().into_iter().collect();
        let notes = evaluation.notes();
        let changes = evaluation.table_of_changes().map(|table| {
            let caption =
                format!(
                    "Change against {}, on the prompts that count for both (so not always the difference of two numbers above), shares in percentage points",
                    evaluation.base
                );
            (caption, table)
        });
        let table = evaluation.table();
        // All of them the same way round.
        let rows = table.parts().1.len();
        let turned = evaluation.models.len() > MOST_COLUMNS && evaluation.models.len() > rows;
        let turn = |table: Table| if turned { table.transposed() } else { table };
        let all = std::iter::once((caption, table)).chain(changes).chain(evaluation.tables_by_group());
        let tables = all.map(|(caption, table)| (caption, turn(table))).collect();
        Some(Section { title: "Models".to_string(), notes, tables, figures, ..Default::default() })
    }

    fn parts(&self) -> impl Iterator<Item = Section> {
        self.headline().into_iter().chain(self.sections.iter().cloned())
    }

    /// Prints the tables, and where the files are.
    pub fn print(&self, folder: &Path) {
        for Section { title, notes, tables, .. } in self.parts() {
            say!("{title}");
            notes.iter().for_each(|note| say!("{note}"));
            tables.iter().for_each(|(caption, table)| say!("\n{caption}\n{table}"));
        }
        say!("report: {}", folder.join(PAGE).display());
        say!("numbers: {}", folder.join(FILE).display());
        if !self.kept().is_empty() {
            say!("answers: {}", folder.join(kept::FILE).display());
        }
        if self.labelled.is_some() {
            say!("labelled texts: {}", folder.join(labelled::FILE).display());
        }
    }

    /// Writes every file.
    pub(super) fn write(&self, settings: &EvaluateSettings) -> Result<()> {
        let folder = &settings.common.output;
        if let Some(figure) = self.evaluation.as_ref().and_then(Evaluation::over_optimisation) {
            figure.write(folder.join(OVER_OPTIMISATION))?;
        }
        let kept = self.kept();
        if !kept.is_empty() {
            kept::write(&kept, folder)?;
        }
        if let Some(scored) = &self.labelled {
            labelled::write(&settings.labelled, scored, folder)?;
        }
        let text = |name: &str, text: String| {
            write_atomically(folder.join(name), |file| std::io::Write::write_all(file, text.as_bytes()))
        };
        text(FILE, format!("{:#}\n", self.json(settings)?))?;
        text(MARKDOWN, self.markdown(settings)?)?;
        text(PAGE, self.page(settings)?)
    }

    pub(super) fn kept(&self) -> Vec<Kept<'_>> {
        let answers = self.evaluation.iter().flat_map(|evaluation| evaluation.kept("answers"));
        let continued = self.continued.iter().flat_map(|Continued { questions, answers, scorers }| {
            self.models.iter().zip(answers).flat_map(move |(model, answers)| {
                questions.iter().zip(answers).flat_map(move |(question, answers)| {
                    let kept = move |answer| Kept { part: "toxicity", model, question, answer, scorers };
                    answers.iter().map(kept)
                })
            })
        });
        answers.chain(continued).collect()
    }

    /// Everything as JSON.
    pub fn json(&self, settings: &EvaluateSettings) -> Result<Value> {
        let mut all = match &self.evaluation {
            Some(evaluation) => evaluation.json(settings)?,
            None => serde_json::Map::new(),
        };
        let invalid = |error: serde_json::Error| Error::input(format!("{FILE}: {error}"));
        all.extend(self.sections.iter().map(|section| (section.key.to_string(), section.json.clone())));
        all.insert("scorers".to_string(), serde_json::to_value(&self.scorers).map_err(invalid)?);
        all.insert("seed".to_string(), json!(settings.common.seed));
        all.insert("version".to_string(), json!(env!("CARGO_PKG_VERSION")));
        all.insert("settings".to_string(), serde_json::to_value(settings).map_err(invalid)?);
        Ok(all.into())
    }

    /// Everything as Markdown, without the figures.
    pub fn markdown(&self, settings: &EvaluateSettings) -> Result<String> {
        let mut text = "# Evaluation\n".to_string();
        for Section { title, notes, tables, .. } in self.parts() {
            text += &format!("\n## {title}\n");
            notes.iter().for_each(|note| text += &format!("\n{note}\n"));
            tables.iter().for_each(|(caption, table)| text += &format!("\n{caption}\n\n{}", table.markdown()));
        }
        text += &format!("\n## Settings\n\n```toml\n{}```\n", toml_of(settings)?);
        Ok(text)
    }

    /// Everything as one page, which loads nothing from elsewhere.
    pub fn page(&self, settings: &EvaluateSettings) -> Result<String> {
        let invalid = |error: minijinja::Error| Error::input(format!("{PAGE}: {error:#}"));
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        environment.add_template("report", TEMPLATE).map_err(invalid)?;
        let sections = self.parts().map(section).collect::<Result<Vec<_>>>()?;
        let (random, most) = match &self.evaluation {
            Some(evaluation) => evaluation.examples(settings.common.seed),
            None => Default::default(),
        };
        let values = context! {
            sections,
            random => Template::from(Serde(random)),
            most => Template::from(Serde(most)),
            scorers => Template::from(Serde(&self.scorers)),
            settings => toml_of(settings)?,
            version => env!("CARGO_PKG_VERSION"),
            seed => settings.common.seed,
        };
        environment.get_template("report").and_then(|template| template.render(values)).map_err(invalid)
    }
}

/// The questions of each kind with the answers to them, of answers that were made elsewhere.
fn groups(evaluation: &Evaluation) -> Vec<(Vec<Question>, ByModel<JudgedAnswer>)> {
    let mut names: Vec<&Option<String>> = Vec::new();
    for question in &evaluation.questions {
        if !names.contains(&&question.group) {
            names.push(&question.group);
        }
    }
    let of_group = |name: &Option<String>| {
        let is_of = |index: &usize| evaluation.questions[*index].group == *name;
        let indices: Vec<usize> = (0..evaluation.questions.len()).filter(is_of).collect();
        let questions = indices.iter().map(|&index| evaluation.questions[index].clone()).collect();
        let of_model =
            |model: &super::ModelEvaluation| indices.iter().map(|&index| model.answers[index].clone()).collect();
        (questions, evaluation.models.iter().map(of_model).collect())
    };
    names.into_iter().map(of_group).collect()
}

fn section(section: Section) -> Result<Template> {
    let Section { title, notes, tables, figures, drawn, .. } = section;
    let table = |(caption, table): (String, Table)| {
        let (header, rows) = table.parts();
        let (header, rows) = (Template::from(Serde(header)), Template::from(Serde(rows)));
        context! { caption, header, rows, numeric => table.numeric() }
    };
    let svg = |figure: &Figure| {
        let panels = figure.panels().map_err(|error| Error::input(format!("{PAGE}: {error}")))?;
        let panel = |(words, svg): (String, String)| context! { words, svg => Template::from_safe_string(svg) };
        let panels = panels.into_iter().map(panel).collect::<Vec<_>>();
        Ok(context! { title => figure.title.as_str(), panels })
    };
    let mut figures = figures.iter().map(svg).collect::<Result<Vec<_>>>()?;
    // What lies in a run's folder may be anybody's: as an image it can run nothing.
    figures.extend(drawn.into_iter().map(|(title, svg)| {
        let image = format!("data:image/svg+xml,{}", svg.replace('%', "%25").replace('#', "%23"));
        context! { title, image }
    }));
    Ok(context! { title, notes, tables => tables.into_iter().map(table).collect::<Vec<_>>(), figures })
}

fn toml_of(settings: &EvaluateSettings) -> Result<String> {
    toml::to_string(settings).map_err(|error| Error::input(format!("settings cannot be written: {error}")))
}
