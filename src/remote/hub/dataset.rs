//! Data sets of the hub: what is in one at a commit, and those of its files that are asked for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::cache::Place;
use super::listing::Listing;
use super::transfer::{Hub, Patience, Unanswered};
use super::{HubName, endpoint, fetch_blob, is_offline, wait};
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;

/// The data sets that this process has looked up: all that use one use the same commit of it.
static FOUND: Mutex<BTreeMap<HubName, Arc<Dataset>>> = Mutex::new(BTreeMap::new());

/// Folders within folders of a snapshot that are looked at.
const DEEPEST: usize = 16;

/// A data set at a commit.
#[derive(Debug)]
pub struct Dataset {
    name: HubName,
    place: Place,
    commit: String,
    /// What the hub lists; without it, what the cache holds counts.
    listing: Option<Listing>,
}

impl Dataset {
    /// Asks the hub what is in a data set, or the cache where the hub is not to be asked or does not answer.
    ///
    /// # Errors
    /// Where there is no such data set, or it may not be read.
    pub fn open(name: &HubName) -> Result<Arc<Self>> {
        let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(dataset) = found.get(name) {
            return Ok(dataset.clone());
        }
        let dataset = Arc::new(Self::find(name)?);
        found.insert(name.clone(), dataset.clone());
        Ok(dataset)
    }

    fn find(name: &HubName) -> Result<Self> {
        let place = Place::of(name)?;
        let in_cache = || place.commit().filter(|commit| place.snapshot(commit).is_dir());
        let dataset = |place: Place, commit, listing| Dataset { name: name.clone(), place, commit, listing };
        if is_offline() {
            let Some(commit) = in_cache() else {
                bail!(
                    "{name}: no such file or folder, and the cache in {} holds nothing of a data set of this name, while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids asking the hub; give a file or folder, or unset the variable to fetch the data set",
                    place.cache().display()
                );
            };
            return Ok(dataset(place, commit, None));
        }
        let (endpoint, token) = (endpoint()?, place.token()?);
        let answer =
            wait(async { Ok::<_, Error>(Hub::new(endpoint, token, &Patience::default())?.listing(name).await) })??;
        match answer {
            Ok(listing) => Ok(dataset(place, listing.commit.clone(), Some(listing))),
            Err(Unanswered::Refused(error)) => Err(error),
            Err(Unanswered::Silent(reason)) => match in_cache() {
                Some(commit) => {
                    eprintln!(
                        "warning: {name}: {reason}; uses what the cache holds of it, {}",
                        place.snapshot(&commit).display()
                    );
                    Ok(dataset(place, commit, None))
                }
                None => bail!(
                    "{name}: no such file or folder, and of the hub's data set of this name nothing could be learned: {reason}; check the name, the network and HF_ENDPOINT, or give a file or folder"
                ),
            },
        }
    }

    /// What it is called.
    pub fn name(&self) -> &HubName {
        &self.name
    }

    /// The commit, 40 hexadecimal digits.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// The paths of its files; without the hub, of those in the cache.
    pub fn files(&self) -> Vec<String> {
        match &self.listing {
            Some(listing) => listing.names().map(str::to_owned).collect(),
            None => {
                let mut found = Vec::new();
                below(&self.place.snapshot(&self.commit), "", DEEPEST, &mut found);
                found.sort();
                found
            }
        }
    }

    /// A small file of text, if it is there.
    ///
    /// # Errors
    /// Where it cannot be fetched, or is no text.
    pub fn text(&self, file: &str) -> Result<Option<String>> {
        if !self.files().iter().any(|name| name == file) {
            return Ok(None);
        }
        let paths = self.fetch(&[file.to_owned()])?;
        paths.first().map(|path| limits::read_text(path, limits::SMALL_FILE)).transpose()
    }

    /// Brings files into the cache. None of them is in the snapshot before all are whole, so that a part of a split is never taken for the split.
    ///
    /// # Errors
    /// Where one cannot be fetched as the hub lists it.
    pub fn fetch(&self, files: &[String]) -> Result<Vec<PathBuf>> {
        let snapshot = self.place.snapshot(&self.commit);
        let paths: Vec<PathBuf> = files.iter().map(|file| snapshot.join(file)).collect();
        let Some(listing) = &self.listing else { return Ok(paths) };
        let name = &self.name;
        let mut missing = Vec::new();
        for file in files {
            let Some(blob) = listing.blob(file) else {
                bail!("{name}: the hub gives no size and digest of {file}; check that HF_ENDPOINT is a hub");
            };
            if !self.place.has(&self.commit, file, blob) {
                missing.push((file, blob));
            }
        }
        if !missing.is_empty() {
            let (endpoint, token) = (endpoint()?, self.place.token()?);
            wait(async {
                let hub = Hub::new(endpoint, token, &Patience::default())?;
                for (file, blob) in &missing {
                    let _lock = self.place.lock(blob, file)?;
                    fetch_blob(&hub, name, &self.place, &self.commit, file, blob).await?;
                }
                Ok::<(), Error>(())
            })??;
            for (file, blob) in missing {
                self.place.link(&self.commit, file, blob)?;
            }
        }
        self.place.note(&self.commit)?;
        Ok(paths)
    }
}

/// Adds the files below a folder, by their paths in it; hidden ones are left out.
fn below(folder: &Path, prefix: &str, depth: usize, found: &mut Vec<String>) {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        if name.starts_with('.') {
            continue;
        }
        match path.is_dir() {
            true if depth > 0 => below(&path, &format!("{prefix}{name}/"), depth - 1, found),
            true => {}
            false => found.push(format!("{prefix}{name}")),
        }
    }
}
