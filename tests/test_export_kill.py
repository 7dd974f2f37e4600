"""Kill -9 at random moments of an export: nothing under the final name but a whole file."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40 million weights: the export takes a good second."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "head_dim": 128}
    return tiny.write_model(tmp_path_factory.mktemp("kill") / "base", dtype="bfloat16", **sizes)


def start(base: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgeft", "export", base, "--to", "gguf-q4_k_m", "--out", out, "--no-verify"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_export_leaves_nothing_that_looks_finished(kills: int, base: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    started = time.monotonic()
    assert start(base, whole).wait() == 0
    duration, expected = time.monotonic() - started, hashlib.sha256(whole.read_bytes()).hexdigest()
    out, generator, unfinished = tmp_path / "x.gguf", random.Random(7), 0
    for _ in range(kills):
        process = start(base, out)
        time.sleep(generator.uniform(0.1, 1.0) * duration)
        process.kill()
        process.wait()
        if out.exists():
            # It was finished before it was killed.
            assert hashlib.sha256(out.read_bytes()).hexdigest() == expected
            out.unlink()
        else:
            unfinished += 1
        # Each export also removes what the one before it left.
        assert len(list(tmp_path.glob(".x.gguf.*.tmp"))) <= 1
    assert unfinished > kills // 2
    assert start(base, out).wait() == 0
    assert hashlib.sha256(out.read_bytes()).hexdigest() == expected
    assert list(tmp_path.glob(".*")) == []


def test_ctrl_c_stops_at_once_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    for _ in range(5):
        process = start(base, tmp_path / "x.gguf")
        while process.poll() is None and not list(tmp_path.glob(".x.gguf.*.tmp")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        if process.wait(timeout=30) != 0:
            break
        (tmp_path / "x.gguf").unlink()  # a busy machine let it finish before the signal: once more
        (tmp_path / "x.gguf.json").unlink()
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
