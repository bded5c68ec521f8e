"""Every variant of rewards, advantages and losses, by code that is not ours: OpenRLHF's modules as they are, and lines cut out of TRL's trainers.

The numbers to start from are those of `ppo/expected.safetensors`. OpenRLHF is installed without what it depends on (`pip install --no-deps
openrlhf==0.11.2`); the modules loaded here need PyTorch alone, once `deepspeed` is there in name. Where neither has a variant the few
lines here are PyTorch.
"""

import importlib.util
import inspect
import sys
import types
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import numpy
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from trl.experimental.ppo.ppo_trainer import masked_whiten
from trl.trainer.grpo_trainer import GRPOTrainer, nanstd
from trl.trainer.rloo_trainer import RLOOTrainer

HERE = Path(__file__).parent


def openrlhf():
    """OpenRLHF's `models/utils.py`, `models/loss.py` and `trainer/ppo_utils/kl_controller.py`, and the source of its experience maker."""
    root = Path(importlib.util.find_spec("openrlhf").submodule_search_locations[0])
    sys.modules.setdefault("deepspeed", types.ModuleType("deepspeed"))
    torch.compile = lambda function=None, **_: function or (lambda function: function)
    package = types.ModuleType("openrlhf_models")
    package.__path__ = [str(root / "models")]
    sys.modules["openrlhf_models"] = package

    def load(name, path):
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    utils = load("openrlhf_models.utils", root / "models/utils.py")
    loss = load("openrlhf_models.loss", root / "models/loss.py")
    controller = load("openrlhf_kl", root / "trainer/ppo_utils/kl_controller.py")
    return utils, loss, controller, (root / "trainer/ppo_utils/experience_maker.py").read_text()


UTILS, LOSS, CONTROLLER, EXPERIENCE = openrlhf()


def cut(source, first, last):
    """The lines of a source from the only one that begins with `first` to the next that begins with `last`, as a program."""
    lines = source.splitlines()
    begins = [number for number, line in enumerate(lines) if line.strip().startswith(first)]
    assert len(begins) == 1, (first, begins)
    end = next(number for number, line in enumerate(lines) if number >= begins[0] and line.strip().startswith(last))
    return compile(dedent("\n".join(lines[begins[0]:end + 1])), first, "exec")


def inputs():
    golden = load_file(HERE / "ppo/expected.safetensors")
    lengths = golden["lengths"]
    mask = (torch.arange(golden["logprobs"].shape[1])[None] < lengths[:, None]).float()
    rows = {name: torch.where(mask > 0, golden[name], 0.0) for name in ("logprobs", "ref_logprobs", "values", "new_logprobs", "new_values",
                                                                       "whitened", "returns", "rewards", "entropy")}
    return golden, mask, rows, lengths


def with_gradients(result, name, loss, **variables):
    """Adds a loss and its gradients."""
    gradients = torch.autograd.grad(loss, list(variables.values()), allow_unused=True, retain_graph=True)
    result[f"{name}.loss"] = loss.detach().reshape(1)
    for (variable, tensor), gradient in zip(variables.items(), gradients):
        result[f"{name}.grad.{variable}"] = torch.zeros_like(tensor) if gradient is None else gradient


def rewards(result, golden, mask, rows):
    for estimator in ("k1", "k2", "k3"):
        kl = UTILS.compute_approx_kl(rows["logprobs"], rows["ref_logprobs"], kl_estimator=estimator)
        result[f"rewards.{estimator}"] = UTILS.compute_reward(golden["scores"], 0.05, kl, mask, (-0.5, 0.5)) * mask
    # Far from the reference, where OpenRLHF's bound of 10 holds.
    far = rows["ref_logprobs"] - 12
    result["rewards.far"] = UTILS.compute_reward(golden["scores"], 0.05, UTILS.compute_approx_kl(rows["logprobs"], far), mask) * mask
    result["rewards.whitened"] = masked_whiten(result["rewards.k1"], mask, shift_mean=False) * mask
    names = {"all_advantages": rows["returns"].flatten(), "all_action_masks": mask.flatten(), "args": SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(no_std_norm=False)))}
    exec(cut(EXPERIENCE, "num_actions = all_action_masks.sum()", "rstd = var"), names)
    result["whitened.biased"] = (rows["returns"] - names["mean"]) * names["rstd"] * mask


def groups(result):
    """Advantages of three prompts with four answers each; the last prompt's answers all have one reward."""
    scores = torch.randn(3, 4)
    scores[2] = 0.3
    flat = scores.flatten()
    result["group.rewards"] = scores
    names = {"rewards": flat, "grouped_rewards": scores, "num_generations": 4, "torch": torch}
    source = inspect.getsource(RLOOTrainer._generate_and_score_completions)
    exec(rloo_lines(source), names)
    result["group.rloo"] = names["advantages"].reshape(3, 4)
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    names = {"rewards_per_func": flat[:, None], "self": SimpleNamespace(reward_weights=torch.ones(1), scale_rewards="group"), "device": "cpu",
             "num_generations": 4, "torch": torch, "nanstd": nanstd, "unscorable_mask": torch.zeros(12, dtype=torch.bool)}
    lines = source.splitlines()
    first = next(n for n, line in enumerate(lines) if line.strip() == "# Apply weights to each reward function's output and sum")
    last = next(n for n, line in enumerate(lines) if n > first and line.strip().startswith("is_std_zero"))
    exec(dedent("\n".join(lines[first:last])), names)
    result["group.grpo"] = names["advantages"].reshape(3, 4)


def rloo_lines(source):
    lines = source.splitlines()
    first = next(n for n, line in enumerate(lines) if line.strip().startswith("scorable_counts ="))
    last = next(n for n, line in enumerate(lines) if n > first and line.strip() == "advantages = rewards - baselines")
    kept = [line for line in lines[first:last + 1] if not line.strip().startswith("if num_generations")]
    return "\n".join(line.strip() for line in kept)


def policy_losses(result, mask, rows, sampler):
    old, reference, advantages = rows["logprobs"], rows["ref_logprobs"], rows["whitened"]

    def of(name, loss_of, **more):
        new = rows["new_logprobs"].clone().requires_grad_()
        entropy = rows["entropy"].clone().requires_grad_()
        with_gradients(result, f"policy.{name}", loss_of(new, entropy), new_logprobs=new, entropy=entropy)

    def openrlhf_loss(**settings):
        loss = LOSS.PolicyLoss(**settings)
        return lambda new, entropy: loss(new, old, advantages, mask, rollout_log_probs=sampler)[0]

    def kl_loss(estimator, token_level=True):
        return lambda new, entropy: openrlhf_loss(token_level_loss=token_level)(new, entropy) + 0.3 * LOSS.aggregate_loss(
            UTILS.compute_approx_kl(new, reference, kl_estimator=estimator), mask, token_level)

    of("token", openrlhf_loss())
    of("answer", openrlhf_loss(token_level_loss=False))
    of("asymmetric", openrlhf_loss(clip_eps_low=0.1, clip_eps_high=0.28))
    of("dual", openrlhf_loss(dual_clip=1.05))
    of("correction", openrlhf_loss(is_correction_level="token", is_correction_mode="clip", is_correction_threshold=[0, 1.1]))
    for estimator in ("k1", "k2", "k3"):
        of(f"kl_{estimator}", kl_loss(estimator))
    of("kl_answer", kl_loss("k3", False))
    of("entropy", lambda new, entropy: openrlhf_loss()(new, entropy) - 0.02 * UTILS.masked_mean(entropy, mask))
    of("log_ratio_clip", lambda new, entropy: log_ratio_clip(new, old, advantages, mask))
    of("grpo", lambda new, entropy: grpo_loss(new, old, reference, advantages, mask))
    of("rloo", lambda new, entropy: rloo_loss(new, old, advantages[:, 0], mask))
    # None of them is another's in disguise.
    losses = [result[f"policy.{name}.loss"].item() for name in ("token", "answer", "asymmetric", "dual", "correction", "kl_k1", "kl_k2", "kl_k3", "log_ratio_clip")]
    assert len({round(loss, 5) for loss in losses}) == len(losses), losses


def log_ratio_clip(new, old, advantages, mask):
    """The clipped loss of a log-ratio between -0.3 and 0.3."""
    ratio = (new - old).clamp(-0.3, 0.3).exp()
    return UTILS.masked_mean(-torch.min(advantages * ratio, advantages * ratio.clamp(0.8, 1.2)), mask)


def grpo_loss(new, old, reference, advantages, mask):
    """The lines of `GRPOTrainer._compute_loss` for the loss of the paper."""
    lines = inspect.getsource(GRPOTrainer._compute_loss).splitlines()
    first = next(n for n, line in enumerate(lines) if line.strip() == "log_ratio = per_token_logps - old_per_token_logps")
    last = next(n for n, line in enumerate(lines) if n > first and line.strip().startswith("normalizer = "))
    arguments = SimpleNamespace(use_bias_correction_kl=False, delta=None)
    trainer = SimpleNamespace(importance_sampling_level="token", beta=0.04, loss_type="grpo", epsilon_low=0.2, epsilon_high=0.2, args=arguments,
                              off_policy_mask_threshold=None, use_vllm=False, model=SimpleNamespace(training=True))
    names = {"per_token_logps": new, "old_per_token_logps": old, "advantages": advantages, "mask": mask, "self": trainer, "torch": torch,
             "inputs": {"ref_per_token_logps": reference}, "entropy_mask": None}
    exec(dedent("\n".join(lines[first:last])), names)
    return names["loss"]


def rloo_loss(new, old, advantages, mask):
    """The lines of `RLOOTrainer._compute_loss`."""
    lines = inspect.getsource(RLOOTrainer._compute_loss).splitlines()
    first = next(n for n, line in enumerate(lines) if line.strip().startswith("logps = (per_token_logps * completion_mask)"))
    last = next(n for n, line in enumerate(lines) if n > first and line.strip() == "loss = per_sequence_loss.mean()")
    names = {"per_token_logps": new, "completion_mask": mask, "torch": torch, "inputs": {"old_logps": (old * mask).sum(1), "advantages": advantages},
             "self": SimpleNamespace(epsilon_low=0.2, epsilon_high=0.2)}
    exec(dedent("\n".join(lines[first:last + 1])), names)
    return names["loss"]


def value_losses(result, mask, rows):
    for name, settings in {"unclipped": {}, "answer": {"clip_eps": 0.2, "token_level_loss": False}, "token": {"clip_eps": 0.2}}.items():
        new = rows["new_values"].clone().requires_grad_()
        loss = LOSS.ValueLoss(**settings)(new, rows["values"], rows["returns"], mask)
        with_gradients(result, f"value.{name}", loss, new_values=new)


def preferences(result):
    """DPO from pairs of log-probabilities, and the losses of reward models from rewards."""
    pairs = {name: (-20 + 3 * torch.randn(6)).requires_grad_() for name in ("chosen", "rejected")}
    reference = {f"ref_{name}": tensor.detach() + torch.randn(6) for name, tensor in pairs.items()}
    result |= {f"dpo.{name}": tensor.detach() for name, tensor in (pairs | reference).items()}
    for name, settings in {"sigmoid": {}, "smoothed": {"label_smoothing": 0.1}, "ipo": {"ipo": True}}.items():
        loss, chosen, rejected = LOSS.DPOLoss(0.2, **settings)(pairs["chosen"], pairs["rejected"], *reference.values())
        with_gradients(result, f"dpo.{name}", loss, **pairs)
    result |= {"dpo.chosen_rewards": chosen, "dpo.rejected_rewards": rejected}
    rewards = torch.randn(5).requires_grad_()
    ranks = torch.tensor([1, 0, 3, 1, 2])
    result |= {"reward.rewards": rewards.detach(), "reward.ranks": ranks}
    pairs = [(i, j) for i in range(5) for j in range(5) if ranks[i] < ranks[j]]
    better, worse = (torch.stack([rewards[pair[side]] for pair in pairs]) for side in (0, 1))
    margin = torch.full_like(better.detach(), 0.4)
    plain = LOSS.PairWiseLoss()(better, worse, margin)
    with_gradients(result, "reward.pairwise", plain, rewards=rewards)
    with_gradients(result, "reward.smoothed", 0.9 * plain + 0.1 * LOSS.PairWiseLoss()(worse, better, margin), rewards=rewards)
    # TRL's `center_rewards_coefficient`.
    with_gradients(result, "reward.centred", plain + 0.01 * torch.mean((better + worse) ** 2), rewards=rewards)
    for name, margin in {"plackett_luce": 0.0, "plackett_luce_margin": 0.4}.items():
        with_gradients(result, f"reward.{name}", plackett_luce(rewards, ranks, margin), rewards=rewards)
    # Without ties it is the probability of the order, drawn without replacement.
    order = torch.tensor([3, 0, 2, 4, 1])
    strengths = rewards.detach()[order]
    likelihood = sum(F.log_softmax(strengths[place:], 0)[0] for place in range(4))
    assert torch.allclose(plackett_luce(rewards, torch.argsort(order), 0.0), -likelihood / 4, atol=1e-6)


def plackett_luce(rewards, ranks, margin):
    """Each answer against all that are ranked below it, mean over the answers that have such; answers of one rank are not compared."""
    terms = []
    for index, rank in enumerate(ranks):
        below = rewards[ranks > rank]
        if len(below):
            terms.append(-F.log_softmax(torch.cat([rewards[index:index + 1] - margin, below]), 0)[0])
    return torch.stack(terms).mean()


def main():
    torch.set_num_threads(1)
    torch.manual_seed(101)
    golden, mask, rows, _ = inputs()
    sampler = rows["logprobs"] + 0.1 * torch.randn_like(rows["logprobs"]) * mask
    result = {"sampler_logprobs": sampler}
    rewards(result, golden, mask, rows)
    groups(result)
    policy_losses(result, mask, rows, sampler)
    value_losses(result, mask, rows)
    preferences(result)
    controller = CONTROLLER.AdaptiveKLController(0.1, 6.0, 10_000)
    steps = numpy.array([0.5, 3.0, 5.9, 6.5, 9.0, 40.0, -2.0])
    values = []
    for kl in steps:
        controller.update(kl, 512)
        values.append(controller.value)
    result |= {"controller.kl": torch.tensor(steps), "controller.values": torch.tensor(values)}
    folder = HERE / "ppo-variants"
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in result.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
