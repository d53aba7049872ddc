"""
Every tensor of a model, in the order and with the names of `model.named_parameters()` in transformers 5.

One description of a family's modules (`families.layout`) gives parameters, linear layers and counts. The tests hold it
to transformers itself, built on meta tensors from the same config.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.model.architecture import Architecture, Buffer, LinearModule, Parameter
from memplan.model.families import layout
from memplan.model.families.layout import Module


def parameters(architecture: Architecture) -> tuple[Parameter, ...]:
    """
    Every parameter in the order of `model.named_parameters()`; a head tied to the embedding is not listed.

    Order as registered in `transformers/models/*/modeling_*.py`.
    """
    return tuple(
        parameter
        for prefix, layer, module in _modules(architecture)
        if not (module.role == "head" and architecture.tie_word_embeddings)
        for parameter in module.parameters(prefix, layer)
    )


def linear_modules(architecture: Architecture) -> tuple[LinearModule, ...]:
    """
    Every linear layer in the order of `model.named_modules()`, the head included, tied or not.

    GPT-2's `Conv1D` layers count as linear layers and are flagged `transposed`.
    """
    linears = []
    for prefix, layer, module in _modules(architecture):
        if module.role in ("linear", "head"):
            in_features, out_features = module.shape if module.transposed else reversed(module.shape)
            name = prefix + module.name
            linears.append(
                LinearModule(name, in_features, out_features, module.bias, layer, module.transposed)
            )
    return tuple(linears)


def buffers(architecture: Architecture) -> tuple[Buffer, ...]:
    """Tensors on the device that are no parameters."""
    return layout(architecture).buffers


def num_parameters(architecture: Architecture) -> int:
    """Elements of all parameters, a tied head counted once."""
    modules = layout(architecture)
    outside = [*modules.before, *modules.after]
    if architecture.tie_word_embeddings:
        outside = [module for module in outside if module.role != "head"]
    in_block = sum(map(_num_elements, modules.block))
    return sum(map(_num_elements, outside)) + architecture.num_hidden_layers * in_block


def _modules(architecture: Architecture) -> Iterator[tuple[str, int | None, Module]]:
    """(prefix of the name, block index, module), in order of registration."""
    modules = layout(architecture)
    for module in modules.before:
        yield "", None, module
    for layer in range(architecture.num_hidden_layers):
        for module in modules.block:
            yield f"{modules.block_prefix}.{layer}.", layer, module
    for module in modules.after:
        yield "", None, module


def _num_elements(module: Module) -> int:
    return sum(parameter.num_elements for parameter in module.parameters("", None))
