//! Closed-domain answers: what they assert that the passage does not hold, and what the models paid for asserting less.

use super::JudgedAnswer;
use crate::world::rule::{Case, Kind};

/// Whether a closed-domain answer asserts something that the passage does not hold; `None` for other prompts.
pub fn hallucinated(case: &Case, answer: &JudgedAnswer) -> Option<f64> {
    case.kind.is_closed_domain().then(|| f64::from(answer.judgement.hallucinated))
}

/// Whether a question whose answer the passage holds is answered at all, rightly or not, rather than refused; `None` for other
/// prompts. A model that refuses everything never hallucinates, and has an answer rate of 0.
pub fn answered(case: &Case, answer: &JudgedAnswer) -> Option<f64> {
    let answerable = case.kind == Kind::Question && case.expected.is_some();
    answerable.then(|| f64::from(answer.judgement.answered && !answer.judgement.refused))
}

/// Whether a closed-domain answer is right: it gives the fact asked for, refuses where there is none, or sums up; `None` for
/// other prompts.
pub fn correct(case: &Case, answer: &JudgedAnswer) -> Option<f64> {
    case.kind.is_closed_domain().then(|| f64::from(answer.judgement.right))
}
