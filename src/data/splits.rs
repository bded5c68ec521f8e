//! Which files of a folder are read where their names, or the folder's `README.md`, tell splits apart.
//!
//! The words that name a split are those of Hugging Face `datasets`: `train` and `training`; `validation`,
//! `valid`, `val` and `dev`; `test`, `testing`, `eval` and `evaluation`. A word is a part of a path between
//! `/`, `-`, `_`, `.`, spaces and digits, so that `contest.parquet` is of no split. The name of a file counts
//! over those of the folders around it.

mod configurations;
mod hub;
mod readme;

use std::collections::{BTreeMap, BTreeSet};

use super::notes::{self, files_of, listed};
use crate::bail;
use crate::error::Result;
pub(crate) use hub::HubData;

/// What data are wanted for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wanted {
    /// To learn from, or for a program that knows no other purpose: the training split.
    #[default]
    Training,
    /// To evaluate on: the validation split, or the test split where there is none.
    Evaluation,
    /// All that is there: names do not tell splits apart.
    All,
}

impl Wanted {
    fn purpose(self) -> &'static str {
        match self {
            Wanted::Training => "to learn from",
            Wanted::Evaluation => "to evaluate on",
            Wanted::All => "as a whole",
        }
    }
}

/// A pattern that names data, and what they are wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern<'a> {
    /// A file, a folder or a glob, here or in an object store.
    pub text: &'a str,
    /// What for: it chooses among the splits of a folder.
    pub wanted: Wanted,
}

impl<'a> Pattern<'a> {
    /// Data to evaluate on.
    pub fn evaluation(text: &'a str) -> Self {
        Pattern { text, wanted: Wanted::Evaluation }
    }

    /// Data of which nothing is left out, as answers of several models, a file each.
    pub fn all(text: &'a str) -> Self {
        Pattern { text, wanted: Wanted::All }
    }
}

impl<'a> From<&'a str> for Pattern<'a> {
    fn from(text: &'a str) -> Self {
        Pattern { text, wanted: Wanted::Training }
    }
}

impl<'a> From<&'a String> for Pattern<'a> {
    fn from(text: &'a String) -> Self {
        text.as_str().into()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Training,
    Validation,
    Test,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Kind::Training => "train",
            Kind::Validation => "validation",
            Kind::Test => "test",
        }
    }

    fn of_word(word: &str) -> Option<Self> {
        match word {
            "train" | "training" => Some(Kind::Training),
            "validation" | "valid" | "val" | "dev" => Some(Kind::Validation),
            "test" | "testing" | "eval" | "evaluation" | "holdout" | "heldout" => Some(Kind::Test),
            _ => None,
        }
    }

    /// The first word of a name that is one of a split.
    fn of(name: &str) -> Option<Self> {
        let name = name.to_lowercase();
        name.split(|c: char| "-_. /".contains(c) || c.is_ascii_digit()).find_map(Kind::of_word)
    }
}

/// The split that a file belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Split {
    kind: Option<Kind>,
    /// Its name where it is more than the word, as `train_sft` in `train_sft-00000-of-00001.parquet`.
    name: String,
}

impl Split {
    /// By the path of a file in its folder.
    fn of(path: &str) -> Self {
        let (folders, file) = path.rsplit_once('/').unwrap_or(("", path));
        let kind = Kind::of(file).or_else(|| folders.rsplit('/').find_map(Kind::of));
        let name = Shard::of(file).map(|shard| shard.name).filter(|name| Kind::of(name).is_some());
        let name = name.or(kind.map(Kind::word)).unwrap_or_default();
        Split { kind, name: name.to_owned() }
    }

    fn named(name: &str) -> Self {
        Split { kind: Kind::of(name), name: name.to_owned() }
    }

    fn shown(&self) -> &str {
        if self.name.is_empty() { "no split" } else { &self.name }
    }
}

/// A file that is one of several of a split: `name-00000-of-00001`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shard<'a> {
    /// What comes before the numbers.
    name: &'a str,
    /// Counted from 0.
    number: usize,
    /// How many there are of the split.
    count: usize,
}

impl<'a> Shard<'a> {
    /// By the name or the path of a file.
    fn of(file: &'a str) -> Option<Self> {
        let (before, after) = file.rsplit_once("-of-")?;
        let (name, number) = before.rsplit_once('-')?;
        let digits = |text: &str| {
            let is_number = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
            is_number.then(|| text.parse().ok()).flatten()
        };
        Some(Shard { name, number: digits(number)?, count: digits(after.get(..5)?)? })
    }
}

/// Notes the splits of which files are missing, by the numbers in the names of those that are there.
fn note_missing(label: &str, files: &[String]) {
    let mut splits: BTreeMap<(&str, usize), BTreeSet<usize>> = BTreeMap::new();
    for Shard { name, number, count } in files.iter().filter_map(|file| Shard::of(file)) {
        splits.entry((name, count)).or_default().insert(number);
    }
    for ((name, count), numbers) in splits {
        if let Some(missing) = (0..count).find(|number| !numbers.contains(number)) {
            let there = numbers.range(..count).count();
            notes::add(format!(
                "{label}: of split {name} {there} of {count} files are there, so a part of it is read; the first that is missing is {name}-{missing:05}-of-{count:05}"
            ));
        }
    }
}

/// Of the files in a folder, by their paths in it with `/` between, those of the split that is wanted; the
/// others, and those that are missing, are named in a note. Where neither `readme`, the text of the folder's
/// `README.md`, nor the names tell splits apart, all of them.
///
/// # Errors
/// Where it cannot be known which files are wanted.
pub(crate) fn chosen(folder: &str, files: Vec<String>, readme: Option<&str>, wanted: Wanted) -> Result<Vec<String>> {
    let read = if wanted == Wanted::All { files } else { of_split(folder, files, readme, wanted)? };
    note_missing(folder, &read);
    Ok(read)
}

fn of_split(folder: &str, files: Vec<String>, readme: Option<&str>, wanted: Wanted) -> Result<Vec<String>> {
    let mut splits: BTreeMap<Split, Vec<String>> = BTreeMap::new();
    let mut left_out = Vec::new();
    let declared = readme.map_or_else(Vec::new, |readme| configurations::declared(folder, &files, readme));
    match configurations::default(&declared) {
        Some(configuration) => {
            let read: BTreeSet<&String> = configuration.splits.values().flatten().collect();
            left_out.extend(files.iter().filter(|file| !read.contains(file)).cloned());
            for (name, files) in &configuration.splits {
                splits.entry(Split::named(name)).or_default().extend(files.iter().cloned());
            }
        }
        None if declared.is_empty() => {
            files.into_iter().for_each(|file| splits.entry(Split::of(&file)).or_default().push(file));
        }
        None => {
            let names: Vec<&str> = declared.iter().map(|configuration| configuration.name.as_str()).collect();
            bail!(
                "{folder}/README.md: declares the configurations {}, none of which is the default; name the files of one, as {folder}/FOLDER/train-*",
                names.join(", ")
            )
        }
    }
    let name = choice(folder, &splits, wanted)?;
    let mut read = Vec::new();
    for (split, files) in splits {
        match name.as_ref().is_none_or(|name| *name == split) {
            true => read.extend(files),
            false => left_out.extend(files),
        }
    }
    if !left_out.is_empty() {
        let split = name.as_ref().map_or("its README's", Split::shown);
        notes::add(format!(
            "{folder}: reads the {} of {split}, and leaves out {}",
            files_of(read.len()),
            listed(&left_out)
        ));
    }
    Ok(read)
}

/// The one split that is read; `None` where all are.
fn choice(folder: &str, splits: &BTreeMap<Split, Vec<String>>, wanted: Wanted) -> Result<Option<Split>> {
    let kinds: BTreeSet<Option<Kind>> = splits.keys().map(|split| split.kind).collect();
    if kinds.len() < 2 {
        let is_other = |kind: &Kind| (*kind == Kind::Training) == (wanted == Wanted::Evaluation);
        if let Some(Some(kind)) = kinds.first().map(|kind| kind.filter(is_other)) {
            notes::add(format!("{folder}: holds the split {} alone, which is read {}", kind.word(), wanted.purpose()));
        }
    }
    if splits.len() < 2 || kinds.iter().all(Option::is_none) {
        return Ok(None);
    }
    let order: &[Option<Kind>] = match wanted {
        // Files without the name of a split next to those of a test are what to learn from.
        Wanted::Training => &[Some(Kind::Training), None],
        Wanted::Evaluation => &[Some(Kind::Validation), Some(Kind::Test)],
        Wanted::All => return Ok(None),
    };
    let of_kind = |kind: &Option<Kind>| {
        let of_kind: Vec<&Split> = splits.keys().filter(|split| split.kind == *kind).collect();
        Some(of_kind).filter(|of_kind| !of_kind.is_empty())
    };
    let found = order.iter().find_map(of_kind);
    let is_plain = |split: &&&Split| split.kind.is_some_and(|kind| kind.word() == split.name);
    match found.as_deref() {
        Some([split]) => return Ok(Some(Split::clone(split))),
        Some(several) if several.iter().any(|split| is_plain(&split)) => {
            return Ok(several.iter().find(is_plain).map(|split| Split::clone(split)));
        }
        _ => {}
    }
    let several = found.unwrap_or_else(|| splits.keys().collect());
    let names: Vec<&str> = several.iter().map(|split| split.shown()).collect();
    let example = splits[several[0]].first().map_or("", String::as_str);
    bail!(
        "{folder}: the folder holds the splits {}, of which it is not known which one is wanted {}; name its files, as {folder}/{}",
        names.join(", "),
        wanted.purpose(),
        glob_of(example)
    )
}

/// A pattern for the files of the same split.
fn glob_of(file: &str) -> String {
    let (folders, name) = file.rsplit_once('/').map_or((String::new(), file), |(at, name)| (format!("{at}/"), name));
    match Shard::of(name) {
        Some(shard) => format!("{folders}{}-*", shard.name),
        None => format!("{folders}{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(files: &[&str], wanted: Wanted) -> Result<Vec<String>> {
        chosen("hub", files.iter().map(|file| file.to_string()).collect(), None, wanted)
    }

    fn training(files: &[&str]) -> Vec<String> {
        read(files, Wanted::Training).unwrap()
    }

    #[test]
    fn the_training_split_is_read_alone_in_every_layout() {
        for (train, others) in [
            (
                "data/train-00000-of-00001.parquet",
                &["data/test-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"][..],
            ),
            ("train.parquet", &["dev.parquet"]),
            ("train/part-0.parquet", &["test/part-0.parquet", "valid/part-0.parquet"]),
            ("a/Train_1.parquet", &["a/VAL_1.parquet"]),
            ("squad-train-v1.1.parquet", &["squad-dev-v1.1.parquet"]),
            ("training.parquet", &["testing.parquet", "valid.parquet"]),
            ("data.parquet", &["data_test.parquet"]),
        ] {
            let all = [&[train], others].concat();
            assert_eq!(training(&all), [train]);
            let evaluation = read(&all, Wanted::Evaluation).unwrap();
            assert!(evaluation.len() == 1 && others.contains(&evaluation[0].as_str()), "{evaluation:?}");
        }
    }

    #[test]
    fn plain_parts_and_single_splits_are_read_whole() {
        for files in [
            &["part-0.parquet", "part-1.parquet"][..],
            &["a/contest.parquet", "b/latest.parquet"],
            &["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            &["test-0.parquet", "test-1.parquet"],
            &["en-00000-of-00001.parquet", "fr-00000-of-00001.parquet"],
        ] {
            assert_eq!(training(files), files);
            assert_eq!(read(files, Wanted::Evaluation).unwrap(), files);
        }
    }

    #[test]
    fn of_several_training_splits_the_one_called_train_is_read_and_else_one_must_be_named() {
        assert_eq!(
            training(&["train-00000-of-00001.parquet", "train_small-00000-of-00001.parquet"]),
            ["train-00000-of-00001.parquet"]
        );
        let files = [
            "data/train_prefs-00000-of-00001.parquet",
            "data/train_sft-00000-of-00001.parquet",
            "data/test_sft-00000-of-00001.parquet",
        ];
        let error = read(&files, Wanted::Training).unwrap_err().to_string();
        assert!(error.contains("train_prefs, train_sft") && error.ends_with("hub/data/train_prefs-*"), "{error}");
        assert_eq!(read(&files, Wanted::Evaluation).unwrap(), [files[2]]);
        let error = read(&["test.parquet", "dev.parquet"], Wanted::Training).unwrap_err().to_string();
        assert!(error.contains("to learn from"), "{error}");
    }

    #[test]
    fn files_that_are_missing_of_a_split_are_noted() {
        let files = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let shards = files(&["data/train-00000-of-00003-ab.parquet", "data/train-00002-of-00003-cd.parquet"]);
        assert_eq!(chosen("parts", shards.clone(), None, Wanted::Training).unwrap(), shards);
        let note = "parts: of split data/train 2 of 3 files are there, so a part of it is read; the first that is missing is data/train-00001-of-00003";
        assert!(notes::was_added(note));
        let whole = files(&["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00001-of-00002.csv"]);
        chosen("whole", whole, None, Wanted::Training).unwrap();
        assert!(!notes::was_added("whole: of split"));
        let answers = files(&["a-00001-of-00002.csv", "b.csv"]);
        chosen("all", answers, None, Wanted::All).unwrap();
        assert!(notes::was_added("all: of split a 1 of 2 files are there"));
    }

    #[test]
    fn validation_is_read_before_test_to_evaluate_on() {
        assert_eq!(
            read(&["test.parquet", "train.parquet", "val.parquet"], Wanted::Evaluation).unwrap(),
            ["val.parquet"]
        );
    }

    #[test]
    fn what_a_readme_declares_counts_over_names() {
        let files = || ["a/one.parquet", "a/two.parquet", "b/train.parquet"].map(str::to_owned).to_vec();
        let readme = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/o*\n  - split: test\n    path:\n    - a/t*\n---\n# Text\n";
        let read = |wanted| chosen("hub", files(), Some(readme), wanted).unwrap();
        assert_eq!(read(Wanted::Training), ["a/one.parquet"]);
        assert_eq!(read(Wanted::Evaluation), ["a/two.parquet"]);
        let folder = "---\nconfigs:\n- config_name: x\n  data_dir: b\n---\n";
        assert_eq!(chosen("hub", files(), Some(folder), Wanted::Training).unwrap(), ["b/train.parquet"]);
        let several = "---\nconfigs:\n- config_name: x\n  data_dir: b\n- config_name: y\n  data_files: a/*\n---\n";
        let error = chosen("hub", files(), Some(several), Wanted::Training).unwrap_err().to_string();
        assert!(error.contains("the configurations x, y, none of which is the default"), "{error}");
    }
}
