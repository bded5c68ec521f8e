//! Sample answers of a rollout, for people: as text and as Parquet.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray};

use super::rollout::{Episode, Group};
use crate::data::parquet;
use crate::data::schema::{Message, Text};
use crate::data::text_column::{TextForm, batch_of, named};
use crate::error::{Error, Result};
use crate::files::write_atomically;

/// Writes the first answer to each of the first `count` prompts as `update-000010.txt` and `update-000010.parquet` (columns prompt, response, ended,
/// reward, score, value, kl, tokens) into `folder`; `value` is the value model's expectation before the first token.
pub fn write(folder: &Path, update: usize, groups: &[Group], count: usize) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let chosen = &groups[..count.min(groups.len())];
    let mut text = String::new();
    for group in chosen {
        let Episode { ended, reward, score, .. } = &group.episodes[0];
        let value = group.episodes[0].values.first().map_or_else(String::new, |value| format!("  value {value:.3}"));
        let end = if *ended { "" } else { "  (does not end by itself)" };
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "{}\n>>> {}\nreward {reward:.3}  score {score:.3}{value}  kl {:.3}{end}\n\n{}\n\n",
            shown(&group.prompt.prompt),
            group.replies[0].text,
            group.episodes[0].kl(),
            "-".repeat(80)
        );
    }
    let name = format!("update-{update:06}");
    write_atomically(folder.join(format!("{name}.txt")), |file| std::io::Write::write_all(file, text.as_bytes()))?;
    parquet::write(folder.join(format!("{name}.parquet")), &table(chosen)?)
}

fn shown(prompt: &Text) -> String {
    let turn = |message: &Message| format!("{}: {}", message.role(), message.content());
    match prompt {
        Text::Plain(text) => text.clone(),
        Text::Messages(messages) => messages.iter().map(turn).collect::<Vec<_>>().join("\n"),
    }
}

fn table(groups: &[Group]) -> Result<RecordBatch> {
    let first = |of: &dyn Fn(&Episode) -> Option<f64>| -> ArrayRef {
        Arc::new(groups.iter().map(|group| of(&group.episodes[0])).collect::<Float64Array>())
    };
    let texts: Vec<&Text> = groups.iter().map(|group| &group.prompt.prompt).collect();
    let form = TextForm::of(texts.iter().copied());
    let mut columns = match form.column("prompt", &texts) {
        Some(prompts) => [vec![prompts], form.input_columns(&texts)].concat(),
        // Prompts of several files may differ in form: then all are written as text.
        None => vec![named("prompt", Arc::new(StringArray::from_iter_values(texts.iter().map(|text| shown(text)))))],
    };
    let others: Vec<(&str, ArrayRef)> = vec![
        ("response", Arc::new(StringArray::from_iter_values(groups.iter().map(|group| &group.replies[0].text)))),
        ("ended", Arc::new(groups.iter().map(|group| Some(group.episodes[0].ended)).collect::<BooleanArray>())),
        ("reward", first(&|episode| Some(f64::from(episode.reward)))),
        ("score", first(&|episode| Some(f64::from(episode.score)))),
        ("value", first(&|episode| episode.values.first().map(|&value| f64::from(value)))),
        ("kl", first(&|episode| Some(episode.kl()))),
        ("tokens", Arc::new(groups.iter().map(|group| Some(group.episodes[0].len() as i64)).collect::<Int64Array>())),
    ];
    columns.extend(others.into_iter().map(|(name, column)| named(name, column)));
    batch_of(columns)
}
