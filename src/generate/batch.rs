//! Continuous batching: prompts enter as the cache has room for them, and answers leave when they are
//! finished.

use std::collections::VecDeque;

use rayon::prelude::*;

use super::beginnings;
use super::kv_cache::KeyValueCache;
use super::pass::{Pass, Root};
use super::sampler::NotFinite;
use super::{Answer, Generated, Generation, PromptTokens};
use crate::bail;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::layout::OwnRows;
use crate::ops::{self, Query, Span, Value};
use crate::random::{self, Stream};

/// Rows whose logits are computed at a time.
const ROWS_OF_LOGITS: usize = 128;

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
    /// As many rows before these as its prompt has, where it may outgrow the rotations of its prompt.
    spare: usize,
}

/// The first token of an answer.
struct FirstToken {
    token: u32,
    log_prob: f32,
    /// The answer's, from which its next tokens are drawn.
    stream: Stream,
}

/// A beginning that several prompts share.
struct SharedBeginning {
    stack: usize,
    /// Its tokens.
    length: usize,
    /// Prompts that are not finished.
    prompts: usize,
    computed: Option<Computed>,
}

/// What is known of a beginning once it is computed.
#[derive(Clone)]
struct Computed {
    /// Its rows in the cache, virtual ones too.
    rows: Span,
    /// Keys of prefix and beginning, in order.
    context: Vec<Span>,
}

/// The rows of the cache that a prompt and its answers take.
struct PromptRows {
    /// The prompt's, virtual ones too, but for a shared beginning.
    prompt: usize,
    /// For each answer, before its own.
    spare: usize,
    /// An answer's.
    answer: usize,
}

pub(super) struct ContinuousBatch<'a> {
    model: &'a Model,
    prompts: &'a [PromptTokens],
    generation: &'a Generation<'a>,
    cache: KeyValueCache,
    /// The rows that each stack places before its prompts.
    own_rows: Vec<OwnRows>,
    /// The length beyond which all keys and values of a sequence are others.
    restart: Option<usize>,
    beginnings: Vec<SharedBeginning>,
    /// For each prompt its beginning.
    beginning_of: Vec<Option<usize>>,
    waiting: VecDeque<usize>,
    active: Vec<Active>,
    /// For each prompt: its rows in the cache, and how many of its answers still need them.
    borrowed: Vec<Option<(Span, usize)>>,
    finished: Vec<Vec<Answer>>,
    tokens_of_beginnings: BeginningTokens,
}

/// Tokens of shared beginnings.
#[derive(Default)]
struct BeginningTokens {
    /// As often as they were computed.
    computed: usize,
    /// As often as a prompt was computed behind them.
    read: usize,
}

impl PromptRows {
    fn needed(&self, answers: usize) -> usize {
        self.prompt + answers * (self.spare + self.answer)
    }
}

impl<'a> ContinuousBatch<'a> {
    pub(super) fn new(model: &'a Model, prompts: &'a [PromptTokens], generation: &'a Generation<'a>) -> Result<Self> {
        if let Some(index) = prompts.iter().position(|prompt| prompt.tokens.is_empty()) {
            bail!("prompt {index} has no token, so there is nothing to continue; remove it from the prompts");
        }
        let own_rows = model.own_rows();
        let answer = generation.sampling.response_length;
        let switch = model.architecture().rotations_switch_after();
        // Where rotations depend on the length of a sequence, sequences of different lengths cannot share
        // keys.
        let may_share = |prompt: &PromptTokens| {
            let OwnRows { virtual_rows, prefix_rows } = own_rows[prompt.stack];
            switch.is_none_or(|original| virtual_rows + prefix_rows + prompt.tokens.len() + answer <= original)
        };
        let shared = beginnings::shared(prompts, may_share);
        let mut beginning_of = vec![None; prompts.len()];
        // Prompts that share a beginning follow each other, so that it is kept no longer than need be.
        let mut order: Vec<(usize, usize)> = (0..prompts.len()).map(|index| (index, index)).collect();
        for (number, beginning) in shared.iter().enumerate() {
            for &prompt in &beginning.prompts {
                beginning_of[prompt] = Some(number);
                order[prompt].0 = beginning.prompts[0];
            }
        }
        order.sort_unstable();
        let beginnings = shared.iter().map(|beginning| SharedBeginning {
            stack: prompts[beginning.prompts[0]].stack,
            length: beginning.length,
            prompts: beginning.prompts.len(),
            computed: None,
        });
        let precision = generation.sampling.cache_precision;
        let mut batch = ContinuousBatch {
            model,
            prompts,
            generation,
            cache: KeyValueCache::new(model.architecture(), 0, &[], precision, model.device())?,
            own_rows,
            restart: model.architecture().rotations_restart_after(),
            beginnings: beginnings.collect(),
            beginning_of,
            waiting: order.into_iter().map(|(_, index)| index).collect(),
            active: Vec::new(),
            borrowed: vec![None; prompts.len()],
            finished: vec![vec![Answer::default(); generation.answers]; prompts.len()],
            tokens_of_beginnings: BeginningTokens::default(),
        };
        let capacity = batch.capacity();
        let prefixes = model.prefixes()?;
        batch.cache = KeyValueCache::new(model.architecture(), capacity, &prefixes, precision, model.device())?;
        Ok(batch)
    }

    /// The rows that all prompts need, but no more than allowed; in any case those that each of them needs
    /// with its beginning.
    fn capacity(&self) -> usize {
        let needs = || (0..self.prompts.len()).map(|prompt| self.rows_of(prompt).needed(self.generation.answers));
        let rows_of_beginning =
            |beginning: &SharedBeginning| self.own_rows[beginning.stack].virtual_rows + beginning.length;
        let with_beginning = needs().zip(&self.beginning_of).map(|(need, beginning)| {
            need + beginning.map_or(0, |beginning| rows_of_beginning(&self.beginnings[beginning]))
        });
        let all = needs().sum::<usize>() + self.beginnings.iter().map(rows_of_beginning).sum::<usize>();
        all.min(self.generation.sampling.kv_cache_tokens).max(with_beginning.max().unwrap_or(0))
    }

    fn rows_of(&self, prompt: usize) -> PromptRows {
        let PromptTokens { tokens, stack, .. } = &self.prompts[prompt];
        let answer = self.generation.sampling.response_length;
        if let Some(beginning) = self.beginning_of[prompt] {
            return PromptRows { prompt: tokens.len() - self.beginnings[beginning].length, spare: 0, answer };
        }
        let OwnRows { virtual_rows, prefix_rows } = self.own_rows[*stack];
        let rows = virtual_rows + tokens.len();
        let first = prefix_rows + rows;
        let outgrows = self.restart.is_some_and(|restart| first <= restart && restart < first + answer);
        PromptRows { prompt: rows, spare: if outgrows { rows } else { 0 }, answer }
    }

    /// Whether every answer is finished.
    pub(super) fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.active.is_empty()
    }

    pub(super) fn generated(self) -> Generated {
        let BeginningTokens { computed, read } = self.tokens_of_beginnings;
        Generated { answers: self.finished, shared_tokens: read.saturating_sub(computed) }
    }

    /// Computes the next prompts, where so much of the cache is free that it is worth a pass.
    pub(super) fn admit(&mut self) -> Result<()> {
        if self.active.is_empty() || 4 * self.cache.free_rows() >= self.cache.capacity() {
            while let Some(admitted) = self.take_prompts()? {
                self.prefill(&admitted)?;
            }
        }
        Ok(())
    }

    /// The next waiting prompts that make up one pass, with rows of the cache; none where there is no room
    /// for any. All of them have a shared beginning, or none has.
    fn take_prompts(&mut self) -> Result<Option<Vec<(usize, Span)>>> {
        let mut taken: Vec<(usize, Span)> = Vec::new();
        let mut tokens = 0;
        while let Some(&prompt) = self.waiting.front() {
            let is_alike =
                |&(first, _): &(usize, Span)| self.beginning_of[first].is_some() == self.beginning_of[prompt].is_some();
            tokens += self.rows_of(prompt).prompt;
            if !taken.first().is_none_or(|first| is_alike(first) && tokens <= self.generation.tokens_per_pass) {
                break;
            }
            let mut rows = self.take_rows(prompt)?;
            if rows.is_none() && self.active.is_empty() && taken.is_empty() {
                // Only beginnings are in the cache; without them there is room for any prompt with its own.
                (0..self.beginnings.len()).for_each(|beginning| self.forget(beginning));
                rows = self.take_rows(prompt)?;
            }
            let Some(rows) = rows else { break };
            self.waiting.pop_front();
            taken.push((prompt, rows));
        }
        Ok(if taken.is_empty() { None } else { Some(taken) })
    }

    /// Rows for a prompt and its answers, where the cache has room for them and for the prompt's beginning,
    /// which is then computed.
    fn take_rows(&mut self, prompt: usize) -> Result<Option<Span>> {
        let Some(number) = self.beginning_of[prompt] else {
            return Ok(self.cache.take(self.rows_of(prompt).needed(self.generation.answers)));
        };
        let SharedBeginning { stack, length, .. } = self.beginnings[number];
        if self.beginnings[number].computed.is_none() {
            let Some(rows) = self.cache.take(self.own_rows[stack].virtual_rows + length) else { return Ok(None) };
            let pass =
                Pass::of_roots(&[Root { tokens: &self.prompts[prompt].tokens[..length], stack, rows }], &self.own_rows);
            self.compute(&pass)?;
            let context = pass.layout.plan.queries[0].keys.clone();
            self.beginnings[number].computed = Some(Computed { rows, context });
            self.tokens_of_beginnings.computed += length;
        }
        let rows = self.cache.take(self.rows_of(prompt).needed(self.generation.answers));
        self.tokens_of_beginnings.read += if rows.is_some() { length } else { 0 };
        Ok(rows)
    }

    /// Gives the rows of a beginning back.
    fn forget(&mut self, beginning: usize) {
        if let Some(Computed { rows, .. }) = self.beginnings[beginning].computed.take() {
            self.cache.give_back(rows);
        }
    }

    /// The pass of what follows the shared beginnings of these prompts.
    fn pass_behind_beginnings(&self, admitted: &[(usize, Span)]) -> Pass {
        let mut pass = Pass::default();
        for &(prompt, rows) in admitted {
            let PromptTokens { tokens, stack, .. } = &self.prompts[prompt];
            let beginning = self.beginning_of[prompt].map(|number| &self.beginnings[number]);
            let context = beginning.and_then(|beginning| beginning.computed.as_ref()).map(|computed| &computed.context);
            let own = &tokens[beginning.map_or(0, |beginning| beginning.length)..];
            let rows = Span { start: rows.start, len: own.len() };
            pass.push(*stack, own, context.map_or(&[], Vec::as_slice), rows);
        }
        pass
    }

    /// Runs a pass whose keys and values go to the last span of keys of each segment, and gives the hidden
    /// state `[tokens, d_model]`.
    fn compute(&mut self, pass: &Pass) -> Result<Value> {
        self.cache.write_next_to(pass.newest_keys());
        self.model.hidden_with_store(&pass.tokens, &pass.layout, &mut self.cache)
    }

    /// Computes prompts and draws the first token of each of their answers.
    fn prefill(&mut self, admitted: &[(usize, Span)]) -> Result<()> {
        let is_behind = admitted.first().is_some_and(|&(prompt, _)| self.beginning_of[prompt].is_some());
        let pass = match is_behind {
            true => self.pass_behind_beginnings(admitted),
            false => {
                let root = |&(prompt, rows): &(usize, Span)| {
                    let PromptTokens { tokens, stack, .. } = &self.prompts[prompt];
                    Root { tokens, stack: *stack, rows }
                };
                Pass::of_roots(&admitted.iter().map(root).collect::<Vec<_>>(), &self.own_rows)
            }
        };
        let hidden = self.compute(&pass)?;
        let mut last_rows = Vec::new();
        let mut end = 0;
        for &(prompt, _) in admitted {
            let shared = self.beginning_of[prompt].map_or(0, |beginning| self.beginnings[beginning].length);
            end += self.prompts[prompt].tokens.len() - shared;
            last_rows.push(end as u32 - 1);
        }
        let stacks: Vec<usize> = admitted.iter().map(|&(prompt, _)| self.prompts[prompt].stack).collect();
        let mut queries = admitted.iter().zip(&pass.layout.plan.queries);
        for (rows, stacks) in last_rows.chunks(ROWS_OF_LOGITS).zip(stacks.chunks(ROWS_OF_LOGITS)) {
            let part: Vec<(&(usize, Span), &Query)> = queries.by_ref().take(rows.len()).collect();
            let logits = self.model.logits(&hidden, rows, stacks)?; // [rows, vocabulary]
            let vocabulary = logits.dim(1)?;
            let draw =
                |(&(&(prompt, _), _), logits): (&(&(usize, Span), &Query), &[f32])| self.first_tokens(prompt, logits);
            let drawn: Vec<_> = ops::with_numbers(&logits, |logits| {
                Ok(part.par_iter().zip(logits.par_chunks(vocabulary)).map(draw).collect())
            })?;
            for ((&(prompt, rows), query), drawn) in part.into_iter().zip(drawn) {
                self.begin(prompt, rows, query, drawn)?;
            }
        }
        self.retire();
        // Rows of one stack lie together; an answer's place among the others does not change it.
        self.active.sort_by_key(|answer| answer.stack);
        Ok(())
    }

    /// The first token of each answer to a prompt.
    fn first_tokens(&self, prompt: usize, logits: &[f32]) -> Result<Vec<FirstToken>, NotFinite> {
        let Generation { answers, seed, first, .. } = *self.generation;
        let distribution = self.generation.sampling.distribution(logits)?;
        let draw = |answer: usize| {
            let mut stream = random::stream(seed, "sampling", first + (prompt * answers + answer) as u64);
            let (token, log_prob) = distribution.draw(&mut stream);
            FirstToken { token, log_prob, stream }
        };
        Ok((0..answers).map(draw).collect())
    }

    /// Adds the answers to a prompt, whose first tokens were drawn.
    fn begin(
        &mut self,
        prompt: usize,
        rows: Span,
        query: &Query,
        drawn: Result<Vec<FirstToken>, NotFinite>,
    ) -> Result<()> {
        let first_position = query.keys.iter().map(|span| span.len).sum();
        let drawn = drawn.map_err(|why| self.not_finite(prompt, first_position, 0, why))?;
        let PromptRows { prompt: prompt_rows, spare, answer: answer_rows } = self.rows_of(prompt);
        self.borrowed[prompt] = Some((Span { start: rows.start, len: prompt_rows }, drawn.len()));
        let mut next_row = rows.start + prompt_rows;
        for (answer, FirstToken { token, log_prob, stream }) in drawn.into_iter().enumerate() {
            let own = Span { start: next_row + spare, len: answer_rows };
            next_row += spare + answer_rows;
            self.active.push(Active {
                prompt,
                stack: self.prompts[prompt].stack,
                answer,
                tokens: vec![token],
                log_probs: vec![log_prob],
                stream,
                context: query.keys.clone(),
                first_position,
                own,
                spare,
            });
        }
        Ok(())
    }

    /// Computes the newest token of every active answer and draws the next.
    pub(super) fn step(&mut self) -> Result<()> {
        if self.active.is_empty() {
            return Ok(());
        }
        for index in 0..self.active.len() {
            let Active { first_position, tokens, .. } = &self.active[index];
            if self.restart == Some(first_position + tokens.len() - 1) {
                self.restart(index)?;
            }
        }
        let mut pass = Pass::default();
        for Active { stack, tokens, context, own, .. } in &self.active {
            let newest = &tokens[tokens.len() - 1..];
            pass.push(*stack, newest, context, Span { start: own.start, len: tokens.len() });
        }
        let hidden = self.compute(&pass)?; // [active, d_model]
        let rows: Vec<u32> = (0..pass.tokens.len() as u32).collect();
        let stacks: Vec<usize> = self.active.iter().map(|answer| answer.stack).collect();
        let sampling = self.generation.sampling;
        let draw = |(answer, logits): (&mut Active, &[f32])| {
            let (token, log_prob) = sampling.distribution(logits)?.draw(&mut answer.stream);
            answer.tokens.push(token);
            answer.log_probs.push(log_prob);
            Ok(())
        };
        for (rows, stacks) in rows.chunks(ROWS_OF_LOGITS).zip(stacks.chunks(ROWS_OF_LOGITS)) {
            let logits = self.model.logits(&hidden, rows, stacks)?; // [rows, vocabulary]
            let vocabulary = logits.dim(1)?;
            let answers = &mut self.active[rows[0] as usize..][..rows.len()];
            let drawn: Vec<Result<(), NotFinite>> = ops::with_numbers(&logits, |logits| {
                Ok(answers.par_iter_mut().zip(logits.par_chunks(vocabulary)).map(draw).collect())
            })?;
            for (drawn, &row) in drawn.into_iter().zip(rows) {
                let Active { prompt, first_position, ref tokens, .. } = self.active[row as usize];
                drawn.map_err(|why| self.not_finite(prompt, first_position, tokens.len(), why))?;
            }
        }
        self.retire();
        Ok(())
    }

    /// Computes the keys and values of prompt and answer anew, all but the newest token's, for an answer that
    /// this token makes longer than the rotations of shorter sequences reach. They go to the answer's own
    /// rows and the spare ones before these.
    fn restart(&mut self, index: usize) -> Result<()> {
        let Active { prompt, stack, ref tokens, first_position, own, spare, .. } = self.active[index];
        let known = &tokens[..tokens.len() - 1];
        let sequence = [&self.prompts[prompt].tokens[..], known].concat();
        let rows = Span { start: own.start - spare, len: spare + known.len() };
        let mut pass = Pass::of_roots(&[Root { tokens: &sequence, stack, rows }], &self.own_rows);
        pass.layout.lengths.fill((first_position + tokens.len()) as u32);
        self.compute(&pass)?;
        let mut context = pass.layout.plan.queries[0].keys.clone();
        *context.last_mut().expect("a segment sees itself") = Span { start: rows.start, len: spare };
        self.active[index].context = context;
        Ok(())
    }

    /// The error of logits from which nothing can be drawn, after `context` rows of prefix and prompt and
    /// `known` tokens of the answer.
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
        let Generation { stop, sampling, .. } = *self.generation;
        let mut kept = Vec::with_capacity(self.active.len());
        for active in std::mem::take(&mut self.active) {
            let ended = stop.ends(&active.tokens);
            if !ended && active.tokens.len() < sampling.response_length {
                kept.push(active);
                continue;
            }
            let Active { prompt, answer, tokens, log_probs, own, spare, .. } = active;
            self.finished[prompt][answer] = Answer { tokens, ended, log_probs };
            self.cache.give_back(Span { start: own.start - spare, len: spare + own.len });
            let Some((rows, answers)) = &mut self.borrowed[prompt] else { continue };
            *answers -= 1;
            if *answers == 0 {
                self.cache.give_back(*rows);
                self.borrowed[prompt] = None;
                self.leave_beginning(prompt);
            }
        }
        self.active = kept;
    }

    /// Counts a prompt that is finished with its beginning.
    fn leave_beginning(&mut self, prompt: usize) {
        let Some(number) = self.beginning_of[prompt] else { return };
        self.beginnings[number].prompts -= 1;
        if self.beginnings[number].prompts == 0 {
            self.forget(number);
        }
    }
}

#[cfg(test)]
mod tests;
