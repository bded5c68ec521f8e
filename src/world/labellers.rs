//! Simulated labellers: each sees what an answer is worth through noise of its own, so that two of them disagree about as often as
//! InstructGPT's did (27%: their agreement was 72.6 ± 1.5%, Ouyang et al. 2022, section 3.4).

use rand_distr::{Distribution, Normal};

use super::rule::{Case, judge};
use crate::random::Stream;

/// Standard deviation of a labeller's noise, in units of the rule's utility.
pub const NOISE: f64 = 1.35;

/// How one simulated labeller values each answer, higher is better.
pub fn impressions(case: &Case, answers: &[String], stream: &mut Stream) -> Vec<f64> {
    let noise = Normal::new(0.0, NOISE).expect("the deviation is positive");
    answers.iter().map(|answer| f64::from(judge(case, answer).utility) + noise.sample(stream)).collect()
}

/// Ranks from impressions: 0 is the best; answers that lie close together tie.
pub fn ranks(impressions: &[f64]) -> Vec<i64> {
    let mut order: Vec<usize> = (0..impressions.len()).collect();
    order.sort_by(|&a, &b| impressions[b].total_cmp(&impressions[a]));
    let mut ranks = vec![0; impressions.len()];
    for pair in order.windows(2) {
        // A labeller does not tell answers apart whose worth differs by less than this.
        let tie = impressions[pair[0]] - impressions[pair[1]] < 0.1;
        ranks[pair[1]] = ranks[pair[0]] + i64::from(!tie);
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::stream;
    use crate::world::names::{Names, Split};
    use crate::world::prompts::WorldPrompt;
    use crate::world::talk::provocations;
    use crate::world::writers::candidates;
    use rand::Rng;

    #[test]
    fn two_labellers_disagree_as_often_as_instructgpts() {
        let mut stream = stream(3, "test", 0);
        let (names, messages) = (Names::of(Split::Training, 0), provocations(Split::Training, 0));
        let (mut pairs, mut disagreements) = (0.0, 0.0);
        for _ in 0..400 {
            let prompt = WorldPrompt::random(&names, &messages, &mut stream);
            let k = stream.random_range(4..=9);
            let answers = candidates(&prompt, k, &names, &mut stream);
            let case = Case::from(&prompt);
            let [first, second] = [0, 1].map(|_| ranks(&impressions(&case, &answers, &mut stream)));
            for a in 0..k {
                for b in 0..a {
                    let (x, y) = (first[a].cmp(&first[b]), second[a].cmp(&second[b]));
                    if x.is_ne() && y.is_ne() {
                        pairs += 1.0;
                        disagreements += f64::from(u8::from(x != y));
                    }
                }
            }
        }
        let share = disagreements / pairs;
        assert!((0.24..0.30).contains(&share), "labellers disagree on {share:.3} of pairs");
    }
}
