//! Which files of a folder hold a model's weights: the rule of `transformers` 5, in one place.
//!
//! 1. the file that `transformers_weights` in `config.json` names;
//! 2. `model.safetensors`, even where an index is there too;
//! 3. the files that `model.safetensors.index.json` names;
//! 4. beyond `transformers`: a whole set of `model-00001-of-0000N.safetensors` without its index, as every
//!    file's header names its tensors.
//!
//! Whatever else looks like weights is refused by its name, so that a folder counts as a bare `config.json`
//! only if it holds no file of weights at all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::bail;
use crate::error::{Error, Result};
use crate::files::warn_once;
use crate::limits;
use crate::model::architecture::shortened;

/// The one file of a model's weights.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Where the weights are in several files: which file holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The endings of files in which others keep weights as pickles.
pub const PICKLES: [&str; 5] = ["bin", "pt", "pth", "pkl", "ckpt"];
/// Other forms of weights.
const OTHER_FORMS: [&str; 10] = ["gguf", "ggml", "h5", "msgpack", "onnx", "ot", "npz", "distcp", "tflite", "nemo"];
/// What the names of folders hold in which training programs keep a model's weights in parts (DeepSpeed,
/// FSDP).
const IN_FOLDERS: [&str; 2] = ["global_step", "_fsdp_"];
/// Files of training programs that have such an ending and hold no weights of a model.
const NO_WEIGHTS: [&str; 7] = [
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.bin",
    "scheduler.pt",
    "scaler.pt",
    "optimizer.safetensors",
];
/// The field of `config.json` that names the file of the weights.
pub const NAMED_IN_CONFIG: &str = "transformers_weights";

/// The files of a model's weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// Their paths, each once.
    pub paths: Vec<PathBuf>,
    /// Where they are shards.
    pub shards: Shards,
}

/// Whether weights are in one file or in several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shards {
    /// One file.
    Single,
    /// Several, and the index says in which of them each tensor is.
    Indexed(BTreeMap<String, String>),
    /// Several without an index: their headers say it.
    ByHeader,
}

/// The files that hold the weights of the model in `folder`; `None` where it holds no file of weights at all.
///
/// # Errors
/// Where there are files of weights, but not those of a whole model, or of a form that is not read: they are
/// named.
pub fn locate(folder: &Path) -> Result<Option<Located>> {
    if let Some(name) = named_in_config(folder)? {
        return match name.ends_with(".index.json") {
            true => indexed(folder, &name).map(Some),
            false => Ok(Some(single(folder, &name))),
        };
    }
    // By name: a link to a file that is not there, as in a cache that was cleared, is no bare folder.
    let names = names(folder)?;
    if names.iter().any(|name| name == SINGLE_FILE) {
        return Ok(Some(single(folder, SINGLE_FILE)));
    }
    if names.iter().any(|name| name == INDEX_FILE) {
        return indexed(folder, INDEX_FILE).map(Some);
    }
    let found: Vec<&String> = names.iter().filter(|name| is_of_weights(name)).collect();
    if found.is_empty() {
        return Ok(None);
    }
    match whole_set(folder, &found)? {
        Some(shards) => {
            let paths = shards.iter().map(|name| folder.join(name)).collect();
            Ok(Some(Located { paths, shards: Shards::ByHeader }))
        }
        None => Err(not_read(folder, &found)),
    }
}

/// The folders within a folder without weights, and those within them, that hold files of weights, by their
/// paths from it.
pub fn weights_below(folder: &Path) -> Vec<String> {
    let below = |folder: &Path, prefix: &str| -> Vec<(PathBuf, String)> {
        let entries = folder.read_dir().into_iter().flatten().flatten();
        let folders = entries.filter(|entry| entry.path().is_dir());
        folders.map(|entry| (entry.path(), format!("{prefix}{}", entry.file_name().to_string_lossy()))).collect()
    };
    let first = below(folder, "");
    let second: Vec<_> = first.iter().flat_map(|(path, name)| below(path, &format!("{name}/"))).collect();
    // What cannot be read is of no use as a hint.
    let has_weights = |path: &Path| names(path).is_ok_and(|names| names.iter().any(|name| is_of_weights(name)));
    let mut found: Vec<String> =
        first.into_iter().chain(second).filter(|(path, _)| has_weights(path)).map(|(_, name)| name).collect();
    found.sort();
    found
}

/// A warning where new weights are made though a folder within holds some.
pub fn warn_of_weights_below(folder: &Path) {
    let below = weights_below(folder);
    if below.is_empty() {
        return;
    }
    let names: Vec<&str> = below.iter().map(String::as_str).collect();
    warn_once(&format!(
        "warning: {}: new weights are made, as there are none next to config.json; those in {} are not read: give that folder if its model is meant",
        folder.display(),
        listed(&names)
    ));
}

/// The error of a folder without weights.
pub fn no_weights(folder: &Path) -> Error {
    let below = weights_below(folder);
    if !below.is_empty() {
        let names: Vec<&str> = below.iter().map(String::as_str).collect();
        return Error::input(format!(
            "{}: there are no weights next to config.json, but there are in {}; expected {SINGLE_FILE}, or {INDEX_FILE} and the files that it names, in \
             this folder: give the folder within if it holds the whole model, or move its weights next to config.json",
            folder.display(),
            listed(&names)
        ));
    }
    Error::input(format!(
        "{}: there are no weights next to config.json; expected {SINGLE_FILE}, or {INDEX_FILE} and the files that it names: fetch the folder whole, or \
         train a model from this config.json with `sft` first",
        folder.display()
    ))
}

fn single(folder: &Path, name: &str) -> Located {
    Located { paths: vec![folder.join(name)], shards: Shards::Single }
}

/// The names of all that is in a folder, in order; of folders only those that hold weights in parts.
fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in folder.read_dir().map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !entry.path().is_dir() || IN_FOLDERS.iter().any(|part| name.contains(part)) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Whether a file of this name holds weights, whole or in part (`model.safetensors.incomplete`).
fn is_of_weights(name: &str) -> bool {
    let name = name.to_lowercase();
    let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
    let is_other = PICKLES.iter().chain(&OTHER_FORMS).any(|other| *other == ending)
        || [".safetensors", ".bin.index.json", ".ckpt."].iter().chain(&IN_FOLDERS).any(|part| name.contains(part));
    is_other && !NO_WEIGHTS.contains(&name.as_str()) && !name.starts_with("rng_state")
}

fn named_in_config(folder: &Path) -> Result<Option<String>> {
    let path = folder.join("config.json");
    if !path.is_file() {
        return Ok(None);
    }
    let text = limits::read_text(&path, limits::SMALL_FILE)?;
    // What else is wrong with the file is told where it is read for its contents.
    let config: Value = serde_json::from_str(&text).unwrap_or_default();
    match config.get(NAMED_IN_CONFIG) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name))
            if limits::is_plain_name(name)
                && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")) =>
        {
            Ok(Some(name.clone()))
        }
        Some(other) => bail!(
            "{}: field \"{NAMED_IN_CONFIG}\" is {}, expected the name of a file of safetensors, or of an index of such files, in this folder",
            path.display(),
            shortened(other)
        ),
    }
}

fn indexed(folder: &Path, name: &str) -> Result<Located> {
    let path = folder.join(name);
    let text = limits::read_text(&path, limits::SMALL_FILE)?;
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_str(&text).map_err(|error| {
        Error::input(format!("{}: expected an index with a \"weight_map\", found: {error}", path.display()))
    })?;
    let mut names: Vec<&String> = index.weight_map.values().collect();
    names.sort();
    names.dedup();
    if let Some(name) = names.iter().find(|name| !limits::is_plain_name(name)) {
        bail!("{}: \"{name}\" is not the name of a file in this folder", path.display());
    }
    let paths = names.iter().map(|name| folder.join(name)).collect();
    Ok(Located { paths, shards: Shards::Indexed(index.weight_map) })
}

/// The number of a shard and of how many it is one: `model-00002-of-00003.safetensors`.
fn shard_number(name: &str) -> Option<(usize, usize)> {
    let (number, of) = name.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-")?;
    Some((number.parse().ok()?, of.parse().ok()?))
}

/// All shards of one set, where every one of them is there.
fn whole_set<'a>(folder: &Path, found: &[&'a String]) -> Result<Option<Vec<&'a str>>> {
    let shards: BTreeMap<(usize, usize), &str> =
        found.iter().filter_map(|name| Some((shard_number(name)?, name.as_str()))).collect();
    let Some(&(_, of)) = shards.keys().next() else { return Ok(None) };
    if shards.keys().any(|&(_, other)| other != of) {
        return Ok(None);
    }
    let missing: Vec<usize> = (1..=of).filter(|&number| !shards.contains_key(&(number, of))).take(3).collect();
    if !missing.is_empty() || shards.len() != of {
        let named: Vec<String> =
            missing.iter().map(|number| format!("model-{number:05}-of-{of:05}.safetensors")).collect();
        bail!(
            "{}: found {}, which is {} of {of} files of weights, without {INDEX_FILE}; {} missing: a download was cut short, fetch the folder again",
            folder.display(),
            listed(&shards.values().copied().collect::<Vec<_>>()),
            shards.len(),
            if named.is_empty() { "the others are".to_string() } else { format!("{} is", named.join(" and ")) }
        );
    }
    Ok(Some(shards.into_values().collect()))
}

fn not_read(folder: &Path, found: &[&String]) -> Error {
    let is_safetensors = |name: &&&String| name.to_lowercase().contains(".safetensors");
    let safetensors: Vec<&str> = found.iter().filter(is_safetensors).map(|name| name.as_str()).collect();
    if !safetensors.is_empty() {
        return Error::input(format!(
            "{}: found {}, but neither {SINGLE_FILE} nor {INDEX_FILE}, so it is not known which are the model's weights; fetch the folder again if a \
             download was cut short, or rename the file that holds all weights to {SINGLE_FILE}",
            folder.display(),
            listed(&safetensors)
        ));
    }
    let ending = |name: &str| name.rsplit_once('.').map_or(String::new(), |(_, ending)| ending.to_lowercase());
    let is_pickle = |name: &&&String| PICKLES.contains(&ending(name).as_str()) || name.ends_with(".bin.index.json");
    match found.iter().find(is_pickle) {
        Some(name) => pickle(&folder.join(name)),
        None => Error::input(format!(
            "{}: found {}, a form of weights that is not read; expected {SINGLE_FILE}, which transformers' `save_pretrained` writes",
            folder.display(),
            listed(&found.iter().map(|name| name.as_str()).collect::<Vec<_>>())
        )),
    }
}

fn pickle(path: &Path) -> Error {
    Error::input(format!(
        "{}: a pickle, which could run any program, so it is not read; save the weights as safetensors (transformers' and PEFT's `save_pretrained` do)",
        path.display()
    ))
}

fn listed(names: &[&str]) -> String {
    match names {
        [first, second, third, rest @ ..] if rest.len() > 1 => {
            format!("{first}, {second}, {third} and {} more", rest.len())
        }
        _ => names.join(", "),
    }
}

/// Refuses an adapter's folder whose tensors are pickles alone.
///
/// # Errors
/// Where there is a pickle: it is a program, which is never run.
pub fn refuse_pickles(folder: &Path) -> Result<()> {
    let is_pickle = |name: &&String| {
        let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
        PICKLES.contains(&ending) && is_of_weights(name)
    };
    match names(folder)?.iter().find(is_pickle) {
        None => Ok(()),
        Some(name) => Err(pickle(&folder.join(name))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn located(files: &[&str]) -> std::result::Result<Option<Vec<String>>, String> {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let (name, text) = file.split_once('=').unwrap_or((file, ""));
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let found = locate(folder.path()).map_err(|error| error.to_string())?;
        let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        Ok(found.map(|found| found.paths.iter().map(name).collect()))
    }

    #[test]
    fn the_single_file_counts_before_the_index_and_the_index_before_shards_by_name() {
        let index =
            format!(r#"{INDEX_FILE}={{"weight_map": {{"a": "part-b.safetensors", "b": "part-a.safetensors"}}}}"#);
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let all = [SINGLE_FILE, &index, shards[0], shards[1]];
        let names = |names: &[&str]| Ok(Some(names.iter().map(|name| name.to_string()).collect::<Vec<_>>()));
        assert_eq!(located(&all), names(&[SINGLE_FILE]));
        assert_eq!(located(&all[1..]), names(&["part-a.safetensors", "part-b.safetensors"]));
        assert_eq!(located(&all[2..]), names(&shards));
        let named = r#"config.json={"transformers_weights": "other.safetensors"}"#;
        assert_eq!(located(&[named, SINGLE_FILE]), names(&["other.safetensors"]));
        let climbing = r#"config.json={"transformers_weights": "../other.safetensors"}"#;
        assert!(located(&[climbing, SINGLE_FILE]).unwrap_err().contains("\"transformers_weights\""));
    }

    #[test]
    fn only_a_folder_without_any_file_of_weights_is_bare() {
        let bare = ["config.json={}", "tokenizer.json", "training_args.bin", "rng_state.pth", "optimizer.safetensors"];
        assert_eq!(located(&bare), Ok(None));
        let files = "model.fp16.safetensors consolidated.safetensors model.safetensors.incomplete adapter_model.safetensors \
                     pytorch_model.bin pytorch_model.bin.index.json model.gguf tf_model.h5 flax_model.msgpack model.onnx \
                     model.ckpt.data-00000-of-00001 model-00001-of-00003.safetensors model-1-of-2.SAFETENSORS __0_0.distcp";
        for file in files.split_whitespace() {
            let error = located(&["config.json={}", file]).expect_err(file);
            assert!(error.contains(file), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        for name in ["checkpoints", "pytorch_model_fsdp_0"] {
            assert_eq!(locate(folder.path()).unwrap(), None);
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        assert!(locate(folder.path()).unwrap_err().to_string().contains("pytorch_model_fsdp_0"));
        let error = located(&["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"]).unwrap_err();
        assert!(
            error.contains("2 of 3 files") && error.contains("model-00002-of-00003.safetensors is missing"),
            "{error}"
        );
    }

    #[test]
    fn weights_in_folders_within_are_named_and_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        for (name, file) in [
            ("original", "consolidated.00.pth"),
            ("checkpoints/step-10", SINGLE_FILE),
            ("assets", "training_args.bin"),
            ("a/b/c", SINGLE_FILE),
        ] {
            std::fs::create_dir_all(path.join(name)).unwrap();
            std::fs::write(path.join(name).join(file), "").unwrap();
        }
        assert_eq!(locate(path).unwrap(), None);
        assert_eq!(weights_below(path), ["checkpoints/step-10", "original"]);
        assert!(no_weights(path).to_string().contains("there are in checkpoints/step-10, original;"));
        assert!(!no_weights(&path.join("assets")).to_string().contains("there are in"));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_that_leads_nowhere_is_no_bare_folder() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("gone", folder.path().join(SINGLE_FILE)).unwrap();
        assert!(locate(folder.path()).unwrap().is_some());
    }
}
