//! A file or a folder appears whole or not at all.
//!
//! It is written under a temporary name beside the final one, brought to the disk, and renamed. What a failed run leaves
//! behind is at most a temporary name that starts with a dot.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

mod run_folder;

use crate::error::{Error, Result};
pub use run_folder::{FolderLock, clear_run_folder, take_run_folder};

/// Writes the file at `path` by `write`; its folder is created if it is missing.
pub fn write_atomically(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut BufWriter<OutputFile>) -> io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let mut file = BufWriter::new(OutputFile::create(path)?);
    write(&mut file).map_err(Error::io(path))?;
    file.into_inner().map_err(|error| Error::io(path)(error.into_error()))?.commit()
}

/// A file that is being written under a temporary name. Dropped before [`OutputFile::commit`], it is gone.
#[derive(Debug)]
pub struct OutputFile {
    temporary: tempfile::NamedTempFile,
    path: PathBuf,
}

impl OutputFile {
    /// An empty file that will become `path`; the folders above are created if they are missing.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let folder = parent(path)?;
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let mut builder = tempfile::Builder::new();
        let prefix = temporary_prefix(path);
        builder.prefix(&prefix).suffix(TEMPORARY_SUFFIX);
        #[cfg(unix)] // The permissions of any new file, not a private one's.
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temporary = builder.tempfile_in(folder).map_err(Error::io(path))?;
        Ok(OutputFile { temporary, path: path.to_path_buf() })
    }

    /// Brings the file to the disk and gives it its final name, in place of the file that has it now.
    pub fn commit(self) -> Result<()> {
        let OutputFile { temporary, path } = self;
        temporary.as_file().sync_all().map_err(Error::io(&path))?;
        temporary.persist(&path).map_err(|error| Error::io(&path)(error.error))?;
        sync(parent(&path)?)
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.temporary.as_file_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.temporary.as_file_mut().flush()
    }
}

/// A folder that is being filled under a temporary name. Dropped before [`OutputFolder::commit`], it is gone.
#[derive(Debug)]
pub struct OutputFolder {
    temporary: tempfile::TempDir,
    path: PathBuf,
}

impl OutputFolder {
    /// An empty folder that will become `path`; the folders above are created if they are missing.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let folder = parent(path)?;
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let temporary = temporary_folder(path, folder)?;
        Ok(OutputFolder { temporary, path: path.to_path_buf() })
    }

    /// Where to write the folder's files.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Gives the folder its final name, in place of the folder that has it now.
    ///
    /// On Linux the two change places in one step, so that there is a whole folder of this name at any time. Elsewhere the old one is moved
    /// aside first, to a temporary name. It is deleted last.
    pub fn commit(self) -> Result<()> {
        let OutputFolder { temporary, path } = self;
        sync_tree(temporary.path())?;
        let folder = parent(&path)?;
        if path.exists() && exchange(temporary.path(), &path) {
            sync(folder)?;
            return temporary.close().map_err(Error::io(&path));
        }
        let previous = if path.exists() {
            let aside = temporary_folder(&path, folder)?;
            // A folder may be renamed over an empty one.
            fs::rename(&path, aside.path()).map_err(Error::io(&path))?;
            Some(aside)
        } else {
            None
        };
        if let Err(error) = fs::rename(temporary.path(), &path) {
            if let Some(aside) = previous {
                fs::rename(aside.path(), &path).map_err(Error::io(&path))?;
            }
            return Err(Error::io(&path)(error));
        }
        // Its name is taken by nothing now, so there is nothing to delete.
        let _ = temporary.keep();
        sync(folder)?;
        match previous {
            Some(aside) => aside.close().map_err(Error::io(&path)),
            None => Ok(()),
        }
    }
}

/// Lets two names change places in one step; says whether the file system can.
fn exchange(one: &Path, other: &Path) -> bool {
    #[cfg(target_os = "linux")]
    return {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok()
    };
    #[cfg(not(target_os = "linux"))]
    return false;
}

/// Fills a folder by `write` and gives it the name `path` when it is complete, in place of the one there.
pub fn replace_folder_atomically(path: impl AsRef<Path>, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = OutputFolder::create(path)?;
    write(folder.path())?;
    folder.commit()
}

/// The files that make a folder a model or an adapter: they come last, so that a folder that has them is complete.
const MARKERS: [&str; 3] = ["config.json", "adapter_config.json", "adapters.json"];

/// Makes the model in the folder `from` appear in the folder `to` too: each file whole or not at all, as a second name of the
/// same file where the file system can, else as a copy. Weights in `to` that `from` has not are an older model's and
/// are removed; other files stay. Folders in `from` are adapters that stand on top of each other; they appear in the same way.
pub fn publish(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(Error::io(to))?;
    let mut names = names_of(from, |path| path.is_file() && !is_temporary(path))?;
    names.sort_by_key(|name| (MARKERS.contains(&name.as_str()), name.clone()));
    // From the first file that is replaced to the last, the folder is no model.
    for name in file_names(to)? {
        let is_weights = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
        if MARKERS.contains(&name.as_str()) || is_weights && !names.contains(&name) {
            fs::remove_file(to.join(&name)).map_err(Error::io(to.join(&name)))?;
        }
    }
    for folder in names_of(from, |path| path.is_dir() && !is_temporary(path))? {
        publish(&from.join(&folder), &to.join(&folder))?;
    }
    for name in names {
        let (source, target) = (from.join(&name), to.join(&name));
        let staging = temporary_folder(&target, to)?;
        let staged = staging.path().join(&name);
        fs::hard_link(&source, &staged).or_else(|_| copy(&source, &staged)).map_err(Error::io(&target))?;
        fs::rename(&staged, &target).map_err(Error::io(&target))?;
    }
    sync(to)
}

fn copy(source: &Path, target: &Path) -> io::Result<()> {
    fs::copy(source, target)?;
    File::open(target)?.sync_all()
}

/// The names of the files, not the folders, in `folder`.
fn file_names(folder: &Path) -> Result<Vec<String>> {
    names_of(folder, Path::is_file)
}

fn names_of(folder: &Path, is_wanted: impl Fn(&Path) -> bool) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        if is_wanted(&entry.path()) {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// How a name ends under which something is written before it has its own; it begins with a dot.
const TEMPORARY_SUFFIX: &str = ".tmp";

/// The temporary name of `path` is `.name.`, random characters, and the suffix.
fn temporary_prefix(path: &Path) -> String {
    format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy())
}

/// A new folder in `folder`, under a temporary name of `path`.
fn temporary_folder(path: &Path, folder: &Path) -> Result<tempfile::TempDir> {
    let prefix = temporary_prefix(path);
    tempfile::Builder::new().prefix(&prefix).suffix(TEMPORARY_SUFFIX).tempdir_in(folder).map_err(Error::io(path))
}

fn parent(path: &Path) -> Result<&Path> {
    match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(folder) if path.file_name().is_some() => Ok(folder),
        _ => crate::bail!("{}: not a name of a file or folder that can be written", path.display()),
    }
}

/// Removes what interrupted writes have left in and below a folder that nobody else writes to.
pub fn sweep(folder: &Path) -> Result<()> {
    for name in names_of(folder, |path| path.is_dir() && !path.is_symlink() && !is_temporary(path))? {
        sweep(&folder.join(name))?;
    }
    for name in names_of(folder, is_temporary)? {
        let path = folder.join(name);
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(Error::io(&path))?;
    }
    Ok(())
}

/// Whether a name is one under which something is written before it has its own.
pub fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.') && name.ends_with(TEMPORARY_SUFFIX)
}

/// Brings a folder's list of names to the disk.
pub fn sync(folder: &Path) -> Result<()> {
    // Only Unix lets a folder be opened as a file.
    if cfg!(unix) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))?;
    }
    Ok(())
}

fn sync_tree(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|file| file.sync_all()).map_err(Error::io(&path))?;
        }
    }
    sync(folder)
}

/// Prints a warning to the standard error stream, the same text once in a program: a file may be read for
/// several models.
pub fn warn_once(text: &str) {
    use std::collections::HashSet;
    use std::sync::{LazyLock, Mutex};
    static PRINTED: LazyLock<Mutex<HashSet<String>>> = LazyLock::new(Mutex::default);
    let is_new = PRINTED.lock().map_or(true, |mut printed| printed.insert(text.to_string()));
    if is_new {
        eprintln!("{text}");
    }
}

/// Prints a line, as `println!` does. A reader who has seen enough (`| head`) is no failure: what follows goes nowhere.
#[macro_export]
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write;
        match writeln!(std::io::stdout(), $($line)*) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                // As on a full disk. Nothing that follows could be said either.
                eprintln!("error: standard output cannot be written: {error}");
                std::process::exit(1)
            }
            _ => {}
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn put(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        files.iter().for_each(|(name, text)| fs::write(folder.join(name), text).unwrap());
    }

    fn text(path: PathBuf) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/report.json");
        for content in ["first", "second"] {
            write_atomically(&path, |file| file.write_all(content.as_bytes())).unwrap();
            assert_eq!(text(path.clone()), content);
        }
        assert_eq!(names(path.parent().unwrap()), ["report.json"]);
        #[cfg(unix)]
        {
            // What the user's umask allows, as for any other file, not a temporary file's 0600.
            use std::os::unix::fs::PermissionsExt;
            fs::write(folder.path().join("plain"), "").unwrap();
            let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode(path), mode(folder.path().join("plain")));
        }
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        write_atomically(&path, |file| file.write_all(b"whole")).unwrap();
        let error = write_atomically(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("disk full"))
        });
        assert!(error.unwrap_err().to_string().contains("report.json: disk full"));
        assert_eq!(text(path), "whole");
        assert_eq!(names(folder.path()), ["report.json"]);
    }

    #[test]
    fn a_folder_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        put(&model, &[("old.txt", "old"), ("both.txt", "old")]);
        replace_folder_atomically(&model, |folder| {
            put(folder, &[("both.txt", "new")]);
            put(&folder.join("inner"), &[("deep.txt", "new")]);
            Ok(())
        })
        .unwrap();
        assert_eq!(names(&model), ["both.txt", "inner"]);
        assert_eq!(text(model.join("both.txt")), "new");
        assert_eq!(names(folder.path()), ["model"]);
    }

    #[test]
    fn a_folder_that_failed_midway_leaves_the_old_one_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        put(&model, &[("config.json", "old")]);
        let failed = replace_folder_atomically(&model, |folder| {
            put(folder, &[("config.json", "new")]);
            crate::bail!("no")
        });
        assert!(failed.is_err());
        assert_eq!(text(model.join("config.json")), "old");
        assert_eq!(names(folder.path()), ["model"]);
    }

    #[test]
    fn what_interrupted_writes_left_is_no_part_of_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let (best, run) = (folder.path().join("run/best"), folder.path().join("run"));
        put(&best, &[("config.json", "new"), (".head.json.a.tmp", "half")]);
        put(&best.join(".config.json.b.tmp"), &[("config.json", "half")]);
        publish(&best, &run).unwrap();
        assert_eq!(names(&run), ["best", "config.json"]);
        sweep(&run).unwrap();
        assert_eq!(names(&best), ["config.json"]);
    }

    #[test]
    fn publishing_replaces_the_model_and_keeps_the_runs_other_files() {
        let folder = tempfile::tempdir().unwrap();
        let (best, run) = (folder.path().join("run/best"), folder.path().join("run"));
        put(&best, &[("config.json", "new"), ("model.safetensors", "new")]);
        let old = [("config.json", "old"), ("model-00001-of-00002.safetensors", ""), ("metrics.jsonl", "{}")];
        put(&run, &old);
        put(&run, &[("model.safetensors.index.json", ""), ("adapter_config.json", "")]);
        publish(&best, &run).unwrap();
        assert_eq!(names(&run), ["best", "config.json", "metrics.jsonl", "model.safetensors"]);
        assert_eq!(text(run.join("config.json")), "new");
        assert_eq!(names(&best), ["config.json", "model.safetensors"]);
    }
}
