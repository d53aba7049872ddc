"""litgpt's model and the step of its finetuning scripts, at a commit, on meta tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memplan
from benchmarks.litgpt_runs import LitGpt
from memplan.allocator import replay
from memplan.job.spec import AllocatorSettings
from memplan.tracing.replaced import replaced

EVERYWHERE = ("query", "key", "value", "projection", "mlp", "head")
ALPHA, DROPOUT = 16, 0.05
HEAD_CHUNK = 128
"""Tokens of a chunk of the head's output, and of the loss."""
PACKING = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
"""Of a weight in 4 bits."""


def trace_litgpt(run: LitGpt) -> dict[str, int]:
    """Peaks in bytes by statistic, of a process that has made `run.steps` steps."""
    ids = torch.zeros(run.micro_batch, run.length, dtype=torch.int64, device="meta")
    with warnings.catch_warnings(), _unpacked_products() if run.quantization else nullcontext():
        warnings.simplefilter("ignore")
        step = Step(run)
        pairs = [(ids.clone(), ids.clone()) for _ in range(run.iterations)]
        traced = memplan.trace(step, step.model, step.optimizer, pairs, steps=run.steps, gpu=run.gpu)
    tape = traced.tape.flatten()
    settings = AllocatorSettings(expandable_segments=False)
    result = replay(tape.events, tape.sizes, tape.streams, settings, marks=tape.marks)
    return {"allocated": result.peak_allocated_bytes}


class Step:
    """An iteration for each pair of token ids and targets, both (micro batch, length) int64, then the optimizer."""

    def __init__(self, run: LitGpt) -> None:
        from lightning import Fabric

        code = import_module(f"{run.package}.{run.method}")
        self.loss = import_module(f"{run.package}.utils").chunked_cross_entropy
        self.fabric = Fabric(
            accelerator="cpu", devices=1, precision=None if run.quantization else "bf16-true"
        )
        if run.quantization:
            from lightning.fabric.plugins import BitsandbytesPrecision

            # Fabric takes it for CUDA alone, though it does the same on meta tensors.
            self.fabric.strategy.precision = BitsandbytesPrecision(run.quantization, torch.bfloat16)
        config = code.Config.from_name(name=run.model, **_adapters(run))
        with self.fabric.init_module(), torch.device("meta"):
            model = code.GPT(config)
        _pack(model)
        getattr(code, f"mark_only_{run.method}_as_trainable")(model)
        self.model = self.fabric.setup_module(model, move_to_device=False)
        self.model.max_seq_length = run.length
        # Fabric wraps no optimizer of meta tensors, and on one device its wrapper does no more than pass calls on.
        self.optimizer = _optimizer(run, [weight for weight in model.parameters() if weight.requires_grad])
        self.logits: list[Tensor] = []
        self.last: Tensor | None = None

    def __call__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Logits and loss are kept until the next iteration has others."""
        for ids, targets in batches:
            self.logits = self.model(ids, lm_head_chunk_size=HEAD_CHUNK)
            self.logits[-1] = self.logits[-1][..., :-1, :]
            self.last = self.loss(self.logits, targets[..., 1:])
            self.fabric.backward(self.last / len(batches))
        self.optimizer.step()
        self.optimizer.zero_grad()


def _adapters(run: LitGpt) -> dict[str, Any]:
    """The fields of LoRA in litgpt's configuration, whose names changed with the package's."""
    if run.method != "lora":
        return {}
    targets = EVERYWHERE if run.everywhere else ("query", "value")
    if run.package == "lit_gpt":
        return {"r": run.rank, "alpha": ALPHA, "dropout": DROPOUT} | {f"to_{name}": True for name in targets}
    fields = {"lora_r": run.rank, "lora_alpha": ALPHA, "lora_dropout": DROPOUT}
    return fields | {f"lora_{name}": True for name in targets}


def _optimizer(run: LitGpt, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    if not run.quantization:
        return torch.optim.AdamW(trained)
    from bitsandbytes.optim import PagedAdamW

    optimizer: torch.optim.Optimizer = PagedAdamW(trained)
    return optimizer


def _pack(model: nn.Module) -> None:
    """The plugin's linear layers pack their weights as they are made on CUDA, from float16."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not hasattr(weight, "quant_type"):
            continue
        from bitsandbytes import functional
        from bitsandbytes import nn as layers

        packing = {name: getattr(weight, name) for name in PACKING}
        data, state = functional.quantize_4bit(weight.half(), **packing)
        module.weight = layers.Params4bit(
            data, requires_grad=False, quant_state=state, module=module, bnb_quantized=True, **packing
        )


@contextmanager
def _unpacked_products() -> Iterator[None]:
    """bitsandbytes before 0.43.2 (autograd/_functions.py, MatMul4Bit)."""
    import bitsandbytes

    def matmul_4bit(
        inputs: Tensor, packed: Tensor, quant_state: Any, out: None = None, bias: Any = None
    ) -> Tensor:
        product: Tensor = _Product.apply(inputs, packed, bias, quant_state)
        return product

    with replaced([(bitsandbytes, "matmul_4bit", matmul_4bit)]):
        yield


class _Product(torch.autograd.Function):
    """
    The weight is unpacked in float16 and cast. What goes in is kept beside the saved tensors, for nothing, and so as
    long as the graph is: until the loop has the logits and the loss of the next iteration.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, bias: Tensor | None, state: Any) -> Tensor:
        out = F.linear(inputs, _unpacked(packed, state, inputs.dtype), bias)
        ctx.state = state
        if ctx.needs_input_grad[0]:
            ctx.tensors = (inputs, packed)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.matmul(gradients[0], _unpacked(ctx.tensors[1], ctx.state, gradients[0].dtype))
        return gradient, None, None, None


def _unpacked(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(packed, state).to(dtype)
    return weight
