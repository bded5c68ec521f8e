//! The forms in which rows are read, told by the first bytes of a file and by its name.
//!
//! | form | told by | groups of rows |
//! | --- | --- | --- |
//! | Parquet | `PAR1` at both ends | its row groups |
//! | Arrow IPC, file (Feather 2) or stream | `ARROW1`, or `ff ff ff ff` | its record batches |
//! | JSON Lines: an object a line | `{` | every 1,024 rows or 4 MiB |
//! | a JSON array of objects | `[` | every 1,024 rows or 4 MiB |
//! | CSV, TSV, with a header | the endings `.csv` and `.tsv` | every 1,024 rows or 4 MiB |
//! | each of these, compressed by gzip or zstd | `1f 8b`, or `28 b5 2f fd` | those of what is in it |
//!
//! A compressed file cannot be read from the middle: it is decompressed once, into a temporary file that has
//! no name and goes with the process.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use super::data_file::DataFile;
use super::notes::{self, files_of, listed};
use super::table::unreadable;
use crate::bail;
use crate::error::{Error, Result};
use crate::limits;

/// The forms, for messages.
pub(super) const KNOWN: &str = "the forms that are read are Parquet, JSON Lines and JSON arrays of objects (.jsonl, .json), CSV and TSV with a header (.csv, .tsv) and Arrow IPC (.arrow), the last four also compressed by gzip or zstd (.gz, .zst)";

/// The endings by which files of a folder are known to hold rows; text and Arrow files may have one of
/// compression after it.
const ENDINGS: [&str; 9] = ["parquet", "jsonl", "ndjson", "json", "csv", "tsv", "arrow", "feather", "ipc"];
const COMPRESSED: [&str; 3] = ["gz", "zst", "zstd"];
/// Files of JSON that data sets have and that hold no rows.
const NO_ROWS: [&str; 5] =
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"];

/// Bytes of a file's start that are looked at.
const HEAD: u64 = 4096;

/// How the rows of a file are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Parquet,
    JsonLines,
    JsonArray,
    Csv { delimiter: u8 },
    ArrowFile,
    ArrowStream,
}

/// A file of which the form is known.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) form: Form,
    /// The file, or what it was decompressed to.
    pub(super) file: DataFile,
    /// Where the content begins: behind the mark of UTF-8 that some programs write.
    pub(super) start: u64,
}

/// The ending of a name without that of a compression, in lower case.
fn ending(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let mut endings = name.split('.').skip(1).collect::<Vec<_>>();
    if endings.len() > 1 && endings.last().is_some_and(|last| COMPRESSED.contains(last)) {
        endings.pop();
    }
    endings.last().copied().unwrap_or_default().to_owned()
}

/// Whether a name ends in this, but for the ending of a compression.
pub(super) fn has_extension(path: &Path, extension: &str) -> bool {
    ending(path) == extension
}

/// Whether a file of a folder is known by its name to hold rows.
pub(crate) fn is_data_file(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    ENDINGS.contains(&ending(path).as_str()) && !NO_ROWS.contains(&&*name)
}

/// The ending of names for messages and comparisons: files of one folder are to be of one form.
fn kind(path: &Path) -> &'static str {
    match ending(path).as_str() {
        "parquet" => "Parquet",
        "json" => "JSON",
        "jsonl" | "ndjson" => "JSON Lines",
        "csv" | "tsv" => "CSV or TSV",
        _ => "Arrow",
    }
}

/// Of the data files of a folder those that are read: all of one form. Next to files of another form, `.json`
/// files are taken for descriptions, which is noted.
///
/// # Errors
/// Where there are several forms, which may be copies of the same rows.
pub(super) fn of_one_form<P: AsRef<Path>>(folder: &str, mut files: Vec<P>) -> Result<Vec<P>> {
    let is_json = |file: &P| kind(file.as_ref()) == "JSON";
    let mut left_out = Vec::new();
    if !files.iter().all(is_json) {
        left_out = files.extract_if(.., |file| is_json(file)).map(|file| file.as_ref().display().to_string()).collect();
    }
    let mut kinds: Vec<&str> = files.iter().map(|file| kind(file.as_ref())).collect();
    kinds.sort_unstable();
    kinds.dedup();
    if kinds.len() > 1 {
        bail!(
            "{folder}: the folder holds files of several forms ({}), which may be copies of the same rows; name those to read by a pattern, such as {folder}/*.{}",
            kinds.join(", "),
            files.first().map_or(String::new(), |file| ending(file.as_ref()))
        );
    }
    if !left_out.is_empty() {
        notes::add(format!(
            "{folder}: reads the {} of the form {}, and leaves out {}, taken for descriptions of them",
            files_of(files.len()),
            kinds.join(", "),
            listed(&left_out)
        ));
    }
    Ok(files)
}

/// Tells the form of a file, and decompresses it where it is compressed.
///
/// # Errors
/// Where it is empty or in none of the forms, or cannot be decompressed.
pub(super) fn recognise(path: &Path, file: DataFile) -> Result<Source> {
    let head = head_of(path, &file)?;
    let (file, head) = match compression(&head) {
        Some(compression) => {
            let unpacked = DataFile::Local(decompress(path, &file, compression, limits::DECOMPRESSED)?);
            let head = head_of(path, &unpacked)?;
            (unpacked, head)
        }
        None => (file, head),
    };
    let is_text = |form| {
        let start = if head.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        (form, start)
    };
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&head);
    let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
    let (form, start) = match (ending(path).as_str(), first) {
        _ if head.starts_with(b"PAR1") => (Form::Parquet, 0),
        _ if head.starts_with(b"ARROW1") => (Form::ArrowFile, 0),
        _ if head.starts_with(&[0xff; 4]) => (Form::ArrowStream, 0),
        _ if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") => {
            bail!("{}: the text is in UTF-16, expected UTF-8; save it as UTF-8", path.display())
        }
        (extension @ ("csv" | "tsv"), _) => {
            is_text(Form::Csv { delimiter: if extension == "csv" { b',' } else { b'\t' } })
        }
        // What is wrong with such a file says its reader.
        ("parquet", byte) if !matches!(byte, Some(b'{' | b'[')) => (Form::Parquet, 0),
        (_, Some(b'{')) => is_text(Form::JsonLines),
        (_, Some(b'[')) => is_text(Form::JsonArray),
        ("jsonl" | "ndjson" | "json", None) => {
            bail!("{}: the file holds nothing but white space, expected rows", path.display())
        }
        _ => bail!("{}: {}; {KNOWN}", path.display(), fault(path, &head)),
    };
    if form == Form::Parquet && compression(&head_of(path, &DataFile::open(path)?)?).is_some() {
        bail!("{}: a compressed Parquet file; decompress it, as its columns are compressed already", path.display());
    }
    Ok(Source { form, file, start })
}

/// What is known of a file that is in none of the forms.
fn fault(path: &Path, head: &[u8]) -> String {
    let known: [(&[u8], &str); 7] = [
        (b"PK\x03\x04", "a zip archive (or a table of a spreadsheet)"),
        (b"\xfd7zXZ\0", "a file compressed by xz"),
        (b"BZh", "a file compressed by bzip2"),
        (b"FEA1", "a file of Feather's first version"),
        (b"ORC", "an ORC file"),
        (b"Obj\x01", "an Avro file"),
        (b"\x80\x04", "a pickle, which is a program and never read"),
    ];
    match known.iter().find(|(magic, _)| head.starts_with(magic)) {
        Some((_, name)) => format!("the file is {name}"),
        None if ["jsonl", "ndjson", "json"].contains(&ending(path).as_str()) => {
            "the file begins with neither { nor [, expected an object a line or an array of objects".to_owned()
        }
        None => "not a file of rows in a form that is known".to_owned(),
    }
}

fn head_of(path: &Path, file: &DataFile) -> Result<Vec<u8>> {
    let head = file.length().and_then(|length| file.read(0..length.min(HEAD)));
    let head = head.map_err(|error| unreadable(path, error))?;
    if head.is_empty() {
        bail!("{}: the file is empty (0 bytes), expected rows", path.display());
    }
    Ok(head.to_vec())
}

/// How a whole file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstd,
}

fn compression(head: &[u8]) -> Option<Compression> {
    let is_skippable = head.len() > 3 && head[0] & 0xf0 == 0x50 && head[1..4] == *b"\x2a\x4d\x18";
    match head {
        [0x1f, 0x8b, ..] => Some(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
        _ if is_skippable => Some(Compression::Zstd),
        _ => None,
    }
}

/// Decompresses a file into a temporary one, which the system removes when the process ends, however it ends.
/// What it may be decompressed to is bounded by its size and by `always`, which is allowed to all.
fn decompress(path: &Path, file: &DataFile, compression: Compression, always: u64) -> Result<File> {
    let fault = |error: io::Error| {
        let reason = match error.kind() {
            io::ErrorKind::UnexpectedEof => "it ends too early".to_owned(),
            _ => error.to_string(),
        };
        Error::input(format!("{}: cannot be decompressed ({reason}); copy or make it again", path.display()))
    };
    let packed = file.length().map_err(fault)?;
    let most = always.max(packed.saturating_mul(limits::DECOMPRESSED_RATIO));
    let reader = BufReader::with_capacity(1 << 18, file.reader(0).map_err(fault)?);
    let mut reader: Box<dyn Read> = match compression {
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(reader).map_err(fault)?),
    };
    let full = |error: io::Error| {
        Error::input(format!(
            "{}: cannot be decompressed into the temporary folder {} ({error}); free space there, or name another by TMPDIR",
            path.display(),
            std::env::temp_dir().display()
        ))
    };
    let mut unpacked = tempfile::tempfile().map_err(full)?;
    let (mut buffer, mut length) = (vec![0; 1 << 18], 0u64);
    loop {
        let count = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(fault(error)),
        };
        length += count as u64;
        if length > most {
            bail!(
                "{}: its {packed} bytes decompress to more than {} MiB, which no text does; decompress it yourself if this is right",
                path.display(),
                most >> 20
            );
        }
        unpacked.write_all(&buffer[..count]).map_err(full)?;
    }
    notes::add(format!(
        "{}: decompressed once, into a temporary file of {:.1} MB",
        path.display(),
        length as f64 / 1e6
    ));
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_files_are_known_by_their_endings() {
        for name in ["a.parquet", "a.jsonl", "b.c.JSON", "a.csv.gz", "a.arrow", "x/train-00000-of-00001.ndjson.zst"] {
            assert!(is_data_file(Path::new(name)), "{name}");
        }
        for name in ["README.md", "a.txt", "a.gz", "x/dataset_info.json", "state.json", "json", "a.csv.bak"] {
            assert!(!is_data_file(Path::new(name)), "{name}");
        }
    }

    #[test]
    fn a_folder_of_several_forms_is_refused_and_descriptions_are_passed_over() {
        let files = |names: &[&str]| {
            of_one_form("data", names.to_vec()).map(|files| files.join(" ")).map_err(|error| error.to_string())
        };
        assert_eq!(files(&["a.parquet", "b.parquet", "c.json"]).unwrap(), "a.parquet b.parquet");
        assert!(notes::was_added("data: reads the 2 files of the form Parquet, and leaves out c.json, taken for"));
        assert_eq!(files(&["a.json", "b.json"]).unwrap(), "a.json b.json");
        assert_eq!(files(&["a.jsonl", "b.ndjson.gz"]).unwrap(), "a.jsonl b.ndjson.gz");
        let error = files(&["a.csv", "a.parquet"]).unwrap_err();
        assert!(error.contains("data: the folder holds files of several forms (CSV or TSV, Parquet)"), "{error}");
    }

    fn recognised(name: &str, bytes: &[u8]) -> Result<(Form, u64)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        recognise(&path, DataFile::open(&path).unwrap()).map(|source| (source.form, source.start))
    }

    #[test]
    fn forms_are_told_by_content_and_only_csv_by_name() {
        let comma = Form::Csv { delimiter: b',' };
        let cases: [(&str, &[u8], Form, u64); 9] = [
            ("a.json", b" \n{\"a\": 1}", Form::JsonLines, 0),
            ("a.jsonl", b"[{}]", Form::JsonArray, 0),
            ("a", b"\xef\xbb\xbf{\"a\": 1}", Form::JsonLines, 3),
            ("a.csv", b"{,[\n", comma, 0),
            ("a.CSV", b"\xef\xbb\xbfa,b\n", comma, 3),
            ("a.tsv", b"a\tb\n", Form::Csv { delimiter: b'\t' }, 0),
            ("a.pq", b"PAR1", Form::Parquet, 0),
            ("a.feather", b"ARROW1\0\0", Form::ArrowFile, 0),
            ("a.arrow", b"\xff\xff\xff\xff\x10", Form::ArrowStream, 0),
        ];
        for (name, bytes, form, start) in cases {
            assert_eq!(recognised(name, bytes).unwrap(), (form, start), "{name}");
        }
        for (name, bytes, fault) in [
            (
                "a.txt",
                &b"text"[..],
                "a.txt: not a file of rows in a form that is known; the forms that are read are Parquet, JSON",
            ),
            ("a.jsonl", b"text", "neither { nor ["),
            ("a.jsonl", b" \n\n", "nothing but white space"),
            ("a.jsonl", b"", "is empty (0 bytes)"),
            ("a.csv", b"\xff\xfea\0,\0", "UTF-16"),
            ("a.xlsx", b"PK\x03\x04", "a zip archive"),
        ] {
            let error = recognised(name, bytes).unwrap_err().to_string();
            assert!(error.contains(fault), "{error}");
        }
    }

    #[test]
    fn compressed_files_are_decompressed_within_bounds() {
        let gzip = |bytes: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let zstd = |bytes: &[u8]| zstd::stream::encode_all(bytes, 19).unwrap();
        let line = b"{\"a\": 1}\n";
        for packed in [gzip(line), zstd(line), [gzip(line), gzip(line)].concat(), [zstd(line), zstd(line)].concat()] {
            assert_eq!(recognised("a.jsonl.gz", &packed).unwrap(), (Form::JsonLines, 0));
            let error = recognised("a.jsonl.gz", &packed[..packed.len() - 5]).unwrap_err().to_string();
            assert!(error.contains("cannot be decompressed (it ends too early)"), "{error}");
        }
        let zeros = vec![0; 1 << 20];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl.zst");
        std::fs::write(&path, zstd(&zeros).repeat(5)).unwrap();
        let unpack = |most: u64| decompress(&path, &DataFile::open(&path).unwrap(), Compression::Zstd, most << 20);
        assert_eq!(unpack(5).unwrap().metadata().unwrap().len(), 5 << 20);
        let error = unpack(4).unwrap_err().to_string();
        assert!(error.contains("decompress to more than 4 MiB"), "{error}");
        assert!(recognised("a.jsonl.gz", &gzip(b"")).unwrap_err().to_string().contains("empty"));
    }
}
