//! The moving average of a model's trained weights (Ouyang et al. 2022, appendix C.4).

use candle_core::{Tensor, Var};
use rayon::prelude::*;

use super::state::{StateReader, StateWriter};
use crate::error::Result;
use crate::ops::move_averages;

/// What its tensors' names begin with in a state.
const SCOPE: &str = "moving average";

/// `a ← decay a + (1 - decay) w` after each update, for every trained weight `w`; it starts as the weights.
pub struct MovingAverage {
    decay: f64,
    averages: Vec<Tensor>,
}

impl MovingAverage {
    /// The average of these variables, which have to be given in the same order ever after.
    pub fn new<'a>(variables: impl Iterator<Item = &'a Var>, decay: f64) -> Result<Self> {
        let averages = variables.map(|variable| variable.as_tensor().detach().copy()).collect::<Result<_, _>>()?;
        Ok(MovingAverage { decay, averages })
    }

    /// Adds it to a state.
    pub fn add_to(&self, state: &mut StateWriter) {
        for (index, average) in self.averages.iter().enumerate() {
            state.tensor(format!("{SCOPE}/{index}"), average);
        }
    }

    /// Takes it back.
    pub fn take_from(&mut self, state: &mut StateReader) -> Result<()> {
        for (index, average) in self.averages.iter_mut().enumerate() {
            let values = state.numbers(&format!("{SCOPE}/{index}"), average.dims())?;
            *average = Tensor::from_vec(values, average.shape(), average.device())?;
        }
        Ok(())
    }

    /// Takes in the weights as they are now.
    pub fn update<'a>(&mut self, variables: impl Iterator<Item = &'a Var>) -> Result<()> {
        move_averages(self.averages.iter_mut().zip(variables), self.decay)
    }

    /// Puts the average into the variables, and what was in them aside; a second call undoes the first.
    pub fn swap<'a>(&mut self, variables: impl Iterator<Item = &'a Var>) -> Result<()> {
        let pairs: Vec<_> = self.averages.iter_mut().zip(variables).collect();
        pairs.into_par_iter().try_for_each(|(average, variable)| {
            let now = variable.as_tensor().detach().copy()?;
            variable.set(average)?;
            *average = now;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_average_follows_and_swapping_twice_changes_nothing() -> Result<()> {
        let variable = Var::new(&[1f32, 2.0], &Device::Cpu)?;
        let mut average = MovingAverage::new(std::iter::once(&variable), 0.75)?;
        variable.set(&Tensor::new(&[5f32, -2.0], &Device::Cpu)?)?;
        average.update(std::iter::once(&variable))?;
        average.swap(std::iter::once(&variable))?;
        assert_eq!(variable.to_vec1::<f32>()?, [2.0, 1.0]);
        average.swap(std::iter::once(&variable))?;
        assert_eq!(variable.to_vec1::<f32>()?, [5.0, -2.0]);
        Ok(())
    }
}
