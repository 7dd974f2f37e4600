"""JSON Schema as a GBNF grammar, so that llama.cpp can only write answers that validate.

Covered: types, enum, const, anyOf, oneOf of branches that exclude each other, local $ref, objects with properties,
required and additionalProperties, arrays with items and bounds, string lengths. Anything else is refused: a keyword
that is ignored would let through answers that do not validate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from typing import Any, NoReturn

from edgeft.errors import UsageError

_BASE = {
    "ws": '| " " | "\\n" [ \\t]{0,20}',
    # \u escapes of surrogates are left out: alone they are no character, in pairs they would count as two.
    "char": '[^"\\\\\\x7F\\x00-\\x1F] | "\\\\" (["\\\\bfnrt/] | "u" ([0-9a-cA-CefEF] hex{3} | [dD] [0-7] hex{2}))',
    "hex": "[0-9a-fA-F]",
    "string": '"\\"" char* "\\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": 'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" ws (string ":" ws value ws ("," ws string ":" ws value ws)*)? "}"',
    "array": '"[" ws (value ws ("," ws value ws)*)? "]"',
}

_NOTES = {
    *("title", "description", "default", "examples", "format", "deprecated", "readOnly", "writeOnly", "discriminator"),
    *("$schema", "$id", "$comment", "$defs", "definitions"),
}
"""Keywords that do not narrow what validates ("format" is an annotation by default since draft 2019-09)."""

_KNOWN: dict[str, set[str]] = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "integer": set(),
    "number": set(),
    "boolean": set(),
    "null": set(),
}
_SHAPES: dict[str, type] = {
    **dict.fromkeys(("properties", "$defs", "definitions"), Mapping),
    **dict.fromkeys(("required", "enum", "anyOf", "oneOf"), list),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), int),
}


def schema_to_grammar(schema: Mapping[str, Any]) -> str:
    """A GBNF grammar whose root derives only JSON that validates (with ordinary spacing, keys in schema order).

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
        if schema is True:
            return "value"
        _check_shape(schema, place)
        if "$ref" in schema:
            _allow(schema, {"$ref"}, place)
            return self._reference(str(schema["$ref"]), place)
        if "enum" in schema or "const" in schema:
            return self._name(" | ".join(_literal(value) for value in _values(schema, place)))
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._choice(schema, keyword, f"{place}/{keyword}")
        return self._typed(schema, place)

    def _choice(self, schema: Mapping[str, Any], keyword: str, place: str) -> str:
        _allow(schema, {keyword}, place)
        rules = [self.rule(branch, f"{place}/{index}") for index, branch in enumerate(schema[keyword])]
        if not rules:
            _refuse(place, "there is nothing to choose from")
        if keyword == "oneOf" and not all(self._exclude(*pair) for pair in combinations(schema[keyword], 2)):
            _refuse(place, "branches of oneOf may both hold", "Use anyOf, or give the branches different types.")
        return self._name(" | ".join(rules))

    def _exclude(self, one: Any, other: Any, depth: int = 4) -> bool:
        """Whether it is plain that nothing satisfies both schemas. Recursive ones are looked into `depth` deep."""
        one, other = self._resolved(one), self._resolved(other)
        mine, theirs = _literals(one), _literals(other)
        if mine and theirs:
            return not mine & theirs
        kinds, others = _kinds(one), _kinds(other)
        if kinds and others and not kinds & others:
            return True
        shared = set(one.get("required", ())) & set(other.get("required", ())) if depth else ()
        mine_of, theirs_of = one.get("properties", {}), other.get("properties", {})
        return any(self._exclude(mine_of.get(name), theirs_of.get(name), depth - 1) for name in shared)

    def _resolved(self, schema: Any) -> Mapping[str, Any]:
        if isinstance(schema, Mapping) and "$ref" in schema:
            schema = self._find(str(schema["$ref"]), "#")
        return schema if isinstance(schema, Mapping) else {}

    def _typed(self, schema: Mapping[str, Any], place: str) -> str:
        if set(schema) <= _NOTES:
            return "value"
        kind = schema.get("type", "object" if "properties" in schema else None)
        # {"type": ["string", "null"], "minLength": 1}: a keyword of one type says nothing about another.
        _allow(schema, {"type"}.union(*_KNOWN.values()), place)
        if isinstance(kind, list) and kind:
            return self._name(" | ".join(self._typed({**schema, "type": one}, place) for one in kind))
        if not isinstance(kind, str) or kind not in _KNOWN:
            _refuse(place, "the type is not given" if kind is None else f"unknown type {kind!r}")
        if kind == "object":
            return self._object(schema, place)
        if kind == "array":
            return self._array(schema, place)
        if kind == "string" and ("minLength" in schema or "maxLength" in schema):
            low, high = _range(schema, "minLength", "maxLength", place)
            return self._name(f'"\\"" char{_times(low, high)} "\\""')
        return kind

    def _object(self, schema: Mapping[str, Any], place: str) -> str:
        properties, required = schema.get("properties", {}), set(schema.get("required", ()))
        if missing := sorted(required - set(properties)):
            _refuse(place, f"required names {', '.join(missing)}, of which properties says nothing")
        if properties:
            return self._members(properties, required, f"{place}/properties")
        others = schema.get("additionalProperties", True)
        if others is False:
            return self._name('"{" ws "}"')
        member = f'string ":" ws {self.rule(others, f"{place}/additionalProperties")} ws'
        return self._name(f'"{{" ws ({member} ("," ws {member})*)? "}}"')

    def _members(self, properties: Mapping[str, Any], required: set[str], place: str) -> str:
        """Members in the schema's order, optional ones left out at will. Built from the end: `more` follows a member
        and begins with a comma, `first` is what may follow the brace."""
        more = first = '""'
        for name, item in reversed(list(properties.items())):
            member = f'{_literal(name)} ":" ws {self.rule(item, f"{place}/{name}")} ws {more}'
            first = self._name(member if name in required else f"{member} | {first}")
            more = self._name(f'"," ws {member}' if name in required else f'"," ws {member} | {more}')
        return self._name(f'"{{" ws {first} "}}"')

    def _array(self, schema: Mapping[str, Any], place: str) -> str:
        low, high = _range(schema, "minItems", "maxItems", place)
        if high == 0:
            return self._name('"[" ws "]"')
        item = self.rule(schema.get("items", True), f"{place}/items")
        body = f'{item} ws ("," ws {item} ws){_times(max(low - 1, 0), None if high is None else high - 1)}'
        return self._name(f'"[" ws {body if low else f"({body})?"} "]"')

    def _reference(self, target: str, place: str) -> str:
        if target not in self._references:
            self._references[target] = name = f"ref-{len(self._references)}"
            self.rules[name] = self.rule(self._find(target, place), target)
        return self._references[target]

    def _find(self, target: str, place: str) -> Any:
        found: Any = self._schema
        for part in target.removeprefix("#").strip("/").split("/") if target != "#" else ():
            part = part.replace("~1", "/").replace("~0", "~")
            if not target.startswith("#") or not isinstance(found, Mapping) or part not in found:
                _refuse(place, f"$ref {target!r} leads nowhere")
            found = found[part]
        return found

    def _name(self, body: str) -> str:
        """Give an expression a rule of its own."""
        name = f"r{len(self.rules)}"
        self.rules[name] = body
        return name


def _refuse(place: str, what: str, hint: str | None = None) -> NoReturn:
    raise UsageError(f"JSON schema at {place}: {what}", hint)


def _allow(schema: Mapping[str, Any], keywords: set[str], place: str) -> None:
    if unknown := sorted(set(schema) - keywords - _NOTES):
        _refuse(
            place,
            f"{', '.join(unknown)} cannot be enforced while generating",
            "Remove it from the schema and check the answer afterwards.",
        )


def _check_shape(schema: Any, place: str) -> None:
    if not isinstance(schema, Mapping):
        _refuse(place, f"expected an object, not {schema!r}")
    for keyword, shape in _SHAPES.items():
        if keyword in schema and not isinstance(schema[keyword], shape):
            _refuse(place, f"{keyword} cannot be {schema[keyword]!r}")


def _values(schema: Mapping[str, Any], place: str) -> list[Any]:
    """What enum, const and type leave."""
    _allow(schema, {"enum", "const", "type"}, place)
    allowed = [json.dumps(value, sort_keys=True) for value in schema.get("enum", [schema.get("const")])]
    values = schema.get("enum", []) if "const" not in schema else [schema["const"]]
    kinds = _kinds({key: schema[key] for key in ("type",) if key in schema})
    left = [
        value
        for value in values
        if json.dumps(value, sort_keys=True) in allowed and (not kinds or _kind_of(value) in kinds)
    ]
    if not left:
        _refuse(place, "enum, const and type leave no value")
    return left


def _literals(schema: Mapping[str, Any]) -> set[str]:
    """The values a schema lists, as text; empty when it lists none."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return {json.dumps(value, sort_keys=True) for value in values}


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """The types a schema allows; empty when that is not plain. Every integer is a number."""
    given = schema.get("type", "object" if "properties" in schema else [])
    kinds = set(given if isinstance(given, list) else [given])
    if literals := schema.get("enum", [schema["const"]] if "const" in schema else []):
        kinds = {_kind_of(value) for value in literals}
    return kinds | ({"integer"} if "number" in kinds else set())


def _kind_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", type(None): "null"}
    return names.get(type(value), "object")


def _literal(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return json.dumps(text, ensure_ascii=False)


def _range(schema: Mapping[str, Any], least: str, most: str, place: str) -> tuple[int, int | None]:
    low, high = int(schema.get(least, 0)), schema.get(most)
    if high is not None and low > high:
        _refuse(place, f"{least} {low} is above {most} {high}")
    return low, high


def _times(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}" if high is not None or low else "*"
