"""What a field of a schema means: said where the field is declared, shown in the OpenAPI document and its pages.

Decoding is not changed by any of it: ranges and combinations are checked in the dialects' convert.py.
"""

from __future__ import annotations

from typing import Any

import msgspec


def means(text: str, **keywords: Any) -> msgspec.Meta:
    """keywords: of JSON Schema, to say more than the type does; where a value may be null, they hold for others."""
    return msgspec.Meta(description=text, extra_json_schema=keywords)


def only(text: str, values: tuple[Any, ...]) -> msgspec.Meta:
    """A field that cannot be honoured: values, besides null, are those that ask for nothing."""
    return msgspec.Meta(description=text, extra_json_schema={"enum": [None, *values]})


def either(*schemas: str) -> msgspec.Meta:
    """A value that is decoded later, by what it holds; schemas: names of the document's components."""
    return msgspec.Meta(extra_json_schema={"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in schemas]})
