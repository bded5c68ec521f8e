//! Rates with their intervals, as a table and as files.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray};
use serde_json::{Map, Value, json};

use super::bootstrap::{self, Cluster, Estimate};
use super::{EvaluateSettings, JudgedAnswer, diversity, hallucination, toxicity};
use crate::data::parquet;
use crate::error::{Error, Result};
use crate::figure::{Figure, Panel, Series};
use crate::files::write_atomically;
use crate::random;
use crate::train::table::Table;
use crate::world::rule::{Case, Kind};

/// One number an answer, `None` where it is not defined.
type OfAnswer = fn(&Case, &JudgedAnswer) -> Option<f64>;

/// What is averaged over answers, in the order of the table.
const RATES: [(&str, OfAnswer); 11] = [
    ("hallucination_rate", hallucination::hallucinated),
    ("toxicity_rate", toxicity::plain),
    ("toxicity_rate_respectful", toxicity::respectful),
    ("preferred_to_base", |_, answer| Some(answer.preferred)),
    ("preferred_to_base_by_reward", |_, answer| answer.preferred_by_reward),
    ("answer_rate", hallucination::answered),
    ("correct_rate", hallucination::correct),
    ("mean_length", |_, answer| Some(answer.sampled.tokens.len() as f64)),
    ("mean_reward", |_, answer| answer.reward),
    ("mean_utility", |_, answer| Some(f64::from(answer.judgement.utility))),
    ("kl_from_base", |_, answer| answer.kl),
];

/// Those of them that are no shares.
const NOT_SHARES: [&str; 4] = ["mean_length", "mean_reward", "mean_utility", "kl_from_base"];

/// What was measured of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelEvaluation {
    /// The name it was given.
    pub name: String,
    /// Each rate by name. A rate that no evaluation prompt defines is left out.
    pub rates: Vec<(&'static str, Estimate)>,
    /// Its answers and what they are: `[prompt][sample]`.
    pub answers: Vec<Vec<JudgedAnswer>>,
}

impl ModelEvaluation {
    /// Measures a model by its answers.
    pub(super) fn new(
        name: &str,
        cases: &[Case],
        answers: Vec<Vec<JudgedAnswer>>,
        resamples: usize,
        seed: u64,
    ) -> Self {
        let mut rates = Vec::new();
        for (rate, of_answer) in RATES {
            let clusters: Vec<Cluster> =
                cases.iter().zip(&answers).map(|(case, answers)| cluster(case, answers, of_answer)).collect();
            // The same prompts are drawn for every model.
            let mut stream = random::stream(seed, &format!("bootstrap of {rate}"), 0);
            rates.extend(bootstrap::rate(&clusters, resamples, &mut stream).map(|estimate| (rate, estimate)));
        }
        let texts = answers.iter().map(|answers| answers.iter().map(|answer| answer.sampled.text.as_str()));
        rates.extend(diversity::distinct_2(texts).map(|estimate| ("distinct_2", estimate)));
        ModelEvaluation { name: name.to_string(), rates, answers }
    }

    /// The rate of this name, as in `evaluation.json`.
    pub fn rate(&self, name: &str) -> Option<Estimate> {
        self.rates.iter().find(|(rate, _)| *rate == name).map(|&(_, estimate)| estimate)
    }
}

fn cluster(case: &Case, answers: &[JudgedAnswer], of_answer: OfAnswer) -> Cluster {
    let mut cluster = Cluster::default();
    for value in answers.iter().filter_map(|answer| of_answer(case, answer)) {
        cluster.sum += value;
        cluster.count += 1.0;
    }
    cluster
}

/// What was measured of all models.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// In the order in which they were given.
    pub models: Vec<ModelEvaluation>,
    /// The name of the model that the others are compared with.
    pub base: String,
    /// The evaluation prompts.
    pub cases: Vec<Case>,
}

impl Evaluation {
    /// The model of this name.
    pub fn model(&self, name: &str) -> Option<&ModelEvaluation> {
        self.models.iter().find(|model| model.name == name)
    }

    /// A row for each rate, a column for each model: the value, and its 95% interval in brackets.
    pub fn table(&self) -> Table {
        let mut table = Table::new(std::iter::once("").chain(self.models.iter().map(|model| model.name.as_str())));
        let rates = RATES.iter().map(|&(name, _)| name).chain(["distinct_2"]);
        for name in rates.filter(|name| self.models.iter().any(|model| model.rate(name).is_some())) {
            let cell = |model: &ModelEvaluation| match model.rate(name) {
                Some(_) if is_comparison(name) && model.name == self.base => "-".to_string(),
                Some(estimate) => show(name, estimate),
                None => "-".to_string(),
            };
            table.row(std::iter::once(name.replace('_', " ")).chain(self.models.iter().map(cell)));
        }
        table
    }

    /// `models.<name>.<rate>` = `{value, low, high}`, with what was asked for and how much was measured.
    pub fn json(&self, settings: &EvaluateSettings) -> Result<Value> {
        let invalid = |error: serde_json::Error| Error::input(format!("{FILE}: {error}"));
        let mut models = Map::new();
        for model in &self.models {
            let rates =
                model.rates.iter().map(|(name, estimate)| Ok((name.to_string(), serde_json::to_value(estimate)?)));
            models.insert(model.name.clone(), rates.collect::<Result<Map<_, _>, _>>().map_err(invalid)?.into());
        }
        let kinds = Kind::ALL.map(|kind| {
            let count = self.cases.iter().filter(|case| case.kind == kind).count();
            (kind.name().to_string(), Value::from(count))
        });
        Ok(json!({
            "models": models,
            "base": self.base,
            "seed": settings.common.seed,
            "counts": {
                "prompts": self.cases.len(),
                "prompts_by_kind": Map::from_iter(kinds),
                "answers_to_each_prompt": settings.samples,
                "resamples": settings.resamples,
            },
            "settings": serde_json::to_value(settings).map_err(invalid)?,
        }))
    }

    /// Reward and the rule's utility as functions of the distance from the base model, in the square root of nats (Gao et al. 2022): where the first rises and
    /// the second falls the policies exploit the reward. `None` without a reward model or distances.
    pub fn over_optimisation(&self) -> Option<Figure> {
        let curve = |rate: &str| -> Option<Vec<(f64, f64)>> {
            let point = |model: &ModelEvaluation| {
                Some((model.rate("kl_from_base")?.value.max(0.0).sqrt(), model.rate(rate)?.value))
            };
            let mut points: Vec<(f64, f64)> = self.models.iter().map(point).collect::<Option<_>>()?;
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            (points.len() > 1).then_some(points)
        };
        let panel = |y: &str, points| Panel {
            x: format!("√KL from {}, √nats", self.base),
            y: y.to_string(),
            series: vec![Series { name: y.to_string(), points }],
            is_calibration: false,
        };
        let panels = vec![
            panel("proxy: mean reward", curve("mean_reward")?),
            panel("truth: mean utility by the world's rule", curve("mean_utility")?),
        ];
        Some(Figure { title: "Over-optimisation".to_string(), panels })
    }

    /// Writes `evaluation.json`, `answers.parquet` and, where there is a reward model, `over_optimisation.svg` into `folder`.
    pub(super) fn write(&self, settings: &EvaluateSettings, folder: &Path) -> Result<()> {
        if let Some(figure) = self.over_optimisation() {
            figure.write(folder.join(OVER_OPTIMISATION))?;
        }
        parquet::write(folder.join(ANSWERS), &self.answers()?)?;
        let json = self.json(settings)?;
        write_atomically(folder.join(FILE), |file| std::io::Write::write_all(file, format!("{json:#}\n").as_bytes()))
    }

    /// Every answer with what it was found to be, a row each.
    fn answers(&self) -> Result<RecordBatch> {
        let rows: Vec<(&str, &Case, &JudgedAnswer)> = (self.models.iter())
            .flat_map(|model| self.cases.iter().zip(&model.answers).map(move |(case, answers)| (model, case, answers)))
            .flat_map(|(model, case, answers)| answers.iter().map(move |answer| (model.name.as_str(), case, answer)))
            .collect();
        let strings = |of: fn(&(&str, &Case, &JudgedAnswer)) -> String| -> ArrayRef {
            Arc::new(StringArray::from_iter_values(rows.iter().map(of)))
        };
        let flags = |of: fn(&JudgedAnswer) -> bool| -> ArrayRef {
            Arc::new(rows.iter().map(|(_, _, answer)| Some(of(answer))).collect::<BooleanArray>())
        };
        let numbers = |of: fn(&JudgedAnswer) -> Option<f64>| -> ArrayRef {
            Arc::new(rows.iter().map(|(_, _, answer)| of(answer)).collect::<Float64Array>())
        };
        let tokens: Int64Array = rows.iter().map(|(_, _, answer)| Some(answer.sampled.tokens.len() as i64)).collect();
        let columns: [(&str, ArrayRef); 14] = [
            ("model", strings(|(model, _, _)| model.to_string())),
            ("kind", strings(|(_, case, _)| case.kind.name().to_string())),
            ("prompt", strings(|(_, case, _)| case.prompt.clone())),
            ("response", strings(|(_, _, answer)| answer.sampled.text.clone())),
            ("tokens", Arc::new(tokens)),
            ("ended", flags(|answer| answer.sampled.ended)),
            ("hallucinated", flags(|answer| answer.judgement.hallucinated)),
            ("rude", flags(|answer| answer.judgement.rude)),
            ("refused", flags(|answer| answer.judgement.refused)),
            ("right", flags(|answer| answer.judgement.right)),
            ("preferred_to_base", numbers(|answer| Some(answer.preferred))),
            ("reward", numbers(|answer| answer.reward)),
            ("utility", numbers(|answer| Some(f64::from(answer.judgement.utility)))),
            ("kl", numbers(|answer| answer.kl)),
        ];
        RecordBatch::try_from_iter_with_nullable(columns.map(|(name, column)| (name, column, true)))
            .map_err(|error| Error::input(format!("{ANSWERS}: {error}")))
    }
}

/// Every rate.
pub const FILE: &str = "evaluation.json";
/// Reward and truth against the distance from the base model.
pub const OVER_OPTIMISATION: &str = "over_optimisation.svg";
/// Every answer.
pub const ANSWERS: &str = "answers.parquet";

/// Whether a rate compares a model with the base model.
fn is_comparison(name: &str) -> bool {
    name.starts_with("preferred") || name == "kl_from_base"
}

fn show(name: &str, Estimate { value, low, high }: Estimate) -> String {
    if NOT_SHARES.contains(&name) {
        format!("{value:.2} [{low:.2}, {high:.2}]")
    } else {
        format!("{:.1}% [{:.1}, {:.1}]", 100.0 * value, 100.0 * low, 100.0 * high)
    }
}
