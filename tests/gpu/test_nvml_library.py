"""The unmodified pynvml against a small NVML library of our own, with the real symbols and structures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan.units import MiB

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>

typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned int pid; unsigned long long used; unsigned int instances[2]; } process;

#define MIB (1ULL << 20)
static int card;

int nvmlInitWithFlags(unsigned int flags) {
  const char *code = getenv("NVML_INIT"); return code ? atoi(code) : 0;
}
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "some error"; }
int nvmlSystemGetDriverVersion(char *text, unsigned int size) { snprintf(text, size, "550.54.14"); return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) { *handle = &card; return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned int size) {
  snprintf(text, size, "NVIDIA GeForce RTX 4090"); return 0;
}
int nvmlDeviceGetUUID(void *handle, char *text, unsigned int size) {
  snprintf(text, size, "GPU-4090aaaa"); return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  *major = 8; *minor = 9; return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, memory_v1 *memory) {
  memory->total = 24564 * MIB; memory->used = 1350 * MIB; memory->free = 23214 * MIB; return 0;
}
#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_v2 *memory) {
  if (memory->version != (2u << 24 | sizeof(memory_v2))) return 25;
  memory->total = 24564 * MIB; memory->reserved = 350 * MIB; memory->used = 1000 * MIB;
  memory->free = memory->total - memory->reserved - memory->used; return 0;
}
#endif
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned int *count, process *list) {
  if (*count == 0) { *count = 1; return 7; }
  *count = 1; list[0].pid = 4242; list[0].used = 900 * MIB; return 0;
}
"""


def build(folder: Path, *options: str) -> Path:
    """Compiles the library into its own folder; skips where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs cc on Linux")
    pytest.importorskip("pynvml")
    folder.mkdir()
    (folder / "nvml.c").write_text(SOURCE)
    command = [compiler, "-shared", "-fPIC", *options, "-o", "libnvidia-ml.so.1", "nvml.c"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def live(library: Path, **variables: str) -> dict[str, Any]:
    """What `resolve_capacity("live")` answers in a process that finds this library."""
    program = (
        "import dataclasses, json\n"
        "from memplan.errors import MemplanError\n"
        "from memplan.gpu import resolve_capacity\n"
        "try: answer = dataclasses.asdict(resolve_capacity('live'))\n"
        "except MemplanError as error: answer = {'error': error.message, 'exit_code': error.exit_code}\n"
        "print(json.dumps(answer))\n"
    )
    environment = {
        **{key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"},
        "PYTHONPATH": str(Path(memplan.__file__).parents[1]),
        "LD_LIBRARY_PATH": str(library),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_driver_of_today(tmp_path: Path) -> None:
    """Version 2 of the memory structure, the process list, and calls that the library lacks."""
    capacity = live(build(tmp_path / "lib"))

    assert ("NVIDIA GeForce RTX 4090", 24564 * MiB, 23214 * MiB, 1000 * MiB) == (
        capacity["gpu"], capacity["total_bytes"], capacity["usable_bytes"], capacity["used_by_others_bytes"],
    )  # fmt: skip
    assert "GPU-4090aaaa, driver 550.54.14" in capacity["source"]
    assert "4242 (900.00 MiB)" in capacity["source"]


def test_driver_before_510(tmp_path: Path) -> None:
    """Without version 2, version 1 gives the same free memory and counts the reserve as used."""
    capacity = live(build(tmp_path / "lib", "-DOLD_DRIVER"))

    assert (23214 * MiB, 1350 * MiB) == (capacity["usable_bytes"], capacity["used_by_others_bytes"])


def test_driver_not_loaded(tmp_path: Path) -> None:
    """A library whose driver is not loaded is the sentence for that, exit code 3."""
    answer = live(build(tmp_path / "lib"), NVML_INIT="9")

    assert ("The NVIDIA library is installed but its driver is not loaded", 3) == (
        answer["error"], answer["exit_code"],
    )  # fmt: skip


def test_no_library(tmp_path: Path) -> None:
    """Without the library, planning against a live GPU ends in one sentence."""
    pytest.importorskip("pynvml")
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a driver")

    assert 3 == live(tmp_path)["exit_code"]
    assert "no NVIDIA driver" in live(tmp_path)["error"]
