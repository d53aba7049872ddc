"""
torch-preflight's calibration (tests/calibration/measure_cuda.py) as it runs: ten models one after the other in one
process, whose cache is emptied in between.

What stays decides how the next model lies: the workspace of cuBLAS that backward's thread took at its first product, in
the middle of a segment of the first model, which is never given back. And of free blocks of one size torch takes that
at the lowest address, which the driver chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.drivers_order import DriversOrder
from benchmarks.published import Case
from benchmarks.script import Script
from memplan.job.spec import AllocatorSettings
from memplan.tape.behaviour import Behaviour
from memplan.tape.software import CUBLAS_WORKSPACE_BYTES
from memplan.tape.tape import FlatTape
from memplan.tracing.recorder import Recorder
from memplan.tracing.step import trace_run
from memplan.tracing.step_phases import StepPhases

STEPS = 2


class Stack(NamedTuple):
    """A model of the calibration's own: its first five."""

    layers: int
    hidden: int
    heads: int
    inner: int
    batch: int
    length: int
    dropout: float = 0.0
    """With dropout its layers have biases too."""
    sdpa: bool = False


STACKS = (
    Stack(4, 512, 8, 2048, 4, 256),
    Stack(6, 768, 12, 3072, 8, 512, dropout=0.1),
    Stack(6, 768, 12, 3072, 4, 1024, sdpa=True),
    Stack(12, 768, 12, 3072, 2, 512),
    Stack(4, 1024, 16, 4096, 2, 1024, sdpa=True),
)
MODELS = ("gpt2", "distilbert", "bert")
BATCHES = ((4, 128), (8, 256))


class _Block(nn.Module):
    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack
        hidden, bias = stack.hidden, stack.dropout > 0
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(hidden, hidden, bias=bias) for _ in range(3))
        self.out = nn.Linear(hidden, hidden, bias=bias)
        self.up = nn.Linear(hidden, stack.inner, bias=bias)
        self.down = nn.Linear(stack.inner, hidden, bias=bias)
        self.dropout = nn.Dropout(stack.dropout) if bias else nn.Identity()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.stack.sdpa:
            return F.scaled_dot_product_attention(query, key, value)
        scores = (query @ key.transpose(-2, -1)) / query.shape[-1] ** 0.5
        return self.dropout(scores.softmax(-1)) @ value  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:2]
        y = self.norms[0](x)
        query, key, value = (
            layer(y).view(*rows, self.stack.heads, -1).transpose(1, 2) for layer in self.heads
        )
        attended = self._attend(query, key, value)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(*rows, self.stack.hidden)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norms[1](x)))))  # type: ignore[no-any-return]


def _script(
    forward: Callable[[Tensor], tuple[Tensor, Any]], model: nn.Module, batch: Callable[[], Tensor]
) -> Script:
    """Steps in bfloat16, which a T4 emulates; `forward` gives the loss, and what the step holds beside it."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    batches: list[Tensor] = []

    def step() -> None:
        if not batches:
            batches.append(batch())
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            held = forward(batches[0])
        held[0].backward()
        optimizer.step()

    return Script(step, {"": model}, optimizer)


def _stack(stack: Stack) -> Script:
    """synthetic_case"""
    with torch.device("meta"):
        model = nn.Sequential(*(_Block(stack) for _ in range(stack.layers)))
    shape = (stack.batch, stack.length, stack.hidden)
    return _script(lambda x: (_mean_square(model(x)), None), model, lambda: torch.randn(shape, device="cuda"))


def _mean_square(x: Tensor) -> Tensor:
    return x.float().pow(2).mean()


def encoder(model_type: str, batch: int, length: int) -> Script:
    """real_model_case, of a model without a head."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(model_type))

    def forward(ids: Tensor) -> tuple[Tensor, Any]:
        out = model(input_ids=ids)
        return _mean_square(out.last_hidden_state), out

    return _script(forward, model, lambda: _ids(batch, length))


def _language_model(model_type: str, batch: int, length: int) -> Script:
    """real_model_case, of one whose loss is its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))

    def forward(ids: Tensor) -> tuple[Tensor, Any]:
        out = model(input_ids=ids, labels=ids)
        return out.loss, out

    return _script(forward, model, lambda: _ids(batch, length))


def _ids(batch: int, length: int) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.long, device="cuda")


class Peaks(NamedTuple):
    """Bytes of the second step of one model of the process."""

    allocated: int
    reserved: int


def in_one_process(case: Case) -> Peaks:
    """What a model took after those before it."""
    return _whole_run(case.behaviour)[case.script["model_type"], case.script["batch"], case.script["length"]]


@cache
def _whole_run(behaviour: Behaviour) -> dict[Any, Peaks]:
    """By model, batch and length, or by stack."""
    made: list[tuple[Any, Callable[[], Script]]] = [(stack, partial(_stack, stack)) for stack in STACKS]
    for name in MODELS:
        make = partial(_language_model if name == "gpt2" else encoder, name)
        made += [((name, *sizes), partial(make, *sizes)) for sizes in BATCHES]
    process = _Process()
    behaviour = replace(behaviour, products_before=False)
    return {key: process.run(_trace(make(), behaviour)) for key, make in made}


def _trace(script: Script, behaviour: Behaviour) -> FlatTape:
    def run(recorder: Recorder, phases: StepPhases) -> None:
        for _ in range(STEPS):
            phases.begin_step()
            script.step()
        recorder.mark("end", STEPS)

    optimizers = [] if script.optimizer is None else [script.optimizer]
    return trace_run(run, script.models, optimizers, device="cuda", steps=STEPS, behaviour=behaviour).tape


class _Process:
    """The allocator, and the workspaces that libraries have taken for good."""

    def __init__(self) -> None:
        self.allocator = DriversOrder(AllocatorSettings(expandable_segments=False))
        self.kept: dict[str, int] = {}
        self.num_storages = 1
        # measure_cuda_context: a product, which takes the main thread's workspace, and a convolution.
        self.allocator.malloc(1, CUBLAS_WORKSPACE_BYTES)
        self.kept["cuBLAS workspace (forward)"] = 1

    def run(self, tape: FlatTape) -> Peaks:
        """One model, from loading to the cache that is emptied behind it; its peaks from the second step on."""
        flat, first, allocator = tape.flatten(), self.num_storages, self.allocator
        kept = {
            storage: name
            for storage in range(1, len(flat.sizes))
            for name in [tape.describe(storage).where]
            for name in [name[name.find("cuBLAS") :]]
            if name.startswith("cuBLAS")
        }
        there = {storage for storage, name in kept.items() if name in self.kept}
        self.kept |= {name: first + storage for storage, name in kept.items() if storage not in there}
        events = [*_from_first_product(flat.events, tape, kept)]
        (second,) = (mark for mark in flat.marks if (mark.phase, mark.step) == ("forward", STEPS))
        sizes = {first + storage: size for storage, size in enumerate(allocator.all_block_bytes(flat.sizes))}
        alive: set[int] = set()
        for number, event in enumerate(events):
            if number == second.event:
                allocator.reset_peaks()
            if abs(event) in there:
                continue
            storage = first + abs(event)
            (alive.add if event > 0 else alive.discard)(storage)
            allocator.run((storage if event > 0 else -storage,), sizes, {})
        peaks = Peaks(allocator.peak_allocated_bytes, allocator.peak_reserved_bytes)
        for storage in sorted(alive - {*self.kept.values()}):
            allocator.free(storage)
        allocator.release_cached()
        self.num_storages += len(flat.sizes)
        return peaks


def _from_first_product(events: Sequence[int], tape: FlatTape, kept: Mapping[int, str]) -> list[int]:
    """Backward's workspace where it comes: with the first product, behind its output, and not as backward begins."""
    (workspace,) = (storage for storage, name in kept.items() if name == "cuBLAS workspace (backward)")
    start = events.index(workspace)
    rest = events[start + 1 :]
    product = next(
        number
        for number, event in enumerate(rest)
        if event > 0 and tape.describe(event).where.endswith(" mm")
    )
    return [*events[:start], *rest[: product + 1], workspace, *rest[product + 1 :]]
