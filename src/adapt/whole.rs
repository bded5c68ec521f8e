//! Whole tensors of the base that an adapter has its own copies of, trained beside its updates: PEFT's `modules_to_save`, and biases.
//!
//! They are kept by their names in `transformers`, in the form that computation needs ([`crate::model::weights::Stored`] is how they are on disk).

use super::base::Base;
use super::peft::AdapterFiles;
use super::targets;
use crate::bail;
use crate::error::Result;
use crate::model::adapter::{EmbeddingChange, LinearChange, NormChange};
use crate::model::architecture::{Architecture, Positions};
use crate::model::weights::{Role, Stored, TensorSpec, Weights, embedding_name, output_name, tensor_specs};
use crate::ops::{Value, Weight};

/// The tensors that an adapter may have whole, by their names in `transformers`: all but tables of positions and of kinds of tokens, at which
/// no adapter changes the forward pass.
fn specs(architecture: &Architecture) -> Vec<TensorSpec> {
    let names = &architecture.names;
    let output = output_name(architecture);
    let other_table = |name: &str| {
        let learned = architecture.positions == Positions::Learned;
        let table = learned.then_some(names.positions).into_iter().chain(names.token_types);
        table.into_iter().any(|table| name.strip_prefix(names.prefix) == Some(table))
    };
    let mut specs: Vec<TensorSpec> = (tensor_specs(architecture).into_iter())
        .filter(|spec| Some(spec.name.as_str()) != output && !other_table(&spec.name))
        .collect();
    if architecture.causal {
        let name = format!("{}.weight", names.output_module);
        let shape = vec![architecture.vocabulary, architecture.d_model];
        specs.push(TensorSpec { name, shape, role: Role::Embedding, stored: Stored::AsIs });
    }
    specs
}

/// Takes the whole tensors that an adapter's files hold. A linear with an update keeps its own bias under `base_layer`.
pub fn take(files: &mut AdapterFiles, base: &Base) -> Result<Weights> {
    let mut tensors = Weights::default();
    for spec in specs(base.architecture()) {
        let mut on_disk = spec.shape.clone();
        if spec.stored == Stored::Transposed {
            on_disk.reverse();
        }
        let wrapped = spec.name.strip_suffix(".bias").map(|module| format!("{module}.base_layer.bias"));
        for key in wrapped.into_iter().chain([spec.name.clone()]) {
            let Some(tensor) = files.take_if_of_shape(&key, &on_disk)? else { continue };
            let tensor = match spec.stored {
                Stored::AsIs => tensor,
                Stored::Transposed => tensor.t()?.contiguous()?,
                Stored::LessOne => (tensor + 1.0)?,
            };
            tensors.set(&spec.name, tensor);
        }
    }
    Ok(tensors)
}

/// Copies of the base's tensors of these modules, by PEFT's rule: a module whose name ends in one of `modules`, with all that is in it.
pub fn new(modules: &[String], base: &Base) -> Result<Weights> {
    let architecture = base.architecture();
    let mut tensors = Weights::default();
    let specs = specs(architecture);
    for module in modules {
        let chosen: Vec<&TensorSpec> =
            specs.iter().filter(|spec| targets::is_saved(architecture, &spec.name, module)).collect();
        if chosen.is_empty() {
            let embedding = targets::embedding(architecture);
            bail!(
                "--modules-to-save: \"{module}\" cannot train as a whole; expected the end of the name of a linear, of a norm, of {embedding} or {}",
                architecture.names.output_module
            );
        }
        for spec in chosen {
            let transformer = base.model.transformer();
            let tensor = match &spec.name {
                name if name.trim_end_matches(".weight") == architecture.names.output_module => {
                    transformer.output().to_tensor()?
                }
                name if *name == embedding_name(architecture) => transformer.embeddings().to_tensor()?,
                name => base.model.weights().get(name)?,
            };
            tensors.set(&spec.name, tensor.copy()?);
        }
    }
    Ok(tensors)
}

/// What they make of a linear.
pub fn linear(tensors: &Weights, name: &str) -> LinearChange {
    let part = |part: &str| tensors.find(&format!("{name}.{part}"));
    let weight = part("weight").map(|weight| Weight::new(&weight, None));
    LinearChange { weight, bias: part("bias").map(Value::from), ..LinearChange::default() }
}

/// What they make of a norm.
pub fn norm(tensors: &Weights, name: &str) -> Option<NormChange> {
    let part = |part: &str| tensors.find(&format!("{name}.{part}")).map(Value::from);
    let (weight, bias) = (part("weight"), part("bias"));
    (weight.is_some() || bias.is_some()).then_some(NormChange { weight, bias })
}

/// What they make of the token embeddings.
pub fn embedding(tensors: &Weights, name: &str) -> EmbeddingChange {
    EmbeddingChange { table: linear(tensors, name).weight, ..EmbeddingChange::default() }
}

/// Puts them in place of the base's. An output matrix that the base lacks, as under a head, is left out.
pub fn set(weights: &mut Weights, tensors: &Weights, output: &targets::Output) {
    let names: Vec<String> = weights.names().cloned().collect();
    for name in names {
        let module = if name == output.tensor { &output.module_weight } else { &name };
        if let Some(tensor) = tensors.find(module) {
            weights.set(&name, tensor.detach());
        }
    }
}
