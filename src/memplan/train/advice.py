"""After running out of memory: what is free, and the smallest change with which this trainer can go on."""

from __future__ import annotations

import dataclasses
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from memplan.budget.result import Change, Result
from memplan.errors import MemplanError
from memplan.gpu.capacity import Capacity
from memplan.job.spec import Job
from memplan.model import Architecture
from memplan.train.output_folder import different_fields
from memplan.train.refusals import check_device, refuse_untrainable
from memplan.train.report import resume_command


def free_capacity(device: torch.device, plan: Result | None) -> Capacity:
    """
    What a process can get of the GPU, or of the machine's RAM. Call it after letting go of everything.

    Our own CUDA context is not free, but it is ours: as much as the plan counts for it is added.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        usable = min(total, free + (plan.peak.non_torch_bytes if plan else 0))
        name = torch.cuda.get_device_name(device)
    else:
        page = os.sysconf("SC_PAGE_SIZE")
        total, usable = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
        name = "this machine's RAM"
    return Capacity(name, total, usable, total - usable, "after the run released its memory")


def smallest_change(
    job: Job, architecture: Architecture, plan: Result, capacity: Capacity, device_type: str
) -> Change | None:
    """
    The smallest change that fits and that this trainer can run here; None if there is none.

    The plan was too low or somebody took the memory; either way what it said would fit does not, so the
    change has to save a twentieth of it at least.
    """
    from memplan.fit import smallest_changes

    room = min(capacity.usable_bytes, plan.need_bytes * 95 // 100)
    try:
        found = smallest_changes(
            job.replace(loop="memplan"),
            architecture,
            dataclasses.replace(capacity, usable_bytes=room),
            evaluate=_Trainable(architecture, device_type),
            num_results=1,
        )
    except MemplanError:
        return None
    return found[0] if found and found[0].set else None


@dataclass(frozen=True)
class _Trainable:
    """Needs of the jobs that this trainer can run on this device; the others cannot be estimated."""

    architecture: Architecture
    device_type: str

    def lower_bound_bytes(self, job: Job) -> int:
        from memplan.budget.estimate import quick_need_bytes

        self._check(job)
        return (
            quick_need_bytes(job, self.architecture) if self.device_type == "cuda" else self._cpu_bytes(job)
        )

    def need_bytes(self, job: Job) -> int:
        from memplan.budget.estimate import need_bytes

        self._check(job)
        return need_bytes(job, self.architecture) if self.device_type == "cuda" else self._cpu_bytes(job)

    def _cpu_bytes(self, job: Job) -> int:
        from memplan.tape.writer import write_tape

        return write_tape(job, self.architecture, device="cpu").peak_live_bytes(1)

    def _check(self, job: Job) -> None:
        refuse_untrainable(job)
        check_device(job, self.device_type)


def retry_command(folder: Path, job: Job, change: Change, *, has_checkpoint: bool) -> str:
    """
    What to type to go on with a change: the run itself where it learns the same, else a new one in another
    folder.
    """
    from memplan.render.words import set_flags

    flags = set_flags(change.set)
    if not different_fields(job, job.replace(**change.set)):
        return f"{resume_command(folder)} {flags}"
    command = f"{resume_command(folder).removesuffix(' --resume')} {flags}"
    if has_checkpoint:
        command += f" --set {shlex.quote(f'train.output_dir={folder}-changed')}"
    return command
