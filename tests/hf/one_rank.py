"""A Trainer as `accelerate launch` starts it on one of several ranks, up to where FSDP begins to cut the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from accelerate.utils import fsdp_utils
from peft import get_peft_model
from torch.distributed.fsdp.fully_sharded_data_parallel import FullyShardedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from hf.callback_ranks import launched
from hf.own_memory import own_bytes
from hf.tiny_trainers import lora, trainer
from memplan.tracing.hf_loop import apart


class Prepared(Exception):
    """The model has been loaded and cast, and nothing of it has been moved or cut."""


@contextmanager
def _rank(rank: int, world_size: int) -> Iterator[None]:
    """Of a process group whose other ranks are not there."""
    with apart():
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "ACCELERATE_BYPASS_DEVICE_MAP": "true", "ACCELERATE_TORCH_DEVICE": "cpu",
        }  # fmt: skip
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()


def loaded_bytes(
    saved: Path,
    folder: Path,
    rank: int,
    world_size: int,
    *,
    dtype: str,
    version: int,
    efficient: bool,
    adapts: bool,
) -> int:
    """
    What a rank has of a model in memory of its own when it is to be cut, after `from_pretrained` and all casts.

    Args:
        version: `fsdp_version`.
        efficient: `fsdp_cpu_ram_efficient_loading`.
        adapts: the model gets adapters.
    """
    found: list[int] = []

    def measure(tensors: Any) -> None:
        found.append(own_bytes(tensors))
        raise Prepared

    with ExitStack() as stack:
        stack.enter_context(_rank(rank, world_size))
        os.environ |= launched(folder, fsdp_version=version)
        # The launcher has `fsdp_sync_module_states` beside it, which is FSDP1's and needs a GPU.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(efficient).lower()
        model = AutoModelForCausalLM.from_pretrained(saved, dtype=getattr(torch, dtype))
        if adapts:
            model = get_peft_model(model, lora())
        whole = lambda *_, **__: measure(model.state_dict().values())  # noqa: E731
        send = lambda _, __, tensors, **___: measure(tensors.values())  # noqa: E731
        as_gpus: Any = lambda *_, **__: ("fake", DistributedType.MULTI_GPU)  # noqa: E731
        stack.enter_context(patch.object(PartialState, "_prepare_backend", as_gpus))
        stack.enter_context(patch.object(FullyShardedDataParallel, "__init__", whole))
        if efficient:
            stack.enter_context(patch.object(fsdp_utils, "fsdp2_load_full_state_dict", send))
        else:
            stack.enter_context(patch.object(fsdp_utils, "fsdp2_prepare_auto_wrap_policy", whole))
        run = trainer(folder, model)
        with suppress(Prepared):
            run.train()
    (num_bytes,) = found
    return num_bytes
