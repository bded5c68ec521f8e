//! Signs of trouble: each a measure, a threshold among the settings, and a sentence that says what to try.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::measures::Measures;
use super::settings::WatchSettings;

/// Looks at every update and every evaluation.
pub struct Watch {
    settings: WatchSettings,
    seen: Seen,
}

/// What it remembers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Seen {
    /// The first update, with which later ones are compared.
    first: Option<Measures>,
    /// Updates in a row with a negative divergence.
    negative: usize,
    /// Evaluations in a row in which the score rose and the judge fell.
    diverging: usize,
    /// Score and judge of the evaluation before.
    evaluated: Option<(f64, f64)>,
    /// When each warning was last given.
    given: BTreeMap<String, usize>,
}

/// A sign of trouble: its name, and the sentence that says what to try.
type Sign = (&'static str, String);

/// Updates for which a warning is not repeated.
const SILENCE: usize = 10;
/// Updates that a value model has to learn in before its explained variance is looked at.
const VALUE_UPDATES: usize = 10;

impl Watch {
    /// After what it has seen: by default, nothing.
    pub fn new(settings: &WatchSettings, seen: Seen) -> Self {
        Watch { settings: settings.clone(), seen }
    }

    /// What it remembers.
    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    /// The warnings that an update gives cause for, those given lately left out.
    pub fn update(&mut self, step: usize, now: &Measures) -> Vec<String> {
        let first = *self.seen.first.get_or_insert(*now);
        self.seen.negative = if now.kl < 0.0 { self.seen.negative + 1 } else { 0 };
        let mut found = self.signs_of_the_policy(now, &first);
        found.extend(self.signs_of_the_values(step, now));
        found.extend(self.signs_of_the_answers(now, &first));
        found.into_iter().filter_map(|(what, sentence)| self.once(step, what, sentence)).collect()
    }

    /// What divergence and entropy say.
    fn signs_of_the_policy(&self, now: &Measures, first: &Measures) -> Vec<Sign> {
        let limits = &self.settings;
        let mut found = Vec::new();
        if now.kl > limits.watch_kl {
            found.push(("kl", format!(
                "an answer is {:.1} nats from the reference (--watch-kl {}): raise --kl-coefficient, try --kl-controller adaptive, or lower the learning rate",
                now.kl, limits.watch_kl
            )));
        }
        if self.seen.negative >= limits.watch_negative_kl {
            found.push(("negative kl", format!(
                "the divergence has been negative for {} updates (--watch-negative-kl {}), which sampling from the policy itself cannot keep up: leave \
                 --top-k and --top-p at their defaults, or try --kl-estimator k3",
                self.seen.negative, limits.watch_negative_kl
            )));
        }
        if now.entropy < limits.watch_entropy * first.entropy {
            found.push(("entropy", format!(
                "the policy's entropy fell from {:.3} to {:.3} nats (--watch-entropy {}): it says nearly always the same; lower the learning rate or \
                 --ppo-epochs, raise --kl-coefficient, or set --entropy-coefficient",
                first.entropy, now.entropy, limits.watch_entropy
            )));
        }
        found
    }

    /// What the value model's fit says.
    fn signs_of_the_values(&self, step: usize, now: &Measures) -> Vec<Sign> {
        let limits = &self.settings;
        let mut found = Vec::new();
        if let Some(explained) = now.explained_variance
            && step >= VALUE_UPDATES
            && explained < limits.watch_explained_variance
        {
            found.push(("explained variance", format!(
                "the value model explains {:.0}% of the returns' variance (--watch-explained-variance {}), less than a constant: raise \
                 --value-learning-rate, or give it --critic-warmup",
                100.0 * explained, limits.watch_explained_variance
            )));
        }
        found
    }

    /// What the answers look like.
    fn signs_of_the_answers(&self, now: &Measures, first: &Measures) -> Vec<Sign> {
        let limits = &self.settings;
        let mut found = Vec::new();
        if now.no_eos > limits.watch_no_eos {
            found.push(("no end", format!(
                "{:.0}% of the answers do not end by themselves (--watch-no-eos {}): raise --missing-eos-penalty or --response-length",
                100.0 * now.no_eos, limits.watch_no_eos
            )));
        }
        if now.length > limits.watch_length * first.length || now.length * limits.watch_length < first.length {
            found.push(("length", format!(
                "answers went from {:.1} to {:.1} tokens (--watch-length {}): see whether the reward likes length, as the report of `reward` says",
                first.length, now.length, limits.watch_length
            )));
        }
        if now.without_spread == Some(1.0) {
            let sentence = "the answers to each prompt have one and the same reward (frac_reward_zero_std 1), so nothing can be learned from it: raise \
                            --temperature or --answers, or take a reward that tells answers apart";
            found.push(("spread", sentence.to_string()));
        }
        if now.truncated > 0 {
            found.push(("cut", format!(
                "{} texts have been too long for a reward model and lost a part before it read them: raise --max-length as far as the model goes, or lower --response-length",
                now.truncated
            )));
        }
        if now.repeated > first.repeated + limits.watch_repeated {
            found.push(("repeated", format!(
                "{:.0}% of the answers are said to several prompts of a rollout, {:.0}% at the start (--watch-repeated {}): the policy collapses onto a few; raise \
                 --kl-coefficient or lower the learning rate",
                100.0 * now.repeated, 100.0 * first.repeated, limits.watch_repeated
            )));
        }
        found
    }

    /// The warning that an evaluation gives cause for.
    pub fn evaluation(&mut self, step: usize, score: f64, judge: f64) -> Option<String> {
        let diverges = self.seen.evaluated.is_some_and(|(before, judged)| score > before && judge < judged);
        self.seen.diverging = if diverges { self.seen.diverging + 1 } else { 0 };
        self.seen.evaluated = Some((score, judge));
        if self.seen.diverging < self.settings.watch_hacking {
            return None;
        }
        let sentence = format!(
            "the score has risen and the held-out judge fallen in {} evaluations in a row (--watch-hacking {}): the policy exploits the reward; stop here, as the \
             best policy by the judge is kept, raise --kl-coefficient, or combine several reward models",
            self.seen.diverging, self.settings.watch_hacking
        );
        self.once(step, "hacking", sentence)
    }

    fn once(&mut self, step: usize, what: &'static str, sentence: String) -> Option<String> {
        let silent = self.seen.given.get(what).is_some_and(|&given| step < given + SILENCE);
        if silent {
            return None;
        }
        self.seen.given.insert(what.to_string(), step);
        Some(format!("warning: update {}: {sentence}", step + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ppo::settings::PpoSettings;
    use crate::settings::from_arguments;

    const GOOD: Measures = Measures {
        episodes: 32,
        kl: 1.0,
        score: 0.0,
        entropy: 1.0,
        explained_variance: Some(0.5),
        no_eos: 0.1,
        length: 20.0,
        truncated: 0,
        repeated: 0.2,
        without_spread: Some(0.5),
    };

    fn watch() -> Watch {
        let arguments = ["--model", "m", "--reward-model", "r", "--data", "d", "--output", "o"];
        Watch::new(&from_arguments::<PpoSettings>(arguments).unwrap().watch, Seen::default())
    }

    #[test]
    fn each_sign_of_trouble_has_its_warning_and_a_good_run_none() {
        let mut quiet = watch();
        assert!((0..50).all(|step| quiet.update(step, &GOOD).is_empty()));
        let cases = [
            (Measures { kl: 51.0, ..GOOD }, "--watch-kl"),
            (Measures { kl: -0.1, ..GOOD }, "--watch-negative-kl"),
            (Measures { entropy: 0.09, ..GOOD }, "--watch-entropy"),
            (Measures { explained_variance: Some(-0.1), ..GOOD }, "--watch-explained-variance"),
            (Measures { no_eos: 0.6, ..GOOD }, "--watch-no-eos"),
            (Measures { length: 41.0, ..GOOD }, "--watch-length"),
            (Measures { length: 9.0, ..GOOD }, "--watch-length"),
            (Measures { repeated: 0.6, ..GOOD }, "--watch-repeated"),
            (Measures { truncated: 3, ..GOOD }, "--max-length"),
            (Measures { without_spread: Some(1.0), ..GOOD }, "one and the same reward"),
        ];
        for (bad, name) in cases {
            let mut watch = watch();
            (0..10).for_each(|step| assert!(watch.update(step, &GOOD).is_empty()));
            let said: Vec<String> = (10..16).flat_map(|step| watch.update(step, &bad)).collect();
            assert!(said.len() == 1 && said[0].contains(name), "{name}: {said:?}");
        }
    }

    #[test]
    fn a_warning_is_repeated_after_a_while() {
        let mut watch = watch();
        let said = (0..25).filter(|&step| !watch.update(step, &Measures { kl: 60.0, ..GOOD }).is_empty());
        assert_eq!(said.collect::<Vec<_>>(), [0, 10, 20]);
    }

    #[test]
    fn a_score_that_rises_while_the_judge_falls_is_told() {
        let mut watch = watch();
        assert_eq!(watch.evaluation(5, 0.0, 1.0), None);
        assert_eq!(watch.evaluation(10, 0.5, 0.9), None);
        assert!(watch.evaluation(15, 0.6, 0.8).unwrap().contains("exploits the reward"));
        assert_eq!(watch.evaluation(30, 0.7, 0.9), None);
    }
}
