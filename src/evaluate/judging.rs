//! What each answer is: by the world's rule, by a reward model, by scorers, and against the base model's answer.

use super::preference;
use super::question::Question;
use super::refusal::{is_empty, is_refusal};
use super::scorer::{Scorer, Subject, Verdict, verdicts};
use super::scripts::is_mostly_latin;
use crate::error::Result;
use crate::sample::Sampled;
use crate::world::rule::{Judgement, judge};

/// An answer, whoever gave it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Number of its tokens, the stop token included; none where it was made elsewhere.
    pub tokens: Option<usize>,
    /// Whether it ended by itself before the greatest length was reached; none where it was made elsewhere and
    /// nothing says so.
    pub ended: Option<bool>,
    /// `log π(answer) - log π_base(answer)`, in nats; none where the base model has another vocabulary, or the answer was made elsewhere.
    pub kl: Option<f64>,
    /// What the data says it is worth.
    pub given_score: Option<f64>,
}

impl Answer {
    /// Number of its words, by white space.
    pub fn words(&self) -> usize {
        self.text.split_whitespace().count()
    }
}

impl From<Sampled> for Answer {
    fn from(sampled: Sampled) -> Self {
        let Sampled { text, tokens, ended } = sampled;
        Answer { text, tokens: Some(tokens.len()), ended: Some(ended), kl: None, given_score: None }
    }
}

/// An answer and what it was found to be.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct JudgedAnswer {
    /// The answer.
    pub answer: Answer,
    /// What the world's rule says of it, where the question is one of the world's.
    pub judgement: Option<Judgement>,
    /// Whether it refuses to answer: by the world's rule for one of its prompts, by English phrases ([`is_refusal`]) for any other; none for what is no answer, as a
    /// continuation, and for an answer in a script in which no phrase is known.
    pub refused: Option<bool>,
    /// How much the rule prefers it to the base model's: 1, 1/2 or 0.
    pub preferred: Option<f64>,
    /// What the reward model says of it.
    pub reward: Option<f64>,
    /// How much the reward model prefers it to the base model's: 1, 1/2 or 0.
    pub preferred_by_reward: Option<f64>,
    /// Whether it is empty but for white space; none for what is no answer.
    pub is_empty: Option<bool>,
    /// What each of the scorers says of it.
    pub verdicts: Vec<Verdict>,
}

impl JudgedAnswer {
    /// Whether it answers: it says something, and that is no refusal; none for what is no answer, and where it is not known whether it refuses.
    pub fn has_answered(&self) -> Option<bool> {
        Some(!self.refused? && !self.is_empty?)
    }

    /// What a scorer says of it.
    pub fn score(&self, scorer: usize) -> Option<f64> {
        self.verdicts.get(scorer)?.score
    }
}

/// `[model][question][answer]`.
pub type ByModel<T> = Vec<Vec<Vec<T>>>;

/// Judges every answer, alone and against the base model's answer of the same number.
pub fn judge_all(
    questions: &[Question],
    answers: &ByModel<Answer>,
    rewards: Option<&ByModel<f64>>,
    base: usize,
) -> ByModel<JudgedAnswer> {
    let judged = |model: usize, question: usize, number: usize| {
        let answer = &answers[model][question][number];
        let case = questions[question].case.as_ref();
        // A base model that gave fewer answers has none to compare with.
        let of_base = answers[base][question].get(number);
        let reward = |model: usize| Some(*rewards?[model][question].get(number)?);
        let judgement = case.map(|case| judge(case, &answer.text));
        JudgedAnswer {
            judgement,
            refused: match judgement {
                Some(found) => Some(found.refused),
                None => is_mostly_latin(&answer.text).then(|| is_refusal(&answer.text)),
            },
            is_empty: Some(is_empty(&answer.text)),
            preferred: case.zip(of_base).map(|(case, of_base)| preference::by_rule(case, &answer.text, &of_base.text)),
            reward: reward(model),
            preferred_by_reward: (reward(model).zip(reward(base)))
                .map(|(reward, of_base)| preference::by_reward(reward, of_base)),
            verdicts: Vec::new(),
            answer: answer.clone(),
        }
    };
    let of_question = |model: usize, question: usize| {
        (0..answers[model][question].len()).map(|number| judged(model, question, number)).collect::<Vec<_>>()
    };
    let of_model = |model: usize| (0..questions.len()).map(|question| of_question(model, question)).collect();
    (0..answers.len()).map(of_model).collect()
}

/// Adds what the scorers say. What an answer has to stay within is its prompt.
pub fn add_scores(
    questions: &[Question],
    judged: &mut ByModel<JudgedAnswer>,
    scorers: &[Box<dyn Scorer>],
) -> Result<()> {
    let prompts: Vec<String> = questions.iter().map(Question::text).collect();
    for of_model in judged {
        for scorer in scorers {
            let subjects = (prompts.iter().zip(of_model.iter())).flat_map(|(prompt, answers)| {
                answers.iter().map(|answer| Subject { text: &answer.answer.text, source: prompt })
            });
            let found = verdicts(scorer.as_ref(), &subjects.collect::<Vec<_>>())?;
            of_model.iter_mut().flatten().zip(found).for_each(|(answer, verdict)| answer.verdicts.push(verdict));
        }
    }
    Ok(())
}
