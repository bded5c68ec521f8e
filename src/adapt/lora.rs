//! LoRA (Hu et al. 2021): `y = W x + scale * B A x`, with `W` frozen.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::peft;
use crate::bail;
use crate::error::Result;
use crate::model::adapter::{Adapter, Linear, Pass};
use crate::model::architecture::Architecture;
use crate::model::head::ScalarHead;
use crate::model::weights::{Role, Weights, tensor_specs};
use crate::settings::LoraSettings;
use crate::{ops, random};

/// Every linear of every block; the output matrix and heads are none of them.
const ALL_LINEAR: &str = "all-linear";

/// One linear's update.
#[derive(Debug, Clone)]
pub struct Update {
    /// `A`, `[rank, d_in]`.
    pub down: Tensor,
    /// `B`, `[d_out, rank]`.
    pub up: Tensor,
    /// Present where the update trains: the variables behind `down` and `up`.
    variables: Option<(Var, Var)>,
}

/// A LoRA adapter.
#[derive(Debug, Clone)]
pub struct Lora {
    /// Its settings, as they are saved.
    pub settings: LoraSettings,
    /// The updates by the name of their linear.
    pub updates: BTreeMap<String, Update>,
    /// Whether the base keeps its linears as `[d_in, d_out]`, which PEFT wants to know.
    pub transposed_base: bool,
}

/// A linear that may be updated.
pub struct TargetLinear {
    /// Its name.
    pub name: String,
    /// Output width.
    pub d_out: usize,
    /// Input width.
    pub d_in: usize,
}

/// All linears of the blocks.
pub fn linears(architecture: &Architecture) -> Vec<TargetLinear> {
    (tensor_specs(architecture).into_iter())
        .filter(|spec| matches!(spec.role, Role::Linear | Role::ResidualLinear))
        .map(|spec| TargetLinear {
            name: spec.name.trim_end_matches(".weight").to_string(),
            d_out: spec.shape[0],
            d_in: spec.shape[1],
        })
        .collect()
}

impl Update {
    /// A frozen update.
    pub fn new(down: Tensor, up: Tensor) -> Self {
        Update { down, up, variables: None }
    }

    fn trainable(&self) -> Result<Self> {
        let (down, up) = (Var::from_tensor(&self.down)?, Var::from_tensor(&self.up)?);
        Ok(Update { down: down.as_tensor().clone(), up: up.as_tensor().clone(), variables: Some((down, up)) })
    }
}

impl Lora {
    /// A new adapter that changes nothing yet: `A` uniform in `±1 / sqrt(d_in)` (PEFT's Kaiming initialisation), `B` zero.
    pub fn new(settings: &LoraSettings, architecture: &Architecture, seed: u64, device: &Device) -> Result<Self> {
        let all = linears(architecture);
        let mut updates = BTreeMap::new();
        for target in &settings.lora_target_modules {
            let before = updates.len();
            for linear in all.iter().filter(|linear| is_target(&linear.name, target)) {
                let mut stream = random::stream(seed, &format!("initialize {}.lora_A", linear.name), 0);
                let bound = 1.0 / (linear.d_in as f64).sqrt();
                let down = random::uniform(&mut stream, &[settings.lora_rank, linear.d_in], bound, device)?;
                let up = Tensor::zeros((linear.d_out, settings.lora_rank), DType::F32, device)?;
                updates.insert(linear.name.clone(), Update::new(down, up).trainable()?);
            }
            if updates.len() == before && !all.iter().any(|linear| is_target(&linear.name, target)) {
                let names: std::collections::BTreeSet<&str> =
                    all.iter().filter_map(|linear| linear.name.rsplit('.').next()).collect();
                let names: Vec<&str> = names.into_iter().collect();
                bail!(
                    "--lora-target-modules: no linear is called \"{target}\"; this model has {} (or use {ALL_LINEAR})",
                    names.join(", ")
                );
            }
        }
        Ok(Lora { settings: settings.clone(), updates, transposed_base: architecture.names.transposed_linears })
    }

    /// A copy that trains on.
    pub fn trainable(&self) -> Result<Self> {
        let updates = (self.updates.iter())
            .map(|(name, update)| Ok((name.clone(), update.trainable()?)))
            .collect::<Result<_>>()?;
        Ok(Lora { updates, ..self.clone() })
    }

    /// What the update is multiplied with: `alpha / rank`, or `alpha / sqrt(rank)`.
    fn scale(&self, update: &Update) -> Result<f64> {
        let rank = update.down.dim(0)? as f64;
        let alpha = self.settings.lora_alpha;
        Ok(if self.settings.lora_rslora { alpha / rank.sqrt() } else { alpha / rank })
    }
}

/// PEFT's rule: the whole name, or its end after a dot.
fn is_target(name: &str, target: &str) -> bool {
    target == ALL_LINEAR || name == target || name.strip_suffix(target).is_some_and(|rest| rest.ends_with('.'))
}

impl Adapter for Lora {
    fn linear(&self, linear: &Linear, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        let Some(update) = self.updates.get(&linear.name) else {
            return ops::linear(input, &linear.weight, linear.bias.as_ref());
        };
        let dropout = self.settings.lora_dropout as f32;
        let seed = pass.dropout_seed.filter(|_| dropout > 0.0);
        let low_rank = ops::LowRank {
            a: &update.down,
            b: &update.up,
            scale: self.scale(update)?,
            dropout: seed.map(|seed| (dropout, random::named_seed(seed, &linear.name))),
        };
        ops::low_rank_linear(input, &linear.weight, linear.bias.as_ref(), &low_rank)
    }

    fn parameters(&self) -> usize {
        self.updates.values().map(|update| update.down.elem_count() + update.up.elem_count()).sum()
    }

    fn variables(&self) -> Vec<(String, Var)> {
        (self.updates.iter())
            .filter_map(|(name, update)| update.variables.as_ref().map(|variables| (name, variables)))
            .flat_map(|(name, (down, up))| [(peft::down_key(name), down.clone()), (peft::up_key(name), up.clone())])
            .collect()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        let updates = (self.updates.iter())
            .map(|(name, update)| (name.clone(), Update::new(update.down.detach(), update.up.detach())))
            .collect();
        Arc::new(Lora { updates, ..self.clone() })
    }

    fn merge(&self, weights: &Weights) -> Result<Weights> {
        let mut merged = weights.frozen();
        for (name, update) in &self.updates {
            let name = format!("{name}.weight");
            let change = update.up.detach().matmul(&update.down.detach())?.affine(self.scale(update)?, 0.0)?; // [d_out, d_in]
            let weight = (merged.get(&name)? + change)?;
            merged.set(&name, weight);
        }
        Ok(merged)
    }

    fn save(&self, folder: &Path, base: &str, head: Option<&ScalarHead>) -> Result<()> {
        peft::write(folder, self, base, head)
    }
}
