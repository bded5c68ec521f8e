//! Models and data sets of a hub, which here is a server on loopback, by the programs as users run them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ring::digest::{Algorithm, SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use serde_json::{Value, json};

use crate::server::{Reply, Request, Server};
use crate::workbench::Workbench;

const TOKEN: &str = "hf_thisIsNoRealToken";

/// The files of a model by their names.
type Files = BTreeMap<String, Vec<u8>>;

fn hexadecimal(algorithm: &'static Algorithm, bytes: &[u8]) -> String {
    digest(algorithm, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The files at the top of a folder.
fn files_of(folder: &Path) -> Files {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file());
    let wanted = |name: &str| name.ends_with(".safetensors") || name.ends_with(".json") && name != "finished.json";
    let named = entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.path()));
    named.filter(|(name, _)| wanted(name)).map(|(name, path)| (name, std::fs::read(path).unwrap())).collect()
}

/// A commit's name: like git's, it follows from the contents.
fn commit(files: &Files) -> String {
    let all: Vec<u8> = files.iter().flat_map(|(name, bytes)| [name.as_bytes(), bytes].concat()).collect();
    hexadecimal(&SHA1_FOR_LEGACY_USE_ONLY, &all)
}

/// What the hub says of a model.
fn listing(files: &Files) -> Value {
    let sibling = |(name, bytes): (&String, &Vec<u8>)| {
        let git = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
        let mut sibling = json!({"rfilename": name, "size": bytes.len(),
                                 "blobId": hexadecimal(&SHA1_FOR_LEGACY_USE_ONLY, &git)});
        if name.ends_with(".safetensors") || name.ends_with(".parquet") {
            sibling["lfs"] = json!({"sha256": hexadecimal(&SHA256, bytes), "size": bytes.len(), "pointerSize": 134});
        }
        sibling
    };
    json!({"id": "org/tiny", "sha": commit(files), "siblings": files.iter().map(sibling).collect::<Vec<_>>()})
}

/// A hub whose models can change. Data sets have names that begin with `datasets/`, and those of a branch end in `@branch`, its slashes escaped.
#[derive(Clone, Default)]
struct Models(Arc<Mutex<BTreeMap<String, Files>>>);

impl Models {
    fn of(name: &str, files: Files) -> Self {
        let models = Models::default();
        models.put(name, files);
        models
    }

    fn put(&self, name: &str, files: Files) {
        self.0.lock().unwrap().insert(name.to_string(), files);
    }

    fn answer(&self, request: &Request) -> Reply {
        let models = self.0.lock().unwrap();
        let parts: Vec<&str> = request.path.split(['/', '?']).skip(1).collect();
        match &parts[..] {
            ["api", kind @ ("models" | "datasets"), organisation, name, "revision", revision, "blobs=true"] => {
                let prefix = if *kind == "datasets" { "datasets/" } else { "" };
                let name = format!("{prefix}{organisation}/{name}");
                match models.get(&name) {
                    Some(files) if *revision == "main" || *revision == commit(files) => {
                        Reply::text(listing(files).to_string())
                    }
                    _ => match models.get(&format!("{name}@{revision}")) {
                        Some(files) => Reply::text(listing(files).to_string()),
                        None => Reply::status(404),
                    },
                }
            }
            ["datasets", organisation, name, "resolve", asked, file @ ..] => {
                let file = file.join("/");
                let prefix = format!("datasets/{organisation}/{name}");
                let mut branches = models.iter().filter(|(name, _)| name.split('@').next() == Some(&prefix));
                let files = branches.find(|(_, files)| commit(files) == *asked).map(|(_, files)| files);
                files
                    .and_then(|files| files.get(&file))
                    .map_or(Reply::status(404), |bytes| Reply::file(request, bytes, "etag"))
            }
            [organisation, name, "resolve", _, file] => {
                match models.get(&format!("{organisation}/{name}")).and_then(|files| files.get(*file)) {
                    Some(bytes) => Reply::file(request, bytes, "etag"),
                    None => Reply::status(404),
                }
            }
            _ => Reply::status(404),
        }
    }

    fn serve(&self) -> Server {
        let models = self.clone();
        Server::start(move |request| models.answer(request))
    }
}

/// A program's command with this hub, and a cache in the working folder.
fn with_hub(bench: &Workbench, endpoint: &str, line: &str) -> Command {
    let mut command = bench.command(line);
    for name in ["HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN_PATH", "HTTP_PROXY", "http_proxy"]
    {
        command.env_remove(name);
    }
    let home = bench.path("cache");
    command.env("HF_HOME", home).env("HF_ENDPOINT", endpoint).env("HF_TOKEN", TOKEN).env("NO_PROXY", "127.0.0.1");
    command
}

fn error_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeed(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", error_of(&output));
    error_of(&output)
}

/// Expects the exit code of bad input, and one sentence that holds all of these.
fn refused(mut command: Command, expected: &[&str]) {
    let output = command.output().unwrap();
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.starts_with("error: ") && error.trim_end().lines().count() == 1, "{error}");
    expected.iter().for_each(|expected| assert!(error.contains(expected), "expected {expected} in {error}"));
    assert!(!error.contains(TOKEN), "{error}");
}

/// The files that were asked for.
fn transfers(server: &Server) -> Vec<String> {
    let paths = server.requests().into_iter().map(|request| request.path).filter(|path| path.contains("/resolve/"));
    paths.map(|path| path.rsplit('/').next().unwrap().to_string()).collect()
}

/// Whether a text is in any file of a folder.
fn holds(folder: &Path, text: &str) -> bool {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).any(|path| match path.is_dir() {
        true => holds(&path, text),
        false => std::fs::read(&path).unwrap().windows(text.len()).any(|bytes| bytes == text.as_bytes()),
    })
}

/// A bench with a small trained model in `base`, and its files.
fn bench() -> (Workbench, Files) {
    let bench = Workbench::new();
    bench.sft("base", "model", "--max-steps 2");
    let files = files_of(&bench.path("base"));
    assert!(files.contains_key("model.safetensors") && files.contains_key("tokenizer.json"), "{:?}", files.keys());
    (bench, files)
}

const SFT: &str =
    "--data demonstrations.parquet --evaluation-share 0.2 --max-steps 3 --batch-size 4 --learning-rate 3e-3";

#[test]
fn a_model_of_the_hub_is_the_model_of_its_folder() {
    let (bench, files) = bench();
    bench.succeed(&format!("sft --model base --output by-folder {SFT}"));
    let models = Models::of("org/tiny", files);
    // Every transfer breaks off.
    let served = models.clone();
    let server = Server::start(move |request| Reply { break_off: Some(20_000), ..served.answer(request) });
    let error = succeed(with_hub(&bench, &server.url(), &format!("sft --model org/tiny --output by-name {SFT}")));
    for file in ["model.safetensors", "config.json", "tokenizer.json"] {
        assert!(bench.bytes(&format!("by-name/{file}")) == bench.bytes(&format!("by-folder/{file}")), "{file}");
    }
    let requests = server.requests();
    assert!(requests.iter().any(|request| request.headers.get("range").is_some_and(|range| range == "bytes=20000-")));
    assert!(requests.iter().all(|request| request.headers["authorization"] == format!("Bearer {TOKEN}")));
    let asked = transfers(&server);
    assert!(asked.last().unwrap() == "model.safetensors" && !asked.iter().any(|name| name == "evaluation.json"));
    let settings = String::from_utf8(bench.bytes("by-name/settings.toml")).unwrap();
    assert!(settings.contains("model = \"org/tiny\""), "{settings}");
    // The token stays where it was given.
    assert!(!holds(&bench.path("by-name"), TOKEN) && !holds(&bench.path("cache"), TOKEN) && !error.contains(TOKEN));

    // What is here is not fetched again.
    let again = models.serve();
    succeed(with_hub(&bench, &again.url(), "export --model org/tiny --output again"));
    assert_eq!((again.requests().len(), transfers(&again).len()), (1, 0));
    // Without the network, by the cache alone.
    let line = "export --model org/tiny --output offline";
    for (name, value) in [("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_OFFLINE", "Yes")] {
        let mut offline = with_hub(&bench, &again.url(), line);
        offline.env(name, value);
        assert!(!succeed(offline).contains("warning"));
        let mut absent = with_hub(&bench, &again.url(), "export --model org/other --output absent");
        absent.env(name, value);
        refused(absent, &["org/other: no such folder, and the cache", "HF_HUB_OFFLINE"]);
    }
    assert_eq!(again.requests().len(), 1);
    // Where the hub cannot be reached.
    let closed = closed();
    let error = succeed(with_hub(&bench, &closed, line));
    assert_eq!(error.matches("warning: org/tiny: ").count(), 1, "{error}");
    assert!(error.contains("cannot be reached") && error.contains("uses what the cache holds of it"), "{error}");
    refused(
        with_hub(&bench, &closed, "export --model org/other --output absent"),
        &["org/other: no such folder", "cannot be reached", "HF_ENDPOINT"],
    );
    // A folder of that name is what is meant.
    std::fs::create_dir(bench.path("org")).unwrap();
    std::fs::rename(bench.path("base"), bench.path("org/tiny")).unwrap();
    let unused = models.serve();
    succeed(with_hub(&bench, &unused.url(), "export --model org/tiny --output local"));
    assert_eq!(unused.requests().len(), 0);
}

/// An address at which nothing listens.
fn closed() -> String {
    format!("http://{}", std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap())
}

#[test]
fn a_download_that_was_killed_goes_on() {
    let (bench, files) = bench();
    let models = Models::of("org/tiny", files.clone());
    let served = models.clone();
    let slow = Server::start(move |request| {
        let reply = served.answer(request);
        let is_large = request.path.ends_with("/model.safetensors");
        Reply { slow: is_large.then_some((5_000, Duration::from_millis(200))), ..reply }
    });
    let line = "export --model org/tiny --output merged";
    let mut child = with_hub(&bench, &slow.url(), line).stderr(Stdio::null()).spawn().unwrap();
    let digest = hexadecimal(&SHA256, &files["model.safetensors"]);
    let blobs = bench.path("cache/hub/models--org--tiny/blobs");
    let incomplete = blobs.join(format!("{digest}.incomplete"));
    let length = || incomplete.metadata().map_or(0, |metadata| metadata.len());
    let started = Instant::now();
    while length() < 10_000 {
        assert!(started.elapsed() < Duration::from_secs(60), "nothing came");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let came = length();
    assert!(came < files["model.safetensors"].len() as u64);
    assert!(!bench.path("cache/hub/models--org--tiny/refs").exists());
    let server = models.serve();
    succeed(with_hub(&bench, &server.url(), line));
    let requests = server.requests();
    let ranges: Vec<_> = requests.iter().filter_map(|request| request.headers.get("range")).collect();
    assert_eq!(ranges, [&format!("bytes={came}-")]);
    assert_eq!(transfers(&server), ["model.safetensors"]);
    assert!(!incomplete.exists());
    assert_eq!(std::fs::read_to_string(bench.path("cache/hub/models--org--tiny/refs/main")).unwrap(), commit(&files));
}

#[test]
fn two_processes_fetch_a_file_once() {
    let (bench, files) = bench();
    let models = Models::of("org/tiny", files);
    let server = Server::start(move |request| Reply {
        slow: Some((10_000, Duration::from_millis(50))),
        ..models.answer(request)
    });
    let start = |output: &str| {
        with_hub(&bench, &server.url(), &format!("export --model org/tiny --output {output}"))
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let both = [start("one"), start("two")].map(|child| child.wait_with_output().unwrap());
    both.iter().for_each(|output| assert!(output.status.success(), "{}", error_of(output)));
    let asked = transfers(&server);
    let mut once = asked.clone();
    once.sort();
    once.dedup();
    assert_eq!(asked.len(), once.len(), "{asked:?}");
    assert!(bench.bytes("one/model.safetensors") == bench.bytes("two/model.safetensors"));
}

#[test]
fn an_adapter_of_the_hub_finds_its_base_on_the_hub() {
    let (bench, files) = bench();
    let pin = commit(&files);
    let models = Models::of("org/tiny", files);
    let server = models.serve();
    let lora = |model: &str, output: &str| {
        let line = format!("sft --model {model} --method lora --output {output} {SFT}");
        succeed(with_hub(&bench, &server.url(), &line));
        serde_json::from_slice::<Value>(&bench.bytes(&format!("{output}/adapter_config.json"))).unwrap()
    };
    let config = lora("org/tiny", "adapter");
    assert_eq!((&config["base_model_name_or_path"], &config["revision"]), (&json!("org/tiny"), &Value::Null));
    let pinned = lora(&format!("org/tiny@{pin}"), "pinned");
    assert_eq!((&pinned["base_model_name_or_path"], &pinned["revision"]), (&json!("org/tiny"), &json!(pin)));
    assert!(bench.bytes("adapter/adapter_model.safetensors") == bench.bytes("pinned/adapter_model.safetensors"));
    models.put("org/adapter", files_of(&bench.path("pinned")));
    let score = |model: &str, output: &str| {
        let line = format!("score --model {model} --data demonstrations.parquet --output {output}.parquet");
        succeed(with_hub(&bench, &server.url(), &line));
        bench.bytes(&format!("{output}.parquet"))
    };
    let local = score("adapter", "local");
    std::fs::remove_dir_all(bench.path("cache")).unwrap();
    assert!(score("org/adapter", "remote") == local);
    assert!(score("org/tiny --adapter org/adapter", "stacked") == local);
    let asked = transfers(&server);
    assert!(asked.iter().any(|name| name == "adapter_model.safetensors"), "{asked:?}");
    // Nothing answers to the base's name.
    models.0.lock().unwrap().remove("org/tiny");
    std::fs::remove_dir_all(bench.path("cache")).unwrap();
    refused(
        with_hub(&bench, &server.url(), "export --model org/adapter --output x"),
        &["adapter_config.json: the base model \"org/tiny\" is no folder here", "(404)", "base_model_name_or_path"],
    );
}

#[test]
fn rewards_and_classifiers_come_from_the_hub_too() {
    let (bench, files) = bench();
    bench.reward("reward", "base", "--max-steps 2");
    let models = Models::of("org/tiny", files);
    let reward = files_of(&bench.path("reward"));
    assert!(reward.contains_key("head.json"));
    models.put("org/reward", reward);
    models.put("org/toxic", files_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("data/toxicity")));
    let server = models.serve();
    let ppo = "--data prompts.parquet --batch-size 6 --minibatches 2 --max-steps 1 --response-length 8 --max-length 64";
    let line = format!("ppo --model org/tiny --reward-model org/reward --output by-name {ppo}");
    let error = succeed(with_hub(&bench, &server.url(), &line));
    assert!(error.contains("org/reward"), "{error}");
    bench.succeed(&format!("ppo --model base --reward-model reward --output by-folder {ppo}"));
    assert!(bench.bytes("by-name/model.safetensors") == bench.bytes("by-folder/model.safetensors"));
    let evaluate = "evaluate --data prompts.parquet --response-length 8 --resamples 5";
    let line = format!(
        "{evaluate} --models tiny=org/tiny --reward-model org/reward --toxicity-scorer classifier=org/toxic --output report"
    );
    succeed(with_hub(&bench, &server.url(), &line));
    let report = String::from_utf8(bench.bytes("report/evaluation.json")).unwrap();
    assert!(report.contains("toxicity_by_toxic"), "{report}");
    // Each was fetched once for all that.
    assert_eq!(transfers(&server).iter().filter(|name| *name == "model.safetensors").count(), 3);
}

#[test]
fn a_model_that_has_moved_on_is_not_what_a_run_goes_on_with() {
    let (bench, files) = bench();
    let models = Models::of("org/tiny", files.clone());
    let server = models.serve();
    let line = format!("sft --model org/tiny --output run --checkpoint-every 1 {SFT}");
    succeed(with_hub(&bench, &server.url(), &line));
    let mut moved = files.clone();
    moved.get_mut("model.safetensors").unwrap().iter_mut().next_back().into_iter().for_each(|byte| *byte ^= 1);
    models.put("org/tiny", moved.clone());
    let resume = format!("{line} --resume");
    refused(
        with_hub(&bench, &server.url(), &resume),
        &["has other contents than when the run began", &format!("ask for org/tiny@{}", commit(&files))],
    );
    // Only what is new of a new commit was fetched.
    assert_eq!(transfers(&server).iter().filter(|name| *name == "tokenizer.json").count(), 1);
    // The old commit is in the cache, where the hub has it no more.
    let mut offline =
        with_hub(&bench, &server.url(), &resume.replace("org/tiny", &format!("org/tiny@{}", commit(&files))));
    offline.env("HF_HUB_OFFLINE", "on");
    succeed(offline);
}

#[test]
fn what_no_hub_should_say_is_refused() {
    let bench = Workbench::new();
    let line = "export --model org/tiny --output merged";
    let refuse = |answer: Reply, expected: &[&str]| {
        let server = Server::start(move |request| match request.path.starts_with("/api") {
            true => answer.clone(),
            false => Reply::text("{}"),
        });
        refused(with_hub(&bench, &server.url(), line), expected);
        assert!(!bench.path("merged").exists() && !bench.path("x").exists());
        server.requests().into_iter().filter(|request| !request.path.starts_with("/api")).count()
    };
    refuse(Reply::status(401), &["org/tiny: no such folder", "HF_TOKEN", "does not open it", "/org/tiny,"]);
    refuse(Reply::status(403), &["(403)", "accept the model's conditions"]);
    refuse(Reply::status(404), &["org/tiny: no such folder, and no such model, revision or file at http://127.0.0.1"]);
    refuse(Reply::status(503), &["answers 503"]);
    refuse(Reply::text("{\"sha\": "), &["something else than a list of the model's files"]);
    refuse(Reply::text("[1]"), &["something else than a list of the model's files"]);
    refuse(Reply::text(vec![b' '; 17 << 20]), &["is larger than 16 MiB"]);
    let of = |sha: &str, files: &[(&str, usize)]| {
        let digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"; // of {}
        let sibling =
            |(name, size): &(&str, usize)| json!({"rfilename": name, "size": size, "lfs": {"sha256": digest}});
        Reply::text(json!({"sha": sha, "siblings": files.iter().map(sibling).collect::<Vec<_>>()}).to_string())
    };
    let good = "a".repeat(40);
    refuse(of("../../../../x", &[("config.json", 2)]), &["calls its commit \"../../../../x\""]);
    let climbing = [("../../x", 2), ("a/config.json", 2), ("/tmp/x", 2)];
    assert_eq!(refuse(of(&good, &climbing), &["found nothing at the top of it", "expected config.json"]), 0);
    let pickles = [("config.json", 2), ("pytorch_model.bin", 9), ("tf_model.h5", 9)];
    let sentence = "its weights on the hub are pytorch_model.bin, tf_model.h5, expected model.safetensors";
    assert_eq!(refuse(of(&good, &pickles), &[sentence, "a pickle can run any program"]), 0);
    let huge = [("config.json", 1 << 30), ("model.safetensors", 2)];
    assert_eq!(refuse(of(&good, &huge), &["config.json is 1024 MiB on the hub, expected at most 16 MiB"]), 0);
    let indexed = [("config.json", 2), ("model.safetensors.index.json", 2)];
    refuse(of(&good, &indexed), &["model.safetensors.index.json: expected an index with a \"weight_map\""]);
}

#[test]
fn an_index_names_the_files_that_are_fetched() {
    let (bench, mut files) = bench();
    let weights = files.remove("model.safetensors").unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let mut map = serde_json::Map::new();
    for (part, parity) in [("model-00001-of-00002.safetensors", 0), ("model-00002-of-00002.safetensors", 1)] {
        let mut names: Vec<&str> = tensors.names();
        names.sort();
        let of_part = names.into_iter().enumerate().filter(|(index, _)| index % 2 == parity).map(|(_, name)| name);
        let views: Vec<_> = of_part.map(|name| (name.to_string(), tensors.tensor(name).unwrap())).collect();
        views.iter().for_each(|(name, _)| drop(map.insert(name.clone(), json!(part))));
        files.insert(part.to_string(), safetensors::serialize(views, None).unwrap());
    }
    let mut with_index = |map: &serde_json::Map<String, Value>| {
        files.insert("model.safetensors.index.json".into(), json!({"weight_map": map}).to_string().into_bytes());
        files.clone()
    };
    let models = Models::of("org/tiny", with_index(&map));
    let server = models.serve();
    succeed(with_hub(&bench, &server.url(), &format!("sft --model org/tiny --output sharded {SFT}")));
    bench.succeed(&format!("sft --model base --output whole {SFT}"));
    let whole = bench.bytes("whole/metrics.jsonl");
    let losses = |run: &str| bench.metrics(run).iter().map(|line| line.get("loss").cloned()).collect::<Vec<_>>();
    assert!(!whole.is_empty() && losses("sharded") == losses("whole"));
    for (file, expected) in [
        ("../../../../x", "is not the name of a safetensors file beside it"),
        ("pytorch_model.bin", "is not the name of a safetensors file beside it"),
        ("model-00003-of-00002.safetensors", "which the hub does not list beside it"),
    ] {
        let mut other = map.clone();
        other.insert("other".into(), json!(file));
        models.put("org/tiny", with_index(&other));
        refused(with_hub(&bench, &server.url(), "export --model org/tiny --output merged"), &[file, expected]);
    }
}

/// The files of a data set.
fn dataset(files: &[(&str, Vec<u8>)]) -> Files {
    files.iter().map(|(name, bytes)| (name.to_string(), bytes.clone())).collect()
}

#[test]
fn a_data_set_of_the_hub_is_the_data_set_of_its_files() {
    let bench = Workbench::new();
    let line = "--max-steps 3 --batch-size 4 --learning-rate 3e-3 --seed 3";
    bench.succeed(&format!(
        "sft --model model --data demonstrations.parquet --evaluation-data mixed.parquet --output by-file {line}"
    ));
    let files = dataset(&[
        ("README.md", b"---\nlicense: mit\n---\n# Rows\n".to_vec()),
        ("data/train-00000-of-00001.parquet", bench.bytes("demonstrations.parquet")),
        ("data/test-00000-of-00001.parquet", bench.bytes("mixed.parquet")),
        ("data/validation-00000-of-00001.parquet", bench.bytes("prompts.parquet")),
        ("script.py", b"print()".to_vec()),
    ]);
    let models = Models::of("datasets/org/rows", files.clone());
    // Every transfer breaks off.
    let served = models.clone();
    let server = Server::start(move |request| {
        let is_file = request.path.contains("/resolve/");
        Reply { break_off: is_file.then_some(700), ..served.answer(request) }
    });
    let named = format!("sft --model model --data org/rows --evaluation-data org/rows:test --output by-name {line}");
    let said = succeed(with_hub(&bench, &server.url(), &named));
    let commit = commit(&files);
    assert!(said.contains(&format!("split train, one file, of org/rows@{commit}")), "{said}");
    assert!(bench.bytes("by-name/model.safetensors") == bench.bytes("by-file/model.safetensors"));
    let metrics =
        |run: &str| bench.metrics(run).iter().map(|line| line.get("evaluation_loss").cloned()).collect::<Vec<_>>();
    assert_eq!(metrics("by-name"), metrics("by-file"));
    let requests = server.requests();
    assert!(requests.iter().any(|request| request.headers.get("range").is_some_and(|range| range == "bytes=700-")));
    assert!(requests.iter().all(|request| request.headers["authorization"] == format!("Bearer {TOKEN}")));
    let asked = transfers(&server);
    assert!(!asked.iter().any(|name| name.starts_with("validation") || name == "script.py"), "{asked:?}");
    let settings = String::from_utf8(bench.bytes("by-name/settings.toml")).unwrap();
    assert!(settings.contains("data = \"org/rows\""), "{settings}");
    // The cache is that of Python's library, and holds no token.
    let snapshot = format!("cache/hub/datasets--org--rows/snapshots/{commit}/data/train-00000-of-00001.parquet");
    assert!(bench.bytes(&snapshot) == bench.bytes("demonstrations.parquet"));
    assert!(!holds(&bench.path("by-name"), TOKEN) && !holds(&bench.path("cache"), TOKEN));

    // What is here is not fetched again, and the network is not needed for it.
    let again = models.serve();
    let named = named.replace("by-name", "again");
    succeed(with_hub(&bench, &again.url(), &named));
    assert_eq!((again.requests().len(), transfers(&again).len()), (1, 0));
    let mut offline = with_hub(&bench, &again.url(), &named.replace("again", "offline"));
    offline.env("HF_HUB_OFFLINE", "1");
    succeed(offline);
    let mut absent = with_hub(&bench, &again.url(), &named.replace("org/rows", "org/other"));
    absent.env("HF_HUB_OFFLINE", "1");
    refused(absent, &["org/other: no such file or folder, and the cache", "HF_HUB_OFFLINE"]);
    assert_eq!(again.requests().len(), 1);
    // At the commit that was read, and as a folder of that name.
    let pinned = named.replace("--data org/rows", &format!("--data org/rows@{commit}")).replace("again", "pinned");
    succeed(with_hub(&bench, &models.serve().url(), &pinned));
    assert!(bench.bytes("pinned/model.safetensors") == bench.bytes("by-file/model.safetensors"));
    bench.put("org/rows/a.parquet", &bench.bytes("demonstrations.parquet"));
    let unused = models.serve();
    let local = format!("sft --model model --data org/rows --evaluation-data mixed.parquet --output local {line}");
    succeed(with_hub(&bench, &unused.url(), &local));
    assert_eq!(unused.requests().len(), 0);
}

#[test]
fn a_data_set_of_another_form_or_branch_is_read_and_what_is_not_clear_is_asked() {
    let bench = Workbench::new();
    let line = "--max-steps 1 --batch-size 4 --evaluation-share 0 --quiet";
    let lines = |text: &str| format!("{{\"prompt\": \"p\", \"completion\": \"{text}\"}}\n").repeat(9).into_bytes();
    let readme = "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: a/*.jsonl\n- config_name: two\n  data_files: b/*.csv\n---\n";
    let files = [
        ("README.md", readme.as_bytes().to_vec()),
        ("a/x.jsonl", lines("one")),
        ("b/y.csv", b"prompt,completion\np,two\n".to_vec()),
    ];
    let models = Models::of("datasets/org/two", dataset(&files));
    models.put("datasets/org/script", dataset(&[("script.py", b"print()".to_vec())]));
    let converted = dataset(&[("default/partial-train/0000.parquet", bench.bytes("demonstrations.parquet"))]);
    models.put("datasets/org/script@refs%2Fconvert%2Fparquet", converted);
    models.put("datasets/org/none", dataset(&[("a.png", b"x".to_vec())]));
    let server = models.serve();
    let sft = |data: &str| {
        with_hub(
            &bench,
            &server.url(),
            &format!("sft --model model --data {data} --output run-{} {line}", data.replace(['/', ':'], "-")),
        )
    };
    bench.put("local.jsonl", &lines("one"));
    bench.succeed(&format!("sft --model model --data local.jsonl --output local {line}"));
    succeed(sft("org/two:one"));
    assert!(bench.bytes("run-org-two-one/model.safetensors") == bench.bytes("local/model.safetensors"));
    succeed(sft("org/two:two/train"));
    succeed(sft("org/script"));
    bench.succeed(&format!("sft --model model --data demonstrations.parquet --output whole {line}"));
    assert!(bench.bytes("run-org-script/model.safetensors") == bench.bytes("whole/model.safetensors"));
    for (data, expected) in [
        ("org/two", &["org/two: the data set has the configurations one, two; name one, as org/two:one"][..]),
        ("org/two:three", &["the configurations one, two"]),
        ("org/two:one/test", &["configuration one has the splits train; name one, as org/two:one/train"]),
        ("org/absent", &["org/absent: no such folder, and no such data set", "(404)"]),
        ("org/none", &["org/none: the data set's repository holds no file of rows", "404"]),
    ] {
        refused(sft(data), expected);
    }
    // A mixture's source, next to a folder of the mixture or on the hub.
    bench.put("mixture.toml", b"[[source]]\ndata = \"org/two:one\"\ntask = \"a\"\n");
    succeed(sft("mixture.toml"));
}

#[test]
fn a_data_set_that_is_not_what_the_hub_lists_is_refused() {
    let bench = Workbench::new();
    let models = Models::of("datasets/org/rows", dataset(&[("train.parquet", bench.bytes("demonstrations.parquet"))]));
    let server = Server::start(move |request| {
        let mut reply = models.answer(request);
        if request.path.contains("/resolve/") {
            reply.body.iter_mut().for_each(|byte| *byte ^= 1);
        }
        reply
    });
    refused(
        with_hub(&bench, &server.url(), "sft --model model --data org/rows --output run --max-steps 1"),
        &["org/rows: train.parquet is not what", "twice: its digest is"],
    );
    assert!(!bench.path("cache/hub/datasets--org--rows/snapshots").exists());
}
