"""Names of modules as peft matches them with what `lora.target_modules` says (peft/tuners/tuners_utils.py)."""

from __future__ import annotations

import re

PATTERN = r"[\\\[\](){}|*+?^$]"
"""A character of patterns that no name of a module has."""
ALL_LINEAR = "all-linear"


def is_pattern(text: str) -> bool:
    r"""
    Whether a text is a pattern and no name.

    >>> is_pattern(r"model\.layers\.\d+\.mlp\.(up|down)_proj"), is_pattern("mlp.up_proj")
    (True, False)
    """
    return re.search(PATTERN, text) is not None


def matches(wanted: str | tuple[str, ...], module: str) -> bool:
    """
    Whether a module of this full name is targeted: a pattern matches all of it, a name in a list all of it or its last
    parts. Of `all-linear` the name says nothing.

    >>> matches(("mlp.up_proj",), "model.layers.0.mlp.up_proj"), matches(r".*\\.[02]\\..*_proj", "layers.1.up_proj")
    (True, False)
    """
    if isinstance(wanted, str) and is_pattern(wanted):
        return re.fullmatch(wanted, module) is not None
    names = (wanted,) if isinstance(wanted, str) else wanted
    return any(module == name or module.endswith(f".{name}") for name in names)


def is_by_block(wanted: str | tuple[str, ...]) -> bool:
    """Whether layers of some blocks may be targeted and not those of others: by a pattern, or a name with a number."""
    if isinstance(wanted, str):
        return is_pattern(wanted)
    return any(part.isdigit() for name in wanted for part in name.split("."))
