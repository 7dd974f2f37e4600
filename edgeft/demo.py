"""The demo: the ordinary commands, one after another, each in its own process, resumable between them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import EdgeftError, ExitCode
from edgeft.paths import write_json

BASE = "smollm2-135m"
DATA = "smart-home"


@dataclass(frozen=True)
class Stage:
    """One command of the demo. `arguments` are what a user would type after `edgeft`."""

    name: str
    title: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        return " ".join(("edgeft", *self.arguments))


class StageFailed(EdgeftError):
    """A stage ended with an error, which it has already printed."""

    def __init__(self, stage: Stage, code: int) -> None:
        super().__init__(
            f"the demo stopped at: {stage.command} (exit code {code})",
            "Run edgeft demo again to continue from this stage.",
        )
        try:
            self.exit_code = ExitCode(code)
        except ValueError:
            self.exit_code = ExitCode.FAILED


def stages(folder: Path) -> list[Stage]:
    """What the demo runs, writing below `folder`."""
    run, file = str(folder / "run"), str(folder / f"{DATA}-q4.gguf")
    resume = (folder / "run" / "config.toml").is_file()
    train = (
        ("train", "--resume", run)
        if resume
        else ("train", "--model", BASE, "--data", DATA, "--epochs", "2.2", "--out", run)
    )
    return [
        Stage("pull", "Fetch the base model", ("models", "pull", BASE)),
        Stage(
            "before", "Ask the base model, before training", ("eval", BASE, "--data", DATA, "--metrics", "exact-match")
        ),
        Stage("train", "Fine-tune it with QLoRA", train),
        Stage(
            "export",
            "Merge and quantize into one 4-bit file",
            ("export", run, "--to", "gguf-q4", "--out", file, "--no-verify"),
        ),
        Stage("verify", "Prove that the file is the trained model", ("verify", run, file, "--quick")),
        Stage(
            "after",
            "Ask the file, offline, in llama.cpp",
            ("eval", file, "--data", DATA, "--metrics", "exact-match,speed"),
        ),
    ]


def run_demo(folder: Path, announce: Callable[[Stage, bool], None]) -> dict[str, Any]:
    """Run what has not been run yet and return the figures of all stages.

    Args:
        folder: where the run, the file and `stages.json` go.
        announce: told of each stage, and whether an earlier demo already finished it.

    Raises:
        StageFailed: with the exit code of the command that failed.
    """
    record = folder / "stages.json"
    done: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for stage in stages(folder):
        announce(stage, stage.name in done)
        if stage.name not in done:
            started = time.monotonic()
            result = _run(stage)
            done[stage.name] = {"result": result, "seconds": round(time.monotonic() - started, 1)}
            write_json(record, done)
    return summary(done, folder)


def _run(stage: Stage) -> Any:
    """Run one command; its stderr goes straight to the terminal, its JSON comes back."""
    command = [sys.executable, "-m", "edgeft", *stage.arguments, "--json"]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise StageFailed(stage, process.returncode)
    return json.loads(process.stdout.splitlines()[-1])


def summary(done: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The demo's one object: every figure as the command that measured it reported it."""
    before, after = done["before"]["result"], done["after"]["result"]
    export, verify = done["export"]["result"], done["verify"]["result"]
    return {
        "exact_match_before": before["exact_match"],
        "exact_match_after": after["exact_match"],
        "nll_training_graph": verify["nll_training_graph"],
        "nll_merged": verify["nll_merged"],
        "nll_file": verify["nll_file"],
        "bytes": export["bytes"],
        "bits_per_weight": export["bits_per_weight"],
        "decode_tokens_per_s": after["decode_tokens_per_s"],
        "ttft_ms": after["ttft_ms"],
        "seconds": round(sum(stage["seconds"] for name, stage in done.items() if name != "pull"), 1),
        "examples": after["examples"],
        "file": export["path"],
        "stage_seconds": {name: stage["seconds"] for name, stage in done.items()},
    }
