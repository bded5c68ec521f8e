//! What a model argument stands for: a base model's folder and adapters on top of it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::peft;
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;
use crate::model::architecture::Architecture;
use crate::model::folder::{STACK_FILE, read_architecture, read_json};
use crate::remote::hub;

/// The folder whose tokenizer belongs to a model argument: its own, or its base model's.
pub fn tokenizer_folder(folder: &Path) -> Result<PathBuf> {
    let folder = hub::folder(folder)?;
    if folder.join("tokenizer.json").is_file() { Ok(folder) } else { Ok(resolve(&folder, &[])?.0) }
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
    if !folder.is_dir() {
        bail!(
            "{}: no such folder; expected the folder of a Hugging Face model or of a PEFT adapter, or the name of one on the hub (organisation/name)",
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
