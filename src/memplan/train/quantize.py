"""
A base in 4 or 8 bits: bitsandbytes' linear layers, packed one by one as their weights arrive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from logging import ERROR, getLogger
from typing import Any

import torch
from torch import Tensor, nn

from memplan.errors import RunError
from memplan.job.spec import Job
from memplan.tape.packing import bits

# On CPUs with bfloat16 instructions, bitsandbytes asks for a package that only inference would use. Of inputs that are
# no float16 it says in every product that they are cast.
for module in ("backends.cpu.ops", "autograd._functions"):
    getLogger(f"bitsandbytes.{module}").setLevel(ERROR)

import bitsandbytes  # noqa: E402

OUTLIER_THRESHOLD = 6.0
"""Columns of an input with a value from here on are multiplied in 16 bits: `llm_int8_threshold` of transformers."""


class PackedLinear(bitsandbytes.nn.Linear4bit):
    """
    A 4-bit linear layer that is made without memory, its weight in the packed shape at once, so that FSDP can shard
    it before it is loaded.

    Args:
        linear: the layer that it takes the place of, one of those that `takes` knows; its bias is kept.
        quantization_type: `nf4` or `fp4`.
        compute_dtype: of the product, and of the weight before it is packed.
        storage_dtype: of the tensor that holds the packed weight.
    """

    bits = 4

    def __init__(
        self,
        linear: Any,
        *,
        quantization_type: str,
        double_quant: bool,
        compute_dtype: torch.dtype,
        storage_dtype: torch.dtype,
    ) -> None:
        self.is_transposed = _is_conv1d(linear)
        in_features, out_features = linear.weight.shape if self.is_transposed else linear.weight.shape[::-1]
        super().__init__(
            in_features,
            out_features,
            bias=False,
            compute_dtype=compute_dtype,
            compress_statistics=double_quant,
            quant_type=quantization_type,
            quant_storage=storage_dtype,
            device="meta",
        )
        self.bias = linear.bias
        self.weight_dtype = compute_dtype
        # Kept here: a sharded weight does not say how it was packed.
        self._packing = {"compress_statistics": double_quant, "quant_type": quantization_type}
        # Some CPUs have kernels of their own for inference. They repack the weight in eval mode, which changes the
        # result and destroys a sharded weight.
        self.support_avx512bf16_for_cpu = False
        self.is_probed = False
        """Whether packing remembers what the layer computes then, for `check_sharded`."""
        self.expected: Tensor | None = None
        num_values = in_features * out_features
        rows = -(-num_values // (2 * storage_dtype.itemsize))
        self.weight = self._parameter(torch.empty((rows, 1), dtype=storage_dtype, device="meta"), None)

    @property
    def weight_shape(self) -> torch.Size:
        """Of the weight before it is packed, as the model and its checkpoints have it."""
        shape = self.out_features, self.in_features
        return torch.Size(shape[::-1] if self.is_transposed else shape)

    def pack_weight(self, weight: Tensor) -> Tensor:
        """
        The packed form of a weight of `weight_shape`, on the device that it is on. The layer keeps the constants of its
        blocks. That of a Conv1D is transposed first, as transformers does it (integrations/bitsandbytes.py).
        """
        if self.is_transposed:
            weight = weight.T.contiguous()
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, quant_storage=self.quant_storage, **self._packing
        )
        self.quant_state = state
        parameter = self._parameter(packed, state)
        if self.is_probed:
            self.expected = self._probe(parameter)
        return parameter

    def gives_expected(self) -> bool:
        """Whether the weight as it is now, gathered, computes what it did when it was packed, bit for bit."""
        assert self.expected is not None
        return torch.equal(self._probe(self.weight), self.expected)

    def _probe(self, weight: Tensor) -> Tensor:
        """Output (1, out) of the layer without its bias for a fixed input."""
        x = torch.linspace(-1, 1, self.in_features, device=weight.device).to(self.compute_dtype)[None]
        with torch.no_grad():
            output: Tensor = bitsandbytes.matmul_4bit(x, weight, quant_state=self.quant_state)
        return output

    def _parameter(self, data: Tensor, state: Any) -> Tensor:
        parameter: Tensor = bitsandbytes.nn.Params4bit(
            data,
            requires_grad=False,
            quant_state=state,
            quant_storage=self.quant_storage,
            module=self,
            bnb_quantized=True,
            **self._packing,
        )
        return parameter


class PackedLinear8bit(bitsandbytes.nn.Linear8bitLt):
    """
    A linear layer of LLM.int8(), made without memory.

    Args:
        linear: the layer that it takes the place of, one of those that `takes` knows; its bias is kept.
        weight_dtype: of the weight before it is packed.
    """

    bits = 8

    def __init__(self, linear: Any, *, weight_dtype: torch.dtype) -> None:
        self.is_transposed = _is_conv1d(linear)
        in_features, out_features = linear.weight.shape if self.is_transposed else linear.weight.shape[::-1]
        super().__init__(
            in_features,
            out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=OUTLIER_THRESHOLD,
            device="meta",
        )
        self.bias = linear.bias
        self.weight_dtype = weight_dtype

    @property
    def weight_shape(self) -> torch.Size:
        """Of the weight before it is packed, as the model and its checkpoints have it."""
        shape = self.out_features, self.in_features
        return torch.Size(shape[::-1] if self.is_transposed else shape)

    def pack_weight(self, weight: Tensor) -> Tensor:
        """
        The packed form of a weight of `weight_shape`, on the device that it is on, with a constant for every row. As
        transformers does it, from a float16 copy in the order of a linear layer's weight.
        """
        if self.is_transposed:
            weight = weight.T
        half = weight.to(torch.float16, copy=True, memory_format=torch.contiguous_format)
        packed, constants, _ = bitsandbytes.functional.int8_vectorwise_quant(half)
        parameter: Tensor = bitsandbytes.nn.Int8Params(
            packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=constants
        )
        return parameter


def takes(module: nn.Module) -> bool:
    """
    Whether a layer can be packed: torch's linear layer, transformers' Conv1D, and Falcon's own linear layer, which
    computes the same. Other subclasses, such as routers, return something else.
    """
    return type(module) is nn.Linear or _is_conv1d(module) or type(module).__name__ == "FalconLinear"


def _is_conv1d(module: nn.Module) -> bool:
    """A linear layer of GPT-2, whose weight is (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def replace_linears(model: Any, job: Job) -> None:
    """
    Put a `PackedLinear`, or one of 8 bits, in the place of every linear layer of a model on the meta device, but those
    that `quantization.skip` names and a head tied to the embeddings.

    Raises:
        RunError: there is none to replace.
    """
    tied = id(model.get_input_embeddings().weight)
    replaced = 0
    for name, module in list(model.named_modules()):
        skipped = any(name == skip or name.endswith(f".{skip}") for skip in job.quantization.skip)
        if not takes(module) or skipped or id(module.weight) == tied:
            continue
        model.set_submodule(name, _packed(module, job))
        replaced += 1
    if not replaced:
        raise RunError(
            f"no layer of `{job.model}` can be stored in {bits(job)} bits: it has no linear layer that is not skipped",
            hint="use `--set method=lora`, or check `quantization.skip`",
        )
    setattr(model, f"is_loaded_in_{bits(job)}bit", True)  # where peft looks


def _packed(linear: nn.Module, job: Job) -> PackedLinear | PackedLinear8bit:
    """The layer, without its weight."""
    dtype = getattr(torch, job.dtype)
    if job.has_8bit_base:
        return PackedLinear8bit(linear, weight_dtype=dtype)
    return PackedLinear(
        linear,
        quantization_type=job.quantization.type,
        double_quant=job.quantization.double_quant,
        compute_dtype=dtype,
        storage_dtype=storage_dtype(job),
    )


def probe_layers(model: nn.Module) -> None:
    """Let one layer of every distinct shape remember what it computes when it is packed, for `check_sharded`."""
    for layer in _of_distinct_shapes(model):
        layer.is_probed = True


def _of_distinct_shapes(model: nn.Module) -> list[PackedLinear]:
    first: dict[tuple[int, int], PackedLinear] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            first.setdefault((module.in_features, module.out_features), module)
    return list(first.values())


def check_sharded(model: nn.Module) -> None:
    """
    Run the probed layers with their weights gathered from all ranks, and compare with what they computed when they were
    packed. FSDP casts what it takes for numbers before it sends them, which would destroy packed weights without a
    word.

    Args:
        model: the root that `fully_shard` was applied to last.

    Raises:
        RunError: a result is not the same, bit for bit.
    """
    probed = [layer for layer in _of_distinct_shapes(model) if layer.expected is not None]
    for unit, layer in _units_of(model, probed):
        unit.unshard()
        same = layer.gives_expected()
        unit.reshard()
        layer.expected = None
        if not same:
            raise RunError(
                f"a 4-bit layer of {layer.out_features} x {layer.in_features} computes something else when its weight "
                "is sharded: the installed torch changes packed weights on the way",
                hint="install torch 2.13 or later, or use `--set parallel.strategy=NO_SHARD`",
            )


def checked_units(model: nn.Module) -> Iterator[tuple[Any, PackedLinear]]:
    """What `check_sharded` gathers, one after the other, if the layers were probed: units, and the layers in them."""
    return _units_of(model, _of_distinct_shapes(model))


def _units_of(
    module: nn.Module, layers: Collection[nn.Module], unit: Any = None
) -> Iterator[tuple[Any, Any]]:
    """(unit, layer) for those of the layers that are inside a module, where `unit` gathers what is outside its own."""
    from torch.distributed.fsdp import FSDPModule

    unit = module if isinstance(module, FSDPModule) else unit
    if module in layers:
        yield unit, module
    for child in module.children():
        yield from _units_of(child, layers, unit)


def storage_dtype(job: Job) -> torch.dtype:
    """
    dtype of the tensors that hold packed weights: bytes, where FSDP leaves bytes alone (torch 2.13); before that the
    dtype that FSDP casts parameters to, so that it has nothing to cast. In other loops it is what the job says.
    """
    if job.loop != "memplan":
        return getattr(torch, job.quantization.storage)
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return torch.uint8 if (major, minor) >= (2, 13) else getattr(torch, job.autocast or job.dtype)


def prepare_kbit(model: nn.Module) -> None:
    """
    What peft's prepare_model_for_kbit_training does to the weights: every frozen 16-bit one becomes float32, one by
    one.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            if isinstance(parameter, bitsandbytes.nn.Params4bit):
                continue
            parameter.data = parameter.data.to(torch.float32)
