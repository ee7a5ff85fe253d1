"""Log lines as JSON: one object on one line for whatever is logged."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from tokenplane_core.logs import JsonFormatter


def line(**record: object) -> dict[str, object]:
    text = JsonFormatter().format(
        logging.makeLogRecord({"name": "tokenplane.test", "levelname": "INFO", "msg": "%s", **record})
    )
    assert "\n" not in text
    found: dict[str, object] = json.loads(text)
    return found


def test_a_line_says_when_where_and_what() -> None:
    found = line(args=("two\nlines",), created=1.5)
    assert found["timestamp"] == "1970-01-01T00:00:01.500000+00:00"
    assert (found["level"], found["target"], found["message"]) == ("INFO", "tokenplane.test", "two\nlines")


def test_fields_stand_beside_the_message_and_keep_their_types() -> None:
    found = line(args=("plain",), fields={"message": "GET /x 200", "status": 200, "total_ms": 1.5, "what": KeyError})
    assert (found["message"], found["status"], found["total_ms"]) == ("GET /x 200", 200, 1.5)
    assert "KeyError" in str(found["what"])


def test_a_stack_trace_stays_on_the_line() -> None:
    try:
        raise RuntimeError("why")
    except RuntimeError:
        found = line(args=("failed",), exc_info=sys.exc_info())
    assert "RuntimeError: why" in str(found["exception"])


@pytest.mark.parametrize(("json_output", "starts"), [(True, '{"timestamp":'), (False, "20")])
def test_configure_sends_a_process_lines_to_standard_error(json_output: bool, starts: str) -> None:
    code = (
        "import logging; from tokenplane_core.logs import configure\n"
        f"configure('warning', {json_output})\nlogging.info('no')\nlogging.getLogger('a').warning('yes')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (only,) = done.stderr.splitlines()
    assert only.startswith(starts) and "yes" in only and not done.stdout
