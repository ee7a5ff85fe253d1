"""A question, a schema and a tool, for every client alike."""

from __future__ import annotations

from typing import Any

QUESTION = "What is the capital of France?"
MESSAGES: list[dict[str, str]] = [{"role": "user", "content": QUESTION}]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["big", "small"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
RESPONSE_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": SCHEMA, "strict": True},
}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "find_city", "parameters": SCHEMA}}

TOO_HOT = "`temperature` must be at least 0 and at most 2, but it is 9.0"
