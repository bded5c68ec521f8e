//! TensorBoard event files: scalars by step, in the format of TensorFlow's `event.proto` and `summary.proto`.
//!
//! A file is a row of records, each `length: u64`, `masked_crc32c(length): u32`, `message`, `masked_crc32c(message): u32`,
//! all little-endian (TFRecord); each message is an `Event`. Only the fields that scalars need are declared here.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::error::{Error, Result};

/// `tensorflow.Event`.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    /// Only in a file's first event.
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

/// `tensorflow.Summary.Value` with its `simple_value`.
#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// An event file that is being written.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
    /// The time of the last event: none is earlier, whatever becomes of the clock.
    latest: f64,
}

impl EventFile {
    /// A new `events.out.tfevents.<seconds>.<host>.<process>.<number>` in `folder`.
    pub fn create(folder: &Path) -> Result<Self> {
        let seconds = now() as u64;
        let host = host_name();
        let process = std::process::id();
        // Two files may start in one second.
        let mut number = 0;
        let (path, file) = loop {
            let path = folder.join(format!("events.out.tfevents.{seconds}.{host}.{process}.{number}"));
            match File::create_new(&path) {
                Ok(file) => break (path, file),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(Error::io(path)(error)),
            }
        };
        let mut events = EventFile { path, file, latest: 0.0 };
        let version = Some("brain.Event:2".to_string());
        events.append(Event { wall_time: now(), step: 0, file_version: version, summary: None })?;
        Ok(events)
    }

    /// Goes on with a file.
    pub fn resume(path: PathBuf) -> Result<Self> {
        let file = File::options().append(true).open(&path).map_err(Error::io(&path))?;
        Ok(EventFile { path, file, latest: 0.0 })
    }

    /// Brings the file to the disk; gives its name and length.
    pub fn sync(&mut self) -> Result<(String, u64)> {
        self.file.sync_data().map_err(Error::io(&self.path))?;
        let length = self.file.metadata().map_err(Error::io(&self.path))?.len();
        Ok((self.path.file_name().unwrap_or_default().to_string_lossy().into_owned(), length))
    }

    /// Appends the named values of `step`; on the disk's way on return, as a dashboard may be watching.
    pub fn scalars(&mut self, step: usize, values: &[(&str, f64)]) -> Result<()> {
        let scalar = |&(tag, value): &(&str, f64)| Scalar { tag: tag.to_string(), simple_value: Some(value as f32) };
        let summary = Some(Summary { value: values.iter().map(scalar).collect() });
        self.append(Event { wall_time: now(), step: step as i64, file_version: None, summary })
    }

    fn append(&mut self, mut event: Event) -> Result<()> {
        self.latest = self.latest.max(event.wall_time);
        event.wall_time = self.latest;
        self.file.write_all(&record(&event.encode_to_vec())).map_err(Error::io(&self.path))
    }
}

fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let checksums = [&length, message].map(|bytes| masked(crc32c::crc32c(bytes)).to_le_bytes());
    [&length, &checksums[0][..], message, &checksums[1]].concat()
}

/// TFRecord's mask: a checksum of bytes that themselves hold checksums is weak without it.
fn masked(checksum: u32) -> u32 {
    checksum.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| std::env::var("HOSTNAME"));
    let name: String = name.unwrap_or_default().trim().chars().filter(|&c| c != '/' && !c.is_whitespace()).collect();
    if name.is_empty() { "localhost".to_string() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by `RecordWriter` of the Python package tensorboard 2.21.0, from `Event(wall_time=1.5,
    /// file_version="brain.Event:2")` and `Event(wall_time=2.5, step=300, summary=...)` of loss 0 and objective/kl -1.25.
    const BY_TENSORBOARD: &str = "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c\
        300000000000000095f5d05f09000000000000044010ac022a220a0b0a046c6f737315000000000a130a0c6f626a6563746976652f6b6c15\
        0000a0bf86f4dd21";

    fn hexadecimal(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn scalar(tag: &str, value: f32) -> Scalar {
        Scalar { tag: tag.to_string(), simple_value: Some(value) }
    }

    #[test]
    fn records_equal_those_of_tensorboards_own_writer() {
        let version = Some("brain.Event:2".to_string());
        let first = Event { wall_time: 1.5, step: 0, file_version: version, summary: None };
        let summary = Some(Summary { value: vec![scalar("loss", 0.0), scalar("objective/kl", -1.25)] });
        let second = Event { wall_time: 2.5, step: 300, file_version: None, summary };
        let bytes = [first, second].map(|event| record(&event.encode_to_vec())).concat();
        assert_eq!(hexadecimal(&bytes), BY_TENSORBOARD);
    }

    #[test]
    fn the_file_has_a_version_and_then_each_step() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(folder.path()).unwrap();
        // A second file in the same second has a name of its own.
        assert_ne!(EventFile::create(folder.path()).unwrap().path, file.path);
        file.scalars(7, &[("loss", 0.5)]).unwrap();
        let bytes = std::fs::read(&file.path).unwrap();
        let (mut rest, mut events) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let message = &rest[12..12 + length];
            assert_eq!(record(message), rest[..16 + length]);
            events.push(Event::decode(message).unwrap());
            rest = &rest[16 + length..];
        }
        assert_eq!(events.len(), 2);
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert!((now() - events[1].wall_time).abs() < 60.0);
        assert_eq!(events[1].summary, Some(Summary { value: vec![scalar("loss", 0.5)] }));
        assert_eq!(events[1].step, 7);
    }
}
