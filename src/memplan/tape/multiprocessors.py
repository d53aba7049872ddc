"""How much of a kernel a card runs at once, which decides how many parts some kernels cut their work into."""

from __future__ import annotations

from typing import NamedTuple

FULL_CHIPS = {
    (7, 0): 84, (7, 5): 72, (8, 0): 128, (8, 6): 84, (8, 9): 144, (9, 0): 144, (10, 0): 160, (12, 0): 192,
}  # fmt: skip
"""Multiprocessors of the full chip of a compute capability (NVIDIA's architecture papers); cards have a few less."""
_THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (12, 0): 1536, (12, 1): 1536}
"""Resident on one multiprocessor at most, where it is not 2048 (CUDA C++ Programming Guide, compute capabilities)."""


class Multiprocessors(NamedTuple):
    """Those of one card."""

    number: int
    threads: int
    """On each of them at most."""


A100 = Multiprocessors(108, 2048)
"""Planned for where no card is named."""


def multiprocessors(gpu: str | None) -> Multiprocessors:
    """Of the card that a job names; as many as its chip can have where the catalogue does not say."""
    from memplan.gpu.catalogue import match_gpu

    profile = None if gpu is None else match_gpu(gpu)
    if profile is None or profile.compute_capability is None:
        return A100
    most = FULL_CHIPS.get(profile.compute_capability, max(FULL_CHIPS.values()))
    return Multiprocessors(profile.multiprocessors or most, _THREADS.get(profile.compute_capability, 2048))
