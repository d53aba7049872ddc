"""
The changes that a job can make to need less memory, as a lattice of independent dimensions
(`lattice.Dimension`).

Only what the job's method, loop and GPUs allow is offered, and only what differs from the job as it is. Tiers
0 to 3 keep the global batch. Here are tiers 0 (free), 2 (numerics) and 3 (data); `slower.py` has tier 1,
`capacity.py` tier 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from memplan.fit import costs
from memplan.fit.capacity import npt_layers, rank, target_modules
from memplan.fit.lattice import AS_IS, Dimension, Edit, dimension
from memplan.fit.slower import activations, micro_batch, states
from memplan.job.spec import Job
from memplan.model.architecture import Architecture, Outline
from memplan.tape.liger import FAMILIES as LIGER_FAMILIES
from memplan.tape.sharded.sharding import SHARDED
from memplan.tape.stored import agrees

SEQUENCE_FRACTIONS = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8)
SEQUENCE_MULTIPLE = 64
"""Shorter sequences are rounded down to a multiple of this."""


def candidate_edits(
    job: Job,
    architecture: Architecture | Outline,
    *,
    allow_capacity: bool = False,
    can_make: Callable[[Mapping[str, Any]], bool] | None = None,
) -> tuple[Dimension, ...]:
    """
    The lattice of changes of this job: every dimension has `options[0]` as is and at least one edit.

    Dimensions edit disjoint fields, so that any combination is one job. Those that save most come first: a
    search that tries to do without them is soon done. Tier 4 is part of it only with
    `allow_capacity`, and raises `JobError` where `npt.layers` names no blocks of this model; of a model of which an
    outline is known, only the rank takes part. `can_make` says of an edit whether whoever runs the job has it. How a
    checkpoint stores its weights stays as it is.
    """
    candidates = [
        states(job, architecture),
        base_weights(job),
        activations(job, architecture),
        sequence(job),
        micro_batch(job),
        loss(job, architecture),
        kbit_preparation(job),
        attention(job, architecture),
        adapter_dtype(job),
        npt_form(job),
        optimizer_kernel(job),
        allocator(job),
    ]
    if allow_capacity:
        candidates += [target_modules(job, architecture), rank(job), npt_layers(job, architecture)]
    if can_make is not None:
        candidates = [each.restricted(can_make) for each in candidates if each is not None]
    if architecture.stored is not None or job.has_gptq_base:
        keeps = partial(agrees, job, architecture.stored)
        candidates = [each.restricted(keeps) for each in candidates if each is not None]
    return tuple(candidate for candidate in candidates if candidate is not None)


def allocator(job: Job) -> Dimension | None:
    """
    Expandable segments without `max_split_size_mb`, which stops them from handing out large freed blocks
    again.
    """
    settings: dict[str, Any] = {}
    summary = "drop `max_split_size_mb`, which keeps expandable segments from reusing large blocks"
    if job.allocator.max_split_size_mb is not None:
        settings["allocator.max_split_size_mb"] = None
    if not job.allocator.expandable_segments:
        summary = "expandable segments" + (" instead of `max_split_size_mb`" if settings else "")
        settings["allocator.expandable_segments"] = True
    return dimension("allocator", [Edit("allocator", settings, summary)] if settings else [], chain=True)


def optimizer_kernel(job: Job) -> Dimension | None:
    """
    The fused step, which torch has for these two only (`torch/optim/adamw.py`, `sgd.py`). It counts steps on
    the GPU, a few bytes for every tensor, so it is not stated never to need more.
    """
    if job.optimizer_kernel == "fused" or job.optimizer not in ("adamw", "sgd"):
        return None
    summary = "fused optimizer step: no temporaries of the size of the states"
    return dimension("optimizer_kernel", [Edit("fused step", {"optimizer_kernel": "fused"}, summary)])


def attention(job: Job, architecture: Architecture | Outline) -> Dimension | None:
    """
    sdpa instead of eager. It keeps its output (length x head_dim) in another layout instead of the scores
    (length x length), which is less from lengths of head_dim on; that is stated where the shortest length
    offered is twice as long.
    """
    if job.attention != "eager" or architecture.attn_logit_softcapping is not None:
        return None
    if job.attention_kernel != "auto":  # which may not take the job's calls
        return None
    summary = "sdpa attention: the scores of all pairs of tokens are never held"
    is_ordered = job.max_seq_len * SEQUENCE_FRACTIONS[-1] >= 2 * architecture.head_dim
    return dimension("attention", [Edit("sdpa", {"attention": "sdpa"}, summary)], chain=is_ordered)


def loss(job: Job, architecture: Architecture | Outline) -> Dimension | None:
    """
    The losses that a loop can run: ours has both, transformers' Trainer has Liger's by a flag and the chunked
    one through TRL, and a script can have Liger's kernel patched in. Local NPT training has no logits.

    Both hold less than all logits, and where the head trains also its gradient from forward to backward, so
    with a frozen head only they are stated to need no more.
    """
    if job.loss_form() != "full" or job.method == "npt":
        return None
    summary = "chunked loss: the logits of all tokens are never held at once"
    chunked = Edit("chunked loss", {"loss": "chunked"}, summary)
    flag, settings = "", {"loss": "fused"}
    if job.loop == "hf_trainer":
        summary += " (takes TRL's SFTTrainer, 1.16 or later)"
        chunked = Edit("chunked loss", {"loss": "chunked"}, summary, slowdown=costs.TRL_CHUNKED_LOSS_SLOWDOWN)
        flag = " and `use_liger_kernel: true`"
        if architecture.family in LIGER_FAMILIES:  # the flag brings its other kernels too
            settings = {"kernels": "liger", "loss": "fused"}
    summary = f"fused loss: the logits are never held (takes the package liger-kernel{flag})"
    fused = Edit("fused loss", settings, summary, slowdown=costs.LIGER_LOSS_SLOWDOWN)
    is_frozen = job.method != "full" and not job.trained_tokens and not job.modules_to_save
    frozen_head = [(edit.name, AS_IS.name) for edit in (chunked, fused) if is_frozen]
    return dimension("loss", [fused] if job.loop == "script" else [chunked, fused], no_more_than=frozen_head)


def npt_form(job: Job) -> Dimension | None:
    """Factored instead of materialised."""
    if job.method != "npt" or job.npt.form == "factored":
        return None
    summary = "factored NPT: the weight delta of a token is never built"
    return dimension("npt.form", [Edit("factored NPT", {"npt.form": "factored"}, summary)], chain=True)


def base_weights(job: Job) -> Dimension | None:
    """
    Fewer bits for the base weights. 4 bits turn `lora` into `qlora` with the job's quantisation settings. From
    16 bits an 8-bit base is not offered: it takes more than a 4-bit one, and is the slower one of most models
    and batches that bitsandbytes has measured (benchmarking/README.md of 0.45, INT8+Decomp against NF4).

    Nothing is stated: bfloat16 weights under float32 adapters add casts, and 4-bit ones dequantised copies,
    which cost more than they save when the weights are on the host anyway.
    """
    edits = []
    four_bits = "nf4" if job.quantization.type == "int8" else job.quantization.type
    if job.dtype == "float32" and not job.has_quantized_base:
        settings: dict[str, Any] = {"dtype": "bfloat16"}
        if job.autocast is not None:
            settings["autocast"] = None
        what = "weights, gradients and optimizer states" if job.method == "full" else "base weights"
        edits.append(Edit("bfloat16 weights", settings, f"{what} in bfloat16", tier=2))
        if job.method == "lora" and job.lora.dtype == "float32":
            settings = {**settings, "lora.dtype": "bfloat16"}
            summary = f"{what} and adapters in bfloat16"
            edits.append(Edit("bfloat16 weights and adapters", settings, summary, tier=2, num_changes=2))
    if job.method == "lora":
        summary = f"4-bit base ({four_bits}): lora becomes qlora"
        settings = {"method": "qlora"}
        if four_bits != job.quantization.type:
            settings["quantization.type"] = four_bits
        if job.loop == "hf_trainer" and job.parallel.strategy in SHARDED:  # FSDP shards no bytes there
            settings["quantization.storage"] = job.autocast or job.dtype
        edits.append(Edit("4-bit base", settings, summary, 2, costs.FOUR_BIT_SLOWDOWN))
    if job.method == "npt" and not job.npt.quantized_base:
        summary = f"4-bit base ({job.quantization.type})"
        edits.append(Edit("4-bit base", {"npt.quantized_base": True}, summary, 2, costs.FOUR_BIT_SLOWDOWN))
    if job.has_8bit_base:
        summary = f"4-bit base ({four_bits}) instead of 8 bits"
        edits.append(Edit("4-bit base", {"quantization.type": four_bits}, summary, tier=2))
    elif job.has_quantized_base and not job.quantization.double_quant:
        summary = "quantise the quantisation constants too"
        settings = {"quantization.double_quant": True}
        edits.append(Edit("double quantisation", settings, summary, 2, costs.DOUBLE_QUANTISATION_SLOWDOWN))
    return dimension("base weights", edits)


def kbit_preparation(job: Job) -> Dimension | None:
    """
    Embeddings, head and norms in the job's dtype instead of the float32 that peft's preparation makes of
    them.
    """
    if job.method != "qlora" or not job.quantization.kbit_preparation or job.dtype == "float32":
        return None
    summary = f"leave embeddings, head and norms in {job.dtype}: no prepare_model_for_kbit_training"
    edit = Edit("no kbit preparation", {"quantization.kbit_preparation": False}, summary, tier=2)
    return dimension("kbit preparation", [edit])


def adapter_dtype(job: Job) -> Dimension | None:
    """
    Adapters in the bfloat16 of the base. On a float32 base they would add casts, and so they do where
    `kbit_preparation` leaves float32 norms.
    """
    if job.method not in ("lora", "qlora") or job.lora.dtype != "float32" or job.dtype != "bfloat16":
        return None
    summary = "adapters, their gradients and optimizer states in bfloat16"
    edit = Edit("bfloat16 adapters", {"lora.dtype": "bfloat16"}, summary, tier=2)
    return dimension("adapter dtype", [edit], chain=not job.quantization.kbit_preparation)


def sequence(job: Job) -> Dimension | None:
    """Shorter sequences, by `SEQUENCE_FRACTIONS` rounded down to `SEQUENCE_MULTIPLE`."""
    lengths = []
    for fraction in SEQUENCE_FRACTIONS:
        length = int(job.max_seq_len * fraction) // SEQUENCE_MULTIPLE * SEQUENCE_MULTIPLE
        if 0 < length < job.max_seq_len and length not in lengths:
            lengths.append(length)
    edits = [
        Edit(
            f"max_seq_len {length}",
            {"max_seq_len": length},
            f"sequences of {length} tokens instead of {job.max_seq_len} (longer samples are truncated)",
            tier=3,
            given_up=1 - length / job.max_seq_len,
        )
        for length in lengths
    ]
    return dimension("max_seq_len", edits, chain=True)
