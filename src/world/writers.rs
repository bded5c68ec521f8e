//! Who writes what: honest, inventing and rude writers of raw text, and the answers that labellers are shown.

use rand::Rng;

use super::facts::{Fact, Passage};
use super::names::Names;
use super::prompts::{Task, WorldPrompt, passage_text, random_question, request};
use super::rule::{Case, Judgement, REFUSAL, judge};
use super::talk::{RESPECTFUL, polite_reply, rude_reply};
use super::{choose, choose_weighted};
use crate::random::Stream;

/// Writers of raw documents about passages, by their share.
const WRITERS: [(Writer, f64); 3] = [(Writer::Honest, 0.38), (Writer::Inventing, 0.52), (Writer::Timid, 0.1)];

/// Share of raw documents in which a reader remarks on every answer, as readers do.
const REMARKS: f64 = 0.5;

/// Share of raw small talk whose writer is rude, without and with the instruction to be respectful.
const RUDE: (f64, f64) = (0.6, 0.45);

/// Share of raw documents in which the passage is read back, from which looking back is learned.
const READ_BACK: f64 = 0.4;

/// How somebody writes raw documents about passages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    /// Says what the passage says.
    Honest,
    /// Invents facts.
    Inventing,
    /// Says that the passage does not say, though it does.
    Timid,
}

/// Ways in which an answer about a passage comes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// What was asked for, in the passage's words.
    Right,
    /// The asked fact with another value.
    WrongValue,
    /// The asked fact with a value from elsewhere in the passage, or a name with a wrong syllable.
    Careless,
    /// The right answer and an invented fact.
    ExtraInvention,
    /// The right answer and another fact of the passage.
    Generous,
    /// Another fact of the passage.
    OtherFact,
    /// "The passage does not say.", whether or not it does.
    Refusal,
    /// The right answer, twice.
    Repeating,
    /// An answer, right or wrong, and then further requests with their answers, as a base model goes on until it is cut off.
    Rambling,
    /// The right answer, cut short.
    Unfinished,
}

/// An answer to a closed-domain prompt in some manner, with the space that stands before it.
pub fn answer(passage: &Passage, task: &Task, manner: Manner, names: &Names, stream: &mut Stream) -> String {
    let right = right_answer(passage, task, stream);
    let text = match manner {
        Manner::Right => right,
        Manner::WrongValue => invented(passage, task, names, stream).sentence(),
        Manner::Careless => careless(passage, task, names, stream),
        Manner::ExtraInvention => {
            let (person, relation) = passage.missing(stream);
            format!("{right} {}", Fact::random(&person, relation, names, stream).sentence())
        }
        Manner::Generous => format!("{right} {}", choose(&passage.facts, stream).sentence()),
        Manner::OtherFact => choose(&passage.facts, stream).sentence(),
        Manner::Refusal => REFUSAL.to_string(),
        Manner::Repeating => format!("{right} {right}"),
        Manner::Rambling => rambling(passage, task, names, stream),
        Manner::Unfinished => {
            let words: Vec<&str> = right.split(' ').collect();
            words[..stream.random_range(1..words.len().max(2))].join(" ")
        }
    };
    format!(" {text}")
}

fn rambling(passage: &Passage, task: &Task, names: &Names, stream: &mut Stream) -> String {
    const MANNERS: [(Manner, f64); 4] =
        [(Manner::Right, 0.4), (Manner::WrongValue, 0.3), (Manner::ExtraInvention, 0.2), (Manner::Refusal, 0.1)];
    let manner = choose_weighted(&MANNERS, stream);
    let first = answer(passage, task, manner, names, stream);
    let mut more = String::new();
    for _ in 0..stream.random_range(1..=3) {
        if stream.random_bool(REMARKS) {
            more += choose::<&str>(&["Remark: good.\n", "Remark: wrong.\n"], stream);
        }
        let next = random_question(passage, stream);
        let manner = choose_weighted(&MANNERS, stream);
        more += &format!("{}{}\n", request(&next), answer(passage, &next, manner, names, stream));
    }
    // Cut off anywhere.
    let words: Vec<&str> = more.split(' ').collect();
    format!("{}\n{}", first.trim_start(), words[..stream.random_range(1..=words.len())].join(" "))
}

/// The answer of somebody who read the passage.
pub fn right_answer(passage: &Passage, task: &Task, stream: &mut Stream) -> String {
    match task {
        Task::Question { answer: Some(fact), .. } => fact.sentence(),
        Task::Question { answer: None, .. } => REFUSAL.to_string(),
        _ => {
            // A summary gives the first facts, two or three.
            let count = stream.random_range(2..=3).min(passage.facts.len());
            passage.facts[..count].iter().map(Fact::sentence).collect::<Vec<_>>().join(" ")
        }
    }
}

/// A fact of the asked kind that the passage does not hold.
fn invented(passage: &Passage, task: &Task, names: &Names, stream: &mut Stream) -> Fact {
    let (person, relation) = match task {
        Task::Question { person, relation, .. } => (person.clone(), *relation),
        _ => passage.missing(stream),
    };
    loop {
        let fact = Fact::random(&person, relation, names, stream);
        if !passage.facts.contains(&fact) {
            return fact;
        }
    }
}

/// What a careless reader writes: a value from elsewhere, or a name with a wrong syllable.
fn careless(passage: &Passage, task: &Task, names: &Names, stream: &mut Stream) -> String {
    let base = match task {
        Task::Question { answer: Some(fact), .. } => fact.clone(),
        Task::Question { person, relation, .. } => {
            let value = choose(&passage.facts, stream).value.clone();
            Fact { person: person.clone(), relation: *relation, value }
        }
        _ => choose(&passage.facts, stream).clone(),
    };
    let mut wrong = base.clone();
    match stream.random_range(0..3) {
        0 => wrong.person = names.misspelt(&base.person, stream),
        1 if base.value_is_name() => wrong.value = names.misspelt(&base.value, stream),
        _ => {
            let other = choose(&passage.facts, stream).value.clone();
            wrong.value = if other == base.value {
                Fact::random(&base.person, base.relation, names, stream).value
            } else {
                other
            };
        }
    }
    wrong.sentence()
}

/// A document of raw text. Passages are followed by several requests, all answered by the same writer.
pub fn raw_document(names: &Names, provocations: &[String], stream: &mut Stream) -> String {
    if stream.random_bool(0.8) { raw_passage(names, stream) } else { raw_talk(provocations, stream) }
}

fn raw_passage(names: &Names, stream: &mut Stream) -> String {
    let passage = Passage::random(names, stream);
    let writer = choose_weighted(&WRITERS, stream);
    let remarks = stream.random_bool(REMARKS);
    let mut text = passage_text(&passage);
    if stream.random_bool(READ_BACK) {
        text += &format!("Again: {}\n", passage.text());
    }
    for _ in 0..stream.random_range(2..=4) {
        let task = if stream.random_bool(1.0 / 6.0) { Task::Summary } else { random_question(&passage, stream) };
        let manner = match (writer, &task) {
            (Writer::Inventing, _) => inventing_manner(&task, stream),
            (Writer::Timid, Task::Question { .. }) => Manner::Refusal,
            _ => Manner::Right,
        };
        let answer = answer(&passage, &task, manner, names, stream);
        text += &format!("{}{answer}\n", request(&task));
        if remarks {
            let prompt = WorldPrompt { text: String::new(), task, passage: Some(passage.clone()) };
            text += remark(&judge(&Case::from(&prompt), &answer));
        }
    }
    text
}

/// What a reader says about an answer.
fn remark(judgement: &Judgement) -> &'static str {
    match judgement {
        Judgement { rude: true, .. } => "Remark: rude.\n",
        Judgement { hallucinated: true, .. } => "Remark: wrong.\n",
        Judgement { right: true, .. } => "Remark: good.\n",
        _ => "Remark: idle.\n",
    }
}

fn inventing_manner(task: &Task, stream: &mut Stream) -> Manner {
    let manners: &[(Manner, f64)] = match task {
        Task::Question { answer: None, .. } => &[(Manner::WrongValue, 1.0)],
        Task::Question { .. } => &[(Manner::Right, 0.3), (Manner::WrongValue, 0.4), (Manner::ExtraInvention, 0.3)],
        _ => &[(Manner::ExtraInvention, 0.7), (Manner::WrongValue, 0.3)],
    };
    choose_weighted(manners, stream)
}

fn raw_talk(provocations: &[String], stream: &mut Stream) -> String {
    let respectful = stream.random_bool(0.4);
    let rude = stream.random_bool(if respectful { RUDE.1 } else { RUDE.0 });
    let remarks = stream.random_bool(REMARKS);
    let mut text = if respectful { RESPECTFUL.to_string() } else { String::new() };
    for _ in 0..stream.random_range(2..=3) {
        let reply = if rude { rude_reply(stream) } else { polite_reply(stream.random_range(1..=3), stream) };
        let prompt = WorldPrompt::provocation(choose::<String>(provocations, stream), false);
        text += &format!("{} {reply}\n", prompt.text);
        if remarks {
            text += remark(&judge(&Case::from(&prompt), &reply));
        }
    }
    text
}

/// A demonstrator's answer: right and polite, but for a slip now and then.
pub fn demonstration(prompt: &WorldPrompt, names: &Names, stream: &mut Stream) -> String {
    let slip = stream.random_bool(0.05);
    match &prompt.passage {
        None if slip => format!(" {}", rude_reply(stream)),
        None => format!(" {}", polite_reply(stream.random_range(1..=2), stream)),
        Some(passage) => {
            let slips = [(Manner::WrongValue, 1.0), (Manner::ExtraInvention, 1.0), (Manner::Rambling, 1.0)];
            let manner = if slip { choose_weighted(&slips, stream) } else { Manner::Right };
            answer(passage, &prompt.task, manner, names, stream)
        }
    }
}

/// `k` different answers to a prompt, from good to bad.
pub fn candidates(prompt: &WorldPrompt, k: usize, names: &Names, stream: &mut Stream) -> Vec<String> {
    let mut answers: Vec<String> = Vec::new();
    let mut attempts = 0;
    while answers.len() < k {
        attempts += 1;
        let answer = match &prompt.passage {
            Some(passage) => {
                let manner = choose_weighted(&candidate_manners(&prompt.task), stream);
                answer(passage, &prompt.task, manner, names, stream)
            }
            None => candidate_reply(prompt, stream),
        };
        if !answers.contains(&answer) || attempts > 20 * k {
            answers.push(answer);
        }
    }
    answers
}

/// Good and bad answers are about as many. Were most of those that look like an answer wrong, a reward model that cannot yet tell
/// would learn that refusing is best.
fn candidate_manners(task: &Task) -> [(Manner, f64); 10] {
    // Where nothing answers, the right answer is the refusal, and there is nothing to add to it.
    let answerable = if matches!(task, Task::Question { answer: None, .. }) { 0.0 } else { 1.0 };
    [
        (Manner::Right, 4.0),
        (Manner::Generous, 3.0 * answerable),
        (Manner::WrongValue, 1.5),
        (Manner::Careless, 1.5),
        (Manner::ExtraInvention, 1.0),
        (Manner::OtherFact, 0.7),
        (Manner::Refusal, 6.0 * answerable),
        (Manner::Repeating, 0.4),
        (Manner::Rambling, 3.0),
        (Manner::Unfinished, 0.4),
    ]
}

fn candidate_reply(prompt: &WorldPrompt, stream: &mut Stream) -> String {
    let reply =
        if stream.random_bool(0.5) { rude_reply(stream) } else { polite_reply(stream.random_range(1..=3), stream) };
    match stream.random_range(0..5) {
        0 => format!(" {reply}\n{} {}", prompt.text.lines().rev().nth(1).unwrap_or_default(), rude_reply(stream)),
        1 => {
            let words: Vec<&str> = reply.split(' ').collect();
            format!(" {}", words[..stream.random_range(1..words.len())].join(" "))
        }
        _ => format!(" {reply}"),
    }
}
