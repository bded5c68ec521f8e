//! The files that a URL with a pattern or of a folder names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt};
use object_store::path::Path as Key;
use object_store::{ObjectMeta, ObjectStoreExt};

use super::location::Location;
use super::{RemoteFile, register};
use crate::bail;
use crate::error::{Error, Result};

/// Objects of a listing that are looked at.
const MOST_OBJECTS: usize = 1_000_000;
/// What makes a name a pattern.
const WILDCARDS: [char; 3] = ['*', '?', '['];

/// The files that a URL names, sorted, and the `README.md` of a folder: one file; all below a folder whose names are those of data files, hidden ones left out; or those that match a
/// pattern with `*`, `?` or `[…]`, as `s3://bucket/train-*.parquet`. A web server cannot tell what it holds: there, one file.
///
/// # Errors
/// Where the URL is none of these, where the store cannot be read, or holds no such file.
pub fn files(url: &str, is_data_file: fn(&Path) -> bool) -> Result<(Vec<PathBuf>, Option<PathBuf>)> {
    let location = Location::parse(url)?;
    let is_pattern = location.path.contains(WILDCARDS);
    if location.is_web() {
        if is_pattern || location.path.is_empty() || location.path.ends_with('/') {
            bail!("{url}: a web server cannot tell which files it holds; name one file, or several in a mixture");
        }
        return Ok((vec![PathBuf::from(location.url())], None));
    }
    let (mut found, readme) = match is_pattern {
        true => (matching(&location)?, None),
        false => match one(&location)? {
            Some(file) => return Ok((vec![file], None)),
            None => below(&location, is_data_file)?,
        },
    };
    found.sort();
    Ok((found, readme))
}

/// The file of this very name, if there is one.
fn one(location: &Location) -> Result<Option<PathBuf>> {
    if location.path.is_empty() || location.path.ends_with('/') {
        return Ok(None);
    }
    let (store, key) = (location.store()?, location.key()?);
    match location.ask(store.head(&key))? {
        Ok(object) => Ok(Some(register(RemoteFile::new(location.clone(), key, store, object)))),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(location.error(&error)),
    }
}

fn below(location: &Location, is_data_file: fn(&Path) -> bool) -> Result<(Vec<PathBuf>, Option<PathBuf>)> {
    let folder = location.key()?;
    let readme = folder.clone().join("README.md");
    let mut found = list(location, &folder, |key| {
        let Some(parts) = key.prefix_match(&folder) else { return false };
        let is_hidden = parts.into_iter().any(|part| part.as_ref().starts_with('.'));
        !is_hidden && is_data_file(Path::new(key.as_ref())) || *key == readme
    })?;
    let readme = found.iter().position(|file| file.ends_with("README.md")).map(|at| found.remove(at));
    if found.is_empty() {
        bail!(
            "{}: there is no such file, and no data file below it (.parquet, .jsonl, .csv, .arrow and others); name a file, or a folder that has one",
            location.url()
        );
    }
    Ok((found, readme))
}

fn matching(location: &Location) -> Result<Vec<PathBuf>> {
    let pattern = glob::Pattern::new(&location.path)
        .map_err(|error| Error::input(format!("{}: not a valid file pattern: {error}", location.url())))?;
    // Stores list what lies below a folder.
    let plain = location.path.split(WILDCARDS).next().unwrap_or_default();
    let folder = location.sibling(plain.rsplit_once('/').map_or("", |(folder, _)| folder)).key()?;
    let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::default() };
    let found = list(location, &folder, |key| pattern.matches_with(key.as_ref(), options))?;
    if found.is_empty() {
        bail!("{}: no file matches this pattern", location.url());
    }
    Ok(found)
}

/// The wanted files below a folder.
fn list(location: &Location, folder: &Key, wanted: impl Fn(&Key) -> bool) -> Result<Vec<PathBuf>> {
    let store = location.store()?;
    let prefix = (!folder.as_ref().is_empty()).then_some(folder);
    let objects = store.list(prefix).take(MOST_OBJECTS + 1).try_collect();
    let listed: Vec<ObjectMeta> = location.ask(objects)?.map_err(|error| location.error(&error))?;
    if listed.len() > MOST_OBJECTS {
        bail!("{}: there are more than {MOST_OBJECTS} files below it; name a folder with fewer", location.url());
    }
    // Some programs mark a folder by an empty file of its name.
    let is_marker = |object: &ObjectMeta| {
        let folder = format!("{}/", object.location);
        object.size == 0 && listed.iter().any(|other| other.location.as_ref().starts_with(&folder))
    };
    let files = listed.iter().filter(|object| wanted(&object.location) && !is_marker(object));
    Ok(files
        .map(|object| {
            // What the listing tells of a file need not be asked for again.
            let (key, file) = (object.location.clone(), location.sibling(object.location.as_ref()));
            register(RemoteFile::new(file, key, Arc::clone(&store), object.clone()))
        })
        .collect())
}
