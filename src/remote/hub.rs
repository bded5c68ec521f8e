//! Models and data sets of the Hugging Face hub, by `organisation/name`, at a revision by `organisation/name@revision`.
//!
//! Either is fetched once, into the cache that Python's `huggingface_hub` has (`cache`): what one of the two has fetched the other finds. Of a
//! model's files only those are taken that something here reads (`listing`), of a data set's those of the split that is asked for (`dataset`); each is checked against the digest that the hub lists, and a
//! transfer that breaks off goes on where it was (`transfer`).
//!
//! | variable | meaning |
//! | --- | --- |
//! | `HF_ENDPOINT` | another hub than `https://huggingface.co` |
//! | `HF_TOKEN`, `HF_TOKEN_PATH` | the token that opens private and gated models, or the file that holds it |
//! | `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME` | where the cache lies |
//! | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | only what the cache holds is used |

mod cache;
mod dataset;
mod listing;
mod progress;
mod transfer;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use url::Url;

use super::wait;
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;
use cache::Place;
pub use dataset::Dataset;
pub use listing::is_fetched;
use listing::{Blob, INDEX_FILE, Listing};
use progress::Progress;
use transfer::{Hub, Patience, Unanswered};

/// Nothing is shown of how far a transfer is.
static QUIET: AtomicBool = AtomicBool::new(false);

/// The models that this process has looked up, with the folders of their snapshots: all that use a model use the same commit of it.
static FOUND: Mutex<BTreeMap<HubName, PathBuf>> = Mutex::new(BTreeMap::new());

/// What the hub holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Models and adapters.
    Model,
    /// Data sets.
    Dataset,
}

impl Kind {
    /// In sentences.
    fn word(self) -> &'static str {
        match self {
            Kind::Model => "model",
            Kind::Dataset => "data set",
        }
    }
}

/// A model or a data set of the hub as the user calls it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HubName {
    /// Which of the two.
    pub kind: Kind,
    /// `organisation/name`.
    pub repository: String,
    /// A branch, a tag or a commit; `main` where there is none.
    pub revision: Option<String>,
}

impl HubName {
    /// Reads `organisation/name` or `organisation/name@revision`, of a model; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        Self::of_kind(Kind::Model, text)
    }

    /// The same of a data set.
    pub fn of_dataset(text: &str) -> Option<Self> {
        Self::of_kind(Kind::Dataset, text)
    }

    fn of_kind(kind: Kind, text: &str) -> Option<Self> {
        let (repository, revision) = match text.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (text, None),
        };
        let is_plain = |part: &str| {
            let is_of_names = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            !part.is_empty() && !part.starts_with('.') && !part.contains("..") && part.chars().all(is_of_names)
        };
        let (organisation, name) = repository.split_once('/')?;
        // Two hyphens stand for the slash in the cache.
        let is_repository = is_plain(organisation) && is_plain(name) && !repository.contains("--");
        let is_revision = revision.is_none_or(|revision| revision.split('/').all(is_plain));
        (is_repository && is_revision).then(|| HubName {
            kind,
            repository: repository.to_string(),
            revision: revision.map(str::to_string),
        })
    }

    fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.repository)?;
        self.revision.iter().try_for_each(|revision| write!(formatter, "@{revision}"))
    }
}

/// Shows nothing of how far a transfer is, from now on.
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// The folder of a model: the path itself where something lies there or where it cannot be the name of a model on the hub, else the snapshot of that
/// model in the cache, after what was missing of it has been fetched.
///
/// # Errors
/// Where the hub has no such model or does not give it, where its weights are no safetensors, and where a file cannot be fetched as the hub lists it.
pub fn folder(model: &Path) -> Result<PathBuf> {
    let Some(name) = model.to_str().and_then(HubName::parse) else { return Ok(model.to_path_buf()) };
    if model.exists() {
        return Ok(model.to_path_buf());
    }
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(folder) = found.get(&name) {
        return Ok(folder.clone());
    }
    let folder = find(&name)?;
    found.insert(name, folder.clone());
    Ok(folder)
}

/// What the user called the model whose snapshot this folder is; `None` for other folders.
pub fn name_of(folder: &Path) -> Option<HubName> {
    let found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    found.iter().find(|(_, path)| *path == folder).map(|(name, _)| name.clone())
}

/// The model or data set and its commit, `organisation/name@commit`, to which a file in the cache belongs.
pub fn commit_of(file: &Path) -> Option<HubName> {
    let snapshot = file
        .ancestors()
        .skip(1)
        .find(|folder| folder.parent().and_then(Path::file_name).is_some_and(|name| name == "snapshots"))?;
    let (commit, snapshots) = (snapshot.file_name()?.to_str()?, snapshot.parent()?);
    let repository = snapshots.parent()?.file_name()?.to_str()?;
    let (kind, repository) = match repository.strip_prefix("models--") {
        Some(repository) => (Kind::Model, repository),
        None => (Kind::Dataset, repository.strip_prefix("datasets--")?),
    };
    let name = || HubName::of_kind(kind, &format!("{}@{commit}", repository.replacen("--", "/", 1)));
    listing::is_commit(commit).then(name).flatten()
}

fn find(name: &HubName) -> Result<PathBuf> {
    let place = Place::of(name)?;
    let in_cache = || place.commit().map(|commit| place.snapshot(&commit)).filter(|folder| cache::is_complete(folder));
    if is_offline() {
        return in_cache().ok_or_else(|| {
            Error::input(format!(
                "{name}: no such folder, and the cache in {} does not hold all of a model of this name, while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids asking the hub; give the model's folder, or unset the variable to fetch the model",
                place.cache().display()
            ))
        });
    }
    let (endpoint, token) = (endpoint()?, place.token()?);
    wait(async {
        let hub = Hub::new(endpoint, token, &Patience::default())?;
        match hub.listing(name).await {
            Ok(listing) => fetch(&hub, name, &place, &listing).await,
            Err(Unanswered::Refused(error)) => Err(error),
            Err(Unanswered::Silent(reason)) => match in_cache() {
                Some(folder) => {
                    eprintln!("warning: {name}: {reason}; uses what the cache holds of it, {}", folder.display());
                    Ok(folder)
                }
                None => bail!(
                    "{name}: no such folder, and of the hub's model of this name nothing could be learned: {reason}; check the name, the network and HF_ENDPOINT, or give the model's folder"
                ),
            },
        }
    })?
}

/// Brings what is missing of a commit into the cache; weights last, so that a snapshot with weights is whole.
async fn fetch(hub: &Hub, name: &HubName, place: &Place, listing: &Listing) -> Result<PathBuf> {
    let folder = place.snapshot(&listing.commit);
    let chosen = listing.chosen(name)?;
    for (file, blob) in &chosen.files {
        fetch_file(hub, name, place, &listing.commit, file, blob).await?;
    }
    if chosen.has_index {
        let path = folder.join(INDEX_FILE);
        for file in listing::shards(&limits::read(&path, limits::SMALL_FILE)?, &path)? {
            let Some(blob) = listing.blob(&file) else {
                bail!(
                    "{}: names \"{file}\", which the hub does not list beside it; give another revision",
                    path.display()
                );
            };
            fetch_file(hub, name, place, &listing.commit, &file, blob).await?;
        }
    }
    if !cache::is_complete(&folder) {
        // Without weights it would be a new model of random ones.
        bail!("{name}: another program has changed {} meanwhile; run it again", folder.display());
    }
    place.note(&listing.commit)?;
    Ok(folder)
}

async fn fetch_file(hub: &Hub, name: &HubName, place: &Place, commit: &str, file: &str, blob: &Blob) -> Result<()> {
    if place.has(commit, file, blob) {
        return Ok(());
    }
    let _lock = place.lock(blob, file)?;
    fetch_blob(hub, name, place, commit, file, blob).await?;
    place.link(commit, file, blob)
}

/// Brings a file's contents into the cache, while its lock is held: another process may have fetched it while this one waited.
async fn fetch_blob(hub: &Hub, name: &HubName, place: &Place, commit: &str, file: &str, blob: &Blob) -> Result<()> {
    if !cache::is_whole(&place.blob(blob), blob) {
        let mut progress = Progress::new(&format!("{name} {file}"), blob.size, QUIET.load(Ordering::Relaxed));
        hub.download(name, commit, file, blob, &place.incomplete(blob), &mut progress).await?;
        place.keep(blob)?;
    }
    Ok(())
}

/// Whether only the cache is to be used.
fn is_offline() -> bool {
    let is_set = |variable| {
        let value = environment(variable).unwrap_or_default().to_lowercase();
        ["1", "true", "yes", "on"].contains(&value.as_str())
    };
    is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE")
}

/// Where the hub is.
fn endpoint() -> Result<Url> {
    let Some(text) = environment("HF_ENDPOINT") else {
        return Url::parse("https://huggingface.co").map_err(|error| Error::input(error.to_string()));
    };
    match Url::parse(&text) {
        Ok(url) if ["http", "https"].contains(&url.scheme()) && url.has_host() => Ok(url),
        // It is not repeated, as it may hold a password.
        _ => bail!("HF_ENDPOINT is no address of a web server; expected one such as https://huggingface.co"),
    }
}

/// A variable of the environment that is set and not empty.
fn environment(variable: &str) -> Option<String> {
    std::env::var(variable).ok().map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        for text in ["org/tiny", "Qwen/Qwen2.5-0.5B", "a/b@v1.0", "a/b@refs/pr/1", "a/b@0123abc", "a_b/c"] {
            assert_eq!(HubName::parse(text).unwrap().to_string(), text);
        }
        let others = "tiny ./tiny ../tiny /org/tiny org/tiny/ org//tiny org/ /tiny a/b/c a--b/c a/.b a/..b a/b..c a/b@ a/b@../c \
                      a/b@/c a/b@c/.d a/b@c@d a\\b/c a/b:c a/ü";
        for text in others.split_whitespace() {
            assert_eq!(HubName::parse(text), None, "{text}");
        }
        assert_eq!(HubName::parse("a/b c"), None);
    }

    #[test]
    fn a_path_that_is_there_or_is_no_name_stays_as_it_is() {
        for path in ["src/remote", "no/such/folder", "./nothing", "absent"] {
            assert_eq!(folder(Path::new(path)).unwrap(), Path::new(path));
            assert_eq!(name_of(Path::new(path)), None);
        }
    }

    #[test]
    fn a_file_of_the_cache_says_of_which_commit_it_is() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let file = PathBuf::from(format!("/cache/models--org--tiny-1/snapshots/{commit}/config.json"));
        assert_eq!(commit_of(&file).unwrap().to_string(), format!("org/tiny-1@{commit}"));
        let file = PathBuf::from(format!(
            "/cache/datasets--org--rows/snapshots/{commit}/data/en/train-00000-of-00001.parquet"
        ));
        let found = commit_of(&file).unwrap();
        assert_eq!((found.kind, found.to_string()), (Kind::Dataset, format!("org/rows@{commit}")));
        for other in ["models/tiny/config.json", "config.json", "models--a--b/snapshots/main/config.json"] {
            assert_eq!(commit_of(Path::new(other)), None);
        }
    }
}
