//! Sampling answers with a key-value cache and continuous batching.
//!
//! A prompt is computed once, whatever the number of its answers; answers that are finished leave the batch, and waiting
//! prompts take their place. Every answer draws from a stream of its own, so that what it becomes does not depend on its company.
//!
//! Where rotations depend on the length of a sequence, a token is computed with those of the length that its sequence has by then. Of LongRoPE, whose
//! rotations all change at one length, the keys and values of an answer that outgrows it are computed anew, as `transformers` does for Phi-3; dynamic
//! scaling keeps the keys that are there, as it does too.

pub mod kv_cache;
pub mod sampler;

use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::bail;
use crate::data::batch::Segment;
use crate::data::schema::Origin;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::layout::{Layout, OwnRows, push_group};
use crate::ops::{Query, Span};
use crate::random::{self, Stream};
use kv_cache::KeyValueCache;
pub use sampler::{NotFinite, SamplingSettings};

/// A sampled answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Its tokens, the stop token last where there is one.
    pub tokens: Vec<u32>,
    /// Whether it ended with a stop token before `response_length` was reached.
    pub ended: bool,
    /// The log-probability of each token as it was drawn, at the temperature.
    pub log_probs: Vec<f32>,
}

/// What ends an answer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stop<'a> {
    /// Tokens that end it.
    pub tokens: &'a [u32],
    /// They do so only after this many tokens.
    pub after: usize,
}

impl<'a> Stop<'a> {
    /// These tokens end an answer wherever they stand.
    pub fn at(tokens: &'a [u32]) -> Self {
        Stop { tokens, after: 0 }
    }

    fn ends(self, answer: &[u32]) -> bool {
        answer.len() > self.after && answer.last().is_some_and(|token| self.tokens.contains(token))
    }
}

/// Answers that are computed at the same time, at most.
pub const MOST_ACTIVE: usize = 128;

/// A prompt, and which of the model's adapter stacks answers it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PromptTokens {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// The index of the stack; 0 is the model's own.
    pub stack: usize,
    /// Where it was read, as errors name it; none for one that was read nowhere.
    pub origin: Option<Origin>,
}

impl From<Vec<u32>> for PromptTokens {
    fn from(tokens: Vec<u32>) -> Self {
        PromptTokens { tokens, stack: 0, origin: None }
    }
}

/// Samples `answers` answers to each prompt; `stop` says what ends one.
///
/// The stream of answer `j` to prompt `i` is (`seed`, "sampling", `first + i * answers + j`).
///
/// # Errors
/// Where a prompt is empty, or where the model gives logits from which nothing can be drawn; the error names model, prompt and position.
pub fn generate(
    model: &Model,
    prompts: &[PromptTokens],
    answers: usize,
    settings: &SamplingSettings,
    stop: Stop,
    seed: u64,
    first: u64,
) -> Result<Vec<Vec<Answer>>> {
    settings.check()?;
    // No weight changes while answers are sampled.
    let model = model.snapshot()?;
    let mut batch = ContinuousBatch::new(&model, prompts, answers, settings, stop)?;
    let mut waiting = 0..prompts.len();
    while !waiting.is_empty() || !batch.active.is_empty() {
        if batch.active.len() <= MOST_ACTIVE / 2 {
            let mut admitted = Vec::new();
            while batch.active.len() + admitted.len() * answers < MOST_ACTIVE && !waiting.is_empty() {
                let Some(rows) = batch.take_rows(waiting.start) else { break };
                admitted.push((waiting.start, rows));
                waiting.next();
            }
            if !admitted.is_empty() {
                let stream = |index: u64| random::stream(seed, "sampling", first + index);
                batch.prefill(&admitted, stream)?;
            }
        }
        batch.step()?;
    }
    Ok(batch.finished)
}

/// An answer in the making.
struct Active {
    prompt: usize,
    stack: usize,
    answer: usize,
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
    stream: Stream,
    /// Keys of prefix and prompt, in order.
    context: Vec<Span>,
    /// Position of the answer's first token.
    first_position: usize,
    /// The cache's rows for the answer's own keys.
    own: Span,
}

/// The rows of the cache that a prompt and its answers take.
struct PromptRows {
    /// The prompt's, virtual ones too.
    prompt: usize,
    /// As many again for each answer, where it may outgrow the rotations of its prompt.
    spare: usize,
    /// An answer's.
    answer: usize,
}

impl PromptRows {
    fn of(prompt: &PromptTokens, own_rows: &[OwnRows], settings: &SamplingSettings, restart: Option<usize>) -> Self {
        let OwnRows { virtual_rows, prefix_rows } = own_rows[prompt.stack];
        let rows = virtual_rows + prompt.tokens.len();
        let (first, answer) = (prefix_rows + rows, settings.response_length);
        let outgrows = restart.is_some_and(|restart| first <= restart && restart < first + answer);
        PromptRows { prompt: rows, spare: if outgrows { rows } else { 0 }, answer }
    }

    fn needed(&self, answers: usize) -> usize {
        self.prompt + answers * (self.spare + self.answer)
    }
}

struct ContinuousBatch<'a> {
    model: &'a Model,
    prompts: &'a [PromptTokens],
    answers: usize,
    settings: &'a SamplingSettings,
    stop: Stop<'a>,
    cache: KeyValueCache,
    /// The rows that each stack places before its prompts.
    own_rows: Vec<OwnRows>,
    /// The length beyond which all keys and values of a sequence are others.
    restart: Option<usize>,
    active: Vec<Active>,
    /// For each prompt: its rows in the cache, and how many of its answers still need them.
    borrowed: Vec<Option<(Span, usize)>>,
    finished: Vec<Vec<Answer>>,
}

impl<'a> ContinuousBatch<'a> {
    fn new(
        model: &'a Model,
        prompts: &'a [PromptTokens],
        answers: usize,
        settings: &'a SamplingSettings,
        stop: Stop<'a>,
    ) -> Result<Self> {
        if let Some(index) = prompts.iter().position(|prompt| prompt.tokens.is_empty()) {
            bail!("prompt {index} has no token, so there is nothing to continue; remove it from the prompts");
        }
        let own_rows = model.own_rows();
        let restart = model.architecture().rotations_restart_after();
        let need = |prompt: &PromptTokens| PromptRows::of(prompt, &own_rows, settings, restart).needed(answers);
        let mut needs: Vec<usize> = prompts.iter().map(need).collect();
        needs.sort_unstable_by(|a, b| b.cmp(a));
        let at_once = MOST_ACTIVE.div_ceil(answers.max(1));
        let capacity = needs.iter().take(at_once).sum();
        Ok(ContinuousBatch {
            model,
            prompts,
            answers,
            settings,
            stop,
            cache: KeyValueCache::new(model.architecture(), capacity, &model.prefixes()?, model.device())?,
            own_rows,
            restart,
            active: Vec::new(),
            borrowed: vec![None; prompts.len()],
            finished: vec![vec![Answer::default(); answers]; prompts.len()],
        })
    }

    fn take_rows(&mut self, prompt: usize) -> Option<Span> {
        self.cache.take(self.rows_of(prompt).needed(self.answers))
    }

    fn rows_of(&self, prompt: usize) -> PromptRows {
        PromptRows::of(&self.prompts[prompt], &self.own_rows, self.settings, self.restart)
    }

    /// Computes prompts and draws the first token of each of their answers.
    fn prefill(&mut self, admitted: &[(usize, Span)], stream: impl Fn(u64) -> Stream) -> Result<()> {
        let mut tokens = Vec::new();
        let mut segments = Vec::new();
        for &(prompt, _) in admitted {
            let prompt = &self.prompts[prompt];
            let (start, len) = (tokens.len(), prompt.tokens.len());
            segments.push(Segment { start, len, parent: None, stack: prompt.stack });
            tokens.extend_from_slice(&prompt.tokens);
        }
        let mut layout = Layout::new(&segments, &self.own_rows);
        let mut write = Vec::new();
        for (query, &(_, rows)) in Arc::make_mut(&mut layout.plan).queries.iter_mut().zip(admitted) {
            let own = Span { start: rows.start, len: query.rows.len };
            *query.keys.last_mut().expect("a segment sees itself") = own;
            write.extend((own.start..own.start + own.len).map(|row| row as u32));
        }
        self.cache.write_next_to(write);
        let hidden = self.model.hidden_with_store(&tokens, &layout, &mut self.cache)?; // [tokens, d_model]
        let last_rows: Vec<u32> = segments.iter().map(|segment| (segment.start + segment.len - 1) as u32).collect();
        let stacks: Vec<usize> = segments.iter().map(|segment| segment.stack).collect();
        let logits = self.model.logits(&hidden, &last_rows, &stacks)?.to_vec2::<f32>()?; // [prompts, vocabulary]
        for ((&(prompt, rows), query), logits) in admitted.iter().zip(&layout.plan.queries).zip(&logits) {
            let context_rows: usize = query.keys.iter().map(|span| span.len).sum();
            let mut next_row = rows.start + query.rows.len;
            self.borrowed[prompt] = Some((rows, self.answers));
            let spare = self.rows_of(prompt).spare;
            for answer in 0..self.answers {
                let mut stream = stream((prompt * self.answers + answer) as u64);
                let drawn = self.settings.draw(logits, &mut stream);
                let (token, log_prob) = drawn.map_err(|why| self.not_finite(prompt, context_rows, 0, why))?;
                let own = Span { start: next_row + spare, len: self.settings.response_length };
                next_row += spare + own.len;
                let context = query.keys.clone();
                let (first_position, stack) = (context_rows, self.prompts[prompt].stack);
                let (tokens, log_probs) = (vec![token], vec![log_prob]);
                self.active.push(Active {
                    prompt,
                    stack,
                    answer,
                    tokens,
                    log_probs,
                    stream,
                    context,
                    first_position,
                    own,
                });
            }
        }
        self.retire();
        // Rows of one stack lie together; an answer's place among the others does not change it.
        self.active.sort_by_key(|answer| answer.stack);
        Ok(())
    }

    /// Computes the newest token of every active answer and draws the next.
    fn step(&mut self) -> Result<()> {
        if self.active.is_empty() {
            return Ok(());
        }
        for index in 0..self.active.len() {
            let Active { first_position, tokens, .. } = &self.active[index];
            if self.restart == Some(first_position + tokens.len() - 1) {
                self.restart(index)?;
            }
        }
        let mut layout = Layout::default();
        let (mut tokens, mut write) = (Vec::new(), Vec::new());
        for (row, answer) in self.active.iter().enumerate() {
            let known = answer.tokens.len();
            tokens.push(answer.tokens[known - 1]);
            layout.positions.push((answer.first_position + known - 1) as u32);
            layout.lengths.push((answer.first_position + known) as u32);
            let mut keys = answer.context.clone();
            keys.push(Span { start: answer.own.start, len: known });
            Arc::make_mut(&mut layout.plan).queries.push(Query { rows: Span { start: row, len: 1 }, keys });
            write.push((answer.own.start + known - 1) as u32);
            push_group(&mut layout.groups, answer.stack, row, 1);
        }
        layout.token_groups.clone_from(&layout.groups);
        self.cache.write_next_to(write);
        let hidden = self.model.hidden_with_store(&tokens, &layout, &mut self.cache)?; // [active, d_model]
        let rows: Vec<u32> = (0..tokens.len() as u32).collect();
        let stacks: Vec<usize> = self.active.iter().map(|answer| answer.stack).collect();
        let logits = self.model.logits(&hidden, &rows, &stacks)?; // [active, vocabulary]
        let vocabulary = logits.dim(1)?;
        let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        let settings = self.settings;
        let draw = |(answer, logits): (&mut Active, &[f32])| {
            let (token, log_prob) = settings.draw(logits, &mut answer.stream)?;
            answer.tokens.push(token);
            answer.log_probs.push(log_prob);
            Ok(())
        };
        let drawn: Vec<Result<(), NotFinite>> =
            self.active.par_iter_mut().zip(logits.par_chunks(vocabulary)).map(draw).collect();
        for (drawn, answer) in drawn.into_iter().zip(&self.active) {
            drawn.map_err(|why| self.not_finite(answer.prompt, answer.first_position, answer.tokens.len(), why))?;
        }
        self.retire();
        Ok(())
    }

    /// Computes the keys and values of prompt and answer anew, all but the newest token's, for an answer that this token makes longer than the
    /// rotations of shorter sequences reach. They go to the answer's own rows and the spare ones before these.
    fn restart(&mut self, index: usize) -> Result<()> {
        let Active { prompt, stack, ref tokens, first_position, own, .. } = self.active[index];
        let known = &tokens[..tokens.len() - 1];
        let sequence = [&self.prompts[prompt].tokens[..], known].concat();
        let segment = Segment { start: 0, len: sequence.len(), parent: None, stack };
        let mut layout = Layout::new(&[segment], &self.own_rows);
        layout.lengths.fill((first_position + tokens.len()) as u32);
        let query = &mut Arc::make_mut(&mut layout.plan).queries[0];
        let prompt_rows = query.rows.len - known.len();
        let rows = Span { start: own.start - prompt_rows, len: query.rows.len };
        let mut context = query.keys.clone();
        *query.keys.last_mut().expect("a segment sees itself") = rows;
        *context.last_mut().expect("a segment sees itself") = Span { len: prompt_rows, ..rows };
        self.cache.write_next_to((rows.start..rows.start + rows.len).map(|row| row as u32).collect());
        self.model.hidden_with_store(&sequence, &layout, &mut self.cache)?;
        self.active[index].context = context;
        Ok(())
    }

    /// The error of logits from which nothing can be drawn, after `context` rows of prefix and prompt and `known` tokens of the answer.
    fn not_finite(&self, prompt: usize, context: usize, known: usize, why: NotFinite) -> Error {
        let place = match &self.prompts[prompt].origin {
            Some(origin) => origin.to_string(),
            None => format!("prompt {prompt}"),
        };
        let virtual_rows = self.own_rows[self.prompts[prompt].stack].virtual_rows;
        Error::input(format!(
            "{place}: the logits of {} for token {known} of the answer, after {} tokens, are not finite ({why}), so no token can be chosen; \
             the model's weights are damaged or overflow, look for NaN in them",
            self.model.folder().name(),
            context - virtual_rows + known,
        ))
    }

    /// Moves answers that are finished out of the batch and gives rows back that nobody needs any more.
    fn retire(&mut self) {
        let mut kept = Vec::with_capacity(self.active.len());
        for answer in self.active.drain(..) {
            let ended = self.stop.ends(&answer.tokens);
            if !ended && answer.tokens.len() < self.settings.response_length {
                kept.push(answer);
                continue;
            }
            let Active { tokens, log_probs, .. } = answer;
            self.finished[answer.prompt][answer.answer] = Answer { tokens, ended, log_probs };
            let borrowed = &mut self.borrowed[answer.prompt];
            if let Some((rows, users)) = borrowed {
                *users -= 1;
                if *users == 0 {
                    self.cache.give_back(*rows);
                    *borrowed = None;
                }
            }
        }
        self.active = kept;
    }
}
