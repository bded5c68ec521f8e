//! Tables of another vocabulary than the base's, which an adapter brings.

use std::sync::Arc;

use candle_core::Tensor;

use super::Model;
use super::transformer::Transformer;
use super::weights::{Weights, embedding_name, output_name};
use crate::error::Result;

/// The token embeddings and the output matrix in place of the base's own: rows for the tokens that were added in training, or the tables
/// that the training tool stored with the adapter.
#[derive(Debug, Clone)]
pub struct NewTables {
    /// Which of the stack's adapters they are stored with.
    pub adapter: usize,
    /// `[vocabulary, d_model]`.
    pub embedding: Tensor,
    /// `[vocabulary, d_model]`; absent where the output matrix is the embedding matrix, and where nothing reads it.
    pub output: Option<Tensor>,
}

/// The base before tables took the place of its own.
#[derive(Debug, Clone)]
pub(super) struct Replaced {
    tables: NewTables,
    weights: Arc<Weights>,
}

impl Model {
    /// The model with these tables in place of its base's own. What is saved on top of it goes on naming the base as it was read.
    pub fn with_tables(mut self, tables: NewTables) -> Result<Self> {
        let mut architecture = (*self.architecture).clone();
        let mut weights = (*self.weights).clone();
        architecture.vocabulary = tables.embedding.dim(0)?;
        weights.set(&embedding_name(&architecture), tables.embedding.clone());
        if let Some(name) = output_name(&architecture) {
            match &tables.output {
                Some(output) => weights.set(name, output.clone()),
                None => weights.remove(name),
            }
        }
        let original = self.replaced.as_ref().map_or(&self.weights, |replaced| &replaced.weights).clone();
        self.replaced = Some(Replaced { tables, weights: original });
        let (architecture, weights) = (Arc::new(architecture), Arc::new(weights));
        Ok(Model { transformer: Transformer::new(&architecture, &weights)?, architecture, weights, ..self })
    }

    /// The base's weights as they were read from its folder.
    pub fn weights_as_read(&self) -> &Arc<Weights> {
        self.replaced.as_ref().map_or(&self.weights, |replaced| &replaced.weights)
    }

    /// The tables that adapters brought, by the modules that they belong to in `transformers`, and with which adapter they are stored.
    pub(super) fn new_tables(&self) -> Option<(usize, Vec<(String, Tensor)>)> {
        let tables = &self.replaced.as_ref()?.tables;
        let names = &self.architecture.names;
        let embedding = embedding_name(&self.architecture).trim_end_matches(".weight").to_string();
        let mut modules = vec![(embedding, tables.embedding.clone())];
        let output = tables.output.clone().or(self.architecture.tied_output.then(|| tables.embedding.clone()));
        if let Some(output) = output.filter(|_| self.architecture.causal) {
            modules.push((names.output_module.to_string(), output));
        }
        Some((tables.adapter, modules))
    }
}
