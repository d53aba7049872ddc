"""
Steps that sources measured in scripts of their own, stated anew and traced: encoders, a classifier in the Trainer of
2022, a language model with code of its own, and a head with its loss.

`script` of a case in `data/published.json` names the step and its sizes. What the script has on the device when a step
begins is made here in its order. `python -m benchmarks.trace_cases` keeps the peaks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bert_2022 import classifier_step
from benchmarks.drivers_order import DriversOrder
from benchmarks.gpt_from_scratch import language_step
from benchmarks.one_process import encoder, in_one_process
from benchmarks.published import CONTEXT, HIGHEST, LOWEST, NUM_ORDERS, Case
from benchmarks.script import Script
from memplan.allocator import CachingAllocator
from memplan.allocator.replay import follow
from memplan.allocator.segments import Pool
from memplan.job.spec import AllocatorSettings
from memplan.tape.software import CUBLAS_WORKSPACE_BYTES
from memplan.tape.tape import Tape
from memplan.tracing.recorder import Recorder
from memplan.tracing.step import trace_run
from memplan.tracing.step_phases import StepPhases

PLACE_BYTES = 1 << 34
"""Above that of any segment here."""
NUM_PLACES = 1 << 10


class Shuffled(CachingAllocator):
    """
    Segments of the driver at addresses in any order, and not one above the other. Of free blocks of one size torch
    takes the one at the lowest address: how far that matters.
    """

    def __init__(self, settings: AllocatorSettings, order: random.Random) -> None:
        super().__init__(settings)
        self._places = order.sample(range(1, NUM_PLACES), NUM_PLACES - 1)

    def _new_range(self, pool: Pool, size: int) -> int:
        row = super()._new_range(pool, size)
        self.blocks.address[row] = self._places.pop() * PLACE_BYTES
        return row


def trace_script(case: Case) -> dict[str, int]:
    """
    Peaks over the scope of the case, by statistic; the reserved one also as the driver's addresses may have it. Of a
    model that was not the first of its process, beside those of the model alone, what the process had.
    """
    steps, tape = trace_tape(case)
    settings = AllocatorSettings(expandable_segments=False)
    first = steps if case.scope == "second step" else 0
    allocated, reserved = _peaks(DriversOrder(settings), tape, first)
    orders = [_peaks(Shuffled(settings, random.Random(seed)), tape, first)[1] for seed in range(NUM_ORDERS)]
    device = {"device": reserved + outside} if (outside := _outside_bytes(case)) else {}
    if case.script["step"] == "encoder":
        allocated, reserved = in_one_process(case)
    return {"allocated": allocated, "reserved": reserved, LOWEST: min(orders), HIGHEST: max(orders)} | device


def _outside_bytes(case: Case) -> int:
    """
    The CUDA context as the source printed it, and cuBLAS's workspaces where they are its own: it takes `:4096:2:16:8`
    by default, which is torch's figure as well. 0 where the source's figure is not that of the device.
    """
    if case.measured.statistic != "device":
        return 0
    context = next(figure.bytes for figure in case.also_measured if figure.statistic == CONTEXT)
    return context + (0 if case.behaviour.cublas_workspace_bytes else 2 * CUBLAS_WORKSPACE_BYTES)


def _peaks(allocator: CachingAllocator, tape: Tape, first: int) -> tuple[int, int]:
    """Allocated and reserved, from step `first` on; 0 is loading."""
    sizes = allocator.all_block_bytes(tape.sizes)
    phases = follow(allocator, tape.events, sizes, tape.streams, tape.marks).phases
    seen = [phase for phase in phases if phase.mark.step >= first]
    return max(phase.allocated_peak_bytes for phase in seen), max(phase.reserved_peak_bytes for phase in seen)


def trace_tape(case: Case) -> tuple[int, Tape]:
    """How many steps, and their tape."""
    settings = dict(case.script)
    steps = settings.pop("steps", 2 if case.scope == "second step" else 1)
    script = SCRIPTS[settings.pop("step")](**settings)

    def run(recorder: Recorder, phases: StepPhases) -> None:
        for _ in range(steps):
            phases.begin_step()
            script.step()
        recorder.mark("end", steps)

    optimizers = [] if script.optimizer is None else [script.optimizer]
    trace = trace_run(run, script.models, optimizers, device="cuda", steps=steps, behaviour=case.behaviour)
    return steps, trace.tape.flatten()


def head_and_loss(tokens: int, hidden: int, vocabulary: int, heads: int = 1, chunked: bool = False) -> Script:
    """
    Liger-Kernel, benchmark/scripts/benchmark_fused_linear_cross_entropy.py at 7e3683e2, which has both of its heads on
    the device and never clears gradients; xtuner, docs/en/pretrain_sft/advanced_tutorial/loss.md, which has one, takes
    one step and keeps the logits.
    """
    with torch.device("meta"):
        made = [nn.Linear(hidden, vocabulary, bias=False, dtype=torch.bfloat16) for _ in range(heads)]
    head = made[-1 if chunked else 0]
    inputs: list[Tensor] = []

    def step() -> None:
        if not inputs:
            inputs.append(
                torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            )
            inputs.append(torch.zeros(tokens, dtype=torch.long, device="cuda"))
        if chunked:
            loss = _ChunkedLoss.apply(inputs[0], head.weight, inputs[1])
        elif heads == 1:
            logits = head(inputs[0])
            loss = F.cross_entropy(logits, inputs[1])
        else:
            loss = F.cross_entropy(head(inputs[0]), inputs[1])
        loss.backward()

    return Script(step, {str(number): module for number, module in enumerate(made)})


class _ChunkedLoss(torch.autograd.Function):
    """
    What liger-kernel 0.4.2 takes for its fused loss (ops/fused_linear_cross_entropy.py before 90fb5e4a): gradients in
    forward, and logits of a chunk in float32.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        tokens, hidden = inputs.shape
        parts = -(-weight.shape[0] // hidden)
        rows = 1 << (-(-tokens // parts) - 1).bit_length()
        grad_weight, grad_inputs = torch.zeros_like(weight), torch.zeros_like(inputs)
        losses = torch.zeros(tokens, dtype=torch.float32, device=inputs.device)
        total = (target != -100).sum()
        for start in range(0, tokens, rows):
            part = inputs[start : start + rows]
            logits = part @ weight.t()
            logits = logits.float()
            logits = logits.to(inputs.dtype)
            share = 1 / total
            losses[start : start + rows] = losses[start : start + rows] * share
            grad_logits = logits * share
            grad_inputs[start : start + rows] = grad_logits @ weight
            torch.addmm(grad_weight, logits.t(), part, out=grad_weight)
        ctx.save_for_backward(grad_inputs.detach(), grad_weight.detach())
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return (*ctx.saved_tensors, None)


def loss_alone(tokens: int, vocabulary: int) -> Script:
    """Liger-Kernel, benchmark/scripts/benchmark_cross_entropy.py at b5672a15: float32, the input's gradient kept."""
    inputs: list[Tensor] = []

    def step() -> None:
        if not inputs:
            inputs.append(torch.randn(tokens, vocabulary, device="cuda", requires_grad=True))
            inputs.append(torch.zeros(tokens, dtype=torch.long, device="cuda"))
        F.cross_entropy(inputs[0], inputs[1]).backward()

    return Script(step, {})


def classifier(**settings: Any) -> Script:
    """transformers, docs/source/en/perf_train_gpu_one.mdx at 0016acf7: bert-large-uncased with a head of two labels."""
    step, model, optimizer = classifier_step(**settings)
    return Script(step, {"": model}, optimizer)


def language_model(**settings: Any) -> Script:
    """rasbt/LLMs-from-scratch, ch05/10_llm-training-speed."""
    step, model, optimizer = language_step(**settings)
    return Script(step, {"": model}, optimizer)


SCRIPTS: dict[str, Callable[..., Script]] = {
    "encoder": encoder,
    "head and loss": head_and_loss,
    "loss alone": loss_alone,
    "classifier": classifier,
    "language model": language_model,
}
