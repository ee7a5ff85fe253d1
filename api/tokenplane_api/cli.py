"""The command line: `tokenplane serve`, `plan`, `devices`, `new-backend`. Options have TGI's names where they exist."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from tokenplane_core.backend.errors import ConfigError, TokenplaneError
from tokenplane_core.backend.records import LoadOptions

from . import __version__
from .devices import devices_json, devices_table
from .new_backend import new_backend
from .plan import make_plan
from .server import ServeOptions, is_ip_address
from .server import serve as run_server
from .settings import Settings

_MODEL, _ENGINE, _LIMITS, _HTTP = "Model", "Engine", "Limits", "HTTP"

ANY_ADDRESS = "0.0.0.0"


class GroupedCommand(TyperCommand):
    """A command whose help lists its options under headings, in plain text that a narrow terminal does not cut."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                heading = getattr(parameter, "rich_help_panel", None) or "Other"
                groups.setdefault(heading, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


app = typer.Typer(
    name="tokenplane",
    help="One LLM server, any accelerator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _option(
    env: str, heading: str, text: str, *names: str, unset: str = "", low: int | None = None, high: int | None = None
) -> Any:
    """An option with its environment variable; `unset` says in the help what happens without it."""
    return typer.Option(
        *names, envvar=env, help=text, rich_help_panel=heading, min=low, max=high, show_default=unset or True
    )


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", "-V", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"tokenplane {__version__}")
        raise typer.Exit


@app.command()
def devices(
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Show every installed backend, its devices or exactly why it has none, and hardware that lacks its plugin."""
    typer.echo(devices_json() if json else devices_table())


@app.command("new-backend")
def write_new_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What --backend will call it.")],
    path: Annotated[Path, typer.Option("--path", help="Folder to write NAME-backend to.")] = Path("."),
) -> None:
    """Write the package of a new backend, which already passes the conformance kit at its simplest level."""
    folder = new_backend(name, path)
    typer.echo(f"{folder} is written. Next:\n  pip install -e {folder}\n  pytest --tokenplane-backend {name}")


@app.command(short_help="Show where the memory would go, without the device.")
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or id on the Hugging Face hub.")],
    device: Annotated[
        str | None,
        typer.Option(help="A catalogue name (H100), a size (80GiB) or a backend here.", show_default="the best here"),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Of how many such devices.")] = 1,
    revision: Annotated[str | None, _option("REVISION", _MODEL, "Branch, tag or commit on the hub.")] = None,
    huggingface_hub_cache: Annotated[
        Path | None, _option("HUGGINGFACE_HUB_CACHE", _MODEL, "Where downloads are kept.", unset="the hub library's")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        _option("DTYPE", _MODEL, "Number format of weights and cache.", unset="as the checkpoint was saved"),
    ] = None,
    max_total_tokens: Annotated[
        int | None, _option("MAX_TOTAL_TOKENS", _LIMITS, "Longest prompt plus answer.", unset="the model's", low=2)
    ] = None,
    max_batch_prefill_tokens: Annotated[
        int | None, _option("MAX_BATCH_PREFILL_TOKENS", _LIMITS, "Tokens computed in one step.", unset="2048", low=1)
    ] = None,
    max_batch_size: Annotated[
        int | None, _option("MAX_BATCH_SIZE", _LIMITS, "Sequences computed at once.", unset="64", low=1)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Show where a device's memory would go if it served the model.

    Exit status: 0 if it fits, 1 if it does not, 2 if nothing could be planned.
    """
    try:
        report = make_plan(
            model,
            device,
            count,
            revision=revision,
            hub_cache=huggingface_hub_cache,
            dtype=dtype,
            max_model_tokens=max_total_tokens,
            options=LoadOptions(max_step_tokens=max_batch_prefill_tokens, max_sequences=max_batch_size),
            progress=lambda line: typer.echo(line, err=True),
        )
    except TokenplaneError as error:
        typer.echo(f"tokenplane: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(report.json() if json else report.text())
    raise typer.Exit(0 if report.fits else 1)


@app.command(cls=GroupedCommand, short_help="Serve a model over HTTP.")
def serve(
    context: typer.Context,
    model_id: Annotated[str, _option("MODEL_ID", _MODEL, "Model folder, or id on the Hugging Face hub.")],
    revision: Annotated[str | None, _option("REVISION", _MODEL, "Branch, tag or commit on the hub.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        _option("DTYPE", _MODEL, "Number format of weights and cache.", unset="as the checkpoint was saved"),
    ] = None,
    tokenizer_config_path: Annotated[
        Path | None,
        _option("TOKENIZER_CONFIG_PATH", _MODEL, "A tokenizer_config.json, read instead of the model's own."),
    ] = None,
    trust_remote_code: Annotated[
        bool, _option("TRUST_REMOTE_CODE", _MODEL, "Run Python code that comes with the model.", "--trust-remote-code")
    ] = False,
    huggingface_hub_cache: Annotated[
        Path | None, _option("HUGGINGFACE_HUB_CACHE", _MODEL, "Where downloads are kept.", unset="the hub library's")
    ] = None,
    served_model_name: Annotated[
        str | None, _option("SERVED_MODEL_NAME", _MODEL, "What clients call the model.", unset="the model id")
    ] = None,
    backend: Annotated[
        str | None,
        _option(
            "TOKENPLANE_BACKEND",
            _ENGINE,
            "Backend plugin to serve with; see `tokenplane devices`.",
            unset="the best found",
        ),
    ] = None,
    device_index: Annotated[
        int | None,
        _option(
            "TOKENPLANE_DEVICE_INDEX",
            _ENGINE,
            "Which of its devices.",
            unset="the one with the most free memory",
            low=0,
        ),
    ] = None,
    num_threads: Annotated[
        int | None,
        _option(
            "TOKENPLANE_NUM_THREADS",
            _ENGINE,
            "Host threads the backend computes with.",
            unset="its own choice",
            low=1,
        ),
    ] = None,
    ready_timeout: Annotated[
        int,
        _option(
            "TOKENPLANE_READY_TIMEOUT",
            _ENGINE,
            "Seconds that loading, compiling and warming up may take; compilers of some devices take many minutes.",
            low=1,
        ),
    ] = 600,
    prefix_caching: Annotated[
        bool,
        _option(
            "PREFIX_CACHING",
            _ENGINE,
            "Reuse the KV cache of equal prompt starts.",
            "--prefix-caching/--no-prefix-caching",
        ),
    ] = True,
    max_concurrent_requests: Annotated[
        int,
        _option("MAX_CONCURRENT_REQUESTS", _LIMITS, "Requests running or waiting; more are refused with 429.", low=1),
    ] = 128,
    max_input_tokens: Annotated[
        int | None, _option("MAX_INPUT_TOKENS", _LIMITS, "Longest prompt.", unset="what fits", low=1)
    ] = None,
    max_total_tokens: Annotated[
        int | None, _option("MAX_TOTAL_TOKENS", _LIMITS, "Longest prompt plus answer.", unset="what fits", low=2)
    ] = None,
    max_batch_prefill_tokens: Annotated[
        int | None,
        _option("MAX_BATCH_PREFILL_TOKENS", _LIMITS, "Tokens computed in one step.", unset="the backend's", low=1),
    ] = None,
    max_batch_total_tokens: Annotated[
        int | None,
        _option("MAX_BATCH_TOTAL_TOKENS", _LIMITS, "Tokens in the KV cache.", unset="what memory allows", low=1),
    ] = None,
    max_batch_size: Annotated[
        int | None, _option("MAX_BATCH_SIZE", _LIMITS, "Sequences computed at once.", unset="the backend's", low=1)
    ] = None,
    max_best_of: Annotated[int, _option("MAX_BEST_OF", _LIMITS, "Largest `best_of`.", low=1)] = 2,
    max_stop_sequences: Annotated[
        int, _option("MAX_STOP_SEQUENCES", _LIMITS, "Most stop strings of a request.", low=0)
    ] = 4,
    max_top_n_tokens: Annotated[int, _option("MAX_TOP_N_TOKENS", _LIMITS, "Largest `top_n_tokens`.", low=0)] = 5,
    max_client_batch_size: Annotated[
        int, _option("MAX_CLIENT_BATCH_SIZE", _LIMITS, "Most prompts of one completions request.", low=1)
    ] = 4,
    payload_limit: Annotated[
        int, _option("PAYLOAD_LIMIT", _LIMITS, "Largest request body, in bytes.", low=1)
    ] = 2_000_000,
    hostname: Annotated[str, _option("HOSTNAME", _HTTP, "Address to listen on.")] = ANY_ADDRESS,
    port: Annotated[
        int, _option("PORT", _HTTP, "Port to listen on; 0: any free one.", "--port", "-p", low=0, high=65535)
    ] = 3000,
    api_key: Annotated[
        str | None, _option("API_KEY", _HTTP, "Clients must send it as a bearer token.", unset="open to all")
    ] = None,
    cors_allow_origin: Annotated[
        list[str] | None,
        _option("CORS_ALLOW_ORIGIN", _HTTP, "Web origin that may call; repeat for several.", unset="any"),
    ] = None,
    validation_workers: Annotated[
        int, _option("VALIDATION_WORKERS", _HTTP, "Threads that tokenize long texts.", low=1)
    ] = 2,
    graceful_termination_timeout: Annotated[
        int,
        _option(
            "GRACEFUL_TERMINATION_TIMEOUT",
            _HTTP,
            "Seconds that running requests may take after SIGTERM.",
            "--graceful-termination-timeout",
            "-g",
            low=0,
        ),
    ] = 90,
) -> None:
    """Serve a model over HTTP, with OpenAI's and TGI's routes.

    Every option can also be set by the environment variable shown with it; the option wins.
    """
    _log_to_stderr()
    options = ServeOptions(
        model_id=model_id,
        revision=revision,
        backend=backend,
        device_index=device_index,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        tokenizer_config_path=tokenizer_config_path,
        hub_cache=huggingface_hub_cache,
        num_threads=num_threads,
        max_step_tokens=max_batch_prefill_tokens,
        max_sequences=max_batch_size,
        kv_cache_tokens=max_batch_total_tokens,
        prefix_cache=prefix_caching,
        ready_timeout_s=ready_timeout,
        hostname=_usable_hostname(hostname, _is_from_environment(context, "hostname")),
        port=port,
        grace_s=graceful_termination_timeout,
    )

    def make_settings(model_sha: str | None) -> Settings:
        return Settings(
            model_id=model_id,
            model_sha=model_sha,
            served_model_name=served_model_name,
            max_concurrent_requests=max_concurrent_requests,
            max_best_of=max_best_of,
            max_stop_sequences=max_stop_sequences,
            max_top_n_tokens=max_top_n_tokens,
            max_client_batch_size=max_client_batch_size,
            max_input_tokens=max_input_tokens,
            max_total_tokens=max_total_tokens,
            payload_limit_bytes=payload_limit,
            validation_workers=validation_workers,
            api_key=_usable_key(os.environ.get("API_KEY") if api_key is None else api_key),
            cors_allow_origins=tuple(cors_allow_origin or ("*",)),
            compute_type=os.environ.get("COMPUTE_TYPE"),
        )

    run_server(options, make_settings)


def _is_from_environment(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "ENVIRONMENT"


def _usable_hostname(hostname: str, is_from_environment: bool) -> str:
    """Containers set HOSTNAME to a name that says nothing about where to listen; an option means what it says."""
    if is_from_environment and not is_ip_address(hostname):
        logging.getLogger("tokenplane.server").warning(
            "The environment sets HOSTNAME to %r, which is no IP address; listening on %s", hostname, ANY_ADDRESS
        )
        return ANY_ADDRESS
    return hostname


def _usable_key(key: str | None) -> str | None:
    """Typer takes an empty variable for none; a secret that failed to arrive must not open the server to all."""
    if key is not None and not key.strip():
        raise ConfigError("--api-key (API_KEY) is empty; leave it out to serve without a key")
    return key


def _log_to_stderr() -> None:
    level = os.environ.get("LOG_LEVEL", "info").upper()
    known = level if level in ("DEBUG", "INFO", "WARNING", "ERROR") else "INFO"
    logging.basicConfig(stream=sys.stderr, level=known, format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("uvicorn", "httpx", "asyncio"):
        logging.getLogger(noisy).setLevel("WARNING")


def main() -> None:
    """Exit code 0 after a clean end, 1 if the server cannot start, 2 for a wrong command line."""
    try:
        app(prog_name="tokenplane")
    except TokenplaneError as error:
        print(f"tokenplane: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
