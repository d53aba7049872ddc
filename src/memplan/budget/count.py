"""Parameters of a job: in the model, trained, and used per token."""

from __future__ import annotations

from memplan.budget.result import ParameterCount
from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.model.tensors import num_parameters
from memplan.tape.model import block_linears, targets
from memplan.tape.shape import npt_layers


def count_parameters(job: Job, architecture: Architecture) -> ParameterCount:
    """Of the whole model with what the method adds, over all ranks."""
    base = num_parameters(architecture)
    if job.method == "full":
        return ParameterCount(total=base, trainable=base, active=base)
    added = _added(job, architecture)
    return ParameterCount(total=base + added, trainable=added, active=base + added)


def _added(job: Job, architecture: Architecture) -> int:
    if job.method == "npt":
        width = architecture.hidden_size + architecture.intermediate_size
        return len(npt_layers(job, architecture)) * job.npt.rank * width
    per_block = sum(
        job.lora.rank * (linear.in_features + linear.out_features)
        for linear in block_linears(architecture)
        if targets(job, linear.path)
    )
    head = 0
    if job.lora.target_modules != "all-linear" and targets(job, "lm_head"):
        head = job.lora.rank * (architecture.hidden_size + architecture.vocab_size)
    return per_block * architecture.num_hidden_layers + head
