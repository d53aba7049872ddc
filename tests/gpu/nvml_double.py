"""A stand-in for the `pynvml` module: what the driver of an imagined machine would answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from memplan.units import MiB

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, DRIVER_NOT_LOADED = 3, 4, 6, 9
LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND, GPU_IS_LOST, VERSION_MISMATCH, UNKNOWN = 12, 13, 15, 18, 999


class NVMLError(Exception):
    """As in pynvml: the code is in `value`."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML code {value}")
        self.value = value


class NVMLLibraryMismatchError(Exception):
    """As in pynvml: an unversioned call that this driver does not have."""


@dataclass
class Card:
    """One GPU or MIG device; `fails` maps a call to the code it fails with."""

    name: str = "NVIDIA GeForce RTX 4090"
    uuid: str = "GPU-11111111-0000-0000-0000-000000000000"
    total_mib: int = 24564
    used_mib: int = 0
    reserved_mib: int = 350
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    graphics: list[tuple[int, int | None]] = field(default_factory=list)
    ecc: int = 0
    display: int = 0
    capability: tuple[int, int] = (8, 9)
    bus: str = "00000000:01:00.0"
    slices: list[Card] | None = None
    fails: dict[str, int] = field(default_factory=dict)


@dataclass
class FakeNvml:
    """Answers the calls of pynvml that memplan makes. `version_2` is False for drivers before 510."""

    cards: list[Card] = field(default_factory=lambda: [Card()])
    driver: str = "550.54.14"
    version_2: bool = True
    init_code: int = 0
    mismatched_library: bool = False
    open_count: int = 0

    NVMLError = NVMLError
    NVMLLibraryMismatchError = NVMLLibraryMismatchError
    nvmlMemory_v2 = 0x02000028

    def _check(self, card: Card, call: str) -> None:
        if call in card.fails:
            raise NVMLError(card.fails[call])

    def nvmlInit(self) -> None:
        if self.init_code:
            raise NVMLError(self.init_code)
        self.open_count += 1

    def nvmlShutdown(self) -> None:
        self.open_count -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        self._check(self.cards[index], "handle")
        return self.cards[index]

    def nvmlDeviceGetName(self, card: Card) -> str:
        self._check(card, "name")
        return card.name

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def nvmlDeviceGetPciInfo(self, card: Card) -> Any:
        self._check(card, "pci")
        return SimpleNamespace(busId=card.bus.encode())

    def nvmlDeviceGetMemoryInfo(self, card: Card, version: int | None = None) -> Any:
        self._check(card, "memory")
        total, reserved, used = card.total_mib * MiB, card.reserved_mib * MiB, card.used_mib * MiB
        free = total - reserved - used
        if version is None:
            return SimpleNamespace(total=total, used=used + reserved, free=free)
        if not self.version_2:
            raise NVMLError(FUNCTION_NOT_FOUND)
        return SimpleNamespace(total=total, used=used, reserved=reserved, free=free)

    def nvmlDeviceGetCudaComputeCapability(self, card: Card) -> tuple[int, int]:
        self._check(card, "capability")
        return card.capability

    def nvmlDeviceGetEccMode(self, card: Card) -> list[int]:
        self._check(card, "ecc")
        return [card.ecc, card.ecc]

    def nvmlDeviceGetDisplayActive(self, card: Card) -> int:
        self._check(card, "display")
        return card.display

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        if card.slices is None:
            raise NVMLError(NOT_SUPPORTED)
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, index: int) -> Card:
        if card.slices is None or index >= len(card.slices):
            raise NVMLError(NOT_FOUND)
        return card.slices[index]

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[Any]:
        self._check(card, "processes")
        if self.mismatched_library:
            raise NVMLLibraryMismatchError("no _v3")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.processes]

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: Card) -> list[Any]:
        self._check(card, "processes")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.graphics]
