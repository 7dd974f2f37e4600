"""The registry lists without importing, imports one, and refuses what is wrong with a message."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from edgeft.converters.ggml import load

from edgeft import plugins
from edgeft.doctor import plugin_reports
from edgeft.errors import PluginError


@dataclass
class Point:
    name: str
    value: str
    loader: Callable[[], Any]

    def load(self) -> Any:
        return self.loader()


def broken() -> Any:
    raise RuntimeError("libfoo is too old")


@pytest.fixture
def third_parties(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    points: list[Point] = []
    monkeypatch.setattr(plugins, "_entry_points", lambda family: points if family == "runtimes" else [])
    return points


def test_names_list_built_ins_and_third_parties_without_loading(third_parties: list[Point]) -> None:
    third_parties.append(Point("mine", "mine:runtime", broken))
    assert plugins.names("runtimes") == [*plugins.BUILT_IN["runtimes"], "mine"]


def test_a_name_claimed_twice_is_refused(third_parties: list[Point]) -> None:
    third_parties.append(Point("echo", "pirate:runtime", broken))
    with pytest.raises(PluginError, match=r"echo.*pirate:runtime"):
        plugins.names("runtimes")


def test_a_broken_plug_in_is_named_with_its_fault(third_parties: list[Point]) -> None:
    third_parties.append(Point("mine", "mine:runtime", broken))
    with pytest.raises(PluginError, match=r"mine.*libfoo is too old"):
        plugins.load("runtimes", "mine")


def test_an_incomplete_plug_in_is_told_what_it_lacks(third_parties: list[Point]) -> None:
    third_parties.append(Point("mine", "mine:runtime", object))
    with pytest.raises(PluginError, match="lacks name, supports, load"):
        plugins.load("runtimes", "mine")


def test_an_unknown_name_lists_the_known_ones(third_parties: list[Point]) -> None:
    with pytest.raises(PluginError) as caught:
        plugins.load("runtimes", "nope")
    assert "echo" in (caught.value.hint or "")


def test_doctor_says_what_each_plug_in_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = {"llama_cpp", "xllamacpp"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))
    load.cache_clear()
    try:
        found = {(report.family, report.name): report for report in plugin_reports()}
    finally:
        load.cache_clear()
    assert "quantizers" in (found["converters", "gguf"].error or "")
    for name in ("llama-cpp-python", "xllamacpp"):
        assert (found["runtimes", name].error, bool(found["runtimes", name].hint)) == (f"{name} is not installed", True)
    assert found["runtimes", "echo"].error is None
