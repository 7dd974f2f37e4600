"""llama.cpp's threads must not spin a busy machine away; how they wait is fixed when their library is loaded."""

import os
from pathlib import Path

import pytest

from edgeft.openmp import short_spins

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu clflushopt\n\nprocessor\t: 1\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    file = tmp_path / "cpuinfo"
    file.write_text(INTEL)
    return file


def test_spins_are_short_while_the_library_is_loaded_and_only_then(cpuinfo: Path) -> None:
    with short_spins(cpuinfo=cpuinfo):
        assert os.environ["GOMP_SPINCOUNT"] == "1000"
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_environment_is_restored_when_loading_fails(cpuinfo: Path) -> None:
    with pytest.raises(OSError, match="broken"), short_spins(cpuinfo=cpuinfo):
        raise OSError("broken")
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(("variable", "value"), [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "active")])
def test_what_the_user_has_set_stays(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    before = dict(os.environ)
    with short_spins(cpuinfo=cpuinfo):
        assert dict(os.environ) == before


@pytest.mark.parametrize(
    "text",
    [INTEL.replace(" clflushopt", ""), INTEL.replace("GenuineIntel", "AuthenticAMD"), "model : Cortex-A76\n", None],
)
def test_processors_with_short_pauses_are_left_alone(cpuinfo: Path, text: str | None) -> None:
    cpuinfo.write_text(text) if text else cpuinfo.unlink()
    with short_spins(cpuinfo=cpuinfo):
        assert "GOMP_SPINCOUNT" not in os.environ
