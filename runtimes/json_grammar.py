"""JSON Schema as a GBNF grammar, so that llama.cpp can only write answers that validate.

Covered: types, enum, const, anyOf, oneOf, local $ref, objects with properties, required and additionalProperties,
arrays with items and bounds, string lengths. Anything else is refused: a keyword that is ignored would let through
answers that do not validate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgeft.errors import UsageError

_BASE = {
    "ws": '| " " | "\\n" [ \\t]{0,20}',
    "char": '[^"\\\\\\x7F\\x00-\\x1F] | "\\\\" (["\\\\bfnrt/] | "u" [0-9a-fA-F]{4})',
    "string": '"\\"" char* "\\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": 'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" ws (string ":" ws value ws ("," ws string ":" ws value ws)*)? "}"',
    "array": '"[" ws (value ws ("," ws value ws)*)? "]"',
}

_NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions", "format"}
"""Keywords that do not narrow what validates ("format" is an annotation by default since draft 2019-09)."""

_KNOWN: dict[str, set[str]] = {
    "object": {"type", "properties", "required", "additionalProperties"},
    "array": {"type", "items", "minItems", "maxItems"},
    "string": {"type", "minLength", "maxLength"},
    "integer": {"type"},
    "number": {"type"},
    "boolean": {"type"},
    "null": {"type"},
}


def schema_to_grammar(schema: Mapping[str, Any]) -> str:
    """A GBNF grammar whose root derives exactly JSON that validates (with ordinary spacing, keys in schema order).

    Raises:
        UsageError: a keyword or reference that is not covered, with its place in the schema.
    """
    builder = _Builder(schema)
    builder.rules["root"] = f"{builder.rule(schema, '#')} ws"
    return "\n".join(f"{name} ::= {body}" for name, body in {**_BASE, **builder.rules}.items()) + "\n"


class _Builder:
    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._references: dict[str, str] = {}
        self.rules: dict[str, str] = {}

    def rule(self, schema: Any, place: str) -> str:
        """The grammar expression of one schema."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, Mapping):
            raise UsageError(f"JSON schema at {place}: expected an object, not {schema!r}")
        if "$ref" in schema:
            return self._reference(str(schema["$ref"]), place)
        if "enum" in schema or "const" in schema:
            return self._name(" | ".join(_literal(value) for value in schema.get("enum", [schema.get("const")])))
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                choices = [self.rule(item, f"{place}/{keyword}/{i}") for i, item in enumerate(schema[keyword])]
                return self._name(" | ".join(choices))
        return self._typed(schema, place)

    def _typed(self, schema: Mapping[str, Any], place: str) -> str:
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list):
            return self._name(" | ".join(self._typed({**schema, "type": one}, place) for one in kind))
        if kind not in _KNOWN:
            raise UsageError(f"JSON schema at {place}: unknown type {kind!r}")
        unknown = set(schema) - _KNOWN[kind] - _NOTES
        # {"type": ["string", "null"], "minLength": 1}: a keyword of one type says nothing about another.
        if unknown - set().union(*_KNOWN.values()):
            raise UsageError(
                f"JSON schema at {place}: {', '.join(sorted(unknown))} cannot be enforced while generating",
                "Remove it from the schema and check the answer afterwards.",
            )
        if kind == "object":
            return self._object(schema, place)
        if kind == "array":
            return self._array(schema, place)
        if kind == "string" and ("minLength" in schema or "maxLength" in schema):
            return self._name(f'"\\"" char{_bounds(schema.get("minLength", 0), schema.get("maxLength"))} "\\""')
        return str(kind)

    def _object(self, schema: Mapping[str, Any], place: str) -> str:
        properties: Mapping[str, Any] = schema.get("properties", {})
        if not properties:
            return "object" if schema.get("additionalProperties", True) else self._name('"{" ws "}"')
        required = set(schema.get("required", ()))
        members = [
            (f'{_literal(name)} ":" ws {self.rule(item, f"{place}/properties/{name}")} ws', name in required)
            for name, item in properties.items()
        ]
        return self._name(f'"{{" ws {self._members(members, first=True)} "}}"')

    def _members(self, members: Sequence[tuple[str, bool]], first: bool) -> str:
        """Members in order, optional ones left out at will; the comma belongs to whatever is not first."""
        if not members:
            return '""'
        (body, required), rest = members[0], members[1:]
        comma = "" if first else '"," ws '
        taken = f"{comma}{body} {self._name(self._members(rest, first=False)) if rest else ''}".rstrip()
        if required:
            return taken
        skipped = self._name(self._members(rest, first=first)) if rest else '""'
        return f"({taken} | {skipped})"

    def _array(self, schema: Mapping[str, Any], place: str) -> str:
        item = self.rule(schema.get("items", True), f"{place}/items")
        low, high = int(schema.get("minItems", 0)), schema.get("maxItems")
        if high == 0:
            return self._name('"[" ws "]"')
        more = _bounds(max(low - 1, 0), None if high is None else int(high) - 1)
        body = f'{item} ws ("," ws {item} ws){more}'
        return self._name(f'"[" ws {body if low else f"({body})?"} "]"')

    def _reference(self, target: str, place: str) -> str:
        if target not in self._references:
            self._references[target] = name = f"ref-{len(self._references)}"
            self.rules[name] = self.rule(self._find(target, place), target)
        return self._references[target]

    def _find(self, target: str, place: str) -> Any:
        found: Any = self._schema
        for part in target.removeprefix("#").strip("/").split("/") if target != "#" else ():
            if not target.startswith("#") or not isinstance(found, Mapping) or part not in found:
                raise UsageError(f"JSON schema at {place}: $ref {target!r} leads nowhere")
            found = found[part]
        return found

    def _name(self, body: str) -> str:
        """Give an expression a rule of its own."""
        name = f"r{len(self.rules)}"
        self.rules[name] = body
        return name


def _literal(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return json.dumps(text, ensure_ascii=False)


def _bounds(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}" if high is not None or low else "*"
