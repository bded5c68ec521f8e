//! Examples as the model will see them, for people: one token a line.

use std::fmt::Write;

use super::batch::TokenTree;
use super::tokenize::Tokenizer;
use crate::error::Result;

/// The tokens of a tree, one a line: the segment it stands in (0 is the prompt where there is one, then each answer), its
/// id, whether it carries loss, and its text in quotes with white space escaped.
///
/// A token that is only a part of a character is shown under its name in the vocabulary, after a `~`.
pub fn inspect(tree: &TokenTree, tokenizer: &Tokenizer) -> Result<String> {
    let mut lines = format!(
        "{} prompt tokens shared by {} answer{}, {} tokens in all, {} with loss\nsegment       id  loss  token\n",
        tree.prompt.len(),
        tree.answers.len(),
        if tree.answers.len() == 1 { "" } else { "s" },
        tree.tokens(),
        tree.learned_tokens()
    );
    let prompt = tree.prompt.iter().map(|&id| (0, id, false));
    let first_answer = usize::from(!tree.prompt.is_empty());
    let answers = tree.answers.iter().enumerate().flat_map(|(index, answer)| {
        let tokens = answer.tokens.iter().zip(&answer.learned);
        tokens.map(move |(&id, &learned)| (first_answer + index, id, learned))
    });
    for (segment, id, learned) in prompt.chain(answers) {
        let name = tokenizer.token(id).unwrap_or_default();
        let text = tokenizer.decode(&[id], false)?;
        let shown = if name.starts_with('\u{2581}') {
            // SentencePiece's mark for a space, which decoding drops from the start of a text.
            format!("{:?}", name.replace('\u{2581}', " "))
        } else if text.contains(char::REPLACEMENT_CHARACTER) || text.is_empty() {
            format!("~{name}")
        } else {
            format!("{text:?}")
        };
        let loss = if learned { "yes" } else { "no" };
        // Writing to a string does not fail.
        let _ = writeln!(lines, "{segment:>7} {id:>8}  {loss:<4}  {shown}");
    }
    Ok(lines)
}
