//! Which files a pattern names.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::form::{self, is_data_file};
use super::splits::{self, HubData, Pattern, Wanted};
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;
use crate::remote::objects;

/// The files of rows that `pattern` names, sorted: a file; a folder (every data file below it by its name,
/// see `is_data_file`, hidden ones left out; of one with several splits the split that is wanted, see
/// [`splits`]); a glob (`data/train-*.parquet`); each here or in an object store (see [`objects::files`]);
/// or, where nothing here has this name, a data set of the Hugging Face hub.
///
/// # Errors
/// Where there are no such files, it is not known which ones are wanted, or a folder's `README.md`, which may
/// tell, cannot be read.
pub fn files<'p>(pattern: impl Into<Pattern<'p>>) -> Result<Vec<PathBuf>> {
    let Pattern { text: pattern, wanted } = pattern.into();
    if objects::is_remote(pattern) {
        let (found, readme) = objects::files(pattern, is_data_file)?;
        let mut found = if found.len() > 1 { form::of_one_form(pattern, found)? } else { found };
        let readme = readme.map(|file| objects::read_text(&file, limits::SMALL_FILE)).transpose()?;
        of_split(pattern, &mut found, readme.as_deref(), wanted)?;
        return Ok(found);
    }
    let path = Path::new(pattern);
    let mut found = Vec::new();
    if path.is_dir() {
        files_below(path, &mut found)?;
        found = form::of_one_form(pattern, found)?;
        if found.is_empty() {
            bail!("{pattern}: the folder holds no data file; {}", form::KNOWN);
        }
        let readme = Some(path.join("README.md")).filter(|readme| readme.is_file());
        let readme = readme.map(|readme| limits::read_text(readme, limits::SMALL_FILE)).transpose()?;
        of_split(pattern, &mut found, readme.as_deref(), wanted)?;
    } else if path.exists() {
        found.push(path.to_path_buf());
    } else if let Some(data) = HubData::parse(pattern) {
        return data.files(wanted);
    } else if pattern.contains(['*', '?', '[']) {
        let matches = glob::glob(pattern)
            .map_err(|error| Error::input(format!("{pattern}: not a valid file pattern: {error}")))?;
        for entry in matches {
            let entry = entry.map_err(|error| {
                let path = error.path().to_path_buf();
                Error::io(path)(error.into())
            })?;
            if entry.is_file() {
                found.push(entry);
            }
        }
        if found.is_empty() {
            bail!("{pattern}: no file matches this pattern");
        }
    } else {
        bail!("{pattern}: there is no such file or folder");
    }
    found.sort();
    Ok(found)
}

/// Leaves of the files below a folder those of the split that is wanted; other patterns name their files one
/// by one.
fn of_split(folder: &str, found: &mut Vec<PathBuf>, readme: Option<&str>, wanted: Wanted) -> Result<()> {
    let folder = folder.trim_end_matches('/');
    let within = |file: &PathBuf| {
        let file = file.to_string_lossy().replace('\\', "/");
        Some(file.strip_prefix(folder)?.trim_start_matches('/').to_owned()).filter(|name| !name.is_empty())
    };
    let Some(names) = found.iter().map(within).collect::<Option<Vec<_>>>() else { return Ok(()) };
    let chosen: BTreeSet<String> = splits::chosen(folder, names, readme, wanted)?.into_iter().collect();
    found.retain(|file| within(file).is_some_and(|name| chosen.contains(&name)));
    Ok(())
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in folder.read_dir().map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            continue;
        }
        if path.is_dir() {
            files_below(&path, found)?;
        } else if is_data_file(&path) {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_readme_that_cannot_be_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("train.csv"), "text\na\n").unwrap();
        std::fs::write(folder.path().join("README.md"), b"---\nlicense: \xff\n---\n").unwrap();
        let error = files(folder.path().to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("README.md"), "{error}");
    }
}
