"""
Rank 0 of many on one CPU: torch's own DDP, FSDP2 and DTensor over a process group that sends nothing, on meta tensors.

`fake_process_group` is for code of the user's, `rank_zero` for jobs. Streams are objects without a device that are told
apart: what is allocated under one is on the tape with its number, since the allocator keeps pools per stream.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from memplan.errors import TraceError
from memplan.job.spec import Job
from memplan.tracing.build import META
from memplan.tracing.recorder import Recorder
from memplan.tracing.replaced import replaced
from memplan.train.group import Group
from memplan.train.parallel import is_sharded


class _Event:
    """A moment on a stream; nothing here ever waits."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> _Event:
        return self

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Streams:
    """The streams of a device that is not there; `number` is that of the current one, 0 the default."""

    def __init__(self) -> None:
        streams = self
        self.count = 0
        self.current: list[Any] = []

        class Stream:
            """One stream."""

            device = META
            device_index = device_type = 0
            """Of CUDA's streams too; torch 2.15 hands them on (_fsdp_collectives.py, record_grad_output_stream)."""

            def __init__(self, *_: Any, **__: Any) -> None:
                self.number = self.stream_id = streams.count
                streams.count += 1

            def wait_stream(self, other: Any) -> None:
                pass

            def wait_event(self, event: Any) -> None:
                pass

            def record_event(self, event: Any = None) -> Any:
                return event or _Event()

            def synchronize(self) -> None:
                pass

            def query(self) -> bool:
                return True

            def __enter__(self) -> Any:
                streams.current.append(self)
                return self

            def __exit__(self, *_: object) -> None:
                streams.current.pop()

        self.type = Stream
        self.default = Stream()
        self.current.append(self.default)

    def number(self) -> int:
        return int(self.current[-1].number)

    def module(self) -> types.ModuleType:
        """What torch expects under `torch.<device type>`."""
        module: Any = types.ModuleType("torch.meta")
        module.Stream = self.type
        module.Event = _Event
        module.stream = lambda stream: contextlib.nullcontext() if stream is None else stream
        module.current_stream = lambda device=None: self.current[-1]
        module.default_stream = lambda device=None: self.default
        module.current_device = lambda: 0
        module.device_count = lambda: 1
        module.is_available = module.is_initialized = lambda: True
        module._is_in_bad_fork = lambda: False
        module.device = contextlib.nullcontext
        for name in ("set_device", "set_stream", "synchronize", "manual_seed_all"):
            setattr(module, name, lambda *_: None)
        return module


def is_distributed(job: Job) -> bool:
    """Whether the job's step calls torch.distributed."""
    return job.world_size > 1 or is_sharded(job)


def _nothing(*_: Any) -> None:
    pass


_groups: list[_Streams] = []
"""The streams of the fake process group, while there is one."""


def current_streams() -> _Streams | None:
    """Those of the fake process group; None outside of one."""
    return _groups[-1] if _groups else None


@contextlib.contextmanager
def fake_process_group(world_size: int) -> Iterator[None]:
    """
    Within, `torch.distributed` is rank 0 of `world_size` ranks that are not there, to shard models for `memplan.trace`.

    Collectives give tensors of the right shapes and send nothing. Devices named `cuda` are meta, also those of a
    `DeviceMesh`; without a mesh `fully_shard` shards over all ranks. Build the model in here under
    `torch.device("meta")`, shard it, and trace its step in here too. Rank 0 has the largest part of what does not
    divide.

    Raises:
        TraceError: `world_size` is below 1, or the process is in a process group already.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise TraceError(f"`world_size` is {world_size!r}", hint="give the number of ranks, 1 or more")
    if dist.is_initialized():
        raise TraceError(
            "this process is in a process group already, and a traced step is of ranks that are not there",
            hint="trace in a process of its own, or call `torch.distributed.destroy_process_group()` before",
        )
    from memplan.tracing.user_code import devices_are_meta

    mesh: Any = dist.DeviceMesh
    make = mesh.__init__

    def make_meta(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        make(self, META.type if device_type == "cuda" else device_type, *args, **kwargs)

    changes = [(mesh, "__init__", make_meta), *over_all_ranks(world_size)]
    with _fake_group(world_size), replaced(changes), devices_are_meta("cuda"):
        yield


def over_all_ranks(world_size: int) -> list[tuple[Any, str, Any]]:
    """What is to be replaced so that `fully_shard` without a mesh shards over this many meta devices."""

    def mesh(*_: Any, **__: Any) -> dist.DeviceMesh:
        return dist.init_device_mesh(META.type, (world_size,))

    changes: list[tuple[Any, str, Any]] = []
    for name in ("_fsdp_init", "_fully_shard"):
        module = importlib.import_module(f"torch.distributed.fsdp._fully_shard.{name}")
        for default in ("_init_default_mesh", "_init_default_fully_shard_mesh"):
            if hasattr(module, default):
                changes.append((module, default, mesh))
    return changes


@contextlib.contextmanager
def _fake_group(world_size: int) -> Iterator[_Streams]:
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    streams = _Streams()
    checked: Any = param_group.FSDPParamGroup
    propagator: Any = ShardingPropagator
    propagate = propagator._propagate_tensor_meta_non_cached

    def propagate_unseen(*args: Any, **kwargs: Any) -> Any:
        """Shapes of whole tensors, worked out on tensors that no device ever has."""
        with _disable_current_modes():
            return propagate(*args, **kwargs)

    changes: list[tuple[Any, str, Any]] = [
        (checked, "_validate_no_meta_params", _nothing),
        (checked, "_validate_cpu_offload_params", _nothing),
        (propagator, "_propagate_tensor_meta_non_cached", propagate_unseen),
        (torch.accelerator, "current_stream", lambda *_: streams.current[-1]),
    ]
    changes = [entry for entry in changes if hasattr(entry[0], entry[1])]
    torch.meta = sys.modules["torch.meta"] = streams.module()
    hook = sys.excepthook  # torch puts the rank in front of what the process says at its end
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    _groups.append(streams)
    try:
        with replaced(changes):
            yield streams
    finally:
        _groups.pop()
        dist.destroy_process_group()
        sys.excepthook = hook
        del torch.meta, sys.modules["torch.meta"]


@contextlib.contextmanager
def rank_zero(recorder: Recorder, job: Job) -> Iterator[Group]:
    """The group of the job's ranks as rank 0 sees it. What belongs to a stream is recorded with its number."""
    with _fake_group(job.world_size) as streams:
        recorder.stream = streams.number
        yield Group(world_size=job.world_size, device=META)


def finish_reductions(module: nn.Module) -> None:
    """DDP waits for a future that a group which sends nothing never gives: give it one that is done."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.register_comm_hook(None, _reduced)


def _reduced(_, bucket):  # torch checks the annotations
    future: Any = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
