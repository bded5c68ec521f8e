//! BitFit (Ben Zaken et al. 2022): biases train, and nothing else. A model that has none is given zeros at the same places.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde_json::json;

use super::base::Base;
use super::peft::{self, AdapterFiles};
use super::targets::linears;
use crate::bail;
use crate::error::Result;
use crate::model::adapter::{Adapter, LinearChange, NormChange, Parameter, Saving};
use crate::model::architecture::{Architecture, AttentionInput};
use crate::model::weights::{Role, Weights, tensor_specs};
use crate::ops;
use crate::settings::{BiasGroup, MethodSettings};

/// Biases in place of the base's.
#[derive(Debug, Clone)]
pub struct Bitfit {
    /// By their names in the model, new ones too.
    tensors: Weights,
    /// The names of those that the base has not.
    new: Vec<String>,
}

/// A method's bias of a norm of this name.
pub fn norm_bias(tensors: &Weights, name: &str) -> Option<NormChange> {
    let bias = tensors.find(&format!("{name}.bias")).map(ops::Value::from);
    bias.map(|bias| NormChange { weight: None, bias: Some(bias) })
}

/// Puts all biases among `tensors` into `weights`.
pub fn set_biases(weights: &mut Weights, tensors: &Weights) {
    for (name, bias) in tensors.iter().filter(|(name, _)| name.ends_with(".bias")) {
        weights.set(name, bias.detach());
    }
}

impl Bitfit {
    /// The biases of these groups, as the base has them, or zero.
    pub fn new(groups: &[BiasGroup], base: &Base) -> Result<Self> {
        let mut tensors = Weights::default();
        let mut new = Vec::new();
        for (name, width) in places(base.architecture(), groups) {
            let bias = match base.model.weights().find(&name) {
                Some(bias) => bias,
                None => {
                    new.push(name.clone());
                    Tensor::zeros(width, DType::F32, base.device())?
                }
            };
            tensors.set(&name, bias);
        }
        if tensors.count() == 0 {
            bail!("--bitfit-biases: this model has no such place");
        }
        Ok(Bitfit { tensors: tensors.trainable()?, new })
    }

    /// Reads biases in our form.
    pub fn read(files: &mut AdapterFiles, base: &Base) -> Result<Self> {
        let mut tensors = Weights::default();
        let mut new = Vec::new();
        for (name, width) in places(base.architecture(), &[BiasGroup::All]) {
            if let Some(bias) = files.take_if_of_shape(&name, &[width])? {
                tensors.set(&name, bias);
                if !base.model.weights().has(&name) {
                    new.push(name);
                }
            }
        }
        Ok(Bitfit { tensors, new })
    }
}

/// Names and widths of the biases that a model of this architecture has or could have.
fn places(architecture: &Architecture, groups: &[BiasGroup]) -> Vec<(String, usize)> {
    let names = &architecture.names;
    let has = |group| groups.contains(&group) || groups.contains(&BiasGroup::All);
    let is_chosen = |linear: &str| {
        let is = |name: &str| linear.ends_with(&format!(".{name}"));
        let chosen_input = match names.attention_input {
            AttentionInput::Separate { query, key, value } => {
                let parts = [(query, BiasGroup::Query), (key, BiasGroup::Key), (value, BiasGroup::Value)];
                parts.into_iter().any(|(part, group)| is(part.name) && has(group))
            }
            AttentionInput::Packed(all) | AttentionInput::PackedByHead(all) => {
                is(all.name) && [BiasGroup::Query, BiasGroup::Key, BiasGroup::Value].into_iter().any(has)
            }
        };
        let feed_forward = has(BiasGroup::FeedForward);
        let up = is(names.up.name) || names.gate.is_some_and(|gate| is(gate.name));
        chosen_input
            || is(names.attention_output.name) && has(BiasGroup::Output)
            || up && (feed_forward || has(BiasGroup::FeedForwardUp))
            || is(names.down.name) && feed_forward && !is(names.attention_output.name)
    };
    let of_linears = (linears(architecture).into_iter())
        .filter(|linear| is_chosen(&linear.name))
        .map(|linear| (format!("{}.bias", linear.name), linear.d_out));
    // Norms over single heads have no bias in any family.
    let of_norms = (tensor_specs(architecture).into_iter())
        .filter(|spec| has(BiasGroup::Norms) && spec.role == Role::NormWeight && spec.shape == [architecture.d_model])
        .filter(|spec| !names.query_key_norm_names().any(|norm| spec.name.contains(norm)))
        .map(|spec| (format!("{}.bias", spec.name.trim_end_matches(".weight")), architecture.d_model));
    of_linears.chain(of_norms).collect()
}

impl Adapter for Bitfit {
    fn linear(&self, name: &str) -> Option<LinearChange> {
        let bias = self.tensors.find(&format!("{name}.bias"))?;
        Some(LinearChange { bias: Some(ops::Value::from(bias)), ..LinearChange::default() })
    }

    fn norm(&self, name: &str) -> Option<NormChange> {
        norm_bias(&self.tensors, name)
    }

    fn parameters(&self) -> usize {
        self.new.iter().filter_map(|name| self.tensors.find(name)).map(|bias| bias.elem_count()).sum()
    }

    fn trainable_parameters(&self) -> Vec<Parameter> {
        self.tensors.variables().map(|(name, variable)| Parameter::new(peft::key(name), variable)).collect()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        Arc::new(Bitfit { tensors: self.tensors.frozen(), ..self.clone() })
    }

    fn trainable(&self, _settings: &MethodSettings) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Bitfit { tensors: self.tensors.trainable()?, ..self.clone() }))
    }

    fn method(&self) -> &'static str {
        "bitfit"
    }

    fn note(&self) -> Option<String> {
        let count = self.new.len();
        (count > 0).then(|| format!("{count} of the {} trained biases are new and zero", self.tensors.iter().count()))
    }

    fn merge(&self, weights: &Weights) -> Result<Weights> {
        if let Some(name) = self.new.iter().find(|name| self.tensors.has(name)) {
            bail!(
                "\"{name}\" is a bias that the base model's family has no place for, so that bitfit cannot be folded into its weights; keep the adapter"
            );
        }
        let mut merged = weights.frozen();
        set_biases(&mut merged, &self.tensors);
        Ok(merged)
    }

    fn save(&self, folder: &Path, saving: &Saving) -> Result<()> {
        let tensors: BTreeMap<String, Tensor> =
            self.tensors.iter().map(|(name, bias)| (peft::key(name), bias)).collect();
        peft::write(folder, json!({ "peft_type": "BITFIT" }), tensors, saving)
    }
}
