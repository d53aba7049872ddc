"""How bitsandbytes packs weights into 4 or 8 bits, on the device (bitsandbytes/functional.py)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from memplan.errors import JobError
from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.model.families import layout
from memplan.model.families.layout import Module
from memplan.tape.graph import Graph
from memplan.tape.tensors import ITEMSIZE, Parameter, Shape, Tensor

DYNAMIC_MAP_BYTES = 256 * 4
"""The 256 values of 8-bit constants, in float32: one table of the process, of which every state keeps a copy."""


def packs(job: Job, path: str) -> bool:
    """Whether the weight of a linear layer is quantised."""
    skipped = any(path == skip or path.endswith(f".{skip}") for skip in job.quantization.skip)
    return job.has_quantized_base and not skipped


def refuse_left_in_16_bits(job: Job, family: str) -> None:
    """
    Refuse a base that transformers' own loading does not quantise: since 5.5 it asks for `type(module) is nn.Linear`
    (integrations/bitsandbytes.py, replace_with_bnb_linear), and Falcon's layers are of a subclass. It warns that it
    found none, and goes on with 16 bits.

    Args:
        family: the model's `model_type`.

    Raises:
        JobError: with what packs them.
    """
    if job.has_quantized_base and job.loop != "memplan" and family == "falcon":
        raise JobError(
            f"transformers leaves the linear layers of `{job.model}` in 16 bits when it loads the model in "
            f"{bits(job)} (they are `FalconLinear`), so that `loop: {job.loop}` trains no {bits(job)}-bit base",
            hint="use `--set loop=memplan`, whose trainer packs them, or `--set method=lora` for what is trained",
        )


def packs_module(job: Job, module: Module) -> bool:
    """As `packs`, of a module of the layout."""
    roles = ("linear",) if job.has_gptq_base else ("linear", "head")
    return module.role in roles and packs(job, module.name)


def expected_bytes(job: Job, module: Module) -> int | None:
    """Of the weight of a module as `from_pretrained` counts it; None where it is not packed."""
    return prod(module.shape) * bits(job) // 8 if packs_module(job, module) else None


def num_packed(job: Job, architecture: Architecture) -> int:
    """Elements of all weights that are quantised; a tied head is the embedding, which is not."""
    modules = layout(architecture)
    outside = modules.after[:-1] if architecture.tie_word_embeddings else modules.after
    in_block, after = (
        sum(prod(module.shape) for module in part if packs_module(job, module))
        for part in (modules.block, outside)
    )
    return architecture.num_hidden_layers * in_block + after


def bits(job: Job) -> int:
    """Per element of a quantised base."""
    return 8 if job.quantization.type == "int8" else 4


def packed_bytes(num_elements: int) -> int:
    """Of 4 bits: two elements to a byte."""
    return -(-num_elements // 2)


def packed_form(job: Job, num_elements: int, torch: tuple[int, ...]) -> tuple[int, str]:
    """
    How many elements of which dtype a packed weight has. 4 bits are in what FSDP shards: in memplan's own loop bytes,
    which FSDP2 leaves alone since torch 2.13; before, the dtype that it casts parameters to (train/quantize.py,
    storage_dtype). In other loops it is what the job says.
    """
    if job.has_8bit_base:
        return num_elements, "int8"
    dtype = job.quantization.storage
    if job.loop == "memplan":
        dtype = "uint8" if torch >= (2, 13) else job.autocast or job.dtype
    return -(-num_elements // (2 * ITEMSIZE[dtype])), dtype


def make_map(g: Graph, job: Job) -> None:
    """bitsandbytes makes one when it packs the first weight, and keeps it."""
    if job.has_quantized_base and job.quantization.type in ("nf4", "fp4") and job.quantization.double_quant:
        g.persistent.append(
            g.storage(DYNAMIC_MAP_BYTES, "bitsandbytes' map of constants", category="quant_state")
        )


def pack(
    g: Graph, job: Job, name: str, shape: Shape, *, transposed: bool = False, on_device: bool = True,
    keeps_packed: bool = True,
) -> list[Tensor]:  # fmt: skip
    """
    Quantise a weight: it is there in the job's dtype until its packed form is.

    Args:
        transposed: that of a Conv1D, which is transposed first, into a copy.
        on_device: false where that happens on the host.
        keeps_packed: false where the constants alone come to the device.

    Returns:
        What stays: the packed weight, if it is on the device, and the constants of blocks of 64, with double
        quantisation in 8 bits, with constants of blocks of 256 of those.
    """
    if job.has_8bit_base:
        return _pack_bytes(g, job, name, shape, num_rows=shape[-1] if transposed else shape[0])
    num_elements = prod(shape)
    weight = g.new(shape, job.dtype, f"{name}.weight before packing", "workspace") if on_device else None
    copy = (
        g.new(shape, job.dtype, f"{name}.weight transposed", "workspace")
        if transposed and on_device
        else None
    )
    if g.device == "cpu":
        scratch = cpu_packing_scratch(num_elements, job.dtype, job.quantization.type)
        g.scratch(*scratch, name=f"{name} being packed")
    blocks = -(-num_elements // 64)
    kept: list[Tensor] = []

    def keep(num_bytes: int, part: str) -> None:
        kept.append(g.new((num_bytes,), "uint8", f"{name} {part}", "quant_state"))

    constants = g.new((blocks,), "float32", f"{name} absmax", "quant_state")
    if keeps_packed:
        kept.append(g.new((packed_bytes(num_elements),), "uint8", f"{name} packed weight", "weights"))
    keep(16 * 4, "code")
    g.scratch(16 * 4, 4, name=f"{name} largest value of the code")
    if not job.quantization.double_quant:
        del copy
        return [*kept, constants]
    keep(4, "offset")
    difference = g.new((blocks,), "float32", f"{name} absmax less offset", "workspace")
    keep(-(-blocks // 256) * 4, "absmax of absmax")
    keep(blocks, "absmax in 8 bits")
    keep(DYNAMIC_MAP_BYTES, "code of absmax")
    del difference, constants, copy, weight
    return kept


def take_packed(
    g: Graph, job: Job, name: str, shape: Shape, *, num_rows: int, keeps_packed: bool = True
) -> list[Tensor]:
    """
    As `pack`, of a weight that the checkpoint stores packed, of 4 bits with a table of codes for each
    (bitsandbytes/nn/modules.py, Params4bit.from_prequantized).
    """
    num_elements = prod(shape)
    if job.has_8bit_base:
        scales = g.new((num_rows,), "float32", f"{name} scales of rows", "quant_state")
        return [g.new(shape, "int8", f"{name} packed weight", "weights"), scales]
    blocks = -(-num_elements // 64)
    double = job.quantization.double_quant
    sizes = {"packed weight": packed_bytes(num_elements)} if keeps_packed else {}
    sizes |= {"absmax in 8 bits": blocks} if double else {"absmax": blocks * 4}
    sizes["code"] = 16 * 4
    if double:
        sizes |= {"absmax of absmax": -(-blocks // 256) * 4, "code of absmax": DYNAMIC_MAP_BYTES, "offset": 4}
    return [
        g.new(
            (num_bytes,), "uint8", f"{name} {part}", "weights" if part == "packed weight" else "quant_state"
        )
        for part, num_bytes in sizes.items()
    ]


def _pack_bytes(g: Graph, job: Job, name: str, shape: Shape, *, num_rows: int) -> list[Tensor]:
    """
    int8_vectorwise_quant of a float16 copy, which transformers brings from the host (integrations/bitsandbytes.py,
    Bnb8bitQuantize) and memplan makes on the device: what stays is a byte per element and a constant per row.
    """
    weight = g.new(shape, job.dtype, f"{name}.weight before packing", "workspace")
    half = g.new(shape, "float16", f"{name}.weight in float16", "workspace")
    if (
        g.device == "cpu"
    ):  # written in torch operations (backends/default/ops.py): scaled and rounded in float32
        g.scratch(*[prod(shape) * 4] * 2, name=f"{name} being packed")
    constants = g.new((num_rows,), "float32", f"{name} scales of rows", "quant_state")
    packed = g.new(shape, "int8", f"{name} packed weight", "weights")
    del half, weight
    return [packed, constants]


def cpu_packing_scratch(num_elements: int, dtype: str, quantization_type: str) -> list[int]:
    """
    Bytes of what is alive at once, beside the weight, while bitsandbytes packs it on the CPU: there quantize_4bit is
    written in torch operations (bitsandbytes/backends/default/ops.py). On CUDA it is one kernel.
    """
    n = num_elements
    constants, scaled, index = -(-n // 64) * 4, n * 4, n * 4
    float_copy = 0 if dtype == "float32" else n * 4
    if quantization_type == "fp4":
        # Its codes are not in order: indices are looked up, as int64, in a table.
        return [constants, float_copy, scaled, index, n * 8, n * 8]
    return [constants, float_copy, scaled, index, n, packed_bytes(n), packed_bytes(n)]


def prepare_kbit(g: Graph, base: Sequence[Parameter], *, casts_back: bool) -> None:
    """
    peft's prepare_model_for_kbit_training: every parameter that is not packed becomes float32, one by one.

    `casts_back`: embedding and head then become bfloat16 (Behaviour.casts_embedding_back).
    """
    g.begin("kbit")
    for parameter in base:
        _recast(g, parameter, "float32")
    for parameter in base:
        if casts_back and parameter.layer is None and len(parameter.shape) > 1:
            _recast(g, parameter, "bfloat16")


def _recast(g: Graph, parameter: Parameter, dtype: str) -> None:
    """`parameter.data = parameter.data.to(dtype)`"""
    if parameter.dtype != dtype:
        g.enter(parameter.layer)
        parameter.storage = g.new(parameter.shape, dtype, parameter.name, "weights").storage
        parameter.dtype = parameter.stored_dtype = dtype
