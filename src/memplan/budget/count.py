"""Parameters of a job: in the model, trained, and used per token."""

from __future__ import annotations

from math import prod

from memplan.budget.result import ParameterCount
from memplan.job.spec import Job
from memplan.job.targets import is_by_block
from memplan.model.architecture import Architecture
from memplan.model.families import layout
from memplan.model.tensors import num_parameters
from memplan.npt.layers import modulator_shapes
from memplan.tape.parts import block_linears
from memplan.tape.shape import npt_layers
from memplan.tape.targets import copies, stack_adapter_shapes, targets, targets_stack


def count_parameters(job: Job, architecture: Architecture) -> ParameterCount:
    """
    Of the whole model with what the method adds, over all ranks. Active are those that a token is computed with: of
    experts the chosen ones.
    """
    base = num_parameters(architecture)
    idle = _in_idle_experts(architecture)
    if job.method == "full":
        return ParameterCount(total=base, trainable=base, active=base - idle)
    added = _added(job, architecture)
    return ParameterCount(total=base + added, trainable=added, active=base + added - idle)


def _in_idle_experts(architecture: Architecture) -> int:
    """Weights of the experts that a token is not sent to; their share of the adapters counts as active."""
    if not architecture.num_experts:
        return 0
    stacked = sum(prod(module.shape) for module in layout(architecture).block if module.role == "experts")
    idle = architecture.num_experts - architecture.experts_per_token
    return architecture.num_hidden_layers * stacked * idle // architecture.num_experts


def count_copies(job: Job, architecture: Architecture) -> int:
    """Elements of the whole copies that `lora.modules_to_save` trains."""
    modules = layout(architecture)
    tokens, head = modules.before[0], modules.after[-1]
    embedding = prod(tokens.shape) if copies(job, tokens.name) else 0
    if not copies(job, head.name):
        return embedding
    return embedding + prod(head.shape) + (head.shape[0] if head.bias or modules.head_bias else 0)


def _added(job: Job, architecture: Architecture) -> int:
    if job.method == "npt":
        d, f = architecture.hidden_size, architecture.intermediate_size
        shapes = modulator_shapes(job.npt, d, f, is_gated=architecture.family != "gpt2").values()
        return len(npt_layers(job, architecture)) * sum(map(prod, shapes))
    prefix, num_layers = layout(architecture).block_prefix, architecture.num_hidden_layers
    is_alike = not is_by_block(job.lora.target_modules)
    in_blocks = (num_layers if is_alike else 1) * sum(
        job.lora.rank * (linear.in_features + linear.out_features)
        for layer in range(1 if is_alike else num_layers)
        for linear in block_linears(architecture)
        if targets(job, f"{prefix}.{layer}.{linear.path}")
    )
    in_blocks += num_layers * sum(
        prod(shape)
        for module in layout(architecture).block
        if module.adapter_names and targets_stack(job, module)
        for shape in stack_adapter_shapes(job, module)
    )
    head = job.trained_tokens * architecture.hidden_size * (1 if architecture.tie_word_embeddings else 2)
    head += count_copies(job, architecture)
    for module in layout(architecture).after:
        is_head = module.role == "head" and job.lora.target_modules != "all-linear"
        if (is_head or module.role == "linear") and targets(job, module.name):
            head += job.lora.rank * sum(module.shape)
    return in_blocks + head
