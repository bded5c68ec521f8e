//! What a file may cost: bounds of size where files are read whole, and panics of readers that are not ours as errors.
//!
//! | read | bound |
//! | --- | --- |
//! | `config.json`, an adapter's configuration, an index of weights, settings, mixtures, a data set's `README.md` and other small files | 16 MiB; 64 times as much memory where all of it is numbers of one digit |
//! | a chat template | 1 MiB; 2 million steps, of which each 64 bytes of text are one; 10 seconds; 1 GiB |
//! | `tokenizer.json` and what belongs to it | 128 MiB; about 40 times as much memory for a million merges |
//! | header of a safetensors file | 100 MB, and never more than the file holds |
//! | tensors | what the file holds, and 4 bytes a number; what a header promises and a file does not hold is not allocated |
//! | a GGUF file | 128 MiB before the tensors; 2^22 fields, tensors and items of a list; of tensors what the file holds, and 4 bytes a number |
//! | a model from `config.json` alone | 2^32 parameters, 4 bytes each |
//! | a model of the hub | 16 MiB of what the hub says of it; of each file the bound above and the size that is listed, and not a byte more |
//! | a Parquet file | 1,024 rows of the columns that are read, or fewer whose texts, written out, have 16 MiB; one row with more is read alone, up to 1 GiB; numbers as they are when unpacked; of each column a page of at most 2 GiB (the format's limit), so a file that packs well can take that much |
//! | a JSON Lines, JSON, CSV or TSV file | 64 MiB a row, about 40 times as much memory where all of it is numbers of one digit; 4 MiB of rows, or one, at a time; 10,000 columns |
//! | an Arrow file | a record batch of at most 2 GiB, decompressed, and 16 MiB that describe it; the dictionaries |
//! | any file of rows | 2^20 rows and 8,192 more for each of its bytes; a file that claims more is refused |
//! | a compressed file | 1 GiB of temporary disk space, or 256 times its size |
//! | a remote file | 64 MiB of what was read last, for all of them together; two minutes for an answer, five for all tries of a part; a million objects of a listing |
//! | a text | about 170 bytes a byte while a byte-level tokenizer splits it |
//!
//! Weights are read as safetensors or GGUF and nothing else: a pickle is a program, and none is ever run.

use std::cell::Cell;
use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use crate::bail;
use crate::error::{Error, Result};

/// Bytes of a small file of JSON or TOML.
pub const SMALL_FILE: u64 = 16 << 20;
/// Bytes of a chat template.
pub const TEMPLATE_FILE: u64 = 1 << 20;
/// Bytes of a file of a tokenizer.
pub const TOKENIZER_FILE: u64 = 128 << 20;

/// Bytes of a row of text: a line of JSON, an element of an array, a record of CSV.
pub const TEXT_ROW: usize = 64 << 20;
/// Columns of a text file.
pub const COLUMNS: usize = 10_000;
/// Bytes of an Arrow file's record batch, decompressed.
pub const RECORD_BATCH: u64 = 2 << 30;
/// Bytes to which any compressed file may be decompressed.
pub const DECOMPRESSED: u64 = 1 << 30;
/// How many times its size a compressed file may be decompressed to, where that is more.
pub const DECOMPRESSED_RATIO: u64 = 256;

/// A whole file of at most `limit` bytes.
pub fn read(path: impl AsRef<Path>, limit: u64) -> Result<Vec<u8>> {
    let path = path.as_ref();
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::io(path))?;
    // A device or a growing file may hold more than it says.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > limit {
        bail!(
            "{}: is larger than {} MiB, which no such file should be; check that it is the file it is called",
            path.display(),
            limit >> 20
        );
    }
    Ok(bytes)
}

/// A whole file of text of at most `limit` bytes.
pub fn read_text(path: impl AsRef<Path>, limit: u64) -> Result<String> {
    let path = path.as_ref();
    String::from_utf8(read(path, limit)?).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::input(format!("{}: byte {at} is not UTF-8 text; save the file as UTF-8", path.display()))
    })
}

/// Whether a name that a file gives is that of something in its own folder, and leads nowhere else.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', ':']) && !name.contains(char::is_control)
}

/// The memory that this process holds, in bytes; 0 where the system does not say.
pub fn resident_memory() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split_ascii_whitespace().nth(1)?.parse::<usize>().ok());
    pages.unwrap_or(0) * 4096
}

thread_local! {
    /// Whether a panic on this thread will be caught and told as an error.
    static IS_CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs a step of a reader that takes some of what a file says on trust and panics where that is impossible; `None` where it did, and nothing is
/// printed then. What the step was working on must be dropped.
pub fn without_panic<T>(step: impl FnOnce() -> T) -> Option<T> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !IS_CAUGHT.get() {
                previous(info);
            }
        }));
    });
    let outer = IS_CAUGHT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(step));
    IS_CAUGHT.set(outer);
    result.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_beyond_its_bound_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, vec![b' '; 1 << 20]).unwrap();
        assert_eq!(read(&path, 1 << 20).unwrap().len(), 1 << 20);
        std::fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
        assert!(read(&path, 1 << 20).unwrap_err().to_string().contains("config.json: is larger than 1 MiB"));
        assert!(read("/dev/zero", 1 << 20).is_err());
    }

    #[test]
    fn a_panic_is_nothing_and_what_follows_goes_on() {
        assert_eq!(without_panic(|| 1), Some(1));
        assert_eq!(without_panic(|| [1, 2][std::hint::black_box(2)]), None);
        assert_eq!(without_panic(|| without_panic(|| panic!("inner")).is_none()), Some(true));
    }
}
