"""What the answer's text must be: the clients' many words for it, turned into the core's one `Grammar`.

OpenAI's `response_format`, TGI's `grammar`, vLLM's `guided_*` and `structured_outputs`, and forced tool calls. Checks
shapes and sizes; whether a grammar can be compiled, the engine decides. Every function raises ApiError (`invalid`)
that names the field.

Objects that list their properties are closed: a schema that says nothing of `additionalProperties` is answered as if it
said false, since nobody who lists properties wants others invented. What comes out is still valid for the schema as it
was sent. Whitespace between JSON tokens is bounded, because a small model left to itself may never stop indenting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenplane_core.messages import Grammar
from tokenplane_core.validation import MAX_GRAMMAR_BYTES

from .errors import ApiError, invalid

MAX_SCHEMA_DEPTH = 100
MAX_CHOICES = 1000
WHITESPACE = r"(\n {0,16}| )?"
"""Between two JSON tokens: a line break with some indentation, or a space, or nothing."""

JSON_OBJECT: dict[str, Any] = {"type": "object"}

VLLM_FIELDS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")


# --- The clients' words -------------------------------------------------------------------------------------


def from_openai(response_format: Any, field: str = "response_format") -> Grammar | None:
    """Of `response_format`: OpenAI's text, json_object and json_schema; TGI's {"type", "value"}. None: any text.

    `strict` makes no difference: a schema is always kept.
    """
    if response_format is None:
        return None
    kind = _mapping(response_format, field).get("type")
    if kind == "text":
        return None
    if "value" in response_format:
        return from_tgi(response_format, field)
    if kind == "json_object":
        return from_schema(JSON_OBJECT, field)
    if kind == "json_schema":
        described = _mapping(response_format.get("json_schema"), f"{field}.json_schema")
        if "schema" not in described:
            raise _missing(f"{field}.json_schema.schema", "a JSON Schema")
        return from_schema(described["schema"], f"{field}.json_schema.schema")
    raise invalid(
        f"`{field}.type` is {_shown(kind)}; allowed are text, json_object, json_schema (with `value` also json, regex)",
        f"{field}.type",
    )


def from_tgi(grammar: Any, field: str = "grammar") -> Grammar | None:
    """Of TGI's `grammar`: {"type": "json" | "json_object" | "regex" | "json_schema", "value": ...}. None: any text.

    A schema may be an object or a string that holds one.
    """
    if grammar is None:
        return None
    kind = _mapping(grammar, field).get("type")
    value = grammar.get("value")
    if kind not in ("json", "json_object", "regex", "json_schema"):
        raise invalid(
            f"`{field}.type` is {_shown(kind)}; allowed are json, json_object, json_schema and regex", f"{field}.type"
        )
    if value is None:
        raise _missing(f"{field}.value", "a regular expression" if kind == "regex" else "a JSON Schema")
    if kind == "regex":
        return from_regex(value, f"{field}.value")
    if kind == "json_schema":
        described = _mapping(value, f"{field}.value")
        if "schema" not in described:
            raise _missing(f"{field}.value.schema", "a JSON Schema")
        return from_schema(described["schema"], f"{field}.value.schema")
    return from_schema(value, f"{field}.value")


def from_vllm(fields: Mapping[str, Any]) -> Grammar | None:
    """Of vLLM's `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar` and `structured_outputs`.

    fields: the request's values under those names (VLLM_FIELDS); others are not looked at. structured_outputs is an
    object with one of json, regex, choice, grammar, or json_object: true. At most one of all may be set.
    """
    given = {name: fields.get(name) for name in VLLM_FIELDS if fields.get(name) is not None}
    if "structured_outputs" in given:
        inner = _mapping(given.pop("structured_outputs"), "structured_outputs")
        for name, value in inner.items():
            if name not in _OF_VLLM and value not in (None, False):
                known = ", ".join(_OF_VLLM)
                raise invalid(
                    f"`structured_outputs.{name}` is not known; allowed are {known}", f"structured_outputs.{name}"
                )
            if value not in (None, False) or name == "json":
                given[f"structured_outputs.{name}"] = value
    if len(given) > 1:
        names = " and ".join(f"`{name}`" for name in given)
        raise invalid(f"{names} are set; the answer can follow only one of them", next(iter(given)))
    for field, value in given.items():
        return _OF_VLLM[field.removeprefix("guided_").removeprefix("structured_outputs.")](value, field)
    return None


def at_most_one(**grammars: Grammar | None) -> Grammar | None:
    """The one that is set. Names are the request's fields, for the error if more are."""
    given = {name: grammar for name, grammar in grammars.items() if grammar is not None}
    if len(given) > 1:
        names = " and ".join(f"`{name}`" for name in given)
        raise invalid(f"{names} are set; the answer can follow only one of them", next(iter(given)))
    return next(iter(given.values()), None)


def either(one: Grammar, other: Grammar, field: str) -> Grammar:
    """What one of them allows."""
    return _sized(Grammar("lark", f"start: one | other\none: {_nested(one)}\nother: {_nested(other)}"), field)


def _nested(grammar: Grammar) -> str:
    """As the right side of a rule in Lark's syntax, as llguidance extends it."""
    if grammar.kind == "json_schema":
        return f"%json {grammar.source}"
    if grammar.kind == "lark":
        return f"%lark {{\n{grammar.source}\n}}"
    slashes = re.sub(r"\\.|/|\n", lambda found: {"/": "\\/", "\n": "\\n"}.get(found[0], found[0]), grammar.source)
    return f"/{slashes}/"


# --- Kinds of grammar ---------------------------------------------------------------------------------------


def from_schema(schema: Any, field: str) -> Grammar:
    """A JSON Schema: an object, a boolean, or a string that holds one."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise invalid(f"`{field}` is a string but not JSON: {error}", field) from None
    if not isinstance(schema, dict | bool):
        raise invalid(f"`{field}` is {_shown(schema)}; a JSON Schema is an object", field)
    _check_depth(schema, field)
    if isinstance(schema, dict):
        schema = _with_whitespace(close_objects(schema), field)
    return _sized(Grammar("json_schema", json.dumps(schema, ensure_ascii=False, separators=(",", ":"))), field)


def from_regex(pattern: Any, field: str) -> Grammar:
    """A regular expression that the whole text must match (Rust's syntax: no look-around, no back-references)."""
    if not isinstance(pattern, str) or not pattern:
        raise invalid(
            f"`{field}` is {_shown(pattern)}; a regular expression is a string of at least 1 character", field
        )
    return _sized(Grammar("regex", pattern), field)


def from_choice(choices: Any, field: str) -> Grammar:
    """One of several strings."""
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise invalid(f"`{field}` is {_shown(choices)}; it needs a list of strings of at least 1 character each", field)
    if len(choices) > MAX_CHOICES:
        raise invalid(f"`{field}` has {len(choices)} choices, the limit is {MAX_CHOICES}", field)
    return _sized(Grammar("lark", "start: " + " | ".join(map(lark_string, dict.fromkeys(choices)))), field)


def from_lark(grammar: Any, field: str) -> Grammar:
    """A context-free grammar in Lark's syntax, with the rule `start`; llguidance's extensions (%json, ...) work too."""
    if not isinstance(grammar, str) or not grammar.strip():
        raise invalid(
            f"`{field}` is {_shown(grammar)}; a grammar is a string in Lark syntax with a rule `start`", field
        )
    if "::=" in grammar:
        raise invalid(f"`{field}` uses `::=` (EBNF, GBNF); write it in Lark syntax: `start: ...`", field)
    return _sized(Grammar("lark", grammar), field)


def _from_json_object(value: Any, field: str) -> Grammar:
    if value is not True:
        raise invalid(f"`{field}` is {_shown(value)}; allowed is true", field)
    return from_schema(JSON_OBJECT, field)


_OF_VLLM = {
    "json": from_schema,
    "regex": from_regex,
    "choice": from_choice,
    "grammar": from_lark,
    "json_object": _from_json_object,
}


# --- Tool calls ---------------------------------------------------------------------------------------------


def tool_call_schema(functions: Sequence[Mapping[str, Any]], arguments_key: str = "arguments") -> dict[str, Any]:
    """The JSON Schema of one call: {"name": <a function's name>, <arguments_key>: <by its parameters>}.

    functions: objects with "name" and, if it takes any, "parameters" (a JSON Schema). References inside the parameters
    keep their meaning. Not closed and not checked: that is done where it becomes a grammar.
    """
    calls = []
    for i, function in enumerate(functions):
        parameters = function.get("parameters")
        if parameters is None:
            parameters = {"type": "object", "properties": {}}
        field = f"tools[{i}].function.parameters"
        _check_depth(_mapping(parameters, field), field)
        place = f"#/anyOf/{i}/properties/{_pointer(arguments_key)}"
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, arguments_key: _moved(parameters, place)},
                "required": ["name", arguments_key],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls}


def tool_call_grammar(
    functions: Sequence[Mapping[str, Any]],
    *,
    arguments_key: str = "arguments",
    before: str = "",
    after: str = "",
    between: str | None = None,
    max_calls: int | None = None,
    field: str = "tools",
) -> Grammar:
    """One call of one of the functions, as JSON with `before` and `after` around it.

    between: what stands between the JSON of two calls if there may be several (at most max_calls; None: any number);
    None: exactly one call. For a family that wraps every call, say between="</tool_call>\\n<tool_call>".
    functions and arguments_key as in `tool_call_schema`.
    """
    schema = _with_whitespace(close_objects(tool_call_schema(functions, arguments_key)), field)
    source = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if not before and not after and between is None:
        return _sized(Grammar("json_schema", source), field)
    more = ""
    if between is not None:
        repeat = "*" if max_calls is None else f"{{0,{max_calls - 1}}}"
        more = f" ({lark_string(between)} call){repeat}" if between else f" call{repeat}"
    parts = [lark_string(before) if before else "", f"call{more}", lark_string(after) if after else ""]
    return _sized(Grammar("lark", f"start: {' '.join(filter(None, parts))}\ncall: %json {source}"), field)


def lark_string(text: str) -> str:
    """A literal in a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


# --- Schemas ------------------------------------------------------------------------------------------------

_COMBINED = frozenset({"allOf", "patternProperties", "unevaluatedProperties", "if", "not", "dependentSchemas"})
_BRANCHED = frozenset({"anyOf", "oneOf", "$ref"})
_OF_OBJECTS = frozenset({"properties", "required", "minProperties", "maxProperties"})


def close_objects(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with `additionalProperties: false` wherever an object lists properties and says nothing of others.

    Where several schemas describe one object together (allOf, or properties beside anyOf, oneOf or $ref), closing each
    would forbid what the others list: such a schema is returned as it is.
    """
    return schema if _describes_jointly(schema) else _closed(schema)


def _describes_jointly(node: Any) -> bool:
    if isinstance(node, dict):
        if node.keys() & _COMBINED or (node.keys() & _BRANCHED and node.keys() & _OF_OBJECTS):
            return True
        return any(_describes_jointly(value) for value in node.values())
    return isinstance(node, list) and any(map(_describes_jointly, node))


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    out = {
        key: value if key in ("const", "enum", "default", "examples") else _closed(value) for key, value in node.items()
    }
    # "properties" may also be the name of a property: then what it holds is a schema, and "type" is not beside it.
    if isinstance(node.get("properties"), dict) and node.get("type") == "object":
        out.setdefault("additionalProperties", False)
    return out


def _with_whitespace(schema: dict[str, Any], field: str) -> dict[str, Any]:
    """The schema with our whitespace, unless the client names another (llguidance reads "x-guidance")."""
    options = schema.get("x-guidance", {})
    if not isinstance(options, dict):
        raise invalid(f'`{field}` has "x-guidance": {_shown(options)}; it needs an object', field)
    if "whitespace_flexible" in options:
        return schema
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, **options}}


def _moved(node: Any, place: str) -> Any:
    """A schema whose references into itself (#/...) stay right when it stands at `place` of another."""
    if isinstance(node, list):
        return [_moved(item, place) for item in node]
    if not isinstance(node, dict):
        return node
    out = {key: _moved(value, place) for key, value in node.items()}
    ref = node.get("$ref")
    if isinstance(ref, str) and (ref == "#" or ref.startswith("#/")):
        out["$ref"] = place + ref[1:]
    return out


def _pointer(key: str) -> str:
    """A key as part of a JSON Pointer (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")


# --- Checks -------------------------------------------------------------------------------------------------


def _check_depth(schema: Any, field: str) -> None:
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += node.values()
            elif isinstance(node, list):
                below += node
        if not below:
            return
        level = below
    raise invalid(f"`{field}` is nested more than {MAX_SCHEMA_DEPTH} levels deep; that is the limit", field)


def _sized(grammar: Grammar, field: str) -> Grammar:
    size = len(grammar.source.encode("utf-8", "surrogatepass"))
    if size > MAX_GRAMMAR_BYTES:
        raise invalid(f"`{field}` takes {size:,} bytes, the limit is {MAX_GRAMMAR_BYTES:,}", field)
    return grammar


def _mapping(value: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise invalid(f"`{field}` is {_shown(value)}; it needs an object", field)
    return value


def _missing(field: str, needed: str) -> ApiError:
    return invalid(f"`{field}` is missing; it needs {needed}", field)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
