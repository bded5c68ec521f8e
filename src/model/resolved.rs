//! Adapters whose look-ups by name are made once.
//!
//! An adapter finds what it makes of a linear by names that it puts together, and some compute it (the
//! transpose of an update of tied embeddings). A pass asks at every linear and norm, which generation does
//! for every token, and for each of many users' adapters.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::Model;
use super::adapter::{Adapter, EmbeddingChange, LinearChange, NormChange, Parameter, Pass, Saving, SubLayerChange};
use super::sites::Stack;
use super::weights::Weights;
use crate::error::Result;
use crate::ops::Value;
use crate::settings::MethodSettings;

impl Model {
    /// The same model, for passes between which no parameter changes: adapters are asked once what they make
    /// of a linear, a norm or the embeddings, whichever pass comes first.
    pub fn resolved(self) -> Self {
        let resolved = |adapter: Arc<dyn Adapter>| Arc::new(Resolved::of(adapter)) as Arc<dyn Adapter>;
        let stacks = self.stacks.into_iter().map(|stack| stack.into_iter().map(resolved).collect::<Stack>()).collect();
        Model { stacks, ..self }
    }
}

/// An adapter, and what it answered.
struct Resolved {
    adapter: Arc<dyn Adapter>,
    embedding: Option<EmbeddingChange>,
    linears: Answers<LinearChange>,
    norms: Answers<NormChange>,
}

impl Resolved {
    fn of(adapter: Arc<dyn Adapter>) -> Self {
        Resolved { embedding: adapter.embedding(), adapter, linears: Answers::default(), norms: Answers::default() }
    }
}

/// What was answered by name.
struct Answers<T>(Mutex<HashMap<String, Option<T>>>);

impl<T> Default for Answers<T> {
    fn default() -> Self {
        Answers(Mutex::default())
    }
}

impl<T: Clone> Answers<T> {
    fn of(&self, name: &str, ask: impl FnOnce() -> Option<T>) -> Option<T> {
        let answers = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = answers().get(name).cloned();
        known.unwrap_or_else(|| {
            // Asked outside of the lock: a thread that waits for tasks of the answer may be given one that asks
            // for another.
            let answer = ask();
            answers().insert(name.to_string(), answer.clone());
            answer
        })
    }
}

impl Adapter for Resolved {
    fn embedding(&self) -> Option<EmbeddingChange> {
        self.embedding.clone()
    }

    fn linear(&self, name: &str) -> Option<LinearChange> {
        self.linears.of(name, || self.adapter.linear(name))
    }

    fn norm(&self, name: &str) -> Option<NormChange> {
        self.norms.of(name, || self.adapter.norm(name))
    }

    fn virtual_rows(&self) -> usize {
        self.adapter.virtual_rows()
    }

    fn virtual_tokens(&self, pass: &Pass) -> Result<Option<Value>> {
        self.adapter.virtual_tokens(pass)
    }

    fn prefix_rows(&self) -> usize {
        self.adapter.prefix_rows()
    }

    fn prefixes(&self) -> Result<Vec<(Value, Value)>> {
        self.adapter.prefixes()
    }

    fn sub_layer_change(&self) -> Option<&dyn SubLayerChange> {
        self.adapter.sub_layer_change()
    }

    fn depth(&self) -> Option<usize> {
        self.adapter.depth()
    }

    fn last_block(&self, x: Value) -> Result<Value> {
        self.adapter.last_block(x)
    }

    fn parameters(&self) -> usize {
        self.adapter.parameters()
    }

    fn trainable_parameters(&self) -> Vec<Parameter> {
        self.adapter.trainable_parameters()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        self.adapter.frozen()
    }

    fn trainable(&self, settings: &MethodSettings) -> Result<Arc<dyn Adapter>> {
        self.adapter.trainable(settings)
    }

    fn method(&self) -> &'static str {
        self.adapter.method()
    }

    fn note(&self) -> Option<String> {
        self.adapter.note()
    }

    fn merge(&self, weights: &Weights) -> Result<Weights> {
        self.adapter.merge(weights)
    }

    fn save(&self, folder: &Path, saving: &Saving) -> Result<()> {
        self.adapter.save(folder, saving)
    }
}
