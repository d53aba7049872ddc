"""A shuffle of millions without a list of millions: the position of each item is computed when it is asked for."""

from __future__ import annotations

import hashlib

_ROUNDS = 8
_MASK_64 = (1 << 64) - 1


class Permutation:
    """
    A fixed random order of `range(size)`: `order[position]` is the item there, `position(item)` its inverse.

    A Feistel network over the smallest even number of bits that holds `size`; what falls outside the range is sent
    through again until it is inside (cycle walking, as in format-preserving encryption: Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains", 2002). The domain is less than four times the size, so that takes four turns at
    most on average.

    >>> order = Permutation(5, "seed")
    >>> sorted(order[position] for position in range(5))
    [0, 1, 2, 3, 4]
    >>> [order.position(order[position]) for position in range(5)]
    [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(key.encode(), digest_size=_ROUNDS * 8).digest()
        self._keys = [int.from_bytes(digest[index : index + 8], "big") for index in range(0, len(digest), 8)]

    def __getitem__(self, position: int) -> int:
        value = self._forward(position)
        while value >= self.size:
            value = self._forward(value)
        return value

    def position(self, item: int) -> int:
        """Where an item is."""
        value = self._backward(item)
        while value >= self.size:
            value = self._backward(value)
        return value

    def _forward(self, value: int) -> int:
        left, right = value >> self._half, value & ((1 << self._half) - 1)
        for key in self._keys:
            left, right = right, left ^ self._mix(right, key)
        return left << self._half | right

    def _backward(self, value: int) -> int:
        left, right = value >> self._half, value & ((1 << self._half) - 1)
        for key in reversed(self._keys):
            left, right = right ^ self._mix(left, key), left
        return left << self._half | right

    def _mix(self, value: int, key: int) -> int:
        """The finaliser of splitmix64, cut to half the bits."""
        value = (value + key) & _MASK_64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
        return (value ^ (value >> 31)) >> (64 - self._half)
