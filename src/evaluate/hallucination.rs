//! Hallucination by kind: on what prompts, and what is made up.

use serde_json::{Map, json};

use super::grounding::{Grounding, Ungrounded, ungrounded_kinds};
use super::judging::JudgedAnswer;
use super::question::Question;
use super::rates::{Evaluation, Measuring};
use super::scorer::Scorer;
use super::scripts::has_names_by_capitals;
use super::section::{Section, share};
use crate::bootstrap::Estimate;
use crate::train::table::Table;
use crate::world::invention::{Invention, inventions};
use crate::world::rule::{Case, Kind};

/// Whether an answer hallucinates in this way, 1 or 0; `None` for prompts on which it could not.
type OfAnswer = fn(&Question, &JudgedAnswer) -> Option<f64>;

/// A kind of hallucination: its name in files, what it is called, and how it is told.
type HallucinationKind = (&'static str, &'static str, OfAnswer);

/// By the world's rule, by what is asked.
const BY_PROMPT: [HallucinationKind; 3] = [
    ("question_answered_by_passage", "question that the passage answers", |question, answer| {
        on(question, answer, |case| case.kind == Kind::Question && case.expected.is_some())
    }),
    ("question_unanswerable", "question that the passage does not answer", |question, answer| {
        on(question, answer, |case| case.kind == Kind::Question && case.expected.is_none())
    }),
    ("summary", "summary", |question, answer| on(question, answer, |case| case.kind == Kind::Summary)),
];

/// By the world's rule, by what is made up.
const BY_INVENTION: [HallucinationKind; 4] = [
    ("contradiction", "contradicts the passage (intrinsic)", |question, answer| {
        makes_up(question, answer, Invention::Contradiction)
    }),
    ("addition", "adds a fact about a person of the passage (extrinsic)", |question, answer| {
        makes_up(question, answer, Invention::Addition)
    }),
    ("invented_person", "speaks of a person who is not in the passage (extrinsic)", |question, answer| {
        makes_up(question, answer, Invention::Person)
    }),
    ("garbled", "no sentence of the world: garbled or cut off", |question, answer| {
        makes_up(question, answer, Invention::Garbled)
    }),
];

/// By grounding.
const BY_GROUNDING: [HallucinationKind; 2] = [
    ("ungrounded_number", "a number that the source does not hold", |question, answer| {
        ungrounded(question, answer).map(|found| f64::from(found.numbers))
    }),
    ("ungrounded_name", "a name that the source does not hold", |question, answer| {
        ungrounded(question, answer).map(|found| f64::from(found.names))
    }),
];

fn on(question: &Question, answer: &JudgedAnswer, is_of: impl Fn(&Case) -> bool) -> Option<f64> {
    question.case.as_ref().filter(|case| is_of(case))?;
    Some(f64::from(answer.judgement?.hallucinated))
}

fn makes_up(question: &Question, answer: &JudgedAnswer, what: Invention) -> Option<f64> {
    let case = question.case.as_ref().filter(|case| case.kind.is_closed_domain())?;
    Some(f64::from(inventions(case, &answer.answer.text).contains(&what)))
}

/// None of a text that grounding does not judge.
fn ungrounded(question: &Question, answer: &JudgedAnswer) -> Option<Ungrounded> {
    let text = &answer.answer.text;
    has_names_by_capitals(text).then(|| ungrounded_kinds(text, &question.text()))
}

impl Evaluation {
    /// The rates of hallucination by kind, a row each, with models as columns; none where nothing tells kinds apart.
    pub(super) fn hallucination(&self, (resamples, seed): (usize, u64)) -> Option<Section> {
        let of_grounding = self.scorers.contains(Grounding::default().identity());
        let kinds = BY_PROMPT.iter().chain(&BY_INVENTION).chain(BY_GROUNDING.iter().filter(|_| of_grounding));
        let measuring = Measuring { questions: &self.questions, scorers: &self.scorers, resamples, seed };
        let models = self.models.iter().map(|model| model.name.as_str());
        let mut table = Table::new(["", "prompts"].into_iter().chain(models));
        let mut json = Map::new();
        for (name, what, of_answer) in kinds {
            let found: Vec<Option<Estimate>> = (self.models.iter())
                .map(|model| measuring.estimate(&format!("hallucination: {name}"), &model.answers, |_| true, of_answer))
                .collect();
            if found.iter().all(Option::is_none) {
                continue;
            }
            let prompts = self.prompts(of_answer);
            table.row([what.to_string(), prompts.to_string()].into_iter().chain(found.iter().map(|of| share(*of))));
            let by_model: Map<_, _> =
                self.models.iter().zip(&found).map(|(model, of)| (model.name.clone(), json!(of))).collect();
            json.insert(name.to_string(), json!({"what": what, "prompts": prompts, "models": by_model}));
        }
        if json.is_empty() {
            return None;
        }
        let notes = vec!["Shares of the answers, of which one may make up several kinds of things.".to_string()];
        let tables = vec![("95% bootstrap intervals over prompts in brackets".to_string(), table)];
        Some(Section::new("hallucination", "Hallucination by kind", notes, tables, json))
    }

    /// The prompts on which an answer could hallucinate in this way.
    fn prompts(&self, of_answer: &OfAnswer) -> usize {
        let could = |index: usize, question: &Question| {
            let mut answers = self.models.iter().flat_map(|model| &model.answers[index]);
            answers.any(|answer| of_answer(question, answer).is_some())
        };
        self.questions.iter().enumerate().filter(|(index, question)| could(*index, question)).count()
    }
}
