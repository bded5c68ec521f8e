//! PPO and its relatives against TRL, OpenRLHF and PyTorch: rewards, advantages, returns, losses and their gradients, each variant.

use std::ops::Range;

use candle_core::{DType, Device, Tensor, Var};
use rlhf::Result;
use rlhf::adapt::Head;
use rlhf::data::batch::Batch;
use rlhf::model::adapter::Parameter;
use rlhf::ops::Gradients;
use rlhf::ppo::advantage::{self, Shift};
use rlhf::ppo::kl::{self, KlCoefficient};
use rlhf::ppo::objective::{Minibatch, Objective, Tokens, value_loss};
use rlhf::ppo::rollout::Episode;
use rlhf::ppo::settings::{KlEstimator, PpoSettings, Variance};
use rlhf::ppo::{grpo, ptx, rloo};
use rlhf::settings::from_arguments;

use crate::oracle::{Tensors, assert_close, assert_gradient, documents, expected, floats, folder, integers, load};

fn ppo_settings(flags: &[&str]) -> PpoSettings {
    let needed = ["--model", "m", "--reward-model", "r", "--data", "d", "--output", "o"];
    from_arguments(needed.iter().chain(flags)).expect("valid arguments")
}

/// Where each answer's numbers stand when all lie end to end.
fn ranges(lengths: &[i64]) -> Vec<Range<usize>> {
    let mut start = 0;
    lengths
        .iter()
        .map(|&length| {
            start += length as usize;
            start - length as usize..start
        })
        .collect()
}

#[test]
fn ppo_equals_the_formulas_of_trl() -> Result<()> {
    let tensors = expected("ppo")?;
    let lengths = integers(&tensors, "lengths")?;
    let width = *lengths.iter().max().expect("rows") as usize;
    let rows = |name: &str| -> Result<Vec<Vec<f32>>> {
        let all = floats(&tensors, name)?;
        Ok(lengths
            .iter()
            .enumerate()
            .map(|(row, &len)| all[row * width..row * width + len as usize].to_vec())
            .collect())
    };
    let (log_probs, reference, values) = (rows("logprobs")?, rows("ref_logprobs")?, rows("values")?);
    let scores = floats(&tensors, "scores")?;
    let (mut advantages, mut returns) = (Vec::new(), Vec::new());
    for row in 0..lengths.len() {
        let rewards = |estimator| {
            let pairs = log_probs[row].iter().zip(&reference[row]);
            let kl: Vec<f32> = pairs.map(|(&new, &old)| kl::estimate(new, old, estimator, 0.0)).collect();
            advantage::token_rewards(&kl, scores[row], 0.05)
        };
        assert_close("rewards_k3", &rewards(KlEstimator::K3), &rows("rewards_k3")?[row], 1e-5);
        let rewards = rewards(KlEstimator::K1);
        assert_close("rewards", &rewards, &rows("rewards")?[row], 1e-5);
        advantages.push(advantage::generalized_advantages(&rewards, &values[row], 0.99, 0.95));
        assert_close("advantages", &advantages[row], &rows("advantages")?[row], 1e-5);
        returns.push(advantage::returns(&advantages[row], &values[row]));
        assert_close("returns", &returns[row], &rows("returns")?[row], 1e-5);
    }
    let mut slices: Vec<&mut [f32]> = advantages.iter_mut().map(Vec::as_mut_slice).collect();
    advantage::whiten(&mut slices, Variance::Unbiased, Shift::ToZero);
    assert_close("whitened", &advantages.concat(), &rows("whitened")?.concat(), 1e-5);

    let variable = |name: &str| -> Result<Var> {
        let values = rows(name)?.concat();
        Ok(Var::from_slice(&values, values.len(), &Device::Cpu)?)
    };
    let (new_log_probs, new_values) = (variable("new_logprobs")?, variable("new_values")?);
    let answers = ranges(&lengths);
    let minibatch = Minibatch { tokens: lengths.iter().sum::<i64>() as usize, answers: lengths.len() };
    let tokens = Tokens {
        answers: answers.clone(),
        old_log_probs: log_probs.concat(),
        reference_log_probs: reference.concat(),
        sampler_log_probs: log_probs.concat(),
        advantages: advantages.concat(),
    };
    let settings = ppo_settings(&[]);
    let objective = Objective::new(&settings.policy, &settings.kl, 0.0);
    let entropy = Tensor::zeros(minibatch.tokens, DType::F32, &Device::Cpu)?;
    let policy = objective.policy_loss(new_log_probs.as_tensor(), &entropy, &tokens, minibatch)?;
    let shares = objective.shares(&answers, minibatch);
    let (value_mean, value_clipped) =
        value_loss(new_values.as_tensor(), &values.concat(), &returns.concat(), 0.2, &shares)?;
    let (policy_mean, means) = (policy.total, policy.statistics.means());
    let pairs = [
        ("policy_loss", policy_mean.to_scalar::<f32>()?),
        ("value_loss", value_mean.to_scalar::<f32>()?),
        ("clip_fraction", means.clipped as f32),
        ("value_clip_fraction", (value_clipped / minibatch.tokens as f64) as f32),
        ("approximate_kl", means.approximate_kl as f32),
        ("ratio", means.ratio as f32),
    ];
    for (name, found) in pairs {
        assert_close(name, &[found], &floats(&tensors, name)?, 1e-5);
    }
    let gradients = (policy_mean + value_mean.affine(0.1, 0.0)?)?.backward()?;
    for (name, variable) in [("new_logprobs", &new_log_probs), ("new_values", &new_values)] {
        let found: Vec<f32> = gradients.get(variable).expect("a gradient").to_vec1()?;
        assert_close(name, &found, &rows(&format!("grad.{name}"))?.concat(), 1e-5);
    }
    Ok(())
}

/// A rollout's numbers in rows of one width, of which only each answer's own count.
struct Rows {
    tensors: Tensors,
    lengths: Vec<i64>,
    width: usize,
}

impl Rows {
    fn read() -> Result<Self> {
        let mut tensors = expected("ppo")?;
        let lengths = integers(&tensors, "lengths")?;
        let width = *lengths.iter().max().expect("rows") as usize;
        tensors.extend(expected("ppo-variants")?);
        Ok(Rows { tensors, lengths, width })
    }

    /// One vector an answer.
    fn answers(&self, name: &str) -> Result<Vec<Vec<f32>>> {
        let all = floats(&self.tensors, name)?;
        let row = |(row, &length): (usize, &i64)| all[row * self.width..][..length as usize].to_vec();
        Ok(self.lengths.iter().enumerate().map(row).collect())
    }

    /// All answers end to end.
    fn flat(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.answers(name)?.concat())
    }

    fn variable(&self, name: &str) -> Result<Var> {
        let values = self.flat(name)?;
        Ok(Var::from_slice(&values, values.len(), &Device::Cpu)?)
    }

    fn minibatch(&self) -> Minibatch {
        Minibatch { tokens: self.lengths.iter().sum::<i64>() as usize, answers: self.lengths.len() }
    }

    /// Compares a loss and its gradients with those under a name.
    fn check(&self, name: &str, loss: &Tensor, variables: &[(&str, &Var)]) -> Result<()> {
        assert_close(name, &[loss.to_scalar()?], &floats(&self.tensors, &format!("{name}.loss"))?, 1e-5);
        let gradients = loss.backward()?;
        for (variable, of) in variables {
            let wanted = self.flat(&format!("{name}.grad.{variable}"))?;
            let found = match gradients.get(of) {
                Some(gradient) => gradient.to_vec1()?,
                None => vec![0.0; wanted.len()],
            };
            assert_close(&format!("{name}.grad.{variable}"), &found, &wanted, 1e-5);
        }
        Ok(())
    }
}

#[test]
fn every_form_of_the_reward_equals_openrlhf() -> Result<()> {
    let rows = Rows::read()?;
    let (log_probs, reference) = (rows.answers("logprobs")?, rows.answers("ref_logprobs")?);
    let scores = floats(&rows.tensors, "scores")?;
    let rewards = |shift: f32, estimator, kl_clip, reward_clip: f32| -> Vec<Vec<f32>> {
        let of_row = |row: usize| {
            let pairs = log_probs[row].iter().zip(&reference[row]);
            let kl: Vec<f32> = pairs.map(|(&new, &old)| kl::estimate(new, old + shift, estimator, kl_clip)).collect();
            advantage::token_rewards(&kl, scores[row].clamp(-reward_clip, reward_clip), 0.05)
        };
        (0..scores.len()).map(of_row).collect()
    };
    for (name, estimator) in [("k1", KlEstimator::K1), ("k2", KlEstimator::K2), ("k3", KlEstimator::K3)] {
        let found = rewards(0.0, estimator, 10.0, 0.5);
        assert_close(name, &found.concat(), &rows.flat(&format!("rewards.{name}"))?, 1e-5);
    }
    let far = rewards(-12.0, KlEstimator::K1, 10.0, f32::MAX);
    assert_close("far", &far.concat(), &rows.flat("rewards.far")?, 1e-5);
    let mut whitened = rewards(0.0, KlEstimator::K1, 10.0, 0.5);
    let mut slices: Vec<&mut [f32]> = whitened.iter_mut().map(Vec::as_mut_slice).collect();
    advantage::whiten(&mut slices, Variance::Unbiased, Shift::Keep);
    assert_close("whitened rewards", &whitened.concat(), &rows.flat("rewards.whitened")?, 1e-5);
    let mut biased = rows.answers("returns")?;
    let mut slices: Vec<&mut [f32]> = biased.iter_mut().map(Vec::as_mut_slice).collect();
    advantage::whiten(&mut slices, Variance::Biased, Shift::ToZero);
    assert_close("biased", &biased.concat(), &rows.flat("whitened.biased")?, 1e-5);
    Ok(())
}

#[test]
fn advantages_of_groups_equal_trl() -> Result<()> {
    let tensors = expected("ppo-variants")?;
    let rewards = floats(&tensors, "group.rewards")?;
    for (name, estimate) in
        [("rloo", rloo::estimate_advantages as fn(&mut [Episode])), ("grpo", grpo::estimate_advantages)]
    {
        let mut found = Vec::new();
        for of_prompt in rewards.chunks(4) {
            // The reward in two parts, as a KL penalty and a score are.
            let episode = |&reward: &f32| Episode {
                rewards: vec![0.25 * reward, 0.75 * reward],
                sampler_log_probs: vec![0.0; 2],
                ..Default::default()
            };
            let mut answers: Vec<Episode> = of_prompt.iter().map(episode).collect();
            estimate(&mut answers);
            assert!(answers.iter().all(|episode| episode.advantages.len() == 2));
            found.extend(answers.iter().map(|episode| episode.advantages[1]));
        }
        assert_close(name, &found, &floats(&tensors, &format!("group.{name}"))?, 1e-5);
    }
    Ok(())
}

/// The flags of each variant of the policy's loss, and the weight of the KL penalty in it.
const POLICY_LOSSES: [(&str, &[&str], f64); 12] = [
    ("token", &[], 0.0),
    ("answer", &["--loss-aggregation", "answer"], 0.0),
    ("asymmetric", &["--clip-range", "0.1", "--clip-range-high", "0.28"], 0.0),
    ("dual", &["--dual-clip", "1.05"], 0.0),
    ("correction", &["--sampler-correction", "1.1"], 0.0),
    ("kl_k1", &["--kl-estimator", "k1"], 0.3),
    ("kl_k2", &["--kl-estimator", "k2"], 0.3),
    ("kl_k3", &["--kl-estimator", "k3"], 0.3),
    ("kl_answer", &["--kl-estimator", "k3", "--loss-aggregation", "answer"], 0.3),
    ("entropy", &["--entropy-coefficient", "0.02"], 0.0),
    ("log_ratio_clip", &["--log-ratio-clip", "0.3"], 0.0),
    ("grpo", &["--algorithm", "grpo"], 0.04),
];

#[test]
fn every_policy_loss_and_its_gradient_equal_openrlhf_and_trl() -> Result<()> {
    let rows = Rows::read()?;
    let mut tokens = Tokens {
        answers: ranges(&rows.lengths),
        old_log_probs: rows.flat("logprobs")?,
        reference_log_probs: rows.flat("ref_logprobs")?,
        sampler_log_probs: rows.flat("sampler_logprobs")?,
        advantages: rows.flat("whitened")?,
    };
    let check = |name: &str, flags: &[&str], kl_coefficient: f64, tokens: &Tokens| {
        let uncorrected = ["--sampler-correction", "0", "--kl-clip", "10"];
        let kept = if name == "correction" { &[][..] } else { &uncorrected[..] };
        let settings = ppo_settings(&[kept, flags].concat());
        let objective = Objective::new(&settings.policy, &settings.kl, kl_coefficient);
        let (log_probs, entropy) = (rows.variable("new_logprobs")?, rows.variable("entropy")?);
        let loss = objective.policy_loss(log_probs.as_tensor(), entropy.as_tensor(), tokens, rows.minibatch())?;
        rows.check(&format!("policy.{name}"), &loss.total, &[("new_logprobs", &log_probs), ("entropy", &entropy)])
    };
    for (name, flags, kl_coefficient) in POLICY_LOSSES {
        check(name, flags, kl_coefficient, &tokens)?;
    }
    // One advantage an answer.
    for answer in tokens.answers.clone() {
        let first = tokens.advantages[answer.start];
        tokens.advantages[answer].fill(first);
    }
    check("rloo", &["--algorithm", "rloo"], 0.0, &tokens)
}

#[test]
fn every_value_loss_and_its_gradient_equal_openrlhf() -> Result<()> {
    let rows = Rows::read()?;
    for (name, flags, clip_range) in
        [("token", &[][..], 0.2), ("unclipped", &[], 0.0), ("answer", &["--loss-aggregation", "answer"], 0.2)]
    {
        let settings = ppo_settings(flags);
        let shares =
            Objective::new(&settings.policy, &settings.kl, 0.0).shares(&ranges(&rows.lengths), rows.minibatch());
        let values = rows.variable("new_values")?;
        let (old, returns) = (rows.flat("values")?, rows.flat("returns")?);
        let (loss, _) = value_loss(values.as_tensor(), &old, &returns, clip_range, &shares)?;
        rows.check(&format!("value.{name}"), &loss, &[("new_values", &values)])?;
    }
    Ok(())
}

#[test]
fn the_adaptive_controller_equals_openrlhf() -> Result<()> {
    let tensors = expected("ppo-variants")?;
    let settings = ppo_settings(&["--kl-controller", "adaptive", "--kl-coefficient", "0.1"]);
    let mut coefficient = KlCoefficient::new(&settings.kl);
    let values: Vec<f32> = floats(&tensors, "controller.kl")?
        .into_iter()
        .map(|kl| {
            coefficient.update(f64::from(kl), 512);
            coefficient.value() as f32
        })
        .collect();
    assert_close("controller", &values, &floats(&tensors, "controller.values")?, 1e-6);
    Ok(())
}

#[test]
fn the_loss_of_the_pretraining_mix_and_its_gradient_equal_pytorch() -> Result<()> {
    let tensors = expected("llama")?;
    let model = load(&folder("llama"), Some(&["--method", "full"]), Head::Language)?;
    let documents = documents(&tensors)?;
    let tokens = documents.iter().map(|document| document.learned_tokens()).sum();
    // In two micro-batches, whose shares add up.
    let (mut total, mut gradients) = (0.0, Gradients::default());
    for part in documents.chunks(1) {
        let (loss, outputs) = ptx::loss(&model, &Batch::pack(part), tokens)?;
        total += loss.to_scalar::<f32>()?;
        outputs.backward(&loss.affine(27.8, 0.0)?, &mut gradients)?;
    }
    assert_close("loss", &[total], &floats(&tensors, "loss")?, 1e-5);
    for Parameter { name, variable, .. } in model.trainable_parameters() {
        let wanted = tensors[&format!("grad.{name}")].affine(27.8, 0.0)?;
        assert_gradient(&name, &gradients.get(&variable).expect("a gradient").to_tensor()?, &wanted)?;
    }
    Ok(())
}
