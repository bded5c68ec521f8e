//! Data on other machines: from object stores and web servers on loopback, which do as they should or do not.

use std::collections::BTreeMap;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::server::{Reply, Request, Server};
use crate::workbench::Workbench;

/// The data of most tests.
const FILE: &str = "demonstrations.parquet";

/// A run of three steps on this data.
fn sft(bench: &Workbench, data: &str, output: &str) -> Command {
    let mut command = bench.command(&format!(
        "sft --model model --data {data} --output {output} --max-steps 3 --batch-size 4 --learning-rate 3e-3 --seed 3 --shuffle-window 5"
    ));
    // Nothing of whoever runs the tests.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy().to_uppercase();
        if ["AWS_", "GOOGLE_", "AZURE_", "AZURITE_"].iter().any(|start| text.starts_with(start))
            || text.ends_with("_PROXY")
        {
            command.env_remove(name);
        }
    }
    command
}

fn succeeds(mut command: Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{error}");
    error
}

/// The sentence with which a program refuses to go on.
fn fault(output: Output) -> String {
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    error.trim_end().to_owned()
}

/// Whether two runs ended in the same weights.
fn same_weights(bench: &Workbench, one: &str, other: &str) -> bool {
    let weights = |run: &str| bench.bytes(&format!("{run}/model.safetensors"));
    weights(one) == weights(other)
}

/// A bench with a run on local data in `local`.
fn bench() -> Workbench {
    let bench = Workbench::new();
    succeeds(sft(&bench, FILE, "local"));
    bench
}

#[test]
fn a_web_server_that_fails_breaks_off_and_is_slow_gives_the_same_run() {
    let bench = bench();
    let bytes = bench.bytes(FILE);
    let (heads, parts, length) = (AtomicUsize::new(0), AtomicUsize::new(0), bytes.len());
    let server = Server::start(move |request| {
        let reply = Reply::file(request, &bytes, "one");
        let is_head = request.method == "HEAD";
        let number = if is_head { &heads } else { &parts }.fetch_add(1, Ordering::SeqCst);
        match number {
            0 => Reply::status(503),
            _ if is_head => reply,
            1 => Reply { break_off: Some(0), ..reply },
            2 | 3 => Reply { break_off: Some(length / 3), ..reply },
            _ => Reply { slow: Some((length / 5, Duration::from_millis(30))), ..reply },
        }
    });
    succeeds(sft(&bench, &format!("{}/some%20folder/{FILE}", server.url()), "remote"));
    assert!(same_weights(&bench, "local", "remote"));
    let requests = server.requests();
    assert!(requests.iter().all(|request| request.path == format!("/some%20folder/{FILE}")), "{requests:?}");
    let parts = requests.iter().filter(|request| request.method == "GET");
    assert!(parts.clone().count() > 4 && parts.clone().all(|request| request.headers.contains_key("range")));
}

/// Variables of the environment; an empty value stands for the server's address.
type Variables<'a> = &'a [(&'a str, &'a str)];

/// What an object store holds, by bucket and key.
type Objects = Arc<BTreeMap<String, Vec<u8>>>;

/// The demonstrations twice, files and marks of folders that must not be read, and one of another name.
fn objects(bench: &Workbench) -> Objects {
    let bytes = bench.bytes(FILE);
    let names = [
        "data/a.parquet",
        "data/out.parquet/b.parquet",
        "data/.hidden/c.parquet",
        "data/notes.txt",
        "data/one.pq",
        "hub/data/train.parquet",
        "hub/data/test.parquet",
    ];
    let marks = ["data/", "data/out.parquet/"];
    let files = names.iter().map(|name| (name, bytes.clone())).chain(marks.iter().map(|name| (name, Vec::new())));
    let readme = (&"hub/README.md", b"# Demonstrations\n".to_vec());
    Arc::new(files.chain([readme]).map(|(name, bytes)| (format!("bucket/{name}"), bytes)).collect())
}

/// The query of a request.
fn query(request: &Request, name: &str) -> Option<String> {
    let (_, query) = request.path.split_once('?')?;
    let value = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?;
    Some(value.replace("%2F", "/"))
}

/// Answers as stores do whose addresses are `/prefix/bucket/key`; `list` writes a listing of keys with their lengths.
fn store(objects: Objects, prefix: &'static str, list: fn(&[(&str, usize)]) -> String) -> Server {
    Server::start(move |request| {
        let path = request.path.split('?').next().unwrap_or_default();
        let path = path.replace("%2F", "/").replace("%2E", ".");
        let Some(name) = path.strip_prefix(prefix) else { return Reply::status(400) };
        if ["list-type=", "comp=list"].iter().any(|listing| request.path.contains(listing)) {
            let wanted = query(request, "prefix").unwrap_or_default();
            let found = objects.iter().filter_map(|(name, bytes)| {
                let key = name.strip_prefix("bucket/").filter(|key| key.starts_with(&wanted))?;
                Some((key, bytes.len()))
            });
            return Reply::text(list(&found.collect::<Vec<_>>())).header("Content-Type", "application/xml");
        }
        objects.get(name).map_or(Reply::status(404), |bytes| Reply::file(request, bytes, "one"))
    })
}

fn bucket_listing(found: &[(&str, usize)]) -> String {
    let object = |(key, size): &(&str, usize)| {
        format!(
            "<Contents><Key>{key}</Key><Size>{size}</Size><LastModified>2026-10-01T10:00:00.000Z</LastModified><ETag>\"one\"</ETag></Contents>"
        )
    };
    format!("<ListBucketResult>{}</ListBucketResult>", found.iter().map(object).collect::<String>())
}

fn container_listing(found: &[(&str, usize)]) -> String {
    let object = |(key, size): &(&str, usize)| {
        format!(
            "<Blob><Name>{key}</Name><Properties><Last-Modified>Thu, 01 Oct 2026 10:00:00 GMT</Last-Modified><Content-Length>{size}</Content-Length><Content-Type>x</Content-Type><Etag>one</Etag></Properties></Blob>"
        )
    };
    let blobs: String = found.iter().map(object).collect();
    format!("<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>")
}

/// The lines that stand for data in a run's folder.
fn recorded(bench: &Workbench, run: &str) -> String {
    String::from_utf8(bench.bytes(&format!("{run}/settings.toml"))).unwrap()
}

#[test]
fn object_stores_are_read_by_file_folder_and_pattern() {
    let bench = bench();
    bench.put("two/a.parquet", &bench.bytes(FILE));
    bench.put("two/out.parquet/b.parquet", &bench.bytes(FILE));
    succeeds(sft(&bench, "two", "both"));
    assert!(!same_weights(&bench, "local", "both"));

    let objects = objects(&bench);
    let s3 = store(objects.clone(), "/", bucket_listing);
    let gs = store(objects.clone(), "/", bucket_listing);
    let az = store(objects, "/devstoreaccount1/", container_listing);
    const SECRET: &str = "wJalrXUtnFEMI-secret";
    let stores: [(&str, &Server, Variables); 3] = [
        (
            "s3",
            &s3,
            &[
                ("AWS_ENDPOINT", ""),
                ("AWS_ACCESS_KEY_ID", "someone"),
                ("AWS_SECRET_ACCESS_KEY", SECRET),
                ("AWS_REGION", "here"),
            ],
        ),
        ("gs", &gs, &[("GOOGLE_BASE_URL", ""), ("GOOGLE_SKIP_SIGNATURE", "true")]),
        ("az", &az, &[("AZURITE_BLOB_STORAGE_URL", ""), ("AZURE_STORAGE_USE_EMULATOR", "true")]),
    ];
    for (scheme, server, variables) in stores {
        for (number, (data, expected)) in [
            ("data/a.parquet", "local"),
            ("hub", "local"),
            ("data", "both"),
            ("data/", "both"),
            ("data/**/[ab].parquet", "both"),
            ("data/*.parquet", "local"),
            ("data/?.parquet", "local"),
            ("d?ta/a.p*", "local"),
            ("data/out.parquet", "local"),
            ("data/one.pq", "local"),
        ]
        .into_iter()
        .enumerate()
        {
            let (data, run) = (format!("{scheme}://bucket/{data}"), format!("{scheme}-{number}"));
            let mut command = sft(&bench, &data, &run);
            for (name, value) in variables {
                command.env(name, if value.is_empty() { server.url() } else { value.to_string() });
            }
            let printed = succeeds(command);
            assert!(same_weights(&bench, expected, &run), "{data}");
            assert!(recorded(&bench, &run).contains(&data));
            assert!(!printed.contains(SECRET) && !recorded(&bench, &run).contains(SECRET));
        }
        let mut command = sft(&bench, &format!("{scheme}://bucket/data/x-*.parquet"), "none");
        variables.iter().for_each(|(name, value)| {
            command.env(name, if value.is_empty() { server.url() } else { value.to_string() });
        });
        assert!(fault(command.output().unwrap()).ends_with("no file matches this pattern"));
    }
    assert!(s3.requests().iter().all(|request| request.headers["authorization"].starts_with("AWS4-HMAC-SHA256")));
}

#[test]
fn what_cannot_be_read_is_refused_in_one_sentence() {
    let bench = bench();
    let bytes = bench.bytes(FILE);
    let server = Server::start(move |request| {
        let reply = Reply::file(request, &bytes, "one");
        let whole = Reply::text(bytes.clone()).header("ETag", "\"one\"");
        match request.path.as_str() {
            "/401.parquet" => Reply::status(401),
            "/403.parquet" => Reply::status(403),
            "/whole.parquet" => whole,
            "/text.parquet" => Reply::file(request, b"<html>This is no Parquet file, but a page.</html>", "one"),
            "/empty.parquet" => Reply::file(request, b"", "one"),
            "/truncated.parquet" => Reply::file(request, &bytes[..bytes.len() - 9], "one"),
            // Another part than was asked for.
            "/shifted.parquet" if request.method == "GET" => {
                Reply { headers: Vec::new(), ..reply }.header("Content-Range", &format!("bytes 1-{0}/{0}", bytes.len()))
            }
            // Longer and shorter than what there is.
            "/longer.parquet" if request.method == "HEAD" => Reply { stated_length: Some(bytes.len() + 4096), ..whole },
            "/shorter.parquet" if request.method == "HEAD" => Reply { stated_length: Some(bytes.len() / 2), ..whole },
            "/endless.parquet" if request.method == "HEAD" => Reply { stated_length: Some(1 << 60), ..whole },
            "/shifted.parquet" | "/longer.parquet" | "/shorter.parquet" | "/endless.parquet" => reply,
            _ => Reply::status(404),
        }
    });
    let sentence = |data: &str| {
        let error = fault(sft(&bench, data, "run").output().unwrap());
        assert!(!bench.path("run").exists(), "{data}: a run was begun");
        error
    };
    for (file, expected) in [
        ("nothing", "there is no such file"),
        ("401", "the server does not let it be read"),
        ("403", "the server does not let it be read"),
        ("whole", "the server gives whole files only"),
        ("text", "not a Parquet file"),
        ("empty", "the file is empty"),
        ("truncated", "truncated"),
        ("shifted", "cannot be read"),
        ("longer", "is not what it was when it was opened"),
        ("shorter", "is not what it was when it was opened"),
        ("endless", "416"),
    ] {
        let url = format!("{}/{file}.parquet", server.url());
        let error = sentence(&url);
        assert!(error.contains(&url) && error.contains(expected), "{error}");
    }
    for (url, expected) in [
        ("ftp://host/a.parquet", "expected s3://, gs://, az://, http:// or https://"),
        ("http://host/folder/", "a web server cannot tell which files it holds"),
        ("http://host/*.parquet", "a web server cannot tell which files it holds"),
        ("s3:///a.parquet", "names no host, bucket or container"),
        ("s3://bucket/../a.parquet", "not the name of a file"),
    ] {
        assert!(sentence(url).contains(expected), "{url}: {}", sentence(url));
    }
    // Secrets in a URL are not repeated.
    for url in [
        "http://me:password@host/a.parquet",
        "https://host/a.parquet?sig=password",
        "https://host?sig=password/a.parquet",
        "az://container/a.parquet?sv=1&sig=password",
        "s3://key:pass/password@bucket/a.parquet",
    ] {
        let error = sentence(url);
        assert!(error.contains("credentials belong into the environment") && !error.contains("password"), "{error}");
    }
}

#[test]
fn an_environment_that_cannot_be_used_and_a_store_that_lists_anything_are_one_sentence() {
    let bench = bench();
    let store = Server::start(|request| match query(request, "prefix") {
        Some(_) => Reply::text(bucket_listing(&[("x", 5), ("\u{e9}\u{e9}\u{e9}", 5), ("dat", 0)])),
        None => Reply::status(404),
    });
    let sentence = |url: &str, variables: &[(&str, &str)]| {
        let mut command = sft(&bench, url, "run");
        command.env("AWS_ENDPOINT", store.url()).env("AWS_SECRET_ACCESS_KEY", "secret").env("AWS_REGION", "here");
        command.env("AWS_ACCESS_KEY_ID", "someone").envs(variables.iter().copied());
        let error = fault(command.output().unwrap());
        assert!(!error.contains("secret"), "{error}");
        error
    };
    assert!(sentence("s3://bucket/data", &[]).contains("there is no such file, and no data file below it"));
    let endpoint = sentence("s3://bucket/data", &[("AWS_ENDPOINT", "localhost:9000")]);
    assert!(endpoint.contains("AWS_ENDPOINT: not the address of a server"), "{endpoint}");
    let broken = sentence("s3://bucket/data", &[("AWS_ACCESS_KEY_ID", "some\none")]);
    assert!(broken.contains("check them for spaces, line ends"), "{broken}");
    // A line end behind a key, as files have it, does no harm.
    let trimmed = sentence("s3://bucket/data", &[("AWS_ACCESS_KEY_ID", "someone\n")]);
    assert!(trimmed.contains("there is no such file"), "{trimmed}");
}

#[test]
fn a_remote_file_that_changes_is_noticed() {
    let bench = bench();
    let bytes = bench.bytes(FILE);
    let version = Arc::new(Mutex::new("one"));
    let (is_shifty, now) = (Arc::new(AtomicBool::new(false)), version.clone());
    let shifty = is_shifty.clone();
    let server = Server::start(move |request| {
        let reply = Reply::file(request, &bytes, *now.lock().unwrap());
        if shifty.load(Ordering::SeqCst) && request.method == "HEAD" {
            Reply::file(request, &bytes, "before")
        } else {
            reply
        }
    });
    let url = format!("{}/{FILE}", server.url());
    succeeds(sft(&bench, &url, "run"));
    // The same version goes on, another one does not.
    let resume = || {
        let mut command = sft(&bench, &url, "run");
        command.arg("--resume");
        command
    };
    let refused = |error: String, reason: &str| assert!(error.contains(&url) && error.contains(reason), "{error}");
    *version.lock().unwrap() = "two";
    refused(fault(resume().output().unwrap()), "has other contents than when the run began");
    *version.lock().unwrap() = "one";
    succeeds(resume());
    // Changed between one request of a run and the next.
    is_shifty.store(true, Ordering::SeqCst);
    refused(fault(sft(&bench, &url, "other").output().unwrap()), "is not what it was when it was opened");
}

#[test]
fn sources_of_a_mixture_may_be_remote() {
    let bench = bench();
    let bytes = bench.bytes(FILE);
    let server = Server::start(move |request| Reply::file(request, &bytes, "one"));
    let mixture = |data: &str| format!("[[source]]\ndata = \"{data}\"\ntask = \"colours\"\n");
    bench.put("here.toml", mixture(FILE).as_bytes());
    bench.put("there.toml", mixture(&format!("{}/{FILE}", server.url())).as_bytes());
    succeeds(sft(&bench, "here.toml", "mixed"));
    succeeds(sft(&bench, "there.toml", "remote"));
    assert!(same_weights(&bench, "mixed", "remote"));
}
