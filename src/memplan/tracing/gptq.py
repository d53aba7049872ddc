"""
A stand-in for gptqmodel's TorchLinear, which trains over weights in GPTQ's format, on tensors without memory.

The package need not be there: what it allocates is what is written here (gptqmodel 7.3, nn_modules/qlinear/__init__.py,
_register_gptq_buffers and _init_wf_unsqueeze_buffers; qlinear/torch.py, _forward_eager). torch.compile makes one kernel
of its dequantize_weight, of which the weight in float16 comes out. peft's layer beside it is peft's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from memplan.errors import TraceError
from memplan.job.spec import Job
from memplan.tape.gptq import tensors_of

_META = torch.device("meta")


class GptqLinear(nn.Linear):
    """A linear layer whose weight is packed in buffers. It is an `nn.Linear` for those who look for layers to adapt."""

    def __init__(self, linear: Any, group_size: int | None) -> None:
        nn.Module.__init__(self)
        from transformers.pytorch_utils import Conv1D

        shape = tuple(linear.weight.shape)
        self.in_features, self.out_features = shape if isinstance(linear, Conv1D) else shape[::-1]
        self.weight = None
        self.bias = None
        self.state_names: set[str] = set()
        """Buffers that hold no weights."""
        for item in tensors_of(
            self.in_features,
            self.out_features,
            group_size=group_size,
            kernel="compiled",
            bias=linear.bias is not None,
        ):
            if hasattr(self, item.name):
                delattr(self, item.name)
            buffer = torch.empty(item.shape, dtype=getattr(torch, item.dtype), device=_META)
            self.register_buffer(item.name, buffer, persistent=not item.name.startswith("wf_"))
            if not item.is_packed:
                self.state_names.add(item.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self.out_features)
        weight = torch.empty(
            (self.in_features, self.out_features), dtype=self.scales.dtype, device=self.qweight.device
        )
        weight = weight.to(x.dtype)
        out = torch.matmul(x.reshape(-1, x.shape[-1]), weight).reshape(shape)
        return out if self.bias is None else out.add_(self.bias)


def replace_with_gptq(blocks: nn.Module | None, job: Job) -> None:
    """
    Put a `GptqLinear` in the place of the linear layers of the blocks, but those that `quantization.skip` names.

    Raises:
        TraceError: there is none.
    """
    from transformers.pytorch_utils import Conv1D

    found = False
    for name, module in [] if blocks is None else list(blocks.named_modules()):
        skipped = any(name.endswith(f".{skip}") for skip in job.quantization.skip)
        is_linear = type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"
        if is_linear and not skipped:
            assert blocks is not None
            blocks.set_submodule(name, GptqLinear(module, job.quantization.group_size))
            found = True
    if not found:
        raise TraceError(
            f"no layer of `{job.model}` can be in GPTQ's format: its blocks have no linear layer that is not skipped",
            hint="use `--set quantization.type=nf4`, or check `quantization.skip`",
        )


@contextmanager
def adapted_by_peft() -> Iterator[None]:
    """peft takes a `GptqLinear` for what it knows of gptqmodel (tuners/lora/gptq.py, dispatch_gptq)."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    def dispatch(target: nn.Module, adapter_name: str, **options: Any) -> nn.Module | None:
        return GPTQLoraLinear(target, adapter_name, **options) if isinstance(target, GptqLinear) else None

    with patch("peft.tuners.lora.model.dispatch_gptq", dispatch):
        yield
