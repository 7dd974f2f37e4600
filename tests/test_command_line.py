"""What every command promises: exit codes, streams, and errors a person can act on."""

import subprocess
import sys

import pytest

from edgeft.cli.main import VERBS, main
from edgeft.errors import EXIT_CODE_HELP, ExitCode, MissingDependency, require


def test_help_lists_every_verb_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == ExitCode.OK
    shown = " ".join(capsys.readouterr().out.split())
    assert all(verb in shown for verb in VERBS)
    assert all(f"{code.value} {text}" in shown for code, text in EXIT_CODE_HELP.items())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == ExitCode.OK
    assert f"Usage: edgeft {verb}" in capsys.readouterr().out


def test_a_misspelt_verb_is_a_usage_error_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert "train" in captured.err and captured.out == ""


def test_no_arguments_shows_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == ExitCode.USAGE
    assert "Commands:" in capsys.readouterr().err


def test_an_unknown_model_is_one_clear_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no-such-model", "hello"]) != ExitCode.OK
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "no-such-model" in captured.err
    assert "Traceback" not in captured.err and captured.out == ""


def test_a_missing_extra_names_the_install_line() -> None:
    with pytest.raises(MissingDependency) as caught:
        require("a_module_nobody_has", "train")
    assert caught.value.exit_code == ExitCode.MISSING
    assert caught.value.hint == "pip install 'edgeft[train]'"


def test_a_reader_that_goes_away_is_not_an_error() -> None:
    command = f"{sys.executable} -m edgeft config show --json | head -c 1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr
