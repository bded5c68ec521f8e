//! Where remote files lie, and the stores that hold them.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::future::Future;
use std::str::FromStr;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::path::Path as Key;
use object_store::{ClientOptions, ObjectStore, Result as StoreResult, RetryConfig};

use super::lock;
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;
use crate::remote::{root, wait};

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long and how often to try.
#[derive(Debug, Clone)]
pub(super) struct Patience {
    /// For a request to be answered in full.
    pub(super) timeout: Duration,
    pub(super) retry: RetryConfig,
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

/// Variables that name another server than that of the cloud.
const ENDPOINTS: [&str; 4] = ["AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "GOOGLE_BASE_URL"];

/// Where a file or several of them lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Location {
    scheme: String,
    /// The host, bucket or container.
    root: String,
    /// What follows the slash after it, as it was written.
    pub(super) path: String,
}

impl Location {
    /// Reads a URL. Of one that may hold a secret nothing but its scheme is repeated.
    pub(super) fn parse(url: &str) -> Result<Self> {
        let Some((scheme, rest)) = url.split_once("://") else {
            bail!("a URL is expected, as https://host/file.parquet")
        };
        let scheme = scheme.to_ascii_lowercase();
        if !SCHEMES.contains(&scheme.as_str()) {
            bail!("{scheme}://: files cannot be read from there; expected s3://, gs://, az://, http:// or https://");
        }
        let (root, path) = rest.split_once('/').unwrap_or((rest, ""));
        let location = Location { scheme, root: root.to_string(), path: path.to_string() };
        let query = path.split_once('?').map(|(_, query)| query);
        let is_secret = match location.is_web() {
            true => path.contains(['?', '#']),
            false => query.is_some_and(|query| query.contains('=')),
        };
        let scheme = &location.scheme;
        if is_secret || !location.has_plain_root() {
            bail!(
                "{scheme}://…: the URL names no host, bucket or container, or holds a user or a query, which would be written into the run's folder with it; expected {scheme}://name/path; credentials belong into the environment, and a file behind a signed URL must be copied first"
            );
        }
        if location.is_web() && path.to_ascii_lowercase().contains("%2f") {
            bail!(
                "{url}: the path holds an escaped slash (%2F), which would be asked for as a plain one; copy the file here"
            );
        }
        Ok(location)
    }

    /// Whether what stands before the path is the name of a host, with a port or without, or of a bucket or container.
    fn has_plain_root(&self) -> bool {
        let is_name = |name: &str, others: &str| {
            !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || others.contains(c))
        };
        if !self.is_web() {
            return is_name(&self.root, "._-$");
        }
        let (host, port) = match self.root.rsplit_once(':').filter(|_| !self.root.ends_with(']')) {
            Some((host, port)) => (host, Some(port)),
            None => (self.root.as_str(), None),
        };
        let is_address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let is_port = port.is_none_or(|port| !port.is_empty() && port.chars().all(|c| c.is_ascii_digit()));
        is_port && is_address.map_or_else(|| is_name(host, ".-"), |address| is_name(address, ":."))
    }

    pub(super) fn is_web(&self) -> bool {
        self.scheme.starts_with("http")
    }

    pub(super) fn url(&self) -> String {
        format!("{}://{}/{}", self.scheme, self.root, self.path)
    }

    /// The name of the file in its store.
    pub(super) fn key(&self) -> Result<Key> {
        let key = if self.is_web() { Key::from_url_path(&self.path) } else { Key::parse(&self.path) };
        key.map_err(|error| Error::input(format!("{}: not the name of a file: {error}", self.url())))
    }

    /// Where another file of the same store lies.
    pub(super) fn sibling(&self, path: &str) -> Location {
        Location { path: path.to_string(), ..self.clone() }
    }

    /// The store, which is opened once.
    pub(super) fn store(&self) -> Result<Arc<dyn ObjectStore>> {
        static STORES: LazyLock<Mutex<BTreeMap<String, Arc<dyn ObjectStore>>>> = LazyLock::new(Mutex::default);
        let name = format!("{}://{}", self.scheme, self.root);
        if let Some(store) = lock(&STORES).get(&name) {
            return Ok(store.clone());
        }
        for variable in ENDPOINTS {
            let value = std::env::var(variable).unwrap_or_default();
            let is_web = url::Url::parse(value.trim()).is_ok_and(|url| ["http", "https"].contains(&url.scheme()));
            if !value.is_empty() && !is_web {
                bail!("{variable}: not the address of a server; expected one such as https://host:9000");
            }
        }
        // On the runtime, which the clients want to be made on.
        let store = self.ask(async { self.build(Patience::default()) })?;
        let store = store.map_err(|error| Error::input(format!("{name}: {}", reason(&error))))?;
        lock(&STORES).insert(name, store.clone());
        Ok(store)
    }

    /// Waits for a request. The library panics where a header cannot hold what the environment says.
    pub(super) fn ask<T>(&self, request: impl Future<Output = T>) -> Result<T> {
        limits::without_panic(|| wait(request)).unwrap_or_else(|| {
            bail!(
                "{}: no request can be made of this name and the credentials and addresses in the environment; check them for spaces, line ends and other such characters",
                self.url()
            )
        })
    }

    pub(super) fn build(&self, patience: Patience) -> StoreResult<Arc<dyn ObjectStore>> {
        let Patience { timeout, retry } = patience;
        let options = ClientOptions::new().with_connect_timeout(CONNECT_TIMEOUT).with_timeout(timeout);
        // A server that the user named so may be talked to so.
        let is_plain = |variable: &&str| std::env::var(variable).is_ok_and(|value| value.trim().starts_with("http://"));
        let options = options.with_allow_http(self.scheme == "http" || ENDPOINTS.iter().any(is_plain));
        Ok(match self.scheme.as_str() {
            "s3" => {
                let builder = AmazonS3Builder::new().with_client_options(options);
                let keys = environment::<AmazonS3ConfigKey>("AWS_").into_iter();
                let builder = keys.fold(builder, |builder, (key, value)| builder.with_config(key, value));
                Arc::new(builder.with_bucket_name(&self.root).with_retry(retry).build()?)
            }
            "gs" => {
                let builder = GoogleCloudStorageBuilder::new().with_client_options(options);
                let keys = environment::<GoogleConfigKey>("GOOGLE_").into_iter();
                let builder = keys.fold(builder, |builder, (key, value)| builder.with_config(key, value));
                Arc::new(builder.with_bucket_name(&self.root).with_retry(retry).build()?)
            }
            "az" => {
                let mut builder = MicrosoftAzureBuilder::new().with_client_options(options);
                if let Ok(endpoint) = std::env::var("IDENTITY_ENDPOINT") {
                    builder = builder.with_msi_endpoint(endpoint.trim());
                }
                let keys = environment::<AzureConfigKey>("AZURE_").into_iter();
                let builder = keys.fold(builder, |builder, (key, value)| builder.with_config(key, value));
                Arc::new(builder.with_container_name(&self.root).with_retry(retry).build()?)
            }
            scheme => {
                let url = format!("{scheme}://{}", self.root);
                Arc::new(HttpBuilder::new().with_url(url).with_client_options(options).with_retry(retry).build()?)
            }
        })
    }

    /// A sentence for what a store says.
    pub(super) fn error(&self, error: &object_store::Error) -> Error {
        use object_store::Error as Fault;
        let (url, reason) = (self.url(), reason(error));
        let is_denied = ["status code: 401", "status code: 403"].iter().any(|status| reason.contains(status));
        Error::input(match error {
            Fault::NotFound { .. } if reason.contains("status code: 405") => {
                format!("{url}: the server does not tell the length of a file (no HEAD requests); copy the file here")
            }
            Fault::NotFound { .. } => format!("{url}: there is no such file"),
            _ if METADATA_SERVERS.iter().any(|server| reason.contains(server)) => format!(
                "{url}: there are no credentials in the environment, and this machine has no role of its own ({reason}); set them, or {} where all may read; the README has the names",
                match self.scheme.as_str() {
                    "gs" => "GOOGLE_SKIP_SIGNATURE=true",
                    "az" => "AZURE_SKIP_SIGNATURE=true",
                    _ => "AWS_SKIP_SIGNATURE=true",
                }
            ),
            Fault::Unauthenticated { .. } | Fault::PermissionDenied { .. } => self.denied(&before_markup(&root(error))),
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
        // Secrets that are kept in files come with a line end.
        Some((key, value.trim().to_string()))
    });
    known.collect()
}

/// What lies under an error, without what only its layers say.
pub(super) fn reason(error: &object_store::Error) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_url_only_the_place_is_kept() {
        let location = Location::parse("S3://bucket/a folder/x.parquet").unwrap();
        assert_eq!(location.url(), "s3://bucket/a folder/x.parquet");
        assert_eq!(location.key().unwrap().as_ref(), "a folder/x.parquet");
        for url in
            ["http://[::1]:8080/a", "https://host/a%20b", "az://$web/a", "http://localhost:9000/", "s3://b/t-?.x"]
        {
            assert!(Location::parse(url).is_ok(), "{url}");
        }
    }

    #[test]
    fn secrets_in_urls_are_refused_and_not_repeated() {
        for url in [
            "http://me:secret@host/a.parquet",
            "https://host/a.parquet?sig=secret",
            "https://host?sig=secret",
            "https://host?token=secret/a.parquet",
            "https:///me:secret@host/a",
            "az://container/a.parquet?sv=1&sig=secret",
            "s3://KEY:secret@bucket/a.parquet",
            "s3://KEY:sec/secret@bucket/a.parquet",
            "s3://my secret/a.parquet",
            "secret",
        ] {
            let error = Location::parse(url).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
