//! Prompt tuning (Lester et al. 2021): embeddings before the input, trained directly.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use serde_json::json;

use super::base::Base;
use super::peft::{self, AdapterFiles};
use super::words;
use crate::error::Result;
use crate::model::adapter::{Adapter, Parameter, Pass, Saving};
use crate::model::weights::Weights;
use crate::ops::Value;
use crate::settings::{MethodSettings, PromptSettings};

/// Key of the virtual tokens in PEFT's files.
pub const KEY: &str = "prompt_embeddings";

/// Trained embeddings, `[virtual tokens, d_model]`.
#[derive(Debug, Clone)]
pub struct PromptTuning {
    tensors: Weights,
    shape: peft::BaseShape,
}

impl PromptTuning {
    /// New virtual tokens.
    pub fn new(settings: &PromptSettings, base: &Base) -> Result<Self> {
        Self::of(words::embeddings(settings, base, KEY)?, base).trained()
    }

    /// Frozen virtual tokens `[virtual tokens, d_model]`.
    pub fn of(embeddings: Tensor, base: &Base) -> Self {
        let mut tensors = Weights::default();
        tensors.set(KEY, embeddings);
        PromptTuning { tensors, shape: peft::BaseShape::of(base.architecture()) }
    }

    fn trained(self) -> Result<Self> {
        Ok(PromptTuning { tensors: self.tensors.trainable()?, ..self })
    }

    /// Reads virtual tokens in PEFT's form.
    pub fn read(files: &mut AdapterFiles, base: &Base) -> Result<Self> {
        let count = files.config().size("num_virtual_tokens")?;
        let embeddings = files.take_of_shape(KEY, &[count, base.architecture().d_model])?;
        Ok(Self::of(embeddings, base))
    }

    fn embeddings(&self) -> Result<Tensor> {
        self.tensors.get(KEY)
    }
}

impl Adapter for PromptTuning {
    fn virtual_rows(&self) -> usize {
        self.tensors.find(KEY).map_or(0, |embeddings| embeddings.dims()[0])
    }

    fn virtual_tokens(&self, _pass: &Pass) -> Result<Option<Value>> {
        Ok(Some(Value::of(&self.embeddings()?)))
    }

    fn parameters(&self) -> usize {
        self.tensors.count()
    }

    fn trainable_parameters(&self) -> Vec<Parameter> {
        self.tensors.variables().map(|(name, variable)| Parameter::new(name, variable)).collect()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        Arc::new(PromptTuning { tensors: self.tensors.frozen(), ..self.clone() })
    }

    fn trainable(&self, _settings: &MethodSettings) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(self.clone().trained()?))
    }

    fn method(&self) -> &'static str {
        "prompt-tuning"
    }

    fn save(&self, folder: &Path, saving: &Saving) -> Result<()> {
        let mut config = json!({
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.virtual_rows(),
            "prompt_tuning_init": "RANDOM",
        });
        self.shape.describe(&mut config, self.shape.d_model, self.shape.heads);
        peft::write(folder, config, BTreeMap::from([(KEY.to_string(), self.embeddings()?)]), saving)
    }
}
