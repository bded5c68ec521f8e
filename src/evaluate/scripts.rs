//! In which scripts texts are written, as far as a measure has to know it: measures made for English say nothing of texts in another one.

/// Whether a character is of a script that puts no space between words: Thai, Lao, Burmese, Khmer, Tibetan, kana, Chinese characters.
pub fn is_unspaced(character: char) -> bool {
    matches!(character,
        '\u{0e00}'..='\u{0eff}' | '\u{0f00}'..='\u{0fff}' | '\u{1000}'..='\u{109f}' | '\u{1780}'..='\u{17ff}' | '\u{19e0}'..='\u{19ff}'
        | '\u{3005}'..='\u{3007}' | '\u{3040}'..='\u{30ff}' | '\u{31f0}'..='\u{31ff}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}'
        | '\u{f900}'..='\u{faff}' | '\u{ff66}'..='\u{ff9f}' | '\u{20000}'..='\u{3ffff}')
}

/// The share of a text's letters and digits for which something holds; none of a text without.
fn share(text: &str, holds: impl Fn(char) -> bool) -> Option<f64> {
    let all = text.chars().filter(|character| character.is_alphanumeric()).count();
    let held = text.chars().filter(|character| character.is_alphanumeric() && holds(*character)).count();
    (all > 0).then(|| held as f64 / all as f64)
}

/// Whether most of a text's letters and digits are of scripts without spaces between words.
pub fn is_mostly_unspaced(text: &str) -> bool {
    share(text, is_unspaced).is_some_and(|share| share > 0.5)
}

/// Whether at least half of a text's letters and digits are of ASCII, so that words of ASCII letters stand for it; so they do for a text without any.
pub fn is_mostly_ascii(text: &str) -> bool {
    share(text, |character| character.is_ascii()).is_none_or(|share| share >= 0.5)
}

/// Whether most of a text's letters are Latin ones, with or without marks; so it is of a text without any.
pub fn is_mostly_latin(text: &str) -> bool {
    let is_latin = |character: char| {
        matches!(character, '\u{00}'..='\u{02af}' | '\u{1e00}'..='\u{1eff}' | '\u{2c60}'..='\u{2c7f}' | '\u{a720}'..='\u{a7ff}'
            | '\u{ff21}'..='\u{ff5a}')
    };
    share(text, is_latin).is_none_or(|share| share >= 0.5)
}

/// Whether most of a text's letters are of a script that has capitals, by which names can be told; so it is of a text without any.
pub fn has_names_by_capitals(text: &str) -> bool {
    share(text, |character| character.is_uppercase() || character.is_lowercase() || character.is_ascii_digit())
        .is_none_or(|share| share >= 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_told_by_most_of_their_letters() {
        for (text, is_ascii, is_latin, is_unspaced, has_capitals) in [
            ("The hen.", true, true, false, true),
            ("naïve façade", true, true, false, true),
            ("Việt Nam đẹp", true, true, false, true),
            ("башня 5", false, false, false, true),
            ("ο πύργος", false, false, false, true),
            ("塔は高い。", false, false, true, false),
            ("หอคอยสูง", false, false, true, false),
            ("البرج عالٍ", false, false, false, false),
            ("टावर ऊँचा है", false, false, false, false),
            ("탑이 높다", false, false, false, false),
            ("", true, true, false, true),
            ("... !", true, true, false, true),
            ("42", true, true, false, true),
        ] {
            let found =
                (is_mostly_ascii(text), is_mostly_latin(text), is_mostly_unspaced(text), has_names_by_capitals(text));
            assert_eq!(found, (is_ascii, is_latin, is_unspaced, has_capitals), "{text}");
        }
    }
}
