"""Changing single values of `cascade.toml`: everything else in the file, comments too, stays as it is."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeft.cascade.settings import SECTIONS, TEMPLATE, Cloud, Local, Settings, parse_settings
from edgeft.errors import ConfigError, UsageError

TABLES: Mapping[str, type[Any]] = {"local": Local, **SECTIONS}
_HEADER = re.compile(r"\s*\[\[?\s*([\w-]+)\s*\]\]?\s*(#.*)?$")


@dataclasses.dataclass(frozen=True)
class Key:
    """One value of the file."""

    name: str
    """policy.threshold; of an endpoint, by its place, cloud.1.price-in."""
    kind: str
    """bool, int, float, str or tuple[str, ...]."""
    value: Any
    about: str


def keys(settings: Settings) -> list[Key]:
    """Every key there is, in the order of a new file."""
    about = _about()
    found = []
    tables: list[tuple[str, Any]] = [("local", settings.local)]
    tables += [(f"cloud.{at}", one) for at, one in enumerate(settings.cloud, 1)]
    tables += [(name, getattr(settings, name)) for name in SECTIONS]
    for table, values in tables:
        for field in dataclasses.fields(values):
            key = field.name.replace("_", "-")
            said = about.get(f"{table.split('.')[0]}.{key}", "")
            found.append(Key(f"{table}.{key}", str(field.type), getattr(values, field.name), said))
    return found


def _about() -> dict[str, str]:
    """What the comments of a new file say of its keys."""
    table, found = "", {}
    for line in TEMPLATE.splitlines():
        if header := _HEADER.match(line):
            table = header[1]
        elif each := re.match(r"(?:# )?([\w-]+) = .*?\s# (.*)$", line):
            found[f"{table}.{each[1]}"] = each[2]
    return {**found, "policy.kind": ""}  # its comment lists them all, as the error does


def read_value(name: str, text: str) -> Any:
    """A value as it is typed: a text needs no quotes, a list may be written as in the file.

    Raises:
        UsageError: no such key, or the text is no such value.
    """
    kind = _kind(name)
    text = text.strip()
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.casefold()]
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
        if kind == "str":
            return text
        return tuple(tomllib.loads(f"value = {text}")["value"]) if text.startswith("[") else (text,) if text else ()
    except (KeyError, ValueError):
        said = {"bool": "true or false", "int": "a whole number", "float": "a number"}.get(kind, "a list of texts")
        raise UsageError(f"{name} must be {said}, not {text!r}") from None


def _kind(name: str) -> str:
    table, _, key = name.rpartition(".")
    place = re.fullmatch(r"cloud\.[1-9]\d*", table)
    kind = Cloud if place else TABLES.get(table)
    for field in dataclasses.fields(kind) if kind else ():
        if field.name.replace("_", "-") == key:
            return str(field.type)
    raise UsageError(f"there is no key {name}", "policy.threshold, budget.day-money, cloud.1.price-in …")


def said(value: Any) -> str:
    """A value as `read_value` takes it."""
    if isinstance(value, tuple):
        return _toml(value)
    return value if isinstance(value, str) else _toml(value)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


def edited(text: str, changes: Mapping[str, Any], path: Path) -> str:
    """The file with other values.

    Raises:
        ConfigError: the settings are, or would be, none that can be used, or the file is written in a way (inline
            tables, keys with dots) that single values cannot be changed in.
        UsageError: there is no such endpoint.
    """
    parse_settings(text, path)
    lines = text.splitlines()
    wanted = tomllib.loads(text)
    for name, value in changes.items():
        table, _, key = name.rpartition(".")
        _change(lines, table, key, _toml(value))
        _put(wanted, table, key, list(value) if isinstance(value, tuple) else value)
    result = "\n".join(lines) + "\n"
    try:
        same = tomllib.loads(result) == wanted
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        raise ConfigError(f"{path} is written in a way that this cannot change", "Change it in an editor.")
    parse_settings(result, path)
    return result


def _put(document: dict[str, Any], table: str, key: str, value: Any) -> None:
    name, _, place = table.partition(".")
    if place:
        document[name][int(place) - 1][key] = value
    else:
        document.setdefault(name, {})[key] = value


def _change(lines: list[str], table: str, key: str, value: str) -> None:
    begin, end = _extent(lines, table)
    if begin < 0 and table.startswith("cloud."):
        raise UsageError(f"there is no endpoint {table}", "Endpoints are counted from 1.")
    if begin < 0:
        lines += ["", f"[{table}]", f"{key} = {value}"]
        return
    for mark in ("", "# *"):  # a value that is set, else the comment that shows how it would be
        for at in range(begin, end):
            if re.match(rf"\s*{mark}{re.escape(key)}\s*=", lines[at]) and (found := _value(lines, at, end)):
                last, comment = found
                lines[at:last] = [f"{key} = {value}{comment}"]
                return
    lines.insert(begin, f"{key} = {value}")


def _extent(lines: Sequence[str], table: str) -> tuple[int, int]:
    """The lines of a table, without its header; (-1, -1) when there is none."""
    name, _, place = table.partition(".")
    heads = [at for at, line in enumerate(lines) if _HEADER.match(line)]
    mine = [at for at in heads if (found := _HEADER.match(lines[at])) and found[1] == name]
    number = int(place or 1) - 1
    if number >= len(mine):
        return -1, -1
    return mine[number] + 1, next((at for at in heads if at > mine[number]), len(lines))


def _value(lines: Sequence[str], at: int, end: int) -> tuple[int, str] | None:
    """The line after a value that begins in line `at`, and the comment behind it with the blanks before."""
    first = re.sub(r"^\s*# *", "", lines[at])
    for last in range(at + 1, end + 1):
        whole = "\n".join([first, *lines[at + 1 : last]])
        for cut in [*(found.start() for found in re.finditer(r"\s*#", whole)), len(whole)]:
            try:
                tomllib.loads(whole[:cut])
            except tomllib.TOMLDecodeError:
                continue
            if "\n" not in whole[cut:]:
                return last, whole[cut:]
    return None
