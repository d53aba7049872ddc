"""How much memory `from_pretrained` expects a model to take, before it loads it."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from memplan.model.architecture import Architecture
from memplan.model.families import layout
from memplan.model.families.layout import Module
from memplan.tape.tensors import ITEMSIZE


def checkpoint_bytes(
    architecture: Architecture, dtype: str, packed_bytes: Callable[[Module], int | None]
) -> int:
    """
    Bytes of all weights, a tied head once; of a packed one those of its elements and nothing for its constants.

    Source: transformers 5, modeling_utils.py, get_total_byte_count; quantizers/quantizer_bnb_4bit.py and _8bit.py.

    Args:
        packed_bytes: of a module's weight; None where it is not packed.
    """

    def expected(module: Module) -> int:
        sizes = [prod(item.shape) * ITEMSIZE[dtype] for item in module.parameters("", None)]
        packed = packed_bytes(module)
        if packed is not None:
            sizes[0] = packed
        return sum(sizes)

    modules = layout(architecture)
    outside = [*modules.before, *modules.after]
    if architecture.tie_word_embeddings:
        outside.pop()
    return sum(map(expected, outside)) + architecture.num_hidden_layers * sum(map(expected, modules.block))
