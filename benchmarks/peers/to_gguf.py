"""A benchmark model as GGUF, by llama.cpp's own converter, which knows tokenizers by a checksum and not ours.

    python -m benchmarks.peers.to_gguf LLAMA_CPP_SOURCE MODEL_FOLDER GGUF_FOLDER

writes <model>-bf16.gguf and <model>-q8_0.gguf. Needs transformers, torch and what the converter itself imports.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# Runs in the source's folder. "gpt-2" is byte-level BPE with GPT-2's split, which keeps the words of our prompts whole.
CONVERT = """
import runpy, sys
sys.path[:0] = ["gguf-py", "."]
from conversion import base
for kind in vars(base).values():
    if isinstance(kind, type) and "get_vocab_base_pre" in vars(kind):
        kind.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "model", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    for kind in ("bf16", "q8_0"):
        target = args.out.resolve() / f"{args.model.name}-{kind}.gguf"
        options = [str(args.model.resolve()), "--outtype", kind, "--outfile", str(target)]
        subprocess.run([sys.executable, "-c", CONVERT, *options], cwd=args.source, check=True)


if __name__ == "__main__":
    main()
