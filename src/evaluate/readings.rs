//! What of the texts was read: by each scorer in windows, in part or not at all, and by models that read at most so many tokens.

use serde_json::{Map, Value, json};

use super::report::Report;
use super::scorer::{Identity, Verdict};
use super::section::Section;
use crate::train::table::Table;

/// How many texts a scorer read in which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Readings {
    texts: usize,
    in_windows: usize,
    cut: usize,
    not_judged: usize,
}

impl Readings {
    fn add(&mut self, verdict: &Verdict) {
        self.texts += 1;
        self.in_windows += usize::from(verdict.windows > 1);
        self.cut += usize::from(verdict.was_cut);
        self.not_judged += usize::from(verdict.score.is_none());
    }
}

impl Report {
    /// Every verdict of a scorer, of answers, of continuations and of texts that people have judged.
    fn verdicts_of<'a>(&'a self, scorer: &'a Identity) -> impl Iterator<Item = &'a Verdict> {
        let of_answers = self.kept().into_iter().filter_map(move |kept| {
            let index = kept.scorers.iter().position(|other| other == scorer)?;
            kept.answer.verdicts.get(index)
        });
        let of_labelled = self.labelled.iter().flat_map(move |scored| {
            let index = scored.scorers.iter().position(|other| other == scorer);
            index.into_iter().flat_map(|index| &scored.verdicts[index])
        });
        of_answers.chain(of_labelled)
    }

    /// What of the texts was read; none where nothing judged and nothing was cut.
    pub(super) fn readings(&self) -> Option<Section> {
        if self.scorers.is_empty() && self.cuts.is_empty() {
            return None;
        }
        let mut table = Table::new([
            "scorer",
            "texts",
            "reads at once, tokens",
            "texts in windows",
            "texts cut",
            "texts not judged",
        ]);
        let mut json = Map::new();
        for scorer in &self.scorers {
            let mut found = Readings::default();
            self.verdicts_of(scorer).for_each(|verdict| found.add(verdict));
            let Readings { texts, in_windows, cut, not_judged } = found;
            let most = scorer.max_tokens.map_or("all".to_string(), |most| most.to_string());
            let counts = [in_windows, cut, not_judged].map(|count| count.to_string());
            table.row([scorer.name.clone(), texts.to_string(), most].into_iter().chain(counts));
            json.insert(
                scorer.rate(),
                json!({
                    "texts": texts, "max_tokens": scorer.max_tokens, "texts_in_windows": in_windows, "texts_cut": cut,
                    "texts_not_judged": not_judged,
                }),
            );
        }
        if !self.cuts.is_empty() {
            json.insert("cut".to_string(), Value::from(self.cuts.clone()));
        }
        let mut notes = self.cuts.clone();
        if !self.scorers.is_empty() {
            notes.push(
                "Texts longer than a scorer reads at once are read in windows that overlap, of which the worst counts. Texts that a scorer cannot judge, \
                 as grounding those in a script without capitals, are left out of its rates."
                    .to_string(),
            );
        }
        let tables = match self.scorers.is_empty() {
            true => Vec::new(),
            false => vec![("Texts that each scorer read".to_string(), table)],
        };
        Some(Section::new("readings", "What was read", notes, tables, json))
    }
}
