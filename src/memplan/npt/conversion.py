"""Makes blocks of a transformers model NPT blocks, sets what they do, and reads what they measured."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Literal

import torch
from torch import nn

from memplan.errors import ModelError, RunError, UnknownModel
from memplan.job.spec import Npt
from memplan.npt.block import Controls, GatedBlock, Gpt2Block, NptBlock
from memplan.npt.layers import check_target, layer_indices
from memplan.npt.modulator import make_modulator

# By exact class, not by the names of submodules: Gemma, Granite and OLMo use those for other formulas.
_FAMILIES: dict[str, type[NptBlock]] = {
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer": GatedBlock,
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer": GatedBlock,
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer": GatedBlock,
    "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer": GatedBlock,
    "transformers.models.gpt2.modeling_gpt2.GPT2Block": Gpt2Block,
}

_classes: dict[type[nn.Module], type[NptBlock]] = {}


@dataclass(frozen=True)
class LocalMetrics:
    """What the blocks measured in their last local forward pass; vectors of one float per converted block."""

    layers: tuple[int, ...]
    loss: torch.Tensor
    """Mean square of (NPT branch - original branch) over elements of the tokens that count."""
    relative_error: torch.Tensor
    """`loss` over the mean square of the original branch; 1 is what an output of zero would score."""
    delta_norm: torch.Tensor
    """Mean over tokens of the squared Frobenius norm of delta_W."""


def convert(
    model: nn.Module, npt: Npt, *, dtype: torch.dtype = torch.float32, seed: int | None = None
) -> list[NptBlock]:
    """
    Make the chosen blocks of `model` NPT blocks in place, and return them in order.

    Afterwards only the parameters of their modulators (`np.A`, `np.B` ...; see `modulator`) require gradients.
    They are of `dtype` whatever the base's dtype, and are cast to it for compute. `seed` makes their values
    reproducible without touching the global generator. Wrappers around the model and hooks on its blocks stay in
    place.

    Raises `JobError` for a bad `npt.layers`, `UnknownModel` where no formula is known for the model's blocks,
    and `ModelError` for blocks that are converted already or whose forward has been replaced.
    """
    if npt_blocks(model):
        raise ModelError(
            f"{type(model).__name__} has NPT blocks already", hint="convert a model once, with all its layers"
        )
    blocks = _decoder_blocks(model)
    chosen = layer_indices(npt.layers, len(blocks))
    for index in chosen:
        _check_convertible(blocks[index], index)
        check_target(npt, is_gated=hasattr(blocks[index].mlp, "up_proj"))

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    controls = Controls(num_blocks=len(chosen), form=npt.form, regularization=npt.regularization)
    for index in chosen:
        block = blocks[index]
        hidden_size, intermediate_size, device = _mlp_shape(block)
        block.np = make_modulator(
            npt,
            hidden_size,
            intermediate_size,
            dtype=dtype,
            device=device,
            generator=generator,
            is_gated=hasattr(block.mlp, "up_proj"),
        )
        block.npt_layer = index
        block.npt_controls = controls
        block.npt_metrics = None
        block.npt_loss = None
        block.npt_norm = None
        block.__class__ = _npt_class(type(block))
        # accelerate's hooks keep the bound method of the old class and call that.
        if "_old_forward" in vars(block):
            block._old_forward = MethodType(type(block).forward, block)
    return npt_blocks(model)


def npt_blocks(model: nn.Module) -> list[NptBlock]:
    """The converted blocks of a model, wrapped or not, in order."""
    return [module for module in model.modules() if isinstance(module, NptBlock)]


def set_mode(
    model: nn.Module,
    mode: Literal["npt", "base", "local"],
    *,
    stream: Literal["teacher", "student"] = "teacher",
    backward: Literal["now", "later", "never"] = "now",
    loss_scale: float | torch.Tensor = 1.0,
    measure: bool = False,
    token_mask: torch.Tensor | None = None,
) -> None:
    """
    Say what the converted blocks do in the next forward passes; arguments left out return to their defaults.

    In `local` mode the total loss is the mean over blocks of (loss + regularization * delta_norm). `stream`
    is what a block hands to the next one. `backward="now"` adds gradients of loss_scale * total to the
    parameters while the forward pass runs, under `torch.no_grad` too, which spares unconverted blocks their
    graph; with `later` the caller runs backward on `local_loss`; with `never` blocks only measure.
    In `npt` mode blocks keep the mean norm of their deltas if they are to `measure`: `npt_norm`, with its graph.
    `token_mask` (B, S), nonzero where a token counts, is that of the next batch: call this before every batch
    that has padding. Without it every token counts.

    Raises `RunError` for local mode while dropout is active, since the original block would be a noisy
    teacher.
    """
    blocks = _converted(model)
    for name, value, choices in (
        ("mode", mode, ("npt", "base", "local")),
        ("stream", stream, ("teacher", "student")),
        ("backward", backward, ("now", "later", "never")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    if mode == "local":
        for block in blocks:
            _check_no_dropout(block)
    controls = blocks[0].npt_controls
    controls.mode = mode
    controls.stream = stream
    controls.backward = backward
    controls.loss_scale = loss_scale
    controls.measure = measure
    controls.padding = controls.num_tokens = None
    if token_mask is not None:
        controls.padding = token_mask.to(blocks[0].np.A.device) == 0
        controls.num_tokens = (~controls.padding).sum().clamp(min=1)


def read_metrics(model: nn.Module) -> LocalMetrics:
    """Detached copies of what every block measured in the last local forward pass, on the first's device."""
    blocks = _converted(model)
    metrics = [block.npt_metrics for block in blocks if block.npt_metrics is not None]
    if len(metrics) < len(blocks):
        raise RunError(
            "the NPT blocks have measured nothing yet",
            hint='run a forward pass after set_mode(model, "local")',
        )
    device = metrics[0].loss.device
    loss = torch.stack([block.loss.to(device) for block in metrics])
    target_mean_square = torch.stack([block.target_mean_square.to(device) for block in metrics])
    return LocalMetrics(
        layers=tuple(block.npt_layer for block in blocks),
        loss=loss,
        relative_error=loss / target_mean_square,
        delta_norm=torch.stack([block.delta_norm.to(device) for block in metrics]),
    )


def local_loss(model: nn.Module) -> torch.Tensor:
    """Total loss of the last forward in mode `local` with `backward="later"`: a scalar with its graph."""
    blocks = _converted(model)
    losses = [block.npt_loss for block in blocks if block.npt_loss is not None]
    if len(losses) < len(blocks):
        raise RunError(
            "the NPT blocks hold no loss",
            hint='run a forward pass after set_mode(..., "local", backward="later")',
        )
    return torch.stack(losses).mean()


def _family(cls: type) -> type[NptBlock] | None:
    """What makes blocks of this class NPT blocks; None where no formula is known."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), None)


def _decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """All decoder blocks of a known family, in order."""
    blocks = [module for module in model.modules() if _family(type(module)) is not None]
    if not blocks:
        known = ", ".join(name.rpartition(".")[2] for name in _FAMILIES)
        raise UnknownModel(
            f"{type(model).__name__} has no blocks that can become NPT blocks", hint=f"these can: {known}"
        )
    return blocks


def _converted(model: nn.Module) -> list[NptBlock]:
    blocks = npt_blocks(model)
    if not blocks:
        raise RunError(f"{type(model).__name__} has no NPT blocks", hint="convert the model first")
    return blocks


def _check_convertible(block: nn.Module, index: int) -> None:
    if "forward" in vars(block) and "_old_forward" not in vars(block):
        raise ModelError(
            f"the forward of block {index} has been replaced, so converting its class would have no effect",
            hint="convert the model before patching or wrapping it",
        )
    if hasattr(block, "crossattention"):
        raise ModelError(
            f"block {index} has cross-attention, for which the NPT block has no formula",
            hint="use a decoder-only model",
        )


def _check_no_dropout(block: NptBlock) -> None:
    rates = [module.p for module in block.modules() if isinstance(module, nn.Dropout) and module.training]
    rates += [getattr(module, "attention_dropout", 0.0) for module in block.children() if module.training]
    if any(rates):
        raise RunError(
            f"block {block.npt_layer} has dropout {max(rates)}, but the teacher of local training needs 0",
            hint="call model.eval() first: gradients do not depend on it",
        )


def _mlp_shape(block: nn.Module) -> tuple[int, int, torch.device]:
    """Hidden size, intermediate size, device: of the layer itself, since 4-bit weights have another shape."""
    if hasattr(block.mlp, "gate_proj"):
        layer = block.mlp.gate_proj
        hidden_size, intermediate_size = layer.in_features, layer.out_features
    else:
        layer = block.mlp.c_fc
        if hasattr(layer, "nx"):
            hidden_size, intermediate_size = layer.nx, layer.nf
        else:  # in 4 bits
            hidden_size, intermediate_size = layer.in_features, layer.out_features
    return hidden_size, intermediate_size, next(layer.parameters()).device


def _npt_class(cls: type[nn.Module]) -> type[NptBlock]:
    """The class that behaves as `cls` but for the MLP; the same one for all blocks of a class."""
    family = _family(cls)
    assert family is not None
    if cls not in _classes:
        _classes[cls] = type(f"Npt{cls.__name__}", (family, cls), {})
    return _classes[cls]
