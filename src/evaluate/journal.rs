//! What an evaluation has done so far, so that one that was stopped goes on where it was.

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::xxh3_64;

use crate::bail;
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
    ///
    /// # Errors
    /// Where the folder is there and is no journal.
    pub fn open(output: &Path, fingerprint: String) -> Result<Self> {
        let folder = output.join(FOLDER);
        match std::fs::read_to_string(folder.join(FINGERPRINT)) {
            Ok(found) if found == fingerprint => {}
            Ok(_) => std::fs::remove_dir_all(&folder).map_err(Error::io(&folder))?,
            Err(_) if folder.exists() => bail!(
                "{}: the folder holds no unfinished evaluation (no {FINGERPRINT}); move it away or choose another --output",
                folder.display()
            ),
            Err(_) => {}
        }
        Ok(Journal { folder, fingerprint })
    }

    /// The piece of this name that was made of the same `given`, as it was kept, or made by `make` and kept.
    pub fn piece<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        given: &impl Debug,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let given = xxh3_64(format!("{given:?}").as_bytes());
        let path = self.folder.join(format!("{name}-{given:016x}.json"));
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
    fn a_piece_is_made_once_and_again_for_another_evaluation_or_other_data() {
        let folder = tempfile::tempdir().unwrap();
        let open = |fingerprint: &str| Journal::open(folder.path(), fingerprint.to_string()).unwrap();
        let numbers =
            |journal: &Journal, given: &str, made: Vec<f64>| journal.piece("numbers", &given, || Ok(made)).unwrap();
        open("one").finish().unwrap();
        assert!(!folder.path().join("unfinished").exists());
        assert_eq!(numbers(&open("one"), "data", vec![0.1, -1e-300]), [0.1, -1e-300]);
        assert_eq!(numbers(&open("one"), "data", vec![2.0]), [0.1, -1e-300]);
        assert_eq!(numbers(&open("one"), "other data", vec![2.0]), [2.0]);
        assert_eq!(numbers(&open("two"), "data", vec![2.0]), [2.0]);
        for piece in std::fs::read_dir(folder.path().join("unfinished")).unwrap() {
            let path = piece.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "json") {
                std::fs::write(path, "[2.").unwrap();
            }
        }
        assert_eq!(numbers(&open("two"), "data", vec![3.0]), [3.0]);
        let failed = open("two").piece("other", &"data", || -> Result<f64> { bail!("no") });
        assert!(failed.is_err() && open("two").piece("other", &"data", || Ok(1.0)).unwrap() == 1.0);
        open("two").finish().unwrap();
        assert!(!folder.path().join("unfinished").exists());
    }

    #[test]
    fn a_folder_that_is_no_journal_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("unfinished/novel.txt");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, "It was").unwrap();
        let error = Journal::open(folder.path(), "one".to_string()).unwrap_err().to_string();
        assert!(error.contains("unfinished") && file.exists(), "{error}");
    }
}
