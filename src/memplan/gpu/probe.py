"""What a live reading of a machine's GPUs says, whoever took it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory on a GPU."""

    pid: int
    """As the driver counts: a pid of the host, also when read inside a container."""
    used_bytes: int | None
    """None where the driver does not say (Windows, some containers)."""
    name: str | None
    """None where the pid means nothing here (another pid namespace) or the process is gone."""


@dataclass(frozen=True)
class GpuReading:
    """One GPU, or one MIG device, at one moment."""

    index: int
    """Position in NVML's order; for a MIG device, of the GPU that it is a slice of."""
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    """By processes. Includes the driver's own reserve where `reserved_bytes` is None."""
    reserved_bytes: int | None
    """Held by the driver; None with drivers before 510 and for unified memory."""
    free_bytes: int
    processes: tuple[GpuProcess, ...] = ()
    processes_complete: bool = False
    """Whether `processes` can be taken for all there are; a container may not see the others."""
    own_bytes: int = 0
    """Part of `used_bytes` that the reading process itself holds, as far as it can tell."""
    compute_capability: tuple[int, int] | None = None
    mig_index: int | None = None
    """Position among the MIG devices of its GPU; None for a whole GPU."""
    ecc: bool | None = None
    display_active: bool | None = None
    pci_bus_id: str = ""
    driver_version: str | None = None
    unified: bool = False
    """The memory is the host's, shared with every program on it."""

    @property
    def used_by_others_bytes(self) -> int:
        """`used_bytes` less our own part, whether or not the processes can be named."""
        return max(0, self.used_bytes - self.own_bytes)


@dataclass(frozen=True)
class GpuFailure:
    """A GPU that is there but cannot be read."""

    index: int
    reason: str
    """One sentence."""
    hint: str
    uuid: str = ""
    name: str = ""
    pci_bus_id: str = ""
    mig_index: int | None = None


Device = GpuReading | GpuFailure


class Probe(Protocol):
    """Reads the GPUs of this machine."""

    def read(self) -> tuple[Device, ...]:
        """Every GPU that the driver lists, MIG devices in place of theirs; `NoLiveGpu` if there is none."""
        ...
