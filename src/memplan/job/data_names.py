"""What a data source of a job names: a path, a dataset on the hub, or the data that comes with memplan."""

from __future__ import annotations

import re
from pathlib import Path

BUILT_IN_DATA = "memplan-docs"
"""The data that comes with memplan; a name, not a path."""
PATH_FIELDS = ("data.train", "data.eval", "data.chat_template")
"""Fields whose paths are relative to the job file."""
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
"""Files that can be trained on."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_dataset(source: str, path: Path) -> bool:
    """
    Whether `source` reads like `owner/name` and is no file or folder here, nor meant as one.

    Args:
        path: what `source` is as a path. Where its folder exists, it is a path with a mistake in it.
    """
    return (
        _HUB_ID.fullmatch(source) is not None
        and Path(source).suffix not in DATA_SUFFIXES
        and not path.exists()
        and not path.parent.exists()
    )
