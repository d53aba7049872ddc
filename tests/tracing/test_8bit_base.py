"""
The trace's stand-ins for bitsandbytes' 8-bit operations against its own CUDA code, whose kernels are left out, and a
user's 8-bit layer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import memplan
from memplan.tracing.quantized import HANDLERS
from memplan.tracing.recorder import Recorder

bitsandbytes = pytest.importorskip("bitsandbytes")

OPERATORS = (
    "int8_vectorwise_quant", "int8_mixed_scaled_mm", "int8_scaled_mm", "int8_linear_matmul", "int8_mm_dequant",
)  # fmt: skip


class _Library:
    """A library whose every kernel returns at once, without an error."""

    def __getattr__(self, name: str) -> Any:
        def kernel(*_: Any) -> int:
            return 0

        return kernel


@pytest.fixture
def cuda_code(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """What bitsandbytes runs for CUDA tensors by operator: that of backends/cuda, where there is none of default."""
    from bitsandbytes import _ops, cextension

    found: dict[str, Callable[..., Any]] = {}

    def register(name: str, _: str) -> Callable[[Any], Any]:
        def keep(function: Any) -> Any:
            found[name] = function
            return function

        return keep

    @contextlib.contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(_ops, "register_kernel", register)
    monkeypatch.setattr(cextension, "lib", _Library())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    context = type(
        "Context", (), {"get_instance": classmethod(lambda cls: cls()), "get_context": lambda *_: None}
    )
    for backend in ("default", "cuda"):
        path = Path(bitsandbytes.__file__).parent / "backends" / backend / "ops.py"
        module = ModuleType(f"bitsandbytes.backends.{backend}.read_by_a_test")
        module.__package__ = f"bitsandbytes.backends.{backend}"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
        module.__dict__.update(
            _cuda_device_of=nothing, CUBLAS_Context=context, _get_tensor_stream=lambda _: 0
        )
    return {f"bitsandbytes::{name}": found[f"bitsandbytes::{name}"] for name in OPERATORS}


def _events(recorder: Recorder, start: int) -> list[int]:
    """Signed bytes, without scalars of one: the 0 that is written to columns is on the CPU before any mode sees it."""
    events = recorder.events[start:]
    signed = [recorder.sizes[event] if event > 0 else -recorder.sizes[-event] for event in events]
    return [num_bytes for num_bytes in signed if abs(num_bytes) > 1]


def _step(device: str, dtype: torch.dtype, recorder: Recorder, *, bias: bool, rows: int) -> list[int]:
    """Forward and backward of one layer: events of everything that it makes."""
    from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState

    state = MatmulLtState()
    state.CB = torch.zeros(48, 32, dtype=torch.int8, device=device)
    state.SCB = torch.ones(48, device=device)
    state.threshold, state.has_fp16_weights = 6.0, False
    x = torch.zeros(1, rows, 32, dtype=dtype, device=device, requires_grad=True)
    added = torch.zeros(48, dtype=dtype, device=device) if bias else None
    for held in (state.CB, state.SCB, x, added):
        if held is not None:
            recorder.adopt(held, "weights", "given")
    start = len(recorder.events)
    with recorder:
        out = MatMul8bitLt.apply(x, state.CB, None, added, state)
        out.backward(torch.ones_like(out))
    return _events(recorder, start)


@pytest.mark.parametrize("rows", [1, 24])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_product_allocates_what_the_code_for_cuda_does(
    dtype: torch.dtype, bias: bool, rows: int, cuda_code: dict[str, Callable[..., Any]]
) -> None:
    """Event by event, of real tensors that have no outliers and of meta tensors."""

    def run(function: Callable[..., Any]) -> Any:
        def handler(recorder: Recorder, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with recorder:
                return function(*args, **kwargs)

        return handler

    real = Recorder(device_type="cpu", handlers={name: run(function) for name, function in cuda_code.items()})
    measured = _step("cpu", dtype, real, bias=bias, rows=rows)
    traced = _step("meta", dtype, Recorder(handlers=HANDLERS), bias=bias, rows=rows)

    assert measured == traced
    assert measured.count(rows * 48 * 4) >= 1  # the sums in int32


def test_a_users_8_bit_layer_is_traced() -> None:
    """Its bytes are counted once; its input lives as long as the graph; afterwards it computes what it did."""
    layer = bitsandbytes.nn.Linear8bitLt(64, 256, bias=False, has_fp16_weights=False, threshold=6.0)
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    packed, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    layer.weight = bitsandbytes.nn.Int8Params(packed, requires_grad=False, CB=packed, SCB=scales)
    tail = torch.nn.Linear(256, 64, bias=False)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), layer, tail)
    x = torch.randn(32, 64)
    before = model(x).detach()

    def step(batch: torch.Tensor) -> None:
        model(batch).sum().backward()
        model.zero_grad()

    traced = memplan.trace(step, model, None, x)

    sizes = {
        storage.where: storage.num_bytes for storage in traced.tape.storages if storage.num_bytes >= 1024
    }
    assert sizes["1.weight"] == 256 * 64
    assert [256 * 64] == [
        storage.num_bytes for storage in traced.tape.storages if storage.where in ("1.weight", "1.weight CB")
    ]
    assert torch.equal(before, model(x))
