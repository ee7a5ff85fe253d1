"""docs/write-a-backend.md, followed to the letter in a clean environment, ends with a server that answers on acme."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tokenplane_core.kit.report import read_report

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write-a-backend.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.S | re.M)


@pytest.fixture(scope="module")
def beside_a_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the page needs of a checkout, under the name the page gives it."""
    folder = tmp_path_factory.mktemp("tutorial")
    ignore = shutil.ignore_patterns("__pycache__", ".pytest_cache")
    for part in ("models/demo", "examples/acme-backend"):
        shutil.copytree(ROOT / part, folder / "tokenplane" / part, ignore=ignore)
    return folder


@pytest.fixture(scope="module")
def printed(beside_a_checkout: Path) -> str:
    """What the page's commands print, all in one shell that stops at the first one that fails."""
    wheels = ROOT / "dist"
    assert list(wheels.glob("tokenplane_core*.whl")), "run `make dist`"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PIP_FIND_LINKS"] = str(wheels)
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(blocks("sh"))],
        cwd=beside_a_checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.package_index
def test_both_servers_answer_on_the_acme_device(printed: str) -> None:
    decode = json.JSONDecoder().raw_decode  # an answer ends without a line break
    infos = [decode(printed[found.start() :])[0] for found in re.finditer(r'\{"model_id"', printed)]
    assert [info["model_device_type"] for info in infos] == ["acme", "acme"]
    assert [info["backend_version"] for info in infos] == ["0.1.0", "0.2.0"], "first the new package, then the example"
    answers = re.findall(r'"content":"([^"]+)"', printed)
    assert len(answers) == 2 and all("Tokenplane" in answer for answer in answers)


@pytest.mark.package_index
def test_the_kit_says_what_the_page_says_it_does(printed: str) -> None:
    expected = [line for block in blocks("text") for line in block.splitlines()]
    assert len(expected) >= 4
    assert not [line for line in expected if line not in printed]


@pytest.mark.package_index
def test_the_report_is_the_one_of_the_grown_package(printed: str, beside_a_checkout: Path) -> None:
    report = read_report(beside_a_checkout / "first-day" / "acme.json")
    assert (report.level, report.version) == ("fast", "0.2.0")
    assert "torch" not in report.libraries
