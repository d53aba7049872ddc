"""
The processes of a run, one per device, and what they tell each other.

A run of one process has a group too, `ALONE`, in which nothing is sent.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from memplan.errors import RunError
from memplan.train.processes import STORE_DESCRIPTOR

_FAILURE, _EXPLAINED = "memplan/failures", "memplan/explained"
_POLL_SECONDS = 0.05
_LOST_PEER_TEXTS = (
    "gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError",
    "remote process exited", "store->get", "recvValue failed", "sendBytes failed",
)  # fmt: skip
"""What gloo, NCCL and the store say when another process is gone."""


@dataclass
class Group:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process prints, and writes what is written once."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def highest(self, value: int) -> int:
        """The highest of one number per rank, on every rank."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def collect(self, value: Any) -> list[Any]:
        """One small object of every rank, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def agree(self, error: str | None) -> str | None:
        """What went wrong on the first rank where something did, on every rank; waits for all of them."""
        return next((found for found in self.collect(error) if found is not None), None)

    def is_first_to_fail(self) -> bool:
        """
        Whether this process is the one to say why the run ends: the first to ask, of all of them.

        Where the store is out of reach, another process has failed before.
        """
        if self.store is None:
            return True
        try:
            return bool(self.store.add(_FAILURE, 1) == 1)
        except RuntimeError:
            return False

    def has_explained(self) -> None:
        """Why the run ends is said, by this process."""
        if self.store is not None:
            with suppress(RuntimeError):
                self.store.set(_EXPLAINED, "")

    def await_explanation(self) -> None:
        """
        Until the process that says why the run ends has done so, or has gone, and the store with it. Whoever leaves
        starts the time that the launcher gives to those that stay.
        """
        with suppress(RuntimeError):
            while self.store is not None and not self.store.check([_EXPLAINED]):
                time.sleep(_POLL_SECONDS)

    def leave(self) -> None:
        """Wait for the others and part; after this nothing can be sent. Nobody is missed who has gone already."""
        if not dist.is_initialized():
            return
        with suppress(RuntimeError):
            self.highest(0)
        dist.destroy_process_group()


ALONE = Group()
_has_joined = False
"""Whether torch made a process group for this process."""


def find_device(local_rank: int, local_world_size: int) -> torch.device:
    """
    The device of this process: the CUDA GPU of its own number, or the CPU where there is no GPU at all.

    Raises:
        RunError: there are GPUs, but fewer than processes.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return torch.device("cpu")
    if local_world_size > count:
        raise RunError(
            f"this job takes {local_world_size} GPUs on this machine, and torch sees {count}",
            hint="lower `parallel.dp_shard` and `parallel.dp_replicate`, or start it on more machines with torchrun",
        )
    return torch.device("cuda", local_rank)


def join(*, needs_group: bool = False) -> Group:
    """
    This process's group: as the environment says, or alone.

    On CUDA there is gloo beside NCCL: what is in host memory, offloaded gradients among it, is reduced there.

    Args:
        needs_group: make torch's process group for one process too, since sharding over one needs it.

    Raises:
        RunError: see `find_device`.
    """
    global _has_joined
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    _has_joined = _has_joined or needs_group or world_size > 1
    rank = int(os.environ.get("RANK", "0")) if world_size > 1 else 0
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if world_size > 1 else 0
    device = find_device(local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        if needs_group and not dist.is_initialized():
            dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)
        return Group(device=device)
    store = _store(rank, world_size)
    if store is None:
        dist.init_process_group(_backend(device), rank=rank, world_size=world_size)
        store = dist.distributed_c10d._get_default_store()
    else:
        dist.init_process_group(_backend(device), store=store, rank=rank, world_size=world_size)
    return Group(rank, world_size, local_rank, device, store)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _store(rank: int, world_size: int) -> dist.Store | None:
    """
    The store of processes that `memplan train` has started itself: rank 0 serves it on a socket that the launcher has
    bound, so that nobody else can take the port in between. None where somebody else has started them.
    """
    descriptor = os.environ.get(STORE_DESCRIPTOR)
    if descriptor is None:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening: dict[str, Any] = {"master_listen_fd": int(descriptor)} if rank == 0 else {}
    return dist.TCPStore(address, port, world_size, is_master=rank == 0, **listening)


def end_process(code: int) -> NoReturn:
    """
    End this process, and at once if torch made a process group for it. If others of it have gone, what waits for them
    would never end by itself. And a thread of gloo's that lets go of its last tensor while Python shuts down is ended
    by Python inside a destructor, which aborts a process that has done its work.
    """
    if not _has_joined:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another process of the group is gone."""
    if not isinstance(error, (RuntimeError, ConnectionError)):
        return False
    return isinstance(error, dist.DistNetworkError) or any(text in str(error) for text in _LOST_PEER_TEXTS)
