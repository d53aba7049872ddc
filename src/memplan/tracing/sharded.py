"""
Rank 0 of many on one CPU: torch's own DDP and FSDP2 over a process group that sends nothing, on meta tensors.

Streams are objects without a device that are told apart: what is allocated under one is on the tape with its number,
since the allocator keeps pools per stream.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from memplan.job.spec import Job
from memplan.tracing.build import META
from memplan.tracing.recorder import Recorder
from memplan.tracing.replaced import replaced
from memplan.train.group import Group
from memplan.train.parallel import Parallel, is_sharded


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

            def __init__(self, *_: Any, **__: Any) -> None:
                self.number = streams.count
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


@contextlib.contextmanager
def rank_zero(recorder: Recorder, job: Job) -> Iterator[Group]:
    """The group of the job's ranks as rank 0 sees it. What belongs to a stream is recorded with its number."""
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
    ]
    changes = [entry for entry in changes if hasattr(entry[0], entry[1])]
    torch.meta = sys.modules["torch.meta"] = streams.module()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=job.world_size)
    recorder.stream = streams.number
    try:
        with replaced(changes):
            yield Group(world_size=job.world_size, device=META)
    finally:
        dist.destroy_process_group()
        del torch.meta, sys.modules["torch.meta"]


def finish_reductions(parallel: Parallel) -> None:
    """DDP waits for a future that a group which sends nothing never gives: give it one that is done."""
    module = parallel.module
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.register_comm_hook(None, _reduced)


def _reduced(_, bucket):  # torch checks the annotations
    future: Any = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
