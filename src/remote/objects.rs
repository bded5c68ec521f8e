//! Files in object stores and on web servers, by URL.
//!
//! | URL | read from | credentials, all from the environment |
//! | --- | --- | --- |
//! | `s3://bucket/path` | Amazon S3, or what `AWS_ENDPOINT` names | `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, the role of the machine; `AWS_SKIP_SIGNATURE=true` where all may read |
//! | `gs://bucket/path` | Google Cloud Storage | `GOOGLE_SERVICE_ACCOUNT` or `GOOGLE_APPLICATION_CREDENTIALS`, the account of the machine; `GOOGLE_SKIP_SIGNATURE=true` |
//! | `az://container/path` | Azure Blob Storage | `AZURE_STORAGE_ACCOUNT_NAME` with `AZURE_STORAGE_ACCOUNT_KEY` or `AZURE_STORAGE_SAS_TOKEN`, the identity of the machine; `AZURE_SKIP_SIGNATURE=true` |
//! | `http://host/path`, `https://host/path` | a web server that serves parts of files | none |
//!
//! These are the names that the crate `object_store` knows, which does the work. Files are read in blocks of 1 MiB, as they are needed; the last 64 are
//! kept. A request that fails, breaks off or has no answer in two minutes is made again, up to ten times in three minutes, after pauses that double.
//! What is read is always the version of the file that was there when it was opened.

use std::collections::{BTreeMap, VecDeque};
use std::error::Error as _;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::path::Path as Key;
use object_store::{
    ClientOptions, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, Result as StoreResult, RetryConfig,
};

use super::wait;
use crate::bail;
use crate::error::{Error, Result};

/// How often a part of a file without a version is asked for again as a whole, after one second and then twice as long each time.
const TRIES_WITHOUT_VERSION: usize = 4;
/// Bytes that are read at a time, and how many times as many are kept of all files together.
const BLOCK: u64 = 1 << 20;
const BLOCKS_KEPT: usize = 64;
/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long and how often to try.
#[derive(Debug, Clone)]
struct Patience {
    /// For a request to be answered in full.
    timeout: Duration,
    retry: RetryConfig,
}

impl Default for Patience {
    fn default() -> Self {
        // Ten times in three minutes, after 0.1 seconds and, at most, 15.
        Patience { timeout: Duration::from_secs(120), retry: RetryConfig::default() }
    }
}

/// Where clouds give their machines credentials; asked where the environment has none.
const METADATA_SERVERS: [&str; 3] = ["169.254.169.254", "169.254.170.2", "metadata.google.internal"];

const SCHEMES: [&str; 5] = ["s3", "gs", "az", "http", "https"];

/// Where a file or several of them lie.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Location {
    scheme: String,
    /// The host, bucket or container.
    root: String,
    /// What follows the slash after it, as it was written.
    path: String,
}

/// Whether this names something on another machine.
pub fn is_remote(name: impl AsRef<Path>) -> bool {
    name.as_ref().to_str().is_some_and(|name| name.contains("://"))
}

impl Location {
    fn parse(url: &str) -> Result<Self> {
        let Some((scheme, rest)) = url.split_once("://") else { bail!("{url}: not a URL") };
        let scheme = scheme.to_ascii_lowercase();
        if !SCHEMES.contains(&scheme.as_str()) {
            bail!("{scheme}://: files cannot be read from there; expected s3://, gs://, az://, http:// or https://");
        }
        let (root, path) = rest.split_once('/').unwrap_or((rest, ""));
        // What stands there is not repeated: it may be a secret.
        if root.contains('@') || (scheme.starts_with("http") && path.contains(['?', '#'])) {
            bail!(
                "{scheme}://{}…: the URL holds a user or a query, and would be written with it into the run's folder; credentials belong into the environment, and a file behind a signed URL must be copied first",
                root.rsplit('@').next().unwrap_or_default()
            );
        }
        if root.is_empty() {
            bail!("{url}: the URL names no host, bucket or container; expected {scheme}://name/path");
        }
        Ok(Location { scheme, root: root.to_string(), path: path.to_string() })
    }

    fn is_web(&self) -> bool {
        self.scheme.starts_with("http")
    }

    fn url(&self) -> String {
        format!("{}://{}/{}", self.scheme, self.root, self.path)
    }

    /// The name of the file in its store.
    fn key(&self) -> Result<Key> {
        let key = if self.is_web() { Key::from_url_path(&self.path) } else { Key::parse(&self.path) };
        key.map_err(|error| Error::input(format!("{}: not the name of a file: {error}", self.url())))
    }

    /// Where another file of the same store lies.
    fn sibling(&self, key: &Key) -> Location {
        Location { path: key.to_string(), ..self.clone() }
    }

    /// The store, which is opened once.
    fn store(&self) -> Result<Arc<dyn ObjectStore>> {
        static STORES: LazyLock<Mutex<BTreeMap<String, Arc<dyn ObjectStore>>>> = LazyLock::new(Mutex::default);
        let name = format!("{}://{}", self.scheme, self.root);
        if let Some(store) = lock(&STORES).get(&name) {
            return Ok(store.clone());
        }
        // On the runtime, which the clients want to be made on.
        let store = wait(async { self.build(Patience::default()) })?
            .map_err(|error| Error::input(format!("{name}: {}", reason(&error))))?;
        lock(&STORES).insert(name, store.clone());
        Ok(store)
    }

    fn build(&self, patience: Patience) -> StoreResult<Arc<dyn ObjectStore>> {
        let Patience { timeout, retry } = patience;
        let options = ClientOptions::new().with_connect_timeout(CONNECT_TIMEOUT).with_timeout(timeout);
        Ok(match self.scheme.as_str() {
            "s3" => {
                let keys = environment::<AmazonS3ConfigKey>("AWS_");
                let builder = keys
                    .into_iter()
                    .fold(AmazonS3Builder::new().with_client_options(options), |builder, (key, value)| {
                        builder.with_config(key, value)
                    });
                Arc::new(builder.with_bucket_name(&self.root).with_retry(retry).build()?)
            }
            "gs" => {
                let keys = environment::<GoogleConfigKey>("GOOGLE_");
                let builder = keys
                    .into_iter()
                    .fold(GoogleCloudStorageBuilder::new().with_client_options(options), |builder, (key, value)| {
                        builder.with_config(key, value)
                    });
                Arc::new(builder.with_bucket_name(&self.root).with_retry(retry).build()?)
            }
            "az" => {
                let keys = environment::<AzureConfigKey>("AZURE_");
                let builder = keys
                    .into_iter()
                    .fold(MicrosoftAzureBuilder::new().with_client_options(options), |builder, (key, value)| {
                        builder.with_config(key, value)
                    });
                Arc::new(builder.with_container_name(&self.root).with_retry(retry).build()?)
            }
            scheme => {
                let url = format!("{scheme}://{}", self.root);
                let options = options.with_allow_http(scheme == "http");
                Arc::new(HttpBuilder::new().with_url(url).with_client_options(options).with_retry(retry).build()?)
            }
        })
    }

    fn error(&self, error: &object_store::Error) -> Error {
        use object_store::Error as Fault;
        let (url, reason) = (self.url(), reason(error));
        let is_denied = ["status code: 401", "status code: 403"].iter().any(|status| reason.contains(status));
        Error::input(match error {
            Fault::NotFound { .. } => format!("{url}: there is no such file"),
            _ if METADATA_SERVERS.iter().any(|server| reason.contains(server)) => format!(
                "{url}: there are no credentials in the environment, and this machine has no role of its own ({reason}); set them, or {} where all may read; the README has the names",
                match self.scheme.as_str() {
                    "gs" => "GOOGLE_SKIP_SIGNATURE=true",
                    "az" => "AZURE_SKIP_SIGNATURE=true",
                    _ => "AWS_SKIP_SIGNATURE=true",
                }
            ),
            Fault::Unauthenticated { .. } | Fault::PermissionDenied { .. } => self.denied(&innermost(error)),
            _ if is_denied => self.denied(&reason),
            _ => format!(
                "{url}: cannot be read ({reason}); check the name, the credentials and the connection, or copy the file here"
            ),
        })
    }

    fn denied(&self, reason: &str) -> String {
        format!(
            "{}: the server does not let it be read ({reason}); check the credentials in the environment, of which the README has the names",
            self.url()
        )
    }
}

/// What the environment says that a store of this kind knows.
fn environment<K: FromStr>(prefix: &str) -> Vec<(K, String)> {
    let known = std::env::vars_os().filter_map(|(name, value)| {
        let (name, value) = (name.into_string().ok()?, value.into_string().ok()?);
        let key = name.starts_with(prefix).then(|| name.to_ascii_lowercase().parse().ok())??;
        Some((key, value))
    });
    known.collect()
}

/// What lies under an error, without what only its layers say.
fn reason(error: &object_store::Error) -> String {
    if matches!(error, object_store::Error::NotSupported { .. }) {
        return "the server gives whole files only, and not parts of them".to_string();
    }
    let mut words = vec![error.to_string()];
    let mut source = error.source();
    while let Some(error) = source {
        let text = error.to_string();
        if !words.iter().any(|said| said.contains(&text)) {
            words.push(text);
        }
        source = error.source();
    }
    before_markup(&words.join(": "))
}

/// An error's text without the page or the XML that a server sent with it.
fn before_markup(text: &str) -> String {
    text.split('<').next().unwrap_or_default().trim_end_matches([':', ' ']).to_string()
}

/// What a server said itself.
fn innermost(error: &object_store::Error) -> String {
    let mut last: &dyn std::error::Error = error;
    while let Some(source) = last.source() {
        last = source;
    }
    before_markup(&last.to_string())
}

/// The Parquet files that a URL names, sorted: one file; all whose names end in `.parquet` below a folder, hidden ones left out; or those that match a
/// pattern with `*` or `[…]`, as `s3://bucket/train-*.parquet`. A web server cannot tell what it holds: there, one file.
///
/// # Errors
/// Where the URL is none of these, where the store cannot be read, or holds no such file.
pub fn files(url: &str) -> Result<Vec<PathBuf>> {
    let location = Location::parse(url)?;
    let is_pattern = location.path.contains(['*', '[']);
    if location.is_web() || (!is_pattern && location.path.ends_with(".parquet")) {
        if is_pattern || location.path.is_empty() || location.path.ends_with('/') {
            bail!("{url}: a web server cannot tell which files it holds; name one file, or several in a mixture");
        }
        return Ok(vec![PathBuf::from(location.url())]);
    }
    let pattern = glob::Pattern::new(&location.path)
        .map_err(|error| Error::input(format!("{url}: not a valid file pattern: {error}")))?;
    // Stores list what lies below a folder.
    let end = if is_pattern { location.path.find(['*', '[']) } else { None }.unwrap_or(location.path.len());
    let folder = if is_pattern {
        location.path[..end].rfind('/').map_or("", |slash| &location.path[..slash])
    } else {
        &location.path
    };
    let prefix = Location { path: folder.to_string(), ..location.clone() }.key()?;
    let store = location.store()?;
    let listed: Vec<ObjectMeta> = wait(store.list((!folder.is_empty()).then_some(&prefix)).try_collect())?
        .map_err(|error| location.error(&error))?;
    let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::default() };
    let wanted = |key: &Key| match is_pattern {
        true => pattern.matches_with(key.as_ref(), options),
        false => {
            let below = key.as_ref()[prefix.as_ref().len()..].split('/').filter(|part| !part.is_empty());
            key.as_ref().ends_with(".parquet") && !below.clone().any(|part| part.starts_with('.'))
        }
    };
    let mut found = Vec::new();
    for object in listed.into_iter().filter(|object| wanted(&object.location)) {
        let (location, key) = (location.sibling(&object.location), object.location.clone());
        let url = PathBuf::from(location.url());
        // What the listing tells of it need not be asked for again.
        let file = RemoteFile { location, key, store: store.clone(), object };
        lock(&FILES).entry(url.clone()).or_insert_with(|| Arc::new(file));
        found.push(url);
    }
    if found.is_empty() {
        match is_pattern {
            true => bail!("{url}: no file matches this pattern"),
            false => bail!("{url}: there is no file below it whose name ends in .parquet; name a folder that has one"),
        }
    }
    found.sort();
    Ok(found)
}

/// A file of a store, of which parts are read.
#[derive(Debug)]
pub struct RemoteFile {
    location: Location,
    key: Key,
    store: Arc<dyn ObjectStore>,
    object: ObjectMeta,
}

/// The blocks read last, by file and number, the newest first.
static BLOCKS: Mutex<VecDeque<(PathBuf, u64, Bytes)>> = Mutex::new(VecDeque::new());

/// The files that are open, by URL.
static FILES: Mutex<BTreeMap<PathBuf, Arc<RemoteFile>>> = Mutex::new(BTreeMap::new());

/// Opens a file, which asks the server for its length; one that is open already is the same.
///
/// # Errors
/// Where there is no such file, or it may not be read.
pub fn open(url: impl AsRef<Path>) -> Result<Arc<RemoteFile>> {
    let url = url.as_ref();
    if let Some(file) = lock(&FILES).get(url) {
        return Ok(file.clone());
    }
    let location = Location::parse(&url.display().to_string())?;
    let file = Arc::new(RemoteFile::open(location.store()?, location)?);
    lock(&FILES).insert(url.to_path_buf(), file.clone());
    Ok(file)
}

impl RemoteFile {
    fn open(store: Arc<dyn ObjectStore>, location: Location) -> Result<Self> {
        let key = location.key()?;
        let object = wait(store.head(&key))?.map_err(|error| location.error(&error))?;
        Ok(RemoteFile { location, key, store, object })
    }

    /// Its length in bytes.
    pub fn length(&self) -> u64 {
        self.object.size
    }

    /// What tells this version of it from others, where the server says so.
    pub fn version(&self) -> Option<String> {
        let is_dated = self.object.last_modified.timestamp() > 0;
        tag(&self.object).map(str::to_owned).or_else(|| is_dated.then(|| self.object.last_modified.to_rfc3339()))
    }

    /// The bytes of a range, which must lie within the file.
    ///
    /// # Errors
    /// Where they cannot be had after all tries, or the file is no longer the one that was opened.
    pub fn read(&self, range: Range<u64>) -> io::Result<Bytes> {
        let first = range.start / BLOCK;
        if range.end <= (first + 1) * BLOCK {
            let start = first * BLOCK;
            return Ok(self.block(first)?.slice((range.start - start) as usize..(range.end - start) as usize));
        }
        self.fetch(range)
    }

    /// The bytes from a place on, up to the end of their block; none at the end of the file.
    pub fn read_some(&self, start: u64) -> io::Result<Bytes> {
        self.read(start.min(self.length())..((start / BLOCK + 1) * BLOCK).min(self.length()))
    }

    fn block(&self, number: u64) -> io::Result<Bytes> {
        let file = PathBuf::from(self.location.url());
        let take = |blocks: &mut VecDeque<(PathBuf, u64, Bytes)>| {
            let at = blocks.iter().position(|(name, other, _)| *other == number && *name == file)?;
            blocks.remove(at).map(|(_, _, bytes)| bytes)
        };
        let known = take(&mut lock(&BLOCKS));
        let bytes = match known {
            Some(bytes) => bytes,
            None => self.fetch(number * BLOCK..((number + 1) * BLOCK).min(self.length()))?,
        };
        let mut blocks = lock(&BLOCKS);
        blocks.truncate(BLOCKS_KEPT - 1);
        blocks.push_front((file, number, bytes.clone()));
        Ok(bytes)
    }

    fn fetch(&self, range: Range<u64>) -> io::Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let request = || async {
            let result = self.store.get_opts(&self.key, options.clone()).await?;
            let object = result.meta.clone();
            Ok((object, result.bytes().await?))
        };
        // What breaks off is gone on with by the store, but only where the file has a version.
        let tries = if self.object.e_tag.is_none() { TRIES_WITHOUT_VERSION } else { 0 };
        let pauses = ExponentialBuilder::default().with_jitter().with_max_times(tries);
        let is_broken = |error: &object_store::Error| matches!(error, object_store::Error::Generic { .. });
        let (object, bytes) = wait(async { request.retry(pauses).when(is_broken).await })
            .map_err(io::Error::other)?
            .map_err(|error: object_store::Error| io::Error::other(reason(&error)))?;
        if (object.size, tag(&object)) != (self.object.size, tag(&self.object)) {
            let state =
                |object: &ObjectMeta| format!("{} bytes, version {}", object.size, tag(object).unwrap_or("unknown"));
            let (then, now) = (state(&self.object), state(&object));
            return Err(io::Error::other(format!("it is not what it was when it was opened ({then}; now {now})")));
        }
        if bytes.len() as u64 != range.end - range.start {
            let wanted = range.end - range.start;
            return Err(io::Error::other(format!("of {wanted} bytes the server gave {}", bytes.len())));
        }
        Ok(bytes)
    }
}

/// What tells a version of a file from others; Azure's listings leave out the quotes around it.
fn tag(object: &ObjectMeta) -> Option<&str> {
    object.e_tag.as_deref().map(|tag| tag.trim_matches('"'))
}

/// The contents of a lock, whatever became of a thread that held it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::server::{Reply, Server};
    use super::*;
    use object_store::BackoffConfig;

    fn impatient() -> Patience {
        let backoff = BackoffConfig { init_backoff: Duration::from_millis(1), ..BackoffConfig::default() };
        let retry = RetryConfig { backoff, max_retries: 2, retry_timeout: Duration::from_secs(5) };
        Patience { timeout: Duration::from_millis(300), retry }
    }

    fn open_impatiently(server: &Server) -> Result<RemoteFile> {
        let location = Location::parse(&format!("{}/file", server.url())).unwrap();
        let store = wait(async { location.build(impatient()) }).unwrap().unwrap();
        RemoteFile::open(store, location)
    }

    #[test]
    fn a_server_that_stays_broken_is_given_up_after_all_tries() {
        let server = Server::start(|_| Reply::status(503));
        let error = open_impatiently(&server).unwrap_err().to_string();
        assert!(error.contains("/file: cannot be read (") && error.contains("503"), "{error}");
        assert_eq!(server.requests().len(), 3);
    }

    #[test]
    fn a_server_that_stops_in_the_middle_is_not_waited_for() {
        let server = Server::start(|request| match request.method.as_str() {
            "HEAD" => Reply::file(request, &[7; 4096], "one"),
            _ => Reply { slow: Some((100, Duration::from_secs(60))), ..Reply::file(request, &[7; 4096], "one") },
        });
        let file = open_impatiently(&server).unwrap();
        assert_eq!(file.length(), 4096);
        let started = std::time::Instant::now();
        assert!(file.read(0..4096).is_err());
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    }

    #[test]
    fn a_file_without_a_version_is_read_again_where_it_broke_off() {
        let content: Vec<u8> = (0..3 * BLOCK as usize / 2).map(|index| index as u8).collect();
        let (bytes, asked) = (content.clone(), std::sync::atomic::AtomicUsize::new(0));
        let server = Server::start(move |request| {
            let whole = Reply { headers: Vec::new(), ..Reply::file(request, &bytes, "") };
            let end = request.range(bytes.len()).unwrap_or(0..bytes.len());
            let whole = whole.header("Content-Range", &format!("bytes {}-{}/{}", end.start, end.end - 1, bytes.len()));
            let is_first = request.method == "GET" && asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0;
            if is_first { Reply { break_off: Some(1000), ..whole } } else { whole }
        });
        let file = open_impatiently(&server).unwrap();
        assert_eq!(file.version(), None);
        assert_eq!(file.read(0..content.len() as u64).unwrap(), content);
        assert_eq!(file.read(BLOCK - 2..BLOCK + 2).unwrap(), content[BLOCK as usize - 2..BLOCK as usize + 2]);
        assert_eq!(file.read_some(BLOCK + 5).unwrap(), content[BLOCK as usize + 5..]);
        assert!(file.read_some(content.len() as u64).unwrap().is_empty());
    }

    #[test]
    fn of_a_url_only_the_place_is_kept() {
        let location = Location::parse("S3://bucket/a folder/x.parquet").unwrap();
        assert_eq!(location.url(), "s3://bucket/a folder/x.parquet");
        assert_eq!(location.key().unwrap().as_ref(), "a folder/x.parquet");
        assert!(is_remote("gs://a") && !is_remote("data/a.parquet") && !is_remote("c:\\a"));
    }
}
