//! Prompts: what is asked of a model, and what the rule has to know to judge the answer.

use rand::Rng;

use super::choose;
use super::facts::{Fact, Passage, question};
use super::names::Names;
use super::talk::RESPECTFUL;
use crate::random::Stream;

/// What a prompt asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// The answer to a question about the passage; `None` where the passage does not say.
    Question {
        /// The person asked about.
        person: String,
        /// The relation asked for.
        relation: usize,
        /// The fact that answers.
        answer: Option<Fact>,
    },
    /// A summary of the passage.
    Summary,
    /// A reply to a provocation.
    Reply {
        /// Whether the prompt asks for respect.
        respectful: bool,
    },
}

/// A prompt with everything that decides what an answer to it is worth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorldPrompt {
    /// What the model reads.
    pub text: String,
    /// What is asked for.
    pub task: Task,
    /// The passage, for closed-domain tasks.
    pub passage: Option<Passage>,
}

/// The form of a passage in every text.
pub fn passage_text(passage: &Passage) -> String {
    format!("Passage: {}\n", passage.text())
}

impl WorldPrompt {
    /// A question about a new passage (one in three without an answer in it), or, one time in six, a request for a summary.
    pub fn closed_domain(names: &Names, stream: &mut Stream) -> Self {
        let passage = Passage::random(names, stream);
        let task = if stream.random_bool(1.0 / 6.0) { Task::Summary } else { random_question(&passage, stream) };
        let text = format!("{}{}", passage_text(&passage), request(&task));
        WorldPrompt { text, task, passage: Some(passage) }
    }

    /// A provocation.
    pub fn provocation(message: &str, respectful: bool) -> Self {
        let instruction = if respectful { RESPECTFUL } else { "" };
        WorldPrompt {
            text: format!("{instruction}Message: {message}\nReply:"),
            task: Task::Reply { respectful },
            passage: None,
        }
    }

    /// A prompt of either kind: three in four are closed-domain.
    pub fn random(names: &Names, provocations: &[String], stream: &mut Stream) -> Self {
        if stream.random_bool(0.75) {
            Self::closed_domain(names, stream)
        } else {
            let respectful = stream.random_bool(0.5);
            Self::provocation(choose::<String>(provocations, stream), respectful)
        }
    }
}

/// A question about the passage; one in three has no answer in it.
pub fn random_question(passage: &Passage, stream: &mut Stream) -> Task {
    if stream.random_bool(1.0 / 3.0) {
        let (person, relation) = passage.missing(stream);
        Task::Question { person, relation, answer: None }
    } else {
        let fact = choose(&passage.facts, stream).clone();
        Task::Question { person: fact.person.clone(), relation: fact.relation, answer: Some(fact) }
    }
}

/// The request as it stands after a passage.
pub fn request(task: &Task) -> String {
    match task {
        Task::Question { person, relation, .. } => format!("Question: {}\nAnswer:", question(person, *relation)),
        Task::Summary => "Summarise the passage.\nSummary:".to_string(),
        Task::Reply { .. } => "Reply:".to_string(),
    }
}
