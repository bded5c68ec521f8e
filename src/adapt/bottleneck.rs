//! Bottleneck adapters: `h + scaling W_up σ(W_down x)` at the sub-layers of every block, in the form of AdapterHub's files.
//!
//! With `h` the sub-layer's output and `r` the residual stream to which it will be added, `x` is `h` (Houlsby et al. 2019, after attention and after the
//! feed-forward), the residual stream with `h` in it, normalised where the family does so there (Pfeiffer et al. 2021, after the feed-forward), or `r` (parallel,
//! He et al. 2022, beside the feed-forward).

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::base::Base;
use crate::error::Result;
use crate::model::adapter::{Adapter, NormChange, Parameter, Saving, SubLayer, SubLayerChange, SubLayerRows};
use crate::model::weights::{Role, Weights, tensor_specs};
use crate::ops::{self, Activation, Value};
use crate::random;
use crate::settings::{BottleneckSettings, MethodSettings, Placement};

mod files;

pub use files::{is_adapter, read};

/// Adapters at the sub-layers of every block.
#[derive(Debug, Clone)]
pub struct Bottleneck {
    placement: Placement,
    /// The non-linearity, by AdapterHub's name for it.
    non_linearity: String,
    activation: Activation,
    scaling: f64,
    reduction_factor: f64,
    /// `{layer}.{attention|feed_forward}.{down|up}.{weight|bias}`, and norms of the model by their names.
    tensors: Weights,
    sites: files::Sites,
}

fn name(layer: usize, which: SubLayer, part: &str) -> String {
    let which = if which == SubLayer::Attention { "attention" } else { "feed_forward" };
    format!("{layer}.{which}.{part}")
}

impl Bottleneck {
    /// New adapters that change nothing yet: Kaiming on the way down and zero on the way up (He et al. 2022). Houlsby et al. start near zero on both ways,
    /// which changes next to nothing.
    pub fn new(settings: &BottleneckSettings, base: &Base) -> Result<Self> {
        let placement = settings.adapter_placement;
        let parallel = placement == Placement::Parallel;
        let default_non_linearity = if placement == Placement::Houlsby { "swish" } else { "relu" };
        let non_linearity = settings.non_linearity.clone().unwrap_or_else(|| default_non_linearity.to_string());
        let d_model = base.architecture().d_model;
        let factor = settings.reduction_factor.unwrap_or(if parallel { 2 } else { 16 });
        let width = (d_model / factor).max(1);
        let mut tensors = Weights::default();
        for layer in 0..base.architecture().layers {
            for &which in sub_layers(placement) {
                for (part, d_out, d_in) in [("down", width, d_model), ("up", d_model, width)] {
                    let weight = name(layer, which, &format!("{part}.weight"));
                    let mut stream = base.stream(&weight);
                    let shape = [d_out, d_in];
                    let values = match part {
                        "down" => random::uniform(&mut stream, &shape, 1.0 / (d_in as f64).sqrt(), base.device())?,
                        _ => Tensor::zeros(&shape, DType::F32, base.device())?,
                    };
                    tensors.set(&weight, values);
                    let bias = name(layer, which, &format!("{part}.bias"));
                    tensors.set(&bias, Tensor::zeros(d_out, DType::F32, base.device())?);
                }
            }
        }
        if settings.adapter_train_norms {
            add_norms(&mut tensors, base)?;
        }
        Ok(Bottleneck {
            placement,
            activation: activation(&non_linearity)?,
            non_linearity,
            scaling: settings.adapter_scaling.unwrap_or(if parallel { 4.0 } else { 1.0 }),
            reduction_factor: factor as f64,
            tensors: tensors.trainable()?,
            sites: files::Sites::of(base),
        })
    }

    fn adapt(&self, layer: usize, which: SubLayer, x: &Value) -> Result<Option<Value>> {
        let part = |part: &str| self.tensors.find(&name(layer, which, part)).map(Value::from);
        let (Some(down), Some(up)) = (part("down.weight"), part("up.weight")) else { return Ok(None) };
        let inner = ops::linear(x, &down, part("down.bias").as_ref())?; // [rows, bottleneck]
        let inner = ops::activate(&inner, self.activation)?;
        ops::linear(&inner, &up, part("up.bias").as_ref())?.scale(self.scaling).map(Some)
    }
}

/// Whether a tensor is an adapter's own, and not a norm of the model.
fn is_of_adapter(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_digit())
}

fn sub_layers(placement: Placement) -> &'static [SubLayer] {
    match placement {
        Placement::Houlsby => &[SubLayer::Attention, SubLayer::FeedForward],
        Placement::Pfeiffer | Placement::Parallel => &[SubLayer::FeedForward],
    }
}

/// The non-linearity of this name in AdapterHub's or Hugging Face's language.
fn activation(name: &str) -> Result<Activation> {
    Activation::named(name).map_or_else(
        || {
            crate::bail!(
                "--non-linearity {name}: known non-linearities are relu, gelu, gelu_new, gelu_orig, swish, silu and tanh"
            )
        },
        Ok,
    )
}

/// The norms of the blocks, which Houlsby et al. train too.
fn add_norms(tensors: &mut Weights, base: &Base) -> Result<()> {
    let architecture = base.architecture();
    for spec in tensor_specs(architecture) {
        let module = spec.name.trim_end_matches(".weight").to_string();
        let of_model = spec.role == Role::NormWeight && spec.shape == [architecture.d_model];
        let of_head = architecture.names.query_key_norm_names().any(|norm| module.ends_with(norm));
        if of_model && !of_head {
            for part in ["weight", "bias"] {
                let name = format!("{module}.{part}");
                if let Some(values) = base.model.weights().find(&name) {
                    tensors.set(&name, values);
                }
            }
        }
    }
    Ok(())
}

impl SubLayerChange for Bottleneck {
    fn output(&self, rows: SubLayerRows) -> Result<Value> {
        let input = match self.placement {
            Placement::Houlsby => rows.output.clone(),
            Placement::Pfeiffer if !sub_layers(self.placement).contains(&rows.which) => return Ok(rows.output),
            Placement::Pfeiffer => rows.joined()?,
            Placement::Parallel => rows.residual.clone(),
        };
        match self.adapt(rows.layer, rows.which, &input)? {
            Some(change) => rows.output.add(&change),
            None => Ok(rows.output),
        }
    }
}

impl Adapter for Bottleneck {
    fn norm(&self, name: &str) -> Option<NormChange> {
        let part = |part: &str| self.tensors.find(&format!("{name}.{part}")).map(Value::from);
        let (weight, bias) = (part("weight"), part("bias"));
        (weight.is_some() || bias.is_some()).then_some(NormChange { weight, bias })
    }

    fn sub_layer_change(&self) -> Option<&dyn SubLayerChange> {
        Some(self)
    }

    fn parameters(&self) -> usize {
        self.tensors.iter().filter(|(name, _)| is_of_adapter(name)).map(|(_, tensor)| tensor.elem_count()).sum()
    }

    fn trainable_parameters(&self) -> Vec<Parameter> {
        self.tensors.variables().map(|(name, variable)| Parameter::new(self.sites.key(name), variable)).collect()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        Arc::new(Bottleneck { tensors: self.tensors.frozen(), ..self.clone() })
    }

    fn trainable(&self, _settings: &MethodSettings) -> Result<Arc<dyn Adapter>> {
        Ok(Arc::new(Bottleneck { tensors: self.tensors.trainable()?, ..self.clone() }))
    }

    fn method(&self) -> &'static str {
        "adapters"
    }

    fn save(&self, folder: &Path, saving: &Saving) -> Result<()> {
        self.write(folder, saving)
    }
}
