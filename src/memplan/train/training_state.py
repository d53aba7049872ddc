"""
What trains, and the optimizer's states of it, to a folder and back: each rank writes its own shards, and reads what it
needs of anybody's. The number of ranks and the strategy may differ between the two.

The files are those of torch.distributed.checkpoint. Only what trains is in them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor
from torch.futures import Future

from memplan.errors import RunError
from memplan.train.group import Group
from memplan.train.parallel import local_part

FOLDER = "state"
_WEIGHTS, _OPTIMIZER = "weights/", "optimizer/"
_SAMPLE = 32
"""Elements at either end of a tensor that stand for all of it."""
_SAMPLE_BYTES = 4 * _SAMPLE


def save_state(
    folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, group: Group
) -> None:
    """
    Write what trains into `folder`/state. Every rank calls it, with the same folder.

    Raises:
        OSError: a rank could not write its part; on every rank.
    """
    state: dict[str, Any] = {_WEIGHTS + name: parameter.detach() for name, parameter in trainable.items()}
    for name, parameter in trainable.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{_OPTIMIZER}{name}/{key}"] = value
    with _plain_errors():
        dcp.save(
            state,
            storage_writer=dcp.FileSystemWriter(folder / FOLDER, sync_files=False),
            no_dist=group.world_size == 1,
        )


def load_state(folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """
    Read weights and optimizer states back from `folder`/state, in place, one tensor after the other. Every rank reads
    what it needs by itself.

    Raises:
        RunError: the state is that of other weights.
    """
    reader = dcp.FileSystemReader(folder / FOLDER)
    saved = reader.read_metadata().state_dict_metadata
    weights = {name for name in saved if name.startswith(_WEIGHTS)}
    odd = weights.symmetric_difference(_WEIGHTS + name for name in trainable)
    if odd:
        raise RunError(
            f"`{folder}` holds the state of other weights: `{min(odd)[len(_WEIGHTS) :]}` does not match"
        )
    state: dict[str, Any] = {}
    for name, kind in saved.items():
        parameter = trainable[_parameter_of(name)]
        state[name] = parameter.detach() if name in weights else _like(kind, parameter)
    with _plain_errors():
        dcp.load(state, storage_reader=_OneByOne(folder / FOLDER), no_dist=True)
    _restore_optimizer(state, trainable, optimizer)


def largest_read_bytes(folder: Path) -> int:
    """Bytes of the largest tensor that reading `folder`/state brings into host memory: whole, or a rank's shard."""
    saved = dcp.FileSystemReader(folder / FOLDER).read_metadata().state_dict_metadata.values()
    return max(
        chunk.sizes.numel() * kind.properties.dtype.itemsize
        for kind in saved
        if isinstance(kind, TensorStorageMetadata)
        for chunk in kind.chunks
    )


class _OneByOne(dcp.FileSystemReader):
    """torch's reader keeps each tensor until it has read the next one."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        done: Future[None] = Future()
        for item in plan.items:
            super().read_data(replace(plan, items=[item]), planner).wait()
        done.set_result(None)
        return done


def _parameter_of(name: str) -> str:
    if name.startswith(_WEIGHTS):
        return name[len(_WEIGHTS) :]
    return name[len(_OPTIMIZER) :].rpartition("/")[0]


def _like(kind: Any, parameter: nn.Parameter) -> Any:
    """
    Something to read a saved value into: a tensor of a parameter's shape lies where the parameter does and is cut as it
    is, any other is whole on every rank.
    """
    if not isinstance(kind, TensorStorageMetadata):
        return None
    dtype = kind.properties.dtype
    if kind.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype)
    return torch.empty(kind.size, dtype=dtype)


def _restore_optimizer(
    state: Mapping[str, Any], trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    by_parameter: dict[str, dict[str, Any]] = {}
    for name, value in state.items():
        if name.startswith(_OPTIMIZER):
            by_parameter.setdefault(_parameter_of(name), {})[name.rpartition("/")[2]] = value
    names = {id(parameter): name for name, parameter in trainable.items()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    # Groups carry the choice of kernel, which may have changed since.
    groups = optimizer.state_dict()["param_groups"]
    states = {index: by_parameter[name] for index, name in enumerate(order) if name in by_parameter}
    optimizer.load_state_dict({"state": states, "param_groups": groups})


@contextmanager
def _plain_errors() -> Iterator[None]:
    """torch wraps what goes wrong on any rank into an exception that is no Exception; this takes it out again."""
    try:
        with warnings.catch_warnings():
            # That there is one process is no news to us.
            warnings.filterwarnings("ignore", message=".*torch.distributed is .*uninitialized.*")
            yield
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from None


def whole_on_first(tensor: Tensor, group: Group) -> Tensor | None:
    """
    All of a tensor in host memory on the first rank, None on the others. Every rank calls it for the same tensors in
    the same order.
    """
    whole = tensor.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.cpu() if group.is_first else None


def base_fingerprint(model: nn.Module, group: Group, num_shards: int = 1) -> str:
    """
    SHA-256 over names, shapes and a sample of every frozen parameter, which a checkpoint leaves out: the same however
    the model is cut. Every rank calls it.

    Args:
        num_shards: ranks that hold one copy of the model, the first ones of the group.
    """
    frozen = {name: tensor for name, tensor in model.named_parameters() if not tensor.requires_grad}
    mine = [_ends(tensor) for tensor in frozen.values()]
    parts = group.collect(mine)[:num_shards] if num_shards > 1 else [mine]
    digest = hashlib.sha256()
    for index, (name, tensor) in enumerate(frozen.items()):
        head = b"".join(part[index][0] for part in parts)[:_SAMPLE_BYTES]
        tail = b"".join(part[index][1] for part in parts)[-_SAMPLE_BYTES:]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(head + tail)
    return digest.hexdigest()


def _ends(tensor: Tensor) -> tuple[bytes, bytes]:
    """
    First and last elements of this rank's part, as float32. Cut along the first dimension, parts follow one another.
    """
    flat = local_part(tensor).flatten()
    head, tail = (part.float().cpu().numpy().tobytes() for part in (flat[:_SAMPLE], flat[-_SAMPLE:]))
    return head, tail
