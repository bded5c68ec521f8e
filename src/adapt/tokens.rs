//! Trainable tokens (PEFT): the embeddings of single tokens in place of the base's, and of the output matrix where it is tied to them. They are
//! a method by themselves, or a part of LoRA (`trainable_token_indices`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use serde_json::{Value, json};

use super::base::Base;
use super::peft::{self, AdapterFiles};
use super::targets::{self, Output, Targets};
use crate::bail;
use crate::error::Result;
use crate::model::adapter::{Adapter, EmbeddingChange, LinearChange, Parameter, RowsChange, Saving};
use crate::model::architecture::{Architecture, Config, shortened};
use crate::model::tying::are_equal;
use crate::model::weights::Weights;
use crate::ops;
use crate::settings::MethodSettings;

/// Which tokens have rows of their own, in which tables; the rows are tensors of the adapter.
#[derive(Debug, Clone, Default)]
pub struct TokenRows {
    /// By module: the token embeddings, the output matrix.
    ids: BTreeMap<String, Arc<[u32]>>,
    /// Whether the output matrix has the embeddings' rows, as in a base that ties the two.
    tied: bool,
    /// What follows the module in the name of its rows.
    suffix: &'static str,
    embedding: String,
    output: String,
}

/// The ending of the rows' names in an adapter of LoRA.
const BESIDE_LORA: &str = "token_adapter.trainable_tokens_delta";
/// The same where trainable tokens are all there is.
const ALONE: &str = "trainable_tokens_delta";

impl TokenRows {
    /// Those of a LoRA adapter: `trainable_token_indices` is a list for the token embeddings, or one list a module.
    pub fn of_lora(config: &Config, architecture: &Architecture) -> Result<Self> {
        let field = "trainable_token_indices";
        let mut rows = TokenRows::empty(architecture, BESIDE_LORA);
        match config.get(field) {
            None => {}
            Some(list @ Value::Array(_)) => {
                rows.add(config, field, &targets::embedding(architecture), list, architecture)?
            }
            Some(Value::Object(by_module)) => {
                for (module, list) in by_module {
                    rows.add(config, field, module, list, architecture)?;
                }
            }
            Some(other) => bail!(
                "{}: field \"{field}\" is {}, expected a list of token ids, or one list for each module",
                config.file,
                shortened(other)
            ),
        }
        Ok(rows.tie(architecture))
    }

    /// Those of an adapter that is nothing else.
    fn alone(config: &Config, architecture: &Architecture) -> Result<Self> {
        let field = "token_indices";
        let tables = [targets::embedding(architecture), architecture.names.output_module.to_string()];
        let modules = match peft::targets(config, "target_modules") {
            Targets::Names(names) if names.is_empty() => vec![tables[0].clone()],
            Targets::Names(names) => names,
            // A text is an expression for the whole name.
            Targets::Expression(name) => {
                let expression = Targets::Expression(name.clone());
                let meant = |table: &&String| expression.matches(table).unwrap_or(false);
                let meant: Vec<String> = tables.iter().filter(meant).cloned().collect();
                if meant.is_empty() { vec![name] } else { meant }
            }
        };
        let Some(list) = config.get(field) else {
            bail!("{}: field \"{field}\" is missing; expected the ids of the trainable tokens", config.file);
        };
        let mut rows = TokenRows::empty(architecture, ALONE);
        modules.iter().try_for_each(|module| rows.add(config, field, module, list, architecture))?;
        Ok(rows.tie(architecture))
    }

    fn empty(architecture: &Architecture, suffix: &'static str) -> Self {
        TokenRows {
            suffix,
            embedding: targets::embedding(architecture),
            output: architecture.names.output_module.to_string(),
            ..TokenRows::default()
        }
    }

    fn add(
        &mut self,
        config: &Config,
        field: &str,
        module: &str,
        list: &Value,
        architecture: &Architecture,
    ) -> Result<()> {
        let known = [&self.embedding, &self.output];
        let Some(name) =
            known.into_iter().find(|name| targets::is_saved(architecture, &format!("{name}.weight"), module))
        else {
            bail!(
                "{}: field \"{field}\": trainable tokens of \"{module}\" are not supported; expected those of {} or {}",
                config.file,
                self.embedding,
                self.output
            );
        };
        let id = |value: &Value| {
            value.as_u64().filter(|&id| (id as usize) < architecture.vocabulary).and_then(|id| u32::try_from(id).ok())
        };
        let ids: Option<Vec<u32>> = list.as_array().and_then(|list| list.iter().map(id).collect());
        let ids = match ids {
            Some(ids) if ids.iter().collect::<BTreeSet<_>>().len() == ids.len() => ids,
            _ => bail!(
                "{}: field \"{field}\" is {}, expected different token ids below {}, the size of the vocabulary",
                config.file,
                shortened(list),
                architecture.vocabulary
            ),
        };
        self.ids.insert(name.clone(), ids.into());
        Ok(())
    }

    /// As PEFT ties them: an output matrix follows unless other tokens are listed for it.
    fn tie(mut self, architecture: &Architecture) -> Self {
        let of_embedding = self.ids.get(&self.embedding);
        let differ = self.ids.get(&self.output).is_some_and(|ids| Some(ids) != of_embedding);
        self.tied = architecture.tied_output && of_embedding.is_some() && !differ;
        if self.tied {
            self.ids.remove(&self.output);
        }
        self
    }

    fn key(&self, module: &str) -> String {
        format!("{module}.{}", self.suffix)
    }

    /// Takes the rows out of an adapter's files and puts them into `tensors`.
    pub fn take(&self, files: &mut AdapterFiles, tensors: &mut Weights, base: &Base) -> Result<()> {
        let d_model = base.architecture().d_model;
        for (module, ids) in &self.ids {
            let key = self.key(module);
            tensors.set(&key, files.take_of_shape(&key, &[ids.len(), d_model])?);
        }
        // PEFT stores those of a tied output matrix a second time.
        if let (true, Some(copy)) = (self.tied, files.take(&self.key(&self.output)))
            && !are_equal(&copy, &tensors.get(&self.key(&self.embedding))?)?
        {
            bail!(
                "{}: \"{}\" and \"{}\" differ, but the base model ties the two matrices; save the adapter again",
                files.path.display(),
                self.key(&self.output),
                self.key(&self.embedding)
            );
        }
        Ok(())
    }

    fn change(&self, tensors: &Weights, module: &str) -> Option<RowsChange> {
        let ids = self.ids.get(module)?.clone();
        Some(RowsChange { ids, values: ops::Value::from(tensors.find(&self.key(module))?) })
    }

    /// The rows in place of the token embeddings'.
    pub fn of_embedding(&self, tensors: &Weights) -> Option<RowsChange> {
        self.change(tensors, &self.embedding)
    }

    /// The rows in place of the output matrix'.
    pub fn of_output(&self, tensors: &Weights) -> Option<RowsChange> {
        self.change(tensors, if self.tied { &self.embedding } else { &self.output })
    }

    /// Puts the rows into the base's tables.
    pub fn merge(&self, merged: &mut Weights, tensors: &Weights, output: &Output) -> Result<()> {
        let embedding = format!("{}.weight", self.embedding);
        for (name, rows) in [(&embedding, self.of_embedding(tensors)), (&output.tensor, self.of_output(tensors))] {
            if let (Some(RowsChange { ids, values }), Some(table)) = (rows, merged.find(name)) {
                let rows = RowsChange { ids, values: values.detach() };
                merged.set(name, rows.applied(&table)?);
            }
        }
        Ok(())
    }

    /// The rows that PEFT stores a second time for a tied output matrix: their name, and that of the copy.
    pub fn copies(&self) -> Option<(String, String)> {
        self.tied.then(|| (self.key(&self.embedding), self.key(&self.output)))
    }

    /// `trainable_token_indices` of LoRA's configuration.
    pub fn field(&self) -> Value {
        let ids = |ids: &Arc<[u32]>| json!(ids.to_vec());
        match self.ids.get(&self.embedding) {
            None if self.ids.is_empty() => Value::Null,
            Some(list) if self.ids.len() == 1 => ids(list),
            _ => self
                .ids
                .iter()
                .map(|(module, list)| (module.clone(), ids(list)))
                .collect::<serde_json::Map<_, _>>()
                .into(),
        }
    }
}

/// An adapter of `peft_type` TRAINABLE_TOKENS.
#[derive(Debug, Clone)]
pub struct TrainableTokens {
    rows: TokenRows,
    tensors: Weights,
    output: Output,
}

impl TrainableTokens {
    /// Reads an adapter of PEFT's form.
    pub fn read(files: &mut AdapterFiles, base: &Base) -> Result<Self> {
        let architecture = base.architecture();
        let rows = TokenRows::alone(&files.config(), architecture)?;
        let mut tensors = Weights::default();
        rows.take(files, &mut tensors, base)?;
        Ok(TrainableTokens { rows, tensors, output: Output::of(architecture) })
    }
}

impl Adapter for TrainableTokens {
    fn embedding(&self) -> Option<EmbeddingChange> {
        let rows = self.rows.of_embedding(&self.tensors)?;
        Some(EmbeddingChange { rows: Some(rows), ..EmbeddingChange::default() })
    }

    fn linear(&self, name: &str) -> Option<LinearChange> {
        let rows = self.rows.of_output(&self.tensors).filter(|_| name == self.output.module)?;
        Some(LinearChange { rows: Some(rows), ..LinearChange::default() })
    }

    fn parameters(&self) -> usize {
        self.tensors.count()
    }

    fn trainable_parameters(&self) -> Vec<Parameter> {
        self.tensors.variables().map(|(name, variable)| Parameter::new(peft::key(name), variable)).collect()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        Arc::new(TrainableTokens { tensors: self.tensors.frozen(), ..self.clone() })
    }

    fn trainable(&self, _settings: &MethodSettings) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(TrainableTokens { tensors: self.tensors.trainable()?, ..self.clone() }))
    }

    fn method(&self) -> &'static str {
        "trainable-tokens"
    }

    fn merge(&self, weights: &Weights) -> Result<Weights> {
        let mut merged = weights.frozen();
        self.rows.merge(&mut merged, &self.tensors, &self.output)?;
        Ok(merged)
    }

    fn save(&self, folder: &Path, saving: &Saving) -> Result<()> {
        let mut tensors: BTreeMap<String, Tensor> =
            self.tensors.iter().map(|(name, tensor)| (peft::key(name), tensor)).collect();
        if let Some((of, to)) = self.rows.copies() {
            tensors.insert(peft::key(&to), self.tensors.get(&of)?);
        }
        let Some(ids) = self.rows.ids.values().next() else { bail!("an adapter of trainable tokens without any") };
        let config = json!({
            "peft_type": "TRAINABLE_TOKENS",
            "token_indices": ids.to_vec(),
            "target_modules": self.rows.ids.keys().collect::<Vec<_>>(),
        });
        peft::write(folder, config, tensors, saving)
    }
}
