"""Settings: one schema from which flags, files and forms are made, and where each value came from.

Order: flag > environment (`EDGEFT_…`) > project `edgeft.toml` > user file > default.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import ConfigError
from edgeft.paths import user_config_file

PROJECT_FILE = "edgeft.toml"


@dataclass(frozen=True)
class Key:
    """One setting. `name` is "section.key"; the environment variable is EDGEFT_SECTION_KEY."""

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None

    @property
    def variable(self) -> str:
        return "EDGEFT_" + self.name.replace(".", "_").replace("-", "_").upper()


@dataclass(frozen=True)
class Value:
    value: Any
    origin: str
    """The word "default", a file path, or the name of an environment variable."""


SCHEMA: tuple[Key, ...] = (
    Key("run.runtime", str, "auto", "Runtime that loads a model: auto, or a name from `edgeft doctor`."),
    Key("run.context", int, 0, "Context length in tokens; 0: the model's own, at most 4096.", minimum=0),
    Key("run.threads", int, 0, "Threads for decoding; 0: one per physical core.", minimum=0),
    Key("run.threads-batch", int, 0, "Threads for the prompt; 0: all cores.", minimum=0),
    Key("run.max-tokens", int, 512, "Longest answer in tokens.", minimum=1),
    Key("run.temperature", float, 0.0, "0 is greedy; higher is more varied.", minimum=0),
    Key("run.top-k", int, 40, "Sample among this many tokens; 0: all.", minimum=0),
    Key("run.top-p", float, 0.95, "Sample among the most probable tokens that add up to this.", minimum=0),
    Key("run.min-p", float, 0.05, "Drop tokens below this share of the most probable one.", minimum=0),
    Key("run.repeat-penalty", float, 1.0, "Above 1 discourages repetition.", minimum=0),
    Key("run.seed", int, 0, "Seed of the sampler."),
    Key("run.kv-type", str, "auto", "How keys and values are stored; q8_0 halves them.", ("auto", "f16", "q8_0")),
    Key("run.lookup", str, "auto", "Guess tokens from the conversation, check many at once.", ("auto", "on", "off")),
    Key("run.mmap", str, "auto", "Map the model's file instead of copying it.", ("auto", "on", "off")),
    Key("run.repack", str, "auto", "Copy weights into the order fast prompts want.", ("auto", "on", "off")),
    Key("run.flash-attention", str, "auto", "Attention in one pass; fast or slow by package.", ("auto", "on", "off")),
    Key(
        "run.overflow",
        str,
        "refuse",
        "A conversation longer than the context: an error, or its oldest turns are left out.",
        ("refuse", "truncate-oldest"),
    ),
    Key(
        "run.state",
        str,
        "on",
        "Keep system prompts' keys and values on disk, so that the next start is sooner.",
        ("on", "off"),
    ),
    Key("train.method", str, "qlora", "What is trained.", ("qlora", "lora", "full", "gguf")),
    Key("train.rank", int, 16, "Rank of the adapter.", minimum=1),
    Key("train.learning-rate", float, 0.0, "0: chosen by method.", minimum=0),
    Key("export.target", str, "gguf-q4", "Export target when --to is not given."),
    Key("models.offline", bool, False, "Never use the network; for hf: models HF_HUB_OFFLINE does the same."),
)
KEYS: Mapping[str, Key] = {key.name: key for key in SCHEMA}


def load(start: Path | None = None) -> dict[str, Value]:
    """Every setting with the place its value came from.

    Args:
        start: folder whose `edgeft.toml` (or its nearest parent's) is the project file.

    Raises:
        ConfigError: an unreadable file, an unknown key, or a value of the wrong type.
    """
    values = {key.name: Value(key.default, "default") for key in SCHEMA}
    for file in config_files(start):
        if file.is_file():
            values.update(_read(file))
    for key in SCHEMA:
        if (text := os.environ.get(key.variable)) is not None:
            values[key.name] = Value(_parse(key, text, key.variable), key.variable)
    return values


def config_files(start: Path | None = None) -> list[Path]:
    """Files that are read, weakest first; they need not exist."""
    folder = (start or Path.cwd()).resolve()
    project = next((parent for parent in (folder, *folder.parents) if (parent / PROJECT_FILE).is_file()), folder)
    return [user_config_file(), project / PROJECT_FILE]


def validate(file: Path) -> None:
    """Raises: ConfigError."""
    _read(file)


def _read(file: Path) -> dict[str, Value]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    return {name: Value(_check(name, value, str(file)), str(file)) for name, value in _flatten(document)}


def _flatten(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in document.items():
        path = f"{prefix}{name}"
        flat += _flatten(value, path + ".") if isinstance(value, dict) else [(path, value)]
    return flat


def _check(name: str, value: Any, origin: str) -> Any:
    key = KEYS.get(name)
    if key is None:
        near = difflib.get_close_matches(name, KEYS, n=1)
        raise ConfigError(
            f"{origin}: unknown key {name!r}",
            f"Did you mean {near[0]!r}?" if near else "edgeft config show lists the keys.",
        )
    if key.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not key.type:
        raise ConfigError(f"{origin}: {name} must be {key.type.__name__}, not {value!r}")
    if key.choices and value not in key.choices:
        raise ConfigError(f"{origin}: {name} must be one of {', '.join(key.choices)}, not {value!r}")
    if key.minimum is not None and isinstance(value, (int, float)) and value < key.minimum:
        raise ConfigError(f"{origin}: {name} must be at least {key.minimum:g}, not {value!r}")
    return value


_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _parse(key: Key, text: str, origin: str) -> Any:
    try:
        value = _TRUTH[text.lower()] if key.type is bool else key.type(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{origin}: {key.name} must be {key.type.__name__}, not {text!r}") from None
    return _check(key.name, value, origin)
