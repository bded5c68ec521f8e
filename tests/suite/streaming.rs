//! Examples by optimizer step, from data of any size.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use ::parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use ::parquet::file::metadata::{ParquetMetaData, ParquetMetaDataWriter, RowGroupMetaData};
use ::parquet::file::properties::WriterProperties;
use arrow::array::{ArrayRef, DictionaryArray, Float64Array, RecordBatch, StringArray};
use arrow::datatypes::Int32Type;
use proptest::prelude::*;
use rlhf::Result;
use rlhf::data::row_index::RowIndex;
use rlhf::data::schema::{DEMONSTRATIONS, Demonstration, LABELLED, Layouts, PROMPTS, RANKINGS, Text};
use rlhf::data::table::TableRows;
use rlhf::data::tokenize_records::Truncation;
use rlhf::data::window::{WindowedOrder, WindowedRows};
use rlhf::train::examples::{Example, Examples, Source};
use rlhf::train::order::{Order, evaluation_split};
use tempfile::TempDir;

use crate::common::{lists, shared, strings, table};

/// Writes a file whose row groups have these sizes, one after the other.
pub fn write(path: &Path, batch: &RecordBatch, groups: &[usize]) {
    let properties = WriterProperties::builder().set_data_page_row_count_limit(5).set_write_batch_size(5).build();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    let mut start = 0;
    for &rows in groups {
        writer.write(&batch.slice(start, rows)).unwrap();
        writer.flush().unwrap();
        start += rows;
    }
    writer.close().unwrap();
}

/// A folder of files with row groups of these sizes. Row r of file f holds the text `f r`.
fn folder(files: &[Vec<usize>]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (file, groups) in files.iter().enumerate() {
        let texts: Vec<String> = (0..groups.iter().sum()).map(|row| format!("{file} {row}")).collect();
        let column: ArrayRef = Arc::new(StringArray::from(texts));
        write(&folder.path().join(format!("{file}.parquet")), &table(vec![("text", column)]), groups);
    }
    folder
}

fn source(data: &str) -> Source<'_> {
    Source {
        data,
        evaluation_data: None,
        evaluation_share: 0.0,
        window: 10_000,
        batch_size: 4,
        drops_rest: false,
        seed: 3,
    }
}

fn text(record: Demonstration, _: &mut Truncation) -> Result<Option<String>> {
    let Text::Plain(text) = record.completion else { panic!("a plain text") };
    Ok(Some(text))
}

fn texts(source: &Source) -> Result<Examples<'static, String>> {
    Examples::open(source, DEMONSTRATIONS, text)
}

fn values(examples: &[Arc<Example<String>>]) -> Vec<String> {
    examples.iter().map(|example| example.value.clone()).collect()
}

fn steps(examples: &mut Examples<String>, steps: impl IntoIterator<Item = usize>) -> Vec<Vec<String>> {
    steps.into_iter().map(|step| values(&examples.step(step).unwrap())).collect()
}

/// The texts of all rows in the order of the files.
fn all_texts(files: &[Vec<usize>]) -> Vec<String> {
    let rows = files.iter().enumerate().flat_map(|(file, groups)| (0..groups.iter().sum()).map(move |row| (file, row)));
    rows.map(|(file, row): (usize, usize)| format!("{file} {row}")).collect()
}

fn files() -> impl Strategy<Value = Vec<Vec<usize>>> {
    prop::collection::vec(prop::collection::vec(1usize..40, 1..5), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_epoch_has_each_row_once_and_a_run_may_begin_at_any_step(
        files in files(),
        window in 1usize..70,
        batch_size in 1usize..50,
        share in prop_oneof![Just(0.0), 0.01..0.9],
        seed in 0u64..1000,
    ) {
        let (folder, all) = (folder(&files), all_texts(&files));
        let data = folder.path().display().to_string();
        let source = Source { evaluation_share: share, window, batch_size, seed, ..source(&data) };
        let mut examples = texts(&source).unwrap();
        prop_assert_eq!(examples.is_streamed(), all.len() > window);
        prop_assert_eq!((examples.len() + examples.evaluation_len(), examples.first(7).unwrap().len()), (all.len(), all.len().min(7)));
        let evaluation = values(examples.evaluation().unwrap());
        let an_epoch = examples.steps_per_epoch();
        prop_assert_eq!(an_epoch, examples.len().div_ceil(batch_size));
        let straight = steps(&mut examples, 0..2 * an_epoch);
        for epoch in straight.chunks(an_epoch) {
            let seen = epoch.concat();
            prop_assert!(epoch[..an_epoch - 1].iter().all(|step| step.len() == batch_size));
            let together: BTreeSet<String> = seen.iter().chain(&evaluation).cloned().collect();
            prop_assert_eq!((seen.len() + evaluation.len(), together.len()), (all.len(), all.len()));
        }
        let backwards = steps(&mut texts(&source).unwrap(), (0..2 * an_epoch).rev());
        prop_assert!(backwards.iter().rev().eq(&straight));
        for example in examples.step(an_epoch / 2).unwrap() {
            let (file, row) = example.value.split_once(' ').unwrap();
            let name = folder.path().join(format!("{file}.parquet"));
            prop_assert_eq!((&*example.origin.file, example.origin.row), (&*name, row.parse::<usize>().unwrap()));
        }
    }

    #[test]
    fn data_of_one_window_have_the_order_and_the_split_of_examples_in_memory(
        files in files(), share in 0.0..0.5, batch_size in 1usize..20, seed in 0u64..1000,
    ) {
        let (folder, all) = (folder(&files), all_texts(&files));
        let data = folder.path().display().to_string();
        let mut examples =
            texts(&Source { evaluation_share: share, batch_size, seed, window: all.len(), ..source(&data) }).unwrap();
        let (training, evaluation) = evaluation_split(all.len(), share, seed);
        let [training, evaluation] = [training, evaluation]
            .map(|rows| rows.into_iter().map(|row| all[row].clone()).collect::<Vec<String>>());
        prop_assert_eq!(values(examples.evaluation().unwrap()), evaluation);
        let mut order = Order::new((0..training.len()).collect(), batch_size, seed);
        prop_assert_eq!(examples.steps_per_epoch(), order.steps_per_epoch());
        for step in 0..2 * order.steps_per_epoch() {
            let expected: Vec<&String> = order.step(step).iter().map(|&index| &training[index]).collect();
            let step = examples.step(step).unwrap();
            prop_assert_eq!(step.iter().map(|example| &example.value).collect::<Vec<_>>(), expected);
        }
        // So has the order of windows itself where there is but one.
        let index = RowIndex::open(&data, &DEMONSTRATIONS).unwrap();
        let groups = index.groups().iter().map(|group| group.rows.clone()).collect();
        let (training, evaluation) = evaluation_split(all.len(), share, seed);
        let mut order = Order::new(training.clone(), training.len(), seed);
        let mut windowed = WindowedOrder::new(groups, evaluation, training.len(), seed);
        for epoch in 0..2 {
            prop_assert_eq!(windowed.window(epoch, 0).rows, order.step(epoch));
        }
    }
}

#[test]
fn a_window_mixes_row_groups_of_all_files_and_an_epoch_is_not_like_another() {
    let folder = folder(&vec![vec![10; 10]; 10]);
    let data = folder.path().display().to_string();
    let mut examples = texts(&Source { window: 100, batch_size: 100, ..source(&data) }).unwrap();
    let [first, second] = [0, 10].map(|step| values(&examples.step(step).unwrap()));
    assert_ne!(first, second);
    let files: BTreeSet<&str> = first.iter().filter_map(|text| text.split(' ').next()).collect();
    assert!(files.len() > 3, "{files:?}");
    let group = |text: &String| text[..text.len() - 1].to_owned();
    assert_eq!(first.iter().map(group).collect::<BTreeSet<_>>().len(), 10);
    assert!(first.windows(2).filter(|pair| group(&pair[0]) == group(&pair[1])).count() < 30);
}

#[test]
fn rows_with_nothing_to_learn_are_left_out_before_the_order_or_make_a_step_shorter() {
    let folder = folder(&[vec![25, 5], vec![30]]);
    let data = folder.path().display().to_string();
    let prepare = |record: Demonstration, truncation: &mut Truncation| {
        truncation.answers += 1;
        Ok(text(record, truncation)?.filter(|text| !text.ends_with('7')))
    };
    let open = |window| Examples::open(&Source { window, ..source(&data) }, DEMONSTRATIONS, prepare).unwrap();
    let mut whole = open(60);
    assert_eq!((whole.len(), whole.truncation().left_out, whole.truncation().answers), (54, 6, 60));
    assert_eq!((whole.sum(String::len), whole.largest(String::len), whole.sampled_rows()), (198, Some(4), None));
    assert!(steps(&mut whole, 0..13).iter().all(|step| step.len() == 4));
    let mut streamed = open(16);
    assert_eq!((streamed.len(), streamed.truncation().left_out, streamed.truncation().answers), (60, 6, 60));
    // Exact here, as all rows are among the first.
    assert_eq!(
        (streamed.sum(String::len), streamed.largest(String::len), streamed.sampled_rows()),
        (198, None, Some(60))
    );
    let seen = steps(&mut streamed, 0..15);
    assert_eq!((seen.concat().len(), seen.iter().any(|step| step.len() < 4)), (54, true));
    assert_eq!(values(&streamed.first(100).unwrap()), values(&whole.first(100).unwrap()));
    let nothing = Examples::open(&source(&data), DEMONSTRATIONS, |_, _| Ok(None::<String>)).unwrap();
    assert!(nothing.is_empty());
}

#[test]
fn evaluation_data_are_kept_whole_and_a_rest_may_be_left_out() {
    let folder = folder(&[vec![30], vec![9, 8]]);
    let [data, evaluation] = [0, 1].map(|file| folder.path().join(format!("{file}.parquet")).display().to_string());
    for window in [10, 30] {
        let source = Source {
            evaluation_data: Some(&evaluation),
            evaluation_share: 0.5,
            window,
            drops_rest: true,
            ..source(&data)
        };
        let mut examples = texts(&source).unwrap();
        assert_eq!((examples.len(), examples.evaluation_len(), examples.steps_per_epoch()), (30, 17, 7));
        assert_eq!(examples.total_steps(1.5, None), 11);
        assert_eq!(values(examples.evaluation().unwrap()), all_texts(&[vec![0], vec![17]]));
        assert!(steps(&mut examples, 0..14).iter().all(|step| step.len() == 4));
    }
}

#[test]
fn a_bad_row_is_named_at_the_start_or_when_its_step_comes() {
    let folder = folder(&[vec![20]]);
    let bad = StringArray::from((0..40).map(|row| (row != 23).then_some("text")).collect::<Vec<_>>());
    write(&folder.path().join("bad.parquet"), &table(vec![("text", Arc::new(bad))]), &[10, 30]);
    let data = folder.path().display().to_string();
    let expected = format!("{data}/bad.parquet: row 23 (counted from 0), column `text`: is null, expected a text");
    assert_eq!(texts(&source(&data)).err().unwrap().to_string(), expected);
    let many = Source { window: 25, batch_size: 1, ..source(&data) };
    let read = |step| Examples::open(&many, DEMONSTRATIONS, text).and_then(|mut examples| examples.step(step));
    // Among the first rows, from which estimates are made, it is found at the start.
    assert_eq!(read(0).err().unwrap().to_string(), expected);
}

#[test]
fn a_bad_row_beyond_the_first_ends_its_step_alone() {
    let folder = tempfile::tempdir().unwrap();
    let rows = StringArray::from((0..900).map(|row| (row != 700).then_some("text")).collect::<Vec<_>>());
    write(&folder.path().join("bad.parquet"), &table(vec![("text", Arc::new(rows))]), &[500, 400]);
    let data = folder.path().display().to_string();
    let mut examples = texts(&Source { window: 100, batch_size: 10, ..source(&data) }).unwrap();
    let errors: Vec<String> =
        (0..90).filter_map(|step| examples.step(step).err()).map(|error| error.to_string()).collect();
    let expected = format!("{data}/bad.parquet: row 700 (counted from 0), column `text`: is null, expected a text");
    assert_eq!(errors, [expected]);
}

#[test]
fn every_layout_reads_the_same_row_by_row() {
    fn compare<R: std::fmt::Debug + PartialEq + Send + 'static>(data: &str, layouts: fn() -> Layouts<R>) {
        let read = |window| {
            let source = Source { window, batch_size: 16, ..source(data) };
            let mut examples = Examples::open(&source, layouts(), |record, _| Ok(Some(record))).unwrap();
            let steps = (0..examples.steps_per_epoch()).flat_map(|step| examples.step(step).unwrap());
            let by_row: BTreeMap<_, _> =
                steps.map(|example| ((example.origin.file.clone(), example.origin.row), example)).collect();
            by_row
        };
        let (whole, streamed) = (read(100_000), read(40));
        assert!(!whole.is_empty() && whole == streamed, "{data}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let numbered = |name: &str| -> Vec<String> { (0..64).map(|row| format!("{name} {row}")).collect() };
    let column = |name: &str| -> ArrayRef { Arc::new(StringArray::from(numbered(name))) };
    // Two to four answers a row.
    let counts = || (0..64).map(|row| 2 + row % 3);
    let ends: Vec<i32> = counts().scan(0, |end, count| Some(std::mem::replace(end, *end + count) + count)).collect();
    let answers: Vec<String> = (0..ends[63]).map(|answer| format!("answer {answer}")).collect();
    let responses = lists(Arc::new(StringArray::from(answers)), &ends);
    let scores = lists(Arc::new(Float64Array::from_iter_values((0..ends[63]).map(f64::from))), &ends);
    let rankings = table(vec![("prompt", column("prompt")), ("responses", responses), ("scores", scores)]);
    write(Path::new(&path("rankings.parquet")), &rankings, &[30, 34]);
    compare(&path("rankings.parquet"), || RANKINGS);
    let labels: DictionaryArray<Int32Type> = ["yes", "no"].repeat(32).into_iter().collect();
    let labelled = table(vec![("text", column("text")), ("label", Arc::new(labels))]);
    write(Path::new(&path("labelled.parquet")), &labelled, &[1, 63]);
    compare(&path("labelled.parquet"), || LABELLED);
    compare(&path("rankings.parquet"), || PROMPTS);
    if let Some(variants) = shared("variants") {
        compare(&variants, || RANKINGS);
    }
}

#[test]
fn a_file_that_changes_during_a_run_is_refused() {
    let folder = folder(&[vec![20, 20], vec![20]]);
    let data = folder.path().display().to_string();
    let index = Arc::new(RowIndex::open(&data, &DEMONSTRATIONS).unwrap());
    let mut rows = WindowedRows::new(index, Vec::new(), 60, 1);
    for file in ["0.parquet", "1.parquet"] {
        write(&folder.path().join(file), &table(vec![("text", strings(&["a"; 30]))]), &[30]);
    }
    let error = rows.at(0, 0..4).unwrap_err().to_string();
    assert!(error.contains("the file has changed since its rows were counted"), "{error}");
}

/// Copies a file, with other numbers of rows of its row groups in its footer.
fn with_footer(from: &Path, to: &Path, groups: &[i64]) {
    let footer = ArrowReaderMetadata::load(&File::open(from).unwrap(), ArrowReaderOptions::new()).unwrap();
    let footer = footer.metadata();
    let file = footer.file_metadata().clone();
    let group =
        |(group, &rows): (&RowGroupMetaData, &i64)| group.clone().into_builder().set_num_rows(rows).build().unwrap();
    let groups = footer.row_groups().iter().zip(groups).map(group).collect();
    let mut bytes = std::fs::read(from).unwrap();
    ParquetMetaDataWriter::new(&mut bytes, &ParquetMetaData::new(file, groups)).finish().unwrap();
    std::fs::write(to, bytes).unwrap();
}

#[test]
fn footers_with_impossible_numbers_of_rows_are_an_error_and_cost_nothing() {
    let folder = folder(&[vec![20, 20]]);
    let (good, bad) = (folder.path().join("0.parquet"), folder.path().join("bad.parquet"));
    let data = bad.display().to_string();
    let refused = |expected: &str| {
        for result in [texts(&source(&data)).map(drop), TableRows::open(&data).map(drop)] {
            let error = result.expect_err(expected).to_string();
            assert!(error.starts_with(&format!("{data}: {expected}")) && error.contains("damaged"), "{error}");
        }
    };
    for (groups, expected) in [
        ([20, -5], "the footer gives row group 1 (counted from 0) -5 rows"),
        ([-20, -20], "the footer gives row group 0 (counted from 0) -20 rows"),
    ] {
        with_footer(&good, &bad, &groups);
        refused(expected);
    }
    for all in [41u8, 0] {
        // The third field of the footer, an i64: twice the number of rows. The fourth, a list, follows.
        let mut bytes = std::fs::read(&good).unwrap();
        let field = bytes.windows(3).rposition(|field| field == [0x16, 2 * 40, 0x19]).unwrap();
        bytes[field + 1] = 2 * all;
        std::fs::write(&bad, bytes).unwrap();
        refused(&format!("the footer counts {all} rows, its row groups 40"));
    }
    // Two files of which each could be.
    let folder = folder.path().display().to_string();
    with_footer(&good, &bad, &[i64::MAX - 20, 20]);
    std::fs::copy(&bad, format!("{folder}/copy.parquet")).unwrap();
    std::fs::copy(&bad, format!("{folder}/too.parquet")).unwrap();
    assert!(texts(&source(&folder)).err().unwrap().to_string().contains("are said to hold"));
    // Rows that are promised and not there are missed where they should be, whether few or many.
    for groups in [[20, 35], [1_000_000_000_000_000, 20]] {
        with_footer(&good, &bad, &groups);
        for window in [16, 10_000] {
            let source = Source { window, evaluation_share: 0.1, ..source(&data) };
            let error = texts(&source).and_then(|mut examples| {
                (0..15).try_for_each(|step| examples.step(step).map(drop))?;
                examples.evaluation().map(drop)
            });
            let error = error.unwrap_err().to_string();
            assert!(error.contains("fewer rows") || error.contains("cannot be read"), "{error}");
        }
    }
}

#[test]
fn of_many_examples_to_evaluate_on_some_stand_for_all() {
    let folder = folder(&[vec![30], vec![6000, 6000]]);
    let [data, evaluation] = [0, 1].map(|file| folder.path().join(format!("{file}.parquet")).display().to_string());
    let open = |window| texts(&Source { evaluation_data: Some(&evaluation), window, ..source(&data) }).unwrap();
    let mut some = open(10_000);
    assert_eq!((some.evaluation_len(), some.evaluation_rows(), some.len()), (10_000, Some(12_000), 30));
    assert_eq!(some.largest(String::len), None);
    let found: BTreeSet<String> = values(some.evaluation().unwrap()).into_iter().collect();
    assert_eq!(found.len(), 10_000);
    assert!(found.contains("1 11999") || found.contains("1 11998") || found.contains("1 11997"));
    assert_eq!(some.largest(String::len), Some(7));
    assert_eq!((open(12_000).evaluation_len(), open(12_000).evaluation_rows()), (12_000, None));
}
