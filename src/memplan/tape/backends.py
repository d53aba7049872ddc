"""
Which kernel torch's scaled_dot_product_attention runs: an order by GPU and version, and what each kernel takes.

Read from aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `priority_order` and the `can_use_*` functions. The
first kernel of the order that takes a call runs it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from memplan.errors import JobError
from memplan.tape.multiprocessors import A100, Multiprocessors

TORCH = (2, 13)
"""The version that is planned for where none is named."""
LATEST = (2, 15)
"""The latest version that plans and traces were run beside (docs/tracing.md, Versions)."""
AMPERE = (8, 0)

CUDNN = {
    (2, 5): (9, 1), (2, 6): (9, 1), (2, 7): (9, 5), (2, 8): (9, 10), (2, 9): (9, 10), (2, 10): (9, 10),
    (2, 11): (9, 19), (2, 12): (9, 20), (2, 13): (9, 20), (2, 14): (9, 24), (2, 15): (9, 26),
}  # fmt: skip
"""The cuDNN that torch's wheels on PyPI require, by torch; read from their metadata. A later torch has the last."""

FLASH_FIRST = ("flash", "efficient", "math")
CUDNN_FIRST = ("cudnn", *FLASH_FIRST)


class Call(NamedTuple):
    """What the choice looks at."""

    dtype: str
    head_dim: int
    """Of queries and keys."""
    masked: bool = False
    dropout: bool = False
    grouped: bool = False
    """There are fewer key heads than query heads, and `enable_gqa` says so."""
    broadcast: bool = False
    """There are, and it does not."""
    trains: bool = True
    value_head_dim: int | None = None
    """Of values, where it is another: attention with latent heads, as DeepSeek's."""
    mask_trains: bool = False
    """The mask is an additive one that gradients are asked for, as Doge's."""

    @property
    def head_dims(self) -> tuple[int, int]:
        """Of queries and keys, and of values."""
        return self.head_dim, self.head_dim if self.value_head_dim is None else self.value_head_dim


@dataclass(frozen=True)
class Target:
    """What attention runs on, and with what; remembers the kernels that calls were given."""

    device: str = "cuda"
    """`cuda` or `cpu`."""
    compute_capability: tuple[int, int] = AMPERE
    torch: tuple[int, ...] = TORCH
    wanted: str = "auto"
    """The job's `attention_kernel`."""
    multiprocessors: Multiprocessors = A100
    kernels: set[str] = field(default_factory=set, compare=False)
    limited: set[str] = field(default_factory=set, compare=False)
    """Those of them that code chose among fewer kernels or in an order of its own, with `sdpa_kernel`."""

    @property
    def cudnn(self) -> tuple[int, int]:
        """The version of cuDNN that comes with this torch."""
        return CUDNN[max((known for known in CUDNN if known <= self.torch[:2]), default=min(CUDNN))]

    @property
    def order(self) -> tuple[str, ...]:
        """
        Kernels from the first choice to the last.

        cuDNN is first on sm90 in torch 2.5.0 (made opt-in in 2.5.1, pytorch#138522), on sm90 and sm100 in 2.9
        (pytorch#162073), and from 2.10 on where cuDNN is newer than 9.15 (pytorch#171627), which PyPI's wheels are
        from 2.11 on; `TORCH_CUDNN_SDPA_DEPRIORITIZED` turns that off.
        """
        version, (major, minor) = self.torch[:2], self.compute_capability
        if version == (2, 5):
            preferred = self.torch[2:3] == (0,) and (major, minor) == (9, 0)
        elif version == (2, 9):
            preferred = (major, minor) in ((9, 0), (10, 0))
        else:
            preferred = version >= (2, 10) and self.cudnn > (9, 15) and major in (9, 10)
        return CUDNN_FIRST if preferred else FLASH_FIRST

    def kernel_for(self, call: Call, order: tuple[str, ...] | None = None) -> str:
        """
        `flash`, `efficient`, `cudnn`, `math`, or on a CPU `flash_cpu` or `math`.

        Args:
            order: the kernels that code allows, from its first choice to its last; None: torch's own.

        Raises:
            JobError: the job names a kernel that does not take the call, or code allows none that does.
        """
        if self.wanted != "auto":
            self._check_wanted(call)
            chosen = self.wanted
        else:
            chosen = self._first(call, order)
            if order is not None:
                self.limited.add(chosen)
        if self.device == "cpu" and chosen == "flash":
            chosen = "flash_cpu"
        self.kernels.add(chosen)
        return chosen

    def _first(self, call: Call, order: tuple[str, ...] | None) -> str:
        wanted = order or (("flash", "math") if self.device == "cpu" else self.order)
        chosen = next((kernel for kernel in wanted if self.refusal(kernel, call) is None), None)
        if chosen is None:
            raise JobError(
                f"`sdpa_kernel` allows {' and '.join(wanted)} alone: {wanted[0]} {self.refusal(wanted[0], call)}",
                hint="allow `SDPBackend.MATH` too, which takes every call",
            )
        return chosen

    def refusal(self, kernel: str, call: Call) -> str | None:
        """Why a kernel does not take a call, in words that follow its name; None if it does."""
        if kernel == "math":
            return None
        if self.device == "cpu":
            return _refusal_on_cpu(kernel, call)
        check = {"flash": self._flash, "efficient": self._efficient, "cudnn": self._cudnn}[kernel]
        return check(call)

    def _check_wanted(self, call: Call) -> None:
        reason = self.refusal(self.wanted, call)
        if reason is None:
            return
        others = [kernel for kernel in CUDNN_FIRST if self.refusal(kernel, call) is None]
        raise JobError(
            f"`attention_kernel: {self.wanted}` {reason}",
            hint=f"use `--set attention_kernel=auto`, or one of {', '.join(others)}",
        )

    def _flash(self, call: Call) -> str | None:
        if call.masked:
            return "takes no mask, which padding, packing and sliding windows need"
        queries, values = call.head_dims
        if queries != values:
            return f"takes values as wide as queries, not heads of {values} and {queries}"
        return self._of_16_bits(call, limit=256) or self._backward_of_wide_heads(call) or _broadcast(call)

    def _cudnn(self, call: Call) -> str | None:
        """
        Heads up to 128, on sm90 with cuDNN 9.10 or newer up to 256, and DeepSeek's on sm100 and sm103 with cuDNN 9.11
        or newer (check_cudnn_tensor_shapes).
        """
        limit = 128
        if self.compute_capability == (9, 0) and self.cudnn >= (9, 10):
            limit = 256
        elif self.compute_capability[0] == 10 and self.cudnn >= (9, 11) and call.head_dims == (192, 128):
            limit = 192
        for head_dim in call.head_dims:
            if head_dim % 8:
                return f"takes heads of a multiple of 8, not of {head_dim}"
        return self._of_16_bits(call, limit=limit) or _broadcast(call)

    def _efficient(self, call: Call) -> str | None:
        """
        The alignment is that of `minimum_gemm_alignment`. Since torch 2.14 it takes groups of heads as well
        (pytorch#191085), which is not planned: what its backward takes for them is not known here.
        """
        half = call.dtype in ("float16", "bfloat16")
        if call.dtype == "bfloat16" and self.compute_capability < AMPERE:
            return f"takes no bfloat16 on {self.card}"
        multiple = 1
        if half and self.compute_capability >= (7, 0):
            multiple = 8
        elif self.compute_capability >= AMPERE:
            multiple = 4
        for head_dim in call.head_dims:
            if head_dim % multiple:
                return f"takes heads of a multiple of {multiple}, not of {head_dim}"
        if call.grouped:
            return "takes no groups of query heads per key head"
        return _broadcast(call)

    def _of_16_bits(self, call: Call, *, limit: int) -> str | None:
        if self.compute_capability < AMPERE:
            return f"needs sm80 or newer, and this is {self.card}"
        if call.dtype not in ("float16", "bfloat16"):
            return f"takes float16 and bfloat16, and attention runs in {call.dtype}"
        if max(call.head_dims) > limit:
            return f"takes heads of up to {limit} on {self.card}, not of {max(call.head_dims)}"
        return None

    def _backward_of_wide_heads(self, call: Call) -> str | None:
        major, minor = self.compute_capability
        narrow = (major == 8 and minor >= 6) or major == 12
        if narrow and call.trains and (192 < call.head_dim <= 224 or (call.head_dim > 224 and call.dropout)):
            return f"has no backward for heads of {call.head_dim} on {self.card}"
        return None

    @property
    def card(self) -> str:
        """
        As the compiler names it.

        >>> Target(compute_capability=(9, 0)).card
        'sm90'
        """
        return "sm{}{}".format(*self.compute_capability)

    def notes(self, *, is_known: bool) -> tuple[str, ...]:
        """
        What a person should know of the kernels that ran.

        Args:
            is_known: the job names a card that is in the catalogue.
        """
        if self.device == "cpu" or not self.kernels:
            return ()
        names = " and ".join(sorted(self.kernels))
        version = ".".join(map(str, self.torch[:2]))
        where = self.card if is_known else f"{self.card}, as no GPU with a known one is named"
        why = f"torch {version}'s choice on {where}"
        if self.wanted != "auto":
            why = "as `attention_kernel` says"
        elif self.limited == self.kernels:
            why = "as `sdpa_kernel` says"
        notes = [f"attention runs torch's {names} kernel, {why}"]
        if "cudnn" in self.kernels:
            notes.append(
                "what cuDNN's attention takes inside is counted as far as its open frontend says, and not measured: "
                "what its plans add is not public"
            )
        return tuple(notes)


def later_than(known: tuple[int, int], version: str | None) -> bool:
    """
    Whether a version is of a later release than `known`; None is not.

    >>> later_than((2, 13), "2.13.1+cpu"), later_than((2, 13), "2.14.0a0"), later_than((2, 13), None)
    (False, True, False)
    """
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) > known


def beyond_plans(installed: str | None) -> str | None:
    """What a torch later than the one that is planned for means, in words that follow its name; None if it is not."""
    if later_than(LATEST, installed):
        return f"which memplan was never run beside; {LATEST[0]}.{LATEST[1]} is the latest that it was"
    if later_than(TORCH, installed):
        return (
            "which is known not to do all on a GPU as it is planned: cuBLAS's workspaces, groups of heads in the "
            "memory-efficient kernel"
        )
    return None


def _broadcast(call: Call) -> str | None:
    return "takes no broadcast of key heads" if call.broadcast else None


def _refusal_on_cpu(kernel: str, call: Call) -> str | None:
    """torch's kernel for CPUs is a flash kernel for all dtypes (sdp_utils_cpp.cpp)."""
    if kernel != "flash":
        return "has no kernel for CPUs"
    queries, values = call.head_dims
    if queries != values:
        return f"takes values as wide as queries on CPUs, not heads of {values} and {queries}"
    if call.mask_trains:
        return "has no gradient of masks on CPUs"
    return "takes no dropout on CPUs" if call.dropout else _broadcast(call)
