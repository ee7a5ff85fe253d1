"""From a model folder to a module on the device, with what can be refused before the weights are read.

Modules and weights come from transformers, from local safetensors files only. What a loaded model computes is
checked in checks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from tokenplane_core.backend.errors import OutOfMemory, UnsupportedModel
from tokenplane_core.backend.records import ModelSpec
from tokenplane_core.weight_files import stored_weights_bytes

from . import attention
from .device import TorchDevice
from .failures import first_line, is_out_of_memory

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
OUTSIDE_INTERFACE = (
    "its attention does not go through transformers' attention interface, so it cannot use a paged cache"
)
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})


def load_model(model: ModelSpec, device: TorchDevice) -> transformers.PreTrainedModel:
    """Load the weights in `model.dtype`, attention going through `attention.NAME`.

    Raises:
        UnsupportedModel, OutOfMemory: nothing stays loaded.
    """
    require_safetensors(model)
    weights_bytes, free_bytes = stored_weights_bytes(model), device.free_bytes()
    if weights_bytes > free_bytes:
        way_out = "choose a smaller model" + (", or --dtype bfloat16" if model.dtype == "float32" else "")
        raise OutOfMemory(
            f"{model.model_id}: its weights need {weights_bytes / 2**30:.1f} GiB as {model.dtype}, but only"
            f" {free_bytes / 2**30:.1f} GiB are free; {way_out}"
        )
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # what matters of its warnings is checked here and in checks.py
    require_text_decoder(model, _config(model))
    attention.register()
    try:
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=getattr(torch, model.dtype),
            attn_implementation=attention.NAME,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
        )
        loaded = loaded.to(device.torch_device)
        loaded.tie_weights()  # moving to some devices makes two weights of one
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{model.model_id}: its weights do not fit: {first_line(error)}") from error
        unknown = isinstance(error, KeyError) and error.args == (attention.NAME,)
        raise refused(model, OUTSIDE_INTERFACE if unknown else _why_unreadable(model, error)) from error
    require_all_weights(model, report)
    return loaded.eval().requires_grad_(False)


def refused(model: ModelSpec, reason: str) -> UnsupportedModel:
    """The one form of a refusal: which model, which type, why."""
    kind = model.config.get("model_type", "unknown")
    return UnsupportedModel(f"{model.model_id}: model type {kind!r} is not supported: {reason}")


def require_safetensors(model: ModelSpec) -> None:
    folder = Path(model.path)
    if any(folder.glob("*.safetensors")):
        return
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    pickled = [file.name for file in files if file.suffix in PICKLE_SUFFIXES]
    if pickled:
        raise UnsupportedModel(
            f"{model.model_id}: its weights are pickle files ({pickled[0]}), which can run any code while they load;"
            " convert them to safetensors first"
        )
    raise UnsupportedModel(f"{model.model_id}: {folder} holds no *.safetensors file")


def require_text_decoder(model: ModelSpec, config: transformers.PreTrainedConfig) -> None:
    """Refuse from config.json alone what cannot work, before minutes of loading."""
    if config.is_encoder_decoder:
        raise refused(model, "it is an encoder-decoder; only decoders are served")
    if "text_config" in type(config).sub_configs:
        raise refused(model, f"it is multimodal ({', '.join(sorted(type(config).sub_configs))}); only text is served")
    unlike = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS)
    if unlike:
        raise refused(
            model,
            f"it has layers of type {', '.join(unlike)}; only {' and '.join(sorted(ATTENTION_LAYERS))} are served",
        )


def require_all_weights(model: ModelSpec, report: Mapping[str, Any]) -> None:
    """transformers fills what the files lack with random numbers and carries on; serve no such thing."""
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise refused(
            model, f"its files lack {len(lacking)} of the weights the architecture needs, such as {lacking[0]}"
        )


def weights_bytes(module: torch.nn.Module) -> int:
    """Memory of parameters and buffers, tied ones once."""
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())


def _config(model: ModelSpec) -> transformers.PreTrainedConfig:
    try:
        return transformers.AutoConfig.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:
        raise refused(model, _why_unreadable(model, error)) from error


def _why_unreadable(model: ModelSpec, error: Exception) -> str:
    if "auto_map" in model.config and not model.trust_remote_code:
        return "it needs Python code that comes with it; if you trust that code, allow it with --trust-remote-code"
    return f"transformers {transformers.__version__} cannot load it: {first_line(error)}"
