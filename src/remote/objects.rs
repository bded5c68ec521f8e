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
//! kept. A request that fails, breaks off or has no answer in two minutes is made again, after pauses that double; after five minutes in all a part of a file
//! is given up. What is read is always the version of the file that was there when it was opened.

mod location;
mod pattern;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt};

use crate::bail;
use crate::error::{Error, Result};
use location::{Location, reason};
pub use pattern::files;

/// How often a part of a file without a version is asked for again as a whole, after one second and then twice as long each time.
const TRIES_WITHOUT_VERSION: usize = 4;
/// After so long a part of a file is given up, whatever may still be tried.
const LONGEST: Duration = Duration::from_secs(300);
/// Bytes that are read at a time, and how many times as many are kept of all files together.
const BLOCK: u64 = 1 << 20;
const BLOCKS_KEPT: usize = 64;
/// A range of more blocks is read by itself, and not kept.
const MOST_BLOCKS: u64 = 8;
/// The most bytes of a range: those of a Parquet page.
const MOST_BYTES: u64 = 2 << 30;

/// Whether this names something on another machine.
pub fn is_remote(name: impl AsRef<Path>) -> bool {
    name.as_ref().to_str().is_some_and(|name| name.contains("://"))
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
    Ok(lock(&FILES).entry(url.to_path_buf()).or_insert(file).clone())
}

/// A whole file of text of at most `limit` bytes.
///
/// # Errors
/// Where it cannot be read, is longer, or is no text.
pub fn read_text(url: impl AsRef<Path>, limit: u64) -> Result<String> {
    let (url, file) = (url.as_ref().display(), open(&url)?);
    if file.length() > limit {
        bail!("{url}: is {} bytes long, expected at most {limit}", file.length());
    }
    let bytes = file.read(0..file.length()).map_err(Error::io(url.to_string()))?;
    String::from_utf8(bytes.to_vec())
        .map_err(|_| Error::input(format!("{url}: is no UTF-8 text; save the file as UTF-8")))
}

/// Notes a file of which all is known; its URL comes back.
fn register(file: RemoteFile) -> PathBuf {
    let url = PathBuf::from(file.location.url());
    lock(&FILES).entry(url.clone()).or_insert_with(|| Arc::new(file));
    url
}

impl RemoteFile {
    fn open(store: Arc<dyn ObjectStore>, location: Location) -> Result<Self> {
        let key = location.key()?;
        let object = location.ask(store.head(&key))?.map_err(|error| location.error(&error))?;
        Ok(RemoteFile { location, key, store, object })
    }

    fn new(location: Location, key: Key, store: Arc<dyn ObjectStore>, object: ObjectMeta) -> Self {
        RemoteFile { location, key, store, object }
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
        if range.end > self.length() || range.end.saturating_sub(range.start) > MOST_BYTES {
            return Err(io::Error::other(format!("bytes {} to {} are not all in it", range.start, range.end)));
        }
        let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
        if blocks.end > blocks.start + MOST_BLOCKS {
            return self.fetch(range);
        }
        let mut bytes = BytesMut::new();
        for number in blocks.clone() {
            let block = self.block(number)?;
            let start = range.start.saturating_sub(number * BLOCK) as usize;
            let part = block.slice(start..block.len().min((range.end - number * BLOCK) as usize));
            if blocks.end == blocks.start + 1 {
                return Ok(part);
            }
            bytes.extend_from_slice(&part);
        }
        Ok(bytes.freeze())
    }

    /// The bytes from a place on, up to the end of their block; none at the end of the file.
    pub fn read_some(&self, start: u64) -> io::Result<Bytes> {
        let start = start.min(self.length());
        self.read(start..self.length().min((start / BLOCK).saturating_add(1).saturating_mul(BLOCK)))
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
            None => self.fetch(number * BLOCK..number.saturating_add(1).saturating_mul(BLOCK).min(self.length()))?,
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
        let wanted = range.end - range.start;
        let request = || async {
            let result = self.store.get_opts(&self.key, options.clone()).await?;
            let (object, mut stream) = (result.meta.clone(), result.into_stream());
            let mut bytes = BytesMut::new();
            // No more than was asked for, whatever the server sends.
            while let Some(piece) = stream.try_next().await.transpose().filter(|_| bytes.len() as u64 <= wanted) {
                bytes.extend_from_slice(&piece?);
            }
            Ok((object, bytes.freeze()))
        };
        // What breaks off is gone on with by the store, but only where the file has a version.
        let tries = if self.object.e_tag.is_none() { TRIES_WITHOUT_VERSION } else { 0 };
        let pauses = ExponentialBuilder::default().with_jitter().with_max_times(tries);
        let is_broken = |error: &object_store::Error| matches!(error, object_store::Error::Generic { .. });
        let all = async { tokio::time::timeout(LONGEST, request.retry(pauses).when(is_broken)).await };
        let (object, bytes) = (self.location.ask(all).map_err(io::Error::other)?)
            .map_err(|_| io::Error::other(format!("nothing came of it in {} seconds", LONGEST.as_secs())))?
            .map_err(|error: object_store::Error| io::Error::other(reason(&error)))?;
        let is_redated = tag(&object).is_none() && object.last_modified != self.object.last_modified;
        if is_redated || (object.size, tag(&object)) != (self.object.size, tag(&self.object)) {
            let state =
                |object: &ObjectMeta| format!("{} bytes, version {}", object.size, tag(object).unwrap_or("unknown"));
            let (then, now) = (state(&self.object), state(&object));
            return Err(io::Error::other(format!("it is not what it was when it was opened ({then}; now {now})")));
        }
        if bytes.len() as u64 != wanted {
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
    use super::location::Patience;
    use super::*;
    use object_store::{BackoffConfig, RetryConfig};
    use std::time::Duration;

    fn impatient() -> Patience {
        let backoff = BackoffConfig { init_backoff: Duration::from_millis(1), ..BackoffConfig::default() };
        let retry = RetryConfig { backoff, max_retries: 2, retry_timeout: Duration::from_secs(5) };
        Patience { timeout: Duration::from_millis(300), retry }
    }

    fn open_impatiently(server: &Server) -> Result<RemoteFile> {
        let location = Location::parse(&format!("{}/file", server.url())).unwrap();
        let store = location.ask(async { location.build(impatient()) }).unwrap().unwrap();
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
    fn a_server_that_sends_more_than_was_asked_for_is_refused() {
        let server = Server::start(|request| {
            let whole = Reply::file(request, &[7; 4096], "one");
            match request.method.as_str() {
                "HEAD" => whole,
                _ => Reply { body: vec![7; 1 << 24], ..whole },
            }
        });
        let error = open_impatiently(&server).unwrap().read(0..4096).unwrap_err().to_string();
        assert!(error.contains("of 4096 bytes the server gave"), "{error}");
    }

    #[test]
    fn a_length_beyond_all_bounds_is_an_error() {
        let server = Server::start(|request| Reply {
            stated_length: Some(usize::MAX),
            ..Reply::file(request, &[7; 4096], "one")
        });
        let file = open_impatiently(&server).unwrap();
        assert_eq!(file.length(), u64::MAX);
        for start in [0, u64::MAX - 8, u64::MAX / 2] {
            assert!(file.read(start..start + 8).is_err());
            assert!(file.read_some(start).is_err());
        }
        assert!(file.read(0..u64::MAX).is_err());
    }

    #[test]
    fn names_are_told_from_paths() {
        assert!(is_remote("gs://a") && !is_remote("data/a.parquet") && !is_remote("c:\\a"));
    }
}
