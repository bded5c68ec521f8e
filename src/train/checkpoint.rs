//! Checkpoints: folders `checkpoints/step-000200` from which a run goes on, with checksums, the newest few kept.
//!
//! A checkpoint is written under a temporary name, brought to the disk and renamed, so that a folder of its name is whole. What damages it
//! later (a disk, a copy that broke off) is found by its checksums, and the one before is taken.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::state::StateWriter;
use crate::bail;
use crate::error::{Error, Result};
use crate::files::{is_temporary, publish, replace_folder_atomically, write_atomically};

/// The form of the folder; one of a higher number is of a later version of the program.
const FORMAT: u32 = 1;
const CHECKSUMS: &str = "checksums.json";
const BEST: &str = "best";

/// `checksums.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Checksums {
    format: u32,
    /// The XXH3 hash of each file, in hexadecimal.
    xxh3: BTreeMap<String, String>,
}

/// The checkpoints of a run.
#[derive(Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

/// A checkpoint that is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The folder.
    pub folder: PathBuf,
    /// Steps that were done.
    pub step: usize,
}

impl Checkpoint {
    /// The best model so far, if there was one.
    pub fn best(&self) -> Option<PathBuf> {
        Some(self.folder.join(BEST)).filter(|best| best.is_dir())
    }

    /// The folder of the run that it is of.
    pub fn run(&self) -> &Path {
        self.folder.parent().and_then(Path::parent).unwrap_or(Path::new("."))
    }
}

impl Checkpoints {
    /// Those of the run in this folder, of which the newest `keep` stay.
    pub fn of(run: &Path, keep: usize) -> Self {
        Checkpoints { folder: run.join("checkpoints"), keep }
    }

    /// Writes one, with the best model of the run as other names of the same files, and removes the oldest.
    pub fn write(&self, step: usize, best: Option<&Path>, state: StateWriter) -> Result<PathBuf> {
        let path = self.folder.join(format!("step-{step:06}"));
        replace_folder_atomically(&path, |folder| {
            state.write(folder)?;
            if let Some(best) = best {
                publish(best, &folder.join(BEST))?;
            }
            let mut xxh3 = BTreeMap::new();
            hash_below(folder, "", &mut xxh3)?;
            let sums = Checksums { format: FORMAT, xxh3 };
            write_atomically(folder.join(CHECKSUMS), |file| Ok(serde_json::to_writer_pretty(file, &sums)?))
        })?;
        self.prune()?;
        Ok(path)
    }

    /// The newest that is whole, and a sentence about each newer one that is not.
    pub fn newest(&self) -> Result<(Option<Checkpoint>, Vec<String>)> {
        let mut damaged = Vec::new();
        for (step, folder) in self.steps()?.into_iter().rev() {
            match verify(&folder) {
                Ok(()) => return Ok((Some(Checkpoint { folder, step }), damaged)),
                Err(error) => damaged.push(format!("{error}; the checkpoint is passed over")),
            }
        }
        Ok((None, damaged))
    }

    /// Whether there is any, whole or not.
    pub fn any(&self) -> Result<bool> {
        Ok(!self.steps()?.is_empty())
    }

    fn prune(&self) -> Result<()> {
        let steps = self.steps()?;
        for (_, folder) in &steps[..steps.len().saturating_sub(self.keep)] {
            std::fs::remove_dir_all(folder).map_err(Error::io(folder))?;
        }
        Ok(())
    }

    /// All of them by their steps, ascending.
    fn steps(&self) -> Result<Vec<(usize, PathBuf)>> {
        let mut found = Vec::new();
        if self.folder.is_dir() {
            for entry in std::fs::read_dir(&self.folder).map_err(Error::io(&self.folder))? {
                let path = entry.map_err(Error::io(&self.folder))?.path();
                found.extend(step_of(&path).map(|step| (step, path)));
            }
        }
        found.sort();
        Ok(found)
    }
}

/// The checkpoint that a folder given by a user stands for: the newest of a run, or itself.
///
/// # Errors
/// Where there is none, or none that is whole.
pub fn named(folder: &Path) -> Result<(Checkpoint, Vec<String>)> {
    if let Some(step) = step_of(folder).filter(|_| folder.join(CHECKSUMS).is_file()) {
        verify(folder)?;
        return Ok((Checkpoint { folder: folder.to_path_buf(), step }, Vec::new()));
    }
    match Checkpoints::of(folder, usize::MAX).newest()? {
        (Some(checkpoint), damaged) => Ok((checkpoint, damaged)),
        (None, damaged) if damaged.is_empty() => {
            bail!(
                "--resume {}: there is no checkpoint in it; give the folder of a run, or leave --resume out",
                folder.display()
            )
        }
        (None, damaged) => bail!("--resume {}: no checkpoint is whole: {}", folder.display(), damaged.join("; ")),
    }
}

fn step_of(folder: &Path) -> Option<usize> {
    folder.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

/// Compares a checkpoint with its checksums.
fn verify(folder: &Path) -> Result<()> {
    let path = folder.join(CHECKSUMS);
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let sums: Checksums = serde_json::from_str(&text)
        .map_err(|error| Error::input(format!("{}: not what was written: {error}", path.display())))?;
    if sums.format > FORMAT {
        bail!(
            "{}: of a later version of this program (form {}, this one knows {FORMAT}); go on with that version",
            path.display(),
            sums.format
        );
    }
    let mut found = BTreeMap::new();
    hash_below(folder, "", &mut found)?;
    found.remove(CHECKSUMS);
    if let Some(name) = sums.xxh3.keys().chain(found.keys()).find(|name| sums.xxh3.get(*name) != found.get(*name)) {
        bail!("{}: not what was written, by its checksum", folder.join(name).display());
    }
    Ok(())
}

/// Hashes every file in and below a folder, by its path within; what interrupted writes have left does not count.
fn hash_below(folder: &Path, prefix: &str, sums: &mut BTreeMap<String, String>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let (path, name) = (entry.path(), format!("{prefix}{}", entry.file_name().to_string_lossy()));
        if is_temporary(&path) {
            continue;
        }
        if path.is_dir() {
            hash_below(&path, &format!("{name}/"), sums)?;
        } else {
            sums.insert(name, hash(&path)?);
        }
    }
    Ok(())
}

/// The XXH3 hash of a file, in hexadecimal.
fn hash(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let (mut hasher, mut buffer) = (Xxh3::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(Error::io(path))? {
            0 => return Ok(format!("{:016x}", hasher.digest())),
            count => hasher.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(checkpoints: &Checkpoints, step: usize, best: Option<&Path>) -> PathBuf {
        let values = [step as f32; 3];
        let mut state = StateWriter::default();
        state.numbers("weight".to_string(), &[3], &values);
        state.value("number", &step).unwrap();
        checkpoints.write(step, best, state).unwrap()
    }

    #[test]
    fn the_newest_that_is_whole_is_found_and_older_ones_go() {
        let run = tempfile::tempdir().unwrap();
        let best = run.path().join("best");
        std::fs::create_dir(&best).unwrap();
        std::fs::write(best.join("config.json"), "{}").unwrap();
        let checkpoints = Checkpoints::of(run.path(), 2);
        assert_eq!(checkpoints.newest().unwrap(), (None, vec![]));
        assert!(named(run.path()).unwrap_err().to_string().contains("there is no checkpoint"));
        let folders: Vec<PathBuf> = (1..=3).map(|step| write(&checkpoints, 10 * step, Some(&best))).collect();
        assert!(!folders[0].exists());
        let newest = Checkpoint { folder: folders[2].clone(), step: 30 };
        assert_eq!(checkpoints.newest().unwrap(), (Some(newest.clone()), vec![]));
        assert_eq!(newest.run(), run.path());
        assert_eq!(std::fs::read(newest.best().unwrap().join("config.json")).unwrap(), b"{}");
        // Every kind of damage is found, and the one before is taken.
        let path = folders[2].join("state.safetensors");
        let whole = std::fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for damage in [flipped, whole[..whole.len() - 1].to_vec()] {
            std::fs::write(&path, damage).unwrap();
            let (found, damaged) = checkpoints.newest().unwrap();
            assert_eq!((found.unwrap().step, damaged.len()), (20, 1));
            assert!(damaged[0].contains("state.safetensors: not what was written"), "{}", damaged[0]);
        }
        std::fs::write(&path, whole).unwrap();
        std::fs::remove_file(folders[2].join("best/config.json")).unwrap();
        assert_eq!(named(run.path()).unwrap().0.step, 20);
        assert_eq!(named(&folders[1]).unwrap().0.step, 20);
        assert!(named(&folders[2]).unwrap_err().to_string().contains("best/config.json"));
        let sums = folders[1].join(CHECKSUMS);
        let text = std::fs::read_to_string(&sums).unwrap().replace("\"format\": 1", "\"format\": 2");
        std::fs::write(&sums, text).unwrap();
        assert!(named(run.path()).unwrap_err().to_string().contains("later version"));
    }
}
