//! The learning rate at a step: warm-up, then constant, linear or cosine.
//!
//! The formulas are those of `get_constant_schedule_with_warmup`, `get_linear_schedule_with_warmup` and
//! `get_cosine_with_min_lr_schedule_with_warmup` in transformers; the linear schedule also ends at the minimum here.

use crate::settings::{OptimizerSettings, ScheduleShape};

/// A learning rate as a function of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The course after the warm-up.
    pub shape: ScheduleShape,
    /// The highest learning rate, reached at the end of the warm-up.
    pub peak: f64,
    /// Where a cosine or linear schedule ends, as a share of the peak.
    pub minimum_ratio: f64,
    /// The number of steps in which the rate rises linearly to the peak.
    pub warmup_steps: usize,
    /// Where it begins to rise, as a share of the peak.
    pub start_ratio: f64,
    /// The number of steps of the whole run; later steps keep the minimum.
    pub total_steps: usize,
}

impl Schedule {
    /// The schedule that the settings describe, with this peak, over `total_steps` steps.
    pub fn new(settings: &OptimizerSettings, peak: f64, total_steps: usize) -> Self {
        let by_ratio = (settings.warmup_ratio * total_steps as f64).ceil() as usize;
        Schedule {
            shape: settings.schedule,
            peak,
            minimum_ratio: settings.minimum_learning_rate_ratio,
            warmup_steps: settings.warmup_steps.unwrap_or(by_ratio),
            start_ratio: settings.warmup_start_ratio,
            total_steps,
        }
    }

    /// The learning rate of optimizer step `step`, the first being 0.
    ///
    /// In the warm-up it is `peak * (s + (1 - s) * step / warmup_steps)` with `s` the start ratio. After it, with `progress` the share done of the remaining steps and
    /// `m` the minimum ratio: `peak * ((1 - m) * (1 + cos(pi * progress)) / 2 + m)` (cosine),
    /// `peak * ((1 - m) * (1 - progress) + m)` (linear).
    pub fn learning_rate(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            let risen = step as f64 / self.warmup_steps as f64;
            return self.peak * (self.start_ratio + (1.0 - self.start_ratio) * risen);
        }
        let remaining_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / remaining_steps as f64).min(1.0);
        let share = match self.shape {
            ScheduleShape::Constant => return self.peak,
            ScheduleShape::Linear => 1.0 - progress,
            ScheduleShape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.peak * ((1.0 - self.minimum_ratio) * share + self.minimum_ratio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(shape: ScheduleShape, minimum_ratio: f64, steps: &[usize]) -> Vec<f64> {
        let schedule = Schedule { shape, peak: 2.0, minimum_ratio, warmup_steps: 4, start_ratio: 0.0, total_steps: 12 };
        steps.iter().map(|&step| schedule.learning_rate(step)).collect()
    }

    #[test]
    fn warm_up_rises_in_equal_steps_from_zero_to_the_peak() {
        for shape in [ScheduleShape::Constant, ScheduleShape::Linear, ScheduleShape::Cosine] {
            assert_eq!(rates(shape, 0.1, &[0, 1, 2, 3, 4]), [0.0, 0.5, 1.0, 1.5, 2.0]);
        }
    }

    #[test]
    fn each_shape_takes_its_closed_values() {
        assert_eq!(rates(ScheduleShape::Constant, 0.5, &[6, 12, 99]), [2.0, 2.0, 2.0]);
        assert_eq!(rates(ScheduleShape::Linear, 0.0, &[6, 8, 12, 99]), [1.5, 1.0, 0.0, 0.0]);
        assert_eq!(rates(ScheduleShape::Linear, 0.5, &[6, 8, 12, 99]), [1.75, 1.5, 1.0, 1.0]);
        // cos(pi/4) = sqrt(1/2), cos(pi/2) = 0, cos(pi) = -1
        let half = 0.5f64.sqrt();
        let expected = [0.9 * (1.0 + half) + 0.2, 1.1, 0.2, 0.2];
        for (rate, expected) in rates(ScheduleShape::Cosine, 0.1, &[6, 8, 12, 99]).iter().zip(expected) {
            assert!((rate - expected).abs() < 1e-12, "{rate} is not {expected}");
        }
    }

    #[test]
    fn a_run_without_warm_up_starts_at_the_peak_even_if_it_has_no_steps() {
        for total_steps in [0, 1, 5] {
            let schedule = Schedule {
                shape: ScheduleShape::Cosine,
                peak: 3.0,
                minimum_ratio: 0.0,
                warmup_steps: 0,
                start_ratio: 0.0,
                total_steps,
            };
            assert_eq!(schedule.learning_rate(0), 3.0);
        }
    }

    #[test]
    fn a_warm_up_may_begin_above_zero() {
        let shape = ScheduleShape::Constant;
        let schedule =
            Schedule { shape, peak: 2.0, minimum_ratio: 0.0, warmup_steps: 4, start_ratio: 0.1, total_steps: 12 };
        let rates: Vec<f64> = (0..6).map(|step| schedule.learning_rate(step)).collect();
        for (rate, expected) in rates.iter().zip([0.2, 0.65, 1.1, 1.55, 2.0, 2.0]) {
            assert!((rate - expected).abs() < 1e-12, "{rate} is not {expected}");
        }
    }
}
