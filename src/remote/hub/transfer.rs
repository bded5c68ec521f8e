//! Requests to the hub, repeated where what went wrong may be over soon, and files that are checked as a whole.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder, Retryable};
use reqwest::header::{AUTHORIZATION, CONTENT_RANGE, HeaderValue, RANGE, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode};
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use url::Url;

use super::listing::{Blob, Listing};
use super::progress::Progress;
use super::{HubName, Kind};
use crate::error::{Error, Result};
use crate::limits;
use crate::remote::root;

/// How often a question is asked again.
const QUESTION_RETRIES: usize = 3;
/// How often in a row a file is asked for again without a byte more of it.
const FILE_RETRIES: usize = 7;
/// The longest pause that a server is granted.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What is waited for, and for how long.
#[derive(Debug, Clone)]
pub struct Patience {
    /// Until a connection stands.
    pub connect: Duration,
    /// Between two bytes: a slow server is waited for, a silent one is not.
    pub read: Duration,
    /// Before the first repetition; each pause after it is twice as long.
    pub pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { connect: Duration::from_secs(10), read: Duration::from_secs(30), pause: Duration::from_millis(200) }
    }
}

/// Why the hub did not say what is in a repository.
#[derive(Debug)]
pub enum Unanswered {
    /// It cannot be reached or does not work now; the reason names it.
    Silent(String),
    /// It said no, or what cannot be used.
    Refused(Error),
}

/// Why a request came to nothing.
#[derive(Debug)]
enum Failure {
    /// It may go well in a while, and not before this much time where the server says so.
    Passing { reason: String, pause: Option<Duration> },
    /// What was sent is not the file that was listed.
    Wrong(String),
    /// It will not go well.
    Final(Error),
}

/// A hub.
pub struct Hub {
    client: Client,
    endpoint: Url,
    /// The endpoint without user and password, for messages.
    shown: String,
    token: Option<HeaderValue>,
    patience: Patience,
}

impl Hub {
    /// The hub at this address, asked with this token.
    pub fn new(endpoint: Url, token: Option<String>, patience: &Patience) -> Result<Self> {
        let token = token.map(|token| HeaderValue::from_str(&format!("Bearer {token}"))).transpose();
        let mut token = token.map_err(|_| {
            Error::input("the hub's token (HF_TOKEN, or its file) holds characters that no token has; copy it again")
        })?;
        token.iter_mut().for_each(|token| token.set_sensitive(true));
        let client = Client::builder()
            .user_agent(concat!("rlhf/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(patience.connect)
            .read_timeout(patience.read)
            // Those to which the hub leads on are not told from where.
            .referer(false)
            .build();
        let client = client.map_err(|error| {
            Error::input(format!(
                "the hub's client cannot be started: {}; check the system's certificates",
                root(&error)
            ))
        })?;
        let mut shown = endpoint.clone();
        // An address with a host can be without both.
        let _ = (shown.set_username(""), shown.set_password(None));
        let shown = shown.as_str().trim_end_matches('/').to_string();
        Ok(Hub { client, endpoint, shown, token, patience: patience.clone() })
    }

    /// The files of a model's or a data set's revision.
    pub async fn listing(&self, name: &HubName) -> Result<Listing, Unanswered> {
        let kind = match name.kind {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        };
        let mut url = self.url(["api", kind].into_iter().chain(name.repository.split('/')));
        if let Ok(mut segments) = url.path_segments_mut() {
            // A revision's slash is no slash of the path.
            segments.extend(["revision", name.revision()]);
        }
        url.set_query(Some("blobs=true"));
        let answer = (|| self.answer(&url, name))
            .retry(self.pauses(QUESTION_RETRIES))
            .when(|failure| matches!(failure, Failure::Passing { .. }))
            .adjust(|failure, pause| Some(pause?.max(failure.asked_pause())));
        let answer = answer.await.map_err(|failure| match failure {
            Failure::Passing { reason, .. } => Unanswered::Silent(reason),
            Failure::Wrong(reason) => Unanswered::Refused(Error::input(format!("{name}: {reason}"))),
            Failure::Final(error) => Unanswered::Refused(error),
        })?;
        Listing::parse(&answer, name, &self.shown).map_err(Unanswered::Refused)
    }

    /// An answer as a whole, of bounded length.
    async fn answer(&self, url: &Url, name: &HubName) -> Result<Vec<u8>, Failure> {
        let mut response = self.ask(url, name, None).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|error| self.broken(error))? {
            if (bytes.len() + piece.len()) as u64 > limits::SMALL_FILE {
                return Err(Failure::Wrong(format!(
                    "the list of its files that {} gives is larger than {} MiB; give the folder of a copy on this machine",
                    self.shown,
                    limits::SMALL_FILE >> 20
                )));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    /// Fetches a commit's file to `path`, where a part of it may lie already, until it is whole and has the digest that is listed.
    ///
    /// # Errors
    /// Where nothing more comes of it, and where twice something else came than is listed. What is right so far stays.
    pub async fn download(
        &self,
        name: &HubName,
        commit: &str,
        file: &str,
        blob: &Blob,
        path: &Path,
        progress: &mut Progress,
    ) -> Result<()> {
        let kind = (name.kind == Kind::Dataset).then_some("datasets");
        let segments = name.repository.split('/').chain(["resolve", commit]).chain(file.split('/'));
        let url = self.url(kind.into_iter().chain(segments));
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        let options = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let mut transfer = Transfer { file: options.map_err(Error::io(path))?, path, blob, progress };
        let mut pauses = self.pauses(FILE_RETRIES);
        let (mut furthest, mut was_wrong) = (transfer.length()?, false);
        loop {
            match self.receive(&url, name, &mut transfer).await {
                Ok(()) => return transfer.file.sync_all().map_err(Error::io(path)),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Wrong(_)) if !was_wrong => {
                    (was_wrong, furthest) = (true, 0);
                    transfer.begin_again()?;
                }
                Err(Failure::Wrong(reason)) => {
                    fs::remove_file(path).map_err(Error::io(path))?;
                    return Err(Error::input(format!(
                        "{name}: {file} is not what {} lists, twice: {reason}; try again later, or give another HF_ENDPOINT or revision",
                        self.shown
                    )));
                }
                Err(Failure::Passing { reason, pause }) => {
                    let length = transfer.length()?;
                    if length > furthest {
                        // However often a line breaks, what comes over it comes to an end.
                        (furthest, pauses) = (length, self.pauses(FILE_RETRIES));
                    }
                    let Some(own) = pauses.next() else {
                        return Err(Error::input(format!(
                            "{name}: of {file}, {length} of {} bytes came, and then nothing more: {reason}; run it again, and it goes on from there",
                            blob.size
                        )));
                    };
                    tokio::time::sleep(own.max(pause.unwrap_or_default().min(LONGEST_PAUSE))).await;
                }
            }
        }
    }

    /// Asks once for what is missing of a file, and checks it when it is whole.
    async fn receive(&self, url: &Url, name: &HubName, transfer: &mut Transfer<'_>) -> Result<(), Failure> {
        let size = transfer.blob.size;
        let mut at = transfer.length()?;
        if at > size {
            transfer.begin_again()?;
            at = 0;
        }
        if at < size {
            let mut response = self.ask(url, name, (at > 0).then_some(at)).await?;
            at = transfer.start_of(&response, at)?;
            transfer.file.seek(SeekFrom::Start(at)).map_err(Error::io(transfer.path))?;
            while let Some(piece) = response.chunk().await.map_err(|error| self.broken(error))? {
                if piece.len() as u64 > size - at {
                    return Err(Failure::Wrong(format!("more than {size} bytes came")));
                }
                transfer.file.write_all(&piece).map_err(Error::io(transfer.path))?;
                at += piece.len() as u64;
                transfer.progress.at(at);
            }
        }
        if at < size {
            let reason = format!("{} ended the transfer too early", self.shown);
            return Err(Failure::Passing { reason, pause: None });
        }
        transfer.check()
    }

    /// Sends a request, for all of a file or for what follows its first bytes.
    async fn ask(&self, url: &Url, name: &HubName, start: Option<u64>) -> Result<Response, Failure> {
        let mut request = self.client.get(url.clone());
        if let Some(token) = &self.token {
            // On the way to another server that the hub names, the client leaves it behind.
            request = request.header(AUTHORIZATION, token.clone());
        }
        if let Some(start) = start {
            request = request.header(RANGE, format!("bytes={start}-"));
        }
        let response = request.send().await.map_err(|error| self.broken(error))?;
        let status = response.status();
        let is_elsewhere = response.url().origin() != self.endpoint.origin();
        match status {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(response),
            StatusCode::RANGE_NOT_SATISFIABLE if start.is_some() => Ok(response),
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Err(self.busy(&response)),
            // An address at another server is signed for a while, and the hub gives a new one.
            _ if status.is_server_error() || is_elsewhere => Err(self.busy(&response)),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Failure::Final(self.denied(name, status))),
            StatusCode::NOT_FOUND => Err(Failure::Final(Error::input(format!(
                "{name}: no such folder, and no such {}, revision or file at {} (404); check the name",
                name.kind.word(),
                self.shown
            )))),
            _ => Err(Failure::Final(Error::input(format!(
                "{name}: {} answers {}; check the name and HF_ENDPOINT",
                self.shown,
                status.as_u16()
            )))),
        }
    }

    fn busy(&self, response: &Response) -> Failure {
        let pause = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let reason = format!("{} answers {}", self.shown, response.status().as_u16());
        Failure::Passing { reason, pause: pause.map(Duration::from_secs) }
    }

    fn denied(&self, name: &HubName, status: StatusCode) -> Error {
        let token = match self.token {
            Some(_) => "the token that was given does not open it",
            None => "no token was given (HF_TOKEN)",
        };
        Error::input(format!(
            "{name}: no such folder, and {} gives no access to a {kind} of this name ({}): there is none, or it is private or gated, and {token}; check the name, accept the {kind}'s conditions at {}/{}{}, and set HF_TOKEN to a token that may read it",
            self.shown,
            status.as_u16(),
            self.shown,
            if name.kind == Kind::Dataset { "datasets/" } else { "" },
            name.repository,
            kind = name.kind.word()
        ))
    }

    /// What went wrong on the line; without the address, which may be signed for others to read the file.
    fn broken(&self, error: reqwest::Error) -> Failure {
        let error = error.without_url();
        if error.is_builder() || error.is_redirect() {
            return Failure::Final(Error::input(format!("{}: {}; check HF_ENDPOINT", self.shown, root(&error))));
        }
        let reason = if error.is_connect() {
            format!("{} cannot be reached ({})", self.shown, root(&error))
        } else if error.is_timeout() {
            format!("nothing came from {} for {} seconds", self.shown, self.patience.read.as_secs_f32())
        } else {
            format!("the line to {} broke ({})", self.shown, root(&error))
        };
        Failure::Passing { reason, pause: None }
    }

    /// The address of something on the hub; what has a meaning in addresses is escaped.
    fn url<'a>(&self, segments: impl Iterator<Item = &'a str>) -> Url {
        let mut url = self.endpoint.clone();
        // Addresses of web servers have paths.
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    /// Pauses that double, each longer by a random part, so that many who were sent away do not come back at once.
    fn pauses(&self, retries: usize) -> ExponentialBackoff {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let seed = (u64::from(std::process::id()) << 32) ^ u64::from(now.subsec_nanos());
        let pauses = ExponentialBuilder::new().with_min_delay(self.patience.pause).with_max_delay(LONGEST_PAUSE);
        pauses.with_jitter().with_jitter_seed(seed).with_max_times(retries).build()
    }
}

impl Failure {
    /// How long the server asked to be left alone, as far as it is granted.
    fn asked_pause(&self) -> Duration {
        match self {
            Failure::Passing { pause: Some(pause), .. } => (*pause).min(LONGEST_PAUSE),
            _ => Duration::ZERO,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Final(error)
    }
}

/// A file on its way.
struct Transfer<'a> {
    file: File,
    path: &'a Path,
    blob: &'a Blob,
    progress: &'a mut Progress,
}

impl Transfer<'_> {
    /// Bytes that are there.
    fn length(&self) -> Result<u64> {
        self.file.metadata().map(|metadata| metadata.len()).map_err(Error::io(self.path))
    }

    fn begin_again(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(Error::io(self.path))
    }

    /// Where in the file the answer to a request for what follows its first `asked` bytes begins.
    fn start_of(&mut self, response: &Response, asked: u64) -> Result<u64, Failure> {
        let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
        let start = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.trim().parse::<u64>().ok());
        let start = match response.status() {
            StatusCode::PARTIAL_CONTENT if start == Some(asked) => asked,
            // All of it, whether a part was asked for or not.
            StatusCode::OK => 0,
            status => {
                self.begin_again()?;
                let reason = format!("the answer ({}) is another part of the file than was asked for", status.as_u16());
                return Err(Failure::Passing { reason, pause: None });
            }
        };
        let missing = self.blob.size - start;
        if let Some(length) = response.content_length().filter(|length| *length != missing) {
            // The page of something on the way, perhaps: what is here already stays.
            let reason = format!("{length} bytes were announced where {missing} are missing");
            return Err(Failure::Passing { reason, pause: None });
        }
        if start < asked {
            self.begin_again()?;
        }
        Ok(start)
    }

    /// Reads back what lies on the disk, which another process or an earlier one may have written.
    fn check(&mut self) -> Result<(), Failure> {
        let mut context = match self.blob.etag.len() {
            64 => Context::new(&SHA256),
            _ => Context::new(&SHA1_FOR_LEGACY_USE_ONLY),
        };
        if self.blob.etag.len() != 64 {
            // As git hashes a file.
            context.update(format!("blob {}\0", self.blob.size).as_bytes());
        }
        self.file.seek(SeekFrom::Start(0)).map_err(Error::io(self.path))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match self.file.read(&mut buffer).map_err(Error::io(self.path))? {
                0 => break,
                read => context.update(&buffer[..read]),
            }
        }
        let found: String = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        match found == self.blob.etag {
            true => Ok(()),
            false => Err(Failure::Wrong(format!("its digest is {found}, expected {}", self.blob.etag))),
        }
    }
}

#[cfg(test)]
mod tests;
