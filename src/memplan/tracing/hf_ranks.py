"""
accelerate on rank 0 of many: it takes the process group of `tracing.sharded` for one of GPUs, and wraps and shards the
model as it would there (accelerate/accelerator.py, prepare_model and _prepare_fsdp2; utils/fsdp_utils.py,
fsdp2_prepare_model).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from logging import getLogger
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from memplan.job.spec import Job
from memplan.tracing.build import META
from memplan.tracing.recorder import Recorder
from memplan.tracing.replaced import replaced
from memplan.tracing.sharded import over_all_ranks
from memplan.train.parallel import is_sharded, local_part


def arguments_of_ranks(job: Job) -> dict[str, Any]:
    """TrainingArguments that make accelerate wrap or shard a model as the job asks."""
    if not is_sharded(job):
        return {}
    parallel = job.parallel
    arguments: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {"reshard_after_forward": parallel.strategy != "SHARD_GRAD_OP"},
    }
    if parallel.dp_replicate > 1:
        from accelerate.parallelism_config import ParallelismConfig

        arguments["parallelism_config"] = ParallelismConfig(
            dp_replicate_size=parallel.dp_replicate, dp_shard_size=parallel.dp_shard
        )
    return arguments


@contextmanager
def accelerate_on_ranks(recorder: Recorder, job: Job) -> Iterator[None]:
    """Inside of `hf_loop.apart`, which puts the environment back."""
    from accelerate import Accelerator, data_loader
    from accelerate.state import DistributedType, PartialState
    from torch.distributed import fsdp
    from torch.nn.parallel import distributed

    os.environ["ACCELERATE_TORCH_DEVICE"] = META.type
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # DDP would look for the index of the device
    shard, prepare = fsdp.fully_shard, Accelerator._prepare_fsdp2
    initialising = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_init")

    def prepare_apart(accelerator: Any, *objects: Any) -> Any:
        """A model without 4-bit layers is in host memory until its units are sharded, also while it is cast."""
        for model in objects:
            if isinstance(model, nn.Module):
                _number(model)
        with nullcontext() if job.has_quantized_base else _disable_current_modes():
            return prepare(accelerator, *objects)

    def shard_recorded(module: Any, **options: Any) -> Any:
        first = module[0] if isinstance(module, list) else module
        place = recorder.places.of_module(first)
        with nullcontext() if job.has_quantized_base else recorder, recorder.places.at(place):
            return shard(module, **options)

    def arrive(parameters: list[Any], buffers: list[Any], _: Any) -> None:
        """A unit comes to the device whole, and its shards are cut from that."""
        for tensor in [*parameters, *buffers]:
            if recorder.is_new(tensor):
                tensor.data = torch.empty_like(tensor)

    changes: list[tuple[Any, str, Any]] = [
        (PartialState, "_prepare_backend", lambda *_, **__: ("fake", DistributedType.MULTI_GPU)),
        (distributed, "_verify_param_shape_across_processes", lambda *_, **__: None),
        (data_loader, "synchronize_rng_states", lambda *_, **__: None),
        (Accelerator, "_prepare_fsdp2", prepare_apart),
        (fsdp, "fully_shard", shard_recorded),
        (initialising, "_move_states_to_device", arrive),
        (getLogger("transformers.training_args"), "disabled", True),  # it advises on FSDP
        *over_all_ranks(job.world_size),
    ]
    with replaced(changes):
        yield


def _number(model: nn.Module) -> None:
    """accelerate tells parameters apart by their addresses, which meta tensors have not."""
    for number, parameter in enumerate(model.parameters(), 1):
        parameter.data_ptr = lambda number=number: number


def name_shards(recorder: Recorder, job: Job, model: nn.Module) -> None:
    """Say of which tensor each shard is."""
    for name, parameter in model.named_parameters():
        is_adapter = parameter.requires_grad and job.method != "full"
        category = "adapters" if is_adapter else "weights"
        recorder.name(local_part(parameter), category, name.removeprefix("base_model.model."))
