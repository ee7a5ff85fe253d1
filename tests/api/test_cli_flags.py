"""TGI's launcher, flag by flag and variable by variable: each has its effect, a line that says why none, or a refusal.

The lists here are TGI's, written down from its reference and not from our table.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from tokenplane_api.adapters import AdapterSource
from tokenplane_api.cli import serve
from tokenplane_api.flags import BY_NAME, FLAGS, GROUPS, VARIABLES
from tokenplane_api.launcher import Launch, describe, plan_launch
from tokenplane_api.options import sources
from tokenplane_api.quantization import kv_dtype_of, quantize_at_load
from tokenplane_api.settings import ServeOptions, Settings
from tokenplane_core.backend.errors import ConfigError

NEEDLESS, REFUSED = "needless", "refused"

# flag: (a value as TGI takes it, the field it lands in and the value there, or what becomes of it)
FLAGS_OF_TGI: dict[str, tuple[str, Any]] = {
    "model-id": ("acme/other", ("model_id", "acme/other")),
    "revision": ("refs/pr/3", ("revision", "refs/pr/3")),
    "validation-workers": ("5", ("validation_workers", 5)),
    "sharded": ("true", REFUSED),
    "num-shard": ("4", REFUSED),
    "quantize": ("awq", ("quantize", "awq")),
    "speculate": ("2", ("max_drafts", 2)),
    "dtype": ("float16", ("dtype", "float16")),
    "kv-cache-dtype": ("int8", ("kv_cache_dtype", "int8")),
    "trust-remote-code": ("", ("trust_remote_code", True)),
    "max-concurrent-requests": ("7", ("max_concurrent_requests", 7)),
    "max-best-of": ("9", ("max_best_of", 9)),
    "max-stop-sequences": ("0", ("max_stop_sequences", 0)),
    "max-top-n-tokens": ("11", ("max_top_n_tokens", 11)),
    "max-input-tokens": ("300", ("max_input_tokens", 300)),
    "max-input-length": ("301", ("max_input_tokens", 301)),
    "max-total-tokens": ("400", ("max_total_tokens", 400)),
    "waiting-served-ratio": ("0.3", NEEDLESS),
    "max-batch-prefill-tokens": ("512", ("max_step_tokens", 512)),
    "max-batch-total-tokens": ("4096", ("kv_cache_tokens", 4096)),
    "max-waiting-tokens": ("20", NEEDLESS),
    "max-batch-size": ("3", ("max_sequences", 3)),
    "cuda-graphs": ("8,1,2", ("graph_rows", (1, 2, 8))),
    "hostname": ("127.0.0.2", ("hostname", "127.0.0.2")),
    "port": ("8123", ("port", 8123)),
    "prometheus-port": ("9000", NEEDLESS),
    "shard-uds-path": ("/tmp/shards", NEEDLESS),
    "master-addr": ("localhost", NEEDLESS),
    "master-port": ("29500", NEEDLESS),
    "huggingface-hub-cache": ("/data", ("hub_cache", Path("/data"))),
    "weights-cache-override": ("/weights", REFUSED),
    "disable-custom-kernels": ("", NEEDLESS),
    "cuda-memory-fraction": ("0.5", ("memory_fraction", 0.5)),
    "rope-scaling": ("linear", REFUSED),
    "rope-factor": ("2.0", REFUSED),
    "json-output": ("", ("json_output", True)),
    "otlp-endpoint": ("http://collector:4318", ("otlp_endpoint", "http://collector:4318")),
    "otlp-service-name": ("chat", ("otlp_service_name", "chat")),
    "cors-allow-origin": ("https://a.example", ("cors_allow_origins", ("https://a.example",))),
    "api-key": ("secret-key", ("api_key", "secret-key")),
    "watermark-gamma": ("0.5", REFUSED),
    "watermark-delta": ("2.0", REFUSED),
    "ngrok": ("", REFUSED),
    "ngrok-authtoken": ("secret-token", NEEDLESS),
    "ngrok-edge": ("edge", NEEDLESS),
    "tokenizer-config-path": ("/t.json", ("tokenizer_config_path", Path("/t.json"))),
    "disable-grammar-support": ("", ("disable_grammar_support", True)),
    "max-client-batch-size": ("6", ("max_client_batch_size", 6)),
    "lora-adapters": (
        "a, b=/c@v2",
        ("lora_adapters", (AdapterSource("a", "a", None), AdapterSource("b", "/c", "v2"))),
    ),
    "usage-stats": ("no-stack", NEEDLESS),
    "payload-limit": ("1000", ("payload_limit_bytes", 1000)),
    "enable-prefill-logprobs": ("", NEEDLESS),
    "graceful-termination-timeout": ("5", ("grace_s", 5)),
}

VARIABLES_OF_TGI: dict[str, tuple[str, Any]] = {
    "ATTENTION": ("flashinfer", {"TOKENPLANE_ATTENTION": "flashinfer"}),
    "PREFIX_CACHING": ("false", ("prefix_cache", False)),
    "PREFILL_CHUNKING": ("0", REFUSED),
    "TGI_WIGGLE_ROOM": ("0.8", REFUSED),
    "HF_API_TOKEN": ("hf_x", {"HF_TOKEN": "hf_x"}),
    "COMPUTE_TYPE": ("1-acme", ("compute_type", "1-acme")),
    "LOG_LEVEL": ("debug,tower=off", {"LOG_LEVEL": "DEBUG"}),
    "LOG_COLORIZE": ("1", NEEDLESS),
    "USE_FLASH_ATTENTION": ("false", REFUSED),
    "MAX_IMAGE_FETCH_SIZE": ("1000", NEEDLESS),
    "XPU_MEMORY_FRACTION": ("0.4", ("memory_fraction", 0.4)),
    "HPU_MEMORY_FRACTION": ("0.4", ("memory_fraction", 0.4)),
    "EXLLAMA_VERSION": ("2", NEEDLESS),
    "DISABLE_EXLLAMA": ("1", NEEDLESS),
    "USE_CUTLASS_W8A8": ("1", NEEDLESS),
    "ROCM_USE_FLASH_ATTN_V2_TRITON": ("1", NEEDLESS),
    "ROCM_USE_CUSTOM_PAGED_ATTN": ("1", NEEDLESS),
    "ROCM_USE_SKINNY_GEMM": ("1", NEEDLESS),
    "PYTORCH_TUNABLEOP_SEQLENS": ("1,2", NEEDLESS),
    "PYTORCH_TUNABLEOP_TUNING_AFTER_WARMUP": ("1", NEEDLESS),
    "HF_HUB_ENABLE_HF_TRANSFER": ("1", NEEDLESS),
    "AIP_HTTP_PORT": ("8081", ("port", 8081)),
    "AIP_PREDICT_ROUTE": ("/predict", ("vertex_predict_route", "/predict")),
    "AIP_HEALTH_ROUTE": ("/ping", ("vertex_health_route", "/ping")),
    "HF_MODEL_ID": ("acme/sagemaker", ("model_id", "acme/sagemaker")),
    "HF_MODEL_REVISION": ("v2", ("revision", "v2")),
    "HF_MODEL_QUANTIZE": ("gptq", ("quantize", "gptq")),
    "HF_MODEL_TRUST_REMOTE_CODE": ("true", ("trust_remote_code", True)),
    "SM_NUM_GPUS": ("8", REFUSED),
}

READ_BY_OTHERS = {
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_USER_AGENT_ORIGIN",
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "ROCR_VISIBLE_DEVICES",
    "PYTORCH_TUNABLEOP_ENABLED", "PYTORCH_TUNABLEOP_TUNING",
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name for flag in FLAGS for name in flag.environment} | {variable.name for variable in VARIABLES}
    for name in names:
        monkeypatch.delenv(name, raising=False)


def launch(*arguments: str, model: str | None = "acme/tiny") -> Launch:
    """What `tokenplane serve` makes of a command line and this process's environment, before it touches a model."""
    options = [*(["--model-id", model] if model else []), *arguments]
    context = serve.make_context("serve", options)
    values = dict(context.params)
    config = values.pop("config")
    return plan_launch(values, sources(context, config), os.environ)


def check(outcome: Any, name: str, start: Any) -> None:
    """start: a call that launches. outcome: as in the lists."""
    if outcome == REFUSED:
        with pytest.raises(ConfigError) as refusal:
            start()
        sentence = str(refusal.value)
        assert name in sentence and len(sentence) > len(name) + 40, "it says what to do instead"
        assert "secret-" not in sentence
        return
    launched = start()
    if outcome == NEEDLESS:
        (notice,) = launched.notices
        assert name in notice and "nothing to do: " in notice and "secret-" not in notice
    elif isinstance(outcome, dict):
        assert outcome.items() <= launched.variables.items()
    else:
        field, value = outcome
        found = [getattr(record, field) for record in (launched.options, launched.settings) if hasattr(record, field)]
        assert found and all(each == value for each in found)
        assert not launched.notices


@pytest.mark.parametrize("name", FLAGS_OF_TGI)
def test_each_flag_of_tgi_has_its_effect_or_a_sentence(name: str) -> None:
    text, outcome = FLAGS_OF_TGI[name]
    check(outcome, f"--{name}", lambda: launch(f"--{name}", *([text] if text else []), model=_model_for(name)))
    if text:
        check(outcome, f"--{name}", lambda: launch(f"--{name}={text}", model=_model_for(name)))


@pytest.mark.parametrize("name", FLAGS_OF_TGI)
def test_each_variable_of_a_flag_does_as_the_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, outcome = FLAGS_OF_TGI[name]
    variable = name.upper().replace("-", "_")
    monkeypatch.setenv(variable, text or "true")
    said = f"--{name}" if name in ("sharded", "num-shard") else variable
    check(outcome, said, lambda: launch(model=_model_for(name)))


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
@pytest.mark.parametrize("name", FLAGS_OF_TGI)
def test_each_flag_can_stand_in_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    text, outcome = FLAGS_OF_TGI[name]
    value = text if re.fullmatch(r"[\d.]+|true", text) and text != "127.0.0.2" else json.dumps(text) if text else "true"
    file = tmp_path / f"server.{suffix}"
    file.write_text(f"{name} = {value}\n" if suffix == "toml" else f"{name.replace('-', '_')}: {value}\n")
    check(outcome, f"--{name}", lambda: launch("--config", str(file), model=_model_for(name)))


@pytest.mark.parametrize("name", VARIABLES_OF_TGI)
def test_each_variable_without_a_flag_has_its_effect_or_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, outcome = VARIABLES_OF_TGI[name]
    monkeypatch.setenv(name, text)
    said = "--num-shard" if name == "SM_NUM_GPUS" else name
    check(outcome, said, lambda: launch(model=None if name == "HF_MODEL_ID" else "acme/tiny"))


def _model_for(name: str) -> str | None:
    return None if name == "model-id" else "acme/tiny"


# --- The table itself ---------------------------------------------------------------------------------------


def test_the_table_is_whole() -> None:
    """Each name of TGI's has a row, each row its sentence or its field, each field a row."""
    assert set(FLAGS_OF_TGI) == {flag.name for flag in FLAGS if flag.tgi is not None} - {"attention", "prefix-caching"}
    known = {variable.name for variable in VARIABLES} | {name for flag in FLAGS for name in flag.environment}
    assert set(VARIABLES_OF_TGI) | READ_BY_OTHERS <= known
    assert len(BY_NAME) == len(FLAGS)
    looked_at = {"num-shard", "sharded", "max-input-length", "attention"}  # by launcher.py itself
    for flag in FLAGS:
        if flag.verdict == "honoured":
            assert flag.group in GROUPS and flag.help.endswith(".")
            assert bool(flag.field) != (flag.name in looked_at), flag.name
        else:
            assert flag.why and not flag.field
    all_fields = {item.name for record in (ServeOptions, Settings) for item in fields(record)}
    taken = {row.field for row in (*FLAGS, *VARIABLES) if row.field}
    assert taken == all_fields - {"model_sha"}, "the server finds out the commit by itself"


def test_nothing_given_leaves_every_default() -> None:
    launched = launch()
    assert launched.options == ServeOptions(model_id="acme/tiny")
    assert launched.settings == Settings(model_id="acme/tiny")
    assert launched.notices == []


def test_refused_flags_that_ask_for_nothing_are_accepted() -> None:
    assert launch("--num-shard", "1").notices == []
    assert launch("--sharded", "false").notices == []


def test_refused_variables_that_ask_for_nothing_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "NGROK": "false",
        "PREFILL_CHUNKING": "1",
        "USE_FLASH_ATTENTION": "True",
        "SPECULATE": "",
    }.items():
        monkeypatch.setenv(name, text)
    assert launch().notices == []


# --- Precedence, files --------------------------------------------------------------------------------------


def test_option_beats_variable_beats_file_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        'model-id = "acme/file"\nport = 1\nmax-best-of = 1\nmax-stop-sequences = 1\ncors-allow-origin=["x","y"]'
    )
    monkeypatch.setenv("TOKENPLANE_CONFIG", str(file))
    monkeypatch.setenv("PORT", "2")
    monkeypatch.setenv("MAX_BEST_OF", "2")
    launched = launch("--port", "3", model=None)
    assert (launched.options.port, launched.settings.max_best_of, launched.settings.max_stop_sequences) == (3, 2, 1)
    assert launched.settings.max_top_n_tokens == Settings(model_id="").max_top_n_tokens
    assert launched.options.model_id == launched.settings.model_id == "acme/file"
    assert launched.settings.cors_allow_origins == ("x", "y")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "max-toal-tokens = 4", ["a.toml", "max-toal-tokens", "did you mean 'max-total-tokens'"]),
        ("a.yaml", "quite: else", ["a.yaml", "quite", "no option"]),
        ("a.toml", "port = 1\nPORT = 2", ["PORT"]),
        ("a.toml", "max_best_of = 1\nmax-best-of = 2", ["max-best-of", "twice"]),
        ("a.toml", "port = 2.5", ["--port", "2.5"]),
        ("a.toml", "port = 70000", ["--port", "65535"]),
        ("a.yaml", "port: {a: 1}", ["port", "must be a text"]),
        ("a.yaml", "dtype: int3", ["--dtype", "int3"]),
        ("a.toml", "port = ", ["a.toml", "not valid TOML"]),
        ("a.yaml", "a: [", ["a.yaml", "not valid YAML"]),
        ("a.yaml", "- port", ["a.yaml", "by name"]),
        ("a.json", "{}", ["a.json", ".toml, .yaml"]),
        ("missing/a.toml", None, ["a.toml", "cannot be read", "No such file"]),
    ],
)
def test_a_wrong_file_is_one_clear_sentence(tmp_path: Path, name: str, text: str | None, words: list[str]) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(click.UsageError) as error:
        launch("--config", str(tmp_path / name))
    for word in words:
        assert word in error.value.format_message()


def test_a_wrong_value_says_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text("max-best-of = 0")
    with pytest.raises(click.UsageError) as error:
        launch("--config", str(tmp_path / "a.toml"))
    assert "'--max-best-of' (the config file): 0 is not" in error.value.format_message()
    monkeypatch.setenv("MAX_BEST_OF", "many")
    with pytest.raises(click.UsageError) as error:
        launch()
    assert "'--max-best-of' (MAX_BEST_OF): 'many' is not" in error.value.format_message()


def test_variables_that_contradict_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_ID", "acme/one")
    monkeypatch.setenv("HF_MODEL_ID", "acme/one")
    assert launch(model=None).options.model_id == "acme/one"
    monkeypatch.setenv("HF_MODEL_ID", "acme/two")
    with pytest.raises(click.UsageError, match="MODEL_ID=acme/one and HF_MODEL_ID=acme/two"):
        launch(model=None)


def test_the_port_that_vertex_calls_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "80")
    monkeypatch.setenv("AIP_HTTP_PORT", "8080")
    assert launch("--port", "81").options.port == 8080
    monkeypatch.setenv("AIP_HTTP_PORT", "eighty")
    with pytest.raises(ConfigError, match="AIP_HTTP_PORT is 'eighty'"):
        launch()


def test_what_was_given_is_told_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret-key")
    context = serve.make_context("serve", ["--model-id", "acme/tiny"])
    said = describe(context.params, sources(context, None))
    assert said == "--model-id is 'acme/tiny' (command line), --api-key is (secret) (API_KEY)"


# --- Combinations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-input-tokens", "5", "--max-input-length", "5"], ["--max-input-tokens", "--max-input-length"]),
        (
            ["--max-input-tokens", "9", "--max-total-tokens", "9"],
            ["--max-input-tokens is 9", "--max-total-tokens is 9"],
        ),
        (["--max-input-length", "9", "--max-total-tokens", "9"], ["--max-total-tokens is 9"]),
        (["--max-total-tokens", "9", "--max-batch-total-tokens", "8"], ["--max-total-tokens is 9", "8"]),
        (["--sharded", "true", "--num-shard", "1"], ["--sharded is true", "--num-shard is 1"]),
        (["--sharded", "false", "--num-shard", "2"], ["--num-shard is 2", "--device-index"]),
        (["--attention", "paged"], ["'paged'", "TGI"]),
        (["--max-loras", "2"], ["--max-loras is 2", "--lora-adapters", "--allow-runtime-lora"]),
        (["--max-lora-rank", "8"], ["--max-lora-rank is 8", "--lora-adapters"]),
        (["--lora-adapters", "a,b", "--max-loras", "1"], ["names 2 adapters", "--max-loras is 1"]),
        (["--api-key", " "], ["--api-key", "empty"]),
        (["--model-id", ""], ["--model-id"]),
    ],
    ids=" ".join,
)
def test_what_contradicts_itself_is_refused_before_loading(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        launch(*arguments)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--validation-workers", "0"],
        ["--num-shard", "0"],
        ["--max-batch-size", "0"],
        ["--cuda-memory-fraction", "1.5"],
        ["--cuda-graphs", "1,x"],
        ["--cuda-graphs", "0,1"],
        ["--quantize", "int3"],
        ["--max-best-of", "-1"],
        ["--lora-adapters", "a=b=c"],
        ["--lora-adapters", "a@b@c"],
        ["--lora-adapters", "=b"],
        ["--lora-adapters", "a,a=/b"],
        ["--max-loras", "0"],
        ["--no-such-flag"],
    ],
    ids=" ".join,
)
def test_a_value_out_of_range_names_the_flag(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError) as error:
        launch(*arguments)
    assert arguments[0] in error.value.format_message()
    assert error.value.exit_code == 2


def test_no_graphs_at_all_can_be_asked_for() -> None:
    assert launch("--cuda-graphs", "0").options.graph_rows == ()


def test_a_level_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match=r"LOG_LEVEL is 'loud'.*warn"):
        launch()


@pytest.mark.parametrize("saved", [None, "gptq", "fbgemm_fp8", "bitsandbytes"])
@pytest.mark.parametrize("wish", [None, "gptq", "fp8", "bitsandbytes-nf4"])
def test_quantize_says_how_the_checkpoint_is_stored(wish: str | None, saved: str | None) -> None:
    config = {} if saved is None else {"quantization_config": {"quant_method": saved}}
    agrees = (wish, saved) in {("gptq", "gptq"), ("fp8", "fbgemm_fp8"), ("bitsandbytes-nf4", "bitsandbytes")}
    if wish is None or agrees:
        assert quantize_at_load(wish, config, "cpu", ("int8",)) is None
        return
    with pytest.raises(ConfigError, match=f"--quantize is {wish}"):
        quantize_at_load(wish, config, "cpu", ("int8",))


@pytest.mark.parametrize(("wish", "kind"), [("int8", "int8"), ("int4", "int4"), ("eetq", "int8")])
def test_quantize_at_load_where_the_backend_can(wish: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert quantize_at_load(wish, {}, "cpu", ("int8", "int4")) == kind
    assert ("eetq: weights become int8" in caplog.text) == (wish == "eetq")
    with pytest.raises(ConfigError, match=rf"--quantize is {wish}, but backend cuda quantizes no weights"):
        quantize_at_load(wish, {}, "cuda", ())
    with pytest.raises(ConfigError, match=f"--quantize is {wish}, but config.json says that the checkpoint is gptq"):
        quantize_at_load(wish, {"quantization_config": {"quant_method": "gptq"}}, "cpu", ("int8", "int4"))


def test_quantize_at_load_names_what_the_backend_can_do() -> None:
    with pytest.raises(ConfigError, match="backend acme quantizes weights only to int8 while they load;"):
        quantize_at_load("int4", {}, "acme", ("int8",))


def test_the_kv_cache_is_quantized_where_the_backend_can() -> None:
    assert kv_dtype_of("int8", "cpu", ("int8",)) == "int8"
    assert kv_dtype_of("auto", "cpu", ()) is kv_dtype_of(None, "cpu", ("int8",)) is None
    with pytest.raises(ConfigError, match="--kv-cache-dtype is int8, but backend cuda keeps its KV cache in auto only"):
        kv_dtype_of("int8", "cuda", ())
    with pytest.raises(ConfigError, match="is fp8_e5m2, but backend cpu keeps its KV cache in auto or int8"):
        kv_dtype_of("fp8_e5m2", "cpu", ("int8",))
