"""Liger's kernels by shape beside a trace of functions that allocate as its do, the kernels themselves left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import BIG_BYTES
from torch import nn
from torch.autograd import Function
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama

import memplan
from memplan.job.spec import Job
from memplan.model import architecture_from_config
from memplan.tape.multiprocessors import FULL_CHIPS
from memplan.tape.tape import WrittenTape
from memplan.tape.writer import write_tape

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, "hidden_size": 256,
    "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip


class Norm(Function):
    """ops/rms_norm.py, LigerRMSNormFunction."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, x.shape[-1])
        out = torch.empty_like(rows)
        ctx.save_for_backward(rows, weight, torch.empty(len(rows), dtype=torch.float32, device=x.device))
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, weight, _ = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return gradients[0], None
        parts = torch.empty((FULL_CHIPS[8, 0], len(weight)), dtype=torch.float32, device=weight.device)
        return gradients[0], parts.sum(dim=0).to(weight.dtype)


class Gate(Function):
    """ops/swiglu.py, LigerSiLUMulFunction."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ctx.saved_tensors


class Rotary(Function):
    """ops/rope.py, LigerRopeFunction: queries and keys are contiguous once their heads are back beside each other."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(1, 2).contiguous().transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k = (gradient.transpose(1, 2).contiguous().transpose(1, 2) for gradient in gradients)
        return q, k, None, None


class LigerNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Norm.apply(x, self.weight)


class LigerMlp(modeling_llama.LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(Gate.apply(self.gate_proj(x), self.up_proj(x)))


def traced(job: Job, monkeypatch: pytest.MonkeyPatch) -> WrittenTape:
    """Two steps of a model with those functions in it."""
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", LigerNorm)
    monkeypatch.setattr(modeling_llama, "LlamaMLP", LigerMlp)
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, **_: Rotary.apply(q, k, cos, sin)
    )
    model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG), dtype=getattr(torch, job.dtype))
    if job.method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=job.lora.rank, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], fused=True
    )

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=job.autocast is not None):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ids = torch.zeros((job.micro_batch_size, job.max_seq_len), dtype=torch.int64)
    return memplan.trace(step, model, optimizer, {"input_ids": ids, "labels": ids}).tape


def events(written: WrittenTape, phase: str) -> list[int]:
    """Signed bytes of the big events of the second step's phase."""
    tape = written.flatten()
    begin, end = next(
        (mark.event, after.event)
        for mark, after in zip(tape.marks, tape.marks[1:])
        if (mark.phase, mark.step) == (phase, 2)
    )
    signed = [tape.sizes[event] if event > 0 else -tape.sizes[-event] for event in tape.events[begin:end]]
    return [num_bytes for num_bytes in signed if abs(num_bytes) > BIG_BYTES * 4]


@pytest.mark.parametrize(
    ("method", "dtype", "autocast"),
    [("full", "bfloat16", None), ("lora", "bfloat16", None), ("lora", "bfloat16", "bfloat16")],
)
def test_shape_equals_trace(
    method: str, dtype: str, autocast: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tensors in the same order, forward and backward."""
    job = Job(
        model="tiny", method=method, dtype=dtype, autocast=autocast, micro_batch_size=2, max_seq_len=300, loss="full",
        loop="hf_trainer", kernels="liger",
    )  # fmt: skip
    shape = write_tape(job, architecture_from_config(CONFIG, name="tiny", source="tiny"))
    trace = traced(job, monkeypatch)

    backward = events(trace, "backward")
    assert len(backward) > 100
    assert backward == events(shape, "backward")
    if autocast is None:  # else the Trainer makes the logits float32 behind it
        forward, planned = events(trace, "forward"), events(shape, "forward")
        assert [size for size in forward if size > 0] == [size for size in planned if size > 0]
        assert sorted(forward) == sorted(planned)  # the logits go a moment earlier or later


def test_other_families_are_planned_without_and_said() -> None:
    """What Liger does to their blocks is not known here; the plan is above."""
    from memplan.budget.estimate import estimate_written

    config = CONFIG | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 64}
    architecture = architecture_from_config(config, name="tiny", source="tiny")
    job = Job(model="tiny", loop="hf_trainer", loss="full")
    plain = estimate_written(job, architecture)[1]
    asked = estimate_written(job.replace(kernels="liger"), architecture)[1]

    assert plain.need_bytes == asked.need_bytes
    assert any("`kernels: liger` is planned for llama" in note for note in asked.warnings)
