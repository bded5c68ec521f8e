//! How strong each of several models is, from who was preferred to whom (Bradley and Terry 1952).
//!
//! Model `i` is preferred to model `j` with probability `σ(s_i - s_j)`. The scores `s` are those of greatest likelihood; only their
//! differences matter, so their mean is 0.

use crate::bail;
use crate::error::Result;

/// Steps after which the search is given up; ten are usual, and counts that differ a millionfold take thirty.
const MOST_STEPS: usize = 1000;

/// A step that moves no difference of scores by more than this is the last: each step squares the error that is left.
const CONVERGED: f64 = 1e-8;

/// The scores of greatest likelihood, in nats and with mean 0, of the models `names`, given `wins[i][j]`: how often `i` was
/// preferred to `j`, where a tie is half a win for each.
///
/// At the maximum every model has won as often as its scores let expect, `Σ_j w_ij = Σ_j (w_ij + w_ji) σ(s_i - s_j)`. It is found by
/// Newton's method, whose steps are shortened to `ln(1 + r) / r` of themselves, `r` the largest change of a difference that the
/// whole step would make. That is the best step by the bound on logistic losses of Bach 2010 (section 2), from which each step is an
/// improvement, whatever the counts. Hunter 2004 has another iteration to the same maximum. An interval is made by drawing prompts
/// anew, with a call of this for each draw.
///
/// # Errors
/// Where the counts are not a square of numbers that are at least 0, and where there is no finite maximum: unless each model is
/// reached from each other by a chain of wins (Hunter 2004, assumption 1), the likelihood grows as some scores go to infinity.
/// Also where counts differ by more than double precision can hold.
pub fn scores<N: AsRef<str>>(names: &[N], wins: &[Vec<f64>]) -> Result<Vec<f64>> {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    check_counts(&names, wins)?;
    check_chains(&names, wins)?;
    let mut scores = vec![0.0; names.len()];
    if names.len() < 2 {
        return Ok(scores);
    }
    for _ in 0..MOST_STEPS {
        let step = newton_step(wins, &scores);
        if step.iter().any(|change| !change.is_finite()) {
            break;
        }
        let (low, high) =
            step.iter().fold((0.0f64, 0.0f64), |(low, high), &change| (low.min(change), high.max(change)));
        let reach = high - low;
        let length = if reach > 0.0 { reach.ln_1p() / reach } else { 1.0 };
        scores.iter_mut().zip(&step).for_each(|(score, change)| *score += length * change);
        if reach <= CONVERGED {
            let mean = scores.iter().sum::<f64>() / scores.len() as f64;
            return Ok(scores.into_iter().map(|score| score - mean).collect());
        }
    }
    bail!(
        "Bradley-Terry scores of {}: the counts of wins are too far apart to be computed with; expected counts within a \
         factor of 1e12 of each other",
        names.join(", ")
    )
}

/// The probability that a model of this score is preferred to one of that: `1 / (1 + exp(other - score))`.
///
/// Against the mean opponent, whose score is 0, it is `preference(score, 0.0)`.
pub fn preference(score: f64, other: f64) -> f64 {
    1.0 / (1.0 + (other - score).exp())
}

/// Refuses counts that are none.
fn check_counts(names: &[&str], wins: &[Vec<f64>]) -> Result<()> {
    if wins.len() != names.len() {
        bail!("wins have {} rows for {} models; expected a row for each model", wins.len(), names.len());
    }
    for (i, row) in wins.iter().enumerate() {
        if row.len() != names.len() {
            bail!(
                "wins of {}: found {} counts, expected one against each of {} models",
                names[i],
                row.len(),
                names.len()
            );
        }
        for (j, &count) in row.iter().enumerate() {
            if !count.is_finite() || count < 0.0 {
                bail!("wins of {} against {}: found {count}, expected a number of at least 0", names[i], names[j]);
            }
            if i == j && count > 0.0 {
                bail!("{} was compared with itself {count} times; leave these comparisons out", names[i]);
            }
        }
    }
    Ok(())
}

/// Refuses counts from which some difference of scores would be infinite, and says between which models.
fn check_chains(names: &[&str], wins: &[Vec<f64>]) -> Result<()> {
    let list = |inside: &[bool], wanted: bool| {
        let of_side = names.iter().zip(inside).filter(|(_, inside)| **inside == wanted);
        of_side.map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    };
    let compared = |i: usize, j: usize| wins[i][j] > 0.0 || wins[j][i] > 0.0;
    let connected = reached(names.len(), 0, compared);
    if connected.contains(&false) {
        bail!(
            "Bradley-Terry scores: {} and {} were never compared with each other, so their scores have no common scale; \
             compare some of the first with some of the second, or measure the two groups apart",
            list(&connected, true),
            list(&connected, false)
        );
    }
    // Those that a model has beaten, directly or by a chain; the shortest list of such that is not all of them says most.
    let beaten = (0..names.len()).map(|start| reached(names.len(), start, |i, j| wins[i][j] > 0.0));
    let closed = beaten
        .filter(|beaten| beaten.contains(&false))
        .min_by_key(|beaten| beaten.iter().filter(|inside| **inside).count());
    if let Some(closed) = closed {
        let (weaker, stronger) = (list(&closed, true), list(&closed, false));
        bail!(
            "Bradley-Terry scores: {weaker} never won or tied against {stronger}, so the difference of their scores is \
             infinite; compare them on more prompts, until each side has won or tied once, or leave one side out"
        );
    }
    Ok(())
}

/// Which of `count` models are reached from `start` over `edge(from, to)`.
fn reached(count: usize, start: usize, edge: impl Fn(usize, usize) -> bool) -> Vec<bool> {
    let mut inside = vec![false; count];
    let mut open: Vec<usize> = (start < count).then_some(start).into_iter().collect();
    while let Some(from) = open.pop() {
        if !std::mem::replace(&mut inside[from], true) {
            open.extend((0..count).filter(|&to| !inside[to] && edge(from, to)));
        }
    }
    inside
}

/// Newton's step from `scores`: the solution of `(H + c 1 1ᵀ) step = g`, `g` the gradient of the log-likelihood and `-H` its second
/// derivative.
///
/// `H` leaves the constant vector at 0, in whose direction the likelihood does not change; `c 1 1ᵀ`, of `H`'s own size, makes the
/// matrix definite, and the step's mean 0.
fn newton_step(wins: &[Vec<f64>], scores: &[f64]) -> Vec<f64> {
    let count = scores.len();
    let mut matrix = vec![vec![0.0; count]; count];
    let mut gradient = vec![0.0; count];
    for i in 0..count {
        for j in 0..count {
            let games = wins[i][j] + wins[j][i];
            let expected = preference(scores[i], scores[j]);
            let unexpected = preference(scores[j], scores[i]);
            // Wins less expected wins, in the form in which nothing is lost where one probability is nearly 1.
            gradient[i] += wins[i][j] * unexpected - wins[j][i] * expected;
            let information = games * expected * unexpected;
            matrix[i][i] += information;
            matrix[i][j] -= information;
        }
    }
    let size = (0..count).map(|i| matrix[i][i]).sum::<f64>() / count as f64;
    matrix.iter_mut().flatten().for_each(|value| *value += size);
    solve(matrix, gradient)
}

/// The solution of `matrix x = right`, of a symmetric positive definite matrix, by elimination; such a one needs no exchange of
/// rows.
fn solve(mut matrix: Vec<Vec<f64>>, mut right: Vec<f64>) -> Vec<f64> {
    let count = right.len();
    for pivot in 0..count {
        let (above, below) = matrix.split_at_mut(pivot + 1);
        let pivot_row = &above[pivot];
        for (offset, row) in below.iter_mut().enumerate() {
            let factor = row[pivot] / pivot_row[pivot];
            row.iter_mut().zip(pivot_row).skip(pivot).for_each(|(value, above)| *value -= factor * above);
            right[pivot + 1 + offset] -= factor * right[pivot];
        }
    }
    for row in (0..count).rev() {
        let known: f64 = (row + 1..count).map(|column| matrix[row][column] * right[column]).sum();
        right[row] = (right[row] - known) / matrix[row][row];
    }
    right
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Counts in which each pair has won at least once.
    fn counts() -> impl Strategy<Value = Vec<Vec<f64>>> {
        (2usize..6).prop_flat_map(|count| {
            let halves = proptest::collection::vec(proptest::collection::vec(1u32..60, count), count);
            halves.prop_map(|halves| {
                let row = |(i, row): (usize, Vec<u32>)| {
                    row.into_iter()
                        .enumerate()
                        .map(|(j, halves)| if i == j { 0.0 } else { f64::from(halves) / 2.0 })
                        .collect()
                };
                halves.into_iter().enumerate().map(row).collect()
            })
        })
    }

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|index| format!("model-{index}")).collect()
    }

    fn message(names: &[&str], wins: &[Vec<f64>]) -> String {
        scores(names, wins).unwrap_err().to_string()
    }

    #[test]
    fn two_models_have_the_log_odds_of_their_wins() {
        let found = scores(&["a", "b"], &[vec![0.0, 30.0], vec![10.0, 0.0]]).unwrap();
        assert!((found[0] - found[1] - 3f64.ln()).abs() < 1e-12);
        assert!((preference(found[0], found[1]) - 0.75).abs() < 1e-12);
        assert_eq!(scores::<&str>(&[], &[]).unwrap(), Vec::<f64>::new());
        assert_eq!(scores(&["a"], &[vec![0.0]]).unwrap(), [0.0]);
    }

    #[test]
    fn extreme_counts_are_found_too() {
        let found = scores(&["a", "b", "c"], &[vec![0.0, 1e6, 0.0], vec![1.0, 0.0, 1e6], vec![0.0, 1.0, 0.0]]).unwrap();
        // A chain: each neighbour has its own log odds.
        assert!((found[0] - found[1] - 1e6f64.ln()).abs() < 1e-9 && (found[1] - found[2] - 1e6f64.ln()).abs() < 1e-9);
        let found = scores(&["a", "b"], &[vec![0.0, 1e6], vec![1e-6, 0.0]]).unwrap();
        assert!((found[0] - found[1] - 1e12f64.ln()).abs() < 1e-9);
        assert!(message(&["a", "b"], &[vec![0.0, 1e300], vec![1e-300, 0.0]]).contains("too far apart"));
    }

    #[test]
    fn counts_from_which_whole_newton_steps_run_away_have_scores_too() {
        let wins = [
            vec![0.0, 1.0, 22879.0, 0.0, 801.0],
            vec![1.0, 0.0, 1.0, 0.0, 133.0],
            vec![345.0, 0.0, 0.0, 16.0, 1.0],
            vec![0.0, 1057.0, 0.0, 0.0, 1.0],
            vec![1.0, 1.0, 0.0, 0.0, 0.0],
        ];
        let found = scores(&names(5), &wins).unwrap();
        for (score, expected) in
            found.into_iter().zip([7.413_607_69, -4.103_642_98, 3.225_044_74, 1.758_376_62, -8.293_386_06])
        {
            assert!((score - expected).abs() < 1e-7, "{score} {expected}");
        }
    }

    #[test]
    fn models_without_a_common_scale_are_named() {
        let mut wins = vec![vec![0.0; 4]; 4];
        (wins[0][1], wins[1][0], wins[2][3], wins[3][2]) = (1.0, 1.0, 1.0, 1.0);
        let found = message(&["a", "b", "c", "d"], &wins);
        assert!(found.contains("a, b and c, d were never compared with each other"), "{found}");
        wins[1][2] = 5.0;
        let found = message(&["a", "b", "c", "d"], &wins);
        assert!(found.contains("c, d never won or tied against a, b"), "{found}");
        // One win suffices for a chain from each to each.
        wins[3][0] = 0.5;
        assert!(scores(&["a", "b", "c", "d"], &wins).is_ok());
    }

    #[test]
    fn counts_that_are_none_are_refused() {
        assert!(message(&["a", "b"], &[vec![0.0, 1.0]]).contains("1 rows for 2 models"));
        assert!(message(&["a", "b"], &[vec![0.0, 1.0], vec![0.0]]).contains("wins of b: found 1 counts"));
        assert!(message(&["a", "b"], &[vec![0.0, -1.0], vec![1.0, 0.0]]).contains("wins of a against b: found -1"));
        assert!(message(&["a", "b"], &[vec![0.0, f64::NAN], vec![1.0, 0.0]]).contains("found NaN"));
        assert!(message(&["a", "b"], &[vec![2.0, 1.0], vec![1.0, 0.0]]).contains("a was compared with itself 2 times"));
    }

    proptest! {
        #[test]
        fn every_model_has_won_as_often_as_expected(wins in counts()) {
            let found = scores(&names(wins.len()), &wins).unwrap();
            prop_assert!(found.iter().sum::<f64>().abs() < 1e-9);
            for i in 0..wins.len() {
                let won: f64 = wins[i].iter().sum();
                let expected: f64 = (0..wins.len()).map(|j| (wins[i][j] + wins[j][i]) * preference(found[i], found[j])).sum();
                prop_assert!((won - expected).abs() < 1e-8 * won.max(1.0), "{won} {expected}");
            }
        }

        #[test]
        fn only_the_shares_of_wins_matter(wins in counts(), factor in 0.01f64..100.0) {
            let scaled: Vec<Vec<f64>> = wins.iter().map(|row| row.iter().map(|count| count * factor).collect()).collect();
            let (found, scaled) = (scores(&names(wins.len()), &wins).unwrap(), scores(&names(wins.len()), &scaled).unwrap());
            for (found, scaled) in found.iter().zip(&scaled) {
                prop_assert!((found - scaled).abs() < 1e-9);
            }
        }

        #[test]
        fn exchanged_wins_and_losses_turn_the_scores_over(wins in counts()) {
            let losses: Vec<Vec<f64>> = (0..wins.len()).map(|i| wins.iter().map(|row| row[i]).collect()).collect();
            let (found, turned) = (scores(&names(wins.len()), &wins).unwrap(), scores(&names(wins.len()), &losses).unwrap());
            for (found, turned) in found.iter().zip(&turned) {
                prop_assert!((found + turned).abs() < 1e-9);
            }
        }
    }
}
