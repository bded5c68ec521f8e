//! The structs of a Parquet file's footer and pages, which are written in Thrift's compact protocol, looked at before the Parquet reader takes them.
//!
//! The reader passes over what it does not know element by element, and takes no byte for an element that is a boolean: a list of two billion of them is
//! six bytes of a file and seconds of work, and lists of such lists are hours. No struct of Parquet holds a list of booleans or a map, so that here they are an
//! error. All else takes a byte at least, so that the work is bounded by the length.
//! Source: "Thrift Compact protocol encoding", and `parquet.thrift` of the Parquet format.

use std::io::{self, Read};

/// How deep structs and lists may lie in each other; Parquet's go to less than ten.
const DEEPEST: usize = 32;

/// Reads the one struct at which `input` begins, and gives its bytes.
///
/// # Errors
/// Where the input ends before the struct, where it is no Thrift, and where it holds what no struct of Parquet holds.
pub(super) fn read_struct(input: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut walk = Walk { input, bytes: Vec::new() };
    walk.fields(DEEPEST)?;
    Ok(walk.bytes)
}

/// What was read so far of an input.
struct Walk<'a, R> {
    input: &'a mut R,
    bytes: Vec<u8>,
}

impl<R: Read> Walk<'_, R> {
    /// The fields of a struct up to its end.
    fn fields(&mut self, deepest: usize) -> io::Result<()> {
        loop {
            let header = self.byte()?;
            let kind = header & 0x0f;
            if kind == 0 {
                return Ok(());
            }
            // Without a difference to the number of the field before, the number itself follows.
            if header >> 4 == 0 {
                self.integer()?;
            }
            // A boolean is all in the header.
            if kind > 2 {
                self.value(kind, deepest)?;
            }
        }
    }

    /// A value of a kind, as the protocol numbers them, that takes a byte at least.
    fn value(&mut self, kind: u8, deepest: usize) -> io::Result<()> {
        let deepest = deepest.checked_sub(1).ok_or_else(|| wrong("its structs lie too deep in each other"))?;
        match kind {
            3 => self.byte().map(drop),
            4..=6 => self.integer().map(drop),
            7 => self.take(8),
            8 => {
                let length = self.integer()?;
                self.take(length)
            }
            9 | 10 => {
                let header = self.byte()?;
                let (kind, short) = (header & 0x0f, header >> 4);
                let count = if short == 15 { self.integer()? } else { u64::from(short) };
                if count > 0 && kind <= 2 {
                    return Err(wrong("it holds a list of booleans"));
                }
                (0..count).try_for_each(|_| self.value(kind, deepest))
            }
            12 => self.fields(deepest),
            13 => self.take(16),
            _ => Err(wrong("it holds values of a kind that Parquet has not")),
        }
    }

    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.input.read_exact(&mut byte).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => wrong("it ends too early"),
            _ => error,
        })?;
        self.bytes.push(byte[0]);
        Ok(byte[0])
    }

    /// A number of seven bits a byte, the lowest first (ULEB128).
    fn integer(&mut self) -> io::Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(wrong("a number of it has no end"))
    }

    fn take(&mut self, count: u64) -> io::Result<()> {
        match self.input.by_ref().take(count).read_to_end(&mut self.bytes)? as u64 == count {
            true => Ok(()),
            false => Err(wrong("it ends too early")),
        }
    }
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not as Parquet describes itself: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walked(bytes: &[u8]) -> Result<usize, String> {
        read_struct(&mut &bytes[..]).map(|read| read.len()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_struct_is_read_to_its_end_and_no_further() {
        // Field 1, a number; field 2, a text; field 3, false; field 20, a list of two structs of one number; field 21, a list of nothing; the end.
        let bytes = [0x15, 0x96, 0x01, 0x18, 2, b'a', b'b', 0x12, 0x09, 40, 0x2c, 0x15, 2, 0, 0x15, 4, 0, 0x19, 0, 0];
        let mut more = bytes.to_vec();
        more.extend([7, 7, 7]);
        assert_eq!(walked(&more), Ok(bytes.len()));
        for length in 0..bytes.len() {
            assert!(walked(&bytes[..length]).unwrap_err().contains("ends too early"), "{length}");
        }
    }

    #[test]
    fn what_costs_time_or_memory_without_bytes_is_refused() {
        let many = [0xff, 0xff, 0xff, 0xff, 0x07];
        let with = |header: &[u8]| walked(&[header, &many, &[0]].concat()).unwrap_err();
        for kind in [0xf0, 0xf1, 0xf2] {
            assert!(with(&[0x19, kind]).contains("list of booleans"), "{kind}");
        }
        assert!(with(&[0x1b]).contains("kind that Parquet has not"), "maps");
        // Two billion numbers, and a text as long.
        assert!(with(&[0x19, 0xf5]).contains("ends too early"));
        assert!(with(&[0x18]).contains("ends too early"));
        assert!(walked(&[0x1c; 100]).unwrap_err().contains("too deep"));
        assert!(walked(&[0x19, 0x19].repeat(50)).unwrap_err().contains("too deep"));
        assert!(walked(&[&[0x15], &[0xff; 20][..]].concat()).unwrap_err().contains("no end"));
    }
}
