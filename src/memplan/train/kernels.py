"""Which of torch's attention kernels may run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """
    scaled_dot_product_attention runs in the kernel that a job names, also in backward, which recomputes; `auto` leaves
    the choice to torch. A call that the kernel does not take is a RuntimeError of torch's.
    """
    if name == "auto":
        yield
        return
    with sdpa_kernel(_BACKENDS[name]):
        yield
