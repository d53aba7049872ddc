"""
A simulation of PyTorch's CUDA caching allocator: a tape in, allocated and reserved bytes out, with or without
a limit, and the smallest capacity at which the tape completes.
"""

from memplan.allocator.cache import AllocatorOutOfMemory
from memplan.allocator.caching_allocator import CachingAllocator
from memplan.allocator.need import replay_with_need, smallest_capacity, smallest_capacity_exact
from memplan.allocator.replay import PhasePeak, Replay, replay, reserved_at_either_pace
from memplan.allocator.sizes import block_bytes

__all__ = [
    "AllocatorOutOfMemory",
    "CachingAllocator",
    "PhasePeak",
    "Replay",
    "block_bytes",
    "replay",
    "replay_with_need",
    "reserved_at_either_pace",
    "smallest_capacity",
    "smallest_capacity_exact",
]
