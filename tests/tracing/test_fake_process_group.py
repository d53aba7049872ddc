"""`memplan.fake_process_group`: models that the user has sharded, beside two processes of gloo that train them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import memplan
from memplan.errors import JobError, TraceError
from tracing import sharded_steps
from tracing.ranks import measured_peaks
from tracing.sharded_steps import CASES, WORLD_SIZE, make


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Peaks of rank 0, by case."""
    return measured_peaks(sharded_steps.__file__, tmp_path_factory.mktemp("ranks"), WORLD_SIZE)


def traced(name: str, device: str = "cpu", world_size: int = WORLD_SIZE) -> memplan.Trace:
    """One case on rank 0 of a fake group."""
    with memplan.fake_process_group(world_size):
        with torch.device("meta"):
            made = make(name)
        return memplan.trace(*made, device=device)


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_step_peaks_where_real_ranks_do(name: str, measured: dict[str, int]) -> None:
    """Within 0.1 %, checkpointed by operation too."""
    trace = traced(name)
    assert trace.peak_bytes == pytest.approx(measured[name], rel=0.001)
    assert trace.unknown_values == 0


def test_selective_checkpointing_lies_between(measured: dict[str, int]) -> None:
    assert measured["checkpointed"] < measured["selective"] < measured["whole"]


def test_ranks_share_what_is_held_between_steps() -> None:
    """Weights and states at the end of a step, less what does not divide and scalars of 4 bytes."""
    ends = {ranks: traced("whole", world_size=ranks).tape.flatten() for ranks in (2, 4)}
    held = {ranks: sum(tape.sizes[event] if event > 0 else -tape.sizes[-event] for event in tape.events)
            for ranks, tape in ends.items()}  # fmt: skip
    assert held[2] == pytest.approx(2 * held[4], rel=0.01)


def test_what_is_gathered_is_on_streams_of_its_own() -> None:
    tape = traced("whole", device="cuda").tape.flatten()
    assert 2 == len(set(tape.streams.values()))  # what is gathered, and what a reduction gives
    assert max(tape.sizes[storage] for storage in tape.streams) >= 4 * 9 * sharded_steps.WIDTH**2


def test_nothing_is_left_behind() -> None:
    """Neither a process group, nor gradients and states, nor the hook for what a process says at its end."""
    hook = sys.excepthook
    with memplan.fake_process_group(4):
        mesh = dist.init_device_mesh("cuda", (2, 2), mesh_dim_names=("replicate", "shard"))
        with torch.device("meta"):
            model = nn.Linear(8, 6)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)

        def step(batch: Tensor) -> None:
            model(batch).sum().backward()
            optimizer.step()

        trace = memplan.trace(step, model, optimizer, torch.zeros(4, 8, device="cuda"))
        assert mesh.device_type == "meta"
        assert [None, None] == [parameter.grad for parameter in model.parameters()]
        assert not optimizer.state
    assert trace.result.parameters is not None and 54 == trace.result.parameters.total
    assert not dist.is_initialized() and sys.excepthook is hook and not hasattr(torch, "meta")
    with pytest.raises(TraceError, match="`weight` is sharded over ranks"):
        memplan.trace(step, model, optimizer, torch.zeros(4, 8))


def test_a_group_that_is_there_is_left_alone(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(TraceError, match="in a process group already"), memplan.fake_process_group(2):
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [0, -1, 2.0, True])
def test_there_is_at_least_one_rank(world_size: Any) -> None:
    with pytest.raises(TraceError, match="`world_size` is"), memplan.fake_process_group(world_size):
        pass


def attended(backends: Any, **options: Any) -> str:
    """The note on what attention ran in a step that allows these kernels."""
    weight = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)

    def step(batch: Tensor) -> None:
        heads = weight(batch).view(1, 32, 2, 32).transpose(1, 2)
        with sdpa_kernel(backends, **options):
            F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()

    batch = torch.zeros(32, 64, dtype=torch.bfloat16)
    trace = memplan.trace(step, weight, None, batch, gpu="H100", steps=1)
    return next(note for note in trace.result.warnings if note.startswith("attention runs"))


def test_kernels_that_a_step_allows_are_those_that_run() -> None:
    """Hopper's first choice is cuDNN's where nobody says otherwise."""
    all_kernels = [
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ]
    assert "cudnn kernel, torch" in attended(all_kernels)
    assert "flash kernel, as `sdpa_kernel` says" in attended(SDPBackend.FLASH_ATTENTION)
    assert "efficient kernel, as `sdpa_kernel` says" in attended(all_kernels, set_priority=True)
    assert "math kernel, as `sdpa_kernel` says" in attended([SDPBackend.MATH])


def test_no_kernel_that_is_allowed_takes_the_call() -> None:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        heads = nn.Parameter(torch.zeros(1, 2, 8, 16))
        with pytest.raises(
            JobError, match="`sdpa_kernel` allows flash alone: flash takes float16 and bfloat16"
        ):
            memplan.trace(
                lambda _: F.scaled_dot_product_attention(heads, heads, heads).sum().backward(),
                nn.ParameterList([heads]),
                None,
                torch.zeros(1),
            )
