"""The calls used of optimum-neuron, and nothing else: the one file that knows the vendor's names.

Written against optimum-neuron 0.4.5; comments name its files, below optimum/neuron/models/inference/ unless they say
more. Not run on hardware: in the tests a stand-in with the same call surface takes the vendor's place, so everything
here but the imports runs there.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokenplane_core.backend.errors import BackendUnavailable, UnsupportedModel
from tokenplane_core.backend.records import F32, ModelSpec

from .calls import Call, Graphs

if TYPE_CHECKING:
    from torch import Tensor

WRITTEN_FOR = "0.4.5"
VERSIONED = ("optimum-neuron", "neuronx-cc", "neuronx-distributed", "torch-neuronx")
GREEDY = (1.0, 1.0, 1.0)  # top_k, top_p, temperature: greedy as the vendor's own runner writes it (vllm/runner.py)


class CompiledModel(Protocol):
    """NxDModelForCausalLM (backend/modules/decoder/modeling_decoder.py), with weights on the device.

    i64 [rows, tokens] ids and positions, i64 [rows] cache lines, f32 [rows, 3] sampling parameters -> f32 [rows, 1,
    vocab] logits, or token ids [rows] if compiled with on_device_sampling.
    """

    neuron_config: Any  # NxDNeuronConfig (backend/config.py)
    context_encoding_model: Any  # the wrapper of backend/modules/decoder/decoder_wrappers.py

    def __call__(self, input_ids: Tensor, position_ids: Tensor, seq_ids: Tensor, sampling_params: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Vendor:
    """What `import_vendor` found. The stand-in of the tests is another one of these."""

    auto_class: Any  # NeuronModelForCausalLM (modeling_utils.py): get_neuron_config, from_pretrained
    model_class: Callable[..., Any]  # get_neuron_model_class(model_type, task, mode): class; class.export(...).save(to)
    graph_builder: Callable[..., Any]  # NxDDecoderBuilderForCausalLM (backend/modules/decoder/decoder_builders.py)
    cores_per_device: Callable[[], int]
    available_cores: Callable[[], int]  # heeds NEURON_RT_NUM_CORES and NEURON_RT_VISIBLE_CORES
    target: Callable[[], str]  # trn1 (also for inf2) or trn2
    versions: Mapping[str, str]


def import_vendor() -> Vendor:
    """Import optimum-neuron, which imports torch and the Neuron SDK's Python parts.

    Raises:
        BackendUnavailable: it is not installed, or in another version; names what to install.
    """
    advice = 'pip install "tokenplane-neuron[neuronx]" with the vendor\'s package index (README: Install)'
    versions = {name: _version(name) for name in VERSIONED}
    if versions["optimum-neuron"] != WRITTEN_FOR:
        found = versions["optimum-neuron"] or "not installed"
        raise BackendUnavailable(f"neuron: optimum-neuron is {found}, this plugin needs {WRITTEN_FOR}: {advice}")

    def named(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"optimum.neuron.{module}"), name)

    decoder = "models.inference.backend.modules.decoder"
    try:
        return Vendor(
            auto_class=named("models.inference.modeling_utils", "NeuronModelForCausalLM"),
            model_class=named("models.auto_model", "get_neuron_model_class"),
            graph_builder=named(f"{decoder}.decoder_builders", "NxDDecoderBuilderForCausalLM"),
            cores_per_device=named("utils.system", "cores_per_device"),
            available_cores=named("utils.system", "get_available_cores"),
            target=named("utils.instance", "get_default_compilation_target"),
            versions=versions,
        )
    except ImportError as error:
        raise BackendUnavailable(f"neuron: optimum-neuron cannot be imported ({error}): {advice}") from error


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


# --- Compile ------------------------------------------------------------------------------------------------


def compile_graphs(vendor: Vendor, model_class: Any, model: ModelSpec, graphs: Graphs, cores: int, to: Path) -> None:
    """Compile all graphs and save them, without weights, in the folder `to`. Takes many minutes on real hardware."""
    import torch

    config = vendor.auto_class.get_neuron_config(
        model.path, batch_size=graphs.rows, sequence_length=graphs.line_tokens, tensor_parallel_size=cores
    )
    config.on_device_sampling = graphs.samples
    config.continuous_batching = graphs.rows > 1
    config.torch_dtype = getattr(torch, model.dtype)
    bucketed = _with_shorter_contexts(model_class, vendor.graph_builder, graphs.context_tokens[:-1])
    bucketed.export(model.path, neuron_config=config, load_weights=False).save(str(to))


def _with_shorter_contexts(model_class: Any, graph_builder: Callable[..., Any], lengths: Sequence[int]) -> Any:
    """The vendor's class, with a context graph for each of `lengths` besides the longest, its only one.

    NxD finds the graph of a call by the shapes of its inputs (neuronx_distributed/trace/model_builder.py,
    input_shape_map), so further graphs need no further routing.
    """

    class WithShorterContexts(model_class):  # type: ignore[misc]
        @classmethod
        def create_graph_builders(cls, config: Any, neuron_config: Any) -> dict[str, Any]:
            builders: dict[str, Any] = super().create_graph_builders(config, neuron_config)
            like = builders["context_encoding"].neuron_config
            for n in lengths:
                builders[f"context_encoding_{n}"] = graph_builder(
                    config=config, neuron_config=like, max_tokens=n, active_tokens=n, model_cls=cls._model_cls
                )
            return builders

    return WithShorterContexts


# --- Load and run -------------------------------------------------------------------------------------------


def open_graphs(vendor: Vendor, model: ModelSpec, folder: Path) -> CompiledModel:
    """Load graphs that were compiled without weights, with the weights of the model's own folder.

    `from_pretrained` wants both in one folder (backend/pretrained_model.py, load_weights): it gets one of links.
    """
    with tempfile.TemporaryDirectory(prefix="tokenplane-neuron-") as view:
        for file in (*folder.iterdir(), *Path(model.path).glob("*.safetensors*")):
            (Path(view) / file.name).symlink_to(file.resolve())
        return _from_pretrained(vendor, view)


def open_exported(vendor: Vendor, model: ModelSpec) -> tuple[CompiledModel, Graphs]:
    """Load a folder that `optimum-cli export neuron` wrote, in the shape it was compiled for.

    Raises:
        UnsupportedModel: its graphs cannot serve sequences that come and go.
    """
    compiled = _from_pretrained(vendor, model.path)
    config = compiled.neuron_config
    apart = config.continuous_batching or config.batch_size == 1
    if not apart or config.speculation_length:
        raise UnsupportedModel(
            f"{model.model_id}: was exported with continuous_batching {config.continuous_batching} for batches of"
            f" {config.batch_size} and speculation_length {config.speculation_length}; needed are True (or batches of"
            " 1) and 0. Export it again, or serve the original model folder"
        )
    contexts = (config.max_context_length,)
    return compiled, Graphs(config.batch_size, config.sequence_length, contexts, config.on_device_sampling)


def _from_pretrained(vendor: Vendor, folder: str) -> CompiledModel:
    compiled: CompiledModel = vendor.auto_class.from_pretrained(folder, local_files_only=True)
    return compiled


def run(compiled: CompiledModel, call: Call, vocab_size: int) -> F32:
    """One forward; f32 [rows, vocab] logits, or f32 [rows, 1] token ids from graphs that sample on the device."""
    import torch

    rows, tokens = call.input_ids.shape
    if tokens > 1:
        # The wrapper pads prompts to the longest context. This copy of the configuration is its own and read for
        # nothing else at run time, so naming our bucket here makes it leave the prompt as it is.
        compiled.context_encoding_model.neuron_config.max_context_length = tokens
    with torch.inference_mode():
        out = compiled(
            torch.from_numpy(call.input_ids),
            position_ids=torch.from_numpy(call.position_ids),
            seq_ids=torch.from_numpy(call.seq_ids),
            sampling_params=torch.tensor([GREEDY] * rows, dtype=torch.float32),
        )
        # The output layer may be padded beyond the vocabulary, to divide among the cores.
        values: F32 = out.reshape(rows, -1)[:, :vocab_size].float().numpy()
    return values
