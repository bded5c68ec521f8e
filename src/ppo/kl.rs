//! The divergence from the reference: its estimators (Schulman 2020) and the controller of its weight.

use candle_core::Tensor;

use super::settings::{KlController, KlEstimator, KlSettings};
use crate::error::Result;

/// The estimate at a token, with `d = log π - log π_ref`: `d` (k1), `d² / 2` (k2) or `exp(-d) - 1 + d` (k3), counted from `-clip` to `clip`
/// where `clip` is not 0.
pub fn estimate(log_prob: f32, reference: f32, estimator: KlEstimator, clip: f64) -> f32 {
    let difference = f64::from(log_prob - reference);
    let estimate = match estimator {
        KlEstimator::K1 => difference,
        KlEstimator::K2 => 0.5 * difference * difference,
        KlEstimator::K3 => (-difference).exp() - 1.0 + difference,
    };
    (if clip > 0.0 { estimate.clamp(-clip, clip) } else { estimate }) as f32
}

/// The same for all tokens, `[tokens]`, to be differentiated.
pub fn estimates(log_probs: &Tensor, reference: &Tensor, estimator: KlEstimator, clip: f64) -> Result<Tensor> {
    let difference = (log_probs - reference)?;
    let estimates = match estimator {
        KlEstimator::K1 => difference,
        KlEstimator::K2 => difference.sqr()?.affine(0.5, 0.0)?,
        KlEstimator::K3 => ((difference.neg()?.exp()? - 1.0)? + difference)?,
    };
    Ok(if clip > 0.0 { estimates.clamp(-clip, clip)? } else { estimates })
}

/// The weight of the KL penalty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KlCoefficient {
    value: f64,
    controller: KlController,
    target: f64,
    horizon: f64,
}

impl KlCoefficient {
    /// The weight at the start.
    pub fn new(settings: &KlSettings) -> Self {
        let KlSettings {
            kl_coefficient: value, kl_controller: controller, kl_target: target, kl_horizon: horizon, ..
        } = *settings;
        KlCoefficient { value, controller, target, horizon }
    }

    /// The weight now.
    pub fn value(&self) -> f64 {
        self.value
    }

    /// The same controller where it was.
    pub fn at(self, value: f64) -> Self {
        KlCoefficient { value, ..self }
    }

    /// After a rollout whose answers have this mean divergence: `β ← β (1 + clip(kl / target - 1, ±0.2) episodes / horizon)` where it adapts
    /// (Ziegler et al. 2019, section 2.2).
    pub fn update(&mut self, kl: f64, episodes: usize) {
        if self.controller == KlController::Adaptive {
            let error = (kl / self.target - 1.0).clamp(-0.2, 0.2);
            self.value *= 1.0 + error * episodes as f64 / self.horizon;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_and_tensors_agree_and_k2_and_k3_are_never_negative(log_prob in -6f32..0.0, reference in -6f32..0.0, clip in 0f64..3.0) {
            for estimator in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
                let found = estimate(log_prob, reference, estimator, clip);
                let tensors = [log_prob, reference].map(|x| Tensor::new(&[x], &Device::Cpu).unwrap());
                let tensor = estimates(&tensors[0], &tensors[1], estimator, clip).unwrap().to_vec1::<f32>().unwrap()[0];
                prop_assert!((found - tensor).abs() <= 1e-5 * found.abs().max(1.0));
                prop_assert!(estimator == KlEstimator::K1 || found >= 0.0);
                prop_assert!(clip == 0.0 || f64::from(found.abs()) <= clip + 1e-6);
            }
        }

        #[test]
        fn the_controller_moves_towards_its_target_by_at_most_a_fifth_a_horizon(kl in 0f64..100.0, episodes in 1usize..2000) {
            let mut coefficient =
                KlCoefficient { value: 0.1, controller: KlController::Adaptive, target: 6.0, horizon: 10_000.0 };
            coefficient.update(kl, episodes);
            let error = (kl / 6.0 - 1.0).clamp(-0.2, 0.2);
            prop_assert!((coefficient.value() - 0.1 * (1.0 + error * episodes as f64 / 1e4)).abs() < 1e-12);
            prop_assert_eq!(coefficient.value() > 0.1, kl > 6.0);
            let mut fixed = KlCoefficient { controller: KlController::Fixed, value: 0.1, ..coefficient };
            fixed.update(kl, episodes);
            prop_assert_eq!(fixed.value(), 0.1);
        }
    }
}
