"""Which runtime goes into a bundle: one cross-built for the device's processor, or the best there is as a wheel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeft.bundle import Target
from edgeft.errors import EdgeftError

from . import cross_build, wheels
from .target import profile_of

_RUNTIMES = {"gguf": "xllamacpp", "onnx": "onnxruntime-genai"}
"""Format -> the runtime whose wheels exist for every target."""


@dataclass(frozen=True)
class Choice:
    """What will answer on the device."""

    runtime: str
    requirements: Sequence[str] = ()
    """To be fetched from the index."""
    wheels: Sequence[Path] = ()
    """To be taken from here."""
    warnings: Sequence[str] = ()


def choose(format_: str, target: Target, given: Sequence[Path] = ()) -> Choice:
    """The runtime for artifacts of a format on a target.

    Args:
        given: wheels that the user wants in place of the index's.

    Raises:
        UsageError: no package runs the format.
    """
    wanted = wheels.requirements(format_)
    names = {project(wheels.describe(file).name) for file in given}
    if format_ == "gguf" and cross_build.PROJECT in names:
        return Choice(cross_build.PROJECT, _without(wanted, {*names, "xllamacpp"}), tuple(given))
    usual = Choice(_RUNTIMES.get(format_, "auto"), _without(wanted, names), tuple(given))
    if format_ != "gguf" or target.architecture != "aarch64" or "xllamacpp" in names:
        return usual
    built, warnings = _cross_built(target)
    if built is None:
        return Choice(usual.runtime, usual.requirements, usual.wheels, warnings)
    return Choice(cross_build.PROJECT, _without(wanted, {*names, "xllamacpp"}), (*given, built))


def _cross_built(target: Target) -> tuple[Path | None, tuple[str, ...]]:
    """The wheel for the device, or what is lost without it."""
    try:
        march = cross_build.march_of(profile_of(target.device))
    except EdgeftError:  # a device described by flags alone
        return None, (_LOSS.format(what="this processor may have", device="NAME"),)
    built = cross_build.cached(march)
    if built is None:
        return None, _lost(target.device, march)
    needed = re.search(r"manylinux_2_(\d+)_", built.wheel.name)
    if needed and int(needed[1]) > int(target.glibc.split(".")[1]):
        said = f"{built.wheel.name} needs glibc 2.{needed[1]}, the device has {target.glibc}; xllamacpp is taken"
        return None, (said, *_lost(target.device, march))
    return built.wheel, ()


def _lost(device: str, march: str) -> tuple[str, ...]:
    if not cross_build.expected_kernels(march):
        return ()
    return (_LOSS.format(what=f"{device} has", device=device),)


# The factor: LFM2-350M Q6_K on a Raspberry Pi 5, 86 to 224 tokens/s of prompt (llama.cpp pull request 19360).
_LOSS = (
    "xllamacpp's wheel for aarch64 holds no dot-product instructions, which {what}: prompts are read at less than half "
    "the speed. edgeft toolchain build llama-cpp --device {device} makes one with them, which is then taken; "
    "ONNX wheels (edgeft export --to onnx-q4) hold them"
)


def _without(requirements: Sequence[str], names: set[str]) -> tuple[str, ...]:
    return tuple(text for text in requirements if project(text) not in names)


def project(requirement: str) -> str:
    """The project's name in a requirement or in a wheel's metadata, as indexes write it."""
    found = wheels.PROJECT.match(requirement)
    return found[0].lower().replace("_", "-") if found else requirement
