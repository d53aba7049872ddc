"""`NvmlProbe` on machines as they are: several cards, old drivers, MIG, containers, unified memory, none."""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from nvml_double import (
    DRIVER_NOT_LOADED,
    FUNCTION_NOT_FOUND,
    GPU_IS_LOST,
    LIBRARY_NOT_FOUND,
    NO_PERMISSION,
    NOT_SUPPORTED,
    UNKNOWN,
    VERSION_MISMATCH,
    Card,
    FakeNvml,
)

from memplan.errors import NoLiveGpu
from memplan.gpu import Device, GpuFailure, GpuProcess, GpuReading
from memplan.gpu.nvml import NvmlProbe
from memplan.units import MiB


def proc(folder: Path, *, host: bool = True, meminfo: str = "", names: dict[int, str] | None = None) -> Path:
    """A /proc of a host, or of a container with its own pid namespace."""
    (folder / "self" / "ns").mkdir(parents=True)
    (folder / "self" / "ns" / "pid").symlink_to("pid:[4026531836]" if host else "pid:[4026532001]")
    if meminfo:
        (folder / "meminfo").write_text(meminfo)
    for pid, name in (names or {}).items():
        (folder / str(pid)).mkdir()
        (folder / str(pid) / "comm").write_text(f"{name}\n")
    return folder


def read(folder: Path, nvml: FakeNvml, **machine: Any) -> tuple[Device, ...]:
    """What the probe says of that machine."""
    devices = NvmlProbe(nvml, proc(folder / "proc", **machine)).read()
    assert 0 == nvml.open_count, "NVML was not shut down"
    return devices


def only_reading(devices: tuple[Device, ...]) -> GpuReading:
    """The one device, which must be a reading."""
    (device,) = devices
    assert isinstance(device, GpuReading), device
    return device


def test_one_card(tmp_path: Path) -> None:
    """Every figure of a plain card on a plain host."""
    nvml = FakeNvml([Card(used_mib=1000, processes=[(77, 900 * MiB)], display=1)])

    reading = only_reading(read(tmp_path, nvml, names={77: "python"}))
    assert (24564 * MiB, 1000 * MiB, 350 * MiB, 23214 * MiB) == (
        reading.total_bytes, reading.used_bytes, reading.reserved_bytes, reading.free_bytes,
    )  # fmt: skip
    assert (GpuProcess(77, 900 * MiB, "python"),) == reading.processes
    assert (0, "GPU-11111111-0000-0000-0000-000000000000", "NVIDIA GeForce RTX 4090", (8, 9)) == (
        reading.index, reading.uuid, reading.name, reading.compute_capability,
    )  # fmt: skip
    assert (False, True, "00000000:01:00.0", "550.54.14") == (
        reading.ecc, reading.display_active, reading.pci_bus_id, reading.driver_version,
    )  # fmt: skip
    assert reading.processes_complete


def test_three_cards_of_which_one_is_lost_and_one_says_little(tmp_path: Path) -> None:
    """A lost card fails alone, and what a card does not support is None; the others are read in full."""
    silent = dict.fromkeys(("ecc", "display", "capability", "processes", "pci"), NOT_SUPPORTED)
    nvml = FakeNvml([Card(), Card(fails={"handle": GPU_IS_LOST}), Card(uuid="GPU-3", fails=silent)])

    first, lost, little = read(tmp_path, nvml)
    assert isinstance(first, GpuReading)
    assert isinstance(lost, GpuFailure)
    assert "GPU 1 has fallen off the bus" == lost.reason
    assert isinstance(little, GpuReading)
    assert (None, None, None, (), "") == (
        little.ecc, little.display_active, little.compute_capability, little.processes, little.pci_bus_id,
    )  # fmt: skip
    assert first.free_bytes == little.free_bytes


def test_card_lost_while_it_is_read(tmp_path: Path) -> None:
    """A card that is lost between two calls is a failure too, by name."""
    (device,) = read(tmp_path, FakeNvml([Card(fails={"memory": GPU_IS_LOST})]))

    assert isinstance(device, GpuFailure)
    assert "GPU 0 (NVIDIA GeForce RTX 4090) has fallen off the bus" == device.reason


def test_old_driver(tmp_path: Path) -> None:
    """Before driver 510 the reserve is part of what is used, and the reading says that it is not known."""
    reading = only_reading(read(tmp_path, FakeNvml([Card(used_mib=100)], driver="470.57", version_2=False)))

    assert (450 * MiB, None, 24114 * MiB) == (reading.used_bytes, reading.reserved_bytes, reading.free_bytes)


def test_library_newer_than_driver(tmp_path: Path) -> None:
    """A process list that this driver does not have leaves the list empty and the memory readable."""
    reading = only_reading(read(tmp_path, FakeNvml([Card(processes=[(1, 5)])], mismatched_library=True)))

    assert () == reading.processes
    assert 24214 * MiB == reading.free_bytes


def test_mig(tmp_path: Path) -> None:
    """In MIG mode the slices are read by their own handles; the GPU's figures, refused here, are not."""
    slices = [
        Card(name="NVIDIA A100-SXM4-40GB MIG 1g.5gb", uuid="MIG-a", total_mib=4864, reserved_mib=20),
        Card(name="NVIDIA A100-SXM4-40GB MIG 2g.10gb", uuid="MIG-b", total_mib=9856, reserved_mib=30),
    ]
    parent = Card(
        name="NVIDIA A100-SXM4-40GB", capability=(8, 0), slices=slices, fails={"memory": NO_PERMISSION}
    )

    first, second = read(tmp_path, FakeNvml([parent]))
    assert isinstance(first, GpuReading)
    assert isinstance(second, GpuReading)
    assert [("MIG-a", 0, 0, 4864 * MiB), ("MIG-b", 0, 1, 9856 * MiB)] == [
        (device.uuid, device.index, device.mig_index, device.total_bytes) for device in (first, second)
    ]
    assert (8, 0) == second.compute_capability


def test_mig_without_slices(tmp_path: Path) -> None:
    """MIG mode without a MIG device is a failure with a remedy."""
    (device,) = read(tmp_path, FakeNvml([Card(slices=[])]))

    assert isinstance(device, GpuFailure)
    assert "MIG mode" in device.reason
    assert "nvidia-smi mig" in device.hint


def test_no_permission(tmp_path: Path) -> None:
    """A card that this user may not read is a failure with a remedy."""
    (device,) = read(tmp_path, FakeNvml([Card(fails={"memory": NO_PERMISSION})]))

    assert isinstance(device, GpuFailure)
    assert "may not be read" in device.reason


def test_container(tmp_path: Path) -> None:
    """In a container the pids are the host's: they get no name, and the list is not called complete."""
    nvml = FakeNvml([Card(used_mib=500, processes=[(os.getpid(), 400 * MiB)])])

    reading = only_reading(read(tmp_path, nvml, host=False, names={os.getpid(): "innocent"}))
    assert (GpuProcess(os.getpid(), 400 * MiB, None),) == reading.processes
    assert not reading.processes_complete
    assert 500 * MiB == reading.used_by_others_bytes


def test_own_memory_is_not_held_by_others(tmp_path: Path) -> None:
    """What this very process holds is not counted against it."""
    nvml = FakeNvml([Card(used_mib=500, processes=[(os.getpid(), 400 * MiB), (3, 90 * MiB)])])

    reading = only_reading(read(tmp_path, nvml))
    assert (400 * MiB, 100 * MiB) == (reading.own_bytes, reading.used_by_others_bytes)


def test_processes_are_counted_once(tmp_path: Path) -> None:
    """A pid that computes and draws is one process; sizes that are not available or impossible are None."""
    nvml = FakeNvml(
        [Card(processes=[(5, 10 * MiB), (6, None), (7, 2**63)], graphics=[(5, 30 * MiB), (8, 1 * MiB)])]
    )

    reading = only_reading(read(tmp_path, nvml, names={5: "blender"}))
    assert (
        GpuProcess(5, 30 * MiB, "blender"),
        GpuProcess(6, None, None),
        GpuProcess(7, None, None),
        GpuProcess(8, 1 * MiB, None),
    ) == reading.processes


@pytest.mark.parametrize(
    ("driver", "listed"), [("535.54.03", 0), ("535.86.05", 0), ("535.104.05", 1), ("550.1", 1)]
)
def test_drivers_that_misreport_processes(tmp_path: Path, driver: str, listed: int) -> None:
    """The process lists of drivers 535.43 to 535.86 are garbage and are not repeated."""
    reading = only_reading(read(tmp_path, FakeNvml([Card(processes=[(5, 10)])], driver=driver)))

    assert listed == len(reading.processes)


def test_unified_memory(tmp_path: Path) -> None:
    """Where NVML reports no memory, the host's MemAvailable is the answer, and it is labelled unified."""
    nvml = FakeNvml([Card(name="NVIDIA GB10", fails={"memory": NOT_SUPPORTED}, processes=[(5, 10 * MiB)])])
    meminfo = (
        "MemTotal:       127600748 kB\nMemFree:  1000 kB\nMemAvailable:   100000000 kB\nHugePages_Total: 0\n"
    )

    reading = only_reading(read(tmp_path, nvml, meminfo=meminfo))
    assert reading.unified
    assert (127600748 * 1024, 100000000 * 1024, None) == (
        reading.total_bytes, reading.free_bytes, reading.reserved_bytes,
    )  # fmt: skip
    assert (GpuProcess(5, 10 * MiB, None),) == reading.processes


def test_unified_memory_that_cannot_be_read(tmp_path: Path) -> None:
    """Without /proc/meminfo nothing is known, and that is said."""
    (device,) = read(tmp_path, FakeNvml([Card(name="NVIDIA GB10", fails={"memory": NOT_SUPPORTED})]))

    assert isinstance(device, GpuFailure)
    assert "NVIDIA GB10 shares its memory with the host" in device.reason


@pytest.mark.parametrize(
    ("code", "says", "hints"),
    [
        (LIBRARY_NOT_FOUND, "no NVIDIA driver", "--gpu 24GB"),
        (DRIVER_NOT_LOADED, "driver is not loaded", "container"),
        (VERSION_MISMATCH, "upgraded", "Reboot"),
        (NO_PERMISSION, "refuses access", "/dev/nvidia"),
        (FUNCTION_NOT_FOUND, "too old", "Update"),
        (UNKNOWN, "unknown error", "Restart"),
        (27, "NVML code 27", "--gpu 24GB"),
    ],
)
def test_no_nvml(tmp_path: Path, code: int, says: str, hints: str) -> None:
    """Each way in which NVML does not start is its own sentence with its own remedy, exit code 3."""
    with pytest.raises(NoLiveGpu) as failure:
        read(tmp_path, FakeNvml(init_code=code))

    assert says in failure.value.message
    assert hints in (failure.value.hint or "")
    assert 3 == failure.value.exit_code


def test_driver_without_gpu(tmp_path: Path) -> None:
    """A driver that lists no GPU is not a reading of nothing."""
    with pytest.raises(NoLiveGpu, match="lists no GPU"):
        read(tmp_path, FakeNvml([]))


def test_package_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvidia-ml-py the remedy is its name on PyPI."""
    real = builtins.__import__

    def without_pynvml(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pynvml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_pynvml)
    with pytest.raises(NoLiveGpu) as failure:
        NvmlProbe().read()
    assert "pip install nvidia-ml-py" in (failure.value.hint or "")
