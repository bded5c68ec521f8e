//! The embedded world as it ships in `data/`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use arrow::array::Array;
use rlhf::Result;
use rlhf::data::table::TableRows;
use rlhf::world::files::{Sizes, read_cases, write_all};
use rlhf::world::names::{Names, Split};
use rlhf::world::rule::judge;
use rlhf::world::talk::provocations;

/// The seed that the shipped files were made from.
const SEED: u64 = 1;

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data")
}

/// All strings of a file's columns, lists included.
fn texts(path: &Path, columns: &[&str], lists: &[&str]) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for rows in TableRows::open(&path.display().to_string())? {
        let rows = rows?;
        for column in columns {
            let strings = rows.strings(column)?;
            all.extend((0..strings.len()).map(|row| strings.value(row).to_string()));
        }
        for column in lists {
            let strings = rows.string_lists(column)?.values;
            all.extend((0..strings.len()).map(|row| strings.value(row).to_string()));
        }
    }
    Ok(all)
}

#[test]
fn evaluation_shares_no_person_place_fact_or_provocation_with_training() -> Result<()> {
    let cases = read_cases(&data().join("evaluation.parquet").display().to_string())?;
    let files: [(&str, &[&str], &[&str]); 4] = [
        ("pretrain", &["text"], &[]),
        ("demonstrations", &["prompt", "completion"], &[]),
        ("rankings", &["prompt"], &["responses"]),
        ("prompts", &["prompt"], &[]),
    ];
    let held_out = Names::of(Split::Evaluation, SEED);
    let names: HashSet<&str> = held_out.people.iter().chain(&held_out.places).map(String::as_str).collect();
    let facts: HashSet<&str> = cases.iter().flat_map(|case| case.facts.iter().map(String::as_str)).collect();
    // The evaluation file does use these names, so that their absence elsewhere says something.
    assert!(cases.iter().any(|case| case.prompt.split(|c: char| !c.is_alphabetic()).any(|word| names.contains(word))));
    let messages = provocations(Split::Evaluation, SEED);
    for (file, columns, lists) in files {
        for text in texts(&data().join(format!("{file}.parquet")), columns, lists)? {
            let known = text.split(|c: char| !c.is_alphabetic()).find(|word| names.contains(word));
            assert_eq!(known, None, "{file}: {text}");
            assert!(!text.split_inclusive('.').any(|sentence| facts.contains(sentence.trim())), "{file}: {text}");
            let shared = messages.iter().find(|message| text.contains(&format!("Message: {message}\n")));
            assert_eq!(shared, None, "{file}: {text}");
        }
    }
    Ok(())
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() -> Result<()> {
    let sizes = Sizes { pretrain: 400, demonstrations: 60, rankings: 60, prompts: 50, closed_domain: 20 };
    let folders = [SEED, SEED, SEED + 1].map(|seed| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_all(folder.path(), seed, &sizes).map(|()| folder)
    });
    let [first, second, other] = folders;
    let (first, second, other) = (first?, second?, other?);
    let read = |folder: &tempfile::TempDir, name: &str| std::fs::read(folder.path().join(name)).expect("a file");
    for entry in std::fs::read_dir(first.path()).expect("a folder") {
        let name = entry.expect("an entry").file_name().to_string_lossy().to_string();
        assert!(read(&first, &name) == read(&second, &name), "{name}");
        assert!(read(&first, &name) != read(&other, &name), "{name}");
    }
    Ok(())
}

#[test]
fn the_expected_answer_is_right_and_that_of_another_prompt_is_a_hallucination() -> Result<()> {
    let cases = read_cases(&data().join("evaluation.parquet").display().to_string())?;
    let expected: Vec<_> = cases.iter().filter_map(|case| Some((case, case.expected.as_deref()?))).collect();
    assert!(expected.len() > 100);
    for (index, (case, answer)) in expected.iter().enumerate() {
        assert!(judge(case, answer).right);
        let (_, other) = expected[(index + 1) % expected.len()];
        assert!(judge(case, other).hallucinated);
    }
    Ok(())
}
