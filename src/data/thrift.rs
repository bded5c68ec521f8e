//! The structs of a Parquet file's footer and pages, which are written in Thrift's compact protocol, looked at before the Parquet reader takes them.
//!
//! The reader passes over what it does not know element by element, and takes no byte for an element that is a boolean: a list of two billion of them is
//! six bytes of a file and seconds of work, and lists of such lists are hours. No struct of Parquet holds a list of booleans or a map, so that here they are an
//! error. All else takes a byte at least, so that the work is bounded by the length. The reader takes a field that it knows for what it should be, whatever the
//! file says it is, and would read on in the midst of another: such a field is an error, too.
//! Source: "Thrift Compact protocol encoding", and `parquet.thrift` of the Parquet format.

use std::io::{self, Read};

/// How deep structs and lists may lie in each other; Parquet's go to less than ten.
const DEEPEST: usize = 32;

/// What a value is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Flag,
    Byte,
    /// Of 16, 32 or 64 bits, which are written alike.
    Integer,
    Double,
    Bytes,
    List(&'static Kind),
    Struct(Fields),
}

/// The fields of a struct by their numbers.
pub(super) type Fields = &'static [(i64, Kind)];

impl Kind {
    /// Whether `wire` is the protocol's number of this kind. As an element of a list a struct has the same number as a field; a flag has not.
    fn is(self, wire: u8) -> bool {
        match self {
            Kind::Flag => matches!(wire, 1 | 2),
            Kind::Byte => wire == 3,
            Kind::Integer => matches!(wire, 4..=6),
            Kind::Double => wire == 7,
            Kind::Bytes => wire == 8,
            Kind::List(_) => matches!(wire, 9 | 10),
            Kind::Struct(_) => wire == 12,
        }
    }
}

/// Reads the one struct at which `input` begins, and gives its bytes. Fields that are not named may be of any kind.
///
/// # Errors
/// Where the input ends before the struct, where it is no Thrift, and where it holds what no struct of Parquet holds.
pub(super) fn read_struct(input: &mut impl Read, fields: Fields) -> io::Result<Vec<u8>> {
    let mut walk = Walk { input, bytes: Vec::new() };
    walk.fields(fields, DEEPEST)?;
    Ok(walk.bytes)
}

/// What was read so far of an input.
struct Walk<'a, R> {
    input: &'a mut R,
    bytes: Vec<u8>,
}

impl<R: Read> Walk<'_, R> {
    /// The fields of a struct up to its end.
    fn fields(&mut self, fields: Fields, deepest: usize) -> io::Result<()> {
        let mut number = 0i64;
        loop {
            let header = self.byte()?;
            let (wire, difference) = (header & 0x0f, header >> 4);
            if wire == 0 {
                return Ok(());
            }
            number = match difference {
                0 => zigzag(self.integer()?),
                _ => number + i64::from(difference),
            };
            // The reader would cut a larger number down to that of another field.
            if i16::try_from(number).is_err() {
                return Err(wrong("a field of it has a number of more than 16 bits"));
            }
            let kind = fields.iter().find(|(known, _)| *known == number).map(|(_, kind)| *kind);
            if kind.is_some_and(|kind| !kind.is(wire)) {
                return Err(wrong(&format!("its field {number} is not of the kind that Parquet has there")));
            }
            // A boolean is all in the header.
            if wire > 2 {
                self.value(wire, kind, deepest)?;
            }
        }
    }

    /// A value that takes a byte at least, of a kind by the protocol's number and, where it is known, by Parquet's.
    fn value(&mut self, wire: u8, kind: Option<Kind>, deepest: usize) -> io::Result<()> {
        let deepest = deepest.checked_sub(1).ok_or_else(|| wrong("its structs lie too deep in each other"))?;
        match wire {
            3 => self.byte().map(drop),
            4..=6 => self.integer().map(drop),
            7 => self.take(8),
            8 => {
                let length = self.integer()?;
                self.take(length)
            }
            9 | 10 => {
                let element = if let Some(Kind::List(element)) = kind { Some(*element) } else { None };
                self.elements(element, deepest)
            }
            12 => self.fields(if let Some(Kind::Struct(fields)) = kind { fields } else { &[] }, deepest),
            13 => self.take(16),
            _ => Err(wrong("it holds values of a kind that Parquet has not")),
        }
    }

    fn elements(&mut self, element: Option<Kind>, deepest: usize) -> io::Result<()> {
        let header = self.byte()?;
        let (wire, short) = (header & 0x0f, header >> 4);
        let count = if short == 15 { self.integer()? } else { u64::from(short) };
        if count > 0 && wire <= 2 {
            return Err(wrong("it holds a list of booleans"));
        }
        if count > 0 && element.is_some_and(|element| !element.is(wire)) {
            return Err(wrong("the elements of a list are not of the kind that Parquet has there"));
        }
        (0..count).try_for_each(|_| self.value(wire, element, deepest))
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

    fn integer(&mut self) -> io::Result<u64> {
        uleb128(|| self.byte())?.ok_or_else(|| wrong("a number of it has no end"))
    }

    fn take(&mut self, count: u64) -> io::Result<()> {
        match self.input.by_ref().take(count).read_to_end(&mut self.bytes)? as u64 == count {
            true => Ok(()),
            false => Err(wrong("it ends too early")),
        }
    }
}

/// A number of seven bits a byte, the lowest first (ULEB128); `None` where it goes on beyond 64 bits.
pub(super) fn uleb128<E>(mut next: impl FnMut() -> Result<u8, E>) -> Result<Option<u64>, E> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = next()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// A signed number from the one that stands for it: 0, -1, 1, -2 and so on for 0, 1, 2, 3.
pub(super) fn zigzag(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not as Parquet describes itself: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walked(bytes: &[u8]) -> Result<usize, String> {
        read_struct(&mut &bytes[..], &[(1, Kind::Integer), (20, Kind::List(&Kind::Struct(&[(1, Kind::Integer)])))])
            .map(|read| read.len())
            .map_err(|error| error.to_string())
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
    fn a_field_of_another_kind_is_refused() {
        assert!(walked(&[0x16, 8, 0]).is_ok(), "any integer");
        assert!(walked(&[0x18, 1, b'a', 0]).unwrap_err().contains("field 1 is not of the kind"), "a text for a number");
        // By its number, and in a list: a struct whose field 1 is a text, and texts instead of structs.
        assert!(walked(&[0x08, 2, 1, b'a', 0]).unwrap_err().contains("field 1 is not of the kind"));
        assert!(walked(&[0x09, 40, 0x1c, 0x18, 1, b'a', 0, 0]).unwrap_err().contains("field 1 is not of the kind"));
        assert!(walked(&[0x09, 40, 0x18, 1, b'a', 0]).unwrap_err().contains("elements of a list"));
    }

    #[test]
    fn what_costs_time_or_memory_without_bytes_is_refused() {
        let many = [0xff, 0xff, 0xff, 0xff, 0x07];
        let with = |header: &[u8]| walked(&[header, &many, &[0]].concat()).unwrap_err();
        for kind in [0xf0, 0xf1, 0xf2] {
            assert!(with(&[0x29, kind]).contains("list of booleans"), "{kind}");
        }
        assert!(with(&[0x2b]).contains("kind that Parquet has not"), "maps");
        // Two billion numbers, and a text as long.
        assert!(with(&[0x29, 0xf5]).contains("ends too early"));
        assert!(with(&[0x28]).contains("ends too early"));
        assert!(walked(&[0x2c; 100]).unwrap_err().contains("too deep"));
        assert!(walked(&[&[0x29][..], &[0x19; 100]].concat()).unwrap_err().contains("too deep"));
        assert!(walked(&[&[0x15], &[0xff; 20][..]].concat()).unwrap_err().contains("no end"));
        // Field 65,537 with a text, which is field 1 in 16 bits; and one after field 32,767.
        assert!(walked(&[0x08, 0x82, 0x80, 0x08, 1, b'a', 0]).unwrap_err().contains("16 bits"));
        assert!(walked(&[0x05, 0xfe, 0xff, 0x03, 2, 0x15, 2, 0]).unwrap_err().contains("16 bits"));
    }
}
