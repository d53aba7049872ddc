"""
What the compiled step of torchao's optimizers allocates between its kernels, as inductor writes it for CUDA: compiled
here for a GPU that is not there, and compared with what `memplan.tape.low_bit` says.

    pip install torchao triton
    python -m benchmarks.torchao_step

The graph is captured on the CPU, its tensors are then said to be on CUDA, and inductor lowers and schedules it for a
card of so many multiprocessors. Nothing is run.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from math import prod
from typing import Any
from unittest.mock import patch

import torch

from memplan.tape.low_bit import BLOCK, LOW_BIT, Buffer, step_buffers
from memplan.tape.multiprocessors import Multiprocessors

SHAPES = (
    (4096,), (65536,), (16, 256), (8, 1024, 256), (16, 4096), (1024, 896), (4096, 4096), (256, 300), (8, 2048, 1024),
    (4096, 16), (14336, 64), (2048, 128), (8, 128, 64), (8192, 1152),
)  # fmt: skip
"""Vectors, matrices and stacks whose rows are blocks, several of them, parts of one, or neither."""
CARDS = (Multiprocessors(132, 2048), Multiprocessors(40, 1024))
_CUDA = torch.device("cuda", 0)
_MADE = re.compile(r"(buf\d+) = empty_strided_cuda\(\(([^)]*)\), \([^)]*\), torch\.(\w+)\)")


class Captured(Exception):
    """The graph, before anything is lowered."""


def capture(optimizer: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The graph of one parameter's step after autograd's and inductor's decompositions, on the CPU."""
    from torch._inductor.compile_fx import compile_fx
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8

    def state(signed: bool) -> torch.Tensor:
        if optimizer == "ao_adamw_fp8":
            return OptimStateFp8.zeros(shape, BLOCK, dtype=dtype)
        kind = OptimState4bit if optimizer == "ao_adamw_4bit" else OptimState8bit
        return kind.zeros(torch.Size(shape), signed, BLOCK, dtype=dtype)

    found = []

    def keep(graph: Any, *_: Any, **__: Any) -> Any:
        found.append(graph)
        raise Captured

    torch._dynamo.reset()
    step = torch.compile(
        single_param_adam,
        fullgraph=True,
        dynamic=False,
        backend=lambda graph, inputs: compile_fx(graph, inputs, inner_compile=keep),
    )
    parameter, gradient = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    count, rate = torch.tensor(1.0), torch.tensor(1e-3)
    with torch.no_grad(), contextlib.suppress(Exception):
        step(
            parameter,
            gradient,
            count,
            state(True),
            state(False),
            None,
            rate,
            0.9,
            0.999,
            0.0,
            1e-8,
            True,
            False,
        )
    return found[0]


@contextlib.contextmanager
def a_card(device: Multiprocessors) -> Iterator[None]:
    """A GPU of which inductor can ask what it is."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    class Properties:
        name, major, minor, warp_size, total_memory = "a card", 9, 0, 32, 80 << 30
        regs_per_multiprocessor, L2_cache_size, gcnArchName = 65536, 50 << 20, ""
        shared_memory_per_block_optin, shared_memory_per_block = 232448, 49152
        shared_memory_per_multiprocessor, max_threads_per_block = 233472, 1024
        multi_processor_count, max_threads_per_multi_processor = device.number, device.threads

    answers = [
        (torch.cuda, "get_device_properties", lambda *_, **__: Properties),
        (torch.cuda, "_get_device_properties", lambda *_, **__: Properties),
        (torch.cuda, "get_device_capability", lambda *_, **__: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.version, "cuda", "13.0"),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: Properties)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
        (CudaInterface, "is_available", staticmethod(lambda: True)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
        (_triton, "has_triton", lambda *_, **__: True),
        (scheduler, "has_triton", lambda *_, **__: True),
        (_triton, "triton_hash_with_backend", lambda *_, **__: ""),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in answers:
            stack.enter_context(patch.object(owner, name, value, create=True))
        DeviceProperties.create.cache_clear()
        yield


def lower(graph: Any, device: Multiprocessors) -> str:
    """The code that inductor writes for the graph, its tensors on CUDA but for the step and the learning rate."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    inputs = move(graph)
    mode = next(value.fake_mode for value in inputs)
    with a_card(device), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        post_grad_passes(graph, True)
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=True)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            written = lowering.codegen()[0]
    return str(getattr(written, "value", written))


def move(graph: Any) -> list[Any]:
    """Say of the graph's tensors that they are on CUDA; returns its inputs. Scalars of the CPU stay there."""
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

    def moved(value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return value
        with unset_fake_temporarily():
            meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(value.fake_mode, meta, _CUDA)

    scalars, inputs = set(), []
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if value.dim() == 0:
                scalars.add(node)
            else:
                node.meta["val"] = moved(value)
            inputs.append(node.meta["val"])
        elif node.op == "call_function":
            if node.all_input_nodes and scalars.issuperset(node.all_input_nodes):
                scalars.add(node)
                continue
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": _CUDA}
            node.meta["val"] = torch.utils._pytree.tree_map(moved, value)
    graph.recompile()
    return inputs


def read(code: str) -> list[str]:
    """Buffers that the code makes, with their bytes, and those that it lets go of: `+buf0 64`, `-buf0`."""
    call = code[code.index("def call(") :]
    found = []
    for line in map(str.strip, call[: call.index("return ()")].splitlines()):
        made = _MADE.match(line)
        if made:
            extents = [int(extent) for extent in made[2].split(",") if extent.strip()]
            found.append(f"+{made[1]} {prod(extents) * getattr(torch, made[3]).itemsize}")
        elif line.startswith("del buf"):
            found.append(f"-{line.removeprefix('del ')}")
    return found


def said(optimizer: str, shape: tuple[int, ...], device: Multiprocessors) -> list[str]:
    """The same of what memplan plans."""
    return [
        f"+{item.name} {prod(item.shape) * getattr(torch, item.dtype).itemsize}"
        if isinstance(item, Buffer)
        else f"-{item}"
        for item in step_buffers(optimizer, shape, device)
    ]


def numbered(events: list[str]) -> list[str]:
    """By the order in which buffers are made, whatever they are called."""
    numbers: dict[str, int] = {}
    out = []
    for event in events:
        name, _, size = event[1:].rpartition(" ") if event[0] == "+" else (event[1:], "", "")
        out.append(f"{event[0]}{numbers.setdefault(name, len(numbers))} {size}")
    return out


def main() -> int:
    """Compile every case; exit code 1 if one has other buffers than memplan says."""
    import torch._functorch.config
    import torch._inductor.config

    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.fx_graph_cache = False
    torch._inductor.config.compile_threads = 1
    print(f"torch {torch.__version__}")
    unlike = 0
    for optimizer in LOW_BIT:
        for shape in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                for device in CARDS if optimizer == "ao_adamw_4bit" else CARDS[:1]:
                    found = numbered(read(lower(capture(optimizer, shape, dtype), device)))
                    same = found == numbered(said(optimizer, shape, device))
                    unlike += not same
                    print(
                        f"{optimizer} {shape} {dtype} {device.number}: {'as said' if same else found}",
                        flush=True,
                    )
    print(f"{unlike} are not as memplan says")
    return 1 if unlike else 0


if __name__ == "__main__":
    sys.exit(main())
