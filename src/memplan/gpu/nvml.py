"""
Live readings through NVML, the driver's own library: no CUDA context is made and no card is changed.

`pynvml` (the package nvidia-ml-py) is imported and the driver's library loaded only when a reading is
taken. Every way in which that fails on real machines is a `NoLiveGpu`, or a `GpuFailure` of one GPU, with a
sentence and a remedy.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memplan.errors import NoLiveGpu
from memplan.gpu.probe import Device, GpuFailure, GpuProcess, GpuReading

_PLAN_WITHOUT = 'Name the GPU instead, such as `--gpu 24GB` or `--gpu "RTX 4090"`'
_CONTAINER = "in a container, start it with the GPUs (`docker run --gpus all`)"
_INIT_FAILURES = {
    # Codes of nvml.h, NVML_ERROR_*.
    4: ("The NVIDIA driver refuses access to this user", "Check the permissions of /dev/nvidia*"),
    9: ("The NVIDIA library is installed but its driver is not loaded", f"Load the driver; {_CONTAINER}"),
    12: (
        "This machine has no NVIDIA driver (libnvidia-ml.so.1 is missing)",
        f"{_PLAN_WITHOUT}; {_CONTAINER}",
    ),
    18: (
        "The NVIDIA driver was upgraded and the old one is still loaded",
        "Reboot, or reload the nvidia kernel modules",
    ),
    999: (
        "The NVIDIA driver reports an unknown error",
        "Restart the container or reboot: containers lose their GPUs when the host reloads its daemons",
    ),
}
_LOST = 15
_NOT_FOUND = 6
_NO_PERMISSION = 4
_NOT_SUPPORTED = 3
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""The kernel's first pid namespace (PROC_PID_INIT_INO): only there are the driver's pids those of /proc."""


class NvmlProbe:
    """
    Reads the GPUs of this machine through NVML.

    `library` stands in for the `pynvml` module and `proc` for /proc, for tests.
    """

    def __init__(self, library: Any = None, proc: Path = Path("/proc")) -> None:
        self._library = library
        self._proc = proc

    def read(self) -> tuple[Device, ...]:
        """Every GPU, MIG devices in place of their GPU, in NVML's order; `NoLiveGpu` if there is none."""
        with self._initialised() as nvml:
            driver_version = _optional(nvml, nvml.nvmlSystemGetDriverVersion)
            count = nvml.nvmlDeviceGetCount()
            devices = tuple(
                device for index in range(count) for device in self._read_gpu(nvml, index, driver_version)
            )
        if not devices:
            raise NoLiveGpu(
                "The NVIDIA driver is loaded but lists no GPU", hint=f"{_PLAN_WITHOUT}; {_CONTAINER}"
            )
        return devices

    @contextlib.contextmanager
    def _initialised(self) -> Iterator[Any]:
        nvml = self._library or _pynvml()
        try:
            nvml.nvmlInit()
            try:
                yield nvml
            finally:
                nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            raise _no_live_gpu(error.value, str(error)) from None
        except nvml.NVMLLibraryMismatchError:
            raise _no_live_gpu(13, "") from None

    def _read_gpu(self, nvml: Any, index: int, driver_version: str | None) -> Iterator[Device]:
        """One reading, one per MIG device, or the failure of this GPU alone."""
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error:
            yield _failure(index, "", "", "", error)
            return
        shared = {
            "index": index,
            "pci_bus_id": _bus_id(_optional(nvml, nvml.nvmlDeviceGetPciInfo, handle)),
            "driver_version": driver_version,
            "compute_capability": _optional(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle),
            "ecc": _flag(_optional(nvml, nvml.nvmlDeviceGetEccMode, handle)),
            "display_active": _flag(_optional(nvml, nvml.nvmlDeviceGetDisplayActive, handle)),
        }
        mig_mode = _optional(nvml, nvml.nvmlDeviceGetMigMode, handle)
        if _flag(mig_mode):
            yield from self._read_mig(nvml, handle, shared)
        else:
            yield self._read_device(nvml, handle, shared)

    def _read_mig(self, nvml: Any, parent: Any, shared: dict[str, Any]) -> Iterator[Device]:
        """The MIG devices of a GPU, whose own figures are refused inside containers and are of no use."""
        found = False
        for mig_index in range(_optional(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, parent) or 0):
            handle = _optional(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, parent, mig_index)
            if handle is not None:
                found = True
                yield self._read_device(nvml, handle, {**shared, "mig_index": mig_index})
        if not found:
            yield GpuFailure(
                index=shared["index"],
                reason=f"GPU {shared['index']} is in MIG mode and has no MIG device for us",
                hint="Create one (`nvidia-smi mig -cgi ... -C`), or hand it to this container",
                pci_bus_id=shared["pci_bus_id"],
            )

    def _read_device(self, nvml: Any, handle: Any, shared: dict[str, Any]) -> Device:
        uuid = _optional(nvml, nvml.nvmlDeviceGetUUID, handle) or ""
        name = _optional(nvml, nvml.nvmlDeviceGetName, handle) or "NVIDIA GPU"
        try:
            memory = _memory(nvml, handle) or self._host_memory()
        except nvml.NVMLError as error:
            return _failure(shared["index"], uuid, name, shared["pci_bus_id"], error)
        if memory is None:
            return GpuFailure(
                index=shared["index"],
                reason=f"{name} shares its memory with the host, and {self._proc}/meminfo cannot be read",
                hint="Name a size instead, such as `--gpu 100GiB`",
                uuid=uuid,
                name=name,
                pci_bus_id=shared["pci_bus_id"],
            )
        processes = self._processes(nvml, handle, memory["total_bytes"], shared["driver_version"])
        sees_host = self._in_initial_pid_namespace()
        own = [process.used_bytes or 0 for process in processes if sees_host and process.pid == os.getpid()]
        return GpuReading(
            **shared,
            **memory,
            uuid=uuid,
            name=name,
            processes=processes,
            processes_complete=sees_host,
            own_bytes=sum(own),
        )

    def _host_memory(self) -> dict[str, Any] | None:
        """Unified memory, of which NVML reports nothing: MemTotal and MemAvailable (`man 5 proc_meminfo`)."""
        try:
            lines = (self._proc / "meminfo").read_text(encoding="ascii").splitlines()
            sizes = {
                line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")
            }
            total, available = sizes["MemTotal"], sizes["MemAvailable"]
        except (OSError, ValueError, KeyError):
            return None
        return {
            "total_bytes": total,
            "used_bytes": total - available,
            "reserved_bytes": None,
            "free_bytes": available,
            "unified": True,
        }

    def _processes(
        self, nvml: Any, handle: Any, total_bytes: int, driver_version: str | None
    ) -> tuple[GpuProcess, ...]:
        """Compute and graphics processes, each pid once; none where the driver is known to report garbage."""
        if _misreports_processes(driver_version):
            return ()
        used: dict[int, int | None] = {}
        for call in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            for process in _optional(nvml, call, handle) or ():
                size = process.usedGpuMemory
                if size is None or size > total_bytes:
                    used.setdefault(process.pid, None)
                else:
                    used[process.pid] = max(size, used.get(process.pid) or 0)
        return tuple(GpuProcess(pid, size, self._process_name(pid)) for pid, size in sorted(used.items()))

    def _process_name(self, pid: int) -> str | None:
        if not self._in_initial_pid_namespace():
            return None
        try:
            return (self._proc / str(pid) / "comm").read_text(
                encoding="utf-8", errors="replace"
            ).strip() or None
        except OSError:
            return None

    def _in_initial_pid_namespace(self) -> bool:
        try:
            return str((self._proc / "self" / "ns" / "pid").readlink()) == _INITIAL_PID_NAMESPACE
        except OSError:
            return False


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError:
        message = "The package nvidia-ml-py, which reads the GPUs, is not installed"
        raise NoLiveGpu(message, hint="Run `pip install nvidia-ml-py`") from None
    return pynvml


def _memory(nvml: Any, handle: Any) -> dict[str, Any] | None:
    """
    Total, used, reserved and free; None where the GPU has no memory of its own to report.

    Version 2 (driver 510 on) tells the driver's reserve apart, version 1 counts it as used.
    """
    version = getattr(nvml, "nvmlMemory_v2", None)
    if version is not None:
        with contextlib.suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=version)
            return _sizes(memory, memory.reserved)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        if error.value == _NOT_SUPPORTED:
            return None
        raise
    return _sizes(memory, None)


def _sizes(memory: Any, reserved: int | None) -> dict[str, Any]:
    return {
        "total_bytes": memory.total,
        "used_bytes": memory.used,
        "reserved_bytes": reserved,
        "free_bytes": memory.free,
    }


def _optional(nvml: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where this driver or GPU has none."""
    try:
        return call(*arguments)
    except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):
        return None


def _flag(mode: Any) -> bool | None:
    """NVML answers with 0 or 1, or with [current, pending]."""
    if mode is None:
        return None
    return bool(mode[0] if isinstance(mode, list | tuple) else mode)


def _bus_id(info: Any) -> str:
    if info is None:
        return ""
    bus_id = info.busId
    return bus_id.decode() if isinstance(bus_id, bytes) else str(bus_id)


def _misreports_processes(driver_version: str | None) -> bool:
    """Drivers 535.43 to 535.86 fill the process list with garbage (wookayin/gpustat#161)."""
    pieces = (driver_version or "").split(".")
    return pieces[0] == "535" and len(pieces) > 1 and pieces[1].isdigit() and 43 <= int(pieces[1]) <= 86


def _failure(index: int, uuid: str, name: str, pci_bus_id: str, error: Any) -> GpuFailure:
    label = f"GPU {index}" + (f" ({name})" if name else "")
    reasons = {
        _LOST: (
            f"{label} has fallen off the bus",
            "Reboot; if it happens again, check its power and temperature",
        ),
        _NO_PERMISSION: (
            f"{label} may not be read by this user",
            "In a container, hand it this GPU, or its MIG device, explicitly",
        ),
    }
    reason, hint = reasons.get(
        error.value, (f"{label} cannot be read: {error}", "See what `nvidia-smi` says about it")
    )
    return GpuFailure(index=index, reason=reason, hint=hint, uuid=uuid, name=name, pci_bus_id=pci_bus_id)


def _no_live_gpu(code: int, text: str) -> NoLiveGpu:
    if code == 13:
        message = "The NVIDIA driver is too old for the installed nvidia-ml-py"
        return NoLiveGpu(message, hint=f"Update the driver. {_PLAN_WITHOUT}")
    message, hint = _INIT_FAILURES.get(code, (f"The NVIDIA driver cannot be asked: {text}", _PLAN_WITHOUT))
    return NoLiveGpu(message, hint=hint)
