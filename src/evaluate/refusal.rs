//! Whether an answer answers: silence and refusals hallucinate nothing, so a rate of hallucination means little without them.
//!
//! The embedded world's rule knows its one refusal. In other texts a small list of English phrases stands in for a person's judgement, here and nowhere else: a text is a
//! refusal if its first sentence declines ("I'm sorry, but I can't help with that"), says that the answer is not known ("I don't know"), or says that the source does not hold it
//! ("The passage does not mention it", "Not in background"). Sentences that only apologise do not count as the first. What asks back, hedges and then answers, or refuses in other words is no refusal by it.
//!
//! Read by eye, about nine in ten of the 77 refusals that its first version found among 3748 answers of HH-RLHF (Bai et al. 2022) are refusals, and one in ten goes on to an answer; of InstructGPT's 1032 answers
//! to questions of SQuAD v2 (Ouyang et al. 2022) it finds the 154 that say "Not in background", and no other.

/// The definition's version.
pub const VERSION: &str = "refusals by English phrases in the first sentence, 2";

/// What may stand before a refusal.
const BEFORE: [&str; 22] = [
    "actually",
    "and",
    "as a language model",
    "as an ai",
    "as an ai language model",
    "but",
    "hmm",
    "honestly",
    "i am afraid",
    "i am afraid that",
    "i am so sorry",
    "i am sorry",
    "i am very sorry",
    "i apologize",
    "my apologies",
    "no",
    "oh",
    "ok",
    "sorry",
    "to be honest",
    "unfortunately",
    "well",
];

/// Sentences after which a refusal may yet come.
const APOLOGIES: [&str; 7] =
    ["i am so sorry", "i am sorry", "i am very sorry", "i apologize", "my apologies", "sorry", "unfortunately"];

/// What declines, where a word of [`ANSWERING`] follows soon.
const DECLINING: [&str; 17] = [
    "i am not able to",
    "i am not allowed to",
    "i am not comfortable",
    "i am not going to",
    "i am not permitted to",
    "i am not programmed to",
    "i am unable to",
    "i can not",
    "i do not feel comfortable",
    "i do not think i can",
    "i do not think i should",
    "i do not want to",
    "i must decline to",
    "i refuse to",
    "i will not",
    "i would prefer not to",
    "i would rather not",
];

/// What is declined.
const ANSWERING: [&str; 20] = [
    "advise",
    "advising",
    "answer",
    "answering",
    "assist",
    "assisting",
    "comply",
    "discuss",
    "discussing",
    "do",
    "give",
    "giving",
    "help",
    "helping",
    "provide",
    "providing",
    "share",
    "sharing",
    "tell",
    "telling",
];

/// Words within which it has to follow: "I can't really help you".
const SOON: usize = 3;

/// What begins a refusal, whatever follows.
const OPENINGS: [&str; 7] = [
    "i do not have access",
    "i do not have any information",
    "i do not have enough information",
    "i do not have that information",
    "i have no data",
    "i have no information",
    "i have no knowledge",
];

/// What begins a refusal that says hardly anything else: a longer sentence goes on to an answer.
const SHORT_OPENINGS: [&str; 2] = ["i do not know", "i have no idea"];

/// Words of the longest sentence with such an opening.
const SHORT: usize = 8;

/// Sentences that are refusals by themselves.
const WHOLE: [&str; 7] = ["i am not sure", "i can not", "i will not", "n a", "no answer", "unanswerable", "unknown"];

/// What a refusal says anywhere.
const ANYWHERE: [&str; 5] = [
    "can not be answered",
    "can not be determined",
    "insufficient information",
    "no mention of",
    "not enough information",
];

/// What an answer may call its source.
const SOURCES: [&str; 9] =
    ["article", "background", "context", "document", "paragraph", "passage", "source", "story", "text"];

/// What a source does not do that holds no answer.
const SAYING: [&str; 10] =
    ["contain", "discuss", "give", "include", "indicate", "mention", "provide", "say", "specify", "state"];

/// Whether a text is empty but for white space.
pub fn is_empty(text: &str) -> bool {
    text.trim().is_empty()
}

/// Whether a text refuses to answer or says that it does not know.
pub fn is_refusal(text: &str) -> bool {
    let mut sentences = text.split(['.', '?', '!', '\n']).map(normalized).filter(|sentence| !sentence.is_empty());
    let Some(sentence) = sentences.find(|sentence| !APOLOGIES.contains(&&**sentence)) else { return false };
    let rest = without_beginnings(&sentence);
    let after = |opening: &str| {
        let after = rest.strip_prefix(opening)?;
        (after.is_empty() || after.starts_with(' ')).then_some(after)
    };
    let declines = || {
        let follows = |after: &str| after.split_whitespace().take(SOON).any(|word| ANSWERING.contains(&word));
        DECLINING.iter().filter_map(|opening| after(opening)).any(follows)
    };
    let is_short = || {
        let words: Vec<&str> = rest.split_whitespace().collect();
        words.len() <= SHORT && !words.contains(&"but") && SHORT_OPENINGS.iter().any(|opening| after(opening).is_some())
    };
    declines()
        || is_short()
        || WHOLE.contains(&rest)
        || WHOLE.contains(&&*sentence)
        || OPENINGS.iter().any(|opening| after(opening).is_some())
        || is_about_the_source(&sentence)
}

/// Whether a sentence says that the source does not hold the answer.
fn is_about_the_source(sentence: &str) -> bool {
    let padded = format!(" {sentence} ");
    let holds = |phrase: &str| padded.contains(&format!(" {phrase} "));
    let is_silent = |source: &str| {
        let does_not = |verb: &str| {
            ["does not", "did not", "does not explicitly"].iter().any(|not| holds(&format!("{source} {not} {verb}")))
        };
        let is_not_in = || {
            let how = ["", "found ", "given ", "mentioned ", "provided ", "specified ", "stated "];
            how.iter().any(|how| ["", "the "].iter().any(|the| holds(&format!("not {how}in {the}{source}"))))
        };
        SAYING.iter().any(|verb| does_not(verb)) || is_not_in()
    };
    ANYWHERE.iter().any(|phrase| holds(phrase)) || SOURCES.iter().any(|source| is_silent(source))
}

/// Words in lower case with single spaces, contractions in full.
fn normalized(sentence: &str) -> String {
    let mut text = sentence.to_lowercase().replace('’', "'");
    for (short, long) in [
        ("cannot", "can not"),
        ("can't", "can not"),
        ("won't", "will not"),
        ("n't", " not"),
        ("i'm", "i am"),
        ("i'd", "i would"),
        ("i'll", "i will"),
    ] {
        text = text.replace(short, long);
    }
    let words = text.split(|character: char| !character.is_alphanumeric() && character != '\'');
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// A sentence without what may stand before a refusal.
fn without_beginnings(sentence: &str) -> &str {
    let mut rest = sentence;
    while let Some(shorter) =
        BEFORE.iter().filter_map(|before| rest.strip_prefix(before)?.strip_prefix(' ')).min_by_key(|rest| rest.len())
    {
        rest = shorter;
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_declines_does_not_know_or_finds_nothing_is_a_refusal() {
        for text in [
            "I’m sorry, but I can’t help you with that question.",
            " Sorry, I'm not allowed to answer that, I don't have enough information.",
            "I can't really help you if you're trying to work around a law.",
            "Unfortunately, I am unable to do this. Are you a lawyer?",
            "I don't know.",
            "I'm afraid I don't know",
            "I have no idea!",
            "I have no information about that address.",
            "Not in background.",
            "not in background",
            "That is not mentioned in the passage.",
            "The passage does not say.",
            "The article doesn't explicitly mention her age.",
            "It cannot be determined.",
            "I'm not sure. What have you been putting in it lately?",
            "As an AI language model, I cannot provide medical advice.",
            "I'm sorry. I can't help with that.",
            "Sorry! I cannot answer that.",
            "No answer.",
            "Unanswerable.",
            "N/A",
            "Unknown",
        ] {
            assert!(is_refusal(text), "{text}");
        }
    }

    #[test]
    fn what_answers_hedges_or_asks_back_is_none() {
        for text in [
            "",
            "Not much. The",
            "As an AI, I have no body.",
            "As an AI language model, I can tell you the capital is Paris.",
            "Unanswerable questions fascinate me.",
            "Sorry.",
            "the UK did not adopt the main legislation",
            "I don't know, drugs are a social and legal construct, and not a thing.",
            "I don't know how to do that, but I can help you look for information.",
            "I'm not sure what you mean by that.",
            "I'm sorry. I've never seen these words.",
            "I can't say for sure, and think the answer is no.",
            "I can't believe it!",
            "Unknown to most, he was born in Paris.",
            "Nobody knows. I don't know either.",
            "The text messages did not give him away.",
            "Information is not in short supply.",
        ] {
            assert!(!is_refusal(text), "{text}");
        }
    }

    #[test]
    fn only_white_space_is_empty() {
        assert!(is_empty("") && is_empty(" \n\t") && !is_empty(" ."));
    }
}
