//! What an evaluation has done so far, so that one that was stopped goes on where it was.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::files::write_atomically;

/// A folder of finished pieces in the output folder, made with the first of them and removed when the evaluation is complete.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    fingerprint: String,
}

const FOLDER: &str = "unfinished";
const FINGERPRINT: &str = "fingerprint.txt";

impl Journal {
    /// Opens the journal of an evaluation in `output`. `fingerprint` says what is evaluated and how: pieces of an evaluation with another one are thrown away.
    pub fn open(output: &Path, fingerprint: String) -> Result<Self> {
        let folder = output.join(FOLDER);
        let is_same = std::fs::read_to_string(folder.join(FINGERPRINT)).is_ok_and(|found| found == fingerprint);
        if !is_same && folder.exists() {
            std::fs::remove_dir_all(&folder).map_err(Error::io(&folder))?;
        }
        Ok(Journal { folder, fingerprint })
    }

    /// The piece of this name, as it was kept, or made by `make` and kept.
    pub fn piece<T: Serialize + DeserializeOwned>(&self, name: &str, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let path = self.folder.join(format!("{name}.json"));
        // A piece appears whole or not at all; one that cannot be read all the same is made again.
        if let Some(piece) = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
            return Ok(piece);
        }
        let piece = make()?;
        let fingerprint = self.folder.join(FINGERPRINT);
        if !fingerprint.exists() {
            write_atomically(fingerprint, |file| std::io::Write::write_all(file, self.fingerprint.as_bytes()))?;
        }
        write_atomically(&path, |file| serde_json::to_writer(file, &piece).map_err(std::io::Error::other))?;
        Ok(piece)
    }

    /// Removes the journal: the evaluation is complete.
    pub fn finish(self) -> Result<()> {
        match self.folder.exists() {
            true => std::fs::remove_dir_all(&self.folder).map_err(Error::io(&self.folder)),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_made_once_and_again_for_another_evaluation() {
        let folder = tempfile::tempdir().unwrap();
        let open = |fingerprint: &str| Journal::open(folder.path(), fingerprint.to_string()).unwrap();
        let numbers = |journal: &Journal, made: Vec<f64>| journal.piece("numbers", || Ok(made)).unwrap();
        open("one").finish().unwrap();
        assert!(!folder.path().join("unfinished").exists());
        assert_eq!(numbers(&open("one"), vec![0.1, -1e-300]), [0.1, -1e-300]);
        assert_eq!(numbers(&open("one"), vec![2.0]), [0.1, -1e-300]);
        assert_eq!(numbers(&open("two"), vec![2.0]), [2.0]);
        std::fs::write(folder.path().join("unfinished/numbers.json"), "[2.").unwrap();
        assert_eq!(numbers(&open("two"), vec![3.0]), [3.0]);
        let failed = open("two").piece("other", || -> Result<f64> { crate::bail!("no") });
        assert!(failed.is_err() && open("two").piece("other", || Ok(1.0)).unwrap() == 1.0);
        open("two").finish().unwrap();
        assert!(!folder.path().join("unfinished").exists());
    }
}
