"""From a model id to a local folder: a path as it is, anything else from the Hugging Face hub or its cache.

Knows file names only; what is in the files is for `describe_model`, the tokenizer and the backend.
"""

from .errors import DiskFull, HubUnreachable, ModelGated, ModelNotFound, NoSafetensors
from .folder import check_model_folder, model_sha
from .headers import remote_tensors
from .progress import Progress
from .resolve import resolve_adapter, resolve_model

__all__ = [
    "DiskFull",
    "HubUnreachable",
    "ModelGated",
    "ModelNotFound",
    "NoSafetensors",
    "Progress",
    "check_model_folder",
    "model_sha",
    "remote_tensors",
    "resolve_adapter",
    "resolve_model",
]
