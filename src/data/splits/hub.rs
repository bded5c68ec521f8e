//! Data sets of the Hugging Face hub by name: which of their files are read.
//!
//! `organisation/name`, `organisation/name:configuration`, `organisation/name:configuration/split`, each also with `@revision`. Configurations and splits are
//! those that the data set's `README.md` declares, or else those that the names of its files tell: `data/train-00000-of-00001.parquet`,
//! `configuration/train-00000-of-00001.parquet`, `configuration/train/0000.parquet`. Where the repository holds no file of rows, the Parquet files are read to
//! which the hub has converted it, in the branch `refs/convert/parquet`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use super::configurations::{Configuration, PARTIAL, declared, default, split_of};
use super::{Kind, Split, Wanted, note_missing};
use crate::bail;
use crate::data::{form, notes};
use crate::error::{Error, Result};
use crate::remote::hub::{Dataset, HubName};

/// The branch of the hub's own conversions.
const CONVERTED: &str = "refs/convert/parquet";

/// A data set of the hub as the user calls it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HubData {
    name: HubName,
    configuration: Option<String>,
    split: Option<String>,
}

impl fmt::Display for HubData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HubData { name: HubName { repository, revision, .. }, configuration, split } = self;
        f.write_str(repository)?;
        configuration.iter().try_for_each(|configuration| write!(f, ":{configuration}"))?;
        split.iter().try_for_each(|split| write!(f, "/{split}"))?;
        revision.iter().try_for_each(|revision| write!(f, "@{revision}"))
    }
}

impl HubData {
    /// Reads a name; `None` for what cannot be one, and for names of files.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let (repository, choice) = match name.split_once(':') {
            Some((repository, choice)) => (repository, Some(choice)),
            None => (name, None),
        };
        let (configuration, split) = match choice.map(|choice| choice.split_once('/')) {
            Some(Some((configuration, split))) => (Some(configuration), Some(split)),
            Some(None) => (choice, None),
            None => (None, None),
        };
        let is_name = |part: &&str| {
            !part.is_empty()
                && !part.starts_with('.')
                && !part.contains(['/', '\\', ':', '*'])
                && !part.contains(char::is_control)
        };
        let is_choice = configuration.iter().chain(&split).all(is_name);
        if !is_choice || form::is_data_file(Path::new(repository)) {
            return None;
        }
        let name = match revision {
            Some(revision) => HubName::of_dataset(&format!("{repository}@{revision}")),
            None => HubName::of_dataset(repository),
        };
        Some(HubData { name: name?, configuration: configuration.map(str::to_owned), split: split.map(str::to_owned) })
    }

    /// The files of the split that is asked for, in the cache.
    ///
    /// # Errors
    /// Where there is no such data set, or it has no such configuration or split, or several of which none was chosen.
    pub(crate) fn files(&self, wanted: Wanted) -> Result<Vec<PathBuf>> {
        let mut dataset = Dataset::open(&self.name)?;
        let has_rows = |dataset: &Dataset| dataset.files().iter().any(|file| form::is_data_file(Path::new(file)));
        if !has_rows(&dataset) && self.name.revision.is_none() {
            let name = HubName { revision: Some(CONVERTED.to_owned()), ..self.name.clone() };
            dataset = Dataset::open(&name).map_err(|error| {
                Error::input(format!(
                    "{self}: the data set's repository holds no file of rows, and the hub's Parquet copy of it cannot be had ({error}); {}",
                    form::KNOWN
                ))
            })?;
        }
        let readme = dataset.text("README.md")?;
        let Choice { files, configuration, split } = self.choose(&dataset.files(), readme.as_deref(), wanted)?;
        let paths = dataset.fetch(&files)?;
        let count = notes::files_of(files.len());
        note_missing(&self.to_string(), &files);
        let part = split.strip_prefix(PARTIAL);
        let shown = part.unwrap_or(&split);
        notes::add(format!(
            "{self}: reads configuration {configuration}, split {shown}, {count}, of {}@{}",
            self.name.repository,
            dataset.commit()
        ));
        if part.is_some() {
            notes::add(format!(
                "{self}: the hub has converted only the first part of split {shown}, which is what is read"
            ));
        }
        Ok(paths)
    }

    fn choose(&self, files: &[String], readme: Option<&str>, wanted: Wanted) -> Result<Choice> {
        let found: Vec<String> = files.iter().filter(|file| form::is_data_file(Path::new(file))).cloned().collect();
        if found.is_empty() {
            bail!("{self}: the data set holds no file of rows; {}", form::KNOWN);
        }
        let mut all = readme.map_or_else(Vec::new, |readme| declared(&self.to_string(), &found, readme));
        if all.is_empty() {
            all = by_names(&self.to_string(), found)?;
        }
        let default = default(&all);
        let (configuration, split) = match (&self.configuration, &self.split) {
            (None, _) => (default, None),
            (Some(name), split) => match all.iter().find(|configuration| configuration.name == *name) {
                Some(configuration) => (Some(configuration), split.as_ref()),
                // What stands alone may be a split.
                None if split.is_none() && default.is_some_and(|default| default.find(name).is_some()) => {
                    (default, Some(name))
                }
                None => (None, None),
            },
        };
        let Some(configuration) = configuration else {
            let names: Vec<&str> = all.iter().map(|configuration| configuration.name.as_str()).collect();
            bail!(
                "{self}: the data set has the configurations {}; name one, as {}:{}",
                names.join(", "),
                self.name.repository,
                names[0]
            );
        };
        let Some((split, files)) = configuration.split(split.map(String::as_str), wanted) else {
            let names: Vec<&str> =
                configuration.splits.keys().map(|name| name.strip_prefix(PARTIAL).unwrap_or(name)).collect();
            bail!(
                "{self}: configuration {} has the splits {}; name one, as {}:{}/{}",
                configuration.name,
                names.join(", "),
                self.name.repository,
                configuration.name,
                names[0]
            );
        };
        Ok(Choice { files: files.clone(), configuration: configuration.name.clone(), split: split.clone() })
    }
}

/// The files that are read.
#[derive(Debug, PartialEq)]
struct Choice {
    files: Vec<String>,
    configuration: String,
    split: String,
}

/// The configurations that the names of files tell: of several forms, Parquet counts.
fn by_names(label: &str, files: Vec<String>) -> Result<Vec<Configuration>> {
    let is_parquet = |file: &String| form::has_extension(Path::new(file), "parquet");
    let files = match files.iter().any(is_parquet) {
        true => {
            let (files, left_out): (Vec<String>, Vec<String>) = files.into_iter().partition(is_parquet);
            if !left_out.is_empty() {
                notes::add(format!("{label}: reads its Parquet files, and leaves out {}", notes::listed(&left_out)));
            }
            files
        }
        false => form::of_one_form(label, files)?,
    };
    let mut all: BTreeMap<String, Configuration> = BTreeMap::new();
    for file in files {
        let (configuration, split) = match file.split_once('/') {
            Some((folder, rest)) if folder != "data" && Kind::of(folder).is_none() => match rest.split_once('/') {
                // The hub's conversions: configuration/split/0000.parquet.
                Some((split, number)) if number.starts_with(|c: char| c.is_ascii_digit()) => (folder, split.to_owned()),
                _ if Split::of(rest).kind.is_some() => (folder, split_of(rest)),
                _ => ("default", split_of(&file)),
            },
            _ => ("default", split_of(&file)),
        };
        let new = || Configuration {
            name: configuration.to_owned(),
            is_default: configuration == "default",
            ..Default::default()
        };
        all.entry(configuration.to_owned()).or_insert_with(new).splits.entry(split).or_default().push(file);
    }
    Ok(all.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(name: &str, files: &[&str], readme: Option<&str>, wanted: Wanted) -> std::result::Result<String, String> {
        let files: Vec<String> = files.iter().map(|file| file.to_string()).collect();
        let choice = HubData::parse(name).unwrap().choose(&files, readme, wanted);
        choice.map(|Choice { files, .. }| files.join(" ")).map_err(|error| error.to_string())
    }

    #[test]
    fn names_are_told_from_paths() {
        for text in
            ["org/rows", "org/rows:en", "org/rows:en/train", "org/rows:en/train@main", "a/b@refs/pr/1", "a/b.c:2020-01"]
        {
            assert_eq!(HubData::parse(text).unwrap().to_string(), text);
        }
        for text in [
            "rows",
            "./rows",
            "data/train.parquet",
            "data/a.jsonl",
            "data/*.csv",
            "a/b:",
            "a/b:/x",
            "a/b:x/",
            "a/b:x/y/z",
            "a/b/c",
            "org/rows:.x",
        ] {
            assert_eq!(HubData::parse(text), None, "{text}");
        }
    }

    #[test]
    fn splits_are_told_by_the_hubs_names() {
        let files = [
            "README.md",
            "data/test-00000-of-00001-ab.parquet",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
        ];
        let train = "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet";
        assert_eq!(chosen("a/b", &files, None, Wanted::Training).unwrap(), train);
        assert_eq!(chosen("a/b", &files, None, Wanted::Evaluation).unwrap(), files[1]);
        assert_eq!(chosen("a/b:test", &files, None, Wanted::Training).unwrap(), files[1]);
        assert_eq!(chosen("a/b:default/test", &files, None, Wanted::Training).unwrap(), files[1]);
        let error = chosen("a/b:default/dev", &files, None, Wanted::Training).unwrap_err();
        assert!(
            error.contains("configuration default has the splits test, train; name one, as a/b:default/test"),
            "{error}"
        );
        assert_eq!(chosen("a/b", &["rows.jsonl", "dataset_info.json"], None, Wanted::Training).unwrap(), "rows.jsonl");
        assert_eq!(chosen("a/b", &["train.csv", "test.csv"], None, Wanted::Evaluation).unwrap(), "test.csv");
        assert_eq!(chosen("a/b", &["train.csv", "train.parquet"], None, Wanted::Training).unwrap(), "train.parquet");
        assert!(chosen("a/b", &["a.png"], None, Wanted::Training).unwrap_err().contains("holds no file of rows"));
    }

    #[test]
    fn folders_are_configurations_and_one_must_be_named() {
        let files = [
            "en/train-00000-of-00001.parquet",
            "fr/train-00000-of-00001.parquet",
            "fr/validation-00000-of-00001.parquet",
        ];
        let error = chosen("a/b", &files, None, Wanted::Training).unwrap_err();
        assert_eq!(error, "a/b: the data set has the configurations en, fr; name one, as a/b:en");
        assert!(chosen("a/b:de", &files, None, Wanted::Training).unwrap_err().contains("the configurations en, fr"));
        assert_eq!(chosen("a/b:fr", &files, None, Wanted::Training).unwrap(), files[1]);
        assert_eq!(chosen("a/b:fr", &files, None, Wanted::Evaluation).unwrap(), files[2]);
        assert_eq!(chosen("a/b:fr/validation", &files, None, Wanted::Training).unwrap(), files[2]);
        let converted = ["en/partial-train/0000.parquet", "en/partial-train/0001.parquet", "en/test/0000.parquet"];
        assert_eq!(chosen("a/b", &converted, None, Wanted::Training).unwrap(), converted[..2].join(" "));
        assert_eq!(chosen("a/b:en/train", &converted, None, Wanted::Training).unwrap(), converted[..2].join(" "));
        assert_eq!(chosen("a/b:test", &converted, None, Wanted::Training).unwrap(), converted[2]);
    }

    #[test]
    fn what_the_readme_declares_counts() {
        let files = ["a/one.jsonl", "a/two.jsonl", "b/x.csv", "train.parquet"];
        let readme = "---\nconfigs:\n- config_name: first\n  data_files:\n  - split: train\n    path: a/o*\n  - split: test\n    path: a/t*\n- config_name: second\n  data_files: b/*.csv\n- config_name: third\n  data_dir: b\n---\n";
        let error = chosen("a/b", &files, Some(readme), Wanted::Training).unwrap_err();
        assert!(error.contains("configurations first, second, third"), "{error}");
        for (name, expected) in [
            ("a/b:first", "a/one.jsonl"),
            ("a/b:first/test", "a/two.jsonl"),
            ("a/b:second", "b/x.csv"),
            ("a/b:third", "b/x.csv"),
        ] {
            assert_eq!(chosen(name, &files, Some(readme), Wanted::Training).unwrap(), expected, "{name}");
        }
        let with_default = readme.replace("- config_name: second\n", "- config_name: second\n  default: true\n");
        assert_eq!(chosen("a/b", &files, Some(&with_default), Wanted::Training).unwrap(), "b/x.csv");
        assert_eq!(chosen("a/b", &files, Some("---\nlicense: mit\n---\n"), Wanted::Training).unwrap(), "train.parquet");
    }
}
