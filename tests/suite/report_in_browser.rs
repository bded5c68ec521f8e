//! The report in a real browser: nothing is missing, cut off, illegible or executed, whatever the texts are; and the check itself finds what is wrong.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch};
use rlhf::data::parquet;
use rlhf::data::table::TableRows;
use serde_json::json;

use crate::common::{lists, strings, table};
use crate::workbench::Workbench;

/// What the check says when there is nothing to check with.
const NOTHING_TO_CHECK_WITH: i32 = 77;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// What the check prints about these reports on these visits, or on all if none is named, and whether all is well; `None`, with the reason printed, where it cannot run and need not.
fn check(folders: &[PathBuf], visits: &[&str]) -> Option<(bool, String)> {
    let mut command = Command::new("node");
    command.arg(path("tests/browser/check.mjs"));
    // To look at: RLHF_SCREENSHOTS=folder cargo test --release -- browser
    if let Some(screenshots) = std::env::var_os("RLHF_SCREENSHOTS") {
        command.arg("--screenshots").arg(screenshots);
    }
    if !visits.is_empty() {
        command.args(["--visits", &visits.join(",")]);
    }
    let reason = match command.args(folders).output() {
        Err(error) => format!("node cannot be run: {error}"),
        Ok(output) => {
            let printed =
                String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            if output.status.code() != Some(NOTHING_TO_CHECK_WITH) {
                return Some((output.status.success(), printed));
            }
            printed
        }
    };
    let is_required = std::env::var("RLHF_BROWSER").is_ok_and(|value| value == "required");
    assert!(!is_required, "RLHF_BROWSER=required, but the report is not opened in a browser: {reason}");
    // Past the capture of passing tests.
    let _ = writeln!(std::io::stderr(), "skipped, the report is not opened in a browser: {}", reason.trim());
    None
}

/// Some prompts of the embedded world of every kind, as files of one folder.
fn write_world(bench: &Workbench) {
    let data = path("data/evaluation.parquet").display().to_string();
    let batch = TableRows::open(&data).unwrap().next().unwrap().unwrap().batch;
    std::fs::create_dir(bench.path("world")).unwrap();
    let every = batch.num_rows() / 12;
    for number in 0..12 {
        parquet::write(bench.path(&format!("world/{number:02}.parquet")), &batch.slice(number * every, 1)).unwrap();
    }
}

/// What is to be measured beside the answers to prompts.
fn write_other_data(bench: &Workbench) {
    let write = |name: &str, columns| parquet::write(bench.path(name), &table(columns)).unwrap();
    let numbers = |values: &[i64]| -> ArrayRef { Arc::new(Int64Array::from(values.to_vec())) };
    let toxicity: ArrayRef = Arc::new(Float64Array::from(vec![0.9, 0.1, 0.2]));
    write(
        "toxic.parquet",
        vec![("prompt", strings(&["The dolt is", "The lamp is", "A boat"])), ("toxicity", toxicity)],
    );
    let choices = lists(strings(&[" Red.", " A fish.", " Blue.", " Nothing."]), &[2, 4]);
    let labels = lists(numbers(&[1, 0, 1, 0]), &[2, 4]);
    let questions = strings(&["What is the boat?", "What is the lamp?"]);
    write("choices.parquet", vec![("question", questions.clone()), ("choices", choices), ("labels", labels)]);
    let (right, wrong) = (strings(&["Red.", "Blue."]), strings(&["A fish.", "Nothing."]));
    write("shown.parquet", vec![("question", questions), ("right_answer", right), ("hallucinated_answer", wrong)]);
    let completions = strings(&[" yes", " no", " yes", " red and white"]);
    let tasks = strings(&["facts", "facts", "facts", "colours"]);
    let prompts = strings(&["A boat floats?", "A lamp floats?", "A hat is worn?", "Name two colours."]);
    write("tasks.parquet", vec![("prompt", prompts), ("completion", completions), ("task", tasks)]);
    let (one, other) = (strings(&["base", "sft", "base", "ppo"]), strings(&["sft", "ppo", "ppo", "base"]));
    let winners = strings(&["model_b", "model_b", "tie", "model_b"]);
    write("votes.parquet", vec![("model_a", one), ("model_b", other), ("winner", winners)]);
    let texts = strings(&["You dolt.", "Good day.", "What a twit you are.", "It is a lamp, isn't it?"]);
    let kinds = strings(&["plain", "plain", "indirect", "indirect"]);
    write("labelled.parquet", vec![("text", texts), ("label", numbers(&[1, 0, 1, 0])), ("category", kinds)]);
}

/// Writes what has to be on the page.
fn expect(bench: &Workbench, report: &str, figures: &[&str], shown: &[&str], hidden: &[&str]) -> PathBuf {
    let expected = json!({"figures": figures, "shown": shown, "hidden": hidden});
    bench.put(&format!("{report}/expected.json"), expected.to_string().as_bytes());
    bench.path(report)
}

/// A report with every part: of runs and their policies, judged by everything.
fn full_report(bench: &Workbench) -> PathBuf {
    bench.sft("base", "model", "--max-steps 8 --quiet");
    bench.sft("sft", "base", "--quiet");
    bench.reward("reward", "sft", "--quiet");
    bench.ppo("ppo", "sft", "reward", "--policy-every 1 --quiet");
    write_world(bench);
    write_other_data(bench);
    bench.succeed(
        "evaluate --models base=base sft=sft ppo=ppo --policies ppo --reward-model reward --data world --response-length 16 \
         --toxicity-prompts toxic.parquet --toxicity-samples 3 --toxicity-scorer rule --hallucination-scorer grounding length \
         --multiple-choice choices.parquet --recognition shown.parquet --tasks tasks.parquet --votes votes.parquet \
         --labelled labelled.parquet --group-columns category --resamples 50 --output full --quiet",
    );
    let trained = ["base", "sft", "ppo", "the reward model"].map(|name| format!("Training of {name}"));
    let calibration = "the reward model: predicted against observed win rate on held-out pairs";
    let mut figures = vec!["Over-optimisation"];
    figures.extend(trained.iter().map(String::as_str));
    figures.push(calibration);
    let shown =
        ["hallucination rate", "expected maximum toxicity", "MC1", "Bradley-Terry", "balanced accuracy", "step-"];
    expect(bench, "full", &figures, &shown, &[])
}

/// What nobody wants in a page, each of it in every text.
fn hostile() -> String {
    let executed =
        "<script>executed = true</script><img src=x onerror='executed = true'><svg onload='executed = true'>";
    let markup =
        "</p></details></main><h1>&lt;&#x202e;</h1><!-- ]]> {{ 7 * 7 }} {% raw %}<style>* { display: none }</style>";
    let long = "Donaudampfschiffahrt".repeat(40);
    let (right_to_left, override_of_direction) = ("שלום עולם مرحبا بالعالم", "\u{202e}backwards\u{2066}");
    let controls = "\u{1}\u{8}\u{b}\u{1b}[31m\u{7f}\u{85}\u{feff}\u{2028}\u{fffe}";
    let emoji = "👩‍👩‍👧‍👦🏴‍☠️ e\u{301}\u{301}\u{301}\u{301}";
    [executed, markup, &long, right_to_left, override_of_direction, controls, emoji].join(" ")
}

/// A report of answers by few or many models with such texts, names and kinds.
fn hostile_report(bench: &Workbench, report: &str, models: usize) -> PathBuf {
    let hostile = hostile();
    let names: Vec<String> = (0..models).map(|number| format!("model {number} {hostile}")).collect();
    let mut columns: [Vec<String>; 4] = Default::default();
    for (question, kind) in ["plain", &hostile].into_iter().enumerate() {
        for name in &names {
            let insult = if question == 0 { "hello" } else { "dolt" };
            let row = [
                name.clone(),
                format!("Question {question} {hostile}"),
                kind.to_string(),
                format!("{insult} {hostile}"),
            ];
            columns.iter_mut().zip(row).for_each(|(column, cell)| column.push(cell));
        }
    }
    let names = ["model", "prompt", "prompt_type", "response"];
    let columns = columns.iter().map(|column| strings(&column.iter().map(String::as_str).collect::<Vec<_>>()));
    let batch: RecordBatch = table(names.into_iter().zip(columns).collect());
    parquet::write(bench.path("hostile.parquet"), &batch).unwrap();
    bench.succeed(&format!(
        "evaluate --answers hostile.parquet --toxicity-scorer rule --resamples 20 --output {report} --quiet"
    ));
    expect(bench, report, &[], &["Question 0 <script>executed", "{{ 7 * 7 }}", "hello <script>"], &["dolt <script>"])
}

#[test]
fn the_report_is_whole_in_a_browser_whatever_the_texts_are() {
    let bench = Workbench::new();
    let reports =
        [full_report(&bench), hostile_report(&bench, "hostile", 2), hostile_report(&bench, "hostile-many", 6)];
    if let Some((is_good, printed)) = check(&reports, &[]) {
        assert!(is_good, "{printed}");
    }
}

/// A report's page in a folder of its own, changed; what replaces nothing would prove nothing.
fn broken(bench: &Workbench, name: &str, page: &str, from: &str, to: &str) -> PathBuf {
    let changed = page.replacen(from, to, 1);
    assert_ne!(changed, page, "{name}: there is no {from} in the page");
    bench.put(&format!("{name}/report.html"), changed.as_bytes());
    bench.put(&format!("{name}/expected.json"), &bench.bytes("good/expected.json"));
    bench.path(name)
}

#[test]
fn the_check_in_a_browser_finds_what_is_wrong() {
    let bench = Workbench::new();
    bench.sft("sft", "model", "--max-steps 3 --quiet");
    bench.succeed(
        "evaluate --models sft=sft --data prompts.parquet --response-length 4 --toxicity-scorer rule --resamples 5 --output good --quiet",
    );
    let good = expect(&bench, "good", &["Training of sft"], &["toxicity by rule"], &[]);
    let page = String::from_utf8(bench.bytes("good/report.html")).unwrap();
    let wrong = [
        ("console", "</main>", "<script>console.error('a complaint')</script></main>", "console error"),
        ("overflow", "</main>", "<div style='width: 1500px'>wide</div></main>", "overflow: the page is"),
        (
            "cut",
            "</main>",
            "<p style='overflow: hidden; white-space: nowrap; width: 50px'>what is cut off</p></main>",
            "overflow:",
        ),
        ("figure", "<figure", "<template><figure", "figures: []"),
        ("drawing", "<svg ", "<svg style='display: none' ", "0 by 0 pixels"),
        ("letters", "font-size=\"", "font-size=\"1\" data-was=\"", "pixels high"),
        ("axes", "<text", "<text y='-90'", "does not fit in"),
        ("contrast", "--soft: #55555e", "--soft: #aaaaaa", "accessibility: color-contrast"),
        ("landmarks", "<main>", "<div>", "accessibility: landmark-one-main"),
        ("elsewhere", "</main>", "<img alt='' src='other.png'></main>", "other.png"),
        ("paper", "@media screen and (prefers-color-scheme", "@media (prefers-color-scheme", "paper is printed over"),
        ("open", "</main>", "<details open><summary>Show</summary>text</details></main>", "open from the start"),
        ("unseen", "<h2 ", "<h2 style='display: none' ", "not visible"),
    ];
    let mut folders = vec![good];
    folders.extend(wrong.iter().map(|(name, from, to, _)| broken(&bench, name, &page, from, to)));
    let paper = folders.iter().filter(|folder| folder.ends_with("paper")).cloned().collect::<Vec<_>>();
    let Some((is_good, mut printed)) = check(&folders, &["380-light"]) else { return };
    printed += &check(&paper, &["print-from-dark"]).map_or(String::new(), |(_, printed)| printed);
    assert!(!is_good && !printed.lines().any(|line| line.starts_with("good,")), "{printed}");
    for (name, _, _, complaint) in wrong {
        let is_found = |line: &str| line.starts_with(&format!("{name},")) && line.contains(complaint);
        assert!(printed.lines().any(is_found), "{name}: no {complaint:?} in\n{printed}");
    }
}
