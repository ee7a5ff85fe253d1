"""Make an environment in which torch-xla runs on the host, to test the TPU backend without a TPU.

    python backends/tpu/tests/make_xla_cpu_env.py ENVIRONMENT

torch-xla 2.9 links against torch 2.9, and the package index has no CPU build of that, only one for CUDA with several
GB of NVIDIA libraries. So torch is installed without them, and empty stand-ins take the place of those it links to.
The small CUDA runtime stays the real one, because torch asks it whether there is a device. Nothing in such an
environment may call CUDA. Not for users: on a TPU, `pip install tokenplane-tpu` brings what is needed.

Needs gcc, readelf, about 3 GB and a minute. May be run again: a finished environment is left alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
WITHOUT_DEPENDENCIES = ("torch==2.9.1", "torch-xla==2.9.0", "nvidia-cuda-runtime-cu12==12.8.90")
DEPENDENCIES = (
    *("absl-py", "filelock", "fsspec", "jinja2", "networkx", "numpy", "pyyaml", "requests", "sympy"),
    *("typing-extensions", "transformers==5.23.0", "jax==0.7.1", "jaxlib==0.7.1"),  # jax: what Pallas kernels are in
    *("pytest>=8", "pytest-asyncio>=0.24", "httpx>=0.27", "hypothesis>=6.100"),
)
PACKAGES = ("backends/torch", "backends/tpu")  # installed without dependencies, which would be torch with all of CUDA
WITH_DEPENDENCIES = ("core", "api")

UNUSED = {"libcaffe2_nvrtc.so", "libtorch_cuda_linalg.so"}  # opened only when CUDA is used
SYSTEM = re.compile(r"(lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp|numa)\.so|ld-linux)")
PREFIXES = {  # which library a symbol without a version belongs to
    "libcublas": "cublas",
    "libcublasLt": "cublasLt",
    "libcudart": "cuda|__cuda",
    "libcudnn": "cudnn",
    "libcufft": "cufft",
    "libcufile": "cuFile",
    "libcupti": "cupti",
    "libcurand": "curand",
    "libcusparse": "cusparse",
    "libcusparseLt": "cusparseLt",
    "libnccl": "nccl|pnccl",
    "libnvToolsExt": "nvtx",
    "libnvshmem_host": "nvshmem",
}
Symbols = dict[str, str]  # name -> ELF type
Libraries = dict[str, dict[str, Symbols]]  # file name -> version ("" if none) -> its symbols


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    python = folder / "bin" / "python"
    done = folder / ".complete"
    if done.exists() and done.read_text() == _recipe():
        return
    venv.create(folder, with_pip=True)

    def install(*arguments: str) -> None:
        # torch without its NVIDIA libraries is a conflict to pip, and meant to be.
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-warn-conflicts")
        subprocess.run([*pip, *arguments], check=True)

    install("--no-deps", *WITHOUT_DEPENDENCIES)
    install(*DEPENDENCIES)
    make_stand_ins(_site_packages(python))
    install(*(part for package in WITH_DEPENDENCIES for part in ("--editable", str(ROOT / package))))
    install("--no-deps", *(part for package in PACKAGES for part in ("--editable", str(ROOT / package))))
    done.write_text(_recipe())


def make_stand_ins(site_packages: Path) -> None:
    """Write a library of empty functions for each one that torch links to and that is not installed."""
    folder = site_packages / "torch" / "lib"
    for name, versions in missing_libraries(site_packages).items():
        _build(folder / name, versions)


def missing_libraries(site_packages: Path) -> Libraries:
    """What torch's libraries need, and nobody there defines."""
    torch = site_packages / "torch"
    present = {path.name for path in [*torch.glob("lib/*.so*"), *site_packages.glob("nvidia/**/*.so*")]}
    needed: set[str] = set()
    defined: set[str] = set()
    undefined: dict[tuple[str, str], str] = {}  # name, version -> type
    library_of: dict[str, str] = {}  # version -> library
    for path in [*torch.glob("lib/*.so*"), *torch.glob("_C*.so")]:
        if path.name in UNUSED:
            continue
        wanted = re.findall(r"\(NEEDED\).*\[(.*?)\]", _readelf("-d", path))
        needed |= {name for name in wanted if name not in present and not SYSTEM.match(name)}
        library_of |= _version_files(path)
        for line in _readelf("--dyn-syms", path).splitlines():
            match line.split():
                case [number, _, _, kind, _, _, section, symbol, *_] if number.rstrip(":").isdigit():
                    name, _, version = symbol.partition("@")
                    if section == "UND":
                        undefined[name, version.lstrip("@")] = kind
                    else:
                        defined.add(name)
    libraries: Libraries = {name: defaultdict(dict) for name in sorted(needed)}
    for (name, version), kind in undefined.items():
        library = library_of.get(version) if version else _by_prefix(name, needed)
        if name not in defined and library in libraries:
            libraries[library][version][name] = kind
    return libraries


def _by_prefix(symbol: str, libraries: set[str]) -> str | None:
    fitting = [name for name in libraries if (p := PREFIXES.get(name.split(".so")[0])) and re.match(p, symbol)]
    return max(fitting, key=len, default=None)


def _version_files(path: Path) -> dict[str, str]:
    """Symbol version -> the library it is of."""
    out, library = {}, ""
    for line in _readelf("-V", path).splitlines():
        if found := re.search(r"File: (\S+)", line):
            library = found[1]
        elif found := re.search(r"Name: (\S+)\s+Flags", line):
            out[found[1]] = library
    return out


def _build(path: Path, versions: dict[str, Symbols]) -> None:
    source, script = path.with_suffix(".stand-in.c"), path.with_suffix(".stand-in.map")
    symbols = {name: kind for of_version in versions.values() for name, kind in of_version.items()}
    lines = [
        f"char {name}[4096];" if kind in ("OBJECT", "TLS") else f"long {name}(void) {{ return 1; }}"
        for name, kind in sorted(symbols.items())
    ]
    source.write_text("\n".join(lines) + "\n")
    script.write_text(
        "\n".join(
            f"{version} {{ global: {' '.join(name + ';' for name in sorted(of_version))} }};"
            for version, of_version in versions.items()
            if version
        )
    )
    versioned = [f"-Wl,--version-script={script}"] if any(versions) else []
    options = ["-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{path.name}", *versioned]
    subprocess.run(["gcc", *options, "-o", path, source], check=True)
    source.unlink()
    script.unlink()


def _readelf(option: str, path: Path) -> str:
    return subprocess.run(["readelf", option, "-W", path], check=True, capture_output=True, text=True).stdout


def _site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    return Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def _recipe() -> str:
    return Path(__file__).read_text() + "".join(
        (ROOT / p / "pyproject.toml").read_text() for p in (*PACKAGES, *WITH_DEPENDENCIES)
    )


if __name__ == "__main__":
    main()
