"""Bytes are ints everywhere; this is the one place that turns them into text, and text into them."""

from __future__ import annotations

import re

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": KiB, "MIB": MiB, "GIB": GiB, "TIB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", re.IGNORECASE)


def format_bytes(num_bytes: int) -> str:
    """
    Text for people: GiB with two decimals, MiB below 1 GiB, KiB and B below that.

    >>> format_bytes(24 * GiB), format_bytes(-3 * MiB), format_bytes(0)
    ('24.00 GiB', '-3.00 MiB', '0 B')
    """
    size = abs(num_bytes)
    if size >= GiB:
        return f"{num_bytes / GiB:,.2f} GiB"
    if size >= MiB:
        return f"{num_bytes / MiB:.2f} MiB"
    if size >= KiB:
        return f"{num_bytes / KiB:.2f} KiB"
    return f"{num_bytes} B"


def parse_bytes(text: str) -> int | None:
    """
    Bytes of a size such as `512MiB`, `1.5 GiB` or `2GB` (10**9 each); None if it is not a size.

    >>> parse_bytes("1.5GiB"), parse_bytes("2GB"), parse_bytes("many")
    (1610612736, 2000000000, None)
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])
