"""Backend packages that are not installed, made to look so on the path of a child process; and the kit, run on them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tokenplane_core.kit.report import Report, read_report


def search_path(package: Path, scratch: Path) -> str:
    """PYTHONPATH under which the package in a folder, or a wheel, is as good as installed."""
    if package.suffix == ".whl":
        return str(package)
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    module = project["name"].replace("-", "_")
    version = re.search(r'__version__ = "(.+)"', (package / module / "__init__.py").read_text())
    assert version is not None
    info = scratch / f"{module}-{version[1]}.dist-info"
    info.mkdir(parents=True)
    requires = "".join(f"Requires-Dist: {one}\n" for one in project["dependencies"])
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version[1]}\n{requires}")
    points = project["entry-points"]["tokenplane.backends"].items()
    (info / "entry_points.txt").write_text("[tokenplane.backends]\n" + "".join(f"{k} = {v}\n" for k, v in points))
    return os.pathsep.join([str(package), str(scratch)])


def run_pytest(path: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own, in `folder`, with `path` as PYTHONPATH."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    command += ["-c", os.devnull, *arguments]  # no settings but pytest's own, as at a vendor's
    # Compiled modules would be left behind in the packages' folders.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def judged(package: Path, name: str, scratch: Path, *arguments: str) -> tuple[Report, str]:
    """The kit's report on a package that passes, and what pytest printed."""
    file = scratch / "report.json"
    path = search_path(package, scratch / "site")
    done = run_pytest(path, scratch, "--tokenplane-backend", name, "--tokenplane-report", str(file), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_report(file), done.stdout
