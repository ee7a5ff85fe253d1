"""A stand-in for optimum-neuron: the calls that tokenplane_neuron.vendor uses, over a real tiny Llama on the CPU.

It keeps the vendor's manners (optimum-neuron 0.4.5, NxD backend): graphs exist for exact shapes and dtypes, prompts
run one at a time into a cache line, token generation runs all rows at once with row i on line i, missing rows are
filled with copies of the first, a prompt of one token is not taken for a prompt. Where the vendor's behaviour is not
documented it does the worst thing: ties go to the highest index, unwritten cells hold large numbers.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenplane_core.backend.hookspecs import hookimpl
from tokenplane_core.backend.records import DetectReport, Device
from tokenplane_neuron.plugin import NeuronBackend
from tokenplane_neuron.vendor import Vendor

COMPILER = "2.21.33363.0"
CANARY = 50.0  # in cells that nothing was written to


@dataclass
class Bench:
    """What tests set, and what they look at afterwards."""

    cores: int = 2
    compiler: str = COMPILER
    instance: str = "inf2"
    export_error: Exception | None = None
    load_error: Exception | None = None
    exports: list[list[str]] = field(default_factory=list)  # names of the graphs of each export
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)  # as given to the model

    def vendor(self) -> Vendor:
        return Vendor(
            auto_class=AutoClass(self),
            model_class=self.model_class,
            graph_builder=GraphBuilder,
            cores_per_device=lambda: 2,
            available_cores=lambda: self.cores,
            target=self.target,
            versions={"optimum-neuron": "0.4.5", "neuronx-cc": self.compiler},
        )

    def target(self) -> str:
        if self.instance not in ("trn1", "inf2"):
            raise ValueError(f"{self.instance} is not a valid instance type")
        return "trn1"

    def model_class(self, model_type: str, task: str, mode: str) -> type[LlamaForCausalLM]:
        assert (task, mode) == ("text-generation", "inference")
        if model_type != "llama":
            raise ValueError(f"Model type {model_type} is not supported. Supported types are: ['llama'].")
        return type("BoundLlama", (LlamaForCausalLM,), {"bench": self})


class StandInBackend(NeuronBackend):
    """The plugin over the stand-in, on a machine that seems to have two Inferentia2 with little memory."""

    def __init__(self, bench: Bench | None = None) -> None:
        self.bench = bench or Bench()
        super().__init__(self.bench.vendor)

    @hookimpl
    def detect(self) -> DetectReport:
        chips = (Device("neuron", i, "stand-in", "neuroncore-v2", 1 << 30, ("float32", "bfloat16"), 0) for i in (0, 1))
        return DetectReport("found", tuple(chips))


@dataclass
class NeuronConfig:
    batch_size: int
    sequence_length: int
    max_context_length: int
    tp_degree: int
    max_batch_size: int
    speculation_length: int = 0
    continuous_batching: bool = False
    on_device_sampling: bool = True
    torch_dtype: torch.dtype = torch.bfloat16


class AutoClass:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def get_neuron_config(
        self, model_name_or_path: str, *, batch_size: int, sequence_length: int, tensor_parallel_size: int
    ) -> NeuronConfig:
        assert (Path(model_name_or_path) / "config.json").exists()
        return NeuronConfig(batch_size, sequence_length, sequence_length, tensor_parallel_size, batch_size)

    def from_pretrained(self, model_id: str, *, local_files_only: bool) -> LlamaForCausalLM:
        if self.bench.load_error is not None:
            raise self.bench.load_error
        folder = Path(model_id)
        saved = json.loads((folder / "neuron_config.json").read_text())
        if saved.pop("neuronxcc_version") != self.bench.compiler:
            raise RuntimeError("This model was exported with another version of the compiler.")
        saved["torch_dtype"] = getattr(torch, saved["torch_dtype"])
        config = json.loads((folder / "config.json").read_text())
        graphs = json.loads((folder / "model.pt").read_text())
        model = self.bench.model_class(config["model_type"], "text-generation", "inference")
        return model(config, NeuronConfig(**saved), graphs, folder)


@dataclass
class GraphBuilder:
    config: dict[str, Any]
    neuron_config: NeuronConfig
    max_tokens: int
    active_tokens: int
    model_cls: type

    def shapes(self) -> list[list[int]]:
        rows = self.neuron_config.batch_size
        return [[rows, self.active_tokens], [rows, self.active_tokens], [rows], [rows, 3]]


class LlamaForCausalLM:
    """The model class of one vendor; loaded when it has a folder to take its weights from."""

    bench: Bench
    _model_cls = object

    def __init__(
        self, config: dict[str, Any], neuron_config: NeuronConfig, graphs: dict[str, Any], folder: Path | None = None
    ) -> None:
        self.config, self.neuron_config, self.graphs = config, neuron_config, graphs
        if folder is not None:
            program = Program(config, neuron_config, graphs, load_file(folder / "model.safetensors"))
            self.context_encoding_model = Wrapper(_context_config(neuron_config), program, is_context=True)
            self.token_generation_model = Wrapper(copy.deepcopy(neuron_config), program, is_context=False)

    @classmethod
    def create_graph_builders(cls, config: dict[str, Any], neuron_config: NeuronConfig) -> dict[str, GraphBuilder]:
        context, tokens = neuron_config.max_context_length, neuron_config.sequence_length
        return {
            "context_encoding": GraphBuilder(config, _context_config(neuron_config), context, context, cls._model_cls),
            "token_generation": GraphBuilder(config, copy.deepcopy(neuron_config), tokens, 1, cls._model_cls),
        }

    @classmethod
    def export(cls, model_id: str, neuron_config: NeuronConfig, load_weights: bool) -> LlamaForCausalLM:
        assert not load_weights
        if cls.bench.export_error is not None:
            raise cls.bench.export_error
        config = json.loads((Path(model_id) / "config.json").read_text())
        builders = cls.create_graph_builders(config, neuron_config)
        cls.bench.exports.append(list(builders))
        return cls(config, neuron_config, {name: builder.shapes() for name, builder in builders.items()})

    def save(self, dest_path: str) -> None:
        dtype = str(self.neuron_config.torch_dtype).removeprefix("torch.")
        saved = {**asdict(self.neuron_config), "torch_dtype": dtype, "neuronxcc_version": self.bench.compiler}
        for name, content in (("config.json", self.config), ("neuron_config.json", saved), ("model.pt", self.graphs)):
            (Path(dest_path) / name).write_text(json.dumps(content))

    def __call__(self, input_ids: Tensor, position_ids: Tensor, seq_ids: Tensor, sampling_params: Tensor) -> Tensor:
        call = (input_ids, position_ids, seq_ids, sampling_params)
        self.bench.calls.append(call)
        if input_ids.shape[-1] > 1 and position_ids.min().item() == 0:
            return self.context_encoding_model(*call)
        return self.token_generation_model(*call)


def _context_config(neuron_config: NeuronConfig) -> NeuronConfig:
    config = copy.deepcopy(neuron_config)
    config.batch_size = 1 if config.continuous_batching else config.batch_size
    return config


class Wrapper:
    """Fits the inputs to the compiled shapes, as the vendor's does."""

    def __init__(self, neuron_config: NeuronConfig, program: Program, is_context: bool) -> None:
        self.neuron_config, self.program, self.is_context = neuron_config, program, is_context

    def __call__(self, ids: Tensor, positions: Tensor, lines: Tensor, sampling: Tensor) -> Tensor:
        ids, positions, lines = ids.int(), positions.int(), lines.int()
        if self.is_context:
            missing = self.neuron_config.max_context_length - ids.shape[1]
            ids = torch.nn.functional.pad(ids, (0, missing), value=0)
            positions = torch.nn.functional.pad(positions, (0, missing), value=1)
        rows = len(lines)
        if rows > self.neuron_config.batch_size:
            raise ValueError(f"{rows} rows, compiled for {self.neuron_config.batch_size}")
        if rows < self.neuron_config.batch_size:
            ids, positions, sampling = (self._filled(t) for t in (ids, positions, sampling))
            absent = [line for line in range(self.neuron_config.max_batch_size) if line not in lines.tolist()]
            lines = torch.tensor(lines.tolist() + absent, dtype=torch.int32)
        if self.is_context or not self.neuron_config.continuous_batching:
            return self.program(ids, positions, lines, sampling)[:rows]
        order = torch.argsort(lines)
        out = self.program(ids[order], positions[order], lines[order], sampling[order])
        return out[lines.long()][:rows]

    def _filled(self, rows: Tensor) -> Tensor:
        copies = self.neuron_config.batch_size - len(rows)
        return torch.cat([rows, rows[:1].expand(copies, *rows.shape[1:])])


class Program:
    """The compiled program: a Llama for exact shapes, with a cache [lines, KV heads, tokens, head] per layer."""

    def __init__(
        self, config: dict[str, Any], neuron_config: NeuronConfig, graphs: dict[str, Any], weights: dict[str, Tensor]
    ) -> None:
        self.config, self.neuron_config = config, neuron_config
        self.graphs = {json.dumps(shapes): name for name, shapes in graphs.items()}
        self.weights = {name: tensor.to(neuron_config.torch_dtype) for name, tensor in weights.items()}
        heads, size = config["num_key_value_heads"], config["head_dim"]
        shape = (2, neuron_config.max_batch_size, heads, neuron_config.sequence_length, size)
        self.cache = [torch.full(shape, CANARY, dtype=neuron_config.torch_dtype) for _ in self.layers]

    @property
    def layers(self) -> range:
        return range(self.config["num_hidden_layers"])

    def __call__(self, ids: Tensor, positions: Tensor, lines: Tensor, sampling: Tensor) -> Tensor:
        dtypes = [tensor.dtype for tensor in (ids, positions, lines, sampling)]
        if dtypes != [torch.int32] * 3 + [torch.float32]:
            raise RuntimeError(f"inputs of {dtypes}")
        shapes = json.dumps([list(tensor.shape) for tensor in (ids, positions, lines, sampling)])
        if shapes not in self.graphs:
            raise RuntimeError(f"no graph was compiled for inputs of shapes {shapes}; there are {list(self.graphs)}")
        if lines.min() < 0 or lines.max() >= self.neuron_config.max_batch_size:
            raise RuntimeError(f"no cache lines {lines.tolist()}")
        if ids.min() < 0 or ids.max() >= self.config["vocab_size"]:
            raise RuntimeError("a token outside the vocabulary")
        if positions.min() < 0 or positions.max() >= self.neuron_config.sequence_length:
            raise RuntimeError(f"a position outside the cache: {positions.max()}")
        if self.graphs[shapes].startswith("context_encoding"):
            hidden = self._hidden(ids, positions, int(lines[0]))
            largest = (positions[0] == positions[0].max()).nonzero()[-1]  # on a tie the last
            hidden = hidden[:, largest]
        else:
            hidden = self._hidden(ids, positions, None)
        logits = (hidden @ self.weights["lm_head.weight"].T).float()
        if not self.neuron_config.on_device_sampling:
            return torch.nn.functional.pad(logits, (0, 5), value=-1e9)  # the output layer is padded to the cores
        if not torch.equal(sampling, torch.ones_like(sampling)):
            raise ValueError("the stand-in draws greedily: top_k 1, top_p 1, temperature 1")
        return logits.shape[-1] - 1 - logits[:, -1].flip(-1).argmax(-1)  # on a tie the highest id

    def _hidden(self, ids: Tensor, positions: Tensor, line: int | None) -> Tensor:
        """Hidden states after the last layer; a prompt into `line`, or one token for every line."""
        config, w = self.config, self.weights
        x = w["model.embed_tokens.weight"][ids.long()]
        angles = positions[..., None] * config["rope_theta"] ** (
            -torch.arange(0, config["head_dim"], 2, dtype=torch.float64) / config["head_dim"]
        )
        angles = torch.cat([angles, angles], -1)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            name = f"model.layers.{layer}."
            h = self._norm(x, name + "input_layernorm.weight")
            q, k, v = (self._heads(h, f"{name}self_attn.{part}_proj.weight") for part in "qkv")
            q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q, k))
            attended = self._attend(layer, q, k, v, positions, line)
            x = x + attended.transpose(1, 2).flatten(2) @ w[name + "self_attn.o_proj.weight"].T
            h = self._norm(x, name + "post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(h @ w[name + "mlp.gate_proj.weight"].T)
            x = x + (gate * (h @ w[name + "mlp.up_proj.weight"].T)) @ w[name + "mlp.down_proj.weight"].T
        return self._norm(x, "model.norm.weight")

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, line: int | None) -> Tensor:
        """Attention, then the cache takes the new keys and values: all of a prompt's padding too."""
        cache, tokens = self.cache[layer], q.shape[2]
        if line is not None:
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
            keys, values = k, v
            cache[0, line, :, :tokens], cache[1, line, :, :tokens] = k[0], v[0]
        else:
            cells = torch.arange(cache.shape[3])
            mask = torch.cat([cells < positions, torch.ones_like(positions, dtype=torch.bool)], 1)[:, None, None]
            keys, values = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            rows = torch.arange(len(positions))
            cache[0, rows, :, positions[:, 0]], cache[1, rows, :, positions[:, 0]] = k[:, :, 0], v[:, :, 0]
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    def _heads(self, h: Tensor, name: str) -> Tensor:
        return (h @ self.weights[name].T).unflatten(-1, (-1, self.config["head_dim"])).transpose(1, 2)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weights[name], self.config["rms_norm_eps"])
