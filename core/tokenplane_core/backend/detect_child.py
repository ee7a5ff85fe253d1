"""The child process that runs one plugin's detect(): `python -m tokenplane_core.backend.detect_child NAME`."""

from __future__ import annotations

import sys

import msgspec

from .errors import TokenplaneError
from .plugins import ANSWER_MARK, Backend, ChildAnswer, load_plugin
from .records import DetectReport


def main(name: str) -> None:
    """Print one marked line of JSON; whatever else a vendor library prints is passed over by the parent."""
    contract = ""
    try:
        plugin = load_plugin(name)
        contract = str(getattr(plugin, "contract", ""))
        report = Backend(name, plugin).detect()
    except TokenplaneError as error:
        report = DetectReport("broken", reason=str(error))
    except Exception as error:
        report = DetectReport("broken", reason=f"detect() raised {type(error).__name__}: {error}")
    print("\n" + ANSWER_MARK + msgspec.json.encode(ChildAnswer(contract, report)).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
