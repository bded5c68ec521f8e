//! A web server on loopback that does what it is told: also to break off, to be slow and to lie about lengths.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What was asked for.
#[allow(dead_code)]
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// With the query.
    pub path: String,
    /// By names in lower case.
    pub headers: BTreeMap<String, String>,
}

impl Request {
    /// The bytes asked for of a file of this length, if not all; a range that begins beyond the end is `None` too.
    pub fn range(&self, length: usize) -> Option<std::ops::Range<usize>> {
        let (start, end) = self.headers.get("range")?.strip_prefix("bytes=")?.split_once('-')?;
        if start.is_empty() {
            return Some(length.saturating_sub(end.parse().ok()?)..length);
        }
        let start = start.parse().ok().filter(|start| *start < length)?;
        let end = if end.is_empty() { length } else { (end.parse::<usize>().ok()? + 1).min(length) };
        Some(start..end)
    }
}

/// What is answered.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// The length that is stated, where it is not that of the body.
    pub stated_length: Option<usize>,
    /// No length is stated; the body ends with the connection.
    pub without_length: bool,
    /// After so many bytes of the body the connection is cut.
    pub break_off: Option<usize>,
    /// The body comes in pieces of so many bytes, with so long a pause after each.
    pub slow: Option<(usize, Duration)>,
}

impl Reply {
    /// A reply without more.
    pub fn status(status: u16) -> Self {
        Reply { status, ..Reply::default() }
    }

    /// A reply with a body.
    pub fn text(body: impl Into<Vec<u8>>) -> Self {
        Reply { status: 200, body: body.into(), ..Reply::default() }
    }

    /// The file, or the part of it that was asked for.
    pub fn file(request: &Request, bytes: &[u8], etag: &str) -> Self {
        let reply = match request.range(bytes.len()) {
            Some(range) => {
                let content = format!("bytes {}-{}/{}", range.start, range.end.saturating_sub(1), bytes.len());
                let reply = Reply { status: 206, body: bytes[range].to_vec(), ..Reply::default() };
                reply.header("Content-Range", &content)
            }
            None if request.headers.contains_key("range") => {
                Reply::status(416).header("Content-Range", &format!("bytes */{}", bytes.len()))
            }
            None => Reply::text(bytes),
        };
        reply.header("ETag", &format!("\"{etag}\"")).header("Last-Modified", "Thu, 01 Oct 2026 10:00:00 GMT")
    }

    /// The same with a header more.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A server that lives as long as the process.
#[derive(Clone)]
pub struct Server {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Answers each request with what `answer` says.
    pub fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Server { address: listener.local_addr().unwrap(), requests: Arc::default() };
        let (requests, answer) = (server.requests.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (requests, answer) = (requests.clone(), answer.clone());
                std::thread::spawn(move || drop(serve(stream, &requests, &*answer)));
            }
        });
        server
    }

    /// `http://127.0.0.1:…`
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All requests until now.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

/// Answers the requests of one connection until it ends.
fn serve(
    mut stream: TcpStream,
    requests: &Mutex<Vec<Request>>,
    answer: &(impl Fn(&Request) -> Reply + ?Sized),
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(request) = read(&mut reader)? {
        requests.lock().unwrap().push(request.clone());
        let reply = answer(&request);
        let length = reply.stated_length.unwrap_or(reply.body.len());
        let mut head = format!("HTTP/1.1 {} -\r\nAccept-Ranges: bytes\r\n", reply.status);
        if !reply.without_length {
            head += &format!("Content-Length: {length}\r\n");
        }
        reply.headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        if request.method == "HEAD" {
            continue;
        }
        let body = &reply.body[..reply.break_off.unwrap_or(reply.body.len()).min(reply.body.len())];
        let (piece, pause) = reply.slow.unwrap_or((body.len().max(1), Duration::ZERO));
        for piece in body.chunks(piece) {
            stream.write_all(piece)?;
            stream.flush()?;
            std::thread::sleep(pause);
        }
        if reply.without_length || reply.break_off.is_some() || length != reply.body.len() {
            return stream.shutdown(std::net::Shutdown::Both);
        }
    }
    Ok(())
}

/// The next request of a connection, without its body.
fn read(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|length| length.parse::<u64>().ok()).unwrap_or(0);
    std::io::copy(&mut reader.take(length), &mut std::io::sink())?;
    Ok(Some(Request { method, path, headers }))
}
