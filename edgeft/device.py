"""What a device is: cores, memory, speed, its system. One TOML file each, every figure with its source."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgeft import plugins
from edgeft.errors import ConfigError, UsageError

BASES = {"measured": 0.15, "derived": 0.25, "datasheet": 0.35, "estimate": 0.5}
"""How a figure was found -> how far a speed that rests on it may be off, as a share. The first two are what
`benchmarks/forecast.py` finds for figures of the same device and of a device of the same kind; the others are wide on
purpose."""


@dataclass(frozen=True)
class Figure:
    """A number and where it is from."""

    value: float
    basis: str
    source: str


@dataclass(frozen=True)
class Kernel:
    """What the measured runtime makes of weights of one type on a device."""

    type: str
    decode: Figure
    """GB/s (1e9) at which weights are read while decoding."""
    prefill: Figure
    """GOPS on a prompt."""
    repacked: bool = False
    """Whether they are copied into another order when they are loaded."""


@dataclass(frozen=True)
class DeviceProfile:
    """A device, or a class of devices."""

    name: str
    title: str
    architecture: str
    """As `uname -m` says: aarch64, x86_64, arm64."""
    python: str
    """Version of the usual system's Python, "3.13"; empty where there is none."""
    glibc: str
    """Version of its C library, "2.41"; empty where it has another one."""
    cpu: str
    isa: tuple[str, ...]
    """Instruction sets that matter for inference, as Linux' cpuinfo names them."""
    system: str
    """The usual system, which `python` and `glibc` are of."""
    cores: Figure
    decode_threads: Figure
    memory: Figure
    """Bytes of RAM."""
    reserve: Figure
    """Bytes of it that the system and its services keep."""
    bandwidth: Figure
    """GB/s (1e9) at which weights are read while decoding."""
    prefill: Figure
    """Billions of operations per second (GOPS) on a prompt, with plain kernels: 2 x parameters x tokens per second."""
    prefill_repacked: Figure | None = None
    """The same with weights repacked for the kernels; None: this processor has no such kernels."""
    storage: Figure | None = None
    """MB/s (1e6) at which a file is read."""
    attention: Figure | None = None
    """GB/s at which keys and values that are kept are gone through, once for every query head."""
    attention_wide: Figure | None = None
    """The same where a token's keys are many bytes (`edgeft.forecast.speed.ROWS`), and the heads' parts of them lie far
    from each other. None: `attention` holds for every width."""
    overhead: Figure | None = None
    """Microseconds per layer and token, whatever its size: small operations, and threads that wait for each other."""
    base: Figure | None = None
    """Bytes that Python and the runtime take without a model."""
    runtime: str = ""
    """The runtime that was measured; empty where figures are of llama.cpp in general."""
    flash_attention: bool = True
    """Whether that runtime computes attention without a table of scores."""
    kernels: tuple[Kernel, ...] = ()
    """What was measured type by type; other types take `bandwidth` and `prefill`."""
    file: str = field(default="", compare=False)

    @property
    def usable(self) -> int:
        """Bytes a model and its runtime may take."""
        return int(self.memory.value - self.reserve.value)

    def kernel(self, type_: str) -> Kernel | None:
        """That of a type; None: it was not measured."""
        return next((kernel for kernel in self.kernels if kernel.type == type_), None)

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, "isa": list(self.isa), "kernels": list(values["kernels"])}


_TEXTS = ("name", "title", "architecture", "python", "glibc", "cpu", "system")
_MAY_BE_EMPTY = ("python", "glibc", "runtime")
_REQUIRED = ("cores", "decode_threads", "memory", "reserve", "bandwidth", "prefill")
_OPTIONAL = ("prefill_repacked", "storage", "attention", "attention_wide", "overhead", "base")
_FIGURES = (*_REQUIRED, *_OPTIONAL)
_OTHERS = ("isa", "runtime", "flash_attention", "kernels")

UNITS = {
    "memory": "bytes",
    "reserve": "bytes",
    "bandwidth": "GB/s",
    "prefill": "GOPS",
    "prefill_repacked": "GOPS",
    "storage": "MB/s",
    "attention": "GB/s",
    "attention_wide": "GB/s",
    "overhead": "µs/layer",
    "base": "bytes",
}
"""Of the figures; the others are counts."""


def parse_profile(text: str, file: str) -> DeviceProfile:
    """A profile from its TOML.

    Raises:
        ConfigError: not TOML, or a key that is missing, unknown or of a wrong kind; names `file` and the key.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from error
    _check_keys(document, {*_TEXTS, *_FIGURES, *_OTHERS}, file)
    texts = {key: _text(document, key, file) for key in _TEXTS}
    figures = {key: _figure(document, key, file) for key in _FIGURES if key in _REQUIRED or key in document}
    profile = DeviceProfile(
        **texts,  # type: ignore[arg-type]
        isa=_names(document, file),
        runtime=_text({"runtime": "", **document}, "runtime", file),
        flash_attention=_flag(document, "flash_attention", True, file),
        kernels=_kernels(document, file),
        file=file,
        **figures,  # type: ignore[arg-type]
    )
    if profile.usable <= 0:
        raise ConfigError(f"{file}: reserve: {profile.reserve.value:g} bytes are not less than memory")
    return profile


def _check_keys(document: Mapping[str, Any], known: set[str], file: str, prefix: str = "") -> None:
    for key in document:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{file}: unknown key {prefix}{key}", f"Did you mean {near[0]}?" if near else None)


def _text(document: Mapping[str, Any], key: str, file: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not (value or key in _MAY_BE_EMPTY):
        raise ConfigError(f"{file}: {key} must be a text" + ("" if key in document else "; it is missing"))
    return value


def _names(document: Mapping[str, Any], file: str) -> tuple[str, ...]:
    value = document.get("isa")
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{file}: isa must be a list of texts")
    return tuple(value)


def _flag(document: Mapping[str, Any], key: str, default: bool, file: str) -> bool:
    value = document.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{file}: {key} must be true or false, not {value!r}")
    return value


def _kernels(document: Mapping[str, Any], file: str) -> tuple[Kernel, ...]:
    entries = document.get("kernels", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{file}: kernels must be tables, each [[kernels]]")
    return tuple(_kernel(entry, f"{file}: kernels[{at}]") for at, entry in enumerate(entries))


def _kernel(entry: Mapping[str, Any], file: str) -> Kernel:
    _check_keys(entry, {"type", "decode", "prefill", "repacked"}, file)
    return Kernel(
        type=_text(entry, "type", file),
        decode=_figure(entry, "decode", file),
        prefill=_figure(entry, "prefill", file),
        repacked=_flag(entry, "repacked", False, file),
    )


def _figure(document: Mapping[str, Any], key: str, file: str) -> Figure:
    entry = document.get(key)
    if not isinstance(entry, dict):
        raise ConfigError(f"{file}: {key} must be {{ value = …, basis = …, source = … }}")
    _check_keys(entry, {"value", "basis", "source"}, file, f"{key}.")
    value, basis, source = entry.get("value"), entry.get("basis"), entry.get("source")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e15:
        raise ConfigError(f"{file}: {key}.value must be a number above 0, not {value!r}")
    if basis not in BASES:
        raise ConfigError(f"{file}: {key}.basis must be one of {', '.join(BASES)}, not {basis!r}")
    if not isinstance(source, str) or not source.strip():
        raise ConfigError(f"{file}: {key}.source must say where the figure is from")
    return Figure(float(value), basis, source)


def write_profile(profile: DeviceProfile, path: Path) -> None:
    """Atomically. Raises: WriteError."""
    from edgeft.paths import write_text

    lines = [f"{key} = {_quoted(getattr(profile, key))}" for key in _TEXTS]
    lines.append(f"isa = [{', '.join(map(_quoted, profile.isa))}]")
    if profile.runtime:
        lines.append(f"runtime = {_quoted(profile.runtime)}")
    if not profile.flash_attention:
        lines.append("flash_attention = false")
    figures = {key: getattr(profile, key) for key in _FIGURES}
    lines += [f"{key} = {_table(figure)}" for key, figure in figures.items() if figure is not None]
    for kernel in profile.kernels:
        lines += ["", "[[kernels]]", f"type = {_quoted(kernel.type)}"]
        lines += [f"decode = {_table(kernel.decode)}", f"prefill = {_table(kernel.prefill)}"]
        lines += ["repacked = true"] * kernel.repacked
    write_text(path, "\n".join(lines) + "\n")


def _table(figure: Figure) -> str:
    said = f"basis = {_quoted(figure.basis)}, source = {_quoted(figure.source)}"
    return f"{{ value = {figure.value!r}, {said} }}"


def _quoted(text: str) -> str:
    """As a TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'


def names() -> list[str]:
    """Every profile there is, of all sources. Raises: PluginError."""
    return [name for _, name in _listed()]


def _listed() -> Iterator[tuple[plugins.DeviceSource, str]]:
    for plugin in plugins.names("devices"):
        source: plugins.DeviceSource = plugins.load("devices", plugin)
        for name in source.names():
            yield source, name


def load_profile(name: str) -> DeviceProfile:
    """A profile by name, or from a TOML file when `name` is a path.

    Raises:
        UsageError: there is no such profile.
        ConfigError: its file is wrong.
    """
    if name.endswith(".toml") or os.sep in name:
        return read_profile(Path(name))
    known = []
    for source, found in _listed():
        if found == name:
            profile: DeviceProfile = source.load(name)
            return profile
        known.append(found)
    if name == "local":
        raise UsageError("this machine was not measured yet", "edgeft devices probe")
    near = difflib.get_close_matches(name, known, n=1)
    raise UsageError(f"no device {name!r}", f"Did you mean {near[0]}?" if near else "edgeft devices list shows all.")


def read_profile(path: Path) -> DeviceProfile:
    """Raises: UsageError, ConfigError."""
    try:
        return parse_profile(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
