"""
The measuring process: `python -m memplan.record.worker RECORD [--limit BYTES] [--no-trace] [--wait]`.

RECORD holds the job; what is measured is written into it step by step, and whatever goes wrong becomes its
outcome. With `--wait` everything is imported, and nothing begun until a line comes on standard input: the
import then takes no time from what is measured before.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from memplan import __version__
from memplan.errors import MemplanError
from memplan.preflight.environment import VARIABLES
from memplan.record.compact import encode
from memplan.record.device import Device, make_device
from memplan.record.file import COMPLETED, OUT_OF_MEMORY, RecordFile
from memplan.record.steps import Observer, random_samples, run_steps
from memplan.tape.vocabulary import resized_config
from memplan.train.group import end_process
from memplan.train.refusals import check_device, refuse_untrainable
from memplan.train.tokens import first_line
from memplan.train.worker import out_of_memory_words

LIBRARIES = (
    "transformers", "peft", "accelerate", "bitsandbytes", "triton", "liger-kernel", "flash-attn", "safetensors",
)  # fmt: skip
EXIT_CODES = {COMPLETED: 0, OUT_OF_MEMORY: 1}
"""By outcome; 2 for all others."""
_TRACEBACK_LINES = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the job of the record that the arguments name."""
    parser = argparse.ArgumentParser(prog="memplan.record.worker")
    parser.add_argument("record", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--no-trace", action="store_true")
    parser.add_argument("--wait", action="store_true")
    options = parser.parse_args(arguments)
    if options.wait:
        _import_libraries()
        if not sys.stdin.readline():
            return 0
    return measure(
        RecordFile.read(options.record),
        lambda: make_device(history=not options.no_trace, limit_bytes=options.limit),
        with_trace=not options.no_trace,
    )


def measure(record: RecordFile, open_device: Callable[[], Device], *, with_trace: bool = True) -> int:
    """
    Run the job of a record on a device and complete the record, however it ends. Returns the exit code: 0
    completed, 1 out of memory, 2 anything else.
    """
    measurement = _Measurement(record, open_device)
    record.update(versions=library_versions(), environment=_environment())
    outcome, error, trace_lines = COMPLETED, None, None
    try:
        measurement.run()
    except MemplanError as refusal:
        outcome, error = "refused", f"{refusal.message}; {refusal.hint}" if refusal.hint else refusal.message
    except ImportError as missing:
        outcome, error = "missing_library", first_line(missing)
    except Exception as failure:
        outcome, error, trace_lines = _explain(failure, measurement.phase)
    measurement.close(with_trace=with_trace)
    record.update(outcome=outcome, error=error, traceback=trace_lines, phase=list(measurement.phase))
    return EXIT_CODES.get(outcome, 2)


class _Measurement:
    """One run of the job; every step's measurements are in the record before the next begins."""

    def __init__(self, record: RecordFile, open_device: Callable[[], Device]) -> None:
        self.record = record
        self.phase: tuple[str, int] = ("start", 0)
        self._open_device = open_device
        self._device: Device | None = None
        self._losses: list[float | None] = []
        self._began = time.perf_counter()

    def run(self) -> None:
        """Load the model and run the steps; raises whatever goes wrong."""
        job = self.record.job
        config = resized_config(job, self.record.fields["model_config"])
        refuse_untrainable(job)
        steps = self.record.fields["steps"]
        samples = random_samples(job, config, steps=steps)
        device = self._open_device()
        check_device(job, device.type)
        self._device = device
        self.record.update(device=device.open(), process=device.process())
        observer = Observer(self._begin, self._end_step)
        run_steps(job, config, device.tensors, samples, observer, steps=steps)

    def close(self, *, with_trace: bool) -> None:
        """What can only be asked at the end; a part that fails leaves the others."""
        device = self._device
        if device is None:
            return
        parts: dict[str, Callable[[], Any]] = {
            "phases": device.phases,
            "process": device.process,
            "statistics": device.statistics,
            "segments": device.segments,
        }
        problems = []
        try:
            device.end()
        except Exception as error:
            problems.append(f"end: {first_line(error)}")
        for name, part in parts.items():
            try:
                self.record.update(**{name: part()})
            except Exception as error:
                problems.append(f"{name}: {first_line(error)}")
        if with_trace:
            try:
                flat, problem = device.trace()
                self.record.update(trace=encode(flat))
                problems += [problem] if problem else []
            except Exception as error:
                problems.append(f"trace: {type(error).__name__}: {first_line(error)}")
        self.record.update(trace_error="; ".join(problems) or None)

    def _begin(self, phase: str, step: int) -> None:
        self.phase = (phase, step)
        if self._device is not None:
            self._device.begin(phase, step)

    def _end_step(self, step: int, loss: float | None) -> None:
        assert self._device is not None
        self._losses.append(loss)
        self.record.update(
            phases=self._device.phases(),
            losses=self._losses,
            seconds=round(time.perf_counter() - self._began, 3),
            phase=list(self.phase),
        )
        if step == self.record.fields["steps"]:
            # What is freed when the model goes belongs to no step.
            self._device.begin("end", step)


def _explain(error: Exception, phase: tuple[str, int]) -> tuple[str, str, list[str] | None]:
    """(outcome, sentence, last lines of the traceback)"""
    words = out_of_memory_words(error)
    where = f"in {phase[0]} of step {phase[1]}"
    if words is not None:
        return OUT_OF_MEMORY, f"out of memory {where}: {words}", None
    frames = traceback.extract_tb(error.__traceback__)[-_TRACEBACK_LINES:]
    lines = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames]
    return "failed", f"{type(error).__name__} {where}: {first_line(error)}", lines


def library_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "memplan": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _text(torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None),
        "driver": _driver_version(),
    }
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _driver_version() -> str | None:
    from memplan.gpu.nvml import NvmlProbe
    from memplan.gpu.probe import GpuReading

    with suppress(MemplanError, OSError):
        for device in NvmlProbe().read():
            if isinstance(device, GpuReading):
                return device.driver_version
    return None


def _environment() -> dict[str, str]:
    """Variables that decide what memory is taken."""
    names = (*VARIABLES, "CUDA_MODULE_LOADING", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE")
    return {name: os.environ[name] for name in names if name in os.environ}


def _import_libraries() -> None:
    """
    What every job imports, unless it might touch the GPU while another job is measured on it: bitsandbytes asks
    for the card when it is imported, and peft and the Trainer import it.
    """
    names = ["transformers.models.llama.modeling_llama"]
    if importlib.util.find_spec("bitsandbytes") is None:
        names += ["peft", "transformers.trainer"]
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)


if __name__ == "__main__":
    end_process(main())
