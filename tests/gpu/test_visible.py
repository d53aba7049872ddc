"""Which GPU is `cuda:0`: the rules of `CUDA_VISIBLE_DEVICES`, as torch reads it."""

from __future__ import annotations

import pytest

from memplan.gpu import GpuFailure, GpuReading, visible_devices


def gpu(index: int, uuid: str, *, name: str = "A", bus: str = "", mig: int | None = None) -> GpuReading:
    """A GPU of which only the identity matters."""
    return GpuReading(
        index=index,
        uuid=uuid,
        name=name,
        total_bytes=0,
        used_bytes=0,
        reserved_bytes=0,
        free_bytes=0,
        pci_bus_id=bus or f"0000:0{index}",
        mig_index=mig,
    )


ALIKE = [gpu(0, "GPU-aa1"), gpu(1, "GPU-aa2"), gpu(2, "GPU-bb3")]
DIFFERENT = [gpu(0, "GPU-aa1", name="A"), gpu(1, "GPU-aa2", name="B")]
SLICED = [gpu(0, "MIG-x", mig=0), gpu(0, "MIG-y", mig=1), gpu(1, "GPU-z")]


@pytest.mark.parametrize(
    ("variable", "uuids"),
    [
        (None, ["GPU-aa1", "GPU-aa2", "GPU-bb3"]),
        ("", []),
        ("0", ["GPU-aa1"]),
        ("2,0", ["GPU-bb3", "GPU-aa1"]),
        (" 1 , 2", ["GPU-aa2", "GPU-bb3"]),
        ("1gpu,2", ["GPU-aa2", "GPU-bb3"]),
        ("0,3,1", ["GPU-aa1"]),
        ("0,-1,1", ["GPU-aa1"]),
        ("-1", []),
        ("0,none,1", ["GPU-aa1"]),
        ("none", []),
        ("1,1", []),
        ("GPU-bb", ["GPU-bb3"]),
        ("GPU-bb3,GPU-aa1", ["GPU-bb3", "GPU-aa1"]),
        ("GPU-aa", []),
        ("GPU-bb,GPU-nothing,GPU-aa1", ["GPU-bb3"]),
        ("GPU-bb,GPU-bb3", []),
    ],
)
def test_visible(variable: str | None, uuids: list[str]) -> None:
    """Indices, uuids and their prefixes, empty, repeated, negative and out of range."""
    environ = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}

    devices, caution = visible_devices(ALIKE, environ)
    assert (uuids, "") == ([device.uuid for device in devices], caution)


@pytest.mark.torch
@pytest.mark.parametrize(
    "variable", [None, "", "0", "2,0", " 1 , 2", "1gpu,2", "0,-1,1", "-1", "none", "1,1"]
)
def test_as_torch_parses_it(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own parser picks the same indices, for every form without a uuid and within range."""
    cuda = pytest.importorskip("torch.cuda")
    if variable is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    expected = [index for index in cuda._parse_visible_devices() if index < len(ALIKE)]

    devices, _ = visible_devices(ALIKE, {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable})
    assert expected == [device.index for device in devices]


def test_order_of_different_cards() -> None:
    """Indices of cards that differ come with a caution, unless CUDA is told to count by PCI bus id."""
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in visible_devices(DIFFERENT, {})[1]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in visible_devices(DIFFERENT, {"CUDA_VISIBLE_DEVICES": "1"})[1]
    assert not visible_devices(DIFFERENT, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})[1]
    assert not visible_devices(DIFFERENT, {"CUDA_VISIBLE_DEVICES": "GPU-aa2"})[1]
    assert not visible_devices(DIFFERENT, {"CUDA_VISIBLE_DEVICES": ""})[1]


def test_counted_by_bus_id() -> None:
    """The order is that of the PCI bus ids, whatever order the driver listed the GPUs in."""
    devices = [gpu(0, "GPU-second", bus="0000:41"), gpu(1, "GPU-first", bus="0000:01")]

    assert ["GPU-first", "GPU-second"] == [device.uuid for device in visible_devices(devices, {})[0]]


def test_lost_gpu_keeps_its_place() -> None:
    """A GPU that cannot be read has no bus id and still counts at its own position."""
    lost = GpuFailure(1, "GPU 1 has fallen off the bus", "Reboot")

    assert [0, 1, 2] == [device.index for device in visible_devices([ALIKE[0], lost, ALIKE[2]], {})[0]]


def test_mig_slices() -> None:
    """An index means a GPU, of which a process sees the first slice; a MIG uuid means that slice."""
    devices, caution = visible_devices(SLICED, {})
    assert ["MIG-x", "GPU-z"] == [device.uuid for device in devices]
    assert "MIG-<uuid>" in caution
    assert ["GPU-z"] == [device.uuid for device in visible_devices(SLICED, {"CUDA_VISIBLE_DEVICES": "1"})[0]]
    assert ["MIG-y"] == [
        device.uuid for device in visible_devices(SLICED, {"CUDA_VISIBLE_DEVICES": "MIG-y"})[0]
    ]
