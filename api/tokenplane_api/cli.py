"""The command line: `tokenplane serve`, `plan`, `devices`, `new-backend`; and `text-generation-launcher`, which serves.

Which options there are stands in flags.py, how click sees them in options.py, what becomes of them in launcher.py.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from tokenplane_core.backend.errors import TokenplaneError
from tokenplane_core.backend.records import LoadOptions
from tokenplane_core.logs import configure as configure_log

from . import __version__
from .adapters import plan_adapters
from .devices import devices_json, devices_table
from .flags import BY_NAME, FLAGS
from .launcher import describe, plan_launch
from .new_backend import new_backend
from .options import GroupedCommand, config_option, option, sources
from .plan import make_plan
from .versions import runtime_environment

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

log = logging.getLogger("tokenplane.server")


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, "--version", "-V", prog_name="tokenplane", message="%(prog)s %(version)s")
def app() -> None:
    """One LLM server, any accelerator."""


# --- serve --------------------------------------------------------------------------------------------------


def _serve(env: bool, config: Path | None, **values: Any) -> None:
    """Serve a model over HTTP, with OpenAI's and TGI's routes.

    Each option can also be set by a variable, its name in capitals (--max-best-of: MAX_BEST_OF) or the one in
    brackets, and in the --config file by its name. The option wins over the variable, the variable over the file.
    """
    if env:
        click.echo(runtime_environment())
        if not values["model_id"]:
            return
    given = sources(click.get_current_context(), config)
    launch = plan_launch(values, given, os.environ)
    os.environ.update(launch.variables)
    configure_log(launch.variables["LOG_LEVEL"], launch.options.json_output)
    for noisy in ("uvicorn", "httpx", "asyncio"):
        logging.getLogger(noisy).setLevel("WARNING")
    log.info("Tokenplane %s; %s", __version__, describe(values, given))
    for notice in launch.notices:
        log.info("%s", notice)
    from .server import serve as run_server  # the HTTP stack takes a second, which --help should not

    run_server(launch.options, launch.settings)


def _epilog() -> str:
    lists = {
        verdict: [f"--{flag.name}" for flag in FLAGS if flag.verdict == verdict] for verdict in ("needless", "refused")
    }
    return (
        f"Accepted from TGI, with nothing left to do: {', '.join(lists['needless'])}.\n\n"
        f"Refused, with what to do instead: {', '.join(lists['refused'])}."
    )


serve = GroupedCommand(
    "serve",
    callback=_serve,
    help=_serve.__doc__,
    short_help="Serve a model over HTTP.",
    epilog=_epilog(),
    context_settings=CONTEXT,
    params=[
        *map(option, FLAGS),
        config_option(),
        click.Option(
            ["--env", "-e"], is_flag=True, help="Print versions and devices; then serve, if a model is given."
        ),
    ],
)
app.add_command(click.version_option(__version__, "--version", "-V", message="%(prog)s %(version)s")(serve))


# --- plan, devices, new-backend -----------------------------------------------------------------------------


@app.command(short_help="Show where the memory would go, without the device.")
@click.argument("model_id", metavar="MODEL", envvar="MODEL_ID")
@click.option("--device", help="A catalogue name (H100), a size (80GiB) or a backend here.  [default: the best here]")
@click.option("--count", type=click.IntRange(min=1), default=1, help="Of how many such devices.")
@click.option("--json", is_flag=True, help="One JSON object instead of text.")
def plan(model_id: str, device: str | None, count: int, json: bool, config: Path | None, **values: Any) -> None:
    """Show where a device's memory would go if it served the model.

    Options, variables and the --config file are those of `tokenplane serve`. Exit status: 0 if it fits, 1 if it does
    not, 2 if nothing could be planned.
    """
    progress = partial(click.echo, err=True)
    try:
        adapters = plan_adapters(
            values["lora_adapters"] or (),
            (),
            max_adapters=values["max_loras"],
            max_rank=values["max_lora_rank"],
            may_load_later=values["allow_runtime_lora"],
            hub_cache=values["huggingface_hub_cache"],
            progress=progress,
        )
        report = make_plan(
            model_id,
            device,
            count,
            revision=values["revision"],
            hub_cache=values["huggingface_hub_cache"],
            dtype=values["dtype"],
            quantize=values["quantize"],
            kv_cache_dtype=values["kv_cache_dtype"],
            max_model_tokens=values["max_total_tokens"],
            cache_tokens=values["max_batch_total_tokens"],
            memory_fraction=values["cuda_memory_fraction"] or 1,
            options=LoadOptions(
                max_step_tokens=values["max_batch_prefill_tokens"],
                max_sequences=values["max_batch_size"],
                max_adapters=adapters.max_adapters,
                max_adapter_rank=adapters.max_rank,
                max_drafts=values["speculate"] or 0,
            ),
            progress=progress,
        )
    except TokenplaneError as error:
        click.echo(f"tokenplane: {error}", err=True)
        raise SystemExit(2) from error
    click.echo(report.json() if json else report.text())
    raise SystemExit(0 if report.fits else 1)


UNSET_IN_PLANS = {
    "revision": "",
    "huggingface-hub-cache": "the hub library's",
    "dtype": "as the checkpoint was saved",
    "quantize": "what config.json says",
    "kv-cache-dtype": "auto",
    "max-total-tokens": "the model's",
    "max-batch-prefill-tokens": "the device's",
    "max-batch-size": "the device's",
    "max-batch-total-tokens": "what fits",
    "cuda-memory-fraction": "",
    "lora-adapters": BY_NAME["lora-adapters"].unset,
    "allow-runtime-lora": "",
    "max-loras": BY_NAME["max-loras"].unset,
    "max-lora-rank": BY_NAME["max-lora-rank"].unset,
    "speculate": "",
}
"""The options of `serve` that a plan depends on, with what holds without them."""

plan.params += [option(replace(BY_NAME[name], unset=unset)) for name, unset in UNSET_IN_PLANS.items()]
plan.params.append(config_option())


@app.command()
@click.option("--json", is_flag=True, help="One JSON object instead of a table.")
def devices(json: bool) -> None:
    """Show every installed backend, its devices or exactly why it has none, and hardware that lacks its plugin."""
    click.echo(devices_json() if json else devices_table())


@app.command("new-backend")
@click.argument("name", metavar="NAME")
@click.option("--path", type=click.Path(path_type=Path), default=Path(), help="Folder to write NAME-backend to.")
def write_new_backend(name: str, path: Path) -> None:
    """Write the package of a new backend, which already passes the conformance kit at its simplest level.

    NAME is what --backend will call it.
    """
    folder = new_backend(name, path)
    click.echo(f"{folder} is written. Next:\n  pip install -e {folder}\n  pytest --tokenplane-backend {name}")


# --- Entry points -------------------------------------------------------------------------------------------


def main() -> None:
    """`tokenplane`. Exit code 0 after a clean end, 1 if the server cannot start, 2 for a wrong command line."""
    _run(app, "tokenplane")


def main_of_tgi() -> None:
    """`text-generation-launcher`: the same as `tokenplane serve`."""
    _run(serve, "text-generation-launcher")


def _run(command: click.Command, name: str) -> None:
    try:
        command(prog_name=name)
    except TokenplaneError as error:
        print(f"tokenplane: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
