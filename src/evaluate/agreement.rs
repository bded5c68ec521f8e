//! What the scorers' numbers are worth: their agreement with people, beside chance and beside "the longer text is worse".

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::labelled::{self, LabelledSettings, LabelledText};
use super::metrics::agreement::{Scored, balanced_accuracy, best_threshold, f1, roc_auc, spearman};
use super::scorer::{Identity, Scorer, Subject, Verdict, verdicts};
use super::section::{Section, number};
use crate::bootstrap::{self, Estimate};
use crate::error::Result;
use crate::random;
use crate::train::table::Table;

/// What a scorer says of every text, and what people say.
struct Compared<'a> {
    /// Those that the scorer can judge.
    texts: Vec<&'a LabelledText>,
    scorer: Identity,
    scores: Vec<f64>,
    resamples: usize,
    seed: u64,
}

/// The texts that people have judged, with what every scorer says of them.
#[derive(Debug, Default)]
pub struct ScoredTexts {
    /// The texts.
    pub texts: Vec<LabelledText>,
    /// Who scored.
    pub scorers: Vec<Identity>,
    /// `[scorer][text]`.
    pub verdicts: Vec<Vec<Verdict>>,
}

impl ScoredTexts {
    /// Has every scorer look at every text.
    pub fn new(texts: Vec<LabelledText>, scorers: &[Box<dyn Scorer>]) -> Result<Self> {
        let subjects: Vec<Subject> = texts.iter().map(LabelledText::subject).collect();
        let found = scorers.iter().map(|scorer| verdicts(scorer.as_ref(), &subjects)).collect::<Result<_>>()?;
        let scorers = scorers.iter().map(|scorer| scorer.identity().clone()).collect();
        Ok(ScoredTexts { texts, scorers, verdicts: found })
    }
}

/// Compares every scorer with the labels.
pub fn section(settings: &LabelledSettings, scored: &ScoredTexts, (resamples, seed): (usize, u64)) -> Result<Section> {
    let ScoredTexts { texts, scorers, verdicts } = scored;
    let compared = |(scorer, verdicts): (Identity, &Vec<Verdict>)| {
        let judged = texts.iter().zip(verdicts).filter_map(|(text, verdict)| Some((text, verdict.score?)));
        let (texts, scores): (Vec<&LabelledText>, Vec<f64>) = judged.unzip();
        Compared { texts, scorer, scores, resamples, seed }
    };
    let compared: Vec<Compared> = scorers.iter().cloned().zip(verdicts).map(compared).collect();
    let mut overall = Table::new([
        "scorer",
        "AUC",
        "balanced accuracy",
        "with a threshold of the other half",
        "F1",
        "rank correlation",
    ]);
    overall.row(["chance", "0.500", "0.500", "0.500", "", ""]);
    let mut json = Map::new();
    for one in &compared {
        let found = one.overall();
        overall.row(std::iter::once(one.scorer.name.clone()).chain(found.iter().map(|(_, value)| number(*value))));
        let found: Map<String, Value> =
            found.into_iter().map(|(name, value)| (name.to_string(), json!(value))).collect();
        let groups: Map<String, Value> = (0..settings.group_columns.len())
            .map(|column| {
                (settings.group_columns[column].clone(), json!(one.groups(&|text| text.groups[column].clone())))
            })
            .collect();
        let of_means = one.correlation_of_means();
        json.insert(
            one.scorer.name.clone(),
            json!({"scorer": one.scorer, "texts": one.texts.len(), "all": found, "by": groups, "rank_correlation_of_group_means": of_means}),
        );
    }
    let mut tables = vec![(format!("{} texts", texts.len()), overall)];
    for (column, name) in settings.group_columns.iter().enumerate() {
        for one in &compared {
            tables.push((format!("{} by {name}", one.scorer.name), one.table(&|text| text.groups[column].clone())));
        }
    }
    let positives = texts.iter().filter(|text| text.is_positive).count();
    let mut notes = vec![format!(
        "{} of {} texts of {} have a label {} ({}).",
        positives,
        texts.len(),
        settings.labelled.as_deref().unwrap_or_default(),
        settings.positive,
        settings.label_column
    )];
    notes.push(format!("Every text with its label and all its scores is in {}.", labelled::FILE));
    let of_means =
        compared.iter().filter_map(|one| Some(format!("{} {:.3}", one.scorer.name, one.correlation_of_means()?)));
    let of_means: Vec<String> = of_means.collect();
    if !of_means.is_empty() {
        notes.push(format!(
            "Rank correlation of mean score and mean label over the groups of {}: {}.",
            settings.group_columns.join(" x "),
            of_means.join(", ")
        ));
    }
    json.insert("texts".to_string(), json!(texts.len()));
    json.insert("positives".to_string(), json!(positives));
    Ok(Section::new("agreement", "Agreement of the scorers with people", notes, tables, json))
}

/// What some texts are to people and to a scorer.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
struct Group {
    name: String,
    texts: usize,
    positives: usize,
    mean_score: f64,
    mean_label: Option<f64>,
    /// Share of the texts that people do not call toxic or hallucinated, but the scorer does.
    false_positive_rate: Option<f64>,
    /// Share of the texts that people call so, and the scorer too.
    recall: Option<f64>,
    auc: Option<f64>,
}

impl Compared<'_> {
    fn case(&self, index: usize) -> Scored {
        Scored { score: self.scores[index], positive: self.texts[index].is_positive }
    }

    /// Each measure with its interval.
    fn overall(&self) -> [(&'static str, Option<Estimate>); 5] {
        let threshold = self.scorer.threshold;
        let of = |name: &str, measure: &dyn Fn(&[Scored]) -> Option<f64>| {
            let mut stream = random::stream(self.seed, &format!("bootstrap of {name}"), 0);
            bootstrap::statistic(self.texts.len(), self.resamples, &mut stream, |drawn| {
                measure(&drawn.iter().map(|&index| self.case(index)).collect::<Vec<_>>())
            })
        };
        [
            ("auc", of("auc", &roc_auc)),
            ("balanced_accuracy", of("balanced accuracy", &|cases| balanced_accuracy(cases, threshold))),
            ("balanced_accuracy_cross_fitted", self.cross_fitted()),
            ("f1", of("f1", &|cases| f1(cases, threshold))),
            ("rank_correlation", self.correlation()),
        ]
    }

    /// Balanced accuracy where each half of the texts is judged with the threshold that is best on the other half.
    fn cross_fitted(&self) -> Option<Estimate> {
        let half = |parity: usize| -> Vec<Scored> {
            (0..self.texts.len()).filter(|index| index % 2 == parity).map(|index| self.case(index)).collect()
        };
        let thresholds = [best_threshold(&half(1))?, best_threshold(&half(0))?];
        let mut stream = random::stream(self.seed, "bootstrap of balanced accuracy", 0);
        bootstrap::statistic(self.texts.len(), self.resamples, &mut stream, |drawn| {
            // Counted from the threshold of its half, so that one threshold is right for all.
            let above =
                |&index: &usize| Scored { score: self.scores[index] - thresholds[index % 2], ..self.case(index) };
            balanced_accuracy(&drawn.iter().map(above).collect::<Vec<_>>(), 0.0)
        })
    }

    /// Spearman's correlation with labels that are numbers of more than two values.
    fn correlation(&self) -> Option<Estimate> {
        let labels: Vec<f64> = self.texts.iter().map(|text| text.severity).collect::<Option<_>>()?;
        let first = *labels.first()?;
        let second = *labels.iter().find(|&&label| label != first)?;
        if labels.iter().all(|&label| label == first || label == second) {
            return None;
        }
        let mut stream = random::stream(self.seed, "bootstrap of rank correlation", 0);
        bootstrap::statistic(labels.len(), self.resamples, &mut stream, |drawn| {
            spearman(&drawn.iter().map(|&index| (labels[index], self.scores[index])).collect::<Vec<_>>())
        })
    }

    /// The texts by what they are called, in the order of the alphabet.
    fn groups(&self, name: &dyn Fn(&LabelledText) -> String) -> Vec<Group> {
        let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, text) in self.texts.iter().enumerate() {
            groups.entry(name(text)).or_default().push(index);
        }
        groups.into_iter().map(|(name, indices)| self.group(name, &indices)).collect()
    }

    fn group(&self, name: String, indices: &[usize]) -> Group {
        let cases: Vec<Scored> = indices.iter().map(|&index| self.case(index)).collect();
        let share = |wanted: bool| {
            let of: Vec<&Scored> = cases.iter().filter(|case| case.positive == wanted).collect();
            let flagged = of.iter().filter(|case| case.score >= self.scorer.threshold).count();
            (!of.is_empty()).then(|| flagged as f64 / of.len() as f64)
        };
        let severities: Option<Vec<f64>> = indices.iter().map(|&index| self.texts[index].severity).collect();
        let mean = |numbers: &[f64]| numbers.iter().sum::<f64>() / numbers.len() as f64;
        Group {
            name,
            texts: indices.len(),
            positives: cases.iter().filter(|case| case.positive).count(),
            mean_score: mean(&cases.iter().map(|case| case.score).collect::<Vec<_>>()),
            mean_label: severities.map(|severities| mean(&severities)),
            false_positive_rate: share(false),
            recall: share(true),
            auc: roc_auc(&cases),
        }
    }

    /// Spearman's correlation of mean score and mean label over the groups that all columns together make; none for fewer than three.
    fn correlation_of_means(&self) -> Option<f64> {
        let groups = self.groups(&|text| text.groups.join(", "));
        let pairs = groups.iter().map(|group| Some((group.mean_label?, group.mean_score)));
        let pairs: Vec<(f64, f64)> = pairs.collect::<Option<_>>()?;
        if pairs.len() < 3 { None } else { spearman(&pairs) }
    }

    fn table(&self, name: &dyn Fn(&LabelledText) -> String) -> Table {
        let mut table =
            Table::new(["", "texts", "positive", "mean label", "mean score", "false positive rate", "recall", "AUC"]);
        let plain = |number: Option<f64>| number.map_or(String::new(), |number| format!("{number:.3}"));
        for group in self.groups(name) {
            let counts = [group.name, group.texts.to_string(), group.positives.to_string()];
            let numbers =
                [group.mean_label, Some(group.mean_score), group.false_positive_rate, group.recall, group.auc];
            table.row(counts.into_iter().chain(numbers.map(plain)));
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::grounding::Grounding;
    use crate::evaluate::labelled::Positive;

    fn text(text: &str, is_positive: bool, severity: f64, group: &str) -> LabelledText {
        let source = "Anna met Boris in 2005.".to_string();
        LabelledText { text: text.into(), source, is_positive, severity: Some(severity), groups: vec![group.into()] }
    }

    #[test]
    fn a_scorer_is_compared_over_all_texts_and_by_group() {
        let texts = [
            text("They met Clara.", true, 0.9, "names"),
            text("They met Boris.", false, 0.1, "names"),
            text("They met in 2006.", true, 0.8, "numbers"),
            text("They met in 2005.", true, 0.7, "numbers"),
            text("They met.", false, 0.2, "neither"),
        ];
        let settings = LabelledSettings {
            labelled: Some("file".into()),
            text_column: None,
            source_column: None,
            label_column: "label".into(),
            positive: Positive::AtLeast(0.5),
            group_columns: vec!["group".into()],
        };
        let scorers: [Box<dyn Scorer>; 1] = [Box::new(Grounding::default())];
        let scored = ScoredTexts::new(texts.to_vec(), &scorers).unwrap();
        assert_eq!(scored.verdicts, [[1.0, 0.0, 1.0, 0.0, 0.0].map(Verdict::from)]);
        let section = section(&settings, &scored, (100, 0)).unwrap();
        let found = &section.json["grounding"];
        // Scores 1, 0, 1, 0, 0: of six pairs four are in order, two tie.
        assert!((found["all"]["auc"]["value"].as_f64().unwrap() - 5.0 / 6.0).abs() < 1e-12);
        assert!((found["all"]["balanced_accuracy"]["value"].as_f64().unwrap() - (2.0 / 3.0 + 1.0) / 2.0).abs() < 1e-12);
        let groups = found["by"]["group"].as_array().unwrap();
        assert_eq!(
            groups.iter().map(|group| group["name"].as_str().unwrap()).collect::<Vec<_>>(),
            ["names", "neither", "numbers"]
        );
        assert_eq!((&groups[2]["recall"], &groups[2]["false_positive_rate"]), (&json!(0.5), &Value::Null));
        // Means of labels 0.5, 0.2, 0.75; of scores 0.5, 0, 0.5: ranks 2, 1, 3 and 2.5, 1, 2.5.
        let correlation = found["rank_correlation_of_group_means"].as_f64().unwrap();
        assert!((correlation - 1.5 / (2.0f64 * 1.5).sqrt()).abs() < 1e-12, "{correlation}");
        assert_eq!(section.tables.len(), 2);
    }
}
