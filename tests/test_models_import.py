"""A GGUF becomes a Hugging Face directory that is the same model: weights, tokenizer, template, end tokens."""

import json
from pathlib import Path

import pytest
from test_verify import write_base

from edgeft.cli.main import main
from edgeft.errors import UnsupportedModel, WriteError
from edgeft.models import resolve
from edgeft.models.gguf_import import import_gguf
from edgeft.models.store import atomic_directory, read_sidecar
from edgeft.models.text import load_text_side
from edgeft.models.tokenizer_rules import apply_rule
from edgeft.paths import models_dir
from edgeft.verify.corpus import texts

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and m.gguf, which was exported from it."""
    folder = tmp_path_factory.mktemp("import")
    write_base(folder / "base", dtype="bfloat16")
    command = ["export", str(folder / "base"), "--to", "gguf-bf16", "--out", str(folder / "m.gguf"), "--no-verify"]
    assert main(command) == 0
    return folder


def test_export_and_import_give_the_model_back(made: Path) -> None:
    import torch
    from safetensors.torch import load_file

    found = resolve(str(made / "m.gguf"), want="hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (made / "base", found.path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_text_gives_the_same_tokens(made: Path) -> None:
    before, after = (
        load_text_side(folder) for folder in (made / "base", resolve(str(made / "m.gguf"), want="hf").path)
    )
    assert [after.tokenize(text) for _, text in texts()] == [before.tokenize(text) for _, text in texts()]
    assert after.eos_tokens == before.eos_tokens
    assert after.template == before.template


def test_an_import_is_kept_and_found_again(made: Path) -> None:
    first = resolve(str(made / "m.gguf"), want="hf").path
    stamp = (first / "config.json").stat().st_mtime_ns
    assert resolve(str(made / "m.gguf"), want="hf").path == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert first.parent == models_dir() / "imported"
    assert read_sidecar(first)["imported_from"] == "m.gguf"


def test_files_are_readable_by_others_and_name_no_folder_of_this_machine(made: Path) -> None:
    folder = resolve(str(made / "m.gguf"), want="hf").path
    modes = {file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert len(modes) == 1 and folder.stat().st_mode & 0o100
    assert not any(str(made) in file.read_text() for file in folder.glob("*.json"))


def test_import_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hf"
    assert main(["models", "import", str(made / "m.gguf"), "--out", str(out), "--dry-run"]) == 0
    assert not out.exists()
    assert main(["models", "import", str(made / "m.gguf"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(out)
    assert (out / "config.json").is_file()
    assert main(["models", "import", str(made / "m.gguf"), "--out", str(out)]) == 1
    assert str(out) in capsys.readouterr().err


def test_a_failed_import_leaves_nothing(made: Path, tmp_path: Path) -> None:
    """A GGUF of an architecture that transformers does not know."""
    other = tmp_path / "other.gguf"
    other.write_bytes((made / "m.gguf").read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(UnsupportedModel):
        import_gguf(other, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


def test_an_unknown_splitting_rule_is_refused_not_guessed() -> None:
    with pytest.raises(UnsupportedModel, match="new-rule"):
        apply_rule({"model": {}}, "gpt2", "new-rule")


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError), atomic_directory(tmp_path / "d") as folder:
        (folder / "half").write_text("x")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    with pytest.raises(WriteError), atomic_directory(tmp_path / "d") as folder:
        (folder / "again").write_text("x")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["whole"]


def test_a_model_of_the_hub_that_is_here_needs_no_network() -> None:
    """huggingface_hub's own cache layout, as a download leaves it."""
    repo = models_dir() / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    found = resolve("hf:org/name")
    assert (found.kind, found.path) == ("hf", snapshot)
    assert main(["models", "rm", "hf:org/name", "--yes"]) == 0
    assert not repo.exists()
