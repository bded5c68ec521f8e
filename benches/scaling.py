"""How the training programs scale from one thread to two: time of a steady step and its serial share, by wall time and by processor time.

    python benches/scaling.py target/release runs/scaling [pairs of runs, 3] [program: sft-lora | sft-full | reward-lora | ppo-lora]

Programs run on data/base and data/, with one thread and two in turn. The time of a step is the shortest of that step in all runs; steps are the same on
any number of threads. From T1 and T2 the serial share of the work is (2 T2 - T1) / T1 (Amdahl 1967). Where the machine is busy that says little, but
the first thread does its part of what is parallel and everything else: what it works more than the other, main - other, is done by it alone, of the
work main + other and of the time main; at least that, as the other turns a while before it sleeps. Linux, Python's standard library. Prints a Markdown
table; compare its ratios, not its seconds.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"model": ROOT / "data/base", "quiet": None}
TRAINING = SHARED | {"evaluation-share": 0, "evaluate-every": 1000000}
SFT = TRAINING | {"data": ROOT / "data/demonstrations.parquet", "max-steps": 60}
REWARD = TRAINING | {"data": ROOT / "data/rankings.parquet", "normalize": "none", "method": "lora"}
# Flags of each program, and its first steps that are left out: memory is taken and threads are started in them.
PROGRAMS = {
    "sft-lora": ("sft", SFT | {"method": "lora"}, 10),
    "sft-full": ("sft", SFT, 10),
    "reward-lora": ("reward", REWARD | {"max-steps": 40}, 8),
    "ppo-lora": ("ppo", SHARED | {"data": ROOT / "data/prompts.parquet", "method": "lora", "max-steps": 6}, 2),
}


def command(program, output, flags):
    given = [word for name, value in flags.items() for word in ([f"--{name}"] if value is None else [f"--{name}", str(value)])]
    return [str(program), "--output", str(output), *given]


def run_once(program, output, flags):
    shutil.rmtree(output, ignore_errors=True)
    done = subprocess.run(command(program, output, flags), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{program}: {done.stderr}")
    return output


def state(pid):
    """Nanoseconds of processor time of the main thread and of all others, and page faults of all."""
    main = int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0])
    threads = set(os.listdir(f"/proc/{pid}/task")) - {str(pid)}
    others = sum(int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0]) for thread in threads)
    faults = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[7])
    return main, others, faults


def measure(program, output, flags, skipped):
    """Seconds of every steady step; the serial shares of work and time by processor time, the cores used, and the page faults of a step."""
    shutil.rmtree(output, ignore_errors=True)
    process = subprocess.Popen(command(program, output, flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics, samples, size = output / "metrics.jsonl", [], 0
    while process.poll() is None:
        now = metrics.stat().st_size if metrics.exists() else 0
        if now != size:
            size = now
            try:
                samples.append((len(metrics.read_text().splitlines()), time.monotonic(), *state(process.pid)))
            except (FileNotFoundError, ProcessLookupError):
                break
        time.sleep(0.005)
    process.wait()
    if process.returncode != 0:
        sys.exit(f"{program}: {process.stderr.read()}")
    at = [line["seconds"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    steady = [sample for sample in samples if skipped <= sample[0] < len(at)]
    (first, *before), (last, *after) = steady[0], steady[-1]
    wall, main, others, faults = (after - before for before, after in zip(before, after))
    alone = max(main - others, 0)
    shares = (alone / (main + others), alone / main, (main + others) / 1e9 / wall, faults / (last - first))
    return [end - start for start, end in zip(at[skipped - 1:], at[skipped:])], shares


def compare(program, output, flags, skipped, pairs):
    steps, states = {1: [], 2: []}, {1: [], 2: []}
    for pair in range(pairs):
        for threads in (1, 2) if pair % 2 == 0 else (2, 1):
            seconds, found = measure(program, output, flags | {"threads": threads}, skipped)
            steps[threads].append(seconds)
            states[threads].append(found)
    one, two = (sum(map(min, zip(*steps[threads]))) / len(steps[threads][0]) for threads in (1, 2))
    of_work, of_time, used, faults = (sorted(column)[len(column) // 2] for column in zip(*states[2]))
    serial = f"{(2 * two - one) / one:.1%}"
    return [f"{one:.4f}", f"{two:.4f}", f"{one / two:.2f}", serial, f"{of_work:.1%}", f"{of_time:.1%}", f"{used:.2f}", f"{faults:.0f}"]


def processor():
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores"


def main(programs, output, pairs=3, *wanted):
    programs, output = Path(programs).resolve(), Path(output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    print(f"{processor()}; the shortest of {pairs} runs\n")
    print("| program | s/step, 1 thread | 2 threads | speedup | serial share of work, by wall time | first thread alone, of work | of time | cores used | page faults a step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in wanted or PROGRAMS:
        program, flags, skipped = PROGRAMS[name]
        if program == "ppo":
            reward = output / "reward-model"
            if not (reward / "finished.json").exists():
                run_once(programs / "reward", reward, REWARD | {"max-steps": 2})
            flags = flags | {"reward-model": reward}
        row = compare(programs / program, output / name, flags, skipped, int(pairs))
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
