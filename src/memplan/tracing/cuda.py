"""
What PyTorch does on CUDA where it looks at the device: put in place of what it would do on meta tensors.

Attributes are changes rather than intercepted by a TorchFunctionMode, which is off inside `backward()`, where
checkpointed blocks are run again.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memplan.errors import TraceError
from memplan.tape.backends import Target
from memplan.tape.behaviour import Behaviour
from memplan.tape.scratch import foreach_norm
from memplan.tracing.quantized import HANDLERS, product_with_bytes
from memplan.tracing.recorder import Handler, Recorder, called_by_engine
from memplan.tracing.replaced import replaced
from memplan.tracing.scratch import SCRATCH
from memplan.tracing.sdpa import attention
from memplan.tracing.specs import outputs

aten = torch.ops.aten

_IN_PLACE = (
    "add",
    "mul",
    "div",
    "addcmul",
    "addcdiv",
    "lerp",
    "sqrt",
    "sub",
    "neg",
    "zero",
    "maximum",
    "copy",
)
_OUT_OF_PLACE = ("add", "mul", "div", "addcmul", "addcdiv", "lerp", "sqrt", "sub", "neg", "maximum")


# -- operations -------------------------------------------------------------------------------------------


def _foreach_in_place(_: Recorder, func: Any, args: tuple[Any, ...], __: dict[str, Any]) -> Any:
    if not args[0] or args[0][0].device.type != "meta":
        return NotImplemented
    return list(args[0]) if func._schema.returns else None


def _foreach_new(recorder: Recorder, func: Any, args: tuple[Any, ...], _: dict[str, Any]) -> Any:
    if not args[0] or args[0][0].device.type != "meta":
        return NotImplemented
    name = func._schema.name.removeprefix("aten::")
    return [recorder.new_like(tensor, name) for tensor in args[0]]


def _foreach_norms(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A scalar per tensor; the partial sums are made before and freed after."""
    tensors = args[0]
    if not tensors or tensors[0].device.type != "meta":
        return NotImplemented
    largest = max(tensor.numel() for tensor in tensors)
    partial = torch.empty(
        sum(foreach_norm(recorder.num_tensors(tensors), largest)), dtype=torch.uint8, device="meta"
    )
    recorder.adopt(partial, "workspace", "partial sums of norms")
    dtype = kwargs.get("dtype")
    return [
        recorder.new_like(tensor.as_strided((), ()), "_foreach_norm", dtype or tensor.dtype)
        for tensor in tensors
    ]


def _cudnn_forward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Its meta kernel always returns the log-sum-exp, which cuDNN leaves out where no gradient is needed."""
    if args[0].device.type != "meta" or args[4]:
        return NotImplemented
    out = list(func(*args, **kwargs))
    out[1] = None
    for tensor in out:
        if isinstance(tensor, Tensor):
            recorder.see(tensor, "_scaled_dot_product_cudnn_attention")
    return tuple(out)


def _native_dropout(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The mask is made before the output (aten/src/ATen/native/cuda/Dropout.cu, dropout_cuda)."""
    if args[0].device.type != "meta" or recorder.device_type != "meta":
        return NotImplemented
    out, mask = outputs(func, args, kwargs)
    recorder.see(mask, "native_dropout")
    recorder.see(out, "native_dropout")
    return out, mask


def _grouped_product(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    Its meta kernel takes bfloat16 only, as that of Hopper does; others run it expert by expert, into the same output
    (aten/src/ATen/native/cuda/GroupedBlas.cpp, _grouped_mm_cuda).
    """
    if args[0].device.type != "meta" or args[0].dtype == torch.bfloat16:
        return NotImplemented
    like = func(args[0].to(torch.bfloat16), args[1].to(torch.bfloat16), *args[2:], **kwargs)
    out = torch.empty_strided(like.shape, like.stride(), dtype=args[0].dtype, device="meta")
    recorder.see(out, "_grouped_mm")
    return out


_RECORD = "`memplan record` measures a few real steps of a job"


def _nonzero(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    Where positions begin anew, as far as they are known.

    Raises:
        TraceError: the values are not known, and so not how many positions there are.
    """
    if args[0].device.type != "meta":
        return NotImplemented
    known = recorder.shadows.evaluate("aten::nonzero", func, args, kwargs)
    if known is None:
        raise TraceError(
            "the step asks where a tensor is not zero (`nonzero`), which only real data tells, as experts do that are "
            "run one by one over the tokens that chose them",
            hint=f"multiply by a mask instead; {_RECORD}",
        )
    out = torch.empty_strided(known.shape, known.stride(), dtype=known.dtype, device="meta")
    recorder.see(out, "nonzero")
    recorder.shadows.attach(out, known)
    return out


def _index(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    `tensor[[0, 1]]`: a list becomes a tensor on the device before any mode sees it (python_variable_indexing.cpp,
    sequenceToVariable).

    `tensor[mask]`: a mask of bools becomes the positions where it is true, for each of its dimensions, as
    expandTensors of aten/src/ATen/native/IndexingUtils.h does it before the kernel runs. One value that is written
    where a mask is true needs no positions (TensorAdvancedIndexing.cpp, canDispatchToMaskedFill).
    """
    if args[0].device.type != "meta":
        return NotImplemented
    masks = [index for index in args[1] if isinstance(index, Tensor) and index.dtype in _MASKS]
    if not masks:
        for index in args[1]:
            if isinstance(index, Tensor):
                recorder.see(index, "index")
        return NotImplemented
    writes = func._schema.name != "aten::index"
    if writes and args[2].numel() == 1 and not any(args[3:4]):
        return NotImplemented
    with recorder:
        return func(args[0], _positions(args[1]), *args[2:], **kwargs)


_MASKS = (torch.bool, torch.uint8)


def _positions(given: Iterable[Tensor | None]) -> list[Tensor | None]:
    """
    Indices with masks as the positions where they are true.

    Raises:
        TraceError: the values of a mask are not known, and so not how many elements it selects.
    """
    indices: list[Tensor | None] = []
    for index in given:
        if isinstance(index, Tensor) and index.dtype in _MASKS:
            if not hasattr(index, "_shadow") and index.device.type != "cpu":
                raise TraceError(
                    "the step selects elements by a mask whose values only real data has",
                    hint=f"make the mask of tensors in the batch that are small, or multiply by it instead; {_RECORD}",
                )
            indices += index.nonzero().unbind(1)
        else:
            indices.append(index)
    return [None if index is None else index.to("meta") for index in indices]


def _fused_step(_: Recorder, __: Any, args: tuple[Any, ...], ___: dict[str, Any]) -> Any:
    return None if args[0][0].device.type == "meta" else NotImplemented


def _safe_softmax(recorder: Recorder, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows that are all masked are looked for, and written over in place (attention.cpp)."""
    scores = args[0]
    with recorder:
        weights = torch.softmax(scores, args[1])
        masked = scores.isneginf()
        rows = masked.all(args[1], keepdim=True)
        weights.masked_fill_(rows, 0.0)
        zero = torch.empty((), dtype=weights.dtype, device=weights.device)
        del zero, rows, masked
    return weights


def accumulation(sole_tensor: int, sole_storage: int) -> Handler:
    """
    The engine adds gradients in place where it holds the only reference, but not under a dispatch mode: there it
    calls `add` (accumulate_grad.h: tensor subclasses and modes are left to their own devices).

    Args:
        sole_tensor, sole_storage: reference counts, seen from the handler, of a gradient that only the engine holds.
    """

    def accumulate(recorder: Recorder, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or len(args) != 2 or torch.is_grad_enabled() or not isinstance(args[1], Tensor):
            return NotImplemented
        if args[0].shape != args[1].shape or not called_by_engine():
            return NotImplemented
        # The gradient that came first: the second is never added to (input_buffer.cpp, accumulate).
        tensor = args[0]
        if tensor.device.type != recorder.device_type:
            return NotImplemented
        storage_count = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
        if tensor._use_count() > sole_tensor or storage_count > sole_storage:
            return NotImplemented
        if recorder.device_type == "cpu":
            tensor.add_(args[1])
        return tensor

    return accumulate


def _in_place(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    Gradients of gathers are written into zeros in place, but not under a dispatch mode (FunctionsManual.cpp,
    index_backward and value_selecting_reduction_backward).
    """
    name = func._schema.name
    is_index = name == "aten::index_put"
    if torch.is_grad_enabled() or not called_by_engine() or (is_index and not any(args[3:4])):
        return _index(recorder, func, args, kwargs) if is_index else NotImplemented
    if is_index:
        with recorder:
            args = (args[0], _positions(args[1]), *args[2:])
    if recorder.kernel_scratch and name in SCRATCH:
        recorder.scratch(SCRATCH[name](*args, **kwargs), name.removeprefix("aten::"))
    return getattr(aten, f"{name.removeprefix('aten::')}_")(*args, **kwargs)


def handlers(sole_tensor: int, sole_storage: int) -> dict[str, Handler]:
    """By operator name, what runs instead of it on meta tensors."""
    table: dict[str, Handler] = {f"aten::_foreach_{name}_": _foreach_in_place for name in _IN_PLACE}
    table |= {f"aten::_foreach_{name}": _foreach_new for name in _OUT_OF_PLACE}
    table["aten::_foreach_norm"] = _foreach_norms
    for name in ("adamw", "adam", "sgd"):
        table[f"aten::_fused_{name}_"] = _fused_step
    table["aten::index_put"] = table["aten::scatter"] = _in_place
    table["aten::_scaled_dot_product_cudnn_attention"] = _cudnn_forward
    table["aten::_grouped_mm"] = _grouped_product
    table["aten::native_dropout"] = _native_dropout
    table["aten::nonzero"] = _nonzero
    table["aten::index"] = table["aten::_index_put_impl_"] = table["aten::index_put_"] = _index
    table["aten::_safe_softmax"] = _safe_softmax
    table |= HANDLERS
    table["aten::add"] = accumulation(sole_tensor, sole_storage)
    return table


# -- functions ---------------------------------------------------------------------------------------------


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """native_dropout keeps a mask of bools; the composite form would keep one of the input's dtype."""
    if p == 0 or not training or input.numel() == 0:
        return input
    if inplace:
        return torch.dropout_(input, p, training)
    return torch.native_dropout(input, p, True)[0]


def _softmax(input: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """float16 to float32 happens inside the kernel."""
    if input.dtype == torch.float16 and dtype == torch.float32:
        return aten._softmax(input, dim, True)
    return torch.softmax(input, dim, dtype=dtype) if dtype is not None else torch.softmax(input, dim)


def at_hand(behaviour: Behaviour) -> Behaviour:
    """As the torch at hand has it."""
    version = torch.__version__.split("+")[0].split(".")
    return replace(behaviour, torch=tuple(int(part) for part in version if part.isdigit()))


@contextlib.contextmanager
def like_device(target: Target) -> Iterator[None]:
    """Python code treats meta tensors as it treats those of the target."""
    import torch.nn.utils.clip_grad as clip_grad
    import torch.optim.optimizer as optimizer
    import torch.utils._foreach_utils as foreach_utils

    changes: list[tuple[Any, str, Any]] = [(F, "scaled_dot_product_attention", attention(target))]
    if target.device == "cuda":
        changes += [(F, "dropout", _dropout), (F, "softmax", _softmax)]
    elif "bitsandbytes" in sys.modules:
        changes.append((sys.modules["bitsandbytes"], "matmul", product_with_bytes))
    for kind in ("foreach", "fused"):
        name = f"_get_{kind}_kernels_supported_devices"
        supported = [*getattr(foreach_utils, name)(), "meta"]
        # On the CPU clipping takes the foreach kernels, and optimizers that are not told otherwise do not.
        in_loops = [optimizer] if kind == "foreach" and target.device == "cpu" else []
        for module in (foreach_utils, optimizer, clip_grad):
            if hasattr(module, name) and module not in in_loops:
                changes.append((module, name, lambda supported=supported: supported))
    with replaced(changes):
        yield
