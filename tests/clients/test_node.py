"""openai for Node against a server process. What it must do is written in JavaScript, in node/."""

from __future__ import annotations

import json

import pytest

from helpers.cities import MESSAGES, RESPONSE_FORMAT, SCHEMA, TOO_HOT, TOOL
from helpers.node import run_node, why_no_node
from helpers.server_process import ServerProcess

pytestmark = pytest.mark.skipif(bool(why_no_node()), reason=why_no_node())

CASES = {
    "messages": MESSAGES, "schema": SCHEMA, "response_format": RESPONSE_FORMAT, "tool": TOOL, "tooHot": TOO_HOT
}  # fmt: skip


def run(server: ServerProcess, *arguments: str) -> str:
    return run_node(*arguments, TOKENPLANE_URL=server.url, TOKENPLANE_CASES=json.dumps(CASES))


def test_openai_for_node(server: ServerProcess) -> None:
    report = run(server, "--test", "--test-reporter=tap", "openai.test.mjs")
    assert "# pass 8\n" in report, report


def test_leaving_a_stream(server: ServerProcess) -> None:
    with server.nothing_stays():
        assert run(server, "abort.mjs") == "3\n"
