"""Profiles of devices: each says where its figures are from; a wrong one is refused by file and key."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from edgeft.devices.catalogue import source as catalogue

from edgeft import device
from edgeft.cli.main import main
from edgeft.device import Figure, load_profile, parse_profile, write_profile
from edgeft.errors import ConfigError, UsageError

PROFILE = """
name = "board"
title = "A board"
architecture = "aarch64"
python = "3.13"
glibc = "2.41"
system = "Debian 13"
cpu = "4 cores"
isa = ["asimd"]
cores = { value = 4, basis = "datasheet", source = "page" }
decode_threads = { value = 4, basis = "estimate", source = "all" }
memory = { value = 2e9, basis = "datasheet", source = "page" }
reserve = { value = 3e8, basis = "estimate", source = "guess" }
bandwidth = { value = 3.3, basis = "measured", source = "here" }
prefill = { value = 22, basis = "measured", source = "here" }
"""


@pytest.mark.parametrize("name", catalogue.names())
def test_profiles_that_come_with_edgeft_are_whole(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.architecture in ("aarch64", "arm64", "x86_64")
    assert profile.usable > 2e8
    assert 0 < profile.bandwidth.value < 200
    assert bool(profile.python) == bool(profile.glibc)


def test_the_devices_of_the_promise_are_there() -> None:
    boards = {"rpi-zero-2-w", "rpi4-2g", "rpi4-4g", "rpi4-8g", "rpi5-4g", "rpi5-8g", "rpi5-16g"}
    others = {"jetson-orin-nano-8g", "n100-16g", "laptop-x86-8g", "laptop-x86-16g", "macbook-air-m2-8g"}
    phones = {"android-flagship", "android-midrange", "iphone-15-pro"}
    assert boards | others | phones <= set(device.names())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "board"', "", "name must be a text; it is missing"),
        ("isa = ", "isaa = ", "unknown key isaa"),
        ("value = 3.3", 'value = "fast"', r"bandwidth.value must be a number above 0, not 'fast'"),
        ("value = 3.3", "value = -1", r"bandwidth.value must be a number above 0"),
        (
            'basis = "measured", source = "here" }\nprefill',
            'basis = "heard", source = "x" }\nprefill',
            "bandwidth.basis",
        ),
        ('source = "guess"', 'source = ""', "reserve.source must say where"),
        ('source = "guess"', 'sauce = "guess"', r"unknown key reserve\.sauce"),
        ("value = 3e8", "value = 3e9", "not less than memory"),
        ('["asimd"]', '"asimd"', "isa must be a list of texts"),
        ("= ", "", "board.toml: "),
    ],
)
def test_a_wrong_profile_is_refused_by_file_and_key(old: str, new: str, message: str) -> None:
    assert old in PROFILE
    with pytest.raises(ConfigError, match=message) as caught:
        parse_profile(PROFILE.replace(old, new, 1), "board.toml")
    assert "board.toml" in caught.value.message


def test_a_profile_comes_back_as_it_was_written(tmp_path: Path) -> None:
    profile = parse_profile(PROFILE.replace('"A board"', r'"A \"board\"\\\n"'), "x")
    write_profile(profile, tmp_path / "board.toml")
    assert load_profile(str(tmp_path / "board.toml")) == profile
    assert profile.bandwidth == Figure(3.3, "measured", "here")
    assert profile.prefill_repacked is None


def test_the_user_adds_profiles_of_their_own(user_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (user_folders / "devices").mkdir()
    (user_folders / "devices" / "board.toml").write_text(PROFILE)
    assert main(["devices", "show", "board", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["architecture"], shown["bandwidth"]["source"]) == ("aarch64", "here")


def test_an_unknown_device_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="no device 'rpi5-8'") as caught:
        load_profile("rpi5-8")
    assert caught.value.hint == "Did you mean rpi5-8g?"
    with pytest.raises(UsageError, match="not measured") as caught:
        load_profile("local")
    assert caught.value.hint == "edgeft devices probe"


def test_devices_need_no_torch() -> None:
    code = "from edgeft.cli.main import main; main(['devices', 'list', '--json']); import sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(result.stdout.splitlines()[-1].split())
