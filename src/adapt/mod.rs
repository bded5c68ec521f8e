//! How a model is trained: full weights, or a lightweight method on a frozen base. The only place that knows methods by name.

mod lora;
mod peft;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;

use crate::bail;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::adapter::Adapter;
use crate::model::architecture::Architecture;
use crate::model::folder::{self, ModelFolder};
use crate::model::head::ScalarHead;
use crate::model::weights::{OUTPUT, SCORE, Weights};
use crate::settings::{Method, TrainingSettings};
use lora::Lora;

/// What is to be done with the weights that are read.
#[derive(Debug, Clone, Copy)]
pub enum Training<'a> {
    /// Nothing trains.
    Frozen,
    /// This method trains.
    With(&'a TrainingSettings),
}

/// What stands on top of the transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// The output matrix, which the folder must hold: a language model.
    Language,
    /// A scalar head, which the folder must hold: a reward model.
    Scalar,
    /// A scalar head, new where the folder holds none.
    ScalarOrNew,
    /// A scalar head where the folder holds one.
    AsFound,
}

/// One model in one role.
#[derive(Debug, Clone, Copy)]
pub struct Role<'a> {
    /// The folder of a Hugging Face model or of a PEFT adapter.
    pub folder: &'a Path,
    /// An adapter folder on top of it.
    pub adapter: Option<&'a Path>,
    /// What trains.
    pub training: Training<'a>,
    /// What stands on top.
    pub head: Head,
    /// Seed of everything that is new.
    pub seed: u64,
}

/// A base model, read once and shared by all roles on top of it.
#[derive(Clone)]
struct Base {
    folder: Arc<ModelFolder>,
    architecture: Arc<Architecture>,
    weights: Arc<Weights>,
}

/// The base models read so far: roles on the same folder share one copy.
pub struct Bases {
    device: Device,
    read: HashMap<PathBuf, Base>,
}

impl Bases {
    /// No base yet; models will be read onto `device`.
    pub fn new(device: Device) -> Self {
        Bases { device, read: HashMap::new() }
    }

    /// Reads one model in one role.
    pub fn load(&mut self, role: &Role) -> Result<Model> {
        let (base_folder, adapter_folder) = resolve(role.folder, role.adapter)?;
        let base = self.base(&base_folder, role.seed)?;
        let existing = match &adapter_folder {
            Some(folder) => Some(peft::read(folder, &base.architecture, &self.device)?),
            None => None,
        };
        let head = self.head(role, &base, adapter_folder.as_deref(), existing.as_ref())?;
        let existing = existing.map(|adapter| adapter.lora);
        let settings = match role.training {
            Training::Frozen => {
                let adapter = existing.map(|lora| Arc::new(lora) as Arc<dyn Adapter>);
                return Model::new(base.folder, base.architecture, base.weights, adapter, head);
            }
            Training::With(settings) => settings,
        };
        let head = head.map(|head| head.trainable()).transpose()?;
        match settings.method {
            Method::Full => {
                let mut weights = match &existing {
                    Some(adapter) => adapter.merge(&base.weights)?,
                    None => (*base.weights).clone(),
                };
                // Hugging Face's classifiers have a head in place of the output matrix, and language models have no head.
                weights.remove(if head.is_some() { OUTPUT } else { SCORE });
                let weights = weights.trainable()?;
                Model::new(base.folder, base.architecture, Arc::new(weights), None, head)
            }
            Method::Lora => {
                let lora = match existing {
                    Some(lora) => lora.trainable()?,
                    None => Lora::new(&settings.lora, &base.architecture, role.seed, &self.device)?,
                };
                Model::new(base.folder, base.architecture, base.weights, Some(Arc::new(lora)), head)
            }
        }
    }

    fn base(&mut self, folder: &Path, seed: u64) -> Result<Base> {
        let key = folder.canonicalize().map_err(Error::io(folder))?;
        if let Some(base) = self.read.get(&key) {
            return Ok(base.clone());
        }
        let (model_folder, architecture, weights) = folder::open(folder, seed, &self.device)?;
        let base =
            Base { folder: Arc::new(model_folder), architecture: Arc::new(architecture), weights: Arc::new(weights) };
        self.read.insert(key, base.clone());
        Ok(base)
    }

    fn head(
        &self,
        role: &Role,
        base: &Base,
        adapter_folder: Option<&Path>,
        adapter: Option<&peft::PeftAdapter>,
    ) -> Result<Option<ScalarHead>> {
        if role.head == Head::Language {
            if !base.architecture.tied_output && base.weights.find(OUTPUT).is_none() {
                bail!(
                    "{}: tensor \"{OUTPUT}\" is missing, so this is a classifier, which cannot write answers; give a language model",
                    role.folder.display()
                );
            }
            return Ok(None);
        }
        let in_adapter = adapter.and_then(|adapter| adapter.score.clone());
        let found = match (in_adapter, base.weights.find(SCORE)) {
            (Some(weight), _) => Some((weight, adapter_folder.unwrap_or(&base.folder.path))),
            (None, Some(weight)) => Some((weight.clone(), base.folder.path.as_path())),
            (None, None) => None,
        };
        match (found, role.head) {
            (Some((weight, folder)), _) => Ok(Some(ScalarHead::new(weight, ScalarHead::read_shift(folder)?))),
            (None, Head::ScalarOrNew) => {
                Ok(Some(ScalarHead::random(base.architecture.d_model, role.seed, &self.device)?))
            }
            (None, Head::AsFound) => Ok(None),
            (None, _) => bail!(
                "{}: tensor \"{SCORE}\" is missing, so this is no reward model; give the output folder of `reward`, or another sequence classifier with one label",
                role.folder.display()
            ),
        }
    }
}

/// The folder whose tokenizer belongs to a model argument: its own, or its base model's.
pub fn tokenizer_folder(folder: &Path) -> Result<PathBuf> {
    if folder.join("tokenizer.json").is_file() { Ok(folder.to_path_buf()) } else { Ok(resolve(folder, None)?.0) }
}

/// The base folder and the adapter folder that a model argument stands for.
fn resolve(folder: &Path, adapter: Option<&Path>) -> Result<(PathBuf, Option<PathBuf>)> {
    if !folder.is_dir() {
        bail!("{}: no such folder; expected the folder of a Hugging Face model or of a PEFT adapter", folder.display());
    }
    if !peft::is_adapter(folder) {
        return Ok((folder.to_path_buf(), adapter.map(Path::to_path_buf)));
    }
    if let Some(adapter) = adapter {
        bail!(
            "{}: is an adapter itself, and {} cannot be put on top of it; give the base model's folder with --model",
            folder.display(),
            adapter.display()
        );
    }
    Ok((peft::base_folder(folder)?, Some(folder.to_path_buf())))
}
