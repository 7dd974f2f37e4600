"""Settings: order, origin, and errors that name the file and the key."""

import json
from pathlib import Path

import pytest

from edgeft import config
from edgeft.cli.main import main
from edgeft.errors import ConfigError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project" / "deep"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder.parent


def test_each_source_beats_the_one_below(project: Path, user_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.load()["run.seed"] == config.Value(0, "default")
    user = user_folders / "config.toml"
    user.write_text("[run]\nseed = 1\nthreads = 3\n")
    assert config.load()["run.seed"] == config.Value(1, str(user))
    own = project / "edgeft.toml"
    own.write_text("[run]\nseed = 2\n")
    assert config.load()["run.seed"] == config.Value(2, str(own))
    monkeypatch.setenv("EDGEFT_RUN_SEED", "3")
    values = config.load()
    assert values["run.seed"] == config.Value(3, "EDGEFT_RUN_SEED")
    assert values["run.threads"] == config.Value(3, str(user))


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("[run]\nsede = 1\n", ["run.sede", "run.seed"]),
        ("[run]\nseed = 'one'\n", ["run.seed", "int"]),
        ("[run]\nthreads = -1\n", ["run.threads", "at least 0"]),
        ("[train]\nmethod = 'magic'\n", ["train.method", "qlora"]),
        ("[run\n", ["edgeft.toml", "line 1"]),
        ("[models]\noffline = 1\n", ["models.offline", "bool"]),
    ],
)
def test_a_bad_file_is_named_with_its_key(
    project: Path, text: str, fragments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "edgeft.toml").write_text(text)
    assert main(["config", "validate"]) == 2
    shown = capsys.readouterr().err
    assert "edgeft.toml" in shown and all(fragment in shown for fragment in fragments)


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFT_RUN_TEMPERATURE", "warm")
    with pytest.raises(ConfigError, match="EDGEFT_RUN_TEMPERATURE"):
        config.load()


def test_whole_numbers_do_for_decimal_settings(project: Path) -> None:
    (project / "edgeft.toml").write_text("[run]\ntemperature = 1\n")
    assert config.load()["run.temperature"].value == 1.0


def test_show_prints_every_key_with_its_origin(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == set(config.KEYS)
    assert shown["run.runtime"] == {"value": "auto", "origin": "default"}
