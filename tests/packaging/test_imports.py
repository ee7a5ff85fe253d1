"""The core and the API import without any framework, in a fresh interpreter, module by module."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("torch", "transformers", "jax", "torch_xla", "triton", "tensorflow")

# A framework that is installed must not be found either: the import fails as it would without the package.
PROBE = """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {forbidden!r}:
            raise ModuleNotFoundError("no module named " + name, name=name)
sys.meta_path.insert(0, Refuse())
for name in {modules!r}:
    importlib.import_module(name)
print(sorted(set({forbidden!r}) & set(sys.modules)))
"""


def modules(package: str, folder: Path) -> list[str]:
    found = [info.name for info in pkgutil.walk_packages([str(folder / package)], f"{package}.")]
    assert found, f"no modules below {folder / package}"
    return [package, *(name for name in found if not name.endswith("__main__"))]


@pytest.mark.parametrize(("package", "folder"), [("tokenplane_core", "core"), ("tokenplane_api", "api")])
def test_every_module_imports_without_a_framework(package: str, folder: str) -> None:
    code = PROBE.format(forbidden=FORBIDDEN, modules=modules(package, ROOT / folder))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == "[]"


BACKENDS = sorted(folder.name for folder in (ROOT / "backends").iterdir() if (folder / "pyproject.toml").exists())


def test_plugin_modules_import_without_their_framework() -> None:
    modules = [f"tokenplane_{backend}.plugin" for backend in BACKENDS if backend not in ("torch", "tpu")]
    code = PROBE.format(forbidden=FORBIDDEN, modules=modules)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_distributions_keep_their_file_names(backend: str) -> None:
    """Every backend folder has the same files, so that who knows one knows all."""
    # Neuron's attention is inside what its vendor's compiler makes.
    own = ("plugin.py", "device.py") if backend == "neuron" else ("plugin.py", "device.py", "attention.py")
    for name in ("pyproject.toml", "README.md", "tests", *(f"tokenplane_{backend}/{file}" for file in own)):
        assert (ROOT / "backends" / backend / name).exists(), f"backends/{backend}/{name} is missing"
