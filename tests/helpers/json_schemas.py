"""JSON Schemas of all kinds, made from a number. What they allow is short, so that a small model gets to its end."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

NAMES = ("name", "city", "count", "ok", "tags", "price", "id", "note", "größe", "a b", "x-y", "日本")
WORDS = ("red", "green", "blau", "näh", 'a"b', "back\\slash", "line\nbreak", "", "👍", "true", "1")
PATTERNS = (
    r"^[a-z]{1,4}$",
    r"^[A-Z]{2}-[0-9]{3}$",
    r"^(foo|bar)[0-9]?$",
    r"^\d{4}$",
    r"^[^x]{2,3}$",
    r"^(ab){1,3}c?$",
    r"^#[0-9a-f]{6}$",
)
FORMATS = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "duration")


def json_schemas(count: int) -> list[Schema]:
    """The same ones every time, all kinds in turn."""
    return [KINDS[i % len(KINDS)](random.Random(i)) for i in range(count)]


def value(rng: random.Random, depth: int = 1) -> Schema:
    """Any schema, nested at most `depth` times."""
    leaves = [string, integer, number, enum, constant, boolean, nullable, pattern, one_format]
    return rng.choice(leaves if depth == 0 else [*leaves, *NESTED])(rng)


def string(rng: random.Random) -> Schema:
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}


def integer(rng: random.Random) -> Schema:
    low = rng.randint(-2000, 2000)
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
    if kind == 1:
        return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 40)}
    if kind == 2:
        return {"type": "integer", "multipleOf": rng.choice([2, 5, 7, 10]), "minimum": 0, "maximum": 999}
    return {"type": "integer", "minimum": -9, "maximum": 9}


def number(rng: random.Random) -> Schema:
    low = rng.choice([-10.5, 0, 0.25, 3])
    bounds = rng.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
    return {"type": "number", bounds[0]: low, bounds[1]: low + rng.choice([1, 2.5, 100])}


def boolean(rng: random.Random) -> Schema:
    return {"type": "boolean"}


def nullable(rng: random.Random) -> Schema:
    return {"type": [rng.choice(["boolean", "integer"]), "null"], "minimum": 0, "maximum": 99}


def enum(rng: random.Random) -> Schema:
    values: list[Any] = rng.sample(WORDS, 3)
    return {"enum": [*values, rng.choice([None, 1, -2.5, True, [1, "x"], {"a": 1}])]}


def constant(rng: random.Random) -> Schema:
    return {"const": rng.choice([*WORDS, None, 0, 3.5, False, [1, 2], {"k": ["v"]}])}


def pattern(rng: random.Random) -> Schema:
    return {"type": "string", "pattern": rng.choice(PATTERNS)}


def one_format(rng: random.Random) -> Schema:
    kind = rng.choice(FORMATS)
    unbounded = kind in ("email", "hostname")
    return {"type": "string", "format": kind, **({"maxLength": 20} if unbounded else {})}


def array(rng: random.Random) -> Schema:
    least = rng.randint(0, 2)
    return {"type": "array", "items": value(rng, 0), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def nested_array(rng: random.Random) -> Schema:
    return {"type": "array", "items": array(rng), "minItems": 1, "maxItems": 2}


def tuple_(rng: random.Random) -> Schema:
    items = [value(rng, 0) for _ in range(rng.randint(1, 3))]
    rest = rng.choice([{"items": False}, {"items": {"type": "boolean"}, "maxItems": len(items) + 2}])
    return {"type": "array", "prefixItems": items, "minItems": len(items), **rest}


def an_object(rng: random.Random) -> Schema:
    names = rng.sample(NAMES, rng.randint(1, 3))
    schema: Schema = {"type": "object", "properties": {name: value(rng, 0) for name in names}}
    schema["required"] = rng.sample(names, rng.randint(0, len(names)))
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    return schema


def record(rng: random.Random) -> Schema:
    """An object of objects and arrays."""
    schema = an_object(rng)
    schema["properties"] |= {"inner": an_object(rng), "list": array(rng)}
    schema["required"] = [*schema["required"], "inner"]
    return schema


def open_object(rng: random.Random) -> Schema:
    schema = an_object(rng)
    names = list(schema["properties"])
    return {**schema, "required": names, "additionalProperties": integer(rng), "maxProperties": len(names) + 2}


def pattern_properties(rng: random.Random) -> Schema:
    return {
        "type": "object",
        "patternProperties": {"^k[0-9]$": value(rng, 0)},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 2,
    }


def any_of(rng: random.Random) -> Schema:
    return {"anyOf": [value(rng, 0), an_object(rng), array(rng)]}


def tagged_union(rng: random.Random) -> Schema:
    def variant(tag: str) -> Schema:
        inner = an_object(rng)
        return {
            "type": "object",
            "properties": {"kind": {"const": tag}, **inner["properties"]},
            "required": ["kind"],
            "additionalProperties": False,
        }

    return {"oneOf": [variant("a"), variant("b")]}


def all_of(rng: random.Random) -> Schema:
    return {
        "allOf": [
            {"type": "object", "properties": {"id": integer(rng)}, "required": ["id"]},
            {"type": "object", "properties": {"note": string(rng)}, "required": ["note"]},
        ],
        "maxProperties": 2,
    }


def references(rng: random.Random) -> Schema:
    return {
        "$defs": {"item": an_object(rng), "code": pattern(rng)},
        "type": "object",
        "properties": {
            "first": {"$ref": "#/$defs/item"},
            "codes": {"type": "array", "items": {"$ref": "#/$defs/code"}, "maxItems": 2},
        },
        "required": ["first", "codes"],
        "additionalProperties": False,
    }


def recursion(rng: random.Random) -> Schema:
    """A list as people write it: a head, and a tail that is another one or null."""
    node = {
        "type": "object",
        "properties": {"head": integer(rng), "tail": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["head", "tail"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


NESTED: tuple[Callable[[random.Random], Schema], ...] = (
    array,
    nested_array,
    tuple_,
    an_object,
    record,
    open_object,
    pattern_properties,
    any_of,
    tagged_union,
    all_of,
    references,
    recursion,
)
KINDS: tuple[Callable[[random.Random], Schema], ...] = (
    string,
    integer,
    number,
    enum,
    constant,
    nullable,
    pattern,
    one_format,
    *NESTED,
)
