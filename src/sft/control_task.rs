//! Hewitt & Liang's (2019) control task: how much of a probe's accuracy is the probe's own.
//!
//! Each word type is given a class at random, in the proportion of the real classes, and a text gets that of its first word. A probe that can learn these by heart
//! would find any labels; **selectivity** is the accuracy on the real classes less that on the control task, both on texts that the probe
//! has not seen, whose first words it may have.

use std::collections::HashMap;

use rand::Rng;

use super::classification::{LabelledText, accumulate_pooled, features, log_softmax};
use super::confusion::Predictions;
use super::{LEARNING_RATE, SftSettings};
use crate::error::Result;
use crate::model::Model;
use crate::random;
use crate::train::optimizer::Optimizer;
use crate::train::order::Order;
use crate::train::schedule::Schedule;

/// How a probe did on the control task.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ControlTask {
    /// Accuracy on the evaluation texts.
    pub accuracy: f64,
    /// Share of the most common control label.
    pub most_common: f64,
}

/// Trains a new probe of the same form (`model`) on the same hidden states, those of training and evaluation texts, with control labels.
pub(super) fn run(
    settings: &SftSettings,
    model: &Model,
    classes: usize,
    (training, evaluation): (&[&LabelledText], &[&LabelledText]),
) -> Result<ControlTask> {
    let real: Vec<usize> = training.iter().map(|text| text.label).collect();
    let mut types = HashMap::new();
    let mut label = |text: &&LabelledText| control_label(&mut types, &real, text, settings.common.seed);
    let labels: Vec<usize> = training.iter().map(&mut label).collect();
    let expected: Vec<usize> = evaluation.iter().map(&mut label).collect();
    let mut order = Order::new((0..labels.len()).collect(), settings.training.batch_size, settings.common.seed);
    let steps = order.total_steps(settings.examples.epochs as f64, settings.training.max_steps);
    let optimizer_settings = &settings.training.optimizer;
    let schedule = Schedule::new(optimizer_settings, settings.training.learning_rate(LEARNING_RATE), steps);
    let mut optimizer = Optimizer::new(model.trainable_parameters(), optimizer_settings)?;
    for step in 0..steps {
        let chosen = order.step(step);
        let chosen_labels: Vec<usize> = chosen.iter().map(|&index| labels[index]).collect();
        let texts: Vec<&LabelledText> = chosen.iter().map(|&index| training[index]).collect();
        accumulate_pooled(model, &mut optimizer, &features(model, &texts)?, &chosen_labels)?;
        optimizer.step(schedule.learning_rate(step))?;
    }
    let log_probs =
        log_softmax(model.frozen()?.classes_of_pooled(&features(model, evaluation)?)?.tensor())?.to_vec2()?;
    let confusion = Predictions { log_probs, labels: expected }.confusion(classes);
    Ok(ControlTask { accuracy: confusion.accuracy(), most_common: confusion.most_common() })
}

/// The control label of a text: that of its first word, after what the tokenizer puts in front. A word's label is the class of a
/// text drawn at random, so that labels are as common as classes.
fn control_label(types: &mut HashMap<u32, usize>, classes: &[usize], text: &LabelledText, seed: u64) -> usize {
    let tree = &text.tree;
    let tokens = if tree.prompt.is_empty() { &tree.answers[0].tokens } else { &tree.prompt };
    // The first token of every text is the same where it is a special one.
    let word = tokens.get(1).or(tokens.first()).copied().unwrap_or_default();
    *types.entry(word).or_insert_with(|| {
        let mut stream = random::stream(seed, "control task", u64::from(word));
        classes[stream.random_range(0..classes.len())]
    })
}
