"""What torch devices share: loading, the paged cache, the attention function, the runner and the sampler.

A library without an entry point. A device plugin subclasses `tokenplane_torch.backend.TorchBackend` and supplies a
`tokenplane_torch.device.TorchDevice`. Importing this package, `backend` or `device` does not import torch.
"""

__version__ = "0.1.0"
