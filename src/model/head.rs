//! The scalar head of reward and value models.

use std::path::Path;

use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::{ops, random};

/// `r = w · h - shift`: one number a hidden state.
#[derive(Debug, Clone)]
pub struct ScalarHead {
    /// `[1, d_model]`.
    pub weight: Tensor,
    /// Present where the head trains.
    pub variable: Option<Var>,
    /// Subtracted from every score, so that demonstrations have mean 0.
    pub shift: f32,
}

const FILE: &str = "reward.json";

/// What lies beside the weights of a model with a scalar head.
#[derive(Serialize, Deserialize)]
struct HeadFile {
    /// See [`ScalarHead::shift`].
    shift: f32,
}

impl ScalarHead {
    /// A frozen head.
    pub fn new(weight: Tensor, shift: f32) -> Self {
        ScalarHead { weight, variable: None, shift }
    }

    /// A new head, normal with standard deviation `1 / sqrt(d_model + 1)` (Stiennon et al. 2020).
    pub fn random(d_model: usize, seed: u64, device: &Device) -> Result<Self> {
        let deviation = 1.0 / (d_model as f64 + 1.0).sqrt();
        let mut stream = random::stream(seed, "initialize score.weight", 0);
        Ok(Self::new(random::normal(&mut stream, &[1, d_model], deviation, device)?, 0.0))
    }

    /// A copy that trains.
    pub fn trainable(&self) -> Result<Self> {
        let variable = Var::from_tensor(&self.weight)?;
        Ok(ScalarHead { weight: variable.as_tensor().clone(), variable: Some(variable), shift: self.shift })
    }

    /// The same storage seen as frozen.
    pub fn frozen(&self) -> Self {
        Self::new(self.weight.detach(), self.shift)
    }

    /// The scores `[rows]` of hidden states `[rows, d_model]`.
    pub fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        let scores = ops::linear(hidden, &self.weight, None)?.squeeze(1)?; // [rows]
        Ok(if self.shift == 0.0 { scores } else { (scores - f64::from(self.shift))? })
    }

    /// The shift saved in a model's folder; 0 in folders made by other tools.
    pub fn read_shift(folder: &Path) -> Result<f32> {
        let path = folder.join(FILE);
        if !path.is_file() {
            return Ok(0.0);
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        match serde_json::from_str::<HeadFile>(&text) {
            Ok(HeadFile { shift }) if shift.is_finite() => Ok(shift),
            Ok(_) => Err(Error::input(format!("{}: \"shift\" is not a finite number", path.display()))),
            Err(error) => Err(Error::input(format!("{}: expected {{\"shift\": number}}: {error}", path.display()))),
        }
    }

    /// Saves the shift into a model's folder.
    pub fn write_shift(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let json = serde_json::to_string_pretty(&HeadFile { shift: self.shift }).expect("a number is valid JSON");
        std::fs::write(&path, json + "\n").map_err(Error::io(&path))
    }
}
