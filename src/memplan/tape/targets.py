"""Which layers of a model get a low-rank adapter, as peft chooses them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from memplan.errors import JobError
from memplan.job.problems import listed, shorten
from memplan.job.spec import Job
from memplan.job.targets import ALL_LINEAR, is_by_block, is_pattern, matches
from memplan.model.architecture import Architecture
from memplan.model.families import layout
from memplan.model.families.layout import Module
from memplan.tape.packing import packs
from memplan.tape.sharded.sharding import SHARDED

_ACTIVATIONS = {
    "gpt2": "mlp.act", "gpt_neox": "mlp.act", "gpt_bigcode": "mlp.act", "falcon": "mlp.act",
    "phi3": "mlp.activation_fn", "bert": "intermediate.intermediate_act_fn",
}  # fmt: skip
"""Modules of a block that layouts leave out, having no parameters; `mlp.act_fn` in other families."""


def targets(job: Job, module: str) -> bool:
    """Whether a linear layer gets an adapter, by its full name, as peft matches it; any one with `all-linear`."""
    if job.method not in ("lora", "qlora"):
        return False
    wanted = job.lora.target_modules
    return wanted == ALL_LINEAR or matches(wanted, module)


def named(job: Job) -> tuple[str, ...]:
    """The names in `lora.target_modules`; none for `all-linear` and for a pattern."""
    wanted = job.lora.target_modules
    if isinstance(wanted, str):
        return () if wanted == ALL_LINEAR or is_pattern(wanted) else (wanted,)
    return wanted


def pattern(job: Job) -> str | None:
    """The pattern that `lora.target_modules` is, if it is one."""
    wanted = job.lora.target_modules
    return wanted if isinstance(wanted, str) and is_pattern(wanted) else None


def adaptable(architecture: Architecture) -> list[str]:
    """Full names of the layers that can get an adapter: those of every block, and those behind the blocks."""
    modules = layout(architecture)
    in_block = [
        path
        for module in modules.block
        for path in ((module.name,) if module.role == "linear" else module.adapter_names)
    ]
    names = [
        f"{modules.block_prefix}.{layer}.{path}"
        for layer in range(architecture.num_hidden_layers)
        for path in in_block
    ]
    return [*names, *(module.name for module in modules.after if module.role in ("linear", "head"))]


def targets_by_block(job: Job, architecture: Architecture) -> list[tuple[str, ...]] | None:
    """
    The linear layers that get an adapter, relative to their block, for each block; None where all blocks have the same.
    """
    if job.method not in ("lora", "qlora") or not is_by_block(job.lora.target_modules):
        return None
    modules = layout(architecture)
    blocks = [
        tuple(
            module.name
            for module in modules.block
            if module.role == "linear" and targets(job, f"{modules.block_prefix}.{layer}.{module.name}")
        )
        for layer in range(architecture.num_hidden_layers)
    ]
    return blocks if len(set(blocks)) > 1 else None


def check_targets(job: Job, architecture: Architecture) -> None:
    """
    Raises JobError where `lora.target_modules` names what a plan does not give adapters: no layer of the model, its
    embeddings, modules that are no linear layers, or experts of one block.
    """
    if job.method not in ("lora", "qlora"):
        return
    modules = layout(architecture)
    head = modules.after[-1].name
    is_tied = architecture.tie_word_embeddings
    check_copies(
        job, modules.before[0].name, head, is_tied=is_tied, is_packed=packs(job, head) and not is_tied
    )
    if job.lora.target_modules == ALL_LINEAR:
        return
    for module in modules.before:
        if module.role == "embedding" and targets(job, module.name):
            raise JobError(
                f"`lora.target_modules` names `{module.name}`, and adapters on embeddings are not planned",
                hint="take it out, or plan it with `--engine trace`, which runs peft",
            )
    names = adaptable(architecture)
    if is_by_block(job.lora.target_modules):
        _check_by_block(job, architecture, names)
    if not any(targets(job, name) for name in names):
        raise nothing_targeted(job, names)


def _check_by_block(job: Job, architecture: Architecture, names: Sequence[str]) -> None:
    """What peft refuses to adapt, and what it makes of experts, whose old names it looks up by their last parts."""
    modules = layout(architecture)
    if any(module.adapter_names for module in modules.block):
        raise JobError(
            "a pattern of `lora.target_modules` and names of one block's layers are not planned by shape where peft "
            f"looks up names of experts, as in `{job.model}`",
            hint="plan it with `--engine trace`, which runs peft, or list last parts of names: `[q_proj, v_proj]`",
        )
    block = {module.name for module in modules.block if module.role not in ("linear", "bias")}
    for name in (module.name for module in modules.block):
        parts = name.split(".")
        block |= {".".join(parts[:end]) for end in range(1, len(parts))}
    block.add(_ACTIVATIONS.get(architecture.family, "mlp.act_fn"))
    others = [module.name for module in modules.after if module.role == "norm"]
    for layer in range(architecture.num_hidden_layers):
        prefix = f"{modules.block_prefix}.{layer}"
        others += [prefix, *(f"{prefix}.{name}" for name in sorted(block))]
    unfit = next((name for name in others if name not in names and targets(job, name)), None)
    if unfit is not None:
        raise JobError(
            f"`lora.target_modules` also matches `{unfit}`, which is no linear layer, and peft refuses that",
            hint="end it with names of linear layers, as in `.*\\.(q_proj|v_proj)`",
        )


def nothing_targeted(job: Job, paths: Iterable[str]) -> JobError:
    """What to say where no name fits a layer; `paths` are the full names of the model's layers."""
    import difflib

    paths = list(paths)
    wanted = named(job)
    if not wanted:
        return JobError(
            f"`lora.target_modules` is the pattern `{shorten(job.lora.target_modules)}`, which matches no layer of "
            f"`{job.model}` as it is planned",
            hint=f"it has to match a whole name, such as `{next(iter(paths), 'q_proj')}`",
        )
    names = list(dict.fromkeys(path.split(".")[-1] for path in paths))
    close = dict.fromkeys(
        match
        for name in wanted
        for match in difflib.get_close_matches(name.split(".")[-1], names, n=1, cutoff=0.6)
    )
    have = f"`{job.model}` has {listed(names, 'and')}"
    return JobError(
        f"`lora.target_modules` is {listed(wanted, 'and')}, which no layer of the model is called",
        hint=f"did you mean {listed(list(close), 'and')}? {have}"
        if close
        else f"{have}; or use `all-linear`",
    )


def copies(job: Job, path: str) -> bool:
    """Whether `lora.modules_to_save` names a module outside the blocks: the input embeddings or the head."""
    return matches(job.modules_to_save, path)


def check_copies(job: Job, embedding: str, head: str, *, is_tied: bool, is_packed: bool) -> None:
    """
    Args:
        embedding: path of the model's input embeddings; `head`: of its head.
        is_tied: they have one weight; `is_packed`: the head is in 4 bits.

    Raises:
        JobError: `lora.modules_to_save` names something else, a head that has an adapter too, one in 4 bits, or a tied
            one that accelerate shards.
    """
    outside = (embedding, head)
    for name in job.modules_to_save:
        if not any(matches((name,), path) for path in outside):
            names = listed([path.split(".")[-1] for path in outside], "and")
            raise JobError(
                f"`lora.modules_to_save` names `{name}`, and whole copies are planned of the input embeddings and the "
                f"head alone, in `{job.model}` {names}",
                hint=f"name those, or trace a step of your own with `memplan.trace` in Python: `{name}` trains there",
            )
    if job.modules_to_save and is_tied and job.loop == "hf_trainer" and job.parallel.strategy in SHARDED:
        # What is copied stays tied, in two modules of which accelerate makes units (fsdp_utils.py), and torch raises
        # ValueError for a parameter in two units.
        raise JobError(
            f"`lora.modules_to_save` does not run with `{job.parallel.strategy}` in transformers' Trainer where the "
            f"head is tied to the embeddings, as in `{job.model}`: FSDP2 refuses a weight that is in two of its units",
            hint="train rows of new tokens with `data.special_tokens`, or use `--set parallel.strategy=NO_SHARD`",
        )
    if not copies(job, head):
        return
    if job.lora.target_modules != ALL_LINEAR and targets(job, head):
        raise JobError(
            f"`{head}` cannot have an adapter and be trained whole",
            hint="take it out of `lora.target_modules` or out of `lora.modules_to_save`",
        )
    if is_packed:
        raise JobError(
            f"`{head}` is quantised, of which no copy can train",
            hint=f"put `{head.split('.')[-1]}` into `quantization.skip`, or take it out of `lora.modules_to_save`",
        )


def unused_names(job: Job, architecture: Architecture) -> tuple[str, ...]:
    """Names in `lora.target_modules` that no layer has, beside some that one has; peft passes over them."""
    if job.method not in ("lora", "qlora"):
        return ()
    paths = adaptable(architecture)
    return tuple(name for name in named(job) if not any(matches((name,), path) for path in paths))


def targets_stack(job: Job, module: Module) -> bool:
    """
    Whether a router or stacked experts get an adapter: where the linear layers are targeted whose place they took.

    Raises JobError for what peft refuses: a part of layers that are one parameter now, and dropout.
    """
    wanted = [targets(job, name) for name in module.adapter_names]
    if not any(wanted):
        return False
    names = " and ".join(f"`{name}`" for name in module.adapter_names)
    if not all(wanted):
        raise JobError(
            f"`lora.target_modules` names a part of {names}, which are one parameter in transformers 5",
            hint="name all of them or none",
        )
    if job.lora.dropout:
        raise JobError(
            f"`lora.dropout: {job.lora.dropout}` does not work with adapters on routers and experts ({names})",
            hint="use `--set lora.dropout=0`, or name the attention's layers in `lora.target_modules`",
        )
    return True


def stack_adapter_shapes(job: Job, module: Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B for a router (out, in) or for experts (E, out, in)."""
    *experts, out_features, in_features = module.shape
    rank = job.lora.rank * len(module.adapter_names) * prod(experts)
    return (rank, in_features), (out_features, rank)
