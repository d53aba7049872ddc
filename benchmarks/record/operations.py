"""
Operations whose scratch memory a plan must know, with the shapes at which it is asked for.

Each case makes its inputs when its turn comes, and returns what runs; a result that requires a gradient gets a
backward pass too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[], Any]
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    group: str
    shape: dict[str, Any]
    make: Callable[[], Run]
    """Makes the inputs and returns the operation on them."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the cases; `SMALL` is for tests on the CPU."""

    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    batches: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    """(query heads, key heads)"""
    width: int
    vocabulary: int
    token_counts: tuple[int, ...]
    num_experts: int
    num_parameters: int
    """Matrices of width x width that an optimizer steps."""
    dtype: torch.dtype
    """Of what trains; float32 is asked about beside it."""


GPU = Scale(
    lengths=(1536, 4096, 8192),
    head_dims=(64, 128, 256),
    batches=(1, 2),
    heads=((32, 8), (16, 16)),
    width=4096,
    vocabulary=128256,
    token_counts=(2048, 3072, 3073, 8192),
    num_experts=128,
    num_parameters=8,
    dtype=torch.bfloat16,
)
SMALL = Scale(
    lengths=(16,),
    head_dims=(8,),
    batches=(1,),
    heads=((4, 2),),
    width=32,
    vocabulary=64,
    token_counts=(24,),
    num_experts=4,
    num_parameters=2,
    dtype=torch.float32,
)
LONGEST_MATH = 4096
"""Longest sequence for attention that holds its scores."""


def cases(device: torch.device, scale: Scale) -> Iterator[Case]:
    """All cases, the cheapest and most telling first."""
    for group in (
        _matmuls,
        _attention,
        _softmax,
        _losses,
        _lookups,
        _norms,
        _optimizers,
        _experts,
        _sorting,
        _four_bit,
    ):
        yield from group(device, scale)


def choices(device: torch.device, scale: Scale) -> Iterator[dict[str, Any]]:
    """Which kernel scaled_dot_product_attention takes, by dtype, mask, head size, grouping and length."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    masks = ("causal", "none", "bool", "float")
    head_dims = (*scale.head_dims, 96) if scale is GPU else scale.head_dims
    lengths = (512, *scale.lengths) if scale is GPU else scale.lengths
    names = {value.value: name for name, value in torch.nn.attention.SDPBackend.__members__.items()}
    for dtype, mask, head_dim, grouped, length, training in product(
        dtypes, masks, head_dims, (False, True), lengths, (False, True)
    ):
        shape = {
            "dtype": _name(dtype), "mask": mask, "head_dim": head_dim, "grouped": grouped, "length": length,
            "training": training,
        }  # fmt: skip
        try:
            heads, key_heads = scale.heads[0]
            query = torch.empty(
                1, heads, length, head_dim, dtype=dtype, device=device, requires_grad=training
            )
            key = torch.empty(
                1, key_heads if grouped else heads, length, head_dim, dtype=dtype, device=device
            )
            chosen = torch._fused_sdp_choice(
                query, key, key, _mask(mask, length, dtype, device), 0.0, mask == "causal", enable_gqa=grouped
            )
            yield {**shape, "chosen": names.get(chosen, str(chosen))}
        except Exception as error:
            yield {**shape, "error": str(error).splitlines()[0]}


def _mask(kind: str, length: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if kind == "bool":
        return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    return torch.zeros(1, 1, length, length, dtype=dtype, device=device) if kind == "float" else None


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_(grad)


def _matmuls(device: torch.device, scale: Scale) -> Iterator[Case]:
    """The first use of cuBLAS in the main thread and in autograd's takes a workspace in each."""

    def linear(dtype: torch.dtype, bias: bool) -> Run:
        x = _random((scale.token_counts[0], scale.width), dtype, device)
        weight = _random((scale.width, scale.width), dtype, device)
        offset = _random((scale.width,), dtype, device) if bias else None
        return lambda: F.linear(x, weight, offset)

    def batched(dtype: torch.dtype) -> Run:
        x = _random((8, scale.width, scale.head_dims[0]), dtype, device)
        return lambda: x @ x.transpose(1, 2)

    for repeat, dtype, bias in product((1, 2), _dtypes(scale), (False, True)):
        yield Case(
            "linear",
            {"repeat": repeat, "dtype": _name(dtype), "bias": bias},
            lambda d=dtype, b=bias: linear(d, b),
        )
    for dtype in _dtypes(scale):
        yield Case("bmm", {"dtype": _name(dtype)}, lambda d=dtype: batched(d))


def _attention(device: torch.device, scale: Scale) -> Iterator[Case]:
    for backend, batch, heads, head_dim, length in product(
        BACKENDS, scale.batches, scale.heads, scale.head_dims, scale.lengths
    ):
        if backend == "MATH" and length > LONGEST_MATH:
            continue
        for mask in ("causal",) if backend == "FLASH_ATTENTION" else ("causal", "bool"):
            shape = {
                "backend": backend, "batch": batch, "heads": heads[0], "key_heads": heads[1], "head_dim": head_dim,
                "length": length, "mask": mask,
            }  # fmt: skip
            yield Case("attention", shape, lambda s=shape: _attend(s, device, scale))


def _attend(shape: dict[str, Any], device: torch.device, scale: Scale) -> Run:
    batch, length, head_dim = shape["batch"], shape["length"], shape["head_dim"]
    query = _random((batch, shape["heads"], length, head_dim), scale.dtype, device)
    keys = [_random((batch, shape["key_heads"], length, head_dim), scale.dtype, device) for _ in range(2)]
    mask = _mask(shape["mask"], length, scale.dtype, device)
    backend = getattr(torch.nn.attention.SDPBackend, shape["backend"])

    def run() -> Tensor:
        with torch.nn.attention.sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(
                query,
                *keys,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=shape["heads"] != shape["key_heads"],
            )

    return run


def _softmax(device: torch.device, scale: Scale) -> Iterator[Case]:
    def softmax(length: int, dtype: torch.dtype) -> Run:
        x = _random((1, scale.heads[0][0], length, length), dtype, device)
        return lambda: F.softmax(x, dim=-1, dtype=torch.float32)

    for dtype in (*_dtypes(scale), torch.float16):
        length = scale.lengths[0]
        shape = {"length": length, "heads": scale.heads[0][0], "dtype": _name(dtype)}
        yield Case("softmax", shape, lambda n=length, d=dtype: softmax(n, d))


def _losses(device: torch.device, scale: Scale) -> Iterator[Case]:
    def cross_entropy(tokens: int, dtype: torch.dtype) -> Run:
        logits = _random((tokens, scale.vocabulary), dtype, device)
        labels = torch.randint(scale.vocabulary, (tokens,), device=device)
        return lambda: F.cross_entropy(logits, labels, reduction="sum")

    for dtype in _dtypes(scale):
        shape = {"tokens": scale.token_counts[0], "vocabulary": scale.vocabulary, "dtype": _name(dtype)}
        yield Case("cross_entropy", shape, lambda n=scale.token_counts[0], d=dtype: cross_entropy(n, d))


def _lookups(device: torch.device, scale: Scale) -> Iterator[Case]:
    def embedding(tokens: int) -> Run:
        weight = _random((scale.vocabulary, scale.width), scale.dtype, device)
        ids = torch.randint(scale.vocabulary, (1, tokens), device=device)
        return lambda: F.embedding(ids, weight)

    def index(tokens: int) -> Run:
        x = _random((tokens, scale.width), scale.dtype, device)
        rows = torch.randint(tokens, (8 * tokens,), device=device)
        return lambda: x[rows]

    def index_add(tokens: int) -> Run:
        x = _random((8 * tokens, scale.width), scale.dtype, device)
        rows = torch.randint(tokens, (8 * tokens,), device=device)
        return lambda: torch.zeros(tokens, scale.width, dtype=x.dtype, device=device).index_add(0, rows, x)

    for tokens in scale.token_counts:
        shape = {"tokens": tokens, "width": scale.width}
        yield Case("embedding", {**shape, "vocabulary": scale.vocabulary}, lambda n=tokens: embedding(n))
    for name, make in (("index", index), ("index_add", index_add)):
        shape = {"tokens": scale.token_counts[0], "rows": 8 * scale.token_counts[0], "width": scale.width}
        yield Case(name, shape, lambda m=make: m(scale.token_counts[0]))


def _norms(device: torch.device, scale: Scale) -> Iterator[Case]:
    def layer_norm(dtype: torch.dtype) -> Run:
        x = _random((scale.token_counts[-1], scale.width), dtype, device)
        weight, bias = (_random((scale.width,), dtype, device) for _ in range(2))
        return lambda: F.layer_norm(x, (scale.width,), weight, bias)

    def reduction(dim: int) -> Run:
        x = _random((scale.token_counts[-1], scale.width), scale.dtype, device)
        return lambda: x.sum(dim)

    def clip(foreach: bool) -> Run:
        parameters = _parameters(device, scale)
        return lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=foreach)

    for dtype in _dtypes(scale):
        shape = {"tokens": scale.token_counts[-1], "width": scale.width, "dtype": _name(dtype)}
        yield Case("layer_norm", shape, lambda d=dtype: layer_norm(d))
    for dim in (0, 1):
        yield Case(
            "sum",
            {"dim": dim, "tokens": scale.token_counts[-1], "width": scale.width},
            lambda d=dim: reduction(d),
        )
    for foreach in (True, False):
        shape = {"foreach": foreach, "parameters": scale.num_parameters, "width": scale.width}
        yield Case("clip_grad_norm", shape, lambda f=foreach: clip(f))


def _parameters(device: torch.device, scale: Scale) -> list[torch.nn.Parameter]:
    """Matrices with gradients, and as many vectors."""
    shapes = [(scale.width, scale.width), (scale.width,)] * scale.num_parameters
    parameters = [
        torch.nn.Parameter(torch.zeros(shape, dtype=scale.dtype, device=device)) for shape in shapes
    ]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def _optimizers(device: torch.device, scale: Scale) -> Iterator[Case]:
    kernels = {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "loop": {"foreach": False, "fused": False},
    }

    def step(name: str, options: dict[str, bool], count: int) -> Run:
        optimizer = getattr(torch.optim, name)(_parameters(device, scale), lr=1e-4, **options)
        for _ in range(count - 1):
            optimizer.step()
        return lambda: optimizer.step()

    for name, kernel, count in product(("AdamW", "SGD", "Adafactor"), kernels, (1, 2)):
        if (name, kernel) != ("Adafactor", "fused"):
            options = {"foreach": kernel == "foreach"} if name == "Adafactor" else kernels[kernel]
            shape = {"optimizer": name, "kernel": kernel, "step": count, "parameters": scale.num_parameters}
            yield Case("optimizer", shape, lambda n=name, o=options, c=count: step(n, o, c))


def _experts(device: torch.device, scale: Scale) -> Iterator[Case]:
    def grouped(tokens: int) -> Run:
        inner = scale.width // 4
        x = _random((tokens, scale.width), scale.dtype, device)
        weight = _random((scale.num_experts, scale.width, inner), scale.dtype, device)
        share = tokens // scale.num_experts
        ends = torch.arange(share, tokens + 1, share, dtype=torch.int32, device=device)
        return lambda: torch._grouped_mm(x, weight, offs=ends)

    tokens = 8 * scale.token_counts[0]
    yield Case("grouped_mm", {"tokens": tokens, "experts": scale.num_experts}, lambda: grouped(tokens))


def _sorting(device: torch.device, scale: Scale) -> Iterator[Case]:
    count = 8 * scale.token_counts[-1]
    functions: dict[str, Callable[[Tensor], Any]] = {
        "sort": lambda x: x.sort(),
        "argsort": lambda x: x.argsort(),
        "cumsum": lambda x: x.cumsum(0),
        "histc": lambda x: x.float().histc(scale.num_experts, 0, scale.num_experts - 1),
        "bincount": lambda x: x.bincount(minlength=scale.num_experts),
    }
    for name, function in functions.items():

        def make(function: Callable[[Tensor], Any] = function) -> Run:
            x = torch.randint(scale.num_experts, (count,), device=device)
            return lambda: function(x)

        yield Case(name, {"elements": count}, make)

    def topk() -> Run:
        x = _random((scale.token_counts[-1], scale.num_experts), torch.float32, device)
        return lambda: x.topk(min(8, scale.num_experts), dim=-1)[0]

    yield Case("topk", {"tokens": scale.token_counts[-1], "experts": scale.num_experts}, topk)


def _four_bit(device: torch.device, scale: Scale) -> Iterator[Case]:
    """bitsandbytes' 4-bit linear layer, and its dequantisation alone; without the package the case is its error."""

    def linear(double_quant: bool) -> Run:
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(
            scale.width, scale.width, bias=False, compute_dtype=scale.dtype,
            compress_statistics=double_quant, quant_type="nf4",
        ).to(device)  # fmt: skip
        x = _random((scale.token_counts[0], scale.width), scale.dtype, device)
        return lambda: layer(x)

    def dequantise(double_quant: bool) -> Run:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = torch.randn(scale.width, scale.width, dtype=scale.dtype, device=device)
        packed, state = quantize_4bit(weight, compress_statistics=double_quant, quant_type="nf4")
        return lambda: dequantize_4bit(packed, state)

    for name, make in (("linear_4bit", linear), ("dequantize_4bit", dequantise)):
        for double_quant in (True, False):
            shape = {"width": scale.width, "double_quant": double_quant}
            yield Case(name, shape, lambda m=make, d=double_quant: m(d))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(scale: Scale) -> list[torch.dtype]:
    return list(dict.fromkeys((scale.dtype, torch.float32)))
