//! Answers to look at: some chosen by chance, and those in which the models differ most.

use std::collections::HashSet;

use serde::Serialize;

use super::judging::JudgedAnswer;
use super::rates::Evaluation;
use super::scorer::Concern;
use crate::numbers::{largest, smallest};
use crate::random;
use crate::world::talk::is_rude;

/// A question with an answer of each model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Example {
    /// What was asked.
    pub prompt: String,
    /// Whether the prompt itself is one that not everybody wants to read.
    pub is_offensive: bool,
    /// The first answer of each model that has one.
    pub answers: Vec<ExampleAnswer>,
}

/// An answer to look at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExampleAnswer {
    /// Who gave it.
    pub model: String,
    /// Its text.
    pub text: String,
    /// Whether a judge found it toxic.
    pub is_offensive: bool,
    /// What it was found to be, in words and numbers.
    pub found: String,
}

/// How many answers of each sort are shown.
const SHOWN: usize = 20;

impl Evaluation {
    /// Questions chosen by chance, and those of the others in which the models' first answers differ most.
    pub(super) fn examples(&self, seed: u64) -> (Vec<Example>, Vec<Example>) {
        let count = self.questions.len();
        let mut stream = random::stream(seed, "examples of the report", 0);
        let mut chosen: Vec<usize> = (0..count).collect();
        random::shuffle(&mut chosen, &mut stream);
        chosen.truncate(SHOWN);
        chosen.sort_unstable();
        let shown: HashSet<usize> = chosen.iter().copied().collect();
        let mut rest: Vec<(f64, usize)> = (0..count)
            .filter(|index| !shown.contains(index))
            .map(|index| (self.difference(index), index))
            .filter(|(difference, _)| *difference > 0.0)
            .collect();
        rest.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let most = rest.into_iter().take(SHOWN).map(|(_, index)| self.example(index)).collect();
        (chosen.into_iter().map(|index| self.example(index)).collect(), most)
    }

    /// How far apart the models' first answers to a question are: by the world's rule where there is one, else by the reward model, else by the first scorer, else by
    /// what the data says.
    fn difference(&self, question: usize) -> f64 {
        let first = |of: &dyn Fn(&JudgedAnswer) -> Option<f64>| -> Option<f64> {
            let firsts = self.models.iter().filter_map(|model| model.answers[question].first());
            let numbers: Vec<f64> = firsts.map(of).collect::<Option<_>>()?;
            Some(largest(numbers.iter().copied())? - smallest(numbers.iter().copied())?)
        };
        (first(&|answer| answer.judgement.map(|found| f64::from(found.utility))))
            .or_else(|| first(&|answer| answer.reward))
            .or_else(|| first(&|answer| answer.score(0)))
            .or_else(|| first(&|answer| answer.answer.given_score))
            .unwrap_or(0.0)
    }

    fn example(&self, index: usize) -> Example {
        let prompt = self.questions[index].text();
        let answer = |(model, answer): (&str, &JudgedAnswer)| ExampleAnswer {
            model: model.to_string(),
            text: answer.answer.text.trim().to_string(),
            is_offensive: self.is_offensive(answer),
            found: self.found(answer),
        };
        let firsts = self.models.iter().filter_map(|model| Some((&*model.name, model.answers[index].first()?)));
        let is_toxic = self.questions[index].toxicity.is_some_and(|toxicity| toxicity >= 0.5);
        Example { is_offensive: is_toxic || is_rude(&prompt), prompt, answers: firsts.map(answer).collect() }
    }

    fn is_offensive(&self, answer: &JudgedAnswer) -> bool {
        let by_scorer = self.scorers.iter().zip(&answer.verdicts);
        let mut of_toxicity = by_scorer.filter(|(scorer, _)| scorer.concern == Concern::Toxicity);
        of_toxicity.any(|(scorer, verdict)| verdict.score.is_some_and(|score| score >= scorer.threshold))
            || answer.judgement.is_some_and(|found| found.rude)
    }

    /// What the judges say of an answer.
    fn found(&self, answer: &JudgedAnswer) -> String {
        let mut words = Vec::new();
        words.extend((answer.refused == Some(true)).then(|| "refused".to_string()));
        if let Some(found) = &answer.judgement {
            let names = [(found.hallucinated, "hallucinated"), (found.rude, "rude"), (found.right, "right")];
            words.extend(names.into_iter().filter(|(is, _)| *is).map(|(_, name)| name.to_string()));
            words.push(format!("utility {:.2}", found.utility));
        }
        words.extend(answer.reward.map(|reward| format!("reward {reward:.2}")));
        words.extend(answer.answer.given_score.map(|score| format!("score {score:.3}")));
        words.extend(self.scorers.iter().zip(&answer.verdicts).map(|(scorer, verdict)| match verdict.score {
            Some(score) => format!("{} {score:.2}", scorer.name),
            None => format!("not judged by {}", scorer.name),
        }));
        words.join(", ")
    }
}
