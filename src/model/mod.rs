//! The model core: one transformer for all families, its weights, and what stands on top of it.

pub mod adapter;
pub mod architecture;
pub mod family;
pub mod folder;
pub mod head;
pub mod layout;
pub mod transformer;
pub mod weight_files;
pub mod weights;

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use crate::data::batch::{Batch, Target};
use crate::error::Result;
use crate::ops::{self, LogProbs};
use crate::random;
use adapter::{Adapter, Pass};
use architecture::Architecture;
use folder::ModelFolder;
use head::ScalarHead;
use layout::Layout;
use transformer::{KeyValueStore, Transformer};
use weights::Weights;

/// A model in one role: base weights, which several roles may share, with an adapter and a head of its own.
#[derive(Clone)]
pub struct Model {
    folder: Arc<ModelFolder>,
    architecture: Arc<Architecture>,
    weights: Arc<Weights>,
    transformer: Transformer,
    adapter: Option<Arc<dyn Adapter>>,
    head: Option<ScalarHead>,
}

/// The base model as it is.
struct NoAdapter;

impl Adapter for NoAdapter {
    fn parameters(&self) -> usize {
        0
    }

    fn variables(&self) -> Vec<(String, Var)> {
        Vec::new()
    }

    fn frozen(&self) -> Arc<dyn Adapter> {
        Arc::new(NoAdapter)
    }

    fn merge(&self, weights: &Weights) -> Result<Weights> {
        Ok(weights.clone())
    }

    fn save(&self, _folder: &Path, _base: &str, _head: Option<&ScalarHead>) -> Result<()> {
        Ok(())
    }
}

impl Model {
    /// A model over these weights, which may be shared with other roles.
    pub fn new(
        folder: Arc<ModelFolder>,
        architecture: Arc<Architecture>,
        weights: Arc<Weights>,
        adapter: Option<Arc<dyn Adapter>>,
        head: Option<ScalarHead>,
    ) -> Result<Self> {
        let transformer = Transformer::new(&architecture, &weights)?;
        Ok(Model { folder, architecture, weights, transformer, adapter, head })
    }

    /// Where its tensors lie.
    pub fn device(&self) -> &Device {
        self.transformer.output().device()
    }

    /// What the model is.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The folder it was read from.
    pub fn folder(&self) -> &ModelFolder {
        &self.folder
    }

    /// The base weights.
    pub fn weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    /// The adapter, if there is one.
    pub fn adapter(&self) -> Option<&Arc<dyn Adapter>> {
        self.adapter.as_ref()
    }

    /// The scalar head, if there is one.
    pub fn head(&self) -> Option<&ScalarHead> {
        self.head.as_ref()
    }

    /// The scalar head, to change its shift.
    pub fn head_mut(&mut self) -> Option<&mut ScalarHead> {
        self.head.as_mut()
    }

    /// The same model in another dress: same folder and architecture, other parts.
    pub fn with_parts(
        &self,
        weights: Arc<Weights>,
        adapter: Option<Arc<dyn Adapter>>,
        head: Option<ScalarHead>,
    ) -> Result<Self> {
        Self::new(self.folder.clone(), self.architecture.clone(), weights, adapter, head)
    }

    /// The same storage seen as frozen: passes through it record nothing for a backward pass, and see every later update.
    pub fn frozen(&self) -> Result<Self> {
        self.with_parts(
            Arc::new(self.weights.frozen()),
            self.adapter.as_ref().map(|adapter| adapter.frozen()),
            self.head.as_ref().map(ScalarHead::frozen),
        )
    }

    /// What trains, by name, each once.
    pub fn variables(&self) -> Vec<(String, Var)> {
        let mut variables: Vec<(String, Var)> = (self.weights.variables())
            // The head's weight is the head's.
            .filter(|(name, _)| *name != weights::SCORE)
            .map(|(name, variable)| (name.clone(), variable.clone()))
            .collect();
        variables.extend(self.adapter.iter().flat_map(|adapter| adapter.variables()));
        variables
            .extend(self.head.iter().filter_map(|head| Some((weights::SCORE.to_string(), head.variable.clone()?))));
        variables
    }

    /// Whether it can tell the probability of a token: a classifier may be without an output matrix.
    pub fn has_output_matrix(&self) -> bool {
        self.architecture.tied_output || self.weights.find(weights::OUTPUT).is_some()
    }

    /// Number of scalars in the base model, adapter and head apart.
    pub fn base_parameters(&self) -> usize {
        self.weights.count()
    }

    /// Number of scalars in adapter and head.
    pub fn added_parameters(&self) -> usize {
        let head = self.head.as_ref().map_or(0, |head| head.weight.elem_count());
        head + self.adapter.as_ref().map_or(0, |adapter| adapter.parameters())
    }

    /// Number of scalars that train.
    pub fn trainable_parameters(&self) -> usize {
        self.variables().iter().map(|(_, variable)| variable.as_tensor().elem_count()).sum()
    }

    /// The hidden state at every token of a batch, `[tokens, d_model]`.
    pub fn hidden(&self, batch: &Batch, pass: &Pass) -> Result<Tensor> {
        let adapter = self.sites();
        let layout = Layout::new(&batch.segments, adapter.virtual_rows(), adapter.prefix_rows());
        self.transformer.forward(&batch.tokens, &layout, adapter, pass, None)
    }

    /// The hidden state at every token of a stream whose keys and values are kept in `store`.
    pub fn hidden_with_store(&self, tokens: &[u32], layout: &Layout, store: &mut dyn KeyValueStore) -> Result<Tensor> {
        self.transformer.forward(tokens, layout, self.sites(), &Pass::default(), Some(store))
    }

    /// Log-probability and entropy of every target, given the batch's hidden states: `[targets]` each.
    pub fn log_probs(&self, hidden: &Tensor, targets: &[Target], temperature: f64) -> Result<LogProbs> {
        let rows: Vec<u32> = targets.iter().map(|target| target.row as u32).collect();
        let tokens: Vec<u32> = targets.iter().map(|target| target.token).collect();
        let hidden = select_rows(hidden, &rows)?; // [targets, d_model]
        ops::log_probs(&hidden, self.transformer.output(), &tokens, temperature)
    }

    /// The logits `[rows, vocabulary]` at some rows, for sampling.
    pub fn logits(&self, hidden: &Tensor, rows: &[u32]) -> Result<Tensor> {
        ops::linear(&select_rows(hidden, rows)?, self.transformer.output(), None)
    }

    /// The scalar head's score at some rows, `[rows]`.
    pub fn scores(&self, hidden: &Tensor, rows: &[usize]) -> Result<Tensor> {
        let Some(head) = &self.head else {
            crate::bail!(
                "{}: this model has no scalar head (\"{}\"); give a reward model",
                self.folder.path.display(),
                weights::SCORE
            );
        };
        let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        head.forward(&select_rows(hidden, &rows)?)
    }

    /// Writes a Hugging Face folder, or a PEFT folder where there is an adapter, into an existing `folder`.
    pub fn save(&self, folder: &Path) -> Result<()> {
        if let Some(adapter) = &self.adapter {
            adapter.save(folder, &self.folder.path.display().to_string(), self.head.as_ref())?;
            self.folder.copy_companions(folder)?;
        } else {
            let mut weights = (*self.weights).clone();
            if let Some(head) = &self.head {
                weights.set(weights::SCORE, head.weight.clone());
            }
            weight_files::write(folder, &weights, &self.architecture, &self.folder.form)?;
            self.folder.write_config(folder, &self.architecture, self.head.is_some())?;
        }
        match &self.head {
            Some(head) => head.write_shift(folder),
            None => Ok(()),
        }
    }

    fn sites(&self) -> &dyn Adapter {
        self.adapter.as_deref().unwrap_or(&NoAdapter)
    }
}

/// The seed of one pass's dropout masks.
pub fn dropout_seed(seed: u64, step: u64, micro_batch: u64) -> u64 {
    use rand::RngCore;
    random::stream(seed, "dropout", step.wrapping_mul(1 << 20).wrapping_add(micro_batch)).next_u64()
}

fn select_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    Ok(x.index_select(&Tensor::from_slice(rows, rows.len(), x.device())?, 0)?)
}
