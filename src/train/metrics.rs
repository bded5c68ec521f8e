//! What a run measured, step by step: `metrics.jsonl` and TensorBoard events in the run's folder.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::tensorboard::EventFile;
use crate::error::{Error, Result};
use crate::files::write_atomically;

/// Writes each step's values as a line of `metrics.jsonl` and as TensorBoard scalars.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    lines: File,
    events: EventFile,
    started: Instant,
    /// Seconds of the run before this process began.
    before: f64,
}

/// How far the files are, so that a run that goes on continues them there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Bytes of `metrics.jsonl`.
    lines: u64,
    /// The event file, and its bytes.
    events: (String, u64),
    /// Seconds since the run began, pauses left out.
    seconds: f64,
}

const FILE: &str = "metrics.jsonl";

impl Metrics {
    /// Appends to `metrics.jsonl` in `folder` and starts a new event file beside it. The clock of `seconds` starts.
    pub fn create(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let path = folder.join(FILE);
        let lines = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path))?;
        Ok(Metrics { path, lines, events: EventFile::create(folder)?, started: Instant::now(), before: 0.0 })
    }

    /// Goes on in `folder` where the files of the run in `from` were; what they hold after that is dropped.
    ///
    /// Files that are gone, or shorter than they were, are no reason not to go on: the curves then have a gap.
    pub fn resume(folder: &Path, from: &Path, position: &Position) -> Result<Self> {
        let (name, length) = &position.events;
        let path = cut(folder, from, FILE, position.lines)?;
        let events = cut(folder, from, name, *length)?;
        let lines = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path))?;
        let events = if events.is_file() { EventFile::resume(events)? } else { EventFile::create(folder)? };
        Ok(Metrics { path, lines, events, started: Instant::now(), before: position.seconds })
    }

    /// Brings the files to the disk, and says how far they are.
    pub fn sync(&mut self) -> Result<Position> {
        self.lines.sync_data().map_err(Error::io(&self.path))?;
        let lines = self.lines.metadata().map_err(Error::io(&self.path))?.len();
        Ok(Position { lines, events: self.events.sync()?, seconds: self.seconds() })
    }

    fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }

    /// Writes `values` of `step`, with `seconds` since the start and `peak_rss_mb` added; complete on return.
    ///
    /// A number that is not finite stands as `null` in the line, as JSON has no other way.
    pub fn write(&mut self, step: usize, values: &[(&str, f64)]) -> Result<()> {
        let mut all = Vec::from(values);
        all.push(("seconds", self.seconds()));
        all.extend(peak_rss_mb().map(|peak| ("peak_rss_mb", peak)));
        let mut object = Map::new();
        object.insert("step".to_string(), Value::from(step));
        object.extend(all.iter().map(|&(name, value)| (name.to_string(), Value::from(value))));
        object.entry("peak_rss_mb").or_insert(Value::Null);
        let line = format!("{}\n", Value::Object(object));
        // One call a line: a run that is killed leaves whole lines.
        self.lines.write_all(line.as_bytes()).map_err(Error::io(&self.path))?;
        self.events.scalars(step, &all)
    }
}

/// Brings the first `length` bytes of a file of the folder `from` into `folder`, and gives its path there.
fn cut(folder: &Path, from: &Path, name: &str, length: u64) -> Result<PathBuf> {
    let (source, target) = (from.join(name), folder.join(name));
    if source.is_file() {
        let bytes = std::fs::read(&source).map_err(Error::io(&source))?;
        let kept = &bytes[..bytes.len().min(length as usize)];
        write_atomically(&target, |file| file.write_all(kept))?;
    }
    Ok(target)
}

/// The most memory this process has held so far, in megabytes (10^6 bytes); `None` where the system has no
/// `/proc/self/status`.
pub fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024.0 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(folder: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
        assert!(text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn each_step_is_one_line_and_a_second_writer_appends() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::create(folder.path()).unwrap();
        metrics.write(1, &[("loss", 2.5), ("tokens_per_second", 100.0)]).unwrap();
        // Nothing waits in a buffer for the writer to be dropped.
        assert_eq!(lines(folder.path()).len(), 1);
        Metrics::create(folder.path()).unwrap().write(2, &[("loss", f64::NAN)]).unwrap();
        let lines = lines(folder.path());
        let keys: Vec<&String> = lines[0].as_object().unwrap().keys().collect();
        assert_eq!(keys, ["step", "loss", "tokens_per_second", "seconds", "peak_rss_mb"]);
        assert_eq!((&lines[0]["step"], &lines[0]["loss"]), (&Value::from(1), &Value::from(2.5)));
        assert!(lines[1]["loss"].is_null() && lines[1]["seconds"].as_f64().unwrap() >= 0.0);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_peak_is_no_less_than_what_is_held() {
        // Every byte is 1, so every page is written, and the sum keeps the allocation from being left out.
        let held = std::hint::black_box(vec![1u8; 100_000_000]);
        let peak = peak_rss_mb().unwrap();
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let resident: f64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
        assert_eq!(held.iter().map(|&byte| u64::from(byte)).sum::<u64>(), 100_000_000);
        // The kernel counts with a slack of some pages a thread.
        assert!(peak >= 100.0 && peak >= resident * 4096.0 / 1e6 - 5.0 && peak < 1e6, "{peak} MB, {resident} pages");
    }
}
