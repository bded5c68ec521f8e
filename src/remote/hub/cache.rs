//! The cache on disk, in the form of Python's `huggingface_hub`.
//!
//! `models--organisation--name/` (or `datasets--…`) holds `blobs/`, named by their digests, `snapshots/<commit>/`, whose files are links to them, and `refs/`, which
//! say of branches and tags which commit they were when they were last asked for. `.locks/` keeps two processes from fetching one blob at the same time.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::listing::{ADAPTER_WEIGHTS, Blob, INDEX_FILE, is_commit, shards};
use super::{HubName, Kind, environment};
use crate::bail;
use crate::error::{Error, Result};
use crate::{files, limits};

/// The most bytes of a file that holds a token or a commit.
const LINE_FILE: u64 = 1 << 16;

/// Where a model or a data set is in the cache.
#[derive(Debug)]
pub struct Place {
    cache: PathBuf,
    /// `$HF_HOME`, which also holds the token.
    home: PathBuf,
    repository: CacheRepo,
    /// `models--organisation--name`.
    folder: String,
    revision: String,
}

impl Place {
    /// That of a model or a data set.
    ///
    /// # Errors
    /// Where no variable and no home says where the cache is.
    pub fn of(name: &HubName) -> Result<Self> {
        let home = match (environment("HF_HOME"), environment("XDG_CACHE_HOME"), std::env::home_dir()) {
            (Some(home), _, _) => PathBuf::from(home),
            (None, Some(caches), _) => Path::new(&caches).join("huggingface"),
            (None, None, Some(user)) if !user.as_os_str().is_empty() => user.join(".cache/huggingface"),
            _ => bail!("{name}: there is no home folder for the hub's cache; say by HF_HOME where it is to be"),
        };
        let cache = environment("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        Ok(Self::within(cache, home, name))
    }

    fn within(cache: PathBuf, home: PathBuf, name: &HubName) -> Self {
        let revision = name.revision().to_string();
        let kind = match name.kind {
            Kind::Model => RepoType::Model,
            Kind::Dataset => RepoType::Dataset,
        };
        let repository = Repo::with_revision(name.repository.clone(), kind, revision.clone());
        let folder = repository.folder_name();
        Place { repository: Cache::new(cache.clone()).repo(repository), cache, home, folder, revision }
    }

    /// The cache's folder.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// The token that opens private and gated models, if there is one.
    pub fn token(&self) -> Result<Option<String>> {
        if let Some(token) = environment("HF_TOKEN") {
            return Ok(Some(token));
        }
        match environment("HF_TOKEN_PATH") {
            Some(path) => match limits::read_text(&path, LINE_FILE) {
                Ok(token) => Ok(Some(token.trim().to_string()).filter(|token| !token.is_empty())),
                Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            },
            None => Ok(Cache::new(self.home.join("hub")).token()),
        }
    }

    fn path(&self) -> PathBuf {
        self.cache.join(&self.folder)
    }

    /// The commit that the revision is, or was when it was last asked for.
    pub fn commit(&self) -> Option<String> {
        if is_commit(&self.revision) {
            return Some(self.revision.clone());
        }
        let commit = limits::read_text(self.path().join("refs").join(&self.revision), LINE_FILE).ok()?;
        Some(commit.trim().to_string()).filter(|commit| is_commit(commit))
    }

    /// Notes which commit the revision is.
    pub fn note(&self, commit: &str) -> Result<()> {
        if self.commit().as_deref() == Some(commit) || is_commit(&self.revision) {
            return Ok(());
        }
        self.repository.create_ref(commit).map_err(Error::io(self.path().join("refs").join(&self.revision)))
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.repository.pointer_path(commit)
    }

    /// Whether a commit's file is there.
    pub fn has(&self, commit: &str, file: &str, blob: &Blob) -> bool {
        is_whole(&self.snapshot(commit).join(file), blob)
    }

    /// Where a blob lies when it is whole.
    pub fn blob(&self, blob: &Blob) -> PathBuf {
        self.path().join("blobs").join(&blob.etag)
    }

    /// Where it lies until then.
    pub fn incomplete(&self, blob: &Blob) -> PathBuf {
        self.path().join("blobs").join(format!("{}.incomplete", blob.etag))
    }

    /// Waits until no other process fetches the blob, and keeps others from it until the file is dropped.
    pub fn lock(&self, blob: &Blob, file: &str) -> Result<File> {
        let folder = self.cache.join(".locks").join(&self.folder);
        let path = folder.join(format!("{}.lock", blob.etag));
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let lock = File::options().create(true).append(true).open(&path).map_err(Error::io(&path))?;
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => eprintln!("waits for another process that fetches {file}"),
            Err(TryLockError::Error(error)) => return Err(Error::io(&path)(error)),
        }
        lock.lock().map_err(Error::io(&path))?;
        Ok(lock)
    }

    /// Gives a blob that is whole its final name.
    pub fn keep(&self, blob: &Blob) -> Result<()> {
        let path = self.blob(blob);
        fs::rename(self.incomplete(blob), &path).map_err(Error::io(&path))?;
        files::sync(&self.path().join("blobs"))
    }

    /// Makes a blob a commit's file, in place of what was there, in one step: to another process that reads the snapshot it must at no time
    /// seem to have no weights.
    pub fn link(&self, commit: &str, file: &str, blob: &Blob) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        let folder = path.parent().unwrap_or(Path::new(""));
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let name = path.file_name().unwrap_or_default().display();
        let temporary = folder.join(format!(".{name}.{}.tmp", std::process::id()));
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(&temporary)(error)),
            _ => {}
        }
        // Relative, so that a cache can be moved.
        #[cfg(unix)]
        let linked = {
            let up = "../".repeat(2 + file.matches('/').count());
            std::os::unix::fs::symlink(Path::new(&up).join("blobs").join(&blob.etag), &temporary)
        };
        #[cfg(not(unix))]
        let linked = fs::copy(self.blob(blob), &temporary).map(drop);
        linked.and_then(|()| fs::rename(&temporary, &path)).map_err(Error::io(&path))
    }
}

/// Whether all of a blob is there.
pub fn is_whole(path: &Path, blob: &Blob) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == blob.size)
}

/// Whether a snapshot is a model or an adapter with its weights: another program may have fetched some of its files alone.
pub fn is_complete(folder: &Path) -> bool {
    let has = |file: &str| folder.join(file).is_file();
    if has("adapter_config.json") {
        return ADAPTER_WEIGHTS.into_iter().any(has);
    }
    let index = folder.join(INDEX_FILE);
    let read_shards = || limits::read(&index, limits::SMALL_FILE).and_then(|bytes| shards(&bytes, &index));
    let has_shards = || read_shards().is_ok_and(|shards| shards.iter().all(|file| has(file)));
    has("config.json") && (has("model.safetensors") || has_shards())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_complete_with_its_weights() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        assert!(!is_complete(folder.path()));
        put("config.json", "{}");
        assert!(!is_complete(folder.path()));
        put("model.safetensors", "");
        assert!(is_complete(folder.path()));
        fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        put(INDEX_FILE, r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#);
        put("model-1.safetensors", "");
        assert!(!is_complete(folder.path()));
        put("model-2.safetensors", "");
        assert!(is_complete(folder.path()));
        put("adapter_config.json", "{}");
        assert!(!is_complete(folder.path()));
        put("adapter_model.safetensors", "");
        assert!(is_complete(folder.path()));
    }

    #[test]
    fn a_revision_is_what_it_was_when_it_was_noted() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, home) = (folder.path().join("hub"), folder.path().to_path_buf());
        let place = |name: &str| Place::within(cache.clone(), home.clone(), &HubName::parse(name).unwrap());
        let commits = ["0", "1"].map(|digit| digit.repeat(40));
        let branch = place("org/tiny@refs/pr/1");
        assert_eq!(branch.commit(), None);
        for commit in &commits {
            branch.note(commit).unwrap();
            assert_eq!(branch.commit().as_ref(), Some(commit));
        }
        let file = cache.join("models--org--tiny/refs/refs/pr/1");
        assert_eq!(fs::read_to_string(&file).unwrap(), commits[1]);
        fs::write(file, "../../x").unwrap();
        assert_eq!(branch.commit(), None);
        let pinned = place(&format!("org/tiny@{}", commits[0]));
        pinned.note(&commits[1]).unwrap();
        assert_eq!(pinned.commit().as_ref(), Some(&commits[0]));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_of_a_snapshot_leads_to_its_blob_wherever_the_cache_is_moved() {
        let folder = tempfile::tempdir().unwrap();
        let place =
            Place::within(folder.path().join("hub"), folder.path().to_path_buf(), &HubName::parse("org/tiny").unwrap());
        let blob = Blob { etag: "ab".repeat(20), size: 2 };
        let _lock = place.lock(&blob, "config.json").unwrap();
        fs::create_dir_all(place.path().join("blobs")).unwrap();
        fs::write(place.incomplete(&blob), "{}").unwrap();
        place.keep(&blob).unwrap();
        let commit = "0".repeat(40);
        for file in ["config.json", "config.json", "data/en/x.json"] {
            place.link(&commit, file, &blob).unwrap();
            assert!(place.has(&commit, file, &blob));
        }
        fs::rename(folder.path().join("hub"), folder.path().join("moved")).unwrap();
        for file in ["config.json", "data/en/x.json"] {
            let moved = folder.path().join(format!("moved/models--org--tiny/snapshots/{commit}/{file}"));
            assert_eq!(fs::read_to_string(moved).unwrap(), "{}");
        }
    }
}
