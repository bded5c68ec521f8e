//! By what a result names the classifier that it came from.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::bail;
use crate::error::{Error, Result};
use crate::model::weight_files::TensorFiles;
use crate::remote::hub;

/// A classifier's name and version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The name of its folder, or its name on the hub.
    pub name: String,
    /// Its class in `transformers`.
    pub architecture: String,
    /// A hash of the files of its weights, adapters among them (XXH3, 128 bits, in hexadecimal). That of one file is what `xxhsum -H2` says; that of
    /// several is the hash of their names and hashes, each `name hash` on a line.
    pub weights: String,
}

impl Identity {
    /// Hashes each file once.
    pub(super) fn of(folder: &Path, architecture: &str, base: &Path, adapters: &[PathBuf]) -> Result<Self> {
        let mut files: Vec<PathBuf> = TensorFiles::open(base)?.paths().map(Path::to_path_buf).collect();
        for adapter in adapters {
            files.extend(safetensors_of(adapter)?);
        }
        let hashes = files.iter().map(|file| hash(file)).collect::<Result<Vec<String>>>()?;
        let weights = match &hashes[..] {
            [one] => one.clone(),
            several => {
                let line = |(file, hash): (&PathBuf, &String)| format!("{} {hash}\n", name_of(file));
                format!("{:032x}", xxh3_128(files.iter().zip(several).map(line).collect::<String>().as_bytes()))
            }
        };
        let name = match hub::name_of(folder) {
            Some(name) => name.to_string(),
            None => name_of(&folder.canonicalize().map_err(Error::io(folder))?),
        };
        Ok(Identity { name, architecture: architecture.to_string(), weights })
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

fn safetensors_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let mut files = entries
        .map(|entry| Ok(entry.map_err(Error::io(folder))?.path()))
        .filter(|path| path.as_ref().map_or(true, |path| path.extension().is_some_and(|end| end == "safetensors")))
        .collect::<Result<Vec<PathBuf>>>()?;
    files.sort();
    if files.is_empty() {
        bail!("{}: no *.safetensors there; expected the weights of an adapter", folder.display());
    }
    Ok(files)
}

/// The hash of a file's bytes, which pass through memory once and are not kept.
fn hash(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut hasher = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match std::io::Read::read(&mut file, &mut buffer).map_err(Error::io(path))? {
            0 => return Ok(format!("{:032x}", hasher.digest128())),
            read => hasher.update(&buffer[..read]),
        }
    }
}
