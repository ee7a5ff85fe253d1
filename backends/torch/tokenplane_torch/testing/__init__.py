"""For tests of torch backends: small checkpoints of real architectures, the answers transformers gives, a driver."""

from .checkpoints import FAMILIES, REFUSED_FAMILIES, make_checkpoint, reference_greedy
from .device import PlainDevice
from .driver import Driver

__all__ = ["FAMILIES", "REFUSED_FAMILIES", "Driver", "PlainDevice", "make_checkpoint", "reference_greedy"]
