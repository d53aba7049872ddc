"""What no single field can tell: whether the fields of a job agree, and which of them have no effect."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from memplan.job.problems import listed
from memplan.job.spec import Job
from memplan.units import parse_bytes

_UNSUPPORTED_DEGREES = {
    "tp": "tensor parallelism",
    "pp": "pipeline parallelism",
    "cp": "context parallelism",
    "ep": "expert parallelism",
}
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


class Conflict(NamedTuple):
    """Fields that cannot stand together, or one that cannot stand at all."""

    fields: tuple[str, ...]
    message: str
    hint: str


def check_job(job: Job) -> list[Conflict]:
    """Everything wrong between the fields of a job whose single values are in order."""
    checks = (
        _check_degrees,
        _check_strategy,
        _check_npt_layers,
        _check_lora,
        _check_allocator,
        _check_margin,
    )
    return [conflict for check in checks for conflict in check(job)]


def notes_on(job: Job, given: Collection[str]) -> tuple[str, ...]:
    """
    Sentences about settings that change nothing, for a job that is in order.

    Args:
        given: dotted fields that the user wrote; only those are worth a word.
    """
    notes: list[str] = []
    sections = {"lora": ("lora", "qlora"), "quantization": ("qlora",), "npt": ("npt",)}
    for section, methods in sections.items():
        idle = [name for name in given if name.startswith(f"{section}.")]
        if idle and job.method not in methods:
            has = "has" if len(idle) == 1 else "have"
            notes.append(
                f"{listed(idle, 'and')} {has} no effect with `method: {job.method}`; "
                f"only {listed(methods, 'and')} {'uses' if len(methods) == 1 else 'use'} `{section}`"
            )
    if job.autocast == job.dtype:
        notes.append(f"`autocast: {job.autocast}` changes nothing: the weights are {job.dtype} already")
    if job.activation_offload and job.activation_checkpointing == "none":
        notes.append("`activation_offload` has no effect without `activation_checkpointing`")
    if job.train.warmup_steps >= job.train.max_steps and job.train.warmup_steps > 0:
        notes.append(
            f"`train.warmup_steps` {job.train.warmup_steps} is not below `train.max_steps` "
            f"{job.train.max_steps}: the learning rate never reaches its peak"
        )
    return tuple(notes)


def _check_degrees(job: Job) -> Iterator[Conflict]:
    for name, technique in _UNSUPPORTED_DEGREES.items():
        degree = getattr(job.parallel, name)
        if degree != 1:
            yield Conflict(
                (f"parallel.{name}",),
                f"`parallel.{name}` is {degree}, and {technique} is not supported yet",
                f"set `parallel.{name}: 1`; `parallel.dp_shard` with `FULL_SHARD` spreads a model over GPUs",
            )


def _check_strategy(job: Job) -> Iterator[Conflict]:
    strategy, shard, replicate = job.parallel.strategy, job.parallel.dp_shard, job.parallel.dp_replicate
    if strategy == "NO_SHARD":
        if shard > 1:
            yield Conflict(
                ("parallel.strategy", "parallel.dp_shard"),
                f"`parallel.dp_shard` is {shard}, but `NO_SHARD` keeps a whole copy on every GPU",
                f"set `parallel.strategy: FULL_SHARD`, or `parallel.dp_replicate: {shard}` for DDP",
            )
    elif strategy == "HYBRID_SHARD":
        if shard == 1 or replicate == 1:
            yield Conflict(
                ("parallel.strategy", "parallel.dp_shard", "parallel.dp_replicate"),
                "`HYBRID_SHARD` needs `parallel.dp_shard` and `parallel.dp_replicate` above 1, "
                f"not {shard} and {replicate}",
                "set `parallel.strategy: FULL_SHARD` to shard only, or `NO_SHARD` to replicate only",
            )
    else:
        if shard == 1:
            yield Conflict(
                ("parallel.strategy", "parallel.dp_shard"),
                f"`{strategy}` has nothing to shard over: `parallel.dp_shard` is 1",
                "set `parallel.dp_shard` to the number of GPUs, or `parallel.strategy: NO_SHARD`",
            )
        if replicate > 1:
            yield Conflict(
                ("parallel.strategy", "parallel.dp_replicate"),
                f"`{strategy}` has no copies, but `parallel.dp_replicate` is {replicate}",
                "set `parallel.strategy: HYBRID_SHARD`, or `parallel.dp_replicate: 1`",
            )


def _check_npt_layers(job: Job) -> Iterator[Conflict]:
    layers = job.npt.layers
    if isinstance(layers, str):
        return
    reason = None
    if not layers:
        reason = "is an empty list"
    elif min(layers) < 0:
        reason = f"holds {min(layers)}, but blocks count from 0"
    elif len(set(layers)) < len(layers):
        repeated = next(layer for layer in layers if layers.count(layer) > 1)
        reason = f"names block {repeated} twice"
    if reason:
        hint = "list the blocks to convert once each, e.g. `npt: {layers: [16, 17]}`, or `upper_half`"
        yield Conflict(("npt.layers",), f"`npt.layers` {reason}", hint)


def _check_lora(job: Job) -> Iterator[Conflict]:
    modules = job.lora.target_modules
    if isinstance(modules, str):
        return
    reason = None
    if not modules:
        reason = "is an empty list"
    elif len(set(modules)) < len(modules):
        repeated = next(module for module in modules if modules.count(module) > 1)
        reason = f"names `{repeated}` twice"
    if reason:
        hint = "name the linear layers, e.g. `lora: {target_modules: [q_proj, v_proj]}`, or `all-linear`"
        yield Conflict(("lora.target_modules",), f"`lora.target_modules` {reason}", hint)


def _check_allocator(job: Job) -> Iterator[Conflict]:
    divisions = job.allocator.roundup_power2_divisions
    if divisions is not None and divisions & (divisions - 1):
        yield Conflict(
            ("allocator.roundup_power2_divisions",),
            f"`allocator.roundup_power2_divisions` is {divisions}, which is no power of two",
            "use 1, 2, 4, 8 or 16",
        )


def _check_margin(job: Job) -> Iterator[Conflict]:
    if job.margin is None:
        return
    percent = _PERCENT.fullmatch(job.margin)
    if percent is not None:
        valid = float(percent[1]) < 100
    else:
        size = parse_bytes(job.margin)
        valid = size == 0 or (size is not None and not job.margin.strip()[-1].isdigit())
    if not valid:
        yield Conflict(
            ("margin",),
            f"`margin` is `{job.margin}`, which is neither a share nor a size",
            "write e.g. `margin: 5%` (below 100%) or `margin: 1GiB`; null is the engine's own error band",
        )
