"""Seeds that are a function of what they are for, the same in every process and however a model is cut."""

from __future__ import annotations

import hashlib
import json


def derive_seed(*parts: object) -> int:
    """A seed below 2**63 that depends on all parts."""
    text = json.dumps([str(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
