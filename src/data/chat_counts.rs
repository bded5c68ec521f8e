//! Counts of what a model does not learn or read of conversations and prompts as the data have them.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use super::record::Message;
use super::template::Rendered;

/// Counts over the records of some data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChatCounts {
    /// Answers in conversations that are to be learned.
    pub answers: usize,
    /// Those of them that are not learned, as they cannot be told apart in what the chat template writes.
    pub not_learned: usize,
    /// Other answers in conversations: those that the data exclude.
    pub excluded: usize,
    /// Answers that are empty, or white space alone.
    pub empty: usize,
    /// Messages of conversations.
    pub messages: usize,
    /// Messages whose content the chat template does not write as it is, by role.
    pub not_written: RoleCounts,
    /// Prompts, where it was asked how they end.
    pub prompts: usize,
    /// Prompts whose tokens alone are not those that prompt and answer together begin with.
    pub split_prompts: usize,
    /// Prompts without answers that end in white space.
    pub spaced_prompts: usize,
}

/// Messages by role.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RoleCounts([usize; 5]);

/// The roles that are counted by themselves; the last stands for all others.
const ROLES: [&str; 5] = ["system", "user", "assistant", "tool", "other roles"];

impl RoleCounts {
    fn add(&mut self, role: &str) {
        let index = ROLES.iter().position(|known| *known == role).unwrap_or(ROLES.len() - 1);
        self.0[index] += 1;
    }

    /// Messages of all roles.
    pub fn total(&self) -> usize {
        self.0.iter().sum()
    }

    fn describe(&self) -> String {
        let counts = ROLES.iter().zip(self.0).filter(|(_, count)| *count > 0);
        counts.map(|(role, count)| format!("{role}: {count}")).collect::<Vec<_>>().join(", ")
    }
}

impl ChatCounts {
    /// Counts what became of a conversation; messages before `first` were counted already.
    pub(super) fn add_rendered(&mut self, messages: &[Message], rendered: &Rendered, first: usize) {
        self.answers += rendered.answers;
        self.not_learned += rendered.not_learned;
        self.excluded += rendered.excluded;
        self.empty += rendered.empty;
        self.add_messages(messages, &rendered.not_written, first);
    }

    /// Counts an answer that is a string.
    pub(super) fn add_string(&mut self, answer: &str) {
        self.empty += usize::from(answer.trim().is_empty());
    }

    /// Counts messages from `first` on, of which those at the indices `not_written` are not written as they are.
    pub(super) fn add_messages(&mut self, messages: &[Message], not_written: &[usize], first: usize) {
        self.messages += messages.len().saturating_sub(first);
        for message in not_written.iter().filter(|&&index| index >= first).filter_map(|&index| messages.get(index)) {
            self.not_written.add(message.role());
        }
    }

    /// What a person should know of these counts before the model reads the data: labels and sentences. `of` is put behind numbers, where they are of a
    /// part of the data.
    pub fn remarks(&self, of: &str) -> Vec<(&'static str, String)> {
        let Self { answers, not_learned, excluded, empty, messages, prompts, split_prompts, spaced_prompts, .. } = self;
        let mut remarks = Vec::new();
        if *not_learned > 0 {
            let text = format!(
                "{not_learned} of {answers} answers{of} are not learned, as they cannot be told apart in what the chat template \
                 writes"
            );
            remarks.push(("answers left out", text));
        }
        if *excluded > 0 {
            let text = format!(
                "{excluded} of {} answers{of} are not learned, as the data exclude them (`weight` 0, or `train` or `loss` false)",
                answers + excluded
            );
            remarks.push(("answers excluded", text));
        }
        if *empty > 0 {
            let count = if *empty == 1 { "one answer".to_owned() } else { format!("{empty} answers") };
            let verb = if *empty == 1 { "is" } else { "are" };
            remarks.push(("empty answers", format!("{count}{of} {verb} empty, or white space alone")));
        }
        if self.not_written.total() > 0 {
            let (count, roles) = (self.not_written.total(), self.not_written.describe());
            let text = format!(
                "the chat template leaves out or changes the content of {count} of {messages} messages{of} ({roles})"
            );
            remarks.push(("content left out", text));
        }
        if *split_prompts > 0 {
            let text = format!(
                "{split_prompts} of {prompts} prompts{of} end inside a token, as with a space at the end: the model reads other \
                 tokens when it is asked; put the space before the answer"
            );
            remarks.push(("prompts split", text));
        }
        if *spaced_prompts > 0 {
            let text = format!(
                "{spaced_prompts} of {prompts} prompts{of} end in white space, which most tokenizers join to the answer's first \
                 word: models seldom see it alone; end prompts without it"
            );
            remarks.push(("white space", text));
        }
        remarks
    }
}

impl AddAssign for ChatCounts {
    fn add_assign(&mut self, other: Self) {
        self.answers += other.answers;
        self.not_learned += other.not_learned;
        self.excluded += other.excluded;
        self.empty += other.empty;
        self.messages += other.messages;
        self.not_written.0.iter_mut().zip(other.not_written.0).for_each(|(count, more)| *count += more);
        self.prompts += other.prompts;
        self.split_prompts += other.split_prompts;
        self.spaced_prompts += other.spaced_prompts;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remarks_are_made_of_what_was_counted_and_of_nothing_else() {
        let mut counts = ChatCounts { answers: 3, messages: 6, prompts: 2, ..Default::default() };
        assert_eq!(counts.remarks(""), []);
        counts.not_learned = 2;
        counts.not_written.add("tool");
        counts.not_written.add("observation");
        counts += counts;
        (counts.excluded, counts.empty) = (3, 1);
        counts += ChatCounts { excluded: 1, ..Default::default() };
        let [(_, answers), (_, excluded), (_, empty), (_, contents)] = &counts.remarks(" of the first 256 rows")[..]
        else {
            panic!()
        };
        assert!(answers.starts_with("4 of 6 answers of the first 256 rows are not learned"), "{answers}");
        assert!(
            excluded.starts_with("4 of 10 answers of the first 256 rows are not learned, as the data"),
            "{excluded}"
        );
        assert_eq!(empty, "one answer of the first 256 rows is empty, or white space alone");
        assert!(contents.ends_with("4 of 12 messages of the first 256 rows (tool: 2, other roles: 2)"), "{contents}");
    }
}
