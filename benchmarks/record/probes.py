"""
What single operations allocate on the device at hand: `python -m benchmarks.record.probes FILE`.

    process    bytes used on the device before the context, after it, and after each group; CUDA only
    choices    the kernel of scaled_dot_product_attention, by question
    cases      {group, shape, forward, backward}: each pass as its events (+ bytes allocated, - bytes freed, in order),
               the peak above what was there before (peak_bytes), and what is left at its end (kept_bytes); or an error

Requested bytes on CUDA, from the allocator's history; on the CPU what torch's profiler reports.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.record.operations import GPU, SMALL, Case, Scale, cases, choices
from memplan.record.device import HISTORY_ENTRIES, device_used_bytes
from memplan.record.profile import Profile
from memplan.record.worker import library_versions
from memplan.train.record import write_atomically

SCHEMA_VERSION = 1
SECONDS = 150
BROKEN_CONTEXT = 3
"""Exit code after an error that leaves the CUDA context unusable; the next process goes on behind that case."""


class Watch(Protocol):
    """Says what a function allocates and frees."""

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, list[int]]:
        """What `run` returns, and its events in order: + bytes allocated, - bytes freed."""


class CudaWatch:
    """From the allocator's history. `cuda` is the module `torch.cuda`, or a double of it."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, list[int]]:
        self._restart()
        before = len(self._entries())
        result = run()
        self.cuda.synchronize()
        signs = {"alloc": 1, "free_completed": -1}
        entries = self._entries()[before:]
        return result, [
            signs[entry["action"]] * entry["size"] for entry in entries if entry["action"] in signs
        ]

    def _restart(self) -> None:
        """Record with an empty history, or where this torch cannot clear it, with the one at hand."""
        options = {"context": None, "stacks": "python", "max_entries": HISTORY_ENTRIES}
        try:
            self.cuda.memory._record_memory_history("all", clear_history=True, **options)
        except TypeError:
            self.cuda.memory._record_memory_history("all", **options)

    def _entries(self) -> list[dict[str, Any]]:
        traces = self.cuda.memory._snapshot()["device_traces"]
        return traces[0] if traces else []


class CpuWatch:
    """From torch's profiler."""

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, list[int]]:
        profile = Profile()
        try:
            result = run()
        finally:
            witnessed = profile.stop()
        return result, [event.num_bytes for event in witnessed.on("cpu").allocations]


def run_case(case: Case, watch: Watch) -> dict[str, Any]:
    """What a case allocates; an operation that this device does not have is its error."""
    found: dict[str, Any] = {"group": case.group, "shape": case.shape}
    try:
        run = case.make()
        result, events = watch(run)
        found["forward"] = summarise(events)
        if isinstance(result, torch.Tensor) and result.requires_grad:
            gradient = torch.ones_like(result)
            _, events = watch(lambda: result.backward(gradient))
            found["backward"] = summarise(events)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found


def summarise(events: Sequence[int]) -> dict[str, Any]:
    """Events with their peak and their sum."""
    live = list(accumulate(events, initial=0))
    return {"events": list(events), "peak_bytes": max(live), "kept_bytes": live[-1]}


class Probes:
    """
    The file, rewritten before every case: a case that ends the process is the last one in it, with an error, and
    `--resume` goes on behind it.
    """

    def __init__(self, path: Path, watch: Watch, *, seconds: float, resume: bool = False) -> None:
        self.path = path
        self.watch = watch
        self._ends_at = time.monotonic() + seconds
        self.fields: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "versions": library_versions(),
            "device": None,
            "process": [],
            "choices": [],
            "cases": [],
            "left_out": 0,
            "finished": False,
        }
        if resume and path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            self.fields |= {name: known[name] for name in ("process", "cases")}

    def write(self) -> None:
        """Put everything found so far on disk."""
        write_atomically(self.path, json.dumps(self.fields, separators=(",", ":")) + "\n")

    def note_process(self, moment: str, used_bytes: int | None) -> None:
        """What the device has in use, by whoever."""
        self.fields["process"].append([moment, used_bytes])

    def run(self, questions: Iterable[Case], after_group: Callable[[str], None]) -> None:
        """Every case that is not in the file yet, while there is time."""
        found = self.fields["cases"]
        group = None
        for case in islice(questions, len(found), None):
            if time.monotonic() > self._ends_at:
                self.fields["left_out"] += 1
                continue
            if group is not None and case.group != group:
                after_group(group)
            group = case.group
            found.append({"group": case.group, "shape": case.shape, "error": "the process ended here"})
            self.write()
            found[-1] = run_case(case, self.watch)
            if "CUDA error" in found[-1].get("error", ""):
                self.write()
                raise SystemExit(BROKEN_CONTEXT)
        if group is not None:
            after_group(group)
        self.write()


def probe(
    path: Path, *, seconds: float = SECONDS, resume: bool = False, scale: Scale | None = None
) -> dict[str, Any]:
    """Ask everything of the device at hand, and write the answers to `path`."""
    if torch.cuda.is_available():
        probes, device = _open_cuda(path, seconds, resume)
        scale = scale or GPU

        def after_group(group: str) -> None:
            gc.collect()
            torch.cuda.empty_cache()
            probes.note_process(f"outside torch after {group}", _outside_bytes())
    else:
        probes, device = Probes(path, CpuWatch(), seconds=seconds, resume=resume), torch.device("cpu")
        probes.fields["device"] = {"type": "cpu"}
        scale = scale or SMALL

        def after_group(group: str) -> None:
            gc.collect()

    # The choices take no time, and the cases begin with the products that make cuBLAS take its workspaces.
    probes.fields["choices"] = list(choices(device, scale))
    probes.run(cases(device, scale), after_group)
    probes.fields["finished"] = True
    probes.write()
    return probes.fields


def _open_cuda(path: Path, seconds: float, resume: bool) -> tuple[Probes, torch.device]:
    before = device_used_bytes()
    torch.cuda.init()
    torch.cuda.synchronize()
    probes = Probes(path, CudaWatch(torch.cuda), seconds=seconds, resume=resume)
    properties = torch.cuda.get_device_properties(0)
    probes.fields["device"] = {
        "type": "cuda",
        "name": properties.name,
        "compute_capability": [properties.major, properties.minor],
        "total_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }
    probes.note_process("used before the context", before)
    probes.note_process("used after the context", _outside_bytes())
    probes.write()
    return probes, torch.device("cuda", 0)


def _outside_bytes() -> int:
    """What the driver says is in use, without torch's segments."""
    free, total = torch.cuda.mem_get_info(0)
    return int(total - free - torch.cuda.memory_reserved(0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file that the arguments name."""
    parser = argparse.ArgumentParser(prog="benchmarks.record.probes")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    probe(options.file, seconds=options.seconds, resume=options.resume)


if __name__ == "__main__":
    main()
