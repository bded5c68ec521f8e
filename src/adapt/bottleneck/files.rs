//! Bottleneck adapters in AdapterHub's form: `adapter_config.json` and `adapter.safetensors` (Poth et al. 2023).
//!
//! What that form has no place for lies beside them: norms of the model that were trained (`norms.safetensors`), a head (`head.safetensors`) and the
//! hash of the base's weights.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use super::super::base::Base;
use super::super::peft;
use super::{Bottleneck, activation, name, sub_layers};
use crate::bail;
use crate::error::{Error, Result};
use crate::model::adapter::{Adapter, Saving, SubLayer};
use crate::model::architecture::{Architecture, Config};
use crate::model::folder::read_json;
use crate::model::head::{Form, Head};
use crate::model::weight_files;
use crate::model::weights::{Weights, block_prefix};
use crate::settings::Placement;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter.safetensors";
const NORMS: &str = "norms.safetensors";
const HEAD: &str = "head.safetensors";

/// How AdapterHub calls the places in a model at which adapters stand, and what it wants to know of the model.
#[derive(Debug, Clone)]
pub struct Sites {
    /// What the adapter is called; a part of every key.
    adapter: String,
    /// For each block, what stands before the keys of the adapters after attention and after the feed-forward.
    modules: Vec<[String; 2]>,
    d_model: usize,
    /// The class of a language model, and of a classifier.
    model_classes: [&'static str; 2],
    model_type: Value,
}

impl Sites {
    /// Those of a model.
    pub fn of(base: &Base) -> Self {
        let architecture: &Architecture = base.architecture();
        let modules = |layer: usize| {
            architecture
                .names
                .bottlenecks
                .map(|module| format!("{}{module}.adapters", block_prefix(architecture, layer)))
        };
        Sites {
            adapter: "default".to_string(),
            modules: (0..architecture.layers).map(modules).collect(),
            d_model: architecture.d_model,
            model_classes: [architecture.language_model_class, architecture.classifier_class],
            model_type: base.model.folder().config.get("model_type").cloned().unwrap_or_default(),
        }
    }

    /// The key of a tensor of an adapter; a norm's is its name.
    pub fn key(&self, tensor: &str) -> String {
        let mut parts = tensor.splitn(3, '.');
        let (layer, which, part) = (parts.next(), parts.next(), parts.next());
        let (Some(Ok(layer)), Some(which), Some(part)) = (layer.map(str::parse::<usize>), which, part) else {
            return tensor.to_string();
        };
        let module = &self.modules[layer][usize::from(which == "feed_forward")];
        // The way down is a list of layers, the first of which is the linear.
        let part = part.replace("down.", "adapter_down.0.").replace("up.", "adapter_up.");
        format!("{module}.{}.{part}", self.adapter)
    }
}

/// Whether the folder is one of AdapterHub's.
pub fn is_adapter(folder: &Path) -> Result<bool> {
    Ok(read_json(&folder.join(CONFIG))?.get("peft_type").is_none() && folder.join(TENSORS).is_file())
}

/// Reads an adapter's folder, with the head that was saved with it.
pub fn read(folder: &Path, base: &Base) -> Result<(Arc<dyn Adapter>, Option<Head>)> {
    peft::check_base(folder, &base.model.folder().path, base.model.weights())?;
    let path = folder.join(CONFIG);
    let json = read_json(&path)?;
    let file = path.display().to_string();
    let Some(own) = json.get("config").filter(|config| config.is_object()) else {
        bail!("{file}: field \"config\" is missing; expected the configuration of an adapter of AdapterHub");
    };
    let config = Config::new(own, file.as_str());
    let placement = placement(&config)?;
    let mut sites = Sites::of(base);
    sites.adapter = Config::new(&json, file.as_str()).text("name", "default")?.to_string();
    let non_linearity = config.text("non_linearity", "relu")?.to_string();
    let mut adapter = Bottleneck {
        placement,
        activation: activation(&non_linearity)?,
        non_linearity,
        scaling: config.number("scaling", 1.0)?,
        reduction_factor: config.number("reduction_factor", 16.0)?,
        tensors: Weights::default(),
        sites,
    };
    adapter.read_tensors(&folder.join(TENSORS), base)?;
    let device = base.device();
    if folder.join(NORMS).is_file() {
        for (name, tensor) in weight_files::read_file(&folder.join(NORMS), device)? {
            adapter.tensors.set(&name, tensor);
        }
    }
    let head = match folder.join(HEAD).is_file() {
        true => {
            let tensors = weight_files::read_file(&folder.join(HEAD), device)?;
            let pad = base.model.folder().pad_token_id();
            Head::find(base.architecture(), Form::read(folder)?, pad, |name| tensors.get(name).cloned())
        }
        false => None,
    };
    Ok((Arc::new(adapter), head))
}

/// The placement that AdapterHub's many fields describe, where they describe one of ours.
fn placement(config: &Config) -> Result<Placement> {
    for unsupported in
        ["ln_before", "ln_after", "adapter_residual_before_ln", "use_gating", "phm_layer", "cross_adapter"]
    {
        if config.flag(unsupported, false)? {
            bail!("{}: \"{unsupported}\": true is not supported", config.file);
        }
    }
    if config.get("inv_adapter").is_some() {
        bail!("{}: invertible adapters are not supported", config.file);
    }
    let flags = ["mh_adapter", "output_adapter", "is_parallel", "original_ln_before"];
    let [attention, feed_forward, parallel, joined] = flags.map(|field| config.flag(field, false));
    match (attention?, feed_forward?, parallel?, joined?) {
        (true, true, false, false) => Ok(Placement::Houlsby),
        (false, true, false, true) => Ok(Placement::Pfeiffer),
        (false, true, true, false) => Ok(Placement::Parallel),
        found => bail!(
            "{}: {flags:?} are {found:?}; expected those of double_seq_bn (Houlsby), seq_bn (Pfeiffer) or par_bn (parallel)",
            config.file
        ),
    }
}

impl Bottleneck {
    fn read_tensors(&mut self, path: &Path, base: &Base) -> Result<()> {
        let mut found = weight_files::read_file(path, base.device())?;
        let d_model = base.architecture().d_model;
        for layer in 0..base.architecture().layers {
            for &which in sub_layers(self.placement) {
                let mut width = 0;
                for part in ["down.weight", "down.bias", "up.weight", "up.bias"] {
                    let name = name(layer, which, part);
                    let key = self.sites.key(&name);
                    let Some(tensor) = found.remove(&key) else {
                        bail!("{}: tensor \"{key}\" is missing", path.display());
                    };
                    if part == "down.weight" {
                        width = tensor.dims().first().copied().unwrap_or(0);
                    }
                    let shape = match part {
                        "down.weight" => vec![width, d_model],
                        "down.bias" => vec![width],
                        "up.weight" => vec![d_model, width],
                        _ => vec![d_model],
                    };
                    if tensor.dims() != shape {
                        bail!(
                            "{}: tensor \"{key}\" has shape {:?}, expected {shape:?}; this adapter belongs to another base model",
                            path.display(),
                            tensor.dims()
                        );
                    }
                    self.tensors.set(&name, tensor);
                }
            }
        }
        match found.keys().next() {
            None => Ok(()),
            Some(key) => bail!(
                "{}: tensor \"{key}\" has no place in the base model; this adapter belongs to another base model or is of an unknown form",
                path.display()
            ),
        }
    }

    /// `adapter_config.json`, every field that AdapterHub writes.
    fn config(&self, saving: &Saving) -> Value {
        let parallel = self.placement == Placement::Parallel;
        json!({
            "config": {
                "adapter_residual_before_ln": false,
                "cross_adapter": false,
                "dropout": 0.0,
                "factorized_phm_W": true,
                "factorized_phm_rule": false,
                "hypercomplex_nonlinearity": "glorot-uniform",
                "init_weights": if parallel { "mam_adapter" } else { "bert" },
                "init_weights_seed": null,
                "inv_adapter": null,
                "inv_adapter_reduction_factor": null,
                "is_parallel": parallel,
                "learn_phm": true,
                "leave_out": [],
                "ln_after": false,
                "ln_before": false,
                "mh_adapter": sub_layers(self.placement).contains(&SubLayer::Attention),
                "non_linearity": self.non_linearity,
                "original_ln_after": true,
                "original_ln_before": self.placement == Placement::Pfeiffer,
                "output_adapter": true,
                "phm_bias": true,
                "phm_c_init": "normal",
                "phm_dim": 4,
                "phm_init_range": 0.0001,
                "phm_layer": false,
                "phm_rank": 1,
                "reduction_factor": self.reduction_factor,
                "residual_before_ln": true,
                "scaling": self.scaling,
                "shared_W_phm": false,
                "shared_phm_rule": true,
                "stochastic_depth": 0.0,
                "use_gating": false,
            },
            "hidden_size": self.sites.d_model,
            "model_class": self.sites.model_classes[usize::from(saving.head.is_some())],
            // That form has no field for a revision.
            "model_name": saving.revision.map_or(saving.base.into(), |revision| format!("{}@{revision}", saving.base)),
            "model_type": self.sites.model_type,
            "name": self.sites.adapter,
            "version": "adapters.1.3.0",
        })
    }

    /// Writes the folder.
    pub(super) fn write(&self, folder: &Path, saving: &Saving) -> Result<()> {
        let path = folder.join(CONFIG);
        let config = self.config(saving);
        std::fs::write(&path, format!("{config:#}\n")).map_err(Error::io(&path))?;
        peft::write_base(folder, saving)?;
        let (mut tensors, mut norms) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in self.tensors.iter() {
            let target = if super::is_of_adapter(name) { &mut tensors } else { &mut norms };
            target.insert(self.sites.key(name), tensor.clone());
        }
        let write = |file: &str, tensors: &BTreeMap<String, Tensor>| match tensors.is_empty() {
            true => Ok(()),
            false => weight_files::write_file(&folder.join(file), tensors, DType::F32),
        };
        write(TENSORS, &tensors)?;
        write(NORMS, &norms)?;
        write(HEAD, &saving.head.map(Head::tensors).unwrap_or_default())
    }
}
