//! Breaking files: what the test of hostile input (`hostile.rs`) and the fuzz targets (`tests/fuzz`) share.
//!
//! Random bytes seldom get past the first check of a reader, so a file is broken in its own form: a value of a JSON document, a field of a
//! safetensors header, a byte of a Parquet footer, a word of a template.

use rand::Rng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

/// Bytes that readers take for lengths, signs, ends of strings or no text at all.
const BYTES: [&[u8]; 12] = [
    b"\0",
    b"\xff",
    b"\x80",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\0\0\0\0\0\0\0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xc0\xaf",
    b"\xef\xbb\xbf",
    b"PAR1",
    b"../",
];

/// Words of templates and of settings.
const WORDS: [&str; 40] = [
    "{% for a in range(999999999) %}",
    "{% endfor %}",
    "{% for a in messages recursive %}{{ loop(messages) }}",
    "{% if true %}",
    "{% endif %}",
    "{% set a = [messages] * 999999 %}",
    "{{ 'a' * 999999999 }}",
    "{{ '%99999999d' % 1 }}",
    "{{ messages | tojson(indent=99999999) }}",
    "{{ 'a' | indent(999999999) }}",
    "{{ 'a' | center(999999999) }}",
    "{{ 'aaaa' | replace('a', 'a' * 99999) }}",
    "{{ 'a'.replace('', 'b' * 99999) }}",
    "{{ 'a'.join(range(99999)) }}",
    "{{ range(99999) | list | tojson }}",
    "{% include '/etc/passwd' %}",
    "{% import 'chat' as chat %}",
    "{% extends 'chat' %}",
    "{% include 'chat' %}",
    "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "{{ strftime_now('%Y%') }}",
    "{{ raise_exception('no') }}",
    "{{ namespace(a=1) }}",
    "{{ messages[-9223372036854775808] }}",
    "{{ messages[0:9999999999999999999] }}",
    "{{ 9223372036854775807 + 1 }}",
    "{{ -9223372036854775808 // -1 }}",
    "{{ 1 // 0 }}{{ 1 % 0 }}",
    "{{ 2 ** 99999 }}",
    "{{ 'a'.split('') }}",
    "{{ 'é'[1:] }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{#",
    "-%}",
    "{{",
    "= [",
    "= -1",
    "= nan",
    "= 99999999999999999999",
];

/// Sizes, rates and names that no file should have.
fn hostile_value(random: &mut impl Rng) -> Value {
    let values = [
        json!(0),
        json!(1),
        json!(-1),
        json!(3),
        json!(65_537),
        json!(4_294_967_295u64),
        json!(1u64 << 60),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e300),
        json!(-1e300),
        json!(1e-300),
        json!(0.5),
        json!(null),
        json!(true),
        json!(false),
        json!([]),
        json!({}),
        json!([null, [1], {}]),
        json!(""),
        json!("\0"),
        json!("NaN"),
        json!("../../etc"),
        json!("/etc"),
        json!("(a*)*b"),
        json!("(?=(a+))+$"),
        json!("\u{10ffff}"),
        json!("x".repeat(20_000)),
        nested(100),
    ];
    values.choose(random).cloned().unwrap_or_default()
}

/// A list in a list in a list.
pub fn nested(depth: usize) -> Value {
    (0..depth).fold(json!("deep"), |inner, _| json!([inner]))
}

/// Changes one value of a JSON document, its place or its name.
pub fn json(document: &mut Value, random: &mut impl Rng) {
    let donor = some_value(document, random).clone();
    let place = some_value_mut(document, random);
    match (random.random_range(0..8), &mut *place) {
        (0, _) => *place = donor,
        (1, Value::Object(fields)) if !fields.is_empty() => {
            let name = fields.keys().nth(random.random_range(0..fields.len())).cloned().unwrap_or_default();
            let value = fields.remove(&name).unwrap_or_default();
            if random.random_bool(0.3) {
                fields.insert(format!("{name}x"), value);
            }
        }
        (1, Value::Array(items)) if !items.is_empty() => {
            items.remove(random.random_range(0..items.len()));
        }
        (2, Value::Object(fields)) => drop(fields.insert("x".into(), donor)),
        (2, Value::Array(items)) => items.insert(random.random_range(0..=items.len()), donor),
        (3 | 4, Value::Number(number)) => {
            let number = number.as_f64().unwrap_or_default();
            let changed = [number - 1.0, number + 1.0, number * 2.0, -number, number / 2.0, number * 1e6];
            let changed = changed[random.random_range(0..changed.len())];
            *place = if changed.fract() == 0.0 { json!(changed as i64) } else { json!(changed) };
        }
        (3 | 4, Value::String(string)) => {
            let mut changed = std::mem::take(string).into_bytes();
            bytes(&mut changed, random);
            *string = String::from_utf8_lossy(&changed).into_owned();
        }
        (3, Value::Array(items)) if items.len() > 1 => {
            let (left, right) = (random.random_range(0..items.len()), random.random_range(0..items.len()));
            items.swap(left, right);
        }
        _ => *place = hostile_value(random),
    }
}

/// Changes JSON text: mostly a value of it, sometimes the text itself.
pub fn json_text(text: &mut Vec<u8>, random: &mut impl Rng) {
    match serde_json::from_slice::<Value>(text) {
        Ok(mut document) if random.random_bool(0.9) => {
            json(&mut document, random);
            *text = document.to_string().into_bytes();
        }
        _ => bytes(text, random),
    }
}

fn some_value<'a>(mut value: &'a Value, random: &mut impl Rng) -> &'a Value {
    loop {
        let below: Vec<&Value> = match value {
            Value::Array(items) => items.iter().collect(),
            Value::Object(fields) => fields.values().collect(),
            _ => return value,
        };
        match below.choose(random) {
            Some(inner) if random.random_bool(0.85) => value = inner,
            _ => return value,
        }
    }
}

fn some_value_mut<'a>(value: &'a mut Value, random: &mut impl Rng) -> &'a mut Value {
    let count = match &*value {
        Value::Array(items) => items.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    };
    if count == 0 || random.random_bool(0.15) {
        return value;
    }
    let index = random.random_range(0..count);
    match value {
        Value::Array(items) => some_value_mut(&mut items[index], random),
        Value::Object(fields) => match fields.values_mut().nth(index) {
            Some(inner) => some_value_mut(inner, random),
            None => unreachable!("the index is below the number of fields"),
        },
        _ => unreachable!("only these have values in them"),
    }
}

/// Changes some bytes: flipped, overwritten, left out, doubled, or the end cut off.
pub fn bytes(bytes: &mut Vec<u8>, random: &mut impl Rng) {
    let length = bytes.len();
    bytes_within(bytes, 0..length, random);
}

/// The same within a range.
pub fn bytes_within(bytes: &mut Vec<u8>, range: std::ops::Range<usize>, random: &mut impl Rng) {
    for _ in 0..random.random_range(1..=4) {
        let (start, end) = (range.start.min(bytes.len()), range.end.min(bytes.len()));
        let at = random.random_range(start..=end);
        let piece = BYTES.choose(random).copied().unwrap_or_default();
        let width = random.random_range(1..=16).min(end - at);
        match random.random_range(0..7) {
            0 | 1 if at < end => bytes[at] ^= 1 << random.random_range(0..8),
            2 if at < end => bytes[at] = random.random(),
            3 => drop(bytes.splice(at..(at + piece.len()).min(end), piece.iter().copied())),
            4 => drop(bytes.drain(at..at + width)),
            5 => {
                let copy = bytes[at..at + width].to_vec();
                bytes.splice(at..at, copy);
            }
            6 if random.random_bool(0.1) => bytes.truncate(at),
            _ => drop(bytes.splice(at..at, piece.iter().copied())),
        }
    }
}

/// Changes a text: a word is put in, or bytes are changed.
pub fn text(text: &mut Vec<u8>, random: &mut impl Rng) {
    if random.random_bool(0.4) {
        return bytes(text, random);
    }
    let at = random.random_range(0..=text.len());
    let word = WORDS.choose(random).copied().unwrap_or_default();
    text.splice(at..at, word.bytes());
}

/// Changes a safetensors file: its header as JSON, the header's length, or bytes anywhere.
pub fn safetensors(file: &mut Vec<u8>, random: &mut impl Rng) {
    let length = file.first_chunk::<8>().map_or(0, |length| u64::from_le_bytes(*length));
    let header_end = usize::try_from(length).ok().and_then(|length| length.checked_add(8));
    let header = header_end.and_then(|end| file.get(8..end)).map(<[u8]>::to_vec);
    match (random.random_range(0..10), header) {
        (0, _) => bytes(file, random),
        (1, Some(_)) => {
            let lengths = [0, 1, length.wrapping_sub(1), length + 1, 1 << 40, u64::MAX, file.len() as u64, 100_000_001];
            file[..8].copy_from_slice(&lengths[random.random_range(0..lengths.len())].to_le_bytes());
        }
        (2, Some(header)) => {
            let start = 8 + header.len();
            bytes_within(file, start..usize::MAX, random);
        }
        (_, Some(mut header)) => {
            let end = 8 + header.len();
            json_text(&mut header, random);
            let length = (header.len() as u64).to_le_bytes();
            file.splice(..end, length.into_iter().chain(header));
        }
        (_, None) => bytes(file, random),
    }
}

/// Changes a GGUF file: mostly its metadata and the list of tensors, which are before a quarter of a small model's file.
pub fn gguf(file: &mut Vec<u8>, random: &mut impl Rng) {
    let header = file.len() / 4;
    match random.random_range(0..10) {
        0 => bytes(file, random),
        1 if file.len() >= 24 => {
            // The numbers of tensors and fields.
            let numbers = [0, 1, 1 << 20, 1 << 40, u64::MAX];
            let place = 8 + 8 * random.random_range(0..2);
            file[place..place + 8].copy_from_slice(&numbers[random.random_range(0..numbers.len())].to_le_bytes());
        }
        _ => bytes_within(file, 0..header, random),
    }
}

/// Changes a Parquet file: mostly its footer, whose length is kept right, so that the rest of it is read.
pub fn parquet(file: &mut Vec<u8>, random: &mut impl Rng) {
    let Some(tail) = file.last_chunk::<8>() else { return bytes(file, random) };
    let length = u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]) as usize;
    let end = file.len() - 8;
    let Some(start) = end.checked_sub(length).filter(|_| random.random_bool(0.9)) else { return bytes(file, random) };
    if random.random_bool(0.3) {
        return bytes_within(file, 4..start.max(4), random);
    }
    let mut footer = file[start..end].to_vec();
    bytes(&mut footer, random);
    let length = (footer.len() as u32).to_le_bytes();
    file.splice(start.., footer.into_iter().chain(length).chain(*b"PAR1"));
}

/// Pieces of JSON and CSV that are no rows, or rows of another kind.
const PIECES: [&[u8]; 22] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b",",
    b":",
    b"\n",
    b"\r\n",
    b"\\",
    b"\\ud800",
    b"null",
    b"NaN",
    b"-1e999",
    b"99999999999999999999",
    b"{\"text\": 1}\n",
    b"{\"text\": [{}]}\n",
    b"[[[[[[[[[[[[",
    b"\"\"\"",
    b"\t",
    b"true",
    b"{\"a\": {\"b\": [1, \"x\"]}},",
];

/// Puts a piece of a text file's own form somewhere, or changes bytes.
fn piece(text: &mut Vec<u8>, random: &mut impl Rng) {
    if random.random_bool(0.3) {
        return bytes(text, random);
    }
    let at = random.random_range(0..=text.len());
    let piece = PIECES.choose(random).copied().unwrap_or_default();
    let end = if random.random_bool(0.5) { (at + piece.len()).min(text.len()) } else { at };
    text.splice(at..end, piece.iter().copied());
}

/// Changes JSON Lines or a JSON array: mostly a value of a line, sometimes the text.
pub fn json_rows(file: &mut Vec<u8>, random: &mut impl Rng) {
    if file.starts_with(b"[") && random.random_bool(0.6) {
        return json_text(file, random);
    }
    let mut lines: Vec<Vec<u8>> = file.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    let count = lines.len();
    match lines.get_mut(random.random_range(0..count.max(1))) {
        Some(line) if random.random_bool(0.6) => {
            json_text(line, random);
            line.push(b'\n');
            *file = lines.concat();
        }
        _ => piece(file, random),
    }
}

/// Changes CSV.
pub fn csv(file: &mut Vec<u8>, random: &mut impl Rng) {
    piece(file, random);
}

/// Changes an Arrow file or stream: its footer or its messages' descriptions, whose places are guessed by their zeros, or bytes anywhere.
pub fn arrow_ipc(file: &mut Vec<u8>, random: &mut impl Rng) {
    if file.len() < 16 || random.random_bool(0.3) {
        return bytes(file, random);
    }
    for _ in 0..random.random_range(1..=3) {
        let at = random.random_range(0..file.len() - 8);
        let value = hostile_value(random).as_u64().unwrap_or(random.random());
        match random.random_range(0..4) {
            // Numbers are aligned.
            0 => file[at & !7..][..8].copy_from_slice(&value.to_le_bytes()),
            1 => file[at & !3..][..4].copy_from_slice(&(value as u32).to_le_bytes()),
            2 => file[at] = random.random(),
            _ => file[at] ^= 1 << random.random_range(0..8),
        }
    }
}

/// Changes a compressed text: what is in it, or the compressed bytes.
pub fn compressed(file: &mut Vec<u8>, random: &mut impl Rng) {
    use std::io::{Read, Write};
    if random.random_bool(0.4) {
        return bytes(file, random);
    }
    let is_gzip = file.starts_with(b"\x1f\x8b");
    let mut text = Vec::new();
    // What can be had of a broken file is enough, within bounds.
    let _ = match is_gzip {
        true => flate2::read::MultiGzDecoder::new(&file[..]).take(1 << 16).read_to_end(&mut text),
        false => {
            zstd::stream::read::Decoder::new(&file[..]).and_then(|decoder| decoder.take(1 << 16).read_to_end(&mut text))
        }
    };
    json_rows(&mut text, random);
    let packed = match is_gzip {
        true => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(&text).and_then(|()| encoder.finish())
        }
        false => zstd::stream::encode_all(&text[..], 1),
    };
    if let Ok(packed) = packed {
        *file = packed;
    }
}

/// Two files in one, for fuzz targets that read several: the first one's length stands before them.
pub fn join(first: &[u8], second: &[u8]) -> Vec<u8> {
    [&(first.len() as u32).to_le_bytes(), first, second].concat()
}

/// What [`join`] has joined.
pub fn split(both: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = both.split_first_chunk::<4>() else { return (both, &[]) };
    rest.split_at((u32::from_le_bytes(*length) as usize).min(rest.len()))
}
