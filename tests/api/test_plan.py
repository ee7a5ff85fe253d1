"""`tokenplane plan` as a user meets it, and the same table in /info."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from helpers.hub_server import HubServer
from helpers.model_folder import make_text_model
from tokenplane_api.accelerators import ACCELERATORS, imagined_device
from tokenplane_api.cli import app
from tokenplane_core.backend.errors import ConfigError
from tokenplane_core.backend.records import Offer
from tokenplane_core.kit.adapters import write_adapter
from tokenplane_core.model import describe_model
from tokenplane_core.weight_files import INDEX
from tokenplane_cpu.device import detect as detect_cpu
from tokenplane_torch.device import gpu_offer

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
BYTES_70B = 141_107_412_992


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def run_json(*arguments: object) -> tuple[int, dict[str, Any]]:
    result = run(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def llama_70b(tmp_path: Path) -> Path:
    """Its config and the index of its weights: enough to plan."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    index = {
        "metadata": {"total_size": BYTES_70B},
        "weight_map": {"lm_head.weight": "model-00001-of-00030.safetensors"},
    }
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def safetensors(tensors: dict[str, tuple[str, list[int], int]]) -> bytes:
    """A file of zeros: name -> (dtype, shape, bytes)."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


# --- One device ---------------------------------------------------------------------------------------------


def test_what_fits_exits_with_0_and_says_how_much_fits(model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(safetensors({"a": ("F32", [1000], 4000)}))
    try:
        result = run(model_folder, "--device", "H100", "--dtype", "bfloat16")
    finally:
        (model_folder / "model.safetensors").unlink()  # the folder is shared, and has no weights
    assert result.exit_code == 0, result.output
    assert "as bfloat16 on H100, 79.65 GiB free" in result.stdout
    assert re.search(r"^weights +1\.95 KiB  bfloat16, from the headers of the weight files$", result.stdout, re.M)
    assert re.search(r"^KV per token +256 B  2 layers, 2 KV heads of 16, bfloat16$", result.stdout, re.M)
    assert "It fits: room for" in result.stdout
    assert "devices" not in result.stdout and max(map(len, result.stdout.splitlines())) <= 100


def test_what_does_not_fit_exits_with_1_and_the_value_it_names_fits(llama_70b: Path) -> None:
    result = run(llama_70b, "--device", "H200")
    assert result.exit_code == 1
    said = " ".join(result.stdout.split())
    assert re.search(r"one sequence of 131,072 tokens needs 17\d\.\d\d GiB in all, 140\.40 GiB are free", said)
    assert "serve takes the longest sequence that fits" in said
    assert "The smallest device of the catalogue with room for it is MI300X" in said
    (tokens,) = re.findall(r"--max-total-tokens (\d+)", said)
    assert run(llama_70b, "--device", "H200", "--max-total-tokens", tokens).exit_code == 0
    assert run(llama_70b, "--device", "H200", "--max-total-tokens", int(tokens) + 512).exit_code == 1
    assert run(llama_70b, "--device", "MI300X").exit_code == 0


def test_the_limits_of_a_step_are_part_of_it(llama_70b: Path) -> None:
    def workspace(*flags: object) -> int:
        _, report = run_json(llama_70b, "--device", "B200", *flags)
        (row,) = [row for row in report["rows"] if row["piece"] == "workspace"]
        size: int = row["estimated_bytes"]
        return size

    assert workspace() > 1.5 * workspace("--max-batch-prefill-tokens", 4096)
    assert workspace("--max-batch-size", 64) - workspace("--max-batch-size", 4) == 60 * 128256 * (2 + 8)


def test_room_for_adapters_is_part_of_it(llama_70b: Path) -> None:
    _, without = run_json(llama_70b, "--device", "B200")
    _, report = run_json(llama_70b, "--device", "B200", "--max-loras", 4, "--max-lora-rank", 16)
    (row,) = [row for row in report["rows"] if row["piece"] == "adapters"]
    # Widths into and out of q and o, of k and v, of gate, up and down.
    widths = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)
    assert row["estimated_bytes"] == 4 * 16 * 80 * widths * 2
    assert without["cache_capacity_tokens"] > report["cache_capacity_tokens"]


def test_adapters_that_are_named_need_no_other_flag(tmp_path: Path) -> None:
    model = make_text_model(tmp_path / "model")
    named = write_adapter(tmp_path / "red", describe_model(model), seed=1)
    (model / INDEX).write_text(json.dumps({"metadata": {"total_size": 1 << 20}, "weight_map": {}}))
    small = (model, "--device", "1GiB")
    _, by_count = run_json(*small, "--max-loras", 1)
    _, by_name = run_json(*small, "--lora-adapters", f"red={named}")
    assert by_name["rows"] == by_count["rows"] != run_json(*small)[1]["rows"]
    _, later = run_json(*small, "--lora-adapters", f"red={named}", "--allow-runtime-lora")
    assert later["cache_capacity_tokens"] < by_name["cache_capacity_tokens"]
    assert run(*small, "--lora-adapters", "red=./nowhere").exit_code == 2


def test_a_dtype_the_device_does_not_know_is_said(llama_70b: Path) -> None:
    result = run(llama_70b, "--device", "T4", "--max-total-tokens", 64)
    assert result.exit_code == 1
    assert "T4 does not compute in bfloat16; choose --dtype float16" in result.stdout
    assert "does not compute" not in run(llama_70b, "--device", "T4", "--dtype", "float16").stdout


def test_a_device_of_this_machine_by_name_or_by_default(model_folder: Path) -> None:
    result = run(model_folder, "--device", "simulated-tpu")
    assert result.exit_code == 0
    assert "on simulated-tpu" in result.stdout and "256.00 MiB free" in result.stdout
    (model_folder / "model.safetensors").write_bytes(safetensors({"a": ("F32", [10], 40)}))
    try:
        code, report = run_json(model_folder)
    finally:
        (model_folder / "model.safetensors").unlink()
    assert code == 0 and report["device"]["score"] > 0 and report["tensor_parallel"] is None


# --- Several devices ----------------------------------------------------------------------------------------


def test_several_devices_are_replicas_and_the_split_is_only_arithmetic(llama_70b: Path) -> None:
    result = run(llama_70b, "--device", "H100", "--count", 4)
    assert result.exit_code == 1, "a split is not served, so it does not fit"
    assert "a server of its own (a replica) has no room on any of them" in result.stdout
    assert "Tensor parallelism over 4 devices is not served yet. By arithmetic, on each:" in result.stdout
    assert "So split it fits" in result.stdout
    _, report = run_json(llama_70b, "--device", "H100", "--count", 4)
    split = report["tensor_parallel"]
    sizes = {row["piece"]: row["estimated_bytes"] for row in split["rows"]}
    assert (split["is_served"], split["fits"]) == (False, True)
    assert sizes["weights"] == BYTES_70B // 4
    assert sizes["KV per token"] == 80 * 2 * 2 * 128 * 2
    _, report = run_json(llama_70b, "--device", "H100", "--count", 16)
    sizes = {row["piece"]: row["estimated_bytes"] for row in report["tensor_parallel"]["rows"]}
    assert sizes["KV per token"] == 80 * 1 * 2 * 128 * 2, "8 KV heads on 16 devices: each is kept twice"


def test_heads_that_cannot_be_split_are_named(llama_70b: Path) -> None:
    result = run(llama_70b, "--device", "MI300X", "--count", 3)
    assert result.exit_code == 0
    assert "has room on each of them" in result.stdout
    assert "its 64 attention heads do not divide by 3" in " ".join(result.stdout.split())
    assert run(llama_70b, "--device", "B200", "--count", 0).exit_code == 2


# --- Devices by name ----------------------------------------------------------------------------------------


def test_names_are_found_however_they_are_written() -> None:
    for name in ("h100", "NVIDIA H100", "nvidia-h100", " H100 "):
        assert imagined_device(name).name == "H100"
    assert imagined_device("a100-80gb").memory_total_bytes == 80 << 30
    assert imagined_device("rtx4090").name == "RTX 4090"
    assert imagined_device("tpu-V5E").kind == "tpu"
    assert imagined_device("AMD Instinct MI300X").kind == "rocm"


@pytest.mark.parametrize(
    ("size", "num_bytes"), [("80GiB", 80 << 30), ("80 gb", 80 * 10**9), ("1.5TiB", 3 << 39), ("512M", 512 * 10**6)]
)
def test_any_size_is_a_device(size: str, num_bytes: int) -> None:
    assert imagined_device(size).memory_total_bytes == num_bytes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("H10", ["'H10'", "did you mean H100", "80GiB"]),
        ("B60", ["did you mean Arc Pro B60"]),
        ("A100", ["'A100 40GB' or 'A100 80GB'"]),
        ("abacus", ["known are", "Gaudi3", "Trainium2"]),
        ("80 parsecs", ["80GiB"]),
    ],
)
def test_an_unknown_name_gets_a_way_on(model_folder: Path, name: str, words: list[str]) -> None:
    result = run(model_folder, "--device", name)
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words), result.stderr
    with pytest.raises(ConfigError):
        imagined_device(name)


def test_the_catalogue_has_no_name_twice_and_every_kind_of_backend() -> None:
    found = [imagined_device(known.name) for known in ACCELERATORS]
    assert [device.name for device in found] == [known.name for known in ACCELERATORS]
    assert {device.kind for device in found} == {"cuda", "rocm", "xpu", "gaudi", "tpu", "neuron"}


# --- The options of serve -----------------------------------------------------------------------------------


def test_a_plan_knows_the_options_variables_and_the_file_of_serve(
    llama_70b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(f"model-id: {llama_70b}\nport: 8080\nmax-batch-size: 3\nmax-total-tokens: 1000\n")
    monkeypatch.setenv("MAX_TOTAL_TOKENS", "2000")
    code, report = run_json("--config", file, "--device", "H200")
    assert code == 0
    rows = {row["piece"]: row for row in report["rows"]}
    assert report["max_model_tokens"] == 2000 and "logits of 3 rows" in rows["workspace"]["why"]
    code, halved = run_json("--config", file, "--device", "H200", "--cuda-memory-fraction", "0.5")
    assert code == 1 and halved["free_bytes"] == report["free_bytes"] // 2


def test_a_plan_for_a_cache_that_does_not_fit_names_the_cache(llama_70b: Path) -> None:
    result = run(llama_70b, "--device", "B200", "--max-total-tokens", 1000, "--max-batch-total-tokens", 9_000_000)
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert "a KV cache of 9,000,000 tokens needs" in text and "--max-batch-total-tokens" in text


# --- Models -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    with server.running():
        yield server


def run_with_hub(hub: HubServer, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads its variables when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder)}
    command = [sys.executable, "-m", "tokenplane_api.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_a_model_on_the_hub_needs_no_weights_here(hub: HubServer, tmp_path: Path) -> None:
    weights = safetensors({"model.a": ("BF16", [500_000], 1_000_000), "model.b": ("I8", [30], 30)})
    hub.add("acme/whole", {"config.json": json.dumps(LLAMA_70B).encode(), "model.safetensors": weights})
    result = run_with_hub(hub, tmp_path, "acme/whole", "--device", "B200", "--json")
    assert result.returncode == 0, result.stderr
    (row,) = [row for row in json.loads(result.stdout)["rows"] if row["piece"] == "weights"]
    assert row["estimated_bytes"] == 1_000_030
    assert "headers of the weight files on the hub" in row["why"]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert all("range" in request.headers for request in hub.downloads("model.safetensors"))


@pytest.mark.parametrize(("name", "words"), [("acme/none", "has no model"), ("acme/pickled", "no safetensors")])
def test_a_model_that_is_not_there_exits_with_2(hub: HubServer, tmp_path: Path, name: str, words: str) -> None:
    hub.add("acme/pickled", {"config.json": json.dumps(LLAMA_70B).encode(), "pytorch_model.bin": b""})
    result = run_with_hub(hub, tmp_path, name, "--device", "H100")
    assert (result.returncode, result.stdout) == (2, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("tokenplane: ") and name in last and words in last


def test_a_folder_with_neither_weights_nor_index_exits_with_2(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path / "model")
    result = run(folder, "--device", "H100")
    assert result.exit_code == 2
    assert "the size of its weights is unknown" in result.stderr and INDEX in result.stderr
    too_long = run(folder, "--device", "H100", "--max-total-tokens", 9999)
    assert too_long.exit_code == 2 and "lower it to 2048" in too_long.stderr


# --- /info --------------------------------------------------------------------------------------------------


def test_info_shows_the_table_estimated_and_measured(client: httpx.Client) -> None:
    info = client.get("/info").json()
    assert info["model_id"] and info["max_batch_total_tokens"]
    rows = {row["piece"]: row for row in info["memory"]}
    assert {"weights", "KV per token", "KV cache", "slack"} <= set(rows)
    assert set(rows["weights"]) == {"piece", "estimated_bytes", "measured_bytes", "why"}
    assert rows["KV per token"]["estimated_bytes"] == rows["KV per token"]["measured_bytes"] == 4
    padding_block = 16 * 4
    assert rows["KV cache"]["measured_bytes"] == info["max_batch_total_tokens"] * 4 + padding_block


def test_the_catalogue_expects_what_the_backends_do() -> None:
    """The API imports no backend, so it says again what they declare for a found device."""
    for known in ACCELERATORS:
        imagined = imagined_device(known.name)
        if known.backend in ("cuda", "rocm", "xpu"):
            assert imagined.offer == gpu_offer(imagined.memory_total_bytes)
        else:
            assert imagined.offer == Offer(decode_graphs=None)
    assert detect_cpu().devices[0].offer.decode_graphs == imagined_device("80GiB").offer.decode_graphs == 0
