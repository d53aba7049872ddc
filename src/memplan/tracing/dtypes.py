"""Models whose code computes in float32 in between, and so does not run with weights in 16 bits."""

from __future__ import annotations

import re

_OF_DTYPES = re.compile(r"\b(dtype|scalar type|BFloat16|Half)\b")


def is_of_dtypes(error: BaseException) -> bool:
    """
    Whether an operation of torch refused the dtypes of its arguments.

    >>> is_of_dtypes(RuntimeError("expected scalar type Float but found BFloat16")), is_of_dtypes(KeyError("dtype"))
    (True, False)
    """
    return isinstance(error, RuntimeError) and _OF_DTYPES.search(str(error)) is not None
