"""Our server and every installed peer, side by side: one table, one JSON file, one plot.

All servers of a model are started once and stay; each case is then measured with each of them in turn, round after
round, so that what else happens on the machine hits all alike. Idle servers wait without work.

    python -m benchmarks.peers.compare --quick
    python -m benchmarks.peers.compare --llama-server PATH --gguf FOLDER --vllm PATH --transformers PATH
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from . import report, servers
from .ceiling import Ceiling, ceiling
from .load import Case, measure
from .models import SHAPES, model_folder
from .processes import Watch, resident_bytes

ROOT = Path(__file__).parents[2]

SHORT = [Case("short", 1, 3), Case("short", 8, 16), Case("short", 32, 32)]
LONG = Case("long", 8, 8, prompt_tokens=1024, output_tokens=16)
SHARED = Case("shared", 8, 16, prompt_tokens=1000, output_tokens=16, shared_tokens=900)
CASES = {
    "tiny": [Case("short", 1, 16), Case("short", 64, 256)],
    "smol": [*SHORT, LONG, SHARED],
    "qwen05": [*SHORT, LONG, SHARED],
}
NAMES = ["short", "long", "shared"]
BUSY_SHARE = 0.1  # from here on the report says that the machine was busy


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped too
    args.out.mkdir(parents=True, exist_ok=True)
    results = report.Results(ceilings=[ceiling()])
    try:
        for model in ["tiny"] if args.quick else args.models:
            compare(model, args, results)
    finally:  # what was measured until an interrupt counts as well
        finish(args, results)


def finish(args: argparse.Namespace, results: report.Results) -> None:
    """Write the files, print the table and what a reader must know of it."""
    report.write_json(results, args.out / "peers.json")
    report.plot(results, args.out / "peers.png")
    print(report.tables(results))
    if missing := missing_peers(args):
        print(f"Not measured, for want of a path: {', '.join(missing)}. See benchmarks/README.md.")
    busy = [sample.foreign_share for sample in results.samples]
    if busy and max(busy) > BUSY_SHARE:
        print(f"The machine was busy: others used up to {max(busy):.0%} of the processors during a measurement.")
    print(f"{args.out}/peers.json, {args.out}/peers.png")


def compare(model: str, args: argparse.Namespace, results: report.Results) -> None:
    """Measure every case of the model with every server; what fails is reported and left out."""
    folder = model_folder(args.model_root, model)
    with ExitStack() as stack:
        up: dict[servers.Server, servers.Running] = {}
        for server in chosen(args):
            try:
                up[server] = stack.enter_context(
                    servers.running(server, folder, args.out / f"{model}-{server.name}.log")
                )
            except (RuntimeError, OSError) as error:
                print(f"{model}, {server.name}: {error}", file=sys.stderr)
                continue
            results.ready_s[model, server.name] = up[server].ready_s
        for case in args.load or [case for case in CASES[model] if case.name in args.cases]:
            for round_number in range(args.rounds):
                turn = round_number % max(1, len(up))
                if case.concurrency == 1:  # the only case that is held against it
                    results.ceilings.append(ceiling())
                for server in [*list(up)[turn:], *list(up)[:turn]]:
                    sample(model, folder, case, server, up[server], round_number, results)


def sample(
    model: str,
    folder: Path,
    case: Case,
    server: servers.Server,
    running: servers.Running,
    round_number: int,
    results: report.Results,
) -> None:
    """One measurement, into the results; a failure is printed and leaves no sample."""
    watch = Watch(running.process.pid)
    # Other words each time, or the prefix cache would answer.
    seed = 1000 * round_number + 10 * case.concurrency + len(case.name)
    try:
        measured = measure(running.url, {"model": running.model, **server.fields}, folder, case, seed)
    except (RuntimeError, OSError) as error:
        print(f"{model}, {case.name} c={case.concurrency}, {server.name}: {error}", file=sys.stderr)
        return
    weights_s = weights_time_s(folder, server, results.ceilings[-1])
    taken = report.Sample(model, case, server, measured, weights_s / (measured.token_ms / 1000), watch.foreign_share())
    results.samples.append(taken)
    results.resident_bytes[model, server.name] = resident_bytes(running.process.pid)
    print(f"{time.strftime('%H:%M:%S')} {report.line(taken)}", file=sys.stderr)


def weights_time_s(folder: Path, server: servers.Server, limit: Ceiling) -> float:
    """Least time of a token alone: every weight is read once. The checkpoint is bfloat16; its tables are tied."""
    parameters = (folder / "model.safetensors").stat().st_size / 2
    return parameters * server.weight_bytes / limit.read_bytes_per_s


def chosen(args: argparse.Namespace) -> Iterator[servers.Server]:
    """Ours first; then the peers that have a path."""
    yield servers.ours("bf16", "")
    for variant in args.variant:
        name, _, flags = variant.partition("=")
        yield servers.ours(name, flags)
    if args.llama_server and args.gguf:
        yield servers.llama(args.llama_server, args.gguf, "bf16")
        yield servers.llama(args.llama_server, args.gguf, "q8_0")
    if args.vllm:
        yield servers.vllm(args.vllm, args.vllm_preload)
    if args.transformers:
        yield servers.transformers(args.transformers)


def missing_peers(args: argparse.Namespace) -> list[str]:
    paths = {
        "--llama-server": args.llama_server,
        "--gguf": args.gguf,
        "--vllm": args.vllm,
        "--transformers": args.transformers,
    }
    return [option for option, path in paths.items() if not path]


def own_case(text: str) -> Case:
    """A value of --load.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*):([1-9]\d*)/([1-9]\d*)(?:/(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 16x32:512/128, or 16x32:1000/16/900 with shared tokens")
    clients, requests, prompt, output, shared = (int(number or 0) for number in found.groups())
    if shared >= prompt:
        raise argparse.ArgumentTypeError(f"{text!r}: {shared} shared tokens leave nothing of {prompt}")
    return Case(text.partition(":")[2], clients, requests, prompt, output, shared)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the model without arithmetic; a few minutes")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(CASES), metavar="NAME")
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument(
        "--load", action="append", type=own_case, metavar="CLIENTSxREQUESTS:PROMPT/OUTPUT[/SHARED]",
        help="instead of the usual cases: 16x32:512/128 is 32 requests of 16 clients, of 512 tokens for 128",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--model-root", type=Path, default=ROOT / "build" / "bench" / "models", help="made if missing")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=FLAGS",
        help="our server once more with these flags of `tokenplane serve`; NAME int8 is compared with 8-bit peers",
    )  # fmt: skip
    for option, kind, text in (
        ("llama-server", str, "llama.cpp's llama-server"),
        ("gguf", Path, "folder with <model>-bf16.gguf and <model>-q8_0.gguf"),
        ("vllm", str, "the `vllm` command of a CPU build"),
        ("vllm-preload", str, "libraries for its LD_PRELOAD, with colons"),
        ("transformers", str, "the `transformers` command"),
    ):
        variable = "BENCH_" + option.upper().replace("-", "_")
        default = os.environ.get(variable, "")
        parser.add_argument(
            f"--{option}", type=kind, default=kind(default) if default else "", help=f"{text}; {variable}"
        )
    return parser.parse_args()


if __name__ == "__main__":
    main()
