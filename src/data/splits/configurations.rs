//! The configurations of a data set that its `README.md` declares, a folder's here and one of the hub alike.

use std::collections::BTreeMap;

use super::{Kind, Split, Wanted, readme};
use crate::data::notes;

/// Before the name of a split of which only the first part was converted.
pub(super) const PARTIAL: &str = "partial-";

/// A configuration of a data set, with those of its files that are there.
#[derive(Debug, Default)]
pub(super) struct Configuration {
    pub(super) name: String,
    pub(super) is_default: bool,
    /// The files of each split.
    pub(super) splits: BTreeMap<String, Vec<String>>,
}

impl Configuration {
    /// The split of this name, whole or in part.
    pub(super) fn find(&self, split: &str) -> Option<(&String, &Vec<String>)> {
        self.splits.get_key_value(split).or_else(|| self.splits.get_key_value(&format!("{PARTIAL}{split}")))
    }

    /// The split of this name, or the one that is wanted.
    pub(super) fn split(&self, name: Option<&str>, wanted: Wanted) -> Option<(&String, &Vec<String>)> {
        if let Some(name) = name {
            return self.find(name);
        }
        let kinds: &[Kind] = match wanted {
            Wanted::Evaluation => &[Kind::Validation, Kind::Test],
            Wanted::Training | Wanted::All => &[Kind::Training],
        };
        let of_kind = |kind: &Kind| {
            let mut found = self.splits.iter().filter(|(name, _)| Kind::of(name) == Some(*kind));
            self.find(kind.word()).or(found.next().filter(|_| found.next().is_none()))
        };
        kinds.iter().find_map(of_kind).or_else(|| self.splits.iter().next().filter(|_| self.splits.len() == 1))
    }
}

/// The configurations that a README declares, of which files are there. `label` names the data in a note
/// where it declares files and none of them is there.
pub(super) fn declared(label: &str, files: &[String], readme: &str) -> Vec<Configuration> {
    let all = readme::configurations(readme);
    let names_files = all.iter().any(|declared| declared.splits.is_some() || declared.folder.is_some());
    let with_files = all.into_iter().map(|declared| with_files(declared, files));
    let found: Vec<Configuration> = with_files.filter(|configuration| !configuration.splits.is_empty()).collect();
    if found.is_empty() && names_files {
        notes::add(format!(
            "{label}: none of the files that its README.md declares is there, so splits are told by the names of the files"
        ));
    }
    found
}

fn with_files(declared: readme::Declared, files: &[String]) -> Configuration {
    let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let folder = declared.folder.as_deref().map(|folder| folder.trim_start_matches("./").trim_matches('/'));
    // `data_dir: .` is the whole of it.
    let folder_is_all = folder.is_none_or(|folder| matches!(folder, "" | "."));
    for file in files {
        let within = folder
            .filter(|_| !folder_is_all)
            .map(|folder| file.strip_prefix(folder).and_then(|inner| inner.strip_prefix('/')));
        let Some(inner) = within.unwrap_or(Some(file)) else { continue };
        let split = match &declared.splits {
            Some(splits) => {
                let is_of = |patterns: &Vec<String>| patterns.iter().any(|pattern| readme::matches(pattern, inner));
                splits.iter().find(|(_, patterns)| is_of(patterns)).map(|(name, _)| name.clone())
            }
            None => folder.map(|_| split_of(file)),
        };
        if let Some(split) = split {
            splits.entry(split).or_default().push(file.clone());
        }
    }
    Configuration { name: declared.name, is_default: declared.is_default, splits }
}

/// The only configuration, or the one that is read where none is named.
pub(super) fn default(all: &[Configuration]) -> Option<&Configuration> {
    match all {
        [only] => Some(only),
        several => several.iter().find(|configuration| configuration.is_default),
    }
}

/// The split of a file by its name; files without one are to learn from.
pub(super) fn split_of(path: &str) -> String {
    let split = Split::of(path);
    if split.name.is_empty() { Kind::Training.word().to_owned() } else { split.name }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(readme: &str, files: &[&str]) -> Vec<String> {
        let files: Vec<String> = files.iter().map(|file| file.to_string()).collect();
        let all = declared("hub", &files, &format!("---\nconfigs:\n{readme}---\n"));
        let shown = |(split, files): (&String, &Vec<String>)| format!("{split}: {}", files.join(" "));
        all.iter().flat_map(|one| one.splits.iter().map(shown).map(|split| format!("{} {split}", one.name))).collect()
    }

    #[test]
    fn files_are_those_of_patterns_within_the_folder_of_data() {
        let files = ["en/test/a.csv", "en/train/a.csv", "fr/train/a.csv"];
        assert_eq!(
            found("- data_dir: ./en/\n", &files),
            ["default test: en/test/a.csv", "default train: en/train/a.csv"]
        );
        assert_eq!(
            found("- config_name: f\n  data_dir: fr\n  data_files: train/*\n- data_dir: e\n", &files),
            ["f train: fr/train/a.csv"]
        );
        assert_eq!(found("- data_dir: .\n", &files).len(), 2);
    }

    #[test]
    fn files_that_are_declared_and_not_there_are_noted() {
        assert!(declared("gone", &["a.csv".to_owned()], "---\nconfigs:\n- data_files: b.csv\n---\n").is_empty());
        assert!(notes::was_added("gone: none of the files that its README.md declares is there"));
        assert!(declared("other", &["a.csv".to_owned()], "---\nconfigs:\n- config_name: b\n---\n").is_empty());
        assert!(!notes::was_added("other: none"));
    }
}
