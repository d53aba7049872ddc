"""
The allocator settings of a job as environment variables, for the torch version at hand.

Which variables the CUDA allocator reads (checked in the 2.9.1 to 2.13 binaries and
`c10/core/AllocatorConfig.h`):

* torch below 2.10: `PYTORCH_CUDA_ALLOC_CONF` alone. 2.9.x calls that name deprecated, yet silently ignores
  the new one.
* torch 2.10 and above: `PYTORCH_CUDA_ALLOC_CONF`, `PYTORCH_HIP_ALLOC_CONF`, `PYTORCH_ALLOC_CONF`; the first
  that is set wins.

They must be set before torch is imported, so `memplan env` prints them and `memplan train` starts a child
with them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from memplan.job.spec import AllocatorSettings, Job

CUDA_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
HIP_VARIABLE = "PYTORCH_HIP_ALLOC_CONF"
SHARED_VARIABLE = "PYTORCH_ALLOC_CONF"
VARIABLES = (CUDA_VARIABLE, HIP_VARIABLE, SHARED_VARIABLE)
"""In the order in which torch 2.10 and above let them win."""


@dataclass(frozen=True)
class AllocatorEnvironment:
    """Variables to set before torch starts, and what is worth saying about them."""

    variables: dict[str, str]
    notes: tuple[str, ...]


def allocator_environment(
    job: Job, torch_version: str | None, platform: str, environ: Mapping[str, str] | None = None
) -> AllocatorEnvironment:
    """
    The variables that give torch the job's allocator settings.

    `platform` is that of `current_platform`. What `environ` (default: nothing) already sets is kept and
    reported, never replaced. With an unknown torch version (None) both names are set to the same value: every
    version then reads it.
    """
    environ = environ or {}
    notes: list[str] = []
    in_force = variable_in_force(environ, torch_version)
    notes += _notes_on_existing(environ, torch_version, in_force)
    value = allocator_string(job, platform)
    if job.allocator.expandable_segments and platform in ("win32", "wsl"):
        system = "Windows" if platform == "win32" else "WSL"
        notes.append(f"expandable segments do not exist on {system}; left out, the plan assumes them")
    if in_force is not None:
        if same_settings(environ[in_force], value):
            return AllocatorEnvironment({}, tuple(notes))
        wanted = f"`{value}`" if value else "torch's defaults"
        notes.append(f"`{in_force}={environ[in_force]}` is already set and kept; the job asks for {wanted}")
        return AllocatorEnvironment({}, tuple(notes))
    if not value:
        return AllocatorEnvironment({}, tuple(notes))
    if torch_version is None:
        notes.append("the torch version is unknown, so both names are set; torch reads the one it knows")
        return AllocatorEnvironment({CUDA_VARIABLE: value, SHARED_VARIABLE: value}, tuple(notes))
    name = readable_variables(torch_version)[-1]
    return AllocatorEnvironment({name: value}, tuple(notes))


def allocator_string(job: Job, platform: str = "linux") -> str:
    """
    The job's settings in the syntax of the variable; empty for torch's defaults.

    >>> allocator_string(Job(model="gpt2"))
    'expandable_segments:True'
    """
    return settings_string(job.allocator, platform)


def settings_string(settings: AllocatorSettings, platform: str = "linux") -> str:
    """As `allocator_string`, of the settings alone."""
    parts = []
    if settings.expandable_segments and platform not in ("win32", "wsl"):
        parts.append("expandable_segments:True")
    if settings.max_split_size_mb is not None:
        parts.append(f"max_split_size_mb:{settings.max_split_size_mb}")
    if settings.garbage_collection_threshold is not None:
        parts.append(f"garbage_collection_threshold:{settings.garbage_collection_threshold:g}")
    if settings.roundup_power2_divisions is not None:
        parts.append(f"roundup_power2_divisions:{settings.roundup_power2_divisions}")
    return ",".join(parts)


def parse_settings(text: str) -> dict[str, str]:
    """
    Keys and values of an allocator string; lists in brackets stay whole.

    >>> parse_settings("expandable_segments:True, roundup_power2_divisions:[256:1,>:8],")
    {'expandable_segments': 'True', 'roundup_power2_divisions': '[256:1,>:8]'}
    """
    pairs = re.findall(r"([^,:\[\]]+):(\[[^\]]*\]|[^,]*)", text)
    return {key.strip(): value.strip() for key, value in pairs}


def same_settings(left: str, right: str) -> bool:
    """Whether two allocator strings ask for the same, in whatever order."""
    return parse_settings(left) == parse_settings(right)


def variable_in_force(environ: Mapping[str, str], torch_version: str | None) -> str | None:
    """
    The variable in `environ` that this torch reads; None if it reads none of them.

    With an unknown version it is the first that is set in the order of torch 2.10 and above.
    """
    return next((name for name in readable_variables(torch_version) if environ.get(name)), None)


def readable_variables(torch_version: str | None) -> tuple[str, ...]:
    """
    The variables that this torch reads, the winning one first; all of them for an unknown version.

    >>> readable_variables("2.9.1+cu128"), readable_variables("2.10.0a0+git1234")[0]
    (('PYTORCH_CUDA_ALLOC_CONF',), 'PYTORCH_CUDA_ALLOC_CONF')
    """
    match = re.match(r"(\d+)\.(\d+)", torch_version or "")
    if match is not None and (int(match[1]), int(match[2])) < (2, 10):
        return (CUDA_VARIABLE,)
    return VARIABLES


def installed_torch_version() -> str | None:
    """
    The version of the torch that is installed, read from its metadata without importing it; None if there is
    none.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def current_platform() -> str:
    """`linux`, `wsl`, `win32` or `darwin`: WSL is a Linux whose kernel says Microsoft."""
    if sys.platform == "linux":
        from platform import release

        return "wsl" if "microsoft" in release().lower() else "linux"
    return sys.platform


def _notes_on_existing(
    environ: Mapping[str, str], torch_version: str | None, in_force: str | None
) -> list[str]:
    readable = readable_variables(torch_version)
    notes = []
    for name in (name for name in VARIABLES if environ.get(name)):
        if name not in readable:
            notes.append(f"`{name}` is set, but torch {torch_version} ignores it; it reads `{CUDA_VARIABLE}`")
        elif (
            in_force is not None and name != in_force and not same_settings(environ[name], environ[in_force])
        ):
            notes.append(f"`{name}` and `{in_force}` are both set and differ; `{in_force}` wins")
    return notes
