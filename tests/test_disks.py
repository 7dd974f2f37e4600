"""Real disks that are full or read-only: small memory file systems, which mounting needs root for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from edgeft.cli.main import main

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting needs root"
    ),
    pytest.mark.filterwarnings("ignore:.*deprecated.*"),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "base")


def test_training_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    disk: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}+1?", "completion": "{n + 1}"}}\n' for n in range(60)))
    run = disk / "run"
    settings = ("--epochs", "2", "--save-every", "1", "--rank", "8")
    assert main(["train", "--model", str(base), "--data", str(data), "--out", str(run), *settings]) == 1
    said = capsys.readouterr().err
    assert "no space left on the disk" in said
    assert "Traceback" not in said
    remount(disk, "size=50m")
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("target", ["gguf-q4", "gguf-f16"])
def test_exporting_onto_a_full_disk_leaves_nothing(target: str, disk: Path, base: Path) -> None:
    out = disk / "x.gguf"
    # The check before the first byte is what a user meets; here something else fills the disk after it.
    code = f"""
import shutil, sys
from edgeft.cli.main import main
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
sys.exit(main(["export", {str(base)!r}, "--to", {target!r}, "--no-verify", "--out", {str(out)!r}]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "no space left on the disk" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("verb", ["train", "export", "onnx", "lora", "prepare", "split", "imatrix"])
def test_a_read_only_disk_is_named(
    verb: str, disk: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remount(disk, "ro")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}+1?", "completion": "{n + 1}"}}\n' for n in range(40)))
    assert main(command(verb, disk, base, data)) == 1
    said = capsys.readouterr().err
    assert f"cannot write {disk}" in said
    assert "read-only" in said.lower()


@pytest.mark.parametrize("verb", ["onnx", "lora", "prepare", "imatrix"])
def test_a_full_disk_is_named(
    verb: str, disk: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}+1?", "completion": "{n + 1}"}}\n' for n in range(2000)))
    (disk / "full").write_bytes(bytes(60 << 10))
    assert main(command(verb, disk, base, data)) == 1
    said = capsys.readouterr().err
    assert str(disk) in said
    assert "no space left" in said or "MB free" in said
    assert [file.name for file in disk.iterdir()] == ["full"]


def command(verb: str, disk: Path, base: Path, data: Path) -> list[str]:
    """Writes onto the disk."""
    adapter = data.parent / "adapter"
    if verb == "lora":
        tiny.write_adapter(base, adapter)
    return {
        "train": ["train", "--model", str(base), "--data", str(data), "--out", str(disk / "run")],
        "export": ["export", str(base), "--no-verify", "--out", str(disk / "x.gguf")],
        "onnx": ["export", str(base), "--no-verify", "--to", "onnx-q4", "--out", str(disk / "x-onnx")],
        "lora": ["export", str(base), "--adapter", str(adapter), "--to", "gguf-lora", "--out", str(disk / "x.gguf")],
        "prepare": ["data", "prepare", str(data), "--out", str(disk / "data")],
        "split": ["data", "split", str(data), "--out", str(disk / "data")],
        "imatrix": ["imatrix", str(base), "--data", str(data), "--out", str(disk / "i.gguf")],
    }[verb]
