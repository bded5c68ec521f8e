"""What PPO does on the embedded world: presets and TRL, the pretraining mix, best-of-4, over-optimisation. Three seeds each.

    python benches/world_ppo.py target/release data runs/world-ppo [prepare] [presets] [ptx] [best-of] [over-optimisation]

Needs pyarrow, numpy and matplotlib, and what `ppo_trl.py` needs for `presets`. Without a list everything is done, in this order; `prepare` makes the fine-tuned and reward models that the
others start from. Runs go side by side, each on one thread (the number of threads changes no result), and a run that is there already is not done again. Prints Markdown; figures go to
the folder `figures` in the output folder.
"""

import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

SEEDS = [0, 1, 2]
UPDATES = 60
# What depends on model and data: a model of 0.9 M parameters needs another learning rate than one of billions, the papers' rate of the value model too.
RATE = 1e-4
WORLD = {"response-length": 40, "max-length": 256}
# Answers an update: TRL's example script has 64, as our preset; the papers' 512 take the 6,000 prompts more than once.
BATCH = 64
PRESETS = {"n-plus": {"epochs": 6}, "instructgpt": {"epochs": 6, "value-learning-rate": RATE}, "trl": {"batch-size": BATCH}}
# What the pipeline's third stage sets.
PIPELINE = WORLD | {"learning-rate": 1e-4, "batch-size": 128, "ppo-epochs": 2, "max-steps": 46}
PANELS = {"objective/scores": "score", "objective/kl": "KL from the reference, nats an answer", "objective/entropy": "entropy, nats an answer",
          "val/response_length": "length, tokens"}


class World:
    def __init__(self, programs, data, output):
        self.programs, self.data, self.output = Path(programs).resolve(), Path(data), Path(output)
        self.figures = self.output / "figures"
        self.figures.mkdir(parents=True, exist_ok=True)

    def run(self, program, output, **flags):
        """Runs a program into a folder, unless that was done before; gives the folder."""
        folder = self.output / output
        if not (folder / "done").exists():
            given = [text for name, value in flags.items() for text in flag(name, value)]
            start = time.time()
            done = subprocess.run([self.programs / program, "--output", folder, "--quiet", "--threads", "1", *given], capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"{program} {output}: {done.stderr}")
            (folder / "done").write_text(f"{time.time() - start:.1f}\n")
        return folder

    def sft(self, seed):
        return self.output / f"sft-{seed}"

    def reward(self, seed):
        return self.output / f"reward-{seed}"

    def ppo(self, output, seed, **flags):
        return self.run("ppo", f"{output}-{seed}", model=self.sft(seed), reward_model=self.reward(seed), data=self.data / "prompts.parquet",
                        seed=seed, **flags)

    def evaluate(self, output, seed, models, samples=1, **flags):
        """Rates by model, and all answers; distances are those from the fine-tuned model."""
        named = {"base": self.sft(seed)} | models
        folder = self.run("evaluate", output, models=[f"{name}={path}" for name, path in named.items()], reward_model=self.reward(seed),
                          data=self.data / "evaluation.parquet", samples=samples, seed=seed, **WORLD, **flags)
        return json.loads((folder / "evaluation.json").read_text())["models"], pq.read_table(folder / "answers.parquet").to_pylist()


def together(*calls):
    """The results of calls that run side by side, one a core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def flag(name, value):
    values = value if isinstance(value, list) else [value]
    return [f"--{name.replace('_', '-')}", *map(str, values)]


def metrics(folder):
    """The lines of the updates."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "objective/kl" in line]


def curve(folder, name):
    return np.array([line[name] for line in metrics(folder)])


def smooth(numbers, width=5):
    """Mean over the neighbours of each, fewer at the ends."""
    return np.array([numbers[max(0, i - width // 2):i + width // 2 + 1].mean() for i in range(len(numbers))])


def interval(numbers):
    """Mean and half the width of its 95% interval by Student's t, over seeds."""
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(numbers)]
    return np.mean(numbers), quantile * np.std(numbers, ddof=1) / math.sqrt(len(numbers))


def prepare(world):
    def models(seed):
        world.run("sft", f"sft-{seed}", model=world.data / "base", data=world.data / "demonstrations.parquet", seed=seed, max_length=256,
                  evaluation_data=world.data / "demonstrations-test.parquet", batch_size=16, epochs=3, learning_rate=5e-4)
        world.run("reward", f"reward-{seed}", model=world.sft(seed), data=world.data / "rankings.parquet", seed=seed, max_length=256,
                  evaluation_data=world.data / "rankings-test.parquet", demonstrations=world.data / "demonstrations.parquet",
                  learning_rate=1e-3)

    together(*(lambda seed=seed: models(seed) for seed in SEEDS))


def trl(world, seed):
    folder = world.output / f"trl-1.12-{seed}"
    if not (folder / "done").exists():
        start = time.time()
        script = Path(__file__).with_name("ppo_trl.py")
        given = {"seed": seed, "updates": UPDATES, "learning_rate": RATE, "batch_size": BATCH, "response_length": WORLD["response-length"],
                 "policy_every": 10}
        done = subprocess.run([sys.executable, script, world.sft(seed), world.reward(seed), world.data / "prompts.parquet", folder,
                               *(f"{name}={value}" for name, value in given.items())], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode != 0:
            sys.exit(f"ppo_trl.py: {done.stderr}")
        (folder / "done").write_text(f"{time.time() - start:.1f}\n")
    return folder


def presets(world):
    flags = WORLD | {"learning-rate": RATE, "max-steps": UPDATES, "policy-every": 10}
    # The longest first, so that no core waits at the end.
    calls = {(f"--preset {name}", seed): lambda name=name, seed=seed: world.ppo(f"preset-{name}", seed, preset=name, **flags, **PRESETS[name])
             for name in PRESETS for seed in SEEDS}
    calls |= {("TRL 1.12", seed): lambda seed=seed: trl(world, seed) for seed in SEEDS}
    runs = {}
    for (name, _), folder in zip(calls, together(*calls.values())):
        runs.setdefault(name, []).append(folder)
    draw_curves(world, runs)
    print("| run | seed | score, first and last 5 updates | KL, last 5 | entropy, first and last 5 | length, first and last 5 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, folders in runs.items():
        for seed, folder in zip(SEEDS, folders):
            shown = []
            for key in PANELS:
                numbers = curve(folder, key)
                ends = [numbers[-5:]] if key == "objective/kl" else [numbers[:5], numbers[-5:]]
                shown.append(", ".join(f"{end.mean():.2f}" for end in ends))
            print(f"| {name} | {seed} | {' | '.join(shown)} |")
    at_equal_kl(world, runs["--preset trl"], runs["TRL 1.12"])
    held_out(world, runs)


def policies(folder):
    return {int(path.name.split("-")[1]): path for path in sorted((folder / "policies").iterdir())}


def at_equal_kl(world, ours, theirs):
    """Reward as a function of KL: every tenth update's policy of both on the same held-out prompts, by interpolation where both have been."""
    import matplotlib.pyplot as plot
    figure, axes = plot.subplots(figsize=(6, 4.2))

    def measured(seed):
        models = {f"{name}-{update}": path for name, folder in (("ours", ours[seed]), ("trl", theirs[seed])) for update, path in policies(folder).items()}
        rates, _ = world.evaluate(f"equal-kl-{seed}", seed, models, samples=2, temperature=0.7)
        return {name: [(found["kl_from_base"]["value"], found["mean_reward"]["value"]) for model, found in rates.items()
                       if model == "base" or model.startswith(name)] for name in ("ours", "trl")}

    differences = []
    print("\n| seed | KL of the last policies, ours and TRL's | their reward on held-out prompts | reward of ours less TRL's at equal KL, mean over the KL both have been at |")
    print("| --- | --- | --- | --- |")
    for seed, curves in zip(SEEDS, together(*(lambda seed=seed: measured(seed) for seed in SEEDS))):
        last = {name: curve[-1] for name, curve in curves.items()}
        for (name, curve), style, label in zip(curves.items(), ["o-", "s--"], ["rlhf --preset trl", "TRL 1.12"]):
            curve.sort()
            axes.plot([math.sqrt(max(kl, 0)) for kl, _ in curve], [reward for _, reward in curve], style, color=f"C{seed}", markersize=4,
                      label=f"{label}, seed {seed}", linewidth=1.2)
        grid = np.linspace(0, min(curve[-1][0] for curve in curves.values()), 50)
        difference = np.mean([np.interp(kl, *zip(*curves["ours"])) - np.interp(kl, *zip(*curves["trl"])) for kl in grid])
        differences.append(difference)
        print(f"| {seed} | {last['ours'][0]:.3f}, {last['trl'][0]:.3f} | {last['ours'][1]:.3f}, {last['trl'][1]:.3f} | {difference:+.3f} |")
    mean, width = interval(differences)
    print(f"\nMean over seeds {mean:+.3f} ± {width:.3f}.")
    axes.set(xlabel="√KL from the fine-tuned model, √nats", ylabel="reward on held-out prompts", title="Reward at equal KL")
    axes.legend(fontsize=8)
    save(figure, world.figures / "ppo_trl.svg")


def held_out(world, runs):
    names = {"TRL 1.12": "trl-1.12", "--preset trl": "preset-trl", "--preset n-plus": "preset-n-plus", "--preset instructgpt": "preset-instructgpt"}
    print("\n| policy after the last update | seed | reward | KL from sft | utility by the rule | hallucination | toxicity |\n| --- | --- | --- | --- | --- | --- | --- |")

    def measured(seed):
        models = {short: runs[name][seed] for name, short in names.items()}
        return world.evaluate(f"presets-evaluation-{seed}", seed, models, samples=2, temperature=0.7)[0]

    for seed, rates in zip(SEEDS, together(*(lambda seed=seed: measured(seed) for seed in SEEDS))):
        for name, found in rates.items():
            print(f"| {'sft' if name == 'base' else name} | {seed} | {with_interval(found['mean_reward'])} | {found['kl_from_base']['value']:.2f} | "
                  f"{with_interval(found['mean_utility'])} | {100 * found['hallucination_rate']['value']:.1f}% | "
                  f"{100 * found['toxicity_rate']['value']:.1f}% |")


def with_interval(estimate):
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def draw_curves(world, runs):
    import matplotlib.pyplot as plot
    figure, axes = plot.subplots(2, 2, figsize=(10, 7))
    for panel, (key, label) in zip(axes.flat, PANELS.items()):
        for (name, folders), style in zip(runs.items(), ["--", "-", "-.", ":"]):
            curves = np.array([smooth(curve(folder, key)) for folder in folders])
            updates = np.arange(1, curves.shape[1] + 1)
            line, = panel.plot(updates, curves.mean(0), style, label=name, linewidth=1.6)
            panel.fill_between(updates, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set(xlabel="update", ylabel=label)
        panel.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("PPO on the embedded world: mean and range of three seeds")
    save(figure, world.figures / "ppo_presets.svg")


def save(figure, path):
    import matplotlib
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "rlhf"
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def perplexity(world, name, model):
    """Of the held-out raw text."""
    path = world.output / f"perplexity-{name}.parquet"
    if not path.exists():
        subprocess.run([world.programs / "score", "--model", model, "--data", world.data / "pretrain-test.parquet", "--output", path, "--max-length", "512",
                        "--quiet"], check=True)
    table = pq.read_table(path)
    return math.exp(-sum(table["log_prob"].to_pylist()) / sum(table["tokens"].to_pylist()))


def mixed_and_not(world):
    """For each seed the pipeline's PPO, without and with the pretraining mix, and what four answers to each evaluation prompt are."""
    mix = PTX | {"ptx-data": world.data / "pretrain.parquet"}
    runs = [("ppo", seed, {}) for seed in SEEDS] + [("ppo-ptx", seed, mix) for seed in SEEDS]
    together(*(lambda run=run: world.ppo(run[0], run[1], **PIPELINE, **run[2]) for run in runs))

    def measured(seed):
        models = {name: world.output / f"{name}-{seed}" for name in ("ppo", "ppo-ptx")}
        return models, *world.evaluate(f"evaluation-{seed}", seed, models, samples=4)

    return together(*(lambda seed=seed: measured(seed) for seed in SEEDS))


def ptx(world):
    print("| seed | model | perplexity of raw text | rise over sft | reward | KL from sft | hallucination | toxicity |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
    rises = []
    for seed, (models, rates, _) in zip(SEEDS, mixed_and_not(world)):
        start = perplexity(world, f"sft-{seed}", world.sft(seed))
        for name, folder in ({"base": world.sft(seed)} | models).items():
            found, now = rates[name], perplexity(world, f"{name}-{seed}" if name != "base" else f"sft-{seed}", folder)
            if name != "base":
                rises.append((name, now - start))
            print(f"| {seed} | {'sft' if name == 'base' else name} | {now:.3f} | {now - start:+.3f} | {with_interval(found['mean_reward'])} | "
                  f"{found['kl_from_base']['value']:.2f} | {100 * found['hallucination_rate']['value']:.1f}% | "
                  f"{100 * found['toxicity_rate']['value']:.1f}% |")
    for name in ("ppo", "ppo-ptx"):
        mean, width = interval([rise for of, rise in rises if of == name])
        print(f"\n{name}: perplexity rises by {mean:.3f} ± {width:.3f}.")


PTX = {"ptx-coefficient": 0.05, "ptx-ratio": 1}


def best_of(world):
    """One and the best of four answers, chosen by the reward model, judged by the rule."""
    print("| seed | policy | answers sampled | utility by the rule | hallucination | toxicity | reward |\n| --- | --- | --- | --- | --- | --- | --- |")
    gains = []
    for seed, (_, _, answers) in zip(SEEDS, mixed_and_not(world)):
        utilities = {}
        for model in ("base", "ppo"):
            groups = {}
            for row in answers:
                if row["model"] == model:
                    groups.setdefault(row["prompt"], []).append(row)
            for count in (1, 4):
                chosen = [max(rows[:count], key=lambda row: row["reward"]) for rows in groups.values()]
                utilities[model, count] = np.array([row["utility"] for row in chosen])
                closed = [row["hallucinated"] for row in chosen if row["kind"] in ("question", "summary")]
                talk = [row["rude"] for row in chosen if row["kind"] == "provocation"]
                print(f"| {seed} | {'sft' if model == 'base' else model} | {count} | {estimate(utilities[model, count])} | {100 * np.mean(closed):.1f}% | "
                      f"{100 * np.mean(talk):.1f}% | {np.mean([row['reward'] for row in chosen]):.2f} |")
        gains.append({(count, other): estimate(utilities["ppo", count] - utilities["base", other]) for count, other in ((1, 1), (1, 4), (4, 4))})
    print("\n| seed | ppo less sft, one answer each | ppo's one answer less sft's best of 4 | ppo's best of 4 less sft's best of 4 |\n| --- | --- | --- | --- |")
    for seed, gain in zip(SEEDS, gains):
        print(f"| {seed} | {' | '.join(gain.values())} |")


def estimate(numbers):
    """Mean and 95% bootstrap interval over prompts."""
    draws = np.random.default_rng(0).choice(numbers, (2000, len(numbers))).mean(1)
    return f"{numbers.mean():.3f} [{np.quantile(draws, 0.025):.3f}, {np.quantile(draws, 0.975):.3f}]"


def over_optimisation(world):
    """Without a KL penalty and for long: the reward goes on rising, and what it stands for does not."""
    far = {"learning-rate": 3e-4, "batch-size": 64, "max-steps": 60, "epochs": 1, "ppo-epochs": 4, "kl-coefficient": 0, "policy-every": 10}
    run = world.ppo("far", 0, **PIPELINE | far)
    world.evaluate("far-evaluation", 0, {}, policies=run)
    (world.figures / "over_optimisation.svg").write_bytes((world.output / "far-evaluation" / "over_optimisation.svg").read_bytes())


PARTS = {"prepare": prepare, "presets": presets, "ptx": ptx, "best-of": best_of, "over-optimisation": over_optimisation}


def main(programs, data, output, *parts):
    world = World(programs, data, output)
    for part in parts or PARTS:
        print(f"\n## {part}\n", flush=True)
        PARTS[part](world)


if __name__ == "__main__":
    main(*sys.argv[1:])
