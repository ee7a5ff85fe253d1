"""`python -m tokenplane_neuron FOLDER`: compile a model ahead of the first start, which would wait for it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from tokenplane_core.backend.errors import TokenplaneError
from tokenplane_core.backend.records import LoadOptions
from tokenplane_core.model import describe_model

from .plugin import NeuronBackend


def main(arguments: Sequence[str] | None = None, backend: NeuronBackend | None = None) -> None:
    """Load the model once as `tokenplane serve` with the same options would, which leaves the graphs in the cache."""
    parser = argparse.ArgumentParser(prog="python -m tokenplane_neuron", description=__doc__)
    parser.add_argument("folder", help="model folder")
    parser.add_argument("--dtype", help="default: as the checkpoint was saved")
    parser.add_argument("--max-total-tokens", type=int, help="default: the model's")
    parser.add_argument("--max-batch-size", type=int, help="default: 8")
    parser.add_argument("--device-index", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    backend = backend or NeuronBackend()
    try:
        model = describe_model(options.folder, dtype=options.dtype, max_model_tokens=options.max_total_tokens)
        backend.load(model, LoadOptions(device_index=options.device_index, max_sequences=options.max_batch_size))
    except TokenplaneError as error:
        parser.exit(1, f"tokenplane: {error}\n")
    backend.close()


if __name__ == "__main__":
    main()
