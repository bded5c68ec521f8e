//! How a model is trained: full weights, or lightweight methods on a frozen base. The only place that knows methods by name.
//!
//! Each method is one file that makes a [`crate::model::adapter::Adapter`]: new, or from a folder that was saved; [`Bases::load`] puts them together.

mod base;
mod bitfit;
mod bottleneck;
mod fields;
mod ia3;
mod lora;
mod p_tuning;
mod peft;
mod prefix_tuning;
mod probing;
mod prompt_tuning;
mod resolve;
mod stack;
mod tables;
mod targets;
mod tokens;
pub mod users;
mod whole;
mod words;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;

use crate::bail;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::adapter::Adapter;
use crate::model::architecture::Architecture;
use crate::model::folder::{self, WithoutWeights};
use crate::model::head::{self, Form, NewHead, is_head_tensor};
use crate::model::sites::Stack;
use crate::model::tying::are_equal;
use crate::model::weight_files;
use crate::model::weights::{Weights, embedding_name, output_name};
use crate::ops::BaseForm;
use crate::remote::hub;
use crate::settings::{CommonSettings, GradientCheckpointing, Method, TrainingSettings};
use base::Base;
use bitfit::Bitfit;
use bottleneck::Bottleneck;
use ia3::Ia3;
use lora::Lora;
pub use lora::initial_update;
use p_tuning::PTuning;
use peft::AdapterFiles;
use prefix_tuning::PrefixTuning;
use probing::Probing;
use prompt_tuning::PromptTuning;
pub use resolve::{architecture, base, check_weights, companions, refuse_encoder, resolve, tokenizer};
use tokens::TrainableTokens;

/// What is to be done with the weights that are read.
#[derive(Debug, Clone, Copy)]
pub enum Training<'a> {
    /// Nothing trains.
    Frozen,
    /// These methods train.
    With(&'a TrainingSettings),
}

/// What stands on top of the transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head<'a> {
    /// The output matrix, which the folder must hold: a language model.
    Language,
    /// A head with one label, which the folder must hold: a reward model.
    Scalar,
    /// A head with one label, new where the folder holds none.
    ScalarOrNew,
    /// A head with these labels, new where the folder holds none.
    Classes(&'a [String]),
    /// A head where the folder holds one.
    AsFound,
}

/// One model in one role.
#[derive(Debug, Clone, Copy)]
pub struct Role<'a> {
    /// The folder of a Hugging Face model, of an adapter, or of several on top of each other; or the name of a model or an adapter on the hub.
    pub folder: &'a Path,
    /// Adapter folders on top of it, in their order.
    pub adapters: &'a [PathBuf],
    /// What trains.
    pub training: Training<'a>,
    /// What stands on top.
    pub head: Head<'a>,
    /// Seed of everything that is new.
    pub seed: u64,
}

/// The base models read so far, without adapters: roles on the same folder share one copy.
pub struct Bases {
    device: Device,
    form: BaseForm,
    /// By the base's folder and those of the adapters that brought tables in place of its own.
    read: HashMap<Vec<PathBuf>, Model>,
}

/// An adapter as read, with the head that was saved with it.
struct Read {
    adapter: Arc<dyn Adapter>,
    head: Option<head::Head>,
}

impl Bases {
    /// No base yet; models will be read onto `device`, their matrices as they are stored.
    pub fn new(device: Device) -> Self {
        Bases { device, form: BaseForm::Stored, read: HashMap::new() }
    }

    /// The same, their matrices kept in this form, where they are frozen.
    pub fn keeping(self, form: BaseForm) -> Self {
        Bases { form, ..self }
    }

    /// The same, as a program's settings say.
    pub fn of(common: &CommonSettings, device: Device) -> Self {
        Bases::new(device).keeping(common.base_precision.form())
    }

    /// Reads one model in one role.
    pub fn load(&mut self, role: &Role) -> Result<Model> {
        let (base_folder, adapter_folders) = resolve::resolve(role.folder, role.adapters)?;
        // New weights are for a run that trains and saves all of them: an adapter would belong to weights
        // that are in no file.
        let without_weights = match role.training {
            Training::With(settings) if settings.method.is_full() && adapter_folders.is_empty() => {
                WithoutWeights::NewFromSeed(role.seed)
            }
            _ => WithoutWeights::Refuse,
        };
        if let (Training::With(settings), BaseForm::Quantised(form)) = (role.training, self.form)
            && settings.method.is_full()
        {
            bail!(
                "--base-precision {form}: quantised weights cannot train, and with --method full all of them do; leave it out, or train a lightweight method"
            );
        }
        let base = self.base(&base_folder, without_weights)?;
        let (bare, read) = self.read_adapters(base, &base_folder, &adapter_folders, role)?;
        let base = Base { model: &bare, seed: role.seed };
        let head = self.head(role, &bare, &adapter_folders, &read)?;
        let stack: Stack = read.into_iter().map(|read| read.adapter).collect();
        let settings = match role.training {
            Training::Frozen => {
                stack::check(&stack, &adapter_folders, bare.architecture())?;
                return Ok(bare.with(stack, head));
            }
            Training::With(settings) => settings,
        };
        let head = head.map(|head| head.trainable()).transpose()?;
        if settings.method.is_full() {
            stack::check(&stack, &adapter_folders, bare.architecture())?;
            let (architecture, weights) = merged_weights(&bare, &stack, head.is_some())?;
            let model = bare.with(Vec::new(), head).merged_into(architecture, weights.trainable()?)?;
            return Ok(trained_as(model, settings));
        }
        let stack = trained_stack(stack, settings, head.is_some(), &base)?;
        stack::check(&stack, &adapter_folders, bare.architecture())?;
        let scales: BTreeMap<&'static str, f64> = (settings.method.list().iter())
            .map(|&method| (method.adapter(), settings.method.learning_rate_scale(method)))
            .collect();
        Ok(trained_as(bare.with(stack, head).with_learning_rate_scales(scales), settings))
    }

    fn base(&mut self, folder: &Path, without_weights: WithoutWeights) -> Result<Model> {
        let key = vec![folder.canonicalize().map_err(Error::io(folder))?];
        if let Some(base) = self.read.get(&key) {
            // New weights that one role trains are no model for another that does not, such as the reference.
            if base.folder().new_from_seed.is_some() && without_weights == WithoutWeights::Refuse {
                return Err(weight_files::no_weights(folder));
            }
            return Ok(base.clone());
        }
        let (folder, architecture, weights) = folder::open(folder, without_weights, self.form, &self.device)?;
        let base = Model::new(Arc::new(folder), Arc::new(architecture), Arc::new(weights), Vec::new(), None)?;
        self.read.insert(key, base.clone());
        Ok(base)
    }

    /// The adapters of a role, and the base that they are read on top of: one may bring tables in place of the base's own.
    fn read_adapters(
        &mut self,
        base: Model,
        base_folder: &Path,
        adapters: &[PathBuf],
        role: &Role,
    ) -> Result<(Model, Vec<Read>)> {
        if adapters.is_empty() {
            return Ok((base, Vec::new()));
        }
        let companions = resolve::companions(role.folder, role.adapters)?;
        let mut key = vec![base_folder.canonicalize().map_err(Error::io(base_folder))?];
        let mut bare = base.with_companions(companions.clone());
        let mut read = Vec::new();
        for (index, folder) in adapters.iter().enumerate() {
            let mut files = open_adapter(folder, &bare)?;
            let tables = match &mut files {
                AdapterFolder::Peft(files) => tables::take(files, &bare, index)?,
                AdapterFolder::AdapterHub(_) => None,
            };
            if let Some(tables) = tables {
                key.push(folder.canonicalize().map_err(Error::io(folder))?);
                bare = match self.read.get(&key) {
                    Some(bare) => bare.clone().with_companions(companions.clone()),
                    None => bare.with_tables(tables)?,
                };
                self.read.insert(key.clone(), bare.clone());
            }
            read.push(read_adapter(files, folder, &Base { model: &bare, seed: role.seed })?);
        }
        Ok((bare, read))
    }

    fn head(
        &self,
        role: &Role,
        base: &Model,
        adapter_folders: &[PathBuf],
        read: &[Read],
    ) -> Result<Option<head::Head>> {
        let architecture = base.architecture();
        let source = role.folder;
        if role.head == Head::Language {
            check_language_model(base, source)?;
            return Ok(None);
        }
        let in_adapters = read.iter().rev().find_map(|read| read.head.clone());
        let found = match in_adapters {
            Some(head) => Some(head.completed_by(architecture, |name| base.weights().find(name))),
            None => {
                let (form, pad) = (Form::read(&base.folder().path)?, base.folder().pad_token_id());
                let found = head::Head::find(architecture, form, pad, |name| base.weights().find(name));
                found.map(|head| head.with_labels_of(&base.folder().config))
            }
        };
        let labels = match role.head {
            Head::Scalar | Head::ScalarOrNew => Some(1),
            Head::Classes(labels) => Some(labels.len()),
            Head::Language | Head::AsFound => None,
        };
        if let Some(head) = found {
            head.check(architecture, labels, source)?;
            if let Training::With(settings) = role.training {
                head.check_shape(settings.methods.probe.pooling, settings.methods.probe.probe_hidden_size, source)?;
            }
            if let Head::Classes(labels) = role.head {
                head.check_labels(labels, source)?;
            }
            return Ok(Some(head));
        }
        check_no_head_is_missing(base, source)?;
        adapter_folders.iter().try_for_each(|folder| check_no_head_is_missing_beside(folder, base))?;
        let names = match role.head {
            Head::ScalarOrNew => Vec::new(),
            Head::Classes(labels) => labels.to_vec(),
            Head::AsFound => return Ok(None),
            Head::Scalar | Head::Language => bail!(
                "{}: tensor \"{}.weight\" is missing, so this is no reward model; give the output folder of `reward`, or another sequence classifier with one label",
                source.display(),
                architecture.names.head.out
            ),
        };
        let probe = match role.training {
            Training::With(settings) => Some(&settings.methods.probe),
            Training::Frozen => None,
        };
        let new = NewHead {
            pooling: probe.and_then(|probe| probe.pooling),
            hidden: probe.and_then(|probe| probe.probe_hidden_size),
            labels: names,
            seed: role.seed,
        };
        head::Head::new(architecture, &new, |name| base.weights().find(name), &self.device).map(Some)
    }
}

/// The model, to be trained as the settings say, and saved in the element type that they name, if they name one.
fn trained_as(model: Model, settings: &TrainingSettings) -> Model {
    let model = model.with_checkpoints(settings.gradient_checkpointing == GradientCheckpointing::Blocks);
    match settings.save_dtype {
        Some(dtype) => model.stored_as(dtype.dtype()),
        None => model,
    }
}

fn check_language_model(base: &Model, source: &Path) -> Result<()> {
    resolve::refuse_encoder(base.architecture(), source)?;
    if let Some(name) = output_name(base.architecture())
        && !base.weights().has(name)
    {
        bail!(
            "{}: tensor \"{name}\" is missing, so this is a classifier, which cannot write answers; give a language model",
            source.display()
        );
    }
    Ok(())
}

/// Refuses a folder that says that it is a classifier and holds no head: a new one would know nothing of what
/// was learned, and without one it would be read as a language model.
fn check_no_head_is_missing(base: &Model, source: &Path) -> Result<()> {
    let names = base.folder().config.get("architectures").and_then(|names| names.as_array());
    let is_classifier =
        |name: &serde_json::Value| name.as_str().is_some_and(|name| name.ends_with("ForSequenceClassification"));
    let promised = names.is_some_and(|names| names.iter().any(is_classifier));
    if promised || Form::read(&hub::folder(source)?)?.is_some() {
        bail!(
            "{}: {} says that this model has a head, but tensor \"{}.weight\" is missing; give the folder it was saved in, or a language model to \
             start a new head on",
            source.display(),
            if promised { "config.json" } else { "head.json" },
            base.architecture().names.head.out
        );
    }
    Ok(())
}

/// The same for an adapter's folder: PEFT's configuration says that there was a head, or our own file does.
fn check_no_head_is_missing_beside(folder: &Path, base: &Model) -> Result<()> {
    let path = folder.join(peft::CONFIG);
    let config = if path.is_file() { folder::read_json(&path)? } else { serde_json::Value::Null };
    let is_classifier = config.get("task_type").and_then(|task| task.as_str()) == Some("SEQ_CLS");
    if is_classifier || Form::read(folder)?.is_some() {
        bail!(
            "{}: {} says that this adapter was trained with a head, but tensor \"{}.weight\" is missing; save the adapter with its head, or give one of a language model",
            folder.display(),
            if is_classifier { "adapter_config.json" } else { "head.json" },
            base.architecture().names.head.out
        );
    }
    Ok(())
}

/// The model with its adapters folded into its weights, which are then its own.
///
/// # Errors
/// Where a method cannot be folded in.
pub fn merged(model: &Model) -> Result<Model> {
    let (architecture, weights) = merged_weights(model, model.adapters(), model.head().is_some())?;
    model.merged_into(architecture, weights)
}

/// All weights of a model's base with adapters folded in, and its architecture, which says whether the output matrix is still tied. Hugging
/// Face's classifiers have a head in place of the output matrix, and language models have no head; the head's own tensors are the head's.
fn merged_weights(model: &Model, stack: &[Arc<dyn Adapter>], has_head: bool) -> Result<(Architecture, Weights)> {
    let mut architecture = model.architecture().clone();
    let mut weights = model.weights().frozen();
    let was_tied = architecture.tied_output && architecture.causal;
    let changes_table = |adapter: &Arc<dyn Adapter>| {
        adapter.embedding().is_some() || adapter.linear(architecture.names.output_module).is_some()
    };
    let unties = was_tied && stack.iter().any(changes_table);
    if unties {
        // What changes one of the two need not change the other.
        architecture.tied_output = false;
        weights.set_same(architecture.names.output, &embedding_name(&architecture))?;
    }
    let unfolded = weights.clone();
    for adapter in stack {
        weights = adapter.merge(&weights)?;
    }
    stack::fold_together(&mut weights, &unfolded, stack, &architecture)?;
    let (embedding, output) = (embedding_name(&architecture), architecture.names.output);
    if unties && (has_head || are_equal(&weights.get(&embedding)?, &weights.get(output)?)?) {
        architecture.tied_output = true;
        weights.remove(output);
    }
    let names: Vec<String> = weights.names().cloned().collect();
    for name in names {
        let is_output = output_name(&architecture) == Some(name.as_str());
        if is_head_tensor(&architecture, &name) || is_output && has_head {
            weights.remove(&name);
        }
    }
    Ok((architecture, weights))
}

/// The stack with every method of the run trained: the adapter of that method where the stack has one, else a new one on top.
fn trained_stack(mut stack: Stack, settings: &TrainingSettings, has_head: bool, base: &Base) -> Result<Stack> {
    let own = &settings.methods;
    for &method in settings.method.list() {
        if let Some(existing) = stack.iter_mut().rev().find(|adapter| adapter.method() == method.adapter()) {
            *existing = existing.trainable(own)?;
            continue;
        }
        let new: Arc<dyn Adapter> = match method {
            Method::Full => bail!("full trains every weight, and no other method stands on top of it"),
            Method::Probing => Arc::new(Probing::new(&own.probe, has_head, base)?),
            Method::Bitfit => Arc::new(Bitfit::new(&own.probe.bitfit_biases, base)?),
            Method::Lora => Arc::new(Lora::new(&own.lora, base)?),
            Method::PromptTuning => Arc::new(PromptTuning::new(&own.prompt, base)?),
            Method::PTuning => Arc::new(PTuning::new(&own.prompt, base)?),
            Method::PrefixTuning => Arc::new(PrefixTuning::new(&own.prompt, base)?),
            Method::PTuningV2 => Arc::new(PrefixTuning::deep_prompt(&own.prompt, base)?),
            Method::Adapters => Arc::new(Bottleneck::new(&own.bottleneck, base)?),
            Method::Ia3 => Arc::new(Ia3::new(&own.lora, base)?),
        };
        stack.push(new);
    }
    Ok(stack)
}

/// The folder of an adapter, with its files read where they have PEFT's form or ours.
enum AdapterFolder {
    Peft(Box<AdapterFiles>),
    AdapterHub(PathBuf),
}

fn open_adapter(folder: &Path, base: &Model) -> Result<AdapterFolder> {
    if bottleneck::is_adapter(folder)? {
        return Ok(AdapterFolder::AdapterHub(folder.to_path_buf()));
    }
    let files = AdapterFiles::read(folder, base.architecture(), base.device())?;
    peft::check_base(folder, base)?;
    Ok(AdapterFolder::Peft(Box::new(files)))
}

/// Reads one adapter, of PEFT's, AdapterHub's or our own form.
fn read_adapter(files: AdapterFolder, folder: &Path, base: &Base) -> Result<Read> {
    let name = folder.display().to_string();
    let read = match files {
        AdapterFolder::AdapterHub(folder) => {
            bottleneck::read(&folder, base).map(|(adapter, head)| Read { adapter, head })
        }
        AdapterFolder::Peft(files) => read_peft(*files, base),
    };
    read.map_err(|error| match error {
        Error::Input(sentence) if !sentence.contains(&name) => Error::input(format!("{name}: {sentence}")),
        Error::Tensor(error) => {
            let error = error.to_string();
            let reason = error.lines().next().unwrap_or_default();
            Error::input(format!(
                "{name}: the adapter's tensors do not fit together ({reason}); save or download it again"
            ))
        }
        other => other,
    })
}

fn read_peft(mut files: AdapterFiles, base: &Base) -> Result<Read> {
    let (form, pad) = (Form::read(files.folder())?, base.model.folder().pad_token_id());
    let head = head::Head::find(base.architecture(), form, pad, |name| files.find(name));
    head.iter().flat_map(|head| head.tensors()).for_each(|(name, _)| drop(files.take(&name)));
    let kind = files.config().text("peft_type", "")?.to_string();
    let adapter: Arc<dyn Adapter> = match kind.as_str() {
        "LORA" => Arc::new(Lora::read(&mut files, base)?),
        "IA3" => Arc::new(Ia3::read(&mut files, base)?),
        "TRAINABLE_TOKENS" => Arc::new(TrainableTokens::read(&mut files, base)?),
        "PROMPT_TUNING" => Arc::new(PromptTuning::read(&mut files, base)?),
        "P_TUNING" => match PTuning::read(&mut files, base)? {
            Some(adapter) => Arc::new(adapter),
            // PEFT keeps what the encoder said, and not the encoder.
            None => Arc::new(PromptTuning::read(&mut files, base)?),
        },
        "PREFIX_TUNING" => Arc::new(PrefixTuning::read(&mut files, base)?),
        "BITFIT" => Arc::new(Bitfit::read(&mut files, base)?),
        "PROBING" => Arc::new(Probing::read(&mut files, base)?),
        _ => bail!(
            "{}: peft_type is \"{kind}\"; expected LORA, IA3, TRAINABLE_TOKENS, PROMPT_TUNING, P_TUNING or PREFIX_TUNING, or an adapter of this project or AdapterHub",
            files.folder().display()
        ),
    };
    let folder = files.folder().to_path_buf();
    files.finish(base.model)?;
    if adapter.parameters() == 0 && head.is_none() && adapter.depth().is_none() {
        bail!("{}: holds no tensor", folder.display());
    }
    Ok(Read { adapter, head })
}
