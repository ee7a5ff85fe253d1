"""Builds the native kernels into the package: for a wheel, which is then for one platform, and in place when editable.

TOKENPLANE_CPU_NATIVE=0 leaves them out, where there is no C++ compiler; the backend then computes with torch alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "libtokenplane_cpu.so"


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        target = root / "tokenplane_cpu" / LIBRARY
        if os.environ.get("TOKENPLANE_CPU_NATIVE") == "0":
            if version == "editable":
                target.unlink(missing_ok=True)
            return
        built = _build(root / "native", root / "build" / "native")
        shutil.copyfile(built, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)  # a running process keeps the old one
        build_data["artifacts"].append(f"tokenplane_cpu/{LIBRARY}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _build(source: Path, build: Path) -> Path:
    if sys.platform != "linux":
        raise SystemExit(f"tokenplane-cpu: the native kernels build on Linux, not on {sys.platform}; {_WITHOUT}")
    # An earlier build's cache names the cmake and ninja of its own build environment, which is gone.
    configure = ["cmake", "--fresh", "-S", source, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    try:
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"tokenplane-cpu: the native kernels could not be built, is there a C++17 compiler? ({error}); {_WITHOUT}"
        ) from error
    return build / LIBRARY


_WITHOUT = "set TOKENPLANE_CPU_NATIVE=0 to install without them"
