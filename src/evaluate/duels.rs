//! Pairs of models on the same prompts: who is preferred, by the world's rule, by a reward model, by people's votes.
//!
//! A tie is half a win for each. The strengths of three models or more are those of Bradley and Terry (1952).

use std::collections::HashMap;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::judging::JudgedAnswer;
use super::metrics::bradley_terry;
use super::preference::by_reward;
use super::rates::Evaluation;
use super::section::{Section, number, share};
use crate::bail;
use crate::bootstrap::{self, Cluster, Estimate};
use crate::data::splits::Pattern;
use crate::data::table::TableRows;
use crate::error::Result;
use crate::random;
use crate::train::table::Table;

const HEADING: &str = "Preference";

/// Whose votes are counted.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
pub struct VoteSettings {
    /// Data set (file, folder, glob, or ORGANISATION/NAME of the hub) of people's votes: columns model_a, model_b and winner (model_a, model_b, or tie), and, where the same prompt was voted on more
    /// than once, prompt
    #[arg(long, help_heading = HEADING, value_name = "FILES")]
    pub votes: Option<String>,
}

/// How often each model was preferred to each other, prompt by prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Duels {
    /// Who judged.
    pub judge: String,
    /// The models.
    pub models: Vec<String>,
    /// For each prompt its comparisons: the first model, the second, and how much the first was preferred, from 0 to 1.
    pub prompts: Vec<Vec<(usize, usize, f64)>>,
    /// Of decided comparisons whose order somebody saw, the share that the first place won.
    pub first_place: Option<f64>,
}

/// Reads votes. Prompts are what is drawn anew for the intervals; without a column of prompts each vote is one of its own.
pub fn read_votes(pattern: &str) -> Result<Duels> {
    let mut duels = Duels { judge: "people".to_string(), ..Duels::default() };
    let (mut models, mut prompts) = (HashMap::new(), HashMap::new());
    let (mut decided, mut first) = (0usize, 0usize);
    for rows in TableRows::open(Pattern::all(pattern))? {
        let rows = rows?;
        let (a, b, winners) = (rows.strings("model_a")?, rows.strings("model_b")?, rows.strings("winner")?);
        let texts = rows.has("prompt").then(|| rows.strings("prompt")).transpose()?;
        for row in 0..rows.batch.num_rows() {
            let [a, b] = [&a, &b].map(|of| of.value(row).to_string());
            if a == b {
                bail!("{}: `model_a` and `model_b` are both \"{a}\"; expected two models", rows.origin(row));
            }
            let preferred = match winners.value(row) {
                "model_a" | "a" => 1.0,
                "model_b" | "b" => 0.0,
                winner if winner == a => 1.0,
                winner if winner == b => 0.0,
                winner if winner.starts_with("tie") => 0.5,
                winner => {
                    bail!("{}, column `winner`: is \"{winner}\"; expected model_a, model_b or tie", rows.origin(row))
                }
            };
            decided += usize::from(preferred != 0.5);
            first += usize::from(preferred == 1.0);
            let mut index = |name: String| {
                *models.entry(name).or_insert_with_key(|name: &String| {
                    duels.models.push(name.clone());
                    duels.models.len() - 1
                })
            };
            let comparison = (index(a), index(b), preferred);
            let prompt = match &texts {
                Some(texts) => *prompts.entry(texts.value(row).to_string()).or_insert(duels.prompts.len()),
                None => duels.prompts.len(),
            };
            duels.prompts.resize(duels.prompts.len().max(prompt + 1), Vec::new());
            duels.prompts[prompt].push(comparison);
        }
    }
    duels.first_place = (decided > 0).then(|| first as f64 / decided as f64);
    Ok(duels)
}

impl Evaluation {
    /// The comparisons of all pairs of models by the world's rule and by the reward model, where they judged.
    pub(super) fn duels(&self) -> Vec<Duels> {
        let by = |judge: &str, of: &dyn Fn(&JudgedAnswer) -> Option<f64>| {
            let models: Vec<String> = self.models.iter().map(|model| model.name.clone()).collect();
            let pairs =
                || (0..models.len()).flat_map(|first| (first + 1..models.len()).map(move |second| (first, second)));
            let prompt = |question: usize| {
                pairs().flat_map(move |(first, second)| {
                    let [a, b] = [first, second].map(|model| &self.models[model].answers[question]);
                    let judged = a.iter().zip(b).filter_map(|(a, b)| Some(by_reward(of(a)?, of(b)?)));
                    judged.map(move |preferred| (first, second, preferred))
                })
            };
            let prompts: Vec<Vec<_>> = (0..self.questions.len()).map(|question| prompt(question).collect()).collect();
            Duels { judge: judge.to_string(), models: models.clone(), prompts, first_place: None }
        };
        let rule = by("the world's rule", &|answer| answer.judgement.map(|found| f64::from(found.utility)));
        let reward = by("the reward model", &|answer| answer.reward);
        [rule, reward].into_iter().filter(|duels| duels.prompts.iter().any(|prompt| !prompt.is_empty())).collect()
    }
}

impl Duels {
    /// How often each model was preferred to each other in some of the prompts.
    fn wins(&self, prompts: &[usize]) -> Vec<Vec<f64>> {
        let mut wins = vec![vec![0.0; self.models.len()]; self.models.len()];
        for &(first, second, preferred) in prompts.iter().flat_map(|&prompt| &self.prompts[prompt]) {
            wins[first][second] += preferred;
            wins[second][first] += 1.0 - preferred;
        }
        wins
    }

    /// How often the first is preferred to the second.
    fn win_rate(&self, first: usize, second: usize, resamples: usize, seed: u64) -> Option<Estimate> {
        let preferred = |&(a, b, preferred): &(usize, usize, f64)| match (a, b) {
            _ if (a, b) == (first, second) => Some(preferred),
            _ if (a, b) == (second, first) => Some(1.0 - preferred),
            _ => None,
        };
        let clusters: Vec<Cluster> =
            self.prompts.iter().map(|prompt| prompt.iter().filter_map(preferred).collect()).collect();
        bootstrap::rate(&clusters, resamples, &mut random::stream(seed, "bootstrap of preference", 0))
    }

    /// The Bradley-Terry score of every model with its interval; the message of why there is none.
    fn strengths(&self, resamples: usize, seed: u64) -> Result<Vec<Estimate>> {
        let all: Vec<usize> = (0..self.prompts.len()).collect();
        bradley_terry::scores(&self.models, &self.wins(&all))?;
        let mut stream = random::stream(seed, "bootstrap of strength", 0);
        let scores = |drawn: &[usize]| bradley_terry::scores(&self.models, &self.wins(drawn)).ok();
        Ok(bootstrap::statistics(self.prompts.len(), resamples, &mut stream, scores).unwrap_or_default())
    }

    fn tables(&self, (resamples, seed): (usize, u64)) -> (Vec<(String, Table)>, Value, Vec<String>) {
        let mut pairs = Table::new(["", "against", "preferred"]);
        let mut json = Map::new();
        for first in 0..self.models.len() {
            for second in 0..self.models.len() {
                let Some(found) = (first != second).then(|| self.win_rate(first, second, resamples, seed)).flatten()
                else {
                    continue;
                };
                if first < second {
                    pairs.row([self.models[first].clone(), self.models[second].clone(), share(Some(found))]);
                }
                json.insert(format!("{} against {}", self.models[first], self.models[second]), json!(found));
            }
        }
        let mut tables = vec![(format!("By {}, ties half", self.judge), pairs)];
        let mut found = json!({"preferred": json, "first_place": self.first_place});
        let first_place = self.first_place.map(|share| {
            format!("By {}: the first place won {:.1}% of decided comparisons.", self.judge, 100.0 * share)
        });
        let mut notes: Vec<String> = first_place.into_iter().collect();
        if self.models.len() > 2 {
            match self.strengths(resamples, seed) {
                Ok(strengths) => {
                    let mut table = Table::new(["", "Bradley-Terry score", "preferred to the mean model"]);
                    for (model, strength) in self.models.iter().zip(&strengths) {
                        let to_mean = |score| bradley_terry::preference(score, 0.0);
                        let Estimate { value, low, high } = *strength;
                        let preferred = Estimate { value: to_mean(value), low: to_mean(low), high: to_mean(high) };
                        table.row([model.clone(), number(Some(*strength)), share(Some(preferred))]);
                    }
                    let of: Map<String, Value> =
                        self.models.iter().cloned().zip(strengths.iter().map(|of| json!(of))).collect();
                    found["bradley_terry"] = of.into();
                    tables.push((format!("Strengths by {}", self.judge), table));
                }
                Err(error) => notes.push(error.to_string()),
            }
        }
        (tables, found, notes)
    }
}

/// Every judge's comparisons; none without two models and a judge.
pub fn section(all: &[Duels], draws: (usize, u64)) -> Option<Section> {
    let mut section = Section { key: "preference", title: "Preference".to_string(), ..Section::default() };
    let mut json = Map::new();
    for duels in all.iter().filter(|duels| duels.models.len() > 1) {
        let (tables, found, notes) = duels.tables(draws);
        section.tables.extend(tables);
        section.notes.extend(notes);
        json.insert(duels.judge.clone(), found);
    }
    section.json = json.into();
    (!section.tables.is_empty()).then_some(section)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn duels(prompts: Vec<Vec<(usize, usize, f64)>>) -> Duels {
        let models = ["a", "b", "c"].map(String::from).to_vec();
        Duels { judge: "judge".into(), models, prompts, first_place: None }
    }

    #[test]
    fn a_tie_is_half_a_win_for_each() {
        let duels = duels(vec![vec![(0, 1, 1.0)], vec![(0, 1, 0.5)], vec![(1, 0, 1.0)], vec![(0, 1, 1.0)]]);
        assert_eq!(duels.win_rate(0, 1, 100, 0).unwrap().value, 2.5 / 4.0);
        assert_eq!(duels.win_rate(1, 0, 100, 0).unwrap().value, 1.5 / 4.0);
        assert_eq!(duels.win_rate(0, 2, 100, 0), None);
    }

    #[test]
    fn strengths_of_a_chain_are_its_log_odds_and_a_broken_chain_is_a_note() {
        // a beats b 3 of 4 times, b beats c 3 of 4 times: ln 3 apart.
        let chain = duels([vec![vec![(0, 1, 1.0), (1, 2, 1.0)]; 3], vec![vec![(1, 0, 1.0), (2, 1, 1.0)]]].concat());
        let strengths: Vec<f64> = chain.strengths(0, 0).unwrap().iter().map(|of| of.value).collect();
        for (found, expected) in strengths.iter().zip([3f64.ln(), 0.0, -3f64.ln()]) {
            assert!((found - expected).abs() < 1e-6, "{strengths:?}");
        }
        let broken = Duels { first_place: Some(0.75), ..duels(vec![vec![(0, 1, 1.0)], vec![(1, 2, 1.0)]]) };
        let section = section(&[broken], (10, 0)).unwrap();
        assert!(section.notes[0].contains("first place won 75.0%"), "{:?}", section.notes);
        assert!(section.notes[1].contains("Bradley-Terry"), "{:?}", section.notes);
        assert_eq!(section.tables.len(), 1);
    }
}
