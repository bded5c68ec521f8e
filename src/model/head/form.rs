//! What a head reads and what its numbers mean, and the file that says so.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::limits;
use crate::model::architecture::Pooling;

const FILE: &str = "head.json";

/// What a head reads and what it says; saved as `head.json` beside the weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Form {
    /// Which hidden state stands for a sequence.
    pub pooling: Pooling,
    /// What the labels are called; empty for a reward.
    #[serde(default)]
    pub labels: Vec<String>,
    /// Subtracted from every score, so that demonstrations have mean 0.
    #[serde(default)]
    pub shift: f32,
    /// Every score is divided by it after that, so that demonstrations have variance 1.
    #[serde(default = "one")]
    pub divisor: f32,
    /// A head at the last token is read at the last one that is not this: the rule of `transformers` for
    /// classifiers that it saved, whose padding this is. Heads of our own are read at the last token,
    /// whatever it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pad_token_id: Option<u32>,
    /// Whether the answers that it was trained on ended with the end-of-text token, so that it is to be read
    /// there; none where nothing says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers_end_with_eos: Option<bool>,
}

impl Form {
    /// That of a head of which nothing more is known.
    pub(super) fn new(pooling: Pooling, labels: Vec<String>) -> Self {
        Form { pooling, labels, shift: 0.0, divisor: 1.0, pad_token_id: None, answers_end_with_eos: None }
    }
}

fn one() -> f32 {
    1.0
}

impl Form {
    /// What a model's folder says of its head; `None` in folders made by other tools.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let text = limits::read_text(&path, limits::SMALL_FILE)?;
        match serde_json::from_str::<Form>(&text) {
            Ok(form) if form.shift.is_finite() && form.divisor.is_finite() && form.divisor > 0.0 => Ok(Some(form)),
            Ok(form) => Err(Error::input(format!(
                "{}: \"shift\" is {} and \"divisor\" {}; expected finite numbers, the second above 0",
                path.display(),
                form.shift,
                form.divisor
            ))),
            Err(error) => Err(Error::input(format!("{}: not the description of a head: {error}", path.display()))),
        }
    }

    /// Saves it into a model's folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let json = serde_json::to_string_pretty(self).expect("plain data is valid JSON");
        std::fs::write(&path, json + "\n").map_err(Error::io(&path))
    }
}
