"""The OpenAPI document, from the application's routes and the schemas that they decode with; and a page that shows it.

Both are served to anybody, as in TGI: they say nothing that the project's own pages do not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute

from . import __version__
from .errors import UNAUTHORIZED, ErrorKind, ErrorResponse, OpenAIErrorResponse, is_openai_path
from .operations import Operation, operation_of

router = APIRouter()

_COMPONENT = "#/components/schemas/{name}"
_JSON = "application/json"
_STREAM = "text/event-stream"

DESCRIPTION = """\
Text generation in two dialects: OpenAI's, under `/v1`, and that of Hugging Face's Text Generation Inference (TGI).
Errors have the body of the dialect. Every answer has the header `x-request-id`; 429 and 503 have `retry-after`.
Any route may also answer 408 if the client takes too long to send its request, and 431 if its headers are too long.
A stream that fails after it began ends with an event that holds the body of the error.
"""


@router.get("/openapi.json", include_in_schema=False)
@router.get("/api-doc/openapi.json", include_in_schema=False)
async def document(request: Request) -> Response:
    return Response(request.app.state.openapi, media_type=_JSON)


@router.get("/docs", include_in_schema=False)
async def page(request: Request) -> Response:
    return Response(request.app.state.docs_page, media_type="text/html; charset=utf-8")


@router.get("/docs/", include_in_schema=False)
async def page_of_tgi() -> Response:
    return RedirectResponse("../docs")


def openapi(routers: Sequence[APIRouter], asks_key: Callable[[str, str], bool]) -> dict[str, Any]:
    """The document of what the routers serve. asks_key: whether a request with this method and path needs an API key.

    Raises:
        KeyError: a route of the schema has no declared operation.
    """
    routes = [
        (route, operation_of(route.endpoint))
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute) and route.include_in_schema
    ]
    schemas = _Schemas([operation for _, operation in routes])
    paths: dict[str, dict[str, Any]] = {}
    ids: set[str] = set()
    for route, operation in routes:
        path = re.sub(r":\w+}", "}", route.path)
        for method in sorted(route.methods or ()):
            if method.lower() in paths.setdefault(path, {}):
                continue  # as in the router, the first one wins
            errors = (*operation.errors, UNAUTHORIZED) if asks_key(method, path) else operation.errors
            paths[path][method.lower()] = {
                "operationId": _unused_id(operation.id, path, method, ids),
                "tags": [operation.tag],
                **_words(route.endpoint.__doc__),
                "parameters": [
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                    for name in re.findall(r"{(\w+)}", path)
                ],
                **schemas.body(operation),
                "security": [{"ApiKey": []}] if UNAUTHORIZED in errors else [],
                "responses": {"200": schemas.answer(operation, method, path), **schemas.errors(errors, path)},
            }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tokenplane",
            "version": __version__,
            "description": DESCRIPTION,
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for _, operation in routes)],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"ApiKey": {"type": "http", "scheme": "bearer"}},
        },
    }


class _Schemas:
    """The schemas of all operations, and what refers to them."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        types: list[Any] = [ErrorResponse, OpenAIErrorResponse]
        for operation in operations:
            types += [*operation.takes, *operation.answers, *operation.events]
        references, self.components = msgspec.json.schema_components(types, ref_template=_COMPONENT)
        self._of = dict(zip(types, references, strict=True))

    def body(self, operation: Operation) -> dict[str, Any]:
        if not operation.takes:
            return {}
        return {"requestBody": {"required": True, "content": {_JSON: {"schema": self._any(operation.takes)}}}}

    def answer(self, operation: Operation, method: str, path: str) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if operation.answers:
            content[_JSON] = {"schema": self._any(operation.answers)}
        if operation.events:
            content[_STREAM] = {"schema": self._event(operation, path)}
        if operation.text is not None:
            content[operation.text] = {"schema": {"type": "string"}}
        found: dict[str, Any] = {"description": "The answer" if content else "Yes"}
        return {**found, "content": content} if content and method != "HEAD" else found

    def _event(self, operation: Operation, path: str) -> dict[str, Any]:
        """Of each event, in the form that OpenAPI 3.2 has for it."""
        inside = self._any((*operation.events, _error_type(path)))
        data = {"contentMediaType": _JSON, "contentSchema": inside}
        return {
            "type": "object",
            "properties": {"data": {"type": "string", "anyOf": [data, {"const": "[DONE]"}]}},
            "required": ["data"],
        }

    def _any(self, types: tuple[Any, ...]) -> dict[str, Any]:
        found = [self._of[t] for t in types]
        return found[0] if len(found) == 1 else {"anyOf": found}

    def errors(self, kinds: Sequence[ErrorKind], path: str) -> dict[str, Any]:
        openai = is_openai_path(path)
        content = {_JSON: {"schema": self._of[_error_type(path)]}}
        words: dict[int, list[str]] = {}
        for kind in kinds:
            status = kind.openai_status if openai else kind.tgi_status
            words.setdefault(status, []).append(kind.tgi_type.replace("_", " "))
        return {
            str(status): {"description": ", ".join(dict.fromkeys(words[status])), "content": content}
            for status in sorted(words)
        }


def _error_type(path: str) -> type[ErrorResponse | OpenAIErrorResponse]:
    return OpenAIErrorResponse if is_openai_path(path) else ErrorResponse


def _words(docstring: str | None) -> dict[str, str]:
    """The first sentence of an endpoint's docstring, and the rest."""
    summary, _, rest = " ".join((docstring or "").split()).partition(". ")
    return {"summary": summary.rstrip("."), **({"description": rest} if rest else {})}


def _unused_id(id: str, path: str, method: str, used: set[str]) -> str:
    """The operation's own; on further paths with the path."""
    id = f"{id}_head" if method == "HEAD" else id
    if id in used:
        id = f"{id}_{re.sub(r'[^0-9A-Za-z]+', '_', path).strip('_') or 'root'}"
    used.add(id)
    return id
