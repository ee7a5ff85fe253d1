"""The page at /docs: the OpenAPI document for people, one page of HTML that asks no other host for anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import msgspec

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
pre { background: var(--soft); padding: .6rem; overflow-x: auto; }
summary { cursor: pointer; padding: .35rem 0; }
details { border-bottom: 1px solid var(--line); }
details > :not(summary) { margin-left: 1rem; }
table { border-collapse: collapse; width: 100%; }
td, th { border-top: 1px solid var(--line); padding: .25rem .6rem .25rem 0; text-align: left; vertical-align: top; }
.method { display: inline-block; min-width: 3.2rem; font-weight: 700; }
"""


def render(document: dict[str, Any]) -> str:
    """HTML of an OpenAPI document as openapi.py makes it."""
    return "\n".join(_page(document))


def _page(document: dict[str, Any]) -> Iterator[str]:
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
    yield f"<p>{_text(info['description'])}</p>"
    yield '<p>The same for programs: <a href="openapi.json"><code>/openapi.json</code></a>.</p>'
    for tag in document["tags"]:
        yield f"<h2>{escape(tag['name'])}</h2>"
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if method != "head" and tag["name"] in operation["tags"]:
                    yield from _operation(method, path, operation)
    yield "<h2>Schemas</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield from _schema(name, schema)
    yield "</body></html>"


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f'<details id="{escape(operation["operationId"])}"><summary><span class="method">{method.upper()}</span>'
    yield f"<code>{escape(path)}</code> {_text(operation['summary'])}</summary>"
    if "description" in operation:
        yield f"<p>{_text(operation['description'])}</p>"
    if operation["security"]:
        yield "<p>Needs <code>Authorization: Bearer KEY</code>.</p>"
    if "requestBody" in operation:
        (content,) = operation["requestBody"]["content"].values()
        yield f"<p>Takes {_type(content['schema'])}.</p>"
    yield "<table><tr><th>Status</th><th>Meaning</th><th>Body</th></tr>"
    for status, answer in operation["responses"].items():
        bodies = [
            f"<code>{escape(kind)}</code>: {_type(event_schema(content['schema']))}"
            for kind, content in answer.get("content", {}).items()
        ]
        yield f"<tr><td>{status}</td><td>{_text(answer['description'])}</td><td>{'<br>'.join(bodies)}</td></tr>"
    yield "</table></details>"


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>'
    yield f"<p>{_text(schema.get('description', ''))}</p>"
    yield "<table><tr><th>Field</th><th>Type</th><th>Meaning</th></tr>"
    for field, described in schema.get("properties", {}).items():
        mark = " (required)" if field in schema.get("required", ()) else ""
        meaning = _text(described.get("description", ""))
        yield f"<tr><td><code>{escape(field)}</code>{mark}</td><td>{_type(described)}</td><td>{meaning}</td></tr>"
    yield "</table></details>"


def type_words(schema: dict[str, Any], link: Callable[[str], str], code: Callable[[str], str]) -> str:
    """A JSON Schema in a few words. link: of a component's name; code: of a value."""

    def words(schema: dict[str, Any]) -> str:
        return type_words(schema, link, code)

    match schema:
        case {"$ref": str(reference)}:
            return link(reference.rpartition("/")[2])
        case {"anyOf": list(choices)}:
            return " or ".join(dict.fromkeys(map(words, choices)))
        case {"enum": list(values)}:
            return " or ".join(code(msgspec.json.encode(value).decode()) for value in values)
        case {"type": "array", "items": dict(items)}:
            return f"list of {words(items)}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"object of {words(values)}"
        case {"type": list(types)}:
            return " or ".join(types)
        case {"type": str(name)}:
            return name
    return "anything"


def event_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """What is inside of the events of a stream; a schema of something else as it is."""
    match schema:
        case {"properties": {"data": {"anyOf": [{"contentSchema": dict(inside)}, *_]}}}:
            return inside
    return schema


def _type(schema: dict[str, Any]) -> str:
    return type_words(schema, _link, _code)


def _link(name: str) -> str:
    return f'<a href="#{escape(name)}">{escape(name)}</a>'


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _text(text: str) -> str:
    """`code` as HTML."""
    parts = escape(text.strip()).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
