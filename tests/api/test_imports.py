"""The API must start on machines without torch, and fast."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, sys
import tokenplane_api
names = [m.name for m in pkgutil.walk_packages(tokenplane_api.__path__, "tokenplane_api.")]
for name in names:
    importlib.import_module(name)
print(len(names), sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_no_module_of_the_api_imports_torch_or_transformers() -> None:
    child = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    count, loaded = child.stdout.split(maxsplit=1)
    assert int(count) > 25
    assert loaded.strip() == "[]"
