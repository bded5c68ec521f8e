use std::sync::Arc;

use arrow::array::{RecordBatch, StringArray};
use tempfile::TempDir;

use super::*;
use crate::data::parquet;
use crate::data::schema::{DEMONSTRATIONS, Demonstration};
use crate::error::Error;

const ROWS: usize = 300;

/// Texts `0`, `1`, ... in two files.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (file, rows) in [0..ROWS / 3, ROWS / 3..ROWS].into_iter().enumerate() {
        let texts: Vec<String> = rows.map(|row| row.to_string()).collect();
        let batch = RecordBatch::try_from_iter([("text", Arc::new(StringArray::from(texts)) as _)]).unwrap();
        parquet::write(folder.path().join(format!("{file}.parquet")), &batch).unwrap();
    }
    folder
}

fn source(data: &str, window: usize) -> Source<'_> {
    Source { data, evaluation_data: None, evaluation_share: 0.1, window, batch_size: 8, drops_rest: false, seed: 1 }
}

/// The number that a text is; multiples of 7 are cut, those of 11 are left out, and `fault` is an error.
fn number(record: Demonstration, truncation: &mut Truncation, fault: usize) -> Result<Option<usize>> {
    let text: String = record.completion.contents().collect();
    let number: usize = text.parse().unwrap();
    if number == fault {
        return Err(Error::input(format!("{}: at fault", record.origin)));
    }
    truncation.answers += usize::from(number.is_multiple_of(7));
    Ok((!number.is_multiple_of(11)).then_some(number))
}

fn open(data: &str, window: usize, fault: usize) -> Examples<'static, usize> {
    Examples::open(&source(data, window), DEMONSTRATIONS, move |record, truncation| number(record, truncation, fault))
        .unwrap()
}

fn on_threads<T: Send>(threads: usize, run: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run)
}

fn numbers(examples: &[Arc<Example<usize>>]) -> Vec<usize> {
    values(examples).into_iter().copied().collect()
}

fn is_ahead(examples: &Examples<usize>) -> bool {
    matches!(&examples.way, Way::Streamed(streamed) if streamed.ahead.is_some())
}

#[test]
fn examples_made_ahead_are_those_of_their_step_wherever_the_run_starts() {
    let folder = folder();
    let data = folder.path().to_str().unwrap();
    let steps = 80;
    let mut plain = open(data, 50, usize::MAX);
    assert!(plain.is_streamed() && plain.steps_per_epoch() < steps / 2);
    let expected: Vec<Vec<usize>> = (0..steps).map(|step| numbers(&plain.step(step).unwrap())).collect();
    for (threads, first) in [(1, 0), (2, 0), (2, 33)] {
        let found = on_threads(threads, || {
            let mut examples = open(data, 50, usize::MAX);
            let found = (first..steps).map(|step| {
                let found = examples.during(step, steps, |chosen| Ok(numbers(&chosen))).unwrap();
                // The last step has none after it.
                assert_eq!(is_ahead(&examples), threads > 1 && step + 1 < steps);
                found
            });
            found.collect::<Vec<_>>()
        });
        assert_eq!(found, expected[first..], "{threads} threads from step {first}");
    }
}

#[test]
fn an_error_comes_at_the_step_that_needs_the_row_and_names_it() {
    let folder = folder();
    let data = folder.path().to_str().unwrap();
    let mut plain = open(data, 50, usize::MAX);
    // A number that is not among those of the first rows, which are read when the data are opened.
    let (step, fault) = (1..plain.steps_per_epoch())
        .find_map(|step| Some((step, *numbers(&plain.step(step).unwrap()).iter().find(|&&number| number >= 256)?)))
        .unwrap();
    on_threads(2, || {
        let mut examples = open(data, 50, fault);
        for before in 0..step {
            assert!(examples.during(before, 1000, |_| Ok(())).is_ok(), "step {before} of {step}");
        }
        assert!(!is_ahead(&examples));
        let error = examples.during(step, 1000, |_| Ok(())).unwrap_err().to_string();
        assert!(error.ends_with("at fault") && error.contains(&format!("row {}", fault - ROWS / 3)), "{error}");
        // What fails in the work itself waits for the other thread, and what that made stays.
        let stopped = examples.during(0, 1000, |_| Err::<(), _>(Error::Stopped("stop".into())));
        assert!(matches!(stopped, Err(Error::Stopped(_))));
    });
}

#[test]
fn data_in_memory_are_the_same_on_any_number_of_threads() {
    let folder = folder();
    let data = folder.path().to_str().unwrap();
    let [one, two, three] = [1, 2, 3].map(|threads| {
        on_threads(threads, || {
            let mut examples = open(data, ROWS, usize::MAX);
            let all = numbers(&examples.training().unwrap());
            let step = examples.during(3, 10, |chosen| Ok(numbers(&chosen))).unwrap();
            (all, step, examples.truncation())
        })
    });
    assert!(one == two && one == three);
    let Truncation { answers, left_out, .. } = one.2;
    assert_eq!((answers, left_out), (ROWS.div_ceil(7), ROWS.div_ceil(11)));
    assert!(one.0.is_sorted());
}

#[test]
fn of_several_rows_at_fault_the_first_is_named() {
    let folder = folder();
    let data = folder.path().to_str().unwrap();
    let fault = on_threads(3, || {
        let opened = Examples::open(&source(data, ROWS), DEMONSTRATIONS, |record: Demonstration, _| {
            match record.origin.row % 50 {
                45 => Err(Error::input(record.origin.to_string())),
                _ => Ok(Some(0)),
            }
        });
        opened.err().map(|error| error.to_string())
    });
    assert!(fault.is_some_and(|fault| fault.contains("0.parquet") && fault.contains("row 45 ")));
}

#[test]
fn the_largest_pass_is_found_in_memory_and_bounded_where_rows_are_read_as_they_are_needed() {
    let folder = folder();
    let data = folder.path().to_str().unwrap();
    let mut examples = open(data, 1000, usize::MAX);
    let steps = 50;
    let same = |&number: &usize| number;
    let found = examples.largest_pass(same, usize::MAX, steps);
    let all: Vec<Vec<usize>> = (0..steps).map(|step| numbers(&examples.step(step).unwrap())).collect();
    assert_eq!(Some(found), all.iter().map(|step| step.iter().sum()).max());
    assert_eq!(examples.largest_pass(same, usize::MAX, 1), all[0].iter().sum::<usize>());
    // A pass of several, and one of a single example that has more than a pass is to have.
    let budget = found / 2;
    let greedy = all.iter().flat_map(|step| {
        step.iter().scan(0, |sum, number| {
            *sum = if *sum + number > budget { *number } else { *sum + number };
            Some(*sum)
        })
    });
    assert_eq!(Some(examples.largest_pass(same, budget, steps)), greedy.max());
    assert_eq!(Some(examples.largest_pass(same, 1, steps)), all.concat().into_iter().max());
    // All at once, and of those that are set aside.
    assert_eq!(examples.largest_training_pass(same, usize::MAX), Some(examples.sum(same)));
    let aside: usize = numbers(examples.evaluation().unwrap()).into_iter().sum();
    assert_eq!(examples.largest_evaluation_pass(same, usize::MAX), aside);
    // Above the mean step, and at most as large as the largest number in every place.
    let streamed = open(data, 50, usize::MAX);
    assert!(streamed.is_streamed());
    let bound = streamed.largest_pass(same, usize::MAX, steps);
    let known: Vec<usize> = streamed.known().map(|example| example.value).collect();
    let mean = known.iter().sum::<usize>() / known.len();
    assert!(bound > 8 * mean && bound <= 8 * known.iter().max().unwrap(), "{bound}, {mean}");
    assert_eq!(streamed.largest_pass(|_| 3, usize::MAX, steps), 24);
    assert_eq!(streamed.largest_pass(|_| 3, 10, steps), 10);
    // Not read yet: so many, each of which may be as large as any.
    assert_eq!(streamed.largest_training_pass(same, usize::MAX), None);
    assert_eq!(streamed.largest_evaluation_pass(|_| 3, usize::MAX), 3 * streamed.evaluation_len());
    assert_eq!(streamed.largest_evaluation_pass(|_| 3, 10), 10);
}
