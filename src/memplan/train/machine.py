"""What a run ran with: versions of libraries, and the device."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from typing import Any

import torch


def installed_versions() -> dict[str, str]:
    """Of memplan, Python and the libraries that a run's memory depends on."""
    from importlib.metadata import PackageNotFoundError, version

    from memplan import __version__

    versions = {"memplan": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "peft", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def describe_device(device: torch.device) -> dict[str, Any]:
    """Type, name and bytes of memory of what the run runs on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"type": "cuda", "name": properties.name, "total_bytes": properties.total_memory}
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "type": "cpu",
        "name": f"{torch.get_num_threads()} threads, {platform.machine()}",
        "total_bytes": total,
    }
