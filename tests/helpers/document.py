"""Questions about an OpenAPI document, and answers of a server held against it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import httpx
from jsonschema import Draft202012Validator

from tokenplane_api.docs_page import event_schema

STREAM = "text/event-stream"


class Document:
    """An OpenAPI document as openapi.py makes it."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.schemas: dict[str, Any] = raw["components"]["schemas"]
        self._patterns = [(re.compile(re.sub(r"{\w+}", "[^/]+", path)), path) for path in raw["paths"]]
        self._validator = cache(self._new_validator)

    def operation(self, method: str, path: str) -> dict[str, Any] | None:
        """What the document says of a request; None if it says nothing."""
        for pattern, template in self._patterns:
            if pattern.fullmatch(path):
                found: dict[str, Any] | None = self.raw["paths"][template].get(method.lower())
                return found
        return None

    def check(self, answer: httpx.Response) -> None:
        """Assert that the document declares an answer's status, content type and JSON; of a stream, that it is one."""
        request = answer.request
        operation = self.operation(request.method, request.url.path)
        if operation is None or answer.status_code == 405:
            return
        where = f"{request.method} {request.url.path} {answer.status_code}"
        declared = operation["responses"].get(str(answer.status_code))
        assert declared is not None, f"{where} is not declared"
        content_type = answer.headers.get("content-type", "")
        contents = declared.get("content", {})
        if not contents:
            return
        assert content_type in contents, f"{where} is {content_type}, declared are {list(contents)}"
        if content_type == "application/json":
            self.validate(contents[content_type]["schema"], json.loads(answer.read()), where)

    def check_events(self, answer: httpx.Response) -> int:
        """Assert that every event of a stream is as declared; how many there were."""
        operation = self.operation(answer.request.method, answer.request.url.path)
        assert operation is not None
        schema = event_schema(operation["responses"]["200"]["content"][STREAM]["schema"])
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        events = [event for event in events if event != "[DONE]"]
        for event in events:
            self.validate(schema, json.loads(event), event)
        return len(events)

    def validate(self, schema: dict[str, Any], value: Any, where: str) -> None:
        error = next(self._validator(json.dumps(schema)).iter_errors(value), None)
        assert error is None, f"{where}: {error}"

    def _new_validator(self, schema: str) -> Draft202012Validator:
        return Draft202012Validator({**json.loads(schema), "components": self.raw["components"]})

    def request_fields(self, paths: Iterable[str]) -> set[str]:
        """All that bodies for these paths may hold, however deep, as Schema.field."""
        seen: set[str] = set()
        for path in paths:
            for operation in self.raw["paths"][path].values():
                self._collect(operation.get("requestBody", {}), seen)
        return {f"{name}.{field}" for name in seen for field in self.schemas[name]["properties"]}

    def _collect(self, value: Any, seen: set[str]) -> None:
        for name in references(value):
            if name not in seen:
                seen.add(name)
                self._collect(self.schemas[name], seen)


def references(value: Any) -> Iterator[str]:
    """The components that a part of the document refers to."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"].rpartition("/")[2]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from references(part)
