//! The folder of a run: who may write to it, and what an earlier run has left in it.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{file_names, is_temporary, names_of, sweep};
use crate::error::{Error, Result};

/// What tells the folder of a run from others; it is the first file in it.
const METRICS: &str = "metrics.jsonl";

/// Makes `path` a folder that a run can write to: new, empty, or an earlier run's (known by its `metrics.jsonl`). Anything else is refused,
/// so that no run mixes its files with a user's; and so is a folder that another process holds. The lock is to be kept while the run goes on.
/// What interrupted writes have left is removed.
pub fn take_run_folder(path: impl AsRef<Path>) -> Result<FolderLock> {
    let path = path.as_ref();
    if path.exists() && !path.is_dir() {
        crate::bail!("--output {}: found a file, expected a folder or a new name; choose another", path.display());
    }
    fs::create_dir_all(path).map_err(Error::io(path))?;
    let is_empty = names_of(path, |entry| !entry.ends_with(LOCK) && !is_temporary(entry))?.is_empty();
    let metrics = path.join(METRICS);
    if !is_empty && !metrics.is_file() {
        crate::bail!(
            "--output {}: the folder is not empty and holds no earlier run (no {METRICS}); choose another",
            path.display()
        );
    }
    let lock = FolderLock::take(path)?;
    File::options().create(true).append(true).open(&metrics).map_err(Error::io(&metrics))?;
    sweep(path)?;
    Ok(lock)
}

/// Removes from a run's folder the curves, warnings, checkpoints and samples of an earlier run, with which a new one's would be mixed.
pub fn clear_run_folder(path: &Path) -> Result<()> {
    let stale = |name: &String| name == "warnings.txt" || name.starts_with("events.out.tfevents.");
    for name in file_names(path)?.iter().filter(|name| stale(name)) {
        fs::remove_file(path.join(name)).map_err(Error::io(path.join(name)))?;
    }
    for name in ["checkpoints", "policies", "samples"] {
        let folder = path.join(name);
        if folder.is_dir() {
            fs::remove_dir_all(&folder).map_err(Error::io(&folder))?;
        }
    }
    let metrics = path.join(METRICS);
    File::options().write(true).truncate(true).open(&metrics).map(drop).map_err(Error::io(&metrics))
}

/// The file that is locked, and that says who locked it.
const LOCK: &str = ".lock";
/// How often it may vanish between two looks at it.
const LOCK_TRIES: usize = 10;

/// The sole right to write to a folder. It is the operating system's lock on a file, so that it ends with the process, however that ends.
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    _file: File,
}

impl FolderLock {
    /// Takes the right to a folder that is there. On a file system without locks nobody is kept out.
    ///
    /// # Errors
    /// Where another process has it, which the message names.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(LOCK);
        let program = std::env::args_os().next().unwrap_or_default();
        let program = Path::new(&program).file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let own = format!("{program} with the process number {}", std::process::id());
        for _ in 0..LOCK_TRIES {
            let mut options = File::options();
            let options = options.read(true).write(true).create(true).truncate(false);
            let mut file = options.open(&path).map_err(Error::io(&path))?;
            if let Err(TryLockError::WouldBlock) = file.try_lock() {
                let owner = fs::read_to_string(&path).unwrap_or_default();
                crate::bail!(
                    "--output {}: another run writes to this folder, {}; wait for it, end it, or choose another folder",
                    folder.display(),
                    if owner.is_empty() { "a process that has not said its number yet" } else { &owner }
                );
            }
            file.set_len(0).and_then(|()| file.write_all(own.as_bytes())).map_err(Error::io(&path))?;
            // Who had it before may have removed the file between its opening and its locking: then this lock is on nothing.
            if fs::read_to_string(&path).is_ok_and(|owner| owner == own) {
                return Ok(FolderLock { path, _file: file });
            }
        }
        crate::bail!(
            "{}: the file does not stay as it was written; choose a folder on another file system",
            path.display()
        )
    }
}

impl Drop for FolderLock {
    /// Removes the file while it is still locked.
    fn drop(&mut self) {
        let _nothing_to_remove = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names = names_of(folder, |_| true).unwrap();
        names.sort();
        names
    }

    #[test]
    fn only_a_new_an_empty_or_an_earlier_runs_folder_is_taken_for_a_run() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("runs/sft");
        take_run_folder(&run).unwrap();
        take_run_folder(&run).unwrap();
        fs::remove_file(run.join(METRICS)).unwrap();
        fs::write(run.join(".settings.toml.x.tmp"), "").unwrap();
        take_run_folder(&run).unwrap();
        fs::write(run.join("notes.txt"), "mine").unwrap();
        fs::write(run.join("events.out.tfevents.1.host.1"), "").unwrap();
        fs::write(run.join(METRICS), "{}").unwrap();
        take_run_folder(&run).unwrap();
        clear_run_folder(&run).unwrap();
        assert_eq!(names(&run), [METRICS, "notes.txt"]);
        assert_eq!(fs::read(run.join(METRICS)).unwrap(), b"");
        fs::remove_file(run.join(METRICS)).unwrap();
        assert!(take_run_folder(&run).unwrap_err().to_string().contains("not empty"));
        assert!(take_run_folder(run.join("notes.txt")).unwrap_err().to_string().contains("found a file"));
    }

    #[test]
    fn a_folder_that_a_run_writes_to_is_taken_by_no_other_until_that_run_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let lock = take_run_folder(&run).unwrap();
        let error = take_run_folder(&run).unwrap_err().to_string();
        assert!(error.contains(&format!("the process number {};", std::process::id())), "{error}");
        drop(lock);
        // What a killed run leaves behind keeps nobody out.
        fs::write(run.join(LOCK), "sft with the process number 1").unwrap();
        let lock = take_run_folder(&run).unwrap();
        assert_eq!(names(&run), [LOCK, METRICS]);
        drop(lock);
        assert_eq!(names(&run), [METRICS]);
    }
}
