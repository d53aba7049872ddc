"""`resolve_capacity`: sizes, names and live readings, each with where the number comes from."""

from __future__ import annotations

import os

import pytest

from memplan.errors import GpuError, NoLiveGpu
from memplan.gpu import (
    Device,
    GpuFailure,
    GpuProcess,
    GpuReading,
    find_gpu,
    list_gpus,
    live_capacity,
    usable_bytes,
)
from memplan.gpu import resolve_capacity as resolve
from memplan.units import GiB, MiB


class Machine:
    """A probe that read these devices."""

    def __init__(self, *devices: Device) -> None:
        self.devices = devices

    def read(self) -> tuple[Device, ...]:
        return self.devices


def reading(
    index: int = 0, used_mib: int = 0, reserved_mib: int | None = 350, **fields: object
) -> GpuReading:
    """A 24 GiB card with so much in use."""
    values: dict[str, object] = {
        "uuid": f"GPU-{index}abc",
        "name": "NVIDIA GeForce RTX 4090",
        "processes_complete": True,
        "pci_bus_id": f"0{index}",
        "driver_version": "550.54",
        "total_bytes": 24576 * MiB,
        "free_bytes": (24576 - used_mib - (reserved_mib or 0)) * MiB,
        **fields,
    }
    return GpuReading(
        index=index,
        used_bytes=used_mib * MiB,
        reserved_bytes=None if reserved_mib is None else reserved_mib * MiB,
        **values,  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable hides a GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)


def test_gib_is_exact() -> None:
    """GiB and MiB mean what they say, all of it usable."""
    assert 24 * GiB == resolve("24GiB").total_bytes == resolve(" 24 gib ").usable_bytes
    assert 23028 * MiB == resolve("23028MiB").usable_bytes
    assert 0 == resolve("24GiB").used_by_others_bytes


@pytest.mark.parametrize(
    ("size", "card", "total_mib"),
    [
        ("24GB", "NVIDIA A10", 23028),
        ("16 gb", "Tesla T4", 15360),
        ("48GB", "NVIDIA L20", 46068),
        ("80GB", "NVIDIA H100 PCIe", 81559),
        ("96GB", "NVIDIA H20", 97871),
    ],
)
def test_gb_is_the_smallest_card_sold_as_that(size: str, card: str, total_mib: int) -> None:
    """A marketing size is the card of that size with the least usable memory, and says which."""
    capacity = resolve(size)

    assert total_mib * MiB == capacity.total_bytes
    assert f"smallest sold under that size, {card}:" in capacity.source
    assert (
        "name the card you have: `NVIDIA" in capacity.source
        or "name the card you have: `Tesla" in capacity.source
    )
    assert capacity.usable_bytes == min(
        usable_bytes(gpu)[0]
        for gpu in list_gpus()
        if int(size[:2]) in gpu.sold_as_gb and gpu.confidence == "verified"
    )


def test_gb_fits_every_card_of_that_size() -> None:
    """What fits `24GB` fits any 24 GB card of the catalogue, the 4090, the 3090 and the L4 among them."""
    for name in ("4090", "3090", "l4", "a10g", "a5000", "5090 laptop"):
        assert resolve("24GB").usable_bytes <= resolve(name).usable_bytes


@pytest.mark.parametrize("text", ["36GB", "23.5GB", "23000MB", "1TB"])
def test_sizes_that_no_card_is_sold_as(text: str) -> None:
    """A size in GB that names no card is refused, with the sizes that do and the way to an exact size."""
    with pytest.raises(GpuError) as failure:
        resolve(text)
    assert "24, 32" in failure.value.message
    assert "GiB" in (failure.value.hint or "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0GiB", "no memory size"),
        ("2x4090", "several GPUs"),
        ("4 x A100", "several GPUs"),
        ("25XB", "`25XB` is no memory size"),
        ("24GBB", "no memory size"),
        ("24 G", "no memory size"),
        ("9999Ti", "No GPU"),
        ("24", "No GPU"),
        ("", "No GPU"),
    ],
)
def test_nonsense(text: str, says: str) -> None:
    """What is no size and no GPU is an error of the user's, with what would be one."""
    with pytest.raises(GpuError, match=says) as failure:
        resolve(text)
    assert failure.value.hint


def test_card_by_name() -> None:
    """A card's usable memory is below what the driver reports, which is below the size on the box."""
    card = resolve("RTX 4090")

    assert ("NVIDIA GeForce RTX 4090", 24564 * MiB, 24084 * MiB) == (
        card.gpu, card.total_bytes, card.usable_bytes,
    )  # fmt: skip
    assert "nvidia-smi" in card.source


def test_card_without_a_report_from_torch() -> None:
    """Where torch's total is not known, 300 MiB and 0.75 % are taken off, and the source says so."""
    card = resolve("RTX 5080")

    assert (16303 * MiB - 300 * MiB - 16303 * MiB * 3 // 400) == card.usable_bytes
    assert "300 MiB and 0.75 %" in card.source


def test_the_bound_covers_every_pair() -> None:
    """The bound is below torch's total for every card with both figures, but a T4 with an old driver."""
    pairs = {
        gpu.name: (gpu.memory_bytes - 300 * MiB - gpu.memory_bytes * 3 // 400, gpu.torch_total_bytes)
        for gpu in list_gpus()
        if gpu.memory_bytes is not None and gpu.torch_total_bytes is not None
    }

    assert len(pairs) >= 15
    assert {"Tesla T4"} == {name for name, (bound, torch_total) in pairs.items() if bound > torch_total}


def test_unified_memory_is_known_only_there() -> None:
    """A card that shares the host's memory has no capacity of its own."""
    with pytest.raises(GpuError, match="shares its memory") as failure:
        resolve("DGX Spark")
    assert "`live`" in (failure.value.hint or "")


def test_live() -> None:
    """What is free now is usable; who holds the rest is named."""
    busy = reading(used_mib=1000, processes=(GpuProcess(7, 900 * MiB, "python"), GpuProcess(8, None, None)))

    capacity = resolve("live", Machine(busy))
    assert (24576 * MiB, 23226 * MiB, 1000 * MiB) == (
        capacity.total_bytes, capacity.usable_bytes, capacity.used_by_others_bytes,
    )  # fmt: skip
    assert "held by others: python 7 (900.00 MiB), process 8" in capacity.source
    assert "driver 550.54" in capacity.source


def test_live_by_position_and_uuid() -> None:
    """`live:1` is the second GPU a process would see; a uuid or its beginning is that GPU, visible or not."""
    machine = Machine(reading(0, used_mib=10), reading(1, used_mib=20), reading(2, used_mib=30))
    hidden = {"CUDA_VISIBLE_DEVICES": "2,0"}

    assert 20 * MiB == resolve("live:1", machine).used_by_others_bytes
    assert 30 * MiB == live_capacity("live", machine, hidden).used_by_others_bytes
    assert 10 * MiB == live_capacity("LIVE:1", machine, hidden).used_by_others_bytes
    assert 20 * MiB == live_capacity("GPU-1a", machine, hidden).used_by_others_bytes
    assert 30 * MiB == resolve("gpu-2ABC", machine).used_by_others_bytes


@pytest.mark.parametrize(
    ("which", "variable", "says"),
    [
        ("live:3", None, "asks for GPU 3, and a process here sees 3"),
        ("live", "", "sees 0 with CUDA_VISIBLE_DEVICES=''"),
        ("live:1", "0", "sees 1 with CUDA_VISIBLE_DEVICES='0'"),
        ("GPU-nothing", None, "No single GPU here"),
        ("GPU-", None, "No single GPU here"),
    ],
)
def test_live_gpu_that_is_not_there(which: str, variable: str | None, says: str) -> None:
    """A GPU that a process would not see is exit code 3, with what it would see."""
    environ = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}

    with pytest.raises(NoLiveGpu, match=says):
        live_capacity(which, Machine(reading(0), reading(1), reading(2)), environ)


def test_live_gpu_that_cannot_be_read() -> None:
    """The failure of the chosen GPU is the answer; that of another one is not."""
    machine = Machine(reading(0), GpuFailure(1, "GPU 1 has fallen off the bus", "Reboot"))

    assert 0 == resolve("live", machine).used_by_others_bytes
    with pytest.raises(NoLiveGpu, match="fallen off the bus") as failure:
        resolve("live:1", machine)
    assert "Reboot" == failure.value.hint


def test_memory_that_nobody_can_be_named_for() -> None:
    """In a container the holders may be out of sight: never claim that there are none."""
    capacity = resolve("live", Machine(reading(used_mib=500, processes_complete=False)))

    assert 500 * MiB == capacity.used_by_others_bytes
    assert "held by others, whose processes cannot be seen from here" in capacity.source


def test_own_memory_counts_as_usable() -> None:
    """What this process holds already is its own to use, and it is not listed among the others."""
    own = GpuProcess(os.getpid(), 400 * MiB, "python")
    capacity = resolve("live", Machine(reading(used_mib=500, own_bytes=400 * MiB, processes=(own,))))

    assert ((24576 - 350 - 100) * MiB, 100 * MiB) == (capacity.usable_bytes, capacity.used_by_others_bytes)
    assert str(os.getpid()) not in capacity.source


def test_old_driver_and_display_and_unified() -> None:
    """What an old driver cannot tell apart, a display, and unified memory are each said."""
    old = resolve("live", Machine(reading(used_mib=450, reserved_mib=None)))
    assert "too old to tell them apart" in old.source

    shown = resolve("live", Machine(reading(used_mib=450, display_active=True)))
    assert "held by others: a display" in shown.source

    unified = resolve("live", Machine(reading(used_mib=450, reserved_mib=None, unified=True)))
    assert "unified memory" in unified.source


def test_caution_about_the_order() -> None:
    """Different GPUs without CUDA_DEVICE_ORDER come with a caution in the source."""
    machine = Machine(reading(0), reading(1, name="NVIDIA GeForce RTX 3090"))

    assert "CUDA_DEVICE_ORDER" in resolve("live", machine).source
    assert "CUDA_DEVICE_ORDER" not in resolve("GPU-0", machine).source


def test_every_card_of_the_catalogue_resolves() -> None:
    """Each name leads to itself and to a usable size that is no more than its total."""
    for gpu in list_gpus():
        assert gpu == find_gpu(gpu.name)
        if gpu.kind == "unified":
            continue
        capacity = resolve(gpu.name)
        assert 0 < capacity.usable_bytes <= capacity.total_bytes
