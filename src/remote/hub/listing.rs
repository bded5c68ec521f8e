//! What the hub says of a commit: its files with their sizes and digests, and which of them are taken.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::HubName;
use crate::bail;
use crate::error::{Error, Result};
use crate::limits::{SMALL_FILE, TEMPLATE_FILE, TOKENIZER_FILE, is_plain_name};

const CONFIG: &str = "config.json";
const ADAPTER_CONFIG: &str = "adapter_config.json";
const MODEL_WEIGHTS: &str = "model.safetensors";
/// The names of the files of a model's weights, where there are several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// An adapter's weights, as PEFT and as AdapterHub call them.
pub const ADAPTER_WEIGHTS: [&str; 2] = ["adapter_model.safetensors", "adapter.safetensors"];
/// Weights may be of any size.
const UNBOUNDED: u64 = u64::MAX;

/// What is taken of any model or adapter beside its weights, with the most bytes of each.
const FILES: [(&str, u64); 13] = [
    (CONFIG, SMALL_FILE),
    ("generation_config.json", SMALL_FILE),
    ("head.json", SMALL_FILE),
    (ADAPTER_CONFIG, SMALL_FILE),
    ("tokenizer.json", TOKENIZER_FILE),
    ("tokenizer_config.json", TOKENIZER_FILE),
    ("special_tokens_map.json", TOKENIZER_FILE),
    ("added_tokens.json", TOKENIZER_FILE),
    ("chat_template.jinja", TEMPLATE_FILE),
    ("vocab.json", TOKENIZER_FILE),
    ("merges.txt", TOKENIZER_FILE),
    ("vocab.txt", TOKENIZER_FILE),
    ("tokenizer.model", TOKENIZER_FILE),
];

/// What is taken of an adapter too.
const ADAPTER_FILES: [(&str, u64); 5] = [
    ("base_model.json", SMALL_FILE),
    ("encoder.safetensors", UNBOUNDED),
    ("norms.safetensors", UNBOUNDED),
    ("head.safetensors", UNBOUNDED),
    ("optimizer.safetensors", UNBOUNDED),
];

/// The endings of files that hold weights in forms that are not read.
const OTHER_WEIGHTS: [&str; 9] = ["bin", "pt", "pth", "pkl", "ckpt", "gguf", "h5", "msgpack", "onnx"];

/// Whether a file of this name beside a model is fetched with it.
pub fn is_fetched(name: &str) -> bool {
    let is_in = |files: &[(&str, u64)]| files.iter().any(|(file, _)| *file == name);
    is_in(&FILES) || is_in(&ADAPTER_FILES)
}

/// Whether this is the name of a commit, in full.
pub fn is_commit(text: &str) -> bool {
    is_digest(text, 40)
}

fn is_digest(text: &str, length: usize) -> bool {
    text.len() == length && text.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'))
}

/// Whether a name is that of a file in its own folder, or in folders of it, and leads nowhere else.
fn is_plain_path(name: &str) -> bool {
    name.split('/').all(is_plain_name)
}

/// A file's contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// The digest that the file has in the cache as its name: SHA-256 (64 hexadecimal digits) of large files, of others the SHA-1 that git
    /// calls them by (40).
    pub etag: String,
    /// Bytes.
    pub size: u64,
}

/// The files of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The commit, 40 hexadecimal digits.
    pub commit: String,
    /// By name, which is a path where they are in folders; where size or digest is not given or is none, `None`.
    files: BTreeMap<String, Option<Blob>>,
}

/// The files of a model that are taken, in the order in which they are fetched.
#[derive(Debug)]
pub struct Chosen<'a> {
    /// Their names and contents.
    pub files: Vec<(&'static str, &'a Blob)>,
    /// The last of them names the files of the weights, which come after it.
    pub has_index: bool,
}

#[derive(Deserialize)]
struct Answer {
    sha: Option<String>,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Sibling {
    fn blob(&self) -> Option<Blob> {
        let (etag, size, length) = match &self.lfs {
            Some(large) => (large.sha256.as_ref(), large.size.or(self.size), 64),
            None => (self.blob_id.as_ref(), self.size, 40),
        };
        Some(Blob { etag: etag.filter(|etag| is_digest(etag, length))?.clone(), size: size? })
    }
}

impl Listing {
    /// Reads the hub's answer, of which `name` says for which model it is and `endpoint` from whom.
    ///
    /// # Errors
    /// Where it is no such answer. The commit becomes a part of paths, so that it has to be one.
    pub fn parse(answer: &[u8], name: &HubName, endpoint: &str) -> Result<Self> {
        let answer: Answer = serde_json::from_slice(answer).map_err(|error| {
            Error::input(format!(
                "{name}: {endpoint} answers with something else than a list of the {}'s files ({error}); check HF_ENDPOINT and the network",
                name.kind.word()
            ))
        })?;
        let commit = answer.sha.unwrap_or_default();
        if !is_commit(&commit) {
            bail!(
                "{name}: {endpoint} calls its commit \"{commit}\", expected 40 hexadecimal digits; check that HF_ENDPOINT is a hub"
            );
        }
        let mut files = BTreeMap::new();
        for sibling in answer.siblings.into_iter().filter(|sibling| is_plain_path(&sibling.rfilename)) {
            let blob = sibling.blob();
            files.entry(sibling.rfilename).or_insert(blob);
        }
        Ok(Listing { commit, files })
    }

    /// The names of all files.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// A file, where the hub gives its size and digest.
    pub fn blob(&self, file: &str) -> Option<&Blob> {
        self.files.get(file)?.as_ref()
    }

    fn has(&self, file: &str) -> bool {
        self.files.contains_key(file)
    }

    /// The files to be taken, weights last.
    ///
    /// # Errors
    /// Where this is neither model nor adapter, where its weights are not safetensors, and where a file is larger than any of its kind.
    pub fn chosen(&self, name: &HubName) -> Result<Chosen<'_>> {
        let is_adapter = self.has(ADAPTER_CONFIG);
        if !is_adapter && !self.has(CONFIG) {
            bail!(
                "{name}: found {} at the top of it on the hub, expected {CONFIG} (a model) or {ADAPTER_CONFIG} (an adapter); give the name of a model in the form of transformers or PEFT",
                self.shown(|_| true)
            );
        }
        let weights = match is_adapter {
            true => ADAPTER_WEIGHTS.into_iter().find(|file| self.has(file)),
            // In the order in which they count where both are in a folder.
            false => [MODEL_WEIGHTS, INDEX_FILE].into_iter().find(|file| self.has(file)),
        };
        let Some(weights) = weights else {
            let is_weights = |file: &str| {
                file.contains(".safetensors")
                    || file.rsplit_once('.').is_some_and(|(_, end)| OTHER_WEIGHTS.contains(&end))
            };
            bail!(
                "{name}: its weights on the hub are {}, expected {}{}; a pickle can run any program and is never read: give a revision with safetensors (organisation/name@revision), or convert it by save_pretrained",
                self.shown(is_weights),
                if is_adapter { ADAPTER_WEIGHTS[0] } else { MODEL_WEIGHTS },
                if is_adapter { String::new() } else { format!(" or {INDEX_FILE}") }
            );
        };
        let has_index = weights == INDEX_FILE;
        let weights = (weights, if has_index { SMALL_FILE } else { UNBOUNDED });
        let of_adapters = ADAPTER_FILES.iter().filter(|_| is_adapter);
        let mut files = Vec::new();
        for &(file, limit) in FILES.iter().chain(of_adapters).chain([&weights]) {
            if !self.has(file) {
                continue;
            }
            let Some(blob) = self.blob(file) else {
                bail!("{name}: the hub gives no size and digest of {file}; check that HF_ENDPOINT is a hub");
            };
            if blob.size > limit {
                bail!(
                    "{name}: {file} is {} MiB on the hub, expected at most {} MiB of such a file; check that it is the model you mean",
                    blob.size >> 20,
                    limit >> 20
                );
            }
            files.push((file, blob));
        }
        Ok(Chosen { files, has_index })
    }

    /// Some of the files, for a message.
    fn shown(&self, which: impl Fn(&str) -> bool) -> String {
        let names: Vec<&str> =
            self.files.keys().map(String::as_str).filter(|name| !name.contains('/') && which(name)).collect();
        match names.len() {
            0 => "nothing".to_string(),
            1..=4 => names.join(", "),
            count => format!("{} and {} other files", names[..3].join(", "), count - 3),
        }
    }
}

/// The files that an index of weights names.
///
/// # Errors
/// Where it is no index, and where it names anything but safetensors beside it.
pub fn shards(index: &[u8], path: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|error| {
        Error::input(format!("{}: expected an index with a \"weight_map\", found: {error}", path.display()))
    })?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    match names.iter().find(|name| !is_plain_name(name) || !name.ends_with(".safetensors")) {
        Some(name) => bail!("{}: \"{name}\" is not the name of a safetensors file beside it", path.display()),
        None => Ok(names),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn name() -> HubName {
        HubName::parse("org/tiny").unwrap()
    }

    fn listing(files: &[(&str, u64)]) -> Listing {
        let siblings: Vec<_> = (files.iter())
            .map(|(name, size)| serde_json::json!({"rfilename": name, "size": size, "blobId": COMMIT}))
            .collect();
        let answer = serde_json::json!({"sha": COMMIT, "siblings": siblings, "tags": ["else"]});
        Listing::parse(answer.to_string().as_bytes(), &name(), "hub").unwrap()
    }

    fn names(listing: &Listing) -> Vec<&'static str> {
        listing.chosen(&name()).unwrap().files.into_iter().map(|(name, _)| name).collect()
    }

    fn fault(listing: &Listing) -> String {
        listing.chosen(&name()).unwrap_err().to_string()
    }

    #[test]
    fn only_what_is_read_is_taken_and_weights_last() {
        let files = "model.safetensors pytorch_model.bin consolidated.safetensors config.json README.md tokenizer.json x.gguf \
                     head.json encoder.safetensors optimizer.safetensors onnx/config.json ../config.json .gitattributes";
        let files: Vec<(&str, u64)> = files.split_whitespace().map(|name| (name, 1)).collect();
        assert_eq!(names(&listing(&files)), ["config.json", "head.json", "tokenizer.json", "model.safetensors"]);
        let adapter = ["adapter_model.safetensors", "adapter_config.json", "encoder.safetensors", "model.safetensors"];
        let found = listing(&adapter.map(|name| (name, 1)));
        assert_eq!(names(&found), ["adapter_config.json", "encoder.safetensors", "adapter_model.safetensors"]);
        let both = listing(&[("config.json", 1), ("model.safetensors", 1), (INDEX_FILE, 1)]);
        assert_eq!(names(&both), ["config.json", "model.safetensors"]);
        let sharded = listing(&[("config.json", 1), ("model-00001-of-00002.safetensors", 1), (INDEX_FILE, 1)]);
        assert_eq!(names(&sharded), ["config.json", INDEX_FILE]);
        assert!(sharded.chosen(&name()).unwrap().has_index);
    }

    #[test]
    fn what_is_no_model_of_safetensors_is_refused() {
        let pickles = listing(&[("config.json", 1), ("pytorch_model.bin", 1)]);
        assert!(fault(&pickles).contains("its weights on the hub are pytorch_model.bin, expected model.safetensors"));
        assert!(fault(&listing(&[("config.json", 1)])).contains("its weights on the hub are nothing"));
        let variant = listing(&[("config.json", 1), ("model.fp16.safetensors", 1)]);
        assert!(
            fault(&variant)
                .contains("its weights on the hub are model.fp16.safetensors, expected model.safetensors or ")
        );
        let adapter = listing(&[("adapter_config.json", 1), ("adapter_model.bin", 1), ("model.safetensors", 1)]);
        assert!(fault(&adapter).contains("adapter_model.bin, model.safetensors, expected adapter_model.safetensors;"));
        let other = listing(&[("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 1)]);
        assert!(fault(&other).contains("found a, b, c and 2 other files at the top"), "{}", fault(&other));
        let large = listing(&[("config.json", SMALL_FILE + (1 << 20)), ("model.safetensors", 1 << 40)]);
        assert!(fault(&large).contains("config.json is 17 MiB on the hub, expected at most 16 MiB"));
    }

    #[test]
    fn a_commit_or_digest_that_is_a_path_is_refused() {
        for commit in ["../../x", "", &COMMIT[1..], &COMMIT.to_uppercase()] {
            let answer = serde_json::json!({"sha": commit, "siblings": []}).to_string();
            let error = Listing::parse(answer.as_bytes(), &name(), "hub").unwrap_err().to_string();
            assert!(error.contains("expected 40 hexadecimal digits"), "{error}");
        }
        let large = |sha256: &str| {
            let siblings = serde_json::json!([{"rfilename": "config.json", "lfs": {"sha256": sha256, "size": 3}},
                                              {"rfilename": "model.safetensors", "size": 3, "blobId": COMMIT}]);
            let answer = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
            Listing::parse(answer.as_bytes(), &name(), "hub").unwrap()
        };
        let digest = "ab".repeat(32);
        assert_eq!(large(&digest).blob("config.json"), Some(&Blob { etag: digest, size: 3 }));
        for sha256 in ["../../x", COMMIT, ""] {
            assert!(fault(&large(sha256)).contains("no size and digest of config.json"));
        }
    }

    #[test]
    fn an_index_names_safetensors_beside_it() {
        let read = |file: &str| {
            let index = serde_json::json!({"weight_map": {"a": file, "b": file}}).to_string();
            shards(index.as_bytes(), Path::new("index")).map_err(|error| error.to_string())
        };
        assert_eq!(read("model-1.safetensors").unwrap(), ["model-1.safetensors"]);
        for file in ["../../x.safetensors", "a/b.safetensors", "pytorch_model.bin", ".safetensors"] {
            assert!(read(file).unwrap_err().contains("is not the name of a safetensors file beside it"));
        }
        assert!(shards(b"[]", Path::new("index")).is_err());
    }
}
