"""PPO on the world with random kills against the same run left alone: equal bytes at the end, and memory that does not grow.

    python benches/soak.py target/release data runs/soak [updates, 1500] [seed of the kills, 0]

Both runs go on side by side, on one thread each. One is killed (SIGKILL) every one to four minutes and goes on with --resume. Prints a Markdown report.
"""

import hashlib
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

SETTINGS = {"batch_size": 64, "response_length": 40, "max_length": 256, "learning_rate": 1e-4, "schedule": "constant", "epochs": 1000, "ppo_epochs": 2,
            "kl_controller": "adaptive", "ema_decay": 0.99, "threads": 1, "checkpoint_every": "1min", "sample_every": 100}
# Of a run's files, those that tell the time, or are no part of what comes out.
LEFT_OUT = {"metrics.jsonl", "settings.toml"}


def flags(settings):
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def run(program, output, **settings):
    subprocess.run([program, "--output", output, "--quiet", *flags(settings)], check=True)
    return output


class Memory(threading.Thread):
    """The resident memory of a process, every five seconds, while it lives."""

    def __init__(self, process):
        super().__init__(daemon=True)
        self.process, self.started, self.points = process, time.monotonic(), []
        self.start()

    def run(self):
        while self.process.poll() is None:
            try:
                text = Path(f"/proc/{self.process.pid}/status").read_text()
                kib = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS"))
                self.points.append((time.monotonic() - self.started, kib * 1024 / 1e6))
            except (OSError, StopIteration):
                return
            time.sleep(5)


def left_alone(command, output, found):
    started = time.monotonic()
    process = subprocess.Popen([*command, "--output", output], stderr=subprocess.DEVNULL)
    found["memory"] = Memory(process)
    found["status"] = process.wait()
    found["seconds"] = time.monotonic() - started


def killed(command, output, seed, found):
    chance = random.Random(seed)
    started, found["kills"], found["peaks"] = time.monotonic(), [], []
    while True:
        process = subprocess.Popen([*command, "--output", output, "--resume"], stderr=subprocess.DEVNULL)
        memory = Memory(process)
        try:
            found["status"] = process.wait(timeout=chance.uniform(60, 240))
            found["seconds"] = time.monotonic() - started
            return
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            found["kills"].append(time.monotonic() - started)
            found["peaks"].append(max(mb for _, mb in memory.points))


def files(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts and path.name not in LEFT_OUT and "tfevents" not in path.name]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def curve(folder):
    def is_timed(name):
        return name.startswith("seconds") or name in {"tokens_per_second", "peak_rss_mb"}

    return [{name: value for name, value in json.loads(line).items() if not is_timed(name)} for line in (folder / "metrics.jsonl").open()]


def main(programs, data, output, updates=1500, seed=0):
    programs, data, output = Path(programs).resolve(), Path(data), Path(output)
    rate = {"seed": 0, "max_length": 256}
    sft = run(programs / "sft", output / "sft", model=data / "base", data=data / "demonstrations.parquet", learning_rate=5e-4, batch_size=16, **rate)
    reward = run(programs / "reward", output / "reward", model=sft, data=data / "rankings.parquet", learning_rate=1e-3, **rate)
    command = [programs / "ppo", "--model", sft, "--reward-model", reward, "--data", data / "prompts.parquet", "--quiet", *flags(SETTINGS | {"max_steps": updates})]
    alone, disturbed = {}, {}
    first = threading.Thread(target=left_alone, args=(command, output / "alone", alone))
    first.start()
    killed(command, output / "killed", int(seed), disturbed)
    first.join()
    same = files(output / "alone") == files(output / "killed")
    same_curve = curve(output / "alone") == curve(output / "killed")
    after = [mb for seconds, mb in alone["memory"].points if seconds >= 300]
    quarter = max(len(after) // 4, 1)
    print(f"{updates} updates of {SETTINGS['batch_size']} answers, one thread each, side by side.\n")
    print(f"- left alone: {alone['seconds'] / 60:.0f} minutes, exit code {alone['status']}")
    print(f"- killed {len(disturbed['kills'])} times, after {', '.join(f'{seconds / 60:.1f}' for seconds in disturbed['kills'])} minutes: "
          f"{disturbed['seconds'] / 60:.0f} minutes, exit code {disturbed['status']}")
    print(f"- files ({len(files(output / 'alone'))}) {'equal byte for byte' if same else 'DIFFER'}; curves ({len(curve(output / 'alone'))} lines) "
          f"{'equal but for what tells time and memory' if same_curve else 'DIFFER'}")
    if after:
        print(f"- resident memory of the one left alone after five minutes: {min(after):.0f} to {max(after):.0f} MB; its first quarter at most {max(after[:quarter]):.0f} MB, its last "
              f"{max(after[-quarter:]):.0f} MB")
    # Longer answers take more memory, in a new process too: the peaks by updates tell that from a leak.
    for name in ("alone", "killed"):
        lines = [line for line in map(json.loads, (output / name / "metrics.jsonl").open()) if "peak_rss_mb" in line]
        tenth = max(len(lines) // 10, 1)
        parts = [lines[start:start + tenth] for start in range(0, len(lines), tenth)]
        print(f"- {name}, by tenths: tokens of an answer " + ", ".join(f"{sum(line['val/response_length'] for line in part) / len(part):.0f}" for part in parts)
              + "; peak in MB " + ", ".join(f"{max(line['peak_rss_mb'] for line in part):.0f}" for part in parts))
    print(f"- largest peak of the killed processes: {max(disturbed['peaks'], default=0):.0f} MB")
    sys.exit(0 if same and same_curve else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
