//! What a run reads: the size and hash of every file, by which a changed one is found when the run goes on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::adapt;
use crate::bail;
use crate::data::files::files;
use crate::data::mixture;
use crate::data::splits::Pattern;
use crate::error::{Error, Result};
use crate::gguf::is_gguf;
use crate::remote::{hub, objects};

/// Of a file larger than this, so many bytes are hashed in blocks: the first, the last, and others at equal distances between them.
const HASHED: u64 = 64 << 20;
const BLOCK: u64 = 1 << 20;

/// What of a model's folder is read with its weights, and decides what tokens texts become.
const READ_WITH_WEIGHTS: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "head.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];

/// The files of a run, by the flag that named them and their place among its files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    files: BTreeMap<String, Fingerprint>,
}

/// What tells a file from others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Fingerprint {
    path: String,
    bytes: u64,
    xxh3: String,
}

impl Inputs {
    /// Adds the data that a pattern names: files of rows, or a mixture and its sources.
    pub fn data<'p>(mut self, flag: &str, pattern: impl Into<Pattern<'p>>) -> Result<Self> {
        let pattern = pattern.into();
        if !mixture::is_mixture(pattern.text) {
            return self.rows(flag, pattern);
        }
        self.file(format!("{flag} mixture"), Path::new(pattern.text))?;
        for (number, source) in mixture::sources(pattern.text)?.iter().enumerate() {
            self = self.rows(&format!("{flag} {number}"), Pattern { text: source, ..pattern })?;
        }
        Ok(self)
    }

    /// The same where there may be no such data.
    pub fn optional(self, flag: &str, pattern: Option<&String>) -> Result<Self> {
        pattern.map_or(Ok(self.clone()), |pattern| self.data(flag, pattern))
    }

    /// The same of data to evaluate on, if there are such.
    pub fn evaluation(self, flag: &str, pattern: Option<&String>) -> Result<Self> {
        pattern.map_or(Ok(self.clone()), |pattern| self.data(flag, Pattern::evaluation(pattern)))
    }

    fn rows(mut self, flag: &str, pattern: Pattern) -> Result<Self> {
        for (number, file) in files(pattern)?.iter().enumerate() {
            self.file(format!("{flag} file {number}"), file)?;
        }
        Ok(self)
    }

    /// Adds the weights and configuration of a model, the adapters on top of it, and its base.
    pub fn model(mut self, flag: &str, folder: &Path, adapters: &[std::path::PathBuf]) -> Result<Self> {
        let (base, adapters) = adapt::resolve(folder, adapters)?;
        for (number, folder) in std::iter::once(&base).chain(&adapters).enumerate() {
            if is_gguf(folder) {
                self.file(format!("{flag} {number}"), folder)?;
                continue;
            }
            for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
                let path = entry.map_err(Error::io(folder))?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let is_weights = name.ends_with(".safetensors") && name != "optimizer.safetensors";
                if is_weights || READ_WITH_WEIGHTS.contains(&&*name) {
                    self.file(format!("{flag} {number} {name}"), &path)?;
                }
            }
        }
        Ok(self)
    }

    fn file(&mut self, key: String, path: &Path) -> Result<()> {
        // Several flags may name one file, such as a model and its reference.
        let known = self.files.values().find(|file| Path::new(&file.path) == path).cloned();
        let fingerprint = known.map_or_else(|| fingerprint(path), Ok)?;
        self.files.insert(key, fingerprint);
        Ok(())
    }

    /// Refuses to go on where a file is not what it was. It may have another name.
    pub fn check(&self, then: &Inputs, checkpoint: &Path) -> Result<()> {
        for key in self.files.keys().chain(then.files.keys()) {
            let (name, reason) = match (then.files.get(key), self.files.get(key)) {
                (Some(then), Some(now)) if (then.bytes, &then.xxh3) == (now.bytes, &now.xxh3) => continue,
                (Some(then), Some(now)) if then.bytes != now.bytes => {
                    (&now.path, format!("had {} bytes when the run began, now {}", then.bytes, now.bytes))
                }
                (Some(_), Some(now)) => (&now.path, "has other contents than when the run began".to_string()),
                (Some(then), None) => (&then.path, "was there when the run began, and is not now".to_string()),
                (None, Some(now)) => (&now.path, "was not there when the run began".to_string()),
                (None, None) => continue,
            };
            let flag = key.split(' ').next().unwrap_or_default();
            let commit = then.files.get(key).and_then(|then| hub::commit_of(Path::new(&then.path)));
            let remedy = match commit {
                // A branch of the hub has moved.
                Some(commit) => format!("ask for {commit}, with which the run began"),
                None => "bring the old file back".to_string(),
            };
            bail!(
                "{flag}: {name} {reason}, so the run cannot go on from {} as it would have; {remedy}, or start a new run in another --output",
                checkpoint.display()
            );
        }
        Ok(())
    }
}

fn fingerprint(path: &Path) -> Result<Fingerprint> {
    if objects::is_remote(path) {
        return remote_fingerprint(path);
    }
    let mut file = File::open(path).map_err(Error::io(path))?;
    let bytes = file.metadata().map_err(Error::io(path))?.len();
    let blocks = if bytes <= HASHED { bytes.div_ceil(BLOCK) } else { HASHED / BLOCK };
    let (mut hasher, mut buffer) = (Xxh3::new(), Vec::new());
    for block in 0..blocks {
        let start = if bytes <= HASHED { block * BLOCK } else { start_of(block, bytes) };
        file.seek(SeekFrom::Start(start)).map_err(Error::io(path))?;
        buffer.clear();
        (&mut file).take(BLOCK).read_to_end(&mut buffer).map_err(Error::io(path))?;
        hasher.update(&buffer);
    }
    Ok(Fingerprint { path: path.display().to_string(), bytes, xxh3: format!("{:016x}", hasher.digest()) })
}

/// Of a remote file, which would have to be read for it, the hash is that of the version that the server tells, or of its length and end where it tells none.
fn remote_fingerprint(path: &Path) -> Result<Fingerprint> {
    let file = objects::open(path)?;
    let bytes = file.length();
    let version = match file.version() {
        Some(version) => version.into_bytes(),
        None => file.read(bytes.saturating_sub(BLOCK)..bytes).map_err(Error::io(path))?.to_vec(),
    };
    Ok(Fingerprint { path: path.display().to_string(), bytes, xxh3: format!("{:016x}", xxh3_64(&version)) })
}

/// Where a block of a large file begins, the last being the file's end.
fn start_of(block: u64, bytes: u64) -> u64 {
    (u128::from(bytes - BLOCK) * u128::from(block) / u128::from(HASHED / BLOCK - 1)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_a_new_and_a_missing_file_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| folder.path().join(name));
        let inputs = |present: &[usize]| {
            let mut inputs = Inputs::default();
            present.iter().for_each(|&index| inputs.file(format!("--data file {index}"), &paths[index]).unwrap());
            inputs
        };
        paths.iter().for_each(|path| std::fs::write(path, "one").unwrap());
        let then = inputs(&[0, 1]);
        let fault = |now: Inputs| now.check(&then, Path::new("c")).unwrap_err().to_string();
        assert!(then.check(&then.clone(), Path::new("c")).is_ok());
        assert!(fault(inputs(&[0])).contains("/b was there"));
        std::fs::write(&paths[1], "two").unwrap();
        assert!(fault(inputs(&[0, 1])).contains("/b has other contents"));
        std::fs::write(&paths[1], "three").unwrap();
        assert!(fault(inputs(&[0, 1])).contains("/b had 3 bytes when the run began, now 5"));
    }

    #[test]
    fn of_a_large_file_the_ends_and_blocks_between_them_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large");
        let length = HASHED as usize + 12_345;
        let mut bytes = vec![7u8; length];
        let mut hash = |at: Option<usize>| {
            at.iter().for_each(|&at| bytes[at] ^= 1);
            std::fs::write(&path, &bytes).unwrap();
            at.iter().for_each(|&at| bytes[at] ^= 1);
            fingerprint(&path).unwrap().xxh3
        };
        let plain = hash(None);
        for at in [0, length - 1, start_of(32, length as u64) as usize] {
            assert_ne!(hash(Some(at)), plain, "{at}");
        }
    }
}
