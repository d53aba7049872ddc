"""
The GPUs that memplan knows: `profiles/gpus/<vendor>.json`, each figure with its source and how sure it is.

Three totals of one card are told apart: the size it is sold under (`sold_as_gb`), what the driver reports
(`memory_bytes`, NVML), and what torch sees (`torch_total_bytes`), each smaller than the one before.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from memplan.errors import GpuError
from memplan.units import MiB, format_bytes

PROFILE_FOLDER = Path(__file__).parent.parent / "profiles" / "gpus"
_VENDORS = ("nvidia", "amd")
_FILLER = re.compile(r"nvidia|geforce|tesla|rtx|gtx|gpu|generation|edition|[^a-z0-9]")


class GpuProfile(NamedTuple):
    """One GPU of the catalogue."""

    name: str
    """As NVML names it, with the size where NVML gives several sizes one name."""
    aliases: tuple[str, ...]
    sold_as_gb: tuple[int, ...]
    """The sizes it goes by, in marketing GB; empty for slices of a card."""
    memory_bytes: int | None
    """Total of NVML with a current driver and the default ECC mode; None where NVML gives none."""
    torch_total_bytes: int | None
    """Lowest total that torch was seen to report; None where no report was found."""
    compute_capability: tuple[int, int] | None
    multiprocessors: int | None
    generation: str
    kind: str
    """`consumer`, `laptop`, `workstation`, `datacenter`, `mig` or `unified` (memory shared with the host)"""
    confidence: str
    """`verified`, or what else the figure rests on."""
    source: str
    note: str = ""


def list_gpus() -> list[GpuProfile]:
    """Every GPU of the catalogue, newest consumer cards first as in the file."""
    profiles = []
    for vendor in _VENDORS:
        data = json.loads((PROFILE_FOLDER / f"{vendor}.json").read_text(encoding="utf-8"))
        profiles += [_profile(entry) for entry in data["gpus"]]
    return profiles


def find_gpu(text: str) -> GpuProfile:
    """
    The GPU with this name or alias; case, vendor and separators do not matter (`rtx4090`, `RTX 4090`,
    `4090`).

    Raises `GpuError` when no GPU has it, with the nearest names, or when several of different sizes have it.
    """
    profiles = list_gpus()
    wanted = _key(text)
    matches = [profile for profile in profiles if wanted and wanted in _keys(profile)]
    if not matches:
        nearest = _nearest(wanted, profiles)
        raise GpuError(
            f"No GPU is known as `{text}`",
            hint=f"{nearest}A size (`24GB`, `24GiB`) or `live` works too; `memplan gpus` lists the names",
        )
    if len({(profile.memory_bytes, profile.sold_as_gb) for profile in matches}) > 1:
        candidates = ", ".join(f"`{profile.name}` ({_size(profile)})" for profile in matches)
        raise GpuError(f"`{text}` is the name of several GPUs: {candidates}", hint="Name the one you have")
    return matches[0]


def match_gpu(name: str) -> GpuProfile | None:
    """The GPU that the driver gives this name; None if it is not known or comes in several sizes."""
    with suppress(GpuError):
        return find_gpu(name)
    return None


def _key(text: str) -> str:
    """What is left of a name when nothing but the model remains."""
    return _FILLER.sub("", text.lower())


def _keys(profile: GpuProfile) -> set[str]:
    return {_key(spelling) for spelling in (profile.name, *profile.aliases)}


def _size(profile: GpuProfile) -> str:
    if profile.memory_bytes is not None:
        return format_bytes(profile.memory_bytes)
    return f"{profile.sold_as_gb[0]} GB" if profile.sold_as_gb else "size not known"


def _nearest(wanted: str, profiles: list[GpuProfile]) -> str:
    import difflib

    names = {key: profile.name for profile in profiles for key in _keys(profile)}
    close = list(dict.fromkeys(names[key] for key in difflib.get_close_matches(wanted, names, n=5)))[:3]
    return f"Did you mean {' or '.join(f'`{name}`' for name in close)}? " if close else ""


def _profile(entry: dict[str, Any]) -> GpuProfile:
    capability = entry["compute_capability"]
    return GpuProfile(
        name=entry["name"],
        aliases=tuple(entry["aliases"]),
        sold_as_gb=tuple(entry.get("sold_as_gb", ())),
        memory_bytes=_mib(entry["memory_mib"]),
        torch_total_bytes=_mib(entry.get("torch_total_mib")),
        compute_capability=None if capability is None else _capability(capability),
        multiprocessors=entry.get("multiprocessors"),
        generation=entry["generation"],
        kind=entry["class"],
        confidence=entry["confidence"],
        source=entry["source"],
        note=entry.get("note", ""),
    )


def _mib(count: int | None) -> int | None:
    return None if count is None else count * MiB


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)
