"""
Tier 1, changes that cost time: smaller micro batches, checkpointing, and where parameters and states live.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from memplan.fit import costs
from memplan.fit.capacity import SMALLEST_RANK
from memplan.fit.lattice import AS_IS, Dimension, Edit, dimension
from memplan.job.spec import Job
from memplan.model.architecture import Architecture, Outline

_MIN_BLOCKS = 4
"""From this depth on, what the blocks no longer hold outweighs what recomputing one of them adds."""

_MIN_QUANTISED_ELEMENTS = 4096
"""Tensors below this have 32-bit states in any case (`min_8bit_size` of bitsandbytes' optimizers)."""


def micro_batch(job: Job) -> Dimension | None:
    """
    Every smaller micro batch with which accumulation makes up exactly the same global batch.

    From one accumulation step to several, gradients stay alive through the next forward pass; only from there
    on does a smaller micro batch never need more.
    """
    sequences = job.micro_batch_size * job.gradient_accumulation_steps
    sizes = [size for size in range(job.micro_batch_size - 1, 0, -1) if sequences % size == 0]
    edits = [
        Edit(
            f"micro batch {size}",
            {"micro_batch_size": size, "gradient_accumulation_steps": sequences // size},
            f"micro batch {size} with {sequences // size} accumulation steps instead of "
            f"{job.micro_batch_size} with {job.gradient_accumulation_steps} (global batch kept)",
            tier=1,
            slowdown=round(costs.MICRO_BATCH_SLOWDOWN ** math.log2(job.micro_batch_size / size), 4),
        )
        for size in sizes
    ]
    accumulated = [(smaller.name, larger.name) for larger, smaller in itertools.pairwise(edits)]
    return dimension(
        "micro batch", edits, chain=job.gradient_accumulation_steps > 1, no_more_than=accumulated
    )


def activations(job: Job, architecture: Architecture | Outline) -> Dimension | None:
    """
    Checkpointing, and offload of the block inputs that it keeps. Local NPT training holds one block anyway.

    A checkpointed block keeps its input instead of several times that, and one block at a time is recomputed,
    which never needs more from a few blocks on. The exception is a single accumulation step of full training:
    gradients pile up while backward runs, the peak may be in its last block, and there recomputation adds the
    block's input.
    """
    if job.method == "npt":
        return None
    added = costs.FULL_CHECKPOINTING_SLOWDOWN["full" if job.method == "full" else "frozen base"] - 1
    recomputed = {"none": 0.0, "selective": 0.5, "full": 1.0}
    summaries = {
        "selective": "checkpoint every second block: it runs forward again in backward",
        "full": "checkpoint every block: it runs forward again in backward",
    }
    offload = "keep the inputs of checkpointed blocks in host memory"
    current = job.activation_checkpointing
    # Only reentrant checkpoints drop the inputs of 8-bit layers (tape/quantized.py).
    lacks_reentrant = job.has_8bit_base and job.loop != "memplan" and not job.use_reentrant
    edits = []
    if lacks_reentrant and current == "full" and not job.activation_offload:
        summary = "reentrant checkpoints: they keep no inputs of 8-bit layers"
        edits.append(Edit("reentrant checkpointing", {"use_reentrant": True}, summary))
    for level, summary in summaries.items():
        slowdown = (1 + recomputed[level] * added) / (1 + recomputed[current] * added)
        if recomputed[level] > recomputed[current]:
            edits.append(
                Edit(
                    f"{level} checkpointing",
                    {"activation_checkpointing": level}
                    | ({"use_reentrant": True} if lacks_reentrant and level == "full" else {}),
                    summary,
                    tier=1,
                    slowdown=round(slowdown, 4),
                )
            )
    is_offloaded = job.activation_offload or job.offload.activations != "none"
    if not is_offloaded and not (lacks_reentrant or (job.use_reentrant and job.loop != "memplan")):
        settings: dict[str, Any] = {"activation_offload": True}
        slowdown = costs.ACTIVATION_OFFLOAD_SLOWDOWN
        if edits:
            settings |= edits[-1].set
            slowdown *= edits[-1].slowdown
            offload = f"{edits[-1].summary}; {offload}"
        edits.append(
            Edit("activation offload", settings, offload, 1, round(slowdown, 4), num_changes=len(settings))
        )
    piles_up = job.method == "full" and job.gradient_accumulation_steps == 1
    is_ordered = architecture.num_hidden_layers >= _MIN_BLOCKS and not piles_up and not lacks_reentrant
    return dimension("activations", edits, chain=is_ordered)


def states(job: Job, architecture: Architecture | Outline) -> Dimension | None:
    """
    Where parameters and optimizer states live and in how many bits: sharded, on the host, quantised, paged.

    One dimension, because these exclude each other: bitsandbytes' optimizers do not work on sharded
    parameters (bitsandbytes-foundation/bitsandbytes issues 89 and 1633), and host offload has a step of its
    own.

    States of 8 bits never need more, unless the trained tensors are so small that bitsandbytes gives them
    float32 states; those that leave need less still. 32-bit paged states may be wider than those of bfloat16
    weights, and sharding and parameter offload add buffers, so these are not stated to need less than the job
    as it is.
    """
    edits = _sharding(job) + _optimizer_states(job)
    no_more_than = [
        ("paged 8-bit states", "8-bit states"),
        ("optimizer offload", "paged states"),
        ("optimizer offload", "paged 8-bit states"),
        ("optimizer offload", AS_IS.name),
        ("parameter offload", "full shard"),
    ]
    if not _sharded_storage(job):  # with it, blocks gather their 4-bit weights under full shard alone
        no_more_than.append(("full shard", "gradient shard"))
    ranks = {"lora": job.lora.rank, "qlora": job.lora.rank, "npt": job.npt.rank}
    smallest_rank = min(ranks.get(job.method, architecture.hidden_size), SMALLEST_RANK)
    if smallest_rank * architecture.hidden_size >= _MIN_QUANTISED_ELEMENTS:
        no_more_than += [("8-bit states", AS_IS.name), ("paged 8-bit states", AS_IS.name)]
    return dimension("states", edits, no_more_than=no_more_than)


def _sharding(job: Job) -> list[Edit]:
    """Sharding over the GPUs that the job has, and the host."""
    parallel = job.parallel
    if (
        job.offload.params
        or "8bit" in job.optimizer
        or "paged" in job.optimizer
        or job.optimizer.startswith("ao_")
        or parallel.fsdp_version == 1
        or (job.has_8bit_base and not parallel.strategy.startswith("ZERO_"))
    ):
        return []
    if job.method == "npt" and job.npt.objective == "end_to_end":
        return []
    num_gpus = parallel.dp_shard * parallel.dp_replicate
    if parallel.strategy.startswith("ZERO_"):
        return [
            Edit(
                f"ZeRO stage {stage}",
                {"parallel.strategy": f"ZERO_{stage}"},
                f"ZeRO stage {stage} over the same {num_gpus} GPUs",
                tier=1,
                slowdown=costs.FULL_SHARD_SLOWDOWN if stage == 3 else costs.SHARD_GRADIENTS_SLOWDOWN,
            )
            for stage in range(int(parallel.strategy[-1]) + 1, 3 if job.has_8bit_base else 4)
            if num_gpus > 1
        ]
    if num_gpus == 1 and job.loop == "hf_trainer":  # has it with FSDP and DeepSpeed only
        return []
    storage = _sharded_storage(job)
    if storage and parallel.strategy == "FULL_SHARD":
        dtype = storage["quantization.storage"]
        summary = f"store 4-bit weights in {dtype}, so that they are sharded over the {num_gpus} GPUs"
        return [
            Edit("sharded 4-bit base", storage, summary, 1, costs.FULL_SHARD_SLOWDOWN),
            _offload(storage, summary),
        ]
    if num_gpus == 1 or (parallel.strategy == "FULL_SHARD" and parallel.dp_replicate == 1):
        return [_offload()]
    fully_sharded = {
        "parallel.strategy": "FULL_SHARD",
        "parallel.dp_shard": num_gpus,
        "parallel.dp_replicate": 1,
    }
    edits = []
    if parallel.strategy == "NO_SHARD":
        settings = {**fully_sharded, "parallel.strategy": "SHARD_GRAD_OP"}
        summary = f"shard gradients and optimizer states over the {num_gpus} GPUs"
        edits.append(Edit("gradient shard", settings, summary, 1, costs.SHARD_GRADIENTS_SLOWDOWN))
    summary = f"shard parameters, gradients and optimizer states over the {num_gpus} GPUs"
    fully_sharded |= storage
    return [
        *edits,
        Edit("full shard", fully_sharded, summary, 1, costs.FULL_SHARD_SLOWDOWN),
        _offload(fully_sharded, summary),
    ]


def _offload(first: Mapping[str, Any] = MappingProxyType({}), summary: str = "") -> Edit:
    """Parameters on the host, after the change that it takes first, if any."""
    keep = "keep parameters, gradients and the optimizer step on the host"
    return Edit(
        "parameter offload",
        {**first, "offload.params": True},
        f"{summary}; {keep}" if first else keep,
        tier=1,
        slowdown=costs.PARAMETER_OFFLOAD_SLOWDOWN,
        num_changes=2 if first else 1,
    )


def _sharded_storage(job: Job) -> dict[str, Any]:
    """What lets FSDP shard a 4-bit base that is stored in bytes, where it is accelerate's (tape/behaviour.py)."""
    if job.loop != "hf_trainer" or not job.has_quantized_base or job.quantization.storage != "uint8":
        return {}
    return {"quantization.storage": job.autocast or job.dtype}


def _optimizer_states(job: Job) -> list[Edit]:
    """Quantised and paged states, which need whole parameters, and states on the host."""
    is_fsdp = job.parallel.strategy in ("SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD")
    if is_fsdp or job.offload.optimizer or job.offload.params:
        return []
    choices = {
        "adamw": ("adamw_8bit", "paged_adamw_8bit", "paged_adamw"),
        "adamw_8bit": ("paged_adamw_8bit",),
        "paged_adamw": ("paged_adamw_8bit",),
    }
    described = {
        "adamw_8bit": ("8-bit states", "optimizer states in 8 bits", costs.EIGHT_BIT_STATES_SLOWDOWN),
        "paged_adamw": ("paged states", "optimizer states paged to RAM", costs.PAGED_STATES_SLOWDOWN),
        "paged_adamw_8bit": (
            "paged 8-bit states",
            "optimizer states in 8 bits and paged to RAM",
            costs.PAGED_EIGHT_BIT_STATES_SLOWDOWN,
        ),
    }
    edits = []
    for optimizer in choices.get(job.optimizer, ()):
        name, summary, slowdown = described[optimizer]
        edits.append(
            Edit(name, {"optimizer": optimizer}, f"{summary} (takes bitsandbytes)", tier=2, slowdown=slowdown)
        )
    if job.optimizer in ("adamw", "lion") and (
        job.loop != "hf_trainer" or job.parallel.strategy.startswith("ZERO_")
    ):
        slowdown = costs.OPTIMIZER_OFFLOAD_SLOWDOWN["full" if job.method == "full" else "few trained"]
        summary = "optimizer states and step on the host"
        edits.append(Edit("optimizer offload", {"offload.optimizer": True}, summary, 1, slowdown))
    return edits
