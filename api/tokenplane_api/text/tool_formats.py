"""The notations for function calls that model families were taught. Knows text only; tool_calls.py reads them."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A notation for calls.

    marks: what stands before calls, each with what stands behind them ("" for nothing). is_bare: an answer may begin
    with a call, without a mark. header: what may stand between a mark and the arguments alone; its group is the name.
    is_xml: a call may be written as in xml_calls.py. inner_marks: what else belongs to the notation, and means nothing
    behind a call. id_chars: how many the id of a call has; templates of some families insist. forced: what is written
    before, between and after calls that a grammar forces, which are JSON in every notation: their arguments fit any
    schema, and a grammar cannot ask for special tokens. arguments_key: what the family calls arguments. written: a call
    for models whose template writes none, if not JSON between the first marks.
    """

    name: str
    marks: tuple[tuple[str, str], ...]
    is_bare: bool = False
    header: re.Pattern[str] | None = None
    is_xml: bool = False
    inner_marks: tuple[str, ...] = ()
    id_chars: int = 24
    forced: tuple[str, str, str] = ("[", ", ", "]")
    arguments_key: str = "arguments"
    written: str = ""

    @property
    def all_marks(self) -> tuple[str, ...]:
        return (*(mark for pair in self.marks for mark in pair if mark), *self.inner_marks)

    @property
    def forces_marks(self) -> bool:
        """Whether calls that a grammar allows can be told from any other JSON."""
        return any(opener in self.forced[0] for opener, _ in self.marks)

    def new_id(self) -> str:
        digits = secrets.token_hex(self.id_chars // 2 + 1)[: self.id_chars]
        return f"call_{digits}" if self.id_chars > 9 else digits


_HERMES_MARKS = (("<tool_call>", "</tool_call>"),)
_HERMES_FORCED = ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")

_CALLS, _CALL, _NAME_END, _CALL_END, _CALLS_END = (
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
)

TOOL_FORMATS = {
    kind.name: kind
    for kind in (
        ToolFormat("hermes", _HERMES_MARKS, forced=_HERMES_FORCED),
        ToolFormat("qwen3_coder", _HERMES_MARKS, is_xml=True, forced=_HERMES_FORCED),
        ToolFormat(
            "llama3_json",
            (("<|python_tag|>", ""),),
            is_bare=True,
            forced=("", "; ", ""),
            arguments_key="parameters",
        ),
        ToolFormat(
            "mistral",
            (("[TOOL_CALLS]", ""),),
            header=re.compile(r"\s*([\w.\-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?"),
            inner_marks=("[ARGS]", "[CALL_ID]"),
            id_chars=9,
        ),
        ToolFormat(  # V3 and R1 write `function<sep>NAME` and fence the arguments, V3.1 writes `NAME<sep>`
            "deepseek",
            ((_CALLS, _CALLS_END), (_CALL, _CALLS_END)),
            header=re.compile(rf"\s*(?:\w+{_NAME_END}\s*)?([\w.\-]+)\s*(?:{_NAME_END}\s*)?(?:```json\s*)?"),
            inner_marks=(_NAME_END, "```", _CALL_END),
            written=f"{_CALLS}{_CALL}{{name}}{_NAME_END}{{arguments}}{_CALL_END}{_CALLS_END}",
        ),
        ToolFormat("json", (("```json", "```"), ("<tool_call>", "</tool_call>")), is_bare=True),
    )
}
