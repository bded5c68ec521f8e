//! The learning rate at a step: warm-up, then constant, linear or cosine.
//!
//! The formulas are those of `get_constant_schedule_with_warmup`, `get_linear_schedule_with_warmup` and
//! `get_cosine_with_min_lr_schedule_with_warmup` in transformers; the linear schedule also ends at the minimum here.

use std::fmt;

use crate::bail;
use crate::error::Result;
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
    ///
    /// A share of the steps is rounded down: the first step of a warm-up has learning rate 0, so that a run of few steps would learn less, and one
    /// of a single step nothing.
    pub fn new(settings: &OptimizerSettings, peak: f64, total_steps: usize) -> Self {
        // 0.29 · 100 is a little less than 29.
        let by_ratio = (settings.warmup_ratio * total_steps as f64 + 1e-9).floor() as usize;
        Schedule {
            shape: settings.schedule,
            peak,
            minimum_ratio: settings.minimum_learning_rate_ratio,
            warmup_steps: settings.warmup_steps.unwrap_or(by_ratio),
            start_ratio: settings.warmup_start_ratio,
            total_steps,
        }
    }

    /// Refuses a run in which nothing could be learned, and gives a warning of one in which little can be.
    ///
    /// # Errors
    /// Where the learning rate of every step is 0, though the peak is not.
    pub fn check(&self) -> Result<Option<String>> {
        let Schedule { peak, warmup_steps, total_steps, .. } = *self;
        if peak == 0.0 {
            return Ok(Some("the learning rate is 0, so no weight will change".to_string()));
        }
        if (0..total_steps).all(|step| self.learning_rate(step) == 0.0) {
            bail!(
                "the learning rate of every step would be 0: of {total_steps} steps {warmup_steps} are warm-up, which begins at 0; lower --warmup-steps \
                 or --warmup-ratio, or give --warmup-start-ratio"
            );
        }
        let highest = self.learning_rate(total_steps - 1);
        Ok((warmup_steps >= total_steps).then(|| {
            format!(
                "the warm-up is {warmup_steps} steps and the run {total_steps}, so the learning rate rises to {highest:.1e} and never to its peak of \
                 {peak:e}; lower --warmup-steps or --warmup-ratio"
            )
        }))
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

/// In the words of a plan.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Schedule { shape, peak, warmup_steps, minimum_ratio, .. } = *self;
        write!(f, "{peak:e} at its peak, after a warm-up of {warmup_steps} steps, then ")?;
        // A product such as 0.1 · 5e-5 has digits that say nothing.
        let minimum = format!("{:.3e}", peak * minimum_ratio);
        let minimum = minimum.parse().unwrap_or(peak * minimum_ratio);
        match shape {
            ScheduleShape::Constant => write!(f, "constant"),
            ScheduleShape::Linear => write!(f, "linear to {minimum:e}"),
            ScheduleShape::Cosine => write!(f, "cosine to {minimum:e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Flags, Program, TrainingSettings, from_arguments};
    use proptest::prelude::*;

    /// A program that only trains.
    #[derive(Debug, Clone, clap::Parser, serde::Serialize, serde::Deserialize)]
    #[command(name = "tune")]
    struct Tune {
        #[command(flatten)]
        #[serde(flatten)]
        training: TrainingSettings,
    }

    impl Program for Tune {
        fn flags() -> Flags<Self> {
            let training = TrainingSettings::flags().never(&["pooling", "probe_hidden_size"]);
            Flags::new().of(|tune: &Self| &tune.training, training)
        }
    }

    fn schedule(flags: &[&str], peak: f64, total_steps: usize) -> Schedule {
        let settings: Tune = from_arguments(flags.iter().copied()).unwrap();
        Schedule::new(&settings.training.optimizer, peak, total_steps)
    }

    #[test]
    fn a_share_of_the_steps_is_rounded_down() {
        let warmup = |ratio: &str, steps| schedule(&["--warmup-ratio", ratio], 1.0, steps).warmup_steps;
        assert_eq!([1, 33, 34, 66, 67].map(|steps| warmup("0.03", steps)), [0, 0, 1, 1, 2]);
        assert_eq!((warmup("0.29", 100), warmup("0.1", 30), warmup("1", 7)), (29, 3, 7));
    }

    proptest! {
        /// With the defaults every run learns in its first step or, if it has a warm-up, in its second.
        #[test]
        fn with_the_defaults_every_run_has_a_learning_rate(steps in 1usize..10_000) {
            let schedule = schedule(&[], 1.0, steps);
            prop_assert!(schedule.learning_rate(1.min(steps - 1)) > 0.0);
            prop_assert_eq!(schedule.check().unwrap(), None);
        }
    }

    #[test]
    fn a_run_in_which_nothing_could_be_learned_is_refused_and_a_long_warm_up_warned_of() {
        let fault = |flags: &[&str], steps| schedule(flags, 1e-5, steps).check().unwrap_err().to_string();
        for (flags, steps) in
            [(&["--warmup-steps", "1"][..], 1), (&["--warmup-steps", "9"], 1), (&["--warmup-ratio", "1"], 1)]
        {
            assert!(fault(flags, steps).contains("the learning rate of every step would be 0"));
        }
        let check = |flags: &[&str], peak, steps| schedule(flags, peak, steps).check().unwrap();
        let long = check(&["--warmup-steps", "100"], 1e-5, 2).unwrap();
        assert!(long.contains("100 steps and the run 2") && long.contains("rises to 1.0e-7"), "{long}");
        assert!(check(&["--warmup-steps", "2"], 1e-5, 2).is_some());
        assert_eq!(check(&["--warmup-steps", "1"], 1e-5, 2), None);
        assert_eq!(check(&["--warmup-steps", "9", "--warmup-start-ratio", "0.5"], 1e-5, 10), None);
        // A learning rate of 0 that was asked for.
        assert!(check(&[], 0.0, 2).unwrap().contains("no weight will change"));
    }

    #[test]
    fn a_plan_shows_peak_warm_up_and_shape() {
        let shown = |flags: &[&str]| schedule(flags, 5e-5, 100).to_string();
        assert_eq!(shown(&[]), "5e-5 at its peak, after a warm-up of 3 steps, then cosine to 5e-6");
        assert!(shown(&["--schedule", "constant"]).ends_with("then constant"));
    }

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
