"""Damaged files, made by chance and with intent, and the readers that must refuse them with a message.

    python tests/fuzz.py READER COUNT SEED FILE [OTHER]

Every damaged copy of FILE goes to the reader in one process, which may take little more memory than it has and a short
time for each. Prints one JSON object: how many were accepted and refused, and what else happened to which one. `OTHER`
is a second, intact file, for readers of two.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import EdgeftError

MEMORY = 256 << 20
"""Bytes of address space a reader may add to what its process has."""
SECONDS = 5.0

# --- Places worth damaging ------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """A number in a header that others depend on."""

    what: str
    at: int
    size: int


_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class _Walk:
    """Goes through a whole GGUF header and notes where its numbers are."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.fields = data, 4, []  # type: bytes, int, list[Field]
        self.pairs: dict[str, tuple[int, int]] = {}
        """Where each key begins, and where its value ends."""
        self.number("version", 4)
        tensors, keys = self.number("tensors", 8), self.number("keys", 8)
        for _ in range(keys):
            start = self.at
            self.text("key length")
            name = data[start + 8 : self.at].decode()
            self.value(self.number("value type", 4))
            self.pairs[name] = start, self.at
        for _ in range(tensors):
            self.text("name length")
            for _ in range(self.number("dimensions", 4)):
                self.number("dimension", 8)
            self.number("tensor type", 4)
            self.number("offset", 8)

    def number(self, what: str, size: int) -> int:
        self.fields.append(Field(what, self.at, size))
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "little")

    def text(self, what: str) -> None:
        length = self.number(what, 8)
        self.at += length

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.text("text length")
        elif kind == _ARRAY:
            items, count = self.number("item type", 4), self.number("items", 8)
            for _ in range(count):
                self.value(items)
        else:
            self.number("value", _SCALARS[kind])


def gguf_fields(data: bytes) -> list[Field]:
    """Without most of the items of long lists."""
    fields = _Walk(data).fields
    kept = [field for field in fields if field.what not in ("value", "text length")]
    items = [field for field in fields if field.what in ("value", "text length")]
    return kept + items[:: max(1, len(items) // 64)]


def with_key(data: bytes, name: str, value: bytes) -> bytes:
    """A whole GGUF with another value (its type first), at the end of the keys when it had none of that name."""
    walk = _Walk(data)
    last = max(end for _, end in walk.pairs.values())
    start, end = walk.pairs.get(name, (last, last))
    pair = len(name).to_bytes(8, "little") + name.encode() + value
    keys = (len(walk.pairs) + (start == end)).to_bytes(8, "little")
    head = data[:16] + keys + data[24:start] + pair + data[end : walk.at]
    return head + bytes(-len(head) % 32) + data[walk.at + -walk.at % 32 :]


_EXTREMES = (0, 1, 2, 7, 31, 63, 64, 65, 127, 128, 255, 256, 1000, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31)
_EXTREMES += ((1 << 32) - 1, 1 << 32, 1 << 40, (1 << 60) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 64)


def damage_gguf(data: bytes, fields: list[Field], chance: random.Random) -> tuple[bytes, str]:
    """One damaged copy, and what was done to it."""
    damaged, done = bytearray(data), []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        done.append(chance.choice(_DAMAGES)(damaged, fields, chance))
    return bytes(damaged), ", ".join(done)


def _extreme(data: bytearray, fields: list[Field], chance: random.Random) -> str:
    field = chance.choice(fields)
    if field.at + field.size > len(data):
        return "nothing"
    old = int.from_bytes(data[field.at : field.at + field.size], "little")
    new = chance.choice((*_EXTREMES, old + 1, old - 1, old * 2, old + 32, chance.getrandbits(64)))
    new %= 1 << 8 * field.size
    data[field.at : field.at + field.size] = new.to_bytes(field.size, "little")
    return f"{field.what} at {field.at}: {old} -> {new}"


def _flip(data: bytearray, fields: list[Field], chance: random.Random) -> str:
    end = min(len(data), fields[-1].at + 8)
    places = [chance.randrange(end) for _ in range(chance.randrange(1, 9))]
    for at in places:
        data[at] = chance.randrange(256)
    return f"bytes {places}"


def _cut(data: bytearray, fields: list[Field], chance: random.Random) -> str:
    length = chance.choice((chance.randrange(len(data) + 1), chance.choice(fields).at))
    del data[length:]
    return f"cut to {length}"


def _remove(data: bytearray, fields: list[Field], chance: random.Random) -> str:
    at, size = chance.randrange(len(data) + 1), chance.choice((1, 4, 8, 32, 100))
    del data[at : at + size]
    return f"{size} bytes removed at {at}"


def _copy(data: bytearray, fields: list[Field], chance: random.Random) -> str:
    source, target = (chance.randrange(len(data) + 1) for _ in range(2))
    size = chance.choice((8, 24, 64))
    data[target : target + size] = data[source : source + size]
    return f"{size} bytes copied from {source} to {target}"


_DAMAGES = (_extreme, _extreme, _extreme, _extreme, _flip, _cut, _remove, _copy)

# --- Safetensors ------------------------------------------------------------------

_VALUES: tuple[Any, ...] = (0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1.5, "1", None, True, [], {}, [1], "F32", "I8")
_VALUES += ("BF16", "F64", "X", [-1, -1], [2**40, 2**40], [1] * 5000, float("nan"))


def damage_safetensors(data: bytes, fields: list[Field], chance: random.Random) -> tuple[bytes, str]:
    """The header's JSON changed as JSON, as text, or its length, or the file cut."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = chance.choice(("entry", "entry", "entry", "offsets", "text", "length", "cut", "twice", "deep"))
    if how == "length":
        length = chance.choice((*_EXTREMES, size - 1, size + 1)) % (1 << 64)
        return length.to_bytes(8, "little") + data[8:], f"length {length}"
    if how == "cut":
        length = chance.randrange(len(data))
        return data[:length], f"cut to {length}"
    text, done = json.dumps(header), how
    name = chance.choice([name for name in header if name != "__metadata__"])
    if how == "entry":
        key, value = chance.choice(("dtype", "shape", "data_offsets", None)), chance.choice(_VALUES)
        if key is None:
            header[name] = value
        else:
            header[name][key] = value
        text, done = json.dumps(header), f"{name} {key}: {value!r:.40}"
    elif how == "offsets":
        start, end = header[name]["data_offsets"]
        moved = chance.choice((-end, -1, 1, 8, end - start, 2**40, 2**64))
        header[name]["data_offsets"] = [start + moved, end + moved]
        text, done = json.dumps(header), f"{name} moved by {moved}"
    elif how == "text":
        at = chance.randrange(len(text))
        text, done = text[:at] + chance.choice('{}[]",:0e-x\x00é') + text[at + 1 :], f"character {at}"
    elif how == "twice":
        text = text[:-1] + "," + json.dumps({name: header[name]})[1:]
    else:
        text = '{"a":' * chance.choice((100, 10_000, 200_000))
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw + rest, done


def damage_json(data: bytes, fields: list[Field], chance: random.Random) -> tuple[bytes, str]:
    """A value somewhere in a JSON file replaced, removed or put elsewhere."""
    root = json.loads(data)
    owner, key, path = root, chance.choice(list(root)), []
    while True:
        path.append(str(key)[:20])
        inside = owner[key]
        if not isinstance(inside, (dict, list)) or not inside or chance.random() < 0.3:
            break
        owner, key = inside, chance.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    if chance.random() < 0.2:
        del owner[key]
        return json.dumps(root).encode(), f"{'.'.join(path)} removed"
    owner[key] = chance.choice((*_VALUES, "x" * 1000, "(", {"a": 1}, [{"id": 1}], 7, -7))
    return json.dumps(root).encode(), f"{'.'.join(path)}: {owner[key]!r:.40}"


# --- Readers ------------------------------------------------------------------------


def _header(file: Path, other: Path) -> None:
    from edgeft.models.gguf_header import read_header

    header = read_header(file)
    for key in header.metadata:
        _ = header.metadata[key]
    _ = header.architecture, header.parameters, header.bits_per_weight, header.type_mix
    _ = header.name, header.licence, header.chat_template, header.tokenizer_pre, header.context_length


def _describe(file: Path, other: Path) -> None:
    from edgeft.models.describe import describe
    from edgeft.verify.facts import read_facts

    json.dumps(describe(str(file)))
    read_facts(file)


def _imatrix(file: Path, other: Path) -> None:
    from edgeft.converters.importance import read_importance, read_sensitivities

    read_importance(file)
    read_sensitivities(file)


def _adapter(file: Path, other: Path) -> None:
    from edgeft.models.adapter_file import check_base

    check_base(file, other)


def _adapters_base(file: Path, other: Path) -> None:
    from edgeft.models.adapter_file import check_base

    check_base(other, file)


def _packed(file: Path, other: Path) -> None:
    """`other` is the text side of the intact file."""
    import torch

    from edgeft.models.gguf_torch import load_packed

    load_packed(file, other, torch.bfloat16)


def _text_side(file: Path, other: Path) -> None:
    from edgeft.models.gguf_import import text_side

    text_side(file)


def _import(file: Path, other: Path) -> None:
    from edgeft.models.gguf_import import import_gguf

    out = file.with_suffix(".imported")
    shutil.rmtree(out, ignore_errors=True)
    import_gguf(file, out)


def _weights(file: Path, other: Path) -> None:
    """The damaged file in the place of the weights of the model in `other`."""
    from edgeft import plugins
    from edgeft.plugins import ConvertOptions, Source
    from edgeft.progress import Silent

    _place(file, other / "model.safetensors")
    converter = plugins.load("converters", "gguf")
    out = file.with_name("out.gguf")
    converter.convert(converter.plan(Source(other), "gguf-q8_0", ConvertOptions(out)), Silent())


def _peft(file: Path, other: Path) -> None:
    """The damaged file in the place of the weights of the adapter in `other`, whose base is beside it."""
    from edgeft import plugins
    from edgeft.plugins import ConvertOptions, Source
    from edgeft.progress import Silent

    _place(file, other / "adapter_model.safetensors")
    converter = plugins.load("converters", "gguf")
    out = file.with_name("out.gguf")
    source = Source(other.with_name("base"), other)
    for target in ("gguf-q8_0", "gguf-lora"):
        converter.convert(converter.plan(source, target, ConvertOptions(out)), Silent())


def _settings(file: Path, other: Path) -> None:
    """The damaged file in the place of the one of its name in the model in `other`."""
    from edgeft import plugins
    from edgeft.models.describe import describe
    from edgeft.models.text import load_text_side
    from edgeft.plugins import ConvertOptions, Source
    from edgeft.train.plan import read_shape

    _place(file, other / file.name)
    adapter = other if file.name == "adapter_config.json" else None
    source = Source(other.with_name("base") if adapter else other, adapter)
    done = [lambda: plugins.load("converters", "gguf").plan(source, "gguf-q8_0", ConvertOptions(file))]
    done += [lambda: describe(str(other))]
    done += [] if adapter else [lambda: load_text_side(other), lambda: read_shape(other)]
    refused = None
    for read in done:
        try:
            read()
        except EdgeftError as error:
            refused = error
    if refused:
        raise refused


def _place(file: Path, at: Path) -> None:
    at.unlink()
    at.hardlink_to(file)


Damage = Callable[[bytes, list[Field], random.Random], tuple[bytes, str]]

READERS: Mapping[str, tuple[Callable[[Path, Path], None], Damage]] = {
    # name -> (reader, how its files are damaged)
    "header": (_header, damage_gguf),
    "describe": (_describe, damage_gguf),
    "imatrix": (_imatrix, damage_gguf),
    "adapter": (_adapter, damage_gguf),
    "adapters-base": (_adapters_base, damage_gguf),
    "packed": (_packed, damage_gguf),
    "text-side": (_text_side, damage_gguf),
    "import": (_import, damage_gguf),
    "weights": (_weights, damage_safetensors),
    "peft": (_peft, damage_safetensors),
    "settings": (_settings, damage_json),
}

# --- Running --------------------------------------------------------------------------


class TooSlow(BaseException):
    pass


def _late(*_: object) -> None:
    raise TooSlow


def attempts(data: bytes, damage: Damage, count: int, seed: int) -> Iterator[tuple[int, bytes, str]]:
    fields = gguf_fields(data) if damage is damage_gguf else []
    for number in range(count):
        yield number, *damage(data, fields, random.Random(f"{seed}-{number}"))


def run(reader: str, count: int, seed: int, file: Path, other: Path) -> dict[str, Any]:
    read, damage = READERS[reader]
    data = file.read_bytes()
    result: dict[str, Any] = {"accepted": 0, "refused": 0, "failures": [], "slowest": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EDGEFT_HOME"] = str(Path(folder) / "home")
        place = Path(folder) / file.name
        place.write_bytes(data)
        read(place, other)  # imports what it needs, and proves that the intact file is accepted
        limited = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limited, resource.getrlimit(resource.RLIMIT_AS)[1]))
        signal.signal(signal.SIGALRM, _late)
        for number, damaged, done in attempts(data, damage, count, seed):
            place.unlink(missing_ok=True)
            place.write_bytes(damaged)
            started = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                read(place, other)
                result["accepted"] += 1
            except EdgeftError as error:
                result["refused"] += 1
                if len(error.message) > 2000:
                    result["failures"].append(f"{number} ({done}): a message of {len(error.message)} characters")
            except (Exception, TooSlow) as error:
                result["failures"].append(f"{number} ({done}): {type(error).__name__}: {str(error)[:200]}")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            result["slowest"] = max(result["slowest"], round(time.monotonic() - started, 3))
    return result


if __name__ == "__main__":
    name, count, seed, *files = sys.argv[1:]
    paths = [Path(one).absolute() for one in files]
    print(json.dumps(run(name, int(count), int(seed), paths[0], paths[-1])))
