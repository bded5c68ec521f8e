//! Which columns make which record: the layouts that [`super::schema`] names, a file for each kind of record.

mod answered;
mod demonstrations;
mod prompts;
mod rankings;
mod texts;

pub(super) use answered::answered;
pub(super) use demonstrations::demonstrations;
pub(super) use prompts::{prompts, prompts_with_columns};
pub(super) use rankings::rankings;

/// The columns that a layout of demonstrations may use.
pub(super) const DEMONSTRATION_COLUMNS: &[&str] = &[
    "prompt",
    "completion",
    "response",
    "messages",
    "conversations",
    "instruction",
    "input",
    "context",
    "output",
    "text",
    "history",
    "system",
    "tools",
    "chat_template_kwargs",
    "label",
    "labels",
    "kto_tag",
];
/// The columns that a layout of rankings may use.
pub(super) const RANKING_COLUMNS: &[&str] = &[
    "prompt",
    "responses",
    "ranks",
    "scores",
    "chosen",
    "rejected",
    "margin",
    "weight",
    "agreement",
    "system",
    "tools",
    "chat_template_kwargs",
];
/// The columns that a layout of prompts may use.
pub(super) const PROMPT_COLUMNS: &[&str] = &[
    "prompt",
    "messages",
    "conversations",
    "instruction",
    "input",
    "context",
    "history",
    "system",
    "tools",
    "chat_template_kwargs",
];
