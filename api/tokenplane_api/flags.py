"""Every option of `tokenplane serve` and every variable of TGI's launcher, in two tables.

The command line, its help, the config file, the start-up checks and the documents are made from them. An option keeps
the name, the variable and the meaning that TGI gave it. What becomes of it is one of three things:

* honoured: its value goes into the field of that name in ServeOptions or Settings;
* needless: accepted and said so in the log, because what it asks for holds without it;
* refused: what it asks for would not happen, so the server does not start and the sentence says what to do instead.

Nothing here reads the command line or the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import click

from .adapters import LEAST_RANK, SPARE, AdapterSource, parse_adapters
from .settings import ServeOptions, Settings

Verdict = Literal["honoured", "needless", "refused"]

MODEL, ENGINE, LIMITS, HTTP, LOGS = "Model", "Engine", "Limits", "HTTP", "Logs"
GROUPS = (MODEL, ENGINE, LIMITS, HTTP, LOGS)

COUNT = click.IntRange(min=1)
NATURAL = click.IntRange(min=0)
SECONDS = click.FloatRange(min=0, min_open=True)
PATH = click.Path(path_type=Path)
MOST_DRAFTS = 64


class Rows(click.ParamType):  # type: ignore[type-arg]  # generic in new versions only
    """`1,2,4` as (1, 2, 4); `0` as (): TGI's way to say none."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,2,4,8; 0 for none.", param, ctx)
        if numbers == [0]:
            return ()
        if min(numbers) < 1:
            self.fail(f"{value!r} holds {min(numbers)}; each batch size must be at least 1.", param, ctx)
        return tuple(sorted(set(numbers)))


class Adapters(click.ParamType):  # type: ignore[type-arg]  # as Rows
    """`a,b=/path` as AdapterSources."""

    name = "adapters"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[AdapterSource, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return parse_adapters(str(value))
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One option, without its dashes.

    type: a type of click's. field: of ServeOptions or Settings (or both) that takes the value; "" where `launcher`
    looks at it, or nobody. unset: in the help, what holds without it. names: other spellings of the option. variables:
    what is read from the environment, if not only the name in capitals. tgi: TGI's default, None for options of ours.
    idle: values of a refused flag that ask for nothing and are accepted. why: the sentence of a needless or refused
    one.
    """

    name: str
    group: str = ""
    help: str = ""
    type: Any = str
    field: str = ""
    unset: str = ""
    names: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    tgi: str | None = None
    is_switch: bool = False
    is_repeated: bool = False
    is_secret: bool = False
    verdict: Verdict = "honoured"
    idle: tuple[Any, ...] = (False,)
    why: str = ""

    @property
    def parameter(self) -> str:
        """What click and the config file call it."""
        return self.name.replace("-", "_")

    @property
    def environment(self) -> tuple[str, ...]:
        """The variables it is read from, the first one set wins."""
        return self.variables or (self.parameter.upper(),)

    @cached_property
    def default(self) -> Any:
        """What the field holds without the option."""
        for record in (ServeOptions, Settings):
            for item in fields(record):
                if item.name == self.field:
                    return None if item.default is MISSING else item.default
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A variable of TGI's that has no option.

    why: who reads it, why it is needless, or what to do instead. field: of Settings or ServeOptions, that takes it.
    """

    name: str
    verdict: Verdict
    why: str
    tgi: str = ""
    field: str = ""
    idle: tuple[str, ...] = ()


# A row takes the lines it needs and no more.
# fmt: off


def _model() -> Iterator[Flag]:
    yield Flag(
        name="model-id", group=MODEL, help="Model folder, or id on the Hugging Face hub. Required.", field="model_id",
        variables=("MODEL_ID", "HF_MODEL_ID"), tgi="bigscience/bloom-560m",
    )
    yield Flag(
        name="revision", group=MODEL, help="Branch, tag or commit on the hub.", field="revision",
        variables=("REVISION", "HF_MODEL_REVISION"), tgi="main",
    )
    yield Flag(
        name="dtype", group=MODEL, help="Number format of weights and KV cache.", field="dtype",
        type=click.Choice(("float32", "bfloat16", "float16")), unset="as the checkpoint was saved",
        tgi="by model type",
    )
    yield Flag(
        name="quantize", group=MODEL, field="quantize", type=click.Choice(QUANTIZERS), unset="what config.json says",
        help="How the checkpoint is stored (awq, fp8, gptq, ...); or int8, int4 or eetq: quantize its weights at load.",
        variables=("QUANTIZE", "HF_MODEL_QUANTIZE"), tgi="unset",
    )
    yield Flag(
        name="kv-cache-dtype", group=MODEL, field="kv_cache_dtype", type=click.Choice(KV_CACHE_DTYPES), unset="auto",
        help="Number format of the KV cache: auto, that of --dtype, or int8 in half of bfloat16's room (backend cpu).",
        tgi="unset",
    )
    yield Flag(
        name="tokenizer-config-path", group=MODEL, field="tokenizer_config_path", type=PATH, tgi="unset",
        help="A tokenizer_config.json (with the chat template), read instead of the model's own.",
    )
    yield Flag(
        name="trust-remote-code", group=MODEL, field="trust_remote_code", is_switch=True, tgi="false",
        help="Run Python code that comes with the model.",
        variables=("TRUST_REMOTE_CODE", "HF_MODEL_TRUST_REMOTE_CODE"),
    )
    yield Flag(
        name="huggingface-hub-cache", group=MODEL, field="hub_cache", type=PATH, tgi="unset",
        help="Where downloads are kept.", unset="the hub library's",
    )
    yield Flag(
        name="served-model-name", group=MODEL, field="served_model_name", unset="the model id",
        help="What clients call the model.",
    )
    yield Flag(
        name="lora-adapters", group=MODEL, field="lora_adapters", type=Adapters(), unset="none", tgi="unset",
        help="LoRA adapters, as id, id@revision, name=path or name=id@revision, with commas between.",
    )
    yield Flag(
        name="allow-runtime-lora", group=MODEL, field="allow_runtime_lora", is_switch=True,
        help="Let clients load and unload adapters, from folders of this machine.",
        variables=("ALLOW_RUNTIME_LORA", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    )
    yield Flag(
        name="tool-call-parser", group=MODEL, field="tool_call_parser",
        help="How the model writes function calls: auto, hermes, qwen3_coder, llama3_json, mistral, deepseek, harmony"
        " or json.",
    )
    yield Flag(
        name="reasoning-parser", group=MODEL, field="reasoning_parser",
        help="How its thoughts are marked: auto, none, think, mistral or harmony; none leaves them in the text.",
    )


QUANTIZERS = (
    "awq", "bitsandbytes", "bitsandbytes-fp4", "bitsandbytes-nf4", "compressed-tensors", "eetq", "exl2", "fp8", "gptq",
    "int4", "int8", "marlin",
)  # fmt: skip
KV_CACHE_DTYPES = ("auto", "int8", "fp8_e4m3fn", "fp8_e5m2")  # what a backend lacks is refused with what it has


def _engine() -> Iterator[Flag]:
    yield Flag(
        name="backend", group=ENGINE, field="backend", unset="the best found", variables=("TOKENPLANE_BACKEND",),
        help="Backend plugin to serve with; see `tokenplane devices`.",
    )
    yield Flag(
        name="device-index", group=ENGINE, field="device_index", type=NATURAL, help="Which of its devices.",
        unset="the one with the most free memory", variables=("TOKENPLANE_DEVICE_INDEX",),
    )
    yield Flag(
        name="num-shard", group=ENGINE, type=COUNT, variables=("NUM_SHARD", "SM_NUM_GPUS"), tgi="all visible devices",
        help="Devices one model is split over: 1.", unset="1",
    )
    yield Flag(
        name="sharded", group=ENGINE, type=click.BOOL, tgi="unset", help="Whether it is split: false.", unset="false",
    )
    yield Flag(
        name="cuda-memory-fraction", group=ENGINE, field="memory_fraction", tgi="1.0",
        type=click.FloatRange(0, 1, min_open=True), help="Share of the device's memory to use; for any device.",
        variables=("CUDA_MEMORY_FRACTION", "XPU_MEMORY_FRACTION", "HPU_MEMORY_FRACTION"),
    )
    yield Flag(
        name="cuda-graphs", group=ENGINE, field="graph_rows", type=Rows(), tgi="1,2,4,8,16,32", unset="the backend's",
        help="Batch sizes whose decode step is captured, as in 1,2,4; 0: none.",
    )
    yield Flag(
        name="attention", group=ENGINE, variables=("TOKENPLANE_ATTENTION", "ATTENTION"),
        help="Attention kernels to serve with, such as torch or triton.", unset="the first that proves right",
        tgi="flashinfer",
    )
    yield Flag(
        name="num-threads", group=ENGINE, field="num_threads", type=COUNT, variables=("TOKENPLANE_NUM_THREADS",),
        help="Host threads the backend computes with.", unset="its own choice",
    )
    yield Flag(
        name="prefix-caching", group=ENGINE, field="prefix_cache", is_switch=True, names=("--no-prefix-caching",),
        help="Reuse the KV cache of equal prompt starts.", tgi="by model and hardware",
    )
    yield Flag(
        name="speculate", group=ENGINE, field="max_drafts", type=click.IntRange(0, MOST_DRAFTS), tgi="unset",
        help="Tokens guessed from the text so far, which a step verifies for each sequence; no text changes. 0: none.",
    )
    yield Flag(
        name="ready-timeout", group=ENGINE, field="ready_timeout_s", type=COUNT,
        variables=("TOKENPLANE_READY_TIMEOUT",),
        help="Seconds that loading, compiling and warming up may take; some compilers need many minutes.",
    )


def _limits() -> Iterator[Flag]:
    yield Flag(
        name="max-concurrent-requests", group=LIMITS, field="max_concurrent_requests", type=COUNT, tgi="128",
        help="Requests running or waiting; more are refused with 429.",
    )
    yield Flag(
        name="max-input-tokens", group=LIMITS, field="max_input_tokens", type=COUNT, tgi="computed", unset="what fits",
        help="Longest prompt.",
    )
    yield Flag(
        name="max-input-length", group=LIMITS, type=COUNT, tgi="unset", help="Old name of --max-input-tokens.",
    )
    yield Flag(
        name="max-total-tokens", group=LIMITS, field="max_total_tokens", type=click.IntRange(min=2), tgi="computed",
        help="Longest prompt plus answer.", unset="what fits",
    )
    yield Flag(
        name="max-batch-prefill-tokens", group=LIMITS, field="max_step_tokens", type=COUNT, tgi="computed",
        help="Tokens computed in one step; longer prompts take several.", unset="the backend's",
    )
    yield Flag(
        name="max-batch-total-tokens", group=LIMITS, field="kv_cache_tokens", type=COUNT, tgi="computed",
        help="Tokens in the KV cache.", unset="what memory allows",
    )
    yield Flag(
        name="max-batch-size", group=LIMITS, field="max_sequences", type=COUNT, tgi="unset",
        help="Sequences computed at once.", unset="the backend's",
    )
    yield Flag(name="max-best-of", group=LIMITS, field="max_best_of", type=COUNT, tgi="2", help="Largest `best_of`.")
    yield Flag(
        name="max-stop-sequences", group=LIMITS, field="max_stop_sequences", type=NATURAL, tgi="4",
        help="Most stop strings of a request.",
    )
    yield Flag(
        name="max-top-n-tokens", group=LIMITS, field="max_top_n_tokens", type=NATURAL, tgi="5",
        help="Largest `top_n_tokens`.",
    )
    yield Flag(
        name="max-client-batch-size", group=LIMITS, field="max_client_batch_size", type=COUNT, tgi="4",
        help="Most prompts of one completions request.",
    )
    yield Flag(
        name="payload-limit", group=LIMITS, field="payload_limit_bytes", type=COUNT, tgi="2000000",
        help="Largest request body, in bytes.",
    )
    yield Flag(
        name="max-requests-per-key", group=LIMITS, field="max_requests_per_key", type=COUNT, unset="no limit",
        help="Sequences that one API key may have running or waiting; more are refused with 429.",
    )
    yield Flag(
        name="request-timeout-s", group=LIMITS, field="request_timeout_s", type=SECONDS, unset="no limit",
        help="Seconds that a request may take; then 504, or an error in its stream.",
    )
    yield Flag(
        name="queue-timeout-s", group=LIMITS, field="queue_timeout_s", type=SECONDS, unset="no limit",
        help="Seconds that a request may wait to begin; then 429.",
    )
    yield Flag(
        name="max-loras", group=LIMITS, field="max_loras", type=COUNT,
        help="LoRA adapters held at once.", unset=f"those of --lora-adapters, {SPARE} more with --allow-runtime-lora",
    )
    yield Flag(
        name="max-lora-rank", group=LIMITS, field="max_lora_rank", type=COUNT,
        help="Largest rank of an adapter.", unset=f"that of --lora-adapters, {LEAST_RANK} at least",
    )
    yield Flag(
        name="disable-grammar-support", group=LIMITS, field="disable_grammar_support", is_switch=True, tgi="false",
        help="Refuse requests for guided decoding and forced tool calls.",
    )


def _http() -> Iterator[Flag]:
    yield Flag(name="hostname", group=HTTP, field="hostname", tgi="0.0.0.0", help="Address to listen on.")
    yield Flag(
        name="port", group=HTTP, field="port", names=("-p",), type=click.IntRange(0, 65535), tgi="3000",
        help="Port to listen on; 0: any free one.",
    )
    yield Flag(
        name="api-key", group=HTTP, field="api_key", tgi="unset", is_secret=True, unset="open to all",
        help="Clients must send it as a bearer token.",
    )
    yield Flag(
        name="api-key-file", group=HTTP, field="api_key_file", type=PATH, unset="none",
        help="File of keys, one per line as KEY or KEY NAME; read again when it changes or on SIGHUP.",
    )
    yield Flag(
        name="cors-allow-origin", group=HTTP, field="cors_allow_origins", is_repeated=True, tgi="any", unset="any",
        help="Web origin that may call; repeat for several.",
    )
    yield Flag(
        name="validation-workers", group=HTTP, field="validation_workers", type=COUNT, tgi="2",
        help="Threads that tokenize long texts.",
    )
    yield Flag(
        name="graceful-termination-timeout", group=HTTP, field="grace_s", names=("-g",), type=NATURAL, tgi="90",
        help="Seconds that running requests may take after SIGTERM.",
    )
    yield Flag(
        name="max-header-bytes", group=HTTP, field="max_header_bytes", type=click.IntRange(min=1024),
        help="Most bytes of a request's line and headers; more get 431.",
    )
    yield Flag(
        name="header-timeout-s", group=HTTP, field="header_timeout_s", type=SECONDS,
        help="Seconds in which line and headers must arrive.",
    )
    yield Flag(
        name="body-timeout-s", group=HTTP, field="body_timeout_s", type=SECONDS,
        help="Seconds in which the body must arrive; then 408.",
    )
    yield Flag(
        name="slow-reader-timeout-s", group=HTTP, field="slow_reader_timeout_s", type=SECONDS,
        help="Seconds that a client may take nothing of its stream before it is dropped.",
    )


def _logs() -> Iterator[Flag]:
    yield Flag(
        name="json-output", group=LOGS, field="json_output", is_switch=True, tgi="false",
        help="Log lines as JSON objects.",
    )
    yield Flag(
        name="otlp-endpoint", group=LOGS, field="otlp_endpoint", tgi="unset", unset="no traces",
        help="Collector of traces, as OTLP over HTTP (port 4318).",
    )
    yield Flag(
        name="otlp-service-name", group=LOGS, field="otlp_service_name", tgi="text-generation-inference.router",
        help="What the traces call this server.",
    )


def _needless() -> Iterator[Flag]:
    def needless(name: str, why: str, tgi: str, type: Any = str, **more: Any) -> Flag:
        return Flag(name=name, type=type, tgi=tgi, verdict="needless", why=why, **more)

    yield needless("max-waiting-tokens", "a waiting request joins the running batch at the next step", "20", NATURAL)
    yield needless(
        "waiting-served-ratio", "a waiting request joins the running batch at the next step, whatever else waits",
        "0.3", click.FLOAT,
    )
    yield needless(
        "enable-prefill-logprobs", "the prompt's logprobs are there for every request that asks for them", "false",
        is_switch=True,
    )
    yield needless(
        "disable-custom-kernels",
        "each kernel is compared with plain torch on this very device before it serves; --attention torch takes none",
        "false", is_switch=True,
    )
    yield needless("usage-stats", "nothing is ever sent to anybody", "on", click.Choice(("on", "off", "no-stack")))
    yield needless("prometheus-port", "metrics are at /metrics of --port and nowhere else, as in TGI", "9000", NATURAL)
    yield needless(
        "shard-uds-path", "the engine's socket lies in a folder of its own that only this user can open",
        "/tmp/text-generation-server",
    )
    yield needless("master-addr", "the model runs in one process, which has no other to find", "localhost")
    yield needless("master-port", "the model runs in one process, which has no other to find", "29500", NATURAL)
    tunnel = "only --ngrok would need it, and no tunnel is opened here"
    yield needless("ngrok-authtoken", tunnel, "unset", is_secret=True)
    yield needless("ngrok-edge", tunnel, "unset")


def _refused() -> Iterator[Flag]:
    def refused(name: str, why: str, tgi: str = "unset", type: Any = str, **more: Any) -> Flag:
        return Flag(name=name, type=type, tgi=tgi, verdict="refused", why=why, **more)

    rope = "positions are scaled as the model's config.json says; change rope_parameters in a copy of its folder"
    yield refused("rope-scaling", rope)
    yield refused("rope-factor", rope, type=click.FLOAT, idle=())
    yield refused(
        "weights-cache-override",
        "weights are read from the model's own folder; give the folder with config.json and weights as --model-id",
    )
    watermark = "texts are not watermarked; leave it out, and `watermark` out of requests"
    yield refused("watermark-gamma", watermark, type=click.FLOAT, idle=())
    yield refused("watermark-delta", watermark, type=click.FLOAT, idle=())
    yield refused(
        "ngrok", "no tunnel is opened here; run `ngrok http PORT` beside the server", "false", is_switch=True
    )


FLAGS = (*_model(), *_engine(), *_limits(), *_http(), *_logs(), *_needless(), *_refused())

BY_NAME = {flag.name: flag for flag in FLAGS}


def _variables() -> Iterator[Variable]:
    def honoured(names: str, by: str) -> Iterator[Variable]:
        return (Variable(name=name, verdict="honoured", why=by) for name in names.split())

    def into(name: str, field: str, why: str) -> Variable:
        return Variable(name=name, verdict="honoured", why=why, field=field)

    yield into("COMPUTE_TYPE", "compute_type", "the x-compute-type header of responses")
    yield into("AIP_HTTP_PORT", "port", "set by Vertex AI, the port it calls; wins over --port, as in TGI")
    yield into("AIP_PREDICT_ROUTE", "vertex_predict_route", "set by Vertex AI, the path it calls instead of /vertex")
    yield into("AIP_HEALTH_ROUTE", "vertex_health_route", "set by Vertex AI, the path it calls instead of /health")
    yield from honoured("LOG_LEVEL", "trace, debug, info, warn or error; filters of single modules are passed over")
    yield from honoured("HF_API_TOKEN", "the hub's token; wins over HF_TOKEN, as in TGI")
    yield from honoured(
        "HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_HOME HF_HUB_OFFLINE HF_HUB_USER_AGENT_ORIGIN", "read by huggingface_hub",
    )
    yield from honoured(
        "CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES ZE_AFFINITY_MASK",
        "read by the driver or the container's runtime; `tokenplane devices` shows what is left",
    )
    yield from honoured("PYTORCH_TUNABLEOP_ENABLED PYTORCH_TUNABLEOP_TUNING", "read by torch")

    def needless(names: str, why: str, **more: Any) -> Iterator[Variable]:
        return (Variable(name=name, verdict="needless", why=why, **more) for name in names.split())

    yield from needless("HF_HUB_ENABLE_HF_TRANSFER", "the hub library downloads fast without it", tgi="1")
    yield from needless("LOG_COLORIZE", "the log has no colours")
    yield from needless("MAX_IMAGE_FETCH_SIZE", "no image is ever fetched", tgi="1073741824")
    yield from needless(
        "EXLLAMA_VERSION DISABLE_EXLLAMA USE_CUTLASS_W8A8",
        "quantized layers are transformers' own, whose kernels it picks",
    )
    yield from needless(
        "ROCM_USE_FLASH_ATTN_V2_TRITON ROCM_USE_CUSTOM_PAGED_ATTN ROCM_USE_SKINNY_GEMM"
        " PYTORCH_TUNABLEOP_SEQLENS PYTORCH_TUNABLEOP_TUNING_AFTER_WARMUP",
        "kernels are tried on the card and the first right one is taken; --attention names another",
    )

    def refused(name: str, why: str, tgi: str = "", idle: tuple[str, ...] = ()) -> Variable:
        return Variable(name=name, verdict="refused", why=why, tgi=tgi, idle=idle)

    yield refused("PREFILL_CHUNKING", "long prompts are always computed in pieces; unset it", "1", ("1", "true"))
    yield refused("USE_FLASH_ATTENTION", "name the kernels instead: --attention torch", "true", ("1", "true"))
    yield refused("TGI_WIGGLE_ROOM", "say how much memory to use with --cuda-memory-fraction", "0.9")


# fmt: on

VARIABLES = tuple(_variables())
