"""Whether the fields of a job that say what adapters train agree with the others."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.job.problems import Conflict, repeated_in
from memplan.job.spec import Job
from memplan.job.targets import ALL_LINEAR, matches


def check_targets(job: Job) -> Iterator[Conflict]:
    """`lora.target_modules` is a list of names, each once."""
    modules = job.lora.target_modules
    if isinstance(modules, str):
        return
    reason = None
    if not modules:
        reason = "is an empty list"
    elif (repeated := repeated_in(modules)) is not None:
        reason = f"names `{repeated}` twice"
    if reason:
        hint = "name the linear layers, e.g. `lora: {target_modules: [q_proj, v_proj]}`, or `all-linear`"
        yield Conflict(("lora.target_modules",), f"`lora.target_modules` {reason}", hint)


def check_special_tokens(job: Job) -> Iterator[Conflict]:
    """`data.special_tokens` are named once, and rows that train can."""
    tokens = job.data.special_tokens
    repeated = repeated_in(tokens)
    if repeated is not None:
        yield Conflict(
            ("data.special_tokens",),
            f"`data.special_tokens` names `{repeated}` twice",
            "name each token once",
        )
    if tokens and job.method == "npt":
        yield Conflict(
            ("data.special_tokens", "method"),
            "`data.special_tokens` would stay without a meaning: `method: npt` trains no embeddings",
            "leave them out, or set `method: lora` or `full`",
        )
    if not job.trained_tokens:
        return
    modules = job.lora.target_modules
    if modules != ALL_LINEAR and matches(modules, "lm_head"):
        yield Conflict(
            ("lora.target_modules", "data.special_tokens"),
            "`lm_head` cannot have an adapter and rows of `data.special_tokens` that train",
            "take `lm_head` out of `lora.target_modules`, or set `lora.train_tokens: false`",
        )
    if job.method == "qlora" and "lm_head" not in job.quantization.skip:
        yield Conflict(
            ("quantization.skip", "data.special_tokens"),
            "rows of `data.special_tokens` cannot train in a quantised head",
            "put `lm_head` into `quantization.skip`, or set `lora.train_tokens: false`",
        )


def check_copies(job: Job) -> Iterator[Conflict]:
    """`lora.modules_to_save` names modules once, and not where copies are not planned."""
    repeated = repeated_in(job.lora.modules_to_save)
    if repeated is not None:
        yield Conflict(
            ("lora.modules_to_save",),
            f"`lora.modules_to_save` names `{repeated}` twice",
            "name each module once, e.g. `lora: {modules_to_save: [embed_tokens, lm_head]}`",
        )
    parallel = job.parallel
    refused = {
        "parallel.strategy: ZERO_3": parallel.strategy == "ZERO_3",
        "parallel.fsdp_version: 1": parallel.fsdp_version == 1,
    }
    for setting, is_set in refused.items():
        if job.modules_to_save and is_set:
            yield Conflict(
                ("lora.modules_to_save", setting.partition(":")[0]),
                f"`lora.modules_to_save` is not planned with `{setting}`",
                "use FSDP2 (`parallel.strategy: FULL_SHARD`), or `parallel.strategy: ZERO_2`",
            )
