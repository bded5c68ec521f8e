//! Where the values of JSON Lines and of a JSON array begin and end.

use super::text_parts::{Found, Split};

/// White space of JSON.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

/// The bytes of white space at the beginning.
fn space(bytes: &[u8]) -> usize {
    bytes.iter().position(|byte| !is_space(*byte)).unwrap_or(bytes.len())
}

/// A value a line; empty lines are passed over.
#[derive(Debug, Default)]
pub(super) struct Lines {
    has_begun: bool,
}

impl Split for Lines {
    fn next(&mut self, bytes: &[u8]) -> Result<Found, String> {
        if !self.has_begun {
            match space(bytes) {
                0 if bytes.is_empty() => return Ok(Found::More),
                0 => self.has_begun = true,
                gap => return Ok(Found::Gap(gap)),
            }
        }
        Ok(match bytes.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                self.has_begun = false;
                Found::Record(end + 1)
            }
            None => Found::More,
        })
    }

    fn end(&mut self) -> Result<(), String> {
        Ok(())
    }
}

/// The elements of an array.
#[derive(Debug)]
pub(super) struct Elements {
    state: State,
    /// Whether these are some elements of an array, without what comes before and after them.
    is_part: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the bracket that opens the array.
    Before,
    /// Where the first element or the end may come, the next element, or a comma or the end.
    First,
    Next,
    Comma,
    /// In an object or list (or in those within it), or in a string of it.
    Nested {
        depth: usize,
        in_string: bool,
        is_escaped: bool,
    },
    /// In a string, or a number or word.
    Text {
        is_escaped: bool,
    },
    Word,
    After,
}

impl Elements {
    /// Those of a whole text.
    pub(super) fn whole() -> Self {
        Elements { state: State::Before, is_part: false }
    }

    /// Some elements with the commas between them.
    pub(super) fn part() -> Self {
        Elements { state: State::Next, is_part: true }
    }

    /// What a byte between elements is, the first byte of one of them or a sign of the array.
    fn between(&mut self, byte: u8) -> Result<bool, String> {
        let (state, is_sign) = match (self.state, byte) {
            (State::Before, b'[') => (State::First, true),
            (State::First | State::Comma, b']') => (State::After, true),
            (State::Comma, b',') => (State::Next, true),
            (State::Comma, _) => return Err("expected a comma or ] after an element of the array".to_owned()),
            (State::After, _) => return Err("there is more text after the end of the array".to_owned()),
            (State::Next, b']') => return Err("expected an element after the comma, found the array's end".to_owned()),
            (State::First | State::Next, b',') => return Err("expected an element, found a comma".to_owned()),
            (_, b'{' | b'[') => (State::Nested { depth: 0, in_string: false, is_escaped: false }, false),
            (_, b'"') => (State::Text { is_escaped: true }, false),
            _ => (State::Word, false),
        };
        self.state = state;
        Ok(is_sign)
    }

    /// Where the element ends in these bytes, if it does.
    fn end_of_element(&mut self, bytes: &[u8]) -> Option<usize> {
        for (index, &byte) in bytes.iter().enumerate() {
            match &mut self.state {
                State::Nested { in_string: true, is_escaped, .. } if *is_escaped => *is_escaped = false,
                State::Nested { in_string, is_escaped, .. } if *in_string => {
                    *is_escaped = byte == b'\\';
                    *in_string = byte != b'"';
                }
                State::Nested { depth, in_string, .. } => match byte {
                    b'"' => *in_string = true,
                    b'{' | b'[' => *depth += 1,
                    b'}' | b']' if *depth == 1 => return Some(index + 1),
                    b'}' | b']' => *depth -= 1,
                    _ => {}
                },
                // The quote that opens a string is taken as escaped.
                State::Text { is_escaped } if *is_escaped => *is_escaped = false,
                State::Text { is_escaped } => match byte {
                    b'"' => return Some(index + 1),
                    _ => *is_escaped = byte == b'\\',
                },
                _ if is_space(byte) || matches!(byte, b',' | b']') => return Some(index),
                _ => {}
            }
        }
        None
    }
}

impl Split for Elements {
    fn next(&mut self, bytes: &[u8]) -> Result<Found, String> {
        if !matches!(self.state, State::Nested { .. } | State::Text { .. } | State::Word) {
            match (space(bytes), bytes.first()) {
                (0, None) => return Ok(Found::More),
                (0, Some(&byte)) if self.between(byte)? => return Ok(Found::Gap(1)),
                (0, Some(_)) => {}
                (gap, _) => return Ok(Found::Gap(gap)),
            }
        }
        Ok(match self.end_of_element(bytes) {
            Some(end) => {
                self.state = State::Comma;
                Found::Record(end)
            }
            None => Found::More,
        })
    }

    fn end(&mut self) -> Result<(), String> {
        match self.state {
            State::After => Ok(()),
            State::Comma if self.is_part => Ok(()),
            _ => Err("the file ends before the array does; copy or make it again".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::text_parts::tests::records;
    use super::*;

    #[test]
    fn lines_are_split_and_empty_ones_passed_over() {
        let text = b"\n{\"a\": 1}\r\n \n  {\"b\": \"\\n\"}\n\n{\"c\": 1}";
        for piece in 1..text.len() {
            let found = records(text, piece, Lines::default()).unwrap();
            let expected = [(2, "{\"a\": 1}\r\n"), (4, "{\"b\": \"\\n\"}\n"), (6, "{\"c\": 1}")];
            assert_eq!(found, expected.map(|(line, text)| (line, text.to_owned())), "{piece}");
        }
        assert!(records(b" \n\n", 1, Lines::default()).unwrap().is_empty());
    }

    #[test]
    fn elements_are_those_that_a_json_parser_finds() {
        let texts = [
            r#"[]"#,
            " [ {} ]\n",
            r#"[{"a": "]}\"\\"}, {"b": [1, {"c": {}}], "d": "é"} ,{"e": "\\\\"}]"#,
            r#"[1, "a\"]", null,[2,[3]],true ]"#,
            "[\n  {\n    \"a\": 1\n  },\n  {\"a\": 2}\n]",
        ];
        for text in texts {
            let values: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
            for piece in 1..text.len() {
                let found = records(text.as_bytes(), piece, Elements::whole()).unwrap();
                let found: Vec<serde_json::Value> =
                    found.iter().map(|(_, text)| serde_json::from_str(text).unwrap()).collect();
                assert_eq!(found, values, "{text} {piece}");
            }
        }
        let found = records(texts[4].as_bytes(), 7, Elements::whole()).unwrap();
        assert_eq!(found.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [2, 5]);
        let part = records(b"{\"a\": 2}, {}", 3, Elements::part()).unwrap();
        assert_eq!(part.len(), 2);
    }

    #[test]
    fn what_is_no_array_is_refused() {
        for (text, fault) in [
            ("[{}", "line 1: the file ends before the array does"),
            ("[{},]", "expected an element after the comma"),
            ("[,{}]", "expected an element, found a comma"),
            ("[{}\n{}]", "line 2: expected a comma or ]"),
            ("[{}]\n{}", "line 2: there is more text after the end"),
            ("[{\"a\": \"]", "ends before the array"),
        ] {
            for piece in 1..=text.len() {
                let error = records(text.as_bytes(), piece, Elements::whole()).unwrap_err();
                assert!(error.contains(fault), "{text}: {error}");
            }
        }
    }
}
