"""Kernels of packages that transformers does without where they are missing, in code of its own that it says so of."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

_PACKAGES = {
    "mamba_ssm": ("mamba_ssm", "mamba-ssm", "state-spaces/mamba", "fast mamba kernels"),
    "causal_conv1d": ("causal_conv1d", "causal-conv1d"),
    "flash-linear-attention": ("flash-linear-attention",),
}
"""By the names that transformers 5.13 to 5.23 give them in a warning that begins or ends with `falling back to`."""


@contextmanager
def reference_code() -> Iterator[set[str]]:
    """
    The packages whose kernels transformers replaces from now on. It says so once in a process; here each time, and not
    on standard error.
    """
    found: set[str] = set()
    warn: Any = getattr(logging.Logger, "warning_once", None)
    if warn is None:  # that is transformers' own, which is not imported
        yield found
        return

    def warning_once(self: logging.Logger, message: Any, *args: Any, **options: Any) -> None:
        said = str(message).lower()
        packages = {name for name, words in _PACKAGES.items() if any(word in said for word in words)}
        if "falling back to" in said and packages:
            found.update(packages)
        else:
            warn(self, message, *args, **options)

    with patch.object(logging.Logger, "warning_once", warning_once):
        yield found


def note_on_reference_code(packages: AbstractSet[str]) -> list[str]:
    """What to say of a trace in which they were replaced."""
    if not packages:
        return []
    names = ", ".join(f"`{name}`" for name in sorted(packages))
    return [
        f"transformers' own code was traced in place of the kernels of {names}, which hold less as a rule: on a GPU "
        "that has them the plan is an upper figure"
    ]
