//! The model core: one transformer for all families, its weights, and what stands on top of it.

pub mod adapter;
pub mod architecture;
pub mod config;
pub mod dtype;
pub mod family;
pub mod folder;
pub mod head;
pub mod kept;
pub mod layout;
pub mod linear_change;
mod output;
pub mod passes;
mod resolved;
pub mod rotary;
pub mod sites;
pub mod tables;
pub mod transformer;
pub mod tying;
pub mod weight_files;
pub mod weights;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};

use crate::bail;
use crate::data::batch::Batch;
use crate::data::tokenize::Tokenizer;
use crate::error::Result;
use crate::ops::{self, Value};
use crate::remote::hub;
use crate::stop;
use adapter::{Adapter, Parameter, Pass, Saving};
use architecture::{Architecture, Pooling};
use folder::ModelFolder;
use head::Head;
use kept::Kept;
use layout::{Layout, OwnRows};
use sites::Stack;
use tables::Replaced;
use transformer::{KeyValueStore, Stream, Transformer};
use weights::Weights;

/// A model in one role: base weights, which several roles may share, with adapters and a head of its own.
///
/// It may carry more stacks of adapters than its own: those that single rows of a batch run with.
#[derive(Clone)]
pub struct Model {
    folder: Arc<ModelFolder>,
    architecture: Arc<Architecture>,
    weights: Arc<Weights>,
    /// What the base was before tables of an adapter took the place of its own.
    replaced: Option<Replaced>,
    transformer: Transformer,
    /// The first is the model's own.
    stacks: Vec<Stack>,
    /// One for each stack.
    heads: Vec<Option<Head>>,
    /// What the learning rate of the adapters of a method is multiplied with.
    learning_rate_scales: BTreeMap<&'static str, f64>,
    /// The element type of the adapters' files.
    adapter_dtype: DType,
    /// Whether its blocks are run again in the backward pass.
    checkpoints: bool,
}

impl Model {
    /// A model over these weights, which may be shared with other roles.
    pub fn new(
        folder: Arc<ModelFolder>,
        architecture: Arc<Architecture>,
        weights: Arc<Weights>,
        adapters: Stack,
        head: Option<Head>,
    ) -> Result<Self> {
        let transformer = Transformer::new(&architecture, &weights)?;
        let (stacks, heads) = (vec![adapters], vec![head]);
        let learning_rate_scales = BTreeMap::new();
        let adapter_dtype = DType::F32;
        Ok(Model {
            folder,
            architecture,
            weights,
            replaced: None,
            transformer,
            stacks,
            heads,
            learning_rate_scales,
            adapter_dtype,
            checkpoints: false,
        })
    }

    /// The same model with these adapters and this head.
    pub fn with(self, adapters: Stack, head: Option<Head>) -> Self {
        Model { stacks: vec![adapters], heads: vec![head], ..self }
    }

    /// The same model, to whose tokenizer and generation settings these folders belong.
    pub fn with_companions(self, companions: Vec<PathBuf>) -> Self {
        Model { folder: Arc::new(ModelFolder { companions, ..(*self.folder).clone() }), ..self }
    }

    /// The same model, the learning rates of whose adapters are multiplied by these numbers, by the methods' names.
    pub fn with_learning_rate_scales(self, learning_rate_scales: BTreeMap<&'static str, f64>) -> Self {
        Model { learning_rate_scales, ..self }
    }

    /// The same model with more stacks, those of `others`, which stand on the same base: stack `i + 1` is that of `others[i]`.
    pub fn with_stacks_of(mut self, others: &[Model]) -> Result<Self> {
        for other in others {
            if !Arc::ptr_eq(&self.weights, &other.weights) {
                bail!(
                    "{}: stands on another base model than {}, or one of the adapters has a vocabulary of its own; adapters in one batch share their base and its vocabulary",
                    other.folder.path.display(),
                    self.folder.path.display()
                );
            }
            self.stacks.extend(other.stacks.first().cloned());
            self.heads.extend(other.heads.first().cloned());
        }
        Ok(self)
    }

    /// The same model over other base weights.
    pub fn with_weights(&self, weights: Weights) -> Result<Self> {
        let weights = Arc::new(weights);
        let transformer = Transformer::new(&self.architecture, &weights)?.with_tables_of(&self.transformer);
        Ok(Model { transformer, weights, ..self.clone() })
    }

    /// The same model without adapters over weights into which they were folded; `architecture` says whether its output is still tied.
    pub fn merged_into(&self, architecture: Architecture, weights: Weights) -> Result<Self> {
        Model::new(self.folder.clone(), Arc::new(architecture), Arc::new(weights), Vec::new(), self.head().cloned())
    }

    /// The same model, to be written with this element type.
    pub fn stored_as(mut self, dtype: DType) -> Self {
        let mut folder = (*self.folder).clone();
        folder.store_as(dtype);
        self.folder = Arc::new(folder);
        self.adapter_dtype = dtype;
        self
    }

    /// The same model, whose blocks are run again in the backward pass instead of keeping what they compute,
    /// or not (gradient checkpointing, Chen et al. 2016). Its numbers are the same.
    pub fn with_checkpoints(self, checkpoints: bool) -> Self {
        Model { checkpoints, ..self }
    }

    /// Whether its blocks are run again in the backward pass.
    pub fn has_checkpoints(&self) -> bool {
        self.checkpoints
    }

    /// The element type of what [`save`](Self::save) writes: by default that of the base model, and of adapters f32.
    pub fn saved_dtype(&self) -> DType {
        if self.adapters().is_empty() { self.folder.form.dtype } else { self.adapter_dtype }
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

    /// Its transformer over the base weights.
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// Its own adapters, each on top of those before it.
    pub fn adapters(&self) -> &[Arc<dyn Adapter>] {
        &self.stacks[0]
    }

    /// All stacks of adapters that rows may run with; the first is the model's own.
    pub fn stacks(&self) -> &[Stack] {
        &self.stacks
    }

    /// The head, if there is one.
    pub fn head(&self) -> Option<&Head> {
        self.heads[0].as_ref()
    }

    /// The head that a stack's answers are read with, where it has one; stack 0 is the model's own.
    pub fn head_of(&self, stack: usize) -> Option<&Head> {
        self.heads.get(stack)?.as_ref()
    }

    /// The head, to change its shift.
    pub fn head_mut(&mut self) -> Option<&mut Head> {
        self.heads[0].as_mut()
    }

    /// The same storage seen as frozen: passes through it record nothing for a backward pass, and see every later update.
    pub fn frozen(&self) -> Result<Self> {
        self.frozen_over(self.weights.frozen())
    }

    /// The same, to be dropped before anything is updated: what weights are packed to for products is kept as
    /// long, where the base trains too.
    pub fn snapshot(&self) -> Result<Self> {
        self.frozen_over(self.weights.snapshot())
    }

    fn frozen_over(&self, weights: Weights) -> Result<Self> {
        let weights = Arc::new(weights);
        Ok(Model {
            transformer: Transformer::new(&self.architecture, &weights)?.with_tables_of(&self.transformer),
            weights,
            stacks: self.stacks.iter().map(|stack| stack.iter().map(|adapter| adapter.frozen()).collect()).collect(),
            heads: self.heads.iter().map(|head| head.as_ref().map(Head::frozen)).collect(),
            ..self.clone()
        })
    }

    /// What trains, each once.
    pub fn trainable_parameters(&self) -> Vec<Parameter> {
        let of_weights = self.weights.variables().map(|(name, variable)| Parameter::new(name, variable));
        let of_adapters = self.adapters().iter().flat_map(|adapter| {
            let scale = self.learning_rate_scales.get(adapter.method()).copied().unwrap_or(1.0);
            let scaled = move |parameter: Parameter| Parameter {
                learning_rate_scale: scale * parameter.learning_rate_scale,
                ..parameter
            };
            adapter.trainable_parameters().into_iter().map(scaled)
        });
        let of_head = self.head().into_iter().flat_map(Head::trainable_parameters);
        of_weights.chain(of_adapters).chain(of_head).collect()
    }

    /// Refuses weights that are not finite: every number that the model computes would be none.
    ///
    /// # Errors
    /// Names the tensor, and the first of its places.
    pub fn check_finite(&self) -> Result<()> {
        let trained = self.trainable_parameters();
        let trained = trained.iter().map(|parameter| {
            let tensor = parameter.variable.as_tensor().clone();
            (&parameter.name, Kept::Plain(tensor))
        });
        let of_base = self.weights.kept().map(|(name, kept)| (name, kept.clone()));
        for (name, kept) in of_base.chain(trained) {
            let (mut place, mut bad, mut first) = (0, 0, None);
            kept.for_each_part(|values| {
                let is_bad = |value: &&f32| !value.is_finite();
                // A sum of squares sees most tensors in a fraction of the time.
                if !ops::squares(values).is_finite() {
                    bad += values.iter().filter(is_bad).count();
                    first = first.or_else(|| values.iter().position(|value| is_bad(&value)).map(|index| place + index));
                }
                place += values.len();
            })?;
            if let Some(first) = first {
                bail!(
                    "{}: tensor \"{name}\" has {bad} of {place} values that are not finite (NaN or infinite), the first at place {first}, so the model's \
                     outputs are none either; restore its file, or go back to a checkpoint before it was damaged",
                    self.folder.path.display(),
                );
            }
        }
        Ok(())
    }

    /// Number of scalars in the base model, adapters and head apart.
    pub fn base_parameters(&self) -> usize {
        self.weights.count()
    }

    /// Number of scalars in adapters and head.
    pub fn added_parameters(&self) -> usize {
        let head = self.head().map_or(0, Head::parameters);
        head + self.adapters().iter().map(|adapter| adapter.parameters()).sum::<usize>()
    }

    /// Number of scalars that train.
    pub fn trainable_count(&self) -> usize {
        self.trainable_parameters().iter().map(|parameter| parameter.variable.as_tensor().elem_count()).sum()
    }

    /// The hidden state at every token of a batch, `[tokens, d_model]`.
    ///
    /// # Errors
    /// Where a signal ends what may be given up ([`stop::check`]), too.
    pub fn hidden(&self, batch: &Batch, pass: &Pass) -> Result<Value> {
        stop::check()?;
        let layout = Layout::new(&batch.segments, &self.own_rows());
        let checkpoints = self.checkpoints;
        let stream = Stream { tokens: &batch.tokens, types: &batch.types, layout: &layout, checkpoints };
        self.transformer.forward(&stream, &self.stacks, pass, None)
    }

    /// The hidden state at every token of a stream whose keys and values are kept in `store`.
    ///
    /// # Errors
    /// As [`hidden`](Self::hidden).
    pub fn hidden_with_store(&self, tokens: &[u32], layout: &Layout, store: &mut dyn KeyValueStore) -> Result<Value> {
        stop::check()?;
        let stream = Stream { tokens, types: &[], layout, checkpoints: false };
        self.transformer.forward(&stream, &self.stacks, &Pass::default(), Some(store))
    }

    /// The rows that each stack places before its documents.
    pub fn own_rows(&self) -> Vec<OwnRows> {
        OwnRows::of(&self.stacks)
    }

    /// For each layer the prefixes of all stacks, end to end, `[prefix rows, kv_heads * head_dim]` each; empty without.
    pub fn prefixes(&self) -> Result<Vec<(Value, Value)>> {
        sites::prefixes(&self.stacks)
    }

    /// The reward of every answer of a batch, `[answers]`.
    pub fn rewards(&self, hidden: &Value, batch: &Batch) -> Result<Value> {
        let rewards = self.classes(hidden, batch)?; // [answers, 1]
        if rewards.dim(1)? != 1 {
            bail!(
                "{}: its head says {} numbers of a text, a reward is one; give a reward model",
                self.folder.path.display(),
                rewards.dim(1)?
            );
        }
        rewards.reshape(rewards.dim(0)?)
    }

    /// The head's numbers for every answer of a batch, `[answers, labels]`; each by the head of its own stack, where that has one.
    pub fn classes(&self, hidden: &Value, batch: &Batch) -> Result<Value> {
        let of_run = |(stack, answers): (usize, Range<usize>)| {
            let head = self.heads[stack].as_ref().map_or_else(|| self.needed_head(), Ok)?;
            head.forward(&head.pool(hidden, &batch.tokens, &batch.answer_rows[answers])?)
        };
        match &batch.runs()[..] {
            [run] => of_run(run.clone()),
            runs => {
                let parts = runs.iter().cloned().map(of_run).collect::<Result<Vec<_>>>()?;
                Value::cat_rows(&parts.iter().collect::<Vec<_>>())
            }
        }
    }

    /// The hidden states that stand for the answers of a batch, `[answers, d_model]`.
    pub fn pooled(&self, hidden: &Value, batch: &Batch) -> Result<Value> {
        self.needed_head()?.pool(hidden, &batch.tokens, &batch.answer_rows)
    }

    /// The head's numbers `[n, labels]` for hidden states `[n, d_model]` that stand for sequences.
    pub fn classes_of_pooled(&self, pooled: &Value) -> Result<Value> {
        self.needed_head()?.forward(pooled)
    }

    /// The value at some rows, `[rows]`: what the head of a reward model says after each of them.
    pub fn values(&self, hidden: &Value, rows: &[usize]) -> Result<Value> {
        let head = self.needed_head()?;
        if head.form.pooling != Pooling::Last {
            bail!(
                "{}: its head reads the {} of a sequence; a value model needs one that reads the last token",
                self.folder.path.display(),
                if head.form.pooling == Pooling::Mean { "mean" } else { "first token" }
            );
        }
        let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        head.forward(&hidden.select_rows(&rows)?)?.reshape(rows.len())
    }

    /// A warning where `transformers` would read the head of this model at another token than it is trained
    /// at.
    pub fn padding_warning(&self, tokenizer: &Tokenizer) -> Option<String> {
        let (head, vocabulary) = (self.head()?, self.architecture.vocabulary);
        self.folder.padding_warning(head, !self.adapters().is_empty(), tokenizer, vocabulary)
    }

    fn needed_head(&self) -> Result<&Head> {
        match self.head() {
            Some(head) => Ok(head),
            None => bail!(
                "{}: this model has no head (\"{}.weight\"); give a reward model or a classifier",
                self.folder.path.display(),
                self.architecture.names.head.out
            ),
        }
    }

    /// Writes a Hugging Face folder, or PEFT folders where there are adapters, into an existing `folder`.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let head = self.head();
        if !self.adapters().is_empty() {
            let (base, revision) = match hub::name_of(&self.folder.path) {
                Some(name) => (name.repository, name.revision),
                None => (self.folder.path.display().to_string(), None),
            };
            let base_hash = self.weights_as_read().hash()?;
            let (revision, is_text_part) = (revision.as_deref(), self.folder.is_text_part());
            let dtype = self.adapter_dtype;
            let saving =
                Saving { base: &base, revision, base_hash: &base_hash, head, is_text_part, tables: &[], dtype };
            folder::save_adapters(folder, self.adapters(), &saving, self.new_tables())?;
            self.folder.copy_companions(folder)?;
        } else {
            let mut weights = (*self.weights).clone();
            for (name, tensor) in head.into_iter().flat_map(Head::tensors) {
                weights.set(&name, tensor);
            }
            weight_files::write(folder, &weights, &self.architecture, &self.folder.form)?;
            self.folder.write_config(folder, &self.architecture, head)?;
        }
        head.map_or(Ok(()), |head| head.form.write(folder))
    }
}
