"""Write docs/api.md from the OpenAPI document.

python scripts/api_page.py            write the page
python scripts/api_page.py --check    say whether it is what it should be
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pages import table, write_or_check

from tokenplane_api.app import all_routers
from tokenplane_api.docs_page import event_schema, type_words
from tokenplane_api.openapi import openapi
from tokenplane_api.settings import Settings

HEAD = """# API reference

<!-- Written by scripts/api_page.py from the schemas that the server decodes with; change those instead. -->

Every route, what it takes and what it answers. A running server has the same at `/docs`, and for programs at
`/openapi.json` (OpenAPI 3.1; TGI's path `/api-doc/openapi.json` works too). These pages are open even where the server
asks for API keys.

"""


def page() -> str:
    document = openapi(all_routers(Settings(model_id="")), lambda method, path: False)
    return HEAD + "\n".join(_page(document)).rstrip() + "\n"


def _page(document: dict[str, Any]) -> Iterator[str]:
    yield document["info"]["description"]
    for tag in document["tags"]:
        yield f"## {tag['name']}\n"
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if method != "head" and tag["name"] in operation["tags"]:
                    yield from _operation(method, path, operation)
    yield "## Schemas\n"
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield from _schema(name, schema)


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### {method.upper()} {path}\n"
    yield f"{operation['summary']}. {operation.get('description', '')}".strip() + "\n"
    if "requestBody" in operation:
        (content,) = operation["requestBody"]["content"].values()
        yield f"Takes {_type(content['schema'])}.\n"
    rows = []
    for status, answer in operation["responses"].items():
        bodies = [
            f"{_type(event_schema(content['schema']))} (`{kind}`)"
            for kind, content in answer.get("content", {}).items()
        ]
        rows.append((status, answer["description"], ", ".join(bodies)))
    yield from table(("Status", "Meaning", "Body"), rows)


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if "description" in schema:
        yield f"{' '.join(schema['description'].split())}\n"
    required = schema.get("required", ())
    yield from table(
        ("Field", "Type", "Meaning"),
        [
            (f"`{field}`" + (", required" if field in required else ""), _type(found), found.get("description", ""))
            for field, found in schema["properties"].items()
        ],
    )


def _type(schema: dict[str, Any]) -> str:
    return type_words(schema, lambda name: f"[{name}](#{name.lower()})", lambda text: f"`{text}`")


if __name__ == "__main__":
    write_or_check("api.md", page())
