"""Which matrix kernels are inside a compiled library: integer dot products, counted in its machine code.

A64 instructions are 32-bit words at multiples of four. Encodings: Arm Architecture Reference Manual, C7.2 (SDOT, UDOT,
USDOT, SMMLA, UMMLA, USMMLA), with the bits of registers, indices and vector length masked out.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgeft.errors import ModelError

ENCODINGS = (
    ("sdot", 0xBFE0FC00, 0x0E809400),
    ("sdot", 0xBFC0F400, 0x0F80E000),  # by element
    ("udot", 0xBFE0FC00, 0x2E809400),
    ("udot", 0xBFC0F400, 0x2F80E000),
    ("usdot", 0xBFE0FC00, 0x0E809C00),
    ("smmla", 0xFFE0FC00, 0x4E80A400),
    ("ummla", 0xFFE0FC00, 0x6E80A400),
    ("usmmla", 0xFFE0FC00, 0x4E80AC00),
)
"""Name, mask, value."""
NAMES = tuple(dict.fromkeys(name for name, _, _ in ENCODINGS))
_AARCH64 = 183
"""`e_machine` of ELF for the Arm 64-bit Architecture (AAELF64)."""


def scan(file: Path) -> Counter[str]:
    """Instructions of a library, or of all libraries in a wheel, by name; those that are not there count 0.

    Raises:
        ModelError: neither, damaged, or for another processor than 64-bit Arm.
    """
    found = Counter(dict.fromkeys(NAMES, 0))
    for name, content in _libraries(file):
        for section in code_sections(content, f"{file.name}: {name}"):
            found.update(count(section))
    return found


def _libraries(file: Path) -> Iterator[tuple[str, bytes]]:
    if file.suffix != ".whl":
        yield file.name, file.read_bytes()
        return
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(".so") or ".so." in name:
                    yield name, archive.read(name)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{file} is not a wheel: {error}") from error


def code_sections(content: bytes, where: str) -> Iterator[bytes]:
    """The executable sections of a little-endian 64-bit ELF file (System V ABI, chapter 4). Raises: ModelError."""
    try:
        if content[:6] != b"\x7fELF\x02\x01":
            raise ModelError(f"{where} is not a 64-bit ELF file")
        machine = struct.unpack_from("<H", content, 18)[0]
        if machine != _AARCH64:
            raise ModelError(f"{where} is for another processor than 64-bit Arm (ELF machine {machine})")
        table = struct.unpack_from("<Q", content, 40)[0]
        size, number = struct.unpack_from("<HH", content, 58)
        for index in range(number):
            _, kind, flags, _, offset, length = struct.unpack_from("<IIQQQQ", content, table + index * size)
            if kind == 1 and flags & 4:  # SHT_PROGBITS, SHF_EXECINSTR
                yield content[offset : offset + length]
    except struct.error as error:
        raise ModelError(f"{where} is damaged: {error}") from error


def count(code: bytes) -> Mapping[str, int]:
    """Instructions in one section."""
    words = array("I", code[: len(code) // 4 * 4])
    if sys.byteorder == "big":
        words.byteswap()
    found: Counter[str] = Counter()
    for word in words:
        if word & 0x1E800000 != 0x0E800000:  # bits that all of them share: drops most words at once
            continue
        for name, mask, value in ENCODINGS:
            if word & mask == value:
                found[name] += 1
    return found
