"""
Adapters beside weights in GPTQ's format: the shape writer allocates what torch and peft do, layer by layer, with each
of the kernels. Those are written out here as their packages have them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft.tuners.lora.gptq import GPTQLoraLinear

from installed import installed_behaviour
from memplan.errors import TraceError
from memplan.job.spec import Job
from memplan.model import architecture_from_config, parameters
from memplan.tape.behaviour import Behaviour
from memplan.tape.software import GptqSoftware
from memplan.tape.writer import write_tape
from memplan.tracing.gptq import GptqLinear
from memplan.tracing.writer import trace_job
from tracing.comparison import Comparison, compare
from tracing.tiny import CONFIGS, job

GROUP = 16


def adapted(**fields: Any) -> Job:
    """LoRA in float32 beside weights in GPTQ's format."""
    settings = {"loop": "hf_trainer", "dtype": "float16", "lora__dtype": "float32"} | fields
    return job(method="qlora", quantization__type="gptq", quantization__group_size=GROUP, **settings)


def written_beside(drawn: Job, config: dict[str, Any], software: GptqSoftware) -> Comparison:
    """As `compare`, with another kernel or another peft in the program."""
    architecture = architecture_from_config(config, name="tiny", source="test")
    behaviour = replace(installed_behaviour(drawn), gptq=software)
    shape = write_tape(drawn, architecture, behaviour=behaviour)
    return Comparison(drawn, shape, trace_job(drawn, config))


def same_events(both: Comparison) -> bool:
    return both.lifetimes(both.shape) == both.lifetimes(both.trace)


@pytest.mark.parametrize("model", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("autocast", [None, "float16"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_every_allocation_is_that_of_the_trace(model: str, autocast: str | None, checkpointing: str) -> None:
    """Without biases, with biases that are added in place, and of transformers' Conv1D."""
    loop = "script" if checkpointing == "full" else "hf_trainer"
    drawn = adapted(loop=loop, autocast=autocast, activation_checkpointing=checkpointing)
    both = compare(drawn, CONFIGS[model])
    assert same_events(both), both.first_difference()


def test_a_weight_is_kept_until_backward() -> None:
    """gptqmodel's product is torch's; inside a function of Python's, as fms-acceleration's, it is dequantised again."""
    drawn, config = adapted(), CONFIGS["llama"]
    architecture = architecture_from_config(config, name="tiny", source="test")
    peaks = {
        kernel: Comparison(drawn, shape, shape).peaks()[0]
        for kernel in ("compiled", "triton")
        for shape in [
            write_tape(
                drawn, architecture, behaviour=replace(installed_behaviour(drawn), gptq=GptqSoftware(kernel))
            )
        ]
    }
    sizes = [parameter.num_elements for parameter in parameters(architecture) if parameter.role == "linear"]
    kept, tables = 2 * sum(sizes), 2 * 512 * len(sizes)
    assert kept - 2 * max(sizes) <= peaks["compiled"] - peaks["triton"] - tables <= kept


def unpack(layer: Any, x: torch.Tensor, *, in_place: bool) -> torch.Tensor:
    """auto-gptq's qlinear_cuda_old.py, forward, of 4 bits (0.4.2 with `in_place`, 0.7.1 without)."""
    shifts = torch.empty((1, 8), dtype=torch.int32, device=x.device)
    words = torch.unsqueeze(layer.qzeros, 2).expand(-1, -1, 8)
    zeros = torch.bitwise_right_shift(words, shifts.unsqueeze(0)).to(torch.int8)
    if in_place:
        torch.bitwise_and(zeros, 15, out=zeros)
        zeros = zeros + 1
    else:
        zeros = zeros + 1
        zeros = torch.bitwise_and(zeros, 15)
    zeros = zeros.reshape(-1, 1, zeros.shape[1] * zeros.shape[2])
    scales = layer.scales.reshape(-1, 1, layer.scales.shape[-1])
    words = torch.unsqueeze(layer.qweight, 1).expand(-1, 8, -1)
    weight = torch.bitwise_right_shift(words, shifts.unsqueeze(-1)).to(torch.int8)
    if in_place:
        torch.bitwise_and(weight, 15, out=weight)
    else:
        weight = torch.bitwise_and(weight, 15)
    weight = weight.reshape(-1, GROUP, weight.shape[2])
    weight = scales * (weight - zeros)
    weight = weight.reshape(weight.shape[0] * weight.shape[1], weight.shape[2])
    shape = (*x.shape[:-1], layer.out_features)
    out = torch.matmul(x.reshape(-1, x.shape[-1]), weight).reshape(shape)
    return out + layer.bias if layer.bias is not None else out


class Dequantised(torch.autograd.Function):
    """QuantLinearFunction of triton_utils/dequant.py, whose kernel writes into an empty tensor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(qweight, scales)
        weight = torch.empty((qweight.shape[0] * 8, qweight.shape[1]), dtype=scales.dtype, device=x.device)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        qweight, scales = ctx.saved_tensors
        shape = (qweight.shape[0] * 8, qweight.shape[1])
        weight = torch.empty(shape, dtype=scales.dtype, device=gradient.device)
        return gradient @ weight.t(), None, None


def former_adapter(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """GPTQLoraLinear.forward of peft 0.13."""
    result = layer.quant_linear_module(x)
    for name in layer.active_adapters:
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        converts = not torch.is_autocast_enabled()
        if converts:
            expected = result.dtype
            x = x.to(down.weight.dtype)
        output = up(down(dropout(x)))
        if converts:
            output = output.to(expected)
        output = output * layer.scaling[name]
        result += output
    return result


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_weights_that_torch_operations_unpack(
    monkeypatch: pytest.MonkeyPatch, model: str, in_place: bool
) -> None:
    monkeypatch.setattr(GptqLinear, "forward", lambda self, x: unpack(self, x, in_place=in_place))
    software = GptqSoftware("unpacked", masks_in_place=in_place)
    both = written_beside(adapted(activation_checkpointing="full"), CONFIGS[model], software)
    assert same_events(both), both.first_difference()


@pytest.mark.parametrize("autocast", [None, "float16"])
def test_weights_that_a_kernel_writes_twice_beside_adapters_that_are_added_in_place(
    monkeypatch: pytest.MonkeyPatch, autocast: str | None
) -> None:
    """As fms-acceleration trains with peft 0.13."""

    def forward(layer: GptqLinear, x: torch.Tensor) -> torch.Tensor:
        out = Dequantised.apply(x.reshape(-1, x.shape[-1]), layer.qweight, layer.scales)
        return out.half().reshape(*x.shape[:-1], layer.out_features)

    monkeypatch.setattr(GptqLinear, "forward", forward)
    monkeypatch.setattr(GPTQLoraLinear, "forward", former_adapter)
    software = GptqSoftware("triton", adds_in_place=True)
    both = written_beside(adapted(autocast=autocast), CONFIGS["llama"], software)
    assert same_events(both), both.first_difference()


def test_software_of_a_run() -> None:
    """What its packages decide: the kernel, a bias that is always there, and adapters in place."""

    def of(**versions: str) -> GptqSoftware:
        return Behaviour.for_software(adapted(), versions, family="llama").gptq

    assert of() == GptqSoftware()
    qwen = of(auto_gptq="0.4.2", optimum="1.13.2", peft="0.5.0")
    assert qwen == GptqSoftware("unpacked", masks_in_place=True, zero_bias=True, adds_in_place=True)
    assert of(auto_gptq="0.7.1", optimum="1.20.0", peft="0.16.0") == GptqSoftware("unpacked")
    assert of(fms_acceleration_peft="0.4.0.dev", auto_gptq="0.7.1").kernel == "triton"


def test_a_model_of_which_no_layer_is_left() -> None:
    skipped = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
    with pytest.raises(TraceError, match="no linear layer that is not skipped"):
        trace_job(adapted(quantization__skip=skipped), CONFIGS["llama"])
