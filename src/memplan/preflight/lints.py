"""
Lints: what in a job or its environment costs memory or fails, said only where it is certain.

Settings without effect are the job reader's to say, which knows what the user wrote.

Each rule is a function of a `Subject` that yields `Lint`s; `RULES` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from memplan.job.spec import DTYPE_BYTES, Job
from memplan.model.architecture import Architecture
from memplan.preflight.environment import (
    VARIABLES,
    allocator_string,
    parse_settings,
    readable_variables,
    same_settings,
    variable_in_force,
)
from memplan.tape.backends import beyond_plans
from memplan.units import format_bytes

_LONG_SEQUENCE = 1024
"""From here on eager attention's scores are worth a word: they grow with the square of the length."""


@dataclass(frozen=True)
class Lint:
    """One finding: a stable code, a sentence, and what to do about it."""

    code: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy} [{self.code}]"


class Subject(NamedTuple):
    """
    What is linted: the job, its architecture where it is known, and the environment that it would run in.
    """

    job: Job
    architecture: Architecture | None = None
    environ: Mapping[str, str] = MappingProxyType({})
    torch_version: str | None = None
    platform: str = "linux"


Rule = Callable[[Subject], Iterator[Lint]]


def lint(subject: Subject) -> tuple[Lint, ...]:
    """All findings, in the order of the rules."""
    return tuple(finding for rule in RULES for finding in rule(subject))


def lint_settings(text: str, source: str) -> Iterator[Lint]:
    """Findings about one allocator string; `source` is what a person calls the place it came from."""
    settings = parse_settings(text)
    expandable = settings.get("expandable_segments")
    if expandable not in (None, "True", "False"):
        yield Lint(
            "allocator-value",
            f"{source} says `expandable_segments:{expandable}`, which torch refuses",
            "write exactly `True` or `False`",
        )
    if expandable != "True":
        return
    if "max_split_size_mb" in settings:
        # `get_free_block` and `should_split` of c10/cuda/CUDACachingAllocator.cpp disagree for expandable
        # segments: a freed block above the limit is split, but never handed out for a large request again.
        yield Lint(
            "split-with-expandable",
            f"{source} combines `max_split_size_mb` and `expandable_segments`: reserved memory then grows",
            "drop `max_split_size_mb`",
        )
    if "garbage_collection_threshold" in settings:
        yield Lint(
            "collection-with-expandable",
            f"{source} sets `garbage_collection_threshold`, which passes over expandable segments",
            "drop it",
        )


def _allocator(subject: Subject) -> Iterator[Lint]:
    yield from lint_settings(allocator_string(subject.job, subject.platform), "the job's `allocator`")
    in_force = variable_in_force(subject.environ, subject.torch_version)
    if in_force is not None:
        yield from lint_settings(subject.environ[in_force], f"`{in_force}`")


def _environment(subject: Subject) -> Iterator[Lint]:
    environ = subject.environ
    readable = readable_variables(subject.torch_version)
    in_force = variable_in_force(environ, subject.torch_version)
    for name in VARIABLES:
        if not environ.get(name):
            continue
        if name not in readable:
            yield Lint(
                "ignored-variable",
                f"torch {subject.torch_version} ignores `{name}`",
                f"set `{readable[0]}` instead",
            )
        elif (
            in_force is not None and name != in_force and not same_settings(environ[name], environ[in_force])
        ):
            yield Lint(
                "conflicting-variables",
                f"`{name}` and `{in_force}` are both set and differ, and `{in_force}` wins",
                f"unset `{name}`",
            )
    assumed = allocator_string(subject.job, subject.platform)
    if in_force is not None and not same_settings(environ[in_force], assumed):
        yield Lint(
            "allocator-differs",
            f"the plan assumes `{assumed or 'the defaults'}`, but `{in_force}={environ[in_force]}` is set",
            f"unset `{in_force}` or change the job's `allocator`",
        )
    if subject.job.allocator.expandable_segments and subject.platform in ("win32", "wsl"):
        system = "Windows" if subject.platform == "win32" else "WSL"
        yield Lint(
            "expandable-unsupported",
            f"expandable segments do not exist on {system}, and the plan assumes them",
            "set `allocator.expandable_segments: false`",
        )
    if environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        yield Lint(
            "caching-off",
            "`PYTORCH_NO_CUDA_MEMORY_CACHING` turns the caching allocator off: slow, and not what is planned",
            "unset it",
        )
    beyond = beyond_plans(subject.torch_version)
    if beyond is not None:
        yield Lint(
            "later-torch",
            f"torch {subject.torch_version} is installed, {beyond}",
            "see docs/tracing.md, Versions",
        )
    if environ.get("CUDA_MODULE_LOADING", "").upper() == "EAGER":
        # torch 2.1.1 on an A100: stas00/ml-engineering
        yield Lint(
            "eager-kernels",
            "`CUDA_MODULE_LOADING=EAGER` loads every kernel of torch at the start: 942 MiB outside the allocator on an "
            "A100 instead of 482",
            "unset it: kernels are then loaded when they are first used",
        )


def _precision(subject: Subject) -> Iterator[Lint]:
    job = subject.job
    if job.method == "full" and job.dtype == "float16":
        yield Lint(
            "float16-weights",
            "trained float16 weights have float16 gradients, which torch's GradScaler refuses to unscale",
            "use `dtype: bfloat16`, or `dtype: float32` with `autocast: float16`",
        )
    elif "float16" in (job.autocast, job.dtype):
        yield Lint(
            "float16-scaling",
            "float16 gradients underflow without loss scaling",
            "prefer bfloat16 on GPUs that have it (compute capability 8.0 and above)",
        )


def _attention(subject: Subject) -> Iterator[Lint]:
    job, architecture = subject.job, subject.architecture
    if job.attention != "eager" or job.max_seq_len < _LONG_SEQUENCE:
        return
    size = ""
    if architecture is not None:
        # transformers' eager_attention_forward takes the softmax in float32.
        num_bytes = job.micro_batch_size * architecture.num_attention_heads * job.max_seq_len**2 * 4
        size = f", {format_bytes(num_bytes)} for one softmax in one block"
        if architecture.attn_logit_softcapping is not None:
            return  # the model's attention has no other implementation that trains without the flash-attn package
    yield Lint(
        "eager-attention",
        f"eager attention holds scores of {job.max_seq_len} x {job.max_seq_len} for every head{size}",
        "use `attention: sdpa`, same numbers up to rounding",
    )


def _adapters(subject: Subject) -> Iterator[Lint]:
    job = subject.job
    if (
        job.method in ("lora", "qlora")
        and job.activation_checkpointing == "none"
        and job.lora.dtype == "float32"
        and DTYPE_BYTES[job.dtype] == 2
        and job.autocast is None
    ):
        yield Lint(
            "adapter-upcast",
            f"float32 adapters on a {job.dtype} base keep a float32 copy of the input of every adapted layer",
            f"use `lora.dtype: {job.dtype}` or `autocast: {job.dtype}`, which change numerics",
        )


def _quantization(subject: Subject) -> Iterator[Lint]:
    job, architecture = subject.job, subject.architecture
    if job.method != "qlora" or not job.quantization.kbit_preparation or DTYPE_BYTES[job.dtype] == 4:
        return
    size = ""
    if architecture is not None:
        from memplan.model import parameters

        kept = [
            parameter
            for parameter in parameters(architecture)
            if parameter.role != "linear" or any(name in parameter.name for name in job.quantization.skip)
        ]
        extra_bytes = sum(parameter.num_elements for parameter in kept) * (4 - DTYPE_BYTES[job.dtype])
        size = f", {format_bytes(extra_bytes)} more"
    yield Lint(
        "kbit-upcast",
        f"`quantization.kbit_preparation` makes embeddings, head and norms float32{size}",
        "set it to false unless you need it for its numerics",
    )


def _optimizer(subject: Subject) -> Iterator[Lint]:
    job = subject.job
    if job.optimizer.startswith("paged_"):
        yield Lint(
            "paged-outside-torch",
            f"the states of `{job.optimizer}` are CUDA managed memory, outside torch's allocator: "
            "on the card or in RAM as the driver sees fit",
            "keep room in RAM for them, and expect slower steps when the card is full",
        )
    if job.optimizer.endswith(("_8bit", "_4bit", "_fp8")) and job.optimizer_kernel == "foreach":
        yield Lint(
            "kernel-unused",
            f"`optimizer_kernel: foreach` does nothing for `{job.optimizer}`, which has a kernel of its own",
            "drop it",
        )


def _loop(subject: Subject) -> Iterator[Lint]:
    job, architecture = subject.job, subject.architecture
    if job.loop != "script" or job.loss_form() != "full":
        return
    size = ""
    if architecture is not None:
        itemsize = DTYPE_BYTES[job.autocast or job.dtype]
        num_bytes = job.micro_batch_size * job.max_seq_len * architecture.vocab_size * itemsize
        size = f" ({format_bytes(num_bytes)})"
    yield Lint(
        "logits-held",
        f"`loop: script` keeps the model's output, and with it the logits{size}, alive through backward",
        "write `loss = model(**batch).loss` and keep no other reference, or use `loop: memplan`",
    )


def _length(subject: Subject) -> Iterator[Lint]:
    job, architecture = subject.job, subject.architecture
    if architecture is None or job.max_seq_len <= architecture.max_position_embeddings:
        return
    longest = architecture.max_position_embeddings
    effect = (
        "positions beyond fail, as they are looked up in a table"
        if architecture.family in ("gpt2", "bert")
        else "positions beyond were never trained"
    )
    yield Lint(
        "beyond-positions",
        f"`max_seq_len` {job.max_seq_len} is above the model's {longest}: {effect}",
        f"set `max_seq_len: {longest}` or less",
    )


def _loading(subject: Subject) -> Iterator[Lint]:
    job = subject.job
    if not job.load.ram_efficient and job.loop == "memplan" and job.world_size > 1:
        yield Lint(
            "ram-per-rank",
            f"each of {job.world_size} ranks builds the whole model in RAM before it is sharded",
            "set `load.ram_efficient: true`",
        )


def _npt(subject: Subject) -> Iterator[Lint]:
    job = subject.job
    if job.method == "npt" and job.npt.form == "materialised":
        yield Lint(
            "npt-materialised",
            "`npt.form: materialised` builds a weight delta for every token",
            "use `npt.form: factored`, same numbers up to rounding",
        )


RULES: tuple[Rule, ...] = (
    _allocator, _environment, _precision, _attention, _adapters, _quantization, _optimizer, _loop, _length,
    _loading, _npt,
)  # fmt: skip
