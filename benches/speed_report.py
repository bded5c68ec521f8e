"""The Markdown of `benches/speed.py`."""

import re
import shlex
import statistics
import subprocess
import time
from pathlib import Path

BASELINES = ("TRL", "transformers", "llama.cpp")
SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
WHAT = {
    "sft-lora-9m": "`sft`, LoRA, 9 M", "sft-lora-52m": "`sft`, LoRA, 52 M", "sft-lora-135m": "`sft`, LoRA, 135 M", "sft-full-9m": "`sft`, full, 9 M",
    "reward-pairs": "`reward`, LoRA, 9 M, pairs", "reward-k8": "`reward`, LoRA, 9 M, 8 answers a prompt", "ppo": "`ppo`, LoRA, 9 M",
    "sample-9m": "`sample`, 9 M, 32 rows", "sample-52m": "`sample`, 52 M, 32 rows", "sample-135m-1": "`sample`, 135 M, 1 row",
    "sample-135m-1-q8": "`sample`, 135 M, 1 row, beside llama.cpp",
}

TRAINING = """\
Medians (ranges) of the runs. A step is one batch: of `sft` prompts and completions of 32 to 192 tokens each, loss on completions; of `reward` 16 pairs,
prompts of 64 and answers of 16 to 48 tokens; with 8 answers 2 prompts with 28 pairs each, which share the prompt, beside the same pairs one by one, of ours
("pairs") and of TRL; of `ppo` 32 prompts of 64 tokens, answers of 48, 4 passes. LoRA has rank 16 and alpha 32 on every linear layer. `sample` draws 64
tokens after 64. The first loss shows that both sides compute the same. Of TRL's settings the fastest on this machine was taken (last table)."""
LIMIT = """\
Products with the model's matrices alone, at the rate of PyTorch's products of the same shapes in f32 (`benches/speed_limit.py`); attention,
low-rank updates, norms, softmax and the optimizer are not in it, so that 100% is not to be reached where PyTorch's products run at the processor's limit. There, where
TRL's time is no more than twice that of the products, no program can be twice as fast with the same numbers. A share above 100% says that they do not."""
SEARCHED = """\
The shortest step after the first. A setting is given up in a step that takes 1.3 times the best one's (the first: 3 times)."""


def processor():
    """Name, cores, and which instruction sets of those that decide speed the processor has."""
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", info)
    flags = set((re.search(r"flags\s*: (.*)", info) or [" ", ""])[1].split())
    sets = ", ".join(f"{one}: {'yes' if one in flags else 'no'}" for one in SETS)
    return f"{name[1] if name else 'unknown processor'}; {sets}"


def table(header, lines):
    return "\n".join(["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |", *("| " + " | ".join(line) + " |" for line in lines), ""])


def number(value):
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def median_and_range(values):
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def ratio(one, other, key="rate"):
    """Of runs that were made in turn: the median of their ratios, and the range."""
    return median_and_range([a[key] / b[key] for a, b in zip(one, other)])


def sides_of(raw, row):
    """The runs of each side, without the search and the limit, in the order in which they were made."""
    found = {}
    for record in raw.of(row):
        if record["side"] not in ("search", "limit"):
            found.setdefault(record["side"], []).append(record)
    return found


def split(found):
    """Our sides, and the baseline's runs; nothing where the baseline was not run yet."""
    baseline = next((side for side in found if side in BASELINES), None)
    return [side for side in found if side != baseline] if baseline else [], found.get(baseline)


def setting(raw, row):
    """The baseline's fastest setting in words."""
    best = next(iter(raw.of(row, "search") + raw.of(row, "llama.cpp")))
    return best["numbers"] + ("" if row.startswith("sample") else f", {best['layout']}")


def beside(raw, rows):
    """Every row with a baseline: rates, and how many times the baseline's."""
    lines = []
    for name in WHAT:
        found = sides_of(raw, name)
        ours, baseline = split(found)
        for side in ours:
            losses = [runs[0].get("loss") for runs in (found[side], baseline)]
            # Of PPO each side has another loss, as answers are random.
            same = "" if name.startswith(("sample", "ppo")) else f"{losses[0]:.4f}, {losses[1]:.4f}"
            lines.append([f"{WHAT[name]}: {side}", rows[name].of, median_and_range([run["rate"] for run in found[side]]),
                          median_and_range([run["rate"] for run in baseline]), ratio(found[side], baseline), setting(raw, name), same])
    return table(["row", "a second", "rlhf", "TRL, transformers or llama.cpp", "times", "its setting", "first loss, both"], lines) if lines else ""


def memory(raw):
    lines = []
    for name in WHAT:
        found = sides_of(raw, name)
        ours, baseline = split(found)
        for side in ours if not name.startswith("sample") else []:
            lines.append([f"{WHAT[name]}: {side}", *(median_and_range([run["peak_mb"] for run in runs]) for runs in (found[side], baseline)),
                          ratio(found[side], baseline, "peak_mb")])
    return table(["row", "rlhf, MB", "TRL, MB", "share"], lines) if lines else ""


def limits(raw, rows):
    """What the products alone would take of the time of a step, beside both sides."""
    lines = []
    for name in WHAT:
        limited = raw.of(name, "limit")
        ours, baseline = split(sides_of(raw, name)) if limited else ([], [])
        if not ours:
            continue
        of = sides_of(raw, name)
        # Units of a step over units a second.
        unit = rows[name].unit or of[ours[0]][0]["tokens"] / (rows[name].size if name.startswith("sample") else 1)
        step = lambda runs: statistics.median(unit / run["rate"] for run in runs)
        least = statistics.median(run["limit_seconds"] for run in limited)
        exact = of[ours[0]]
        lines.append([f"{WHAT[name]}: {ours[0]}", f"{least:.3g}", number(statistics.median(run["gflops"] for run in limited)), f"{step(exact):.3g}",
                      f"{least / step(exact):.0%}", f"{step(baseline):.3g}", f"{least / step(baseline):.0%}"])
    header = ["row", "products alone, s", "their GFLOP/s", "rlhf, s/step", "products' share", "TRL or transformers, s/step", "products' share"]
    return table(header, lines) if lines else ""


def nucleus(raw):
    found = sides_of(raw, "nucleus")
    if not found:
        return ""
    lines = [[side, median_and_range([run["rate"] for run in runs]), ratio(runs, found["plain"])] for side, runs in found.items()]
    return table(["drawn", "tokens a second", "of plain"], lines)


def threads(raw, rows):
    lines = []
    for name in rows:
        found = sides_of(raw, name) if name.startswith("threads-") else {}
        for precision in ("f32", "bf16"):
            one, two = (found.get(f"{precision} {threads}") for threads in (1, 2))
            if not one or not two:
                continue
            t1, t2 = (min(run["step_seconds"] for run in runs) for runs in (one, two))
            share = lambda key: statistics.median(run[key] for run in two)
            lines.append([name.removeprefix("threads-"), precision, f"{t1:.4f}", f"{t2:.4f}", f"{t1 / t2:.2f}", f"{(2 * t2 - t1) / t1:.1%}",
                          f"{share('of_work'):.1%}", f"{share('of_time'):.1%}"])
    header = ["row", "--precision", "s/step, 1 thread", "2 threads", "speedup", "serial share of work, by wall time", "first thread alone, of work", "of time"]
    return table(header, lines) if lines else ""


def searched(raw):
    lines = []
    for name in WHAT:
        for record in raw.of(name, "search"):
            for one in record["tried"]:
                seconds = f"over {max(one['seconds']):.3f}, given up" if one["gave_up"] else f"{one['step_seconds']:.3f}"
                best = " (taken)" if (one["numbers"], one["layout"]) == (record["numbers"], record["layout"]) else ""
                lines.append([name, one["numbers"], one["layout"], f"{seconds}{best}"])
    return table(["row", "numbers", "layout", "s/step"], lines) if lines else ""


def versions(raw):
    found = {name: version for record in raw.records for name, version in record.get("versions", {}).items()}
    return ", ".join(f"{name} {version}" for name, version in found.items()) or "no baseline"


def report(raw, rows, command, given):
    done = subprocess.run([given.programs / "sft", "--version"], capture_output=True, text=True).stdout.strip()
    parts = ["# Speed beside TRL, transformers and candle", f"`python {shlex.join(command)}`, {time.strftime('%Y-%m-%d')}",
             f"{processor()}; {given.threads} threads on both sides; {given.runs} runs of each side, in turn; {done}; {versions(raw)}. "
             f"The measurements took {sum(record['took'] for record in raw.records) / 60:.0f} minutes."]
    if given.quick:
        parts.append("**A quick run: it shows that every row works, its numbers mean nothing.**")
    sampled = f"{rows['nucleus'].more['answers']} answers to each of {given.nucleus_prompts} prompts, of {rows['nucleus'].more['response_length']} tokens"
    sections = {
        "Training and sampling": (beside(raw, rows), TRAINING),
        "Peak memory": (memory(raw), "The most that the process held (`ru_maxrss`), Python's modules included, at the settings of the table above."),
        "Near the limit": (limits(raw, rows), LIMIT),
        "Nucleus sampling": (nucleus(raw), f"SmolLM2-135M's shape, vocabulary 49,152, {sampled}; probabilities that fall as language's do (`benches/speed_models.py`)."),
        "Threads and precision": (threads(raw, rows), "Our programs alone; the shortest steps. Shares as in `benches/scaling.py`."),
        "TRL's and transformers' settings": (searched(raw), SEARCHED),
    }
    for title, (body, words) in sections.items():
        if body:
            parts += [f"## {title}", words, body.strip()]
    for record in raw.of("criterion"):
        parts += ["## Candle's own operations", "`cargo bench --bench training_step`", f"```text\n{record['text'].strip()}\n```"]
    return "\n\n".join(parts).rstrip() + "\n"
