//! What a model argument stands for: a base model's folder and adapters on top of it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::peft;
use crate::bail;
use crate::data::tokenize::Tokenizer;
use crate::error::{Error, Result};
use crate::gguf::is_gguf;
use crate::limits;
use crate::model::architecture::Architecture;
use crate::model::folder::{STACK_FILE, read_architecture, read_json};
use crate::model::weight_files::{TensorFile, has_weights, no_weights};
use crate::remote::hub;

/// The folders whose tokenizer and generation settings belong to a model argument and the adapters on top of
/// it: those of the adapters, the last first, then the base model's.
pub fn companions(folder: &Path, adapters: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let base = resolve(folder, adapters)?.0;
    let own = hub::folder(folder)?;
    let own = if is_adapter_or_stack(&own) { Some(own) } else { None };
    let mut folders = adapters.iter().rev().map(|adapter| hub::folder(adapter)).collect::<Result<Vec<_>>>()?;
    folders.extend(own.into_iter().chain([base]));
    Ok(folders)
}

/// The tokenizer of a model argument with adapters on top of it. A text with a token that the model's
/// embedding has no row for is an error from then on.
pub fn tokenizer(folder: &Path, adapters: &[PathBuf]) -> Result<Tokenizer> {
    let tokenizer = Tokenizer::open(&companions(folder, adapters)?)?;
    Ok(tokenizer.for_rows(embedding_rows(folder, adapters)?))
}

/// The rows of the embedding of a model with adapters: as many as `config.json` says, or as the table has
/// that an adapter holds, if these are more.
pub fn embedding_rows(folder: &Path, adapters: &[PathBuf]) -> Result<usize> {
    let (base, adapters) = resolve(folder, adapters)?;
    let architecture = read_architecture(&base)?.1;
    let table = architecture.names.embeddings.trim_end_matches(".weight");
    let table = table.rsplit('.').next().unwrap_or(table);
    let mut rows = architecture.vocabulary;
    for path in adapters.iter().map(|adapter| adapter.join(peft::TENSORS)).filter(|path| path.is_file()) {
        let file = TensorFile::open(&path)?;
        // A tied table may be stored as the output matrix alone.
        let is_table = |name: &str, shape: &[usize]| {
            let is_named = name.contains(table) || name.contains(architecture.names.output_module);
            is_named && shape.len() == 2 && shape[1] == architecture.d_model
        };
        let of_tables =
            file.shapes().into_iter().filter(|(name, shape)| is_table(name, shape)).map(|(_, shape)| shape[0]);
        rows = of_tables.fold(rows, usize::max);
    }
    Ok(rows)
}

/// Refuses a model argument whose base holds no weights that can be read.
pub fn check_weights(folder: &Path) -> Result<()> {
    let base = resolve(folder, &[])?.0;
    if has_weights(&base)? { Ok(()) } else { Err(no_weights(&base)) }
}

/// What the base model of a model argument is.
pub fn architecture(folder: &Path) -> Result<Architecture> {
    Ok(base(folder, &[])?.1)
}

/// The folder of the base model that a model argument and the adapters on top of it stand on, and what that model is.
pub fn base(folder: &Path, adapters: &[PathBuf]) -> Result<(PathBuf, Architecture)> {
    let folder = resolve(folder, adapters)?.0;
    let architecture = read_architecture(&folder)?.1;
    Ok((folder.canonicalize().map_err(Error::io(&folder))?, architecture))
}

/// Refuses an encoder where a language model is needed.
pub fn refuse_encoder(architecture: &Architecture, source: &Path) -> Result<()> {
    if !architecture.causal {
        bail!(
            "{}: this is an encoder, which sees the text on both sides and cannot write answers; use it with `reward` or `sft --objective classification`, or give a language model",
            source.display()
        );
    }
    Ok(())
}

/// The base folder and the adapter folders that a model argument and the adapters on top of it stand for; each may be a folder or the name of a
/// model of the hub.
pub fn resolve(folder: &Path, adapters: &[PathBuf]) -> Result<(PathBuf, Vec<PathBuf>)> {
    let folder = &hub::folder(folder)?;
    if !(folder.is_dir() || is_gguf(folder) && folder.is_file()) {
        bail!(
            "{}: no such folder; expected the folder of a Hugging Face model or of a PEFT adapter, a GGUF file, or the name of a model on the hub (organisation/name)",
            folder.display()
        );
    }
    let mut all = Vec::new();
    let own = if is_adapter_or_stack(folder) { Some(folder.to_path_buf()) } else { None };
    for folder in own.iter().chain(adapters) {
        all.extend(expand(&hub::folder(folder)?)?);
    }
    let base = match (&own, all.first()) {
        (Some(_), Some(adapter)) => peft::base_folder(adapter)?,
        _ => folder.to_path_buf(),
    };
    Ok((base, all))
}

fn is_adapter_or_stack(folder: &Path) -> bool {
    peft::is_adapter(folder) || folder.join(STACK_FILE).is_file()
}

/// The folders of the adapters in a folder: itself, or those that it names in their order.
fn expand(folder: &Path) -> Result<Vec<PathBuf>> {
    let path = folder.join(STACK_FILE);
    if !path.is_file() {
        if !peft::is_adapter(folder) {
            bail!("{}: no adapter_config.json there; expected the folder of an adapter", folder.display());
        }
        return Ok(vec![folder.to_path_buf()]);
    }
    let json = read_json(&path)?;
    let names = json.get("adapters").and_then(Value::as_array);
    let names: Option<Vec<&str>> = names.and_then(|names| names.iter().map(Value::as_str).collect());
    match names {
        Some(names) if !names.is_empty() && names.iter().all(|name| limits::is_plain_name(name)) => {
            Ok(names.iter().map(|name| folder.join(name)).collect())
        }
        _ => bail!("{}: expected {{\"adapters\": [names of folders beside it]}}", path.display()),
    }
}
