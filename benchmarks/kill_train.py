"""Twenty kills of `edgeft train` at random moments: every run must end exactly where an undisturbed one ends.

    python benchmarks/kill_train.py [--json] [--kills 20] [--seed 0]

A tiny random Llama is trained once undisturbed. Then runs are started and killed (SIGKILL) at random moments, from
the first import to the last write, and resumed until they finish. Every line of metrics.jsonl that does not measure
time or memory, and every byte of the adapter, must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
SETTINGS = "--epochs 6 --micro-tokens 256 --batch-tokens 512 --save-every 3 --eval-every 10 --dropout 0.1 --patience 0"
TIMINGS = ("tokens_per_s", "memory_peak_bytes", "elapsed_s", "left_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.kills, options.seed)
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:<28} {value}" for name, value in figures.items()))


def measure(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    import tiny

    tiny.write_model(folder / "base")
    write_data(folder / "data")
    started = time.monotonic()
    finish(start(folder, "undisturbed", resume=False))
    whole_s = time.monotonic() - started
    expected = curve(folder / "undisturbed"), adapter(folder / "undisturbed")
    generator, done, runs, same_loss, same_bytes, moments = random.Random(seed), 0, 0, 0, 0, []
    while done < kills:
        name, runs = f"run-{runs}", runs + 1
        while not (folder / name / "manifest.json").is_file():
            process = start(folder, name, resume=(folder / name / "config.toml").is_file())
            if done == kills:
                finish(process)
                continue
            delay = generator.uniform(0, whole_s)
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                done += 1
                moments.append(last_step(folder / name))
        same_loss += curve(folder / name) == expected[0]
        same_bytes += adapter(folder / name) == expected[1]
    return {
        "kills": done,
        "runs": runs,
        "runs_with_the_same_curve": same_loss,
        "runs_with_the_same_adapter": same_bytes,
        "steps": expected[0][-1]["step"],
        "killed_at_steps": " ".join(map(str, moments)),
        "undisturbed_s": round(whole_s, 1),
    }


def start(folder: Path, name: str, resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgeft", "train"]
    if resume:
        command += ["--resume", str(folder / name)]
    else:
        command += ["--model", str(folder / "base"), "--data", str(folder / "data"), "--out", str(folder / name)]
        command += SETTINGS.split()
    # One thread: the model is tiny, and a fixed number of threads makes every sum the same to the last bit.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EDGEFT_HOME": str(folder / "home")}
    errors = (folder / f"{name}.log").open("ab")
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=errors, env=environment, cwd=folder, start_new_session=True
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"{' '.join(map(str, process.args))} ended with {process.returncode}")  # type: ignore[arg-type]


def curve(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def last_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    complete = file.read_text().splitlines()[:-1] if file.is_file() else []
    return json.loads(complete[-1])["step"] if complete else 0


def write_data(folder: Path) -> None:
    """Sums to learn: a hundred examples of different lengths."""
    folder.mkdir()
    generator = random.Random(0)
    for split, count in (("train", 100), ("valid", 12), ("test", 12)):
        with (folder / f"{split}.jsonl").open("w") as lines:
            for _ in range(count):
                a, b = generator.randint(0, 99), generator.randint(0, 99)
                prompt = f"add {a} {'x' * generator.randint(0, 20)} {b}"
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": str(a + b)}]
                lines.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    main()
