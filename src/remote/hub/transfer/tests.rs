//! Against a server on loopback that behaves badly.

#[allow(dead_code)]
use std::sync::atomic::{AtomicUsize, Ordering};

use ring::digest::digest;

use super::*;
use crate::remote::server::{Reply, Request, Server};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const FILE: &str = "model.safetensors";

fn name() -> HubName {
    HubName::parse("org/tiny").unwrap()
}

fn patience() -> Patience {
    let short = Duration::from_millis(300);
    Patience { connect: short, read: short, pause: Duration::from_millis(1) }
}

fn hub(server: &Server, token: Option<&str>) -> Hub {
    // `wait` installs the cryptography that the client needs.
    super::super::wait(async { Hub::new(server.url().parse().unwrap(), token.map(str::to_string), &patience()) })
        .unwrap()
        .unwrap()
}

fn content() -> Vec<u8> {
    (0..100_000u32).map(|number| (number.wrapping_mul(number) >> 7) as u8).collect()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn blob_of(bytes: &[u8]) -> Blob {
    Blob { etag: hexadecimal(digest(&SHA256, bytes).as_ref()), size: bytes.len() as u64 }
}

/// What becomes of a file of which `before` is there already, from a server that answers the n-th request (from 0) by `answer`; and what was asked.
fn fetched(
    before: &[u8],
    answer: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static,
) -> (Result<Vec<u8>, String>, Vec<Request>, Option<u64>) {
    let count = AtomicUsize::new(0);
    let server = Server::start(move |request| answer(count.fetch_add(1, Ordering::SeqCst), request));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blobs/incomplete");
    std::fs::create_dir(folder.path().join("blobs")).unwrap();
    std::fs::write(&path, before).unwrap();
    let (hub, blob) = (hub(&server, None), blob_of(&content()));
    let mut progress = Progress::new(FILE, blob.size, true);
    let result = super::super::wait(hub.download(&name(), COMMIT, FILE, &blob, &path, &mut progress)).unwrap();
    let left = path.metadata().ok().map(|metadata| metadata.len());
    let result = result.map(|()| std::fs::read(&path).unwrap()).map_err(|error| error.to_string());
    (result, server.requests(), left)
}

fn ranges(requests: &[Request]) -> Vec<Option<&str>> {
    requests.iter().map(|request| request.headers.get("range").map(String::as_str)).collect()
}

#[test]
fn what_breaks_off_every_time_comes_to_an_end_by_ranges() {
    // More breaks than a file that does not grow would be forgiven.
    let (result, requests, _) =
        fetched(&[], |_, request| Reply { break_off: Some(9_000), ..Reply::file(request, &content(), "etag") });
    assert!(result.unwrap() == content());
    let asked = ranges(&requests);
    assert_eq!(asked[..3], [None, Some("bytes=9000-"), Some("bytes=18000-")]);
    assert_eq!(asked.len(), 12);
    assert_eq!(requests[0].path, format!("/org/tiny/resolve/{COMMIT}/{FILE}"));
}

#[test]
fn what_an_earlier_process_left_is_gone_on_from() {
    let half = &content()[..50_000];
    let (result, requests, _) = fetched(half, |_, request| Reply::file(request, &content(), "etag"));
    assert!(result.unwrap() == content());
    assert_eq!(ranges(&requests), [Some("bytes=50000-")]);
    // All of it was there, and only its name was not changed yet.
    let (result, requests, _) = fetched(&content(), |_, _| Reply::status(500));
    assert!(result.unwrap() == content() && requests.is_empty());
    // Something else was left: longer than the file, or other bytes.
    for left in [vec![1; 200_000], vec![1; 50_000], vec![1; 100_000]] {
        let (result, _, _) = fetched(&left, |_, request| Reply::file(request, &content(), "etag"));
        assert!(result.unwrap() == content());
    }
}

#[test]
fn a_server_that_knows_no_ranges_begins_again() {
    let (result, requests, _) = fetched(&content()[..50_000], |count, _| match count {
        0 => Reply { break_off: Some(60_000), ..Reply::text(content()) },
        _ => Reply::text(content()),
    });
    assert!(result.unwrap() == content());
    assert_eq!(ranges(&requests), [Some("bytes=50000-"), Some("bytes=60000-")]);
    // Another part than was asked for is not taken.
    let (result, requests, _) = fetched(&content()[..50_000], |_, request| match request.range(100_000) {
        Some(_) => Reply { status: 206, ..Reply::text(content()) }.header("Content-Range", "bytes 0-99999/100000"),
        None => Reply::text(content()),
    });
    assert!(result.unwrap() == content());
    assert_eq!(ranges(&requests), [Some("bytes=50000-"), None]);
    let (result, requests, _) = fetched(&content()[..50_000], |count, _| match count {
        0 => Reply::status(416),
        _ => Reply::text(content()),
    });
    assert!(result.unwrap() == content());
    assert_eq!(ranges(&requests), [Some("bytes=50000-"), None]);
}

#[test]
fn a_slow_server_is_waited_for_and_a_silent_one_is_not() {
    let slow = |_: usize, request: &Request| Reply {
        slow: Some((20_000, Duration::from_millis(150))),
        ..Reply::file(request, &content(), "etag")
    };
    let (result, requests, _) = fetched(&[], slow);
    assert!(result.unwrap() == content() && requests.len() == 1);
    // It stops after a part, and answers no more.
    let silent = |count: usize, request: &Request| {
        if count > 0 {
            std::thread::sleep(Duration::from_secs(2));
        }
        Reply { slow: Some((40_000, Duration::from_secs(2))), ..Reply::file(request, &content(), "etag") }
    };
    let (result, requests, left) = fetched(&[], silent);
    let error = result.unwrap_err();
    assert!(error.contains("of model.safetensors, 40000 of 100000 bytes came, and then nothing more"), "{error}");
    assert!(error.contains("nothing came from http://127.0.0.1:"), "{error}");
    assert!(error.contains("for 0.3 seconds; run it again"), "{error}");
    assert_eq!((requests.len(), left), (FILE_RETRIES + 1, Some(40_000)));
}

#[test]
fn a_wrong_length_is_never_written() {
    // Longer than what comes: the line seems to break, and what came is kept.
    let (result, _, left) =
        fetched(&[], |_, _| Reply { stated_length: Some(100_000), ..Reply::text(&content()[..70_000]) });
    assert!(result.unwrap_err().contains("70000 of 100000 bytes came"));
    assert_eq!(left, Some(70_000));
    // Other than what is missing: nothing of it is taken, and what is there stays.
    for length in [17, 120_000] {
        let (result, requests, left) = fetched(&content()[..50_000], move |_, _| Reply::text(vec![b'x'; length]));
        let error = result.unwrap_err();
        assert!(error.contains(&format!("{length} bytes were announced where 100000 are missing")), "{error}");
        assert_eq!((requests.len(), left), (FILE_RETRIES + 1, Some(50_000)));
    }
    // Shorter than what comes.
    let (result, _, left) = fetched(&[], |_, _| Reply { stated_length: Some(50_000), ..Reply::text(content()) });
    assert!(result.is_err() && left == Some(0));
    // More than all, without a length.
    let endless = |_: usize, _: &Request| Reply { without_length: true, ..Reply::text(vec![b'x'; 1 << 22]) };
    let (result, requests, left) = fetched(&[], endless);
    let error = result.unwrap_err();
    assert!(
        error.contains("is not what http://127.0.0.1:") && error.contains("more than 100000 bytes came"),
        "{error}"
    );
    assert_eq!((requests.len(), left), (2, None));
    // The right bytes without a length are right.
    let (result, _, _) = fetched(&[], |_, _| Reply { without_length: true, ..Reply::text(content()) });
    assert!(result.unwrap() == content());
}

#[test]
fn other_bytes_are_fetched_once_more_and_then_refused() {
    let other = |count: usize, times: usize| {
        let mut bytes = content();
        bytes[70_000] ^= u8::from(count < times);
        Reply::text(bytes)
    };
    let (result, requests, _) = fetched(&[], move |count, _| other(count, 1));
    assert!(result.unwrap() == content() && requests.len() == 2);
    let (result, requests, left) = fetched(&[], move |count, _| other(count, 9));
    let error = result.unwrap_err();
    assert!(error.contains("its digest is ") && error.contains(&blob_of(&content()).etag), "{error}");
    assert_eq!((requests.len(), left), (2, None));
}

#[test]
fn a_busy_server_is_asked_again_and_one_that_says_no_is_not() {
    for status in [503, 429, 408, 500] {
        let (result, requests, _) = fetched(&[], move |count, request| match count {
            0 | 1 => Reply::status(status).header("Retry-After", if count == 0 { "1" } else { "soon" }),
            _ => Reply::file(request, &content(), "etag"),
        });
        assert!(result.unwrap() == content() && requests.len() == 3);
    }
    let (result, requests, _) = fetched(&[], |_, _| Reply::status(503));
    assert!(result.unwrap_err().contains("answers 503; run it again"));
    assert_eq!(requests.len(), FILE_RETRIES + 1);
    for (status, expected) in [(401, "gives no access"), (403, "gives no access"), (404, "(404)"), (410, "answers 410")]
    {
        let (result, requests, _) = fetched(&[], move |_, _| Reply::status(status));
        let error = result.unwrap_err();
        assert!(error.contains(expected) && requests.len() == 1, "{error}");
    }
}

#[test]
fn a_small_file_is_known_by_the_digest_of_git() {
    let server = Server::start(|_| Reply::text("hello\n"));
    let folder = tempfile::tempdir().unwrap();
    // What `git hash-object` says of it.
    let blob = Blob { etag: "ce013625030ba8dba906f756967f9e9ca394464a".to_string(), size: 6 };
    let hub = hub(&server, None);
    let path = folder.path().join("file");
    let (name, mut progress) = (name(), Progress::new("", blob.size, true));
    let download = hub.download(&name, COMMIT, "a?b#c d", &blob, &path, &mut progress);
    super::super::wait(download).unwrap().unwrap();
    assert_eq!(std::fs::read(path).unwrap(), b"hello\n");
    assert_eq!(server.requests()[0].path, format!("/org/tiny/resolve/{COMMIT}/a%3Fb%23c%20d"));
}

#[test]
fn the_token_goes_to_the_hub_and_not_where_it_leads() {
    let store = Server::start(|request| Reply::file(request, &content(), "etag"));
    let (elsewhere, count) = (store.url(), AtomicUsize::new(0));
    let server = Server::start(move |_| {
        // An address that has expired, and then one that has not.
        let path = if count.fetch_add(1, Ordering::SeqCst) == 0 { "/signed=secret" } else { "/x" };
        Reply::status(302).header("Location", &format!("{elsewhere}{path}"))
    });
    let folder = tempfile::tempdir().unwrap();
    let (hub, blob) = (hub(&server, Some("hf_secret")), blob_of(&content()));
    let mut progress = Progress::new(FILE, blob.size, true);
    let path = folder.path().join("file");
    super::super::wait(hub.download(&name(), COMMIT, FILE, &blob, &path, &mut progress)).unwrap().unwrap();
    assert!(std::fs::read(path).unwrap() == content());
    assert_eq!(server.requests()[0].headers["authorization"], "Bearer hf_secret");
    let headers = &store.requests()[0].headers;
    assert!(!headers.contains_key("authorization") && !headers.contains_key("referer"), "{headers:?}");
}

#[test]
fn the_address_that_a_hub_leads_to_is_in_no_message() {
    // Nothing listens there.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let targets = [format!("http://{closed}/x?signature=secret"), "/x?signature=secret".to_string()];
    for target in targets {
        let server = Server::start(move |_| Reply::status(302).header("Location", &target));
        let folder = tempfile::tempdir().unwrap();
        let (hub, blob) = (hub(&server, Some("hf_secret")), blob_of(&content()));
        let mut progress = Progress::new(FILE, blob.size, true);
        let path = folder.path().join("file");
        let error = super::super::wait(hub.download(&name(), COMMIT, FILE, &blob, &path, &mut progress)).unwrap();
        let error = error.unwrap_err().to_string();
        assert!(error.contains(&server.url()) && !error.contains("secret"), "{error}");
    }
}

#[test]
fn a_listing_is_bounded_and_its_address_escaped() {
    let server = Server::start(|_| Reply { without_length: true, ..Reply::text(vec![b' '; 17 << 20]) });
    let listing = |server: &Server, name: &str| {
        let (hub, name) = (hub(server, None), HubName::parse(name).unwrap());
        super::super::wait(async { hub.listing(&name).await }).unwrap()
    };
    let Err(Unanswered::Refused(error)) = listing(&server, "org/tiny@refs/pr/1") else { panic!("not refused") };
    assert!(error.to_string().contains("is larger than 16 MiB"), "{error}");
    assert_eq!(server.requests()[0].path, "/api/models/org/tiny/revision/refs%2Fpr%2F1?blobs=true");
    let server = Server::start(|_| Reply::text("<html>"));
    let Err(Unanswered::Refused(error)) = listing(&server, "org/tiny") else { panic!("not refused") };
    assert!(error.to_string().contains("something else than a list of the model's files"), "{error}");
    let server = Server::start(|_| Reply::status(503));
    let Err(Unanswered::Silent(reason)) = listing(&server, "org/tiny") else { panic!("not silent") };
    assert_eq!((reason, server.requests().len()), (format!("{} answers 503", server.url()), QUESTION_RETRIES + 1));
}

#[test]
fn a_password_and_a_strange_token_are_in_no_message() {
    let endpoint: Url = "http://user:secret@127.0.0.1:9/hub/".parse().unwrap();
    let made = |token: &str| super::super::wait(async { Hub::new(endpoint.clone(), Some(token.into()), &patience()) });
    let hub = made("hf_x").unwrap().unwrap();
    assert_eq!(hub.shown, "http://127.0.0.1:9/hub");
    assert_eq!(hub.url(["api"].into_iter()).path(), "/hub/api");
    let error = made("hf_secret\n").unwrap().err().unwrap().to_string();
    assert!(error.contains("HF_TOKEN") && !error.contains("secret"), "{error}");
}
