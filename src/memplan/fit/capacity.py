"""
Tier 4, changes of what is trained: lower rank, fewer target modules, fewer NPT blocks. Only offered when
asked for.
"""

from __future__ import annotations

from memplan.fit.lattice import Dimension, Edit, dimension
from memplan.job.spec import Job
from memplan.job.targets import is_by_block
from memplan.model import linear_modules
from memplan.model.architecture import Architecture, LinearModule, Outline
from memplan.npt.layers import layer_indices

SMALLEST_RANK = 4

_ATTENTION = ("self_attn", "attn")
"""What transformers names the attention module of a block."""
_QUERY_AND_VALUE = ("q_proj", "v_proj")


def rank(job: Job) -> Dimension | None:
    """
    Halvings of the rank of the adapters, with alpha, so that the scale alpha / rank stays.

    Small tensors have optimizer states that are neither quantised nor paged, so a smaller rank may need more.
    """
    if job.method not in ("lora", "qlora"):
        return None
    edits = []
    divisor = 2
    while job.lora.rank % divisor == 0 and job.lora.rank // divisor >= SMALLEST_RANK:
        smaller = job.lora.rank // divisor
        edits.append(
            Edit(
                f"rank {smaller}",
                {"lora.rank": smaller, "lora.alpha": job.lora.alpha / divisor},
                f"adapters of rank {smaller} instead of {job.lora.rank}, alpha / rank kept",
                tier=4,
                given_up=1 - 1 / divisor,
            )
        )
        divisor *= 2
    return dimension("lora.rank", edits)


def target_modules(job: Job, architecture: Architecture | Outline) -> Dimension | None:
    """Adapters on attention only, then on query and value only (the choice of Hu et al. 2021)."""
    if job.method not in ("lora", "qlora") or is_by_block(job.lora.target_modules):
        return None
    if isinstance(architecture, Outline):
        return None
    modules = [module for module in linear_modules(architecture) if module.layer is not None]
    current = job.lora.target_modules
    adapted = (
        modules
        if isinstance(current, str)
        else [module for module in modules if any(_is_named(module, target) for target in current)]
    )
    in_attention = [module for module in adapted if module.name.split(".")[-2] in _ATTENTION]
    choices = {
        "attention only": in_attention,
        "query and value only": [m for m in in_attention if m.name.split(".")[-1] in _QUERY_AND_VALUE],
    }
    edits = []
    fewest = len(adapted)
    for name, kept in choices.items():
        if not 0 < len(kept) < fewest:
            continue
        fewest = len(kept)
        edits.append(
            Edit(
                name,
                {"lora.target_modules": _targets(kept, modules)},
                f"adapters on {name.removesuffix(' only')} only",
                tier=4,
                given_up=1 - _adapter_size(kept) / _adapter_size(adapted),
            )
        )
    return dimension("lora.target_modules", edits, chain=True)


def npt_layers(job: Job, architecture: Architecture | Outline) -> Dimension | None:
    """The upper half of the NPT blocks, the upper quarter, and so on down to one."""
    if job.method != "npt":
        return None
    layers = layer_indices(job.npt.layers, architecture.num_hidden_layers)
    edits = []
    count = len(layers) // 2
    while count:
        kept = layers[-count:]
        edits.append(
            Edit(
                f"{count} NPT blocks",
                {"npt.layers": kept},
                f"{count} NPT blocks ({kept[0]} to {kept[-1]}) instead of {len(layers)}",
                tier=4,
                given_up=1 - count / len(layers),
            )
        )
        count //= 2
    return dimension("npt.layers", edits, chain=True)


def _is_named(module: LinearModule, target: str) -> bool:
    """As `peft` matches a target: the whole name, or its last parts."""
    return module.name == target or module.name.endswith("." + target)


def _targets(kept: list[LinearModule], modules: list[LinearModule]) -> tuple[str, ...]:
    """
    The shortest names that match these modules and no others: `q_proj`, but `attn.c_proj` beside
    `mlp.c_proj`.
    """
    others = [module for module in modules if module not in kept]
    targets: dict[str, None] = {}
    for module in kept:
        parts = module.name.split(".")
        length = 1
        while any(_is_named(other, ".".join(parts[-length:])) for other in others):
            length += 1
        targets[".".join(parts[-length:])] = None
    return tuple(targets)


def _adapter_size(modules: list[LinearModule]) -> int:
    """Elements of the adapters of these modules, per unit of rank."""
    return sum(module.in_features + module.out_features for module in modules)
