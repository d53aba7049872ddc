"""Host RAM of one node: loading, and what the job keeps there."""

from __future__ import annotations

from memplan.budget.result import Host, Line
from memplan.job.spec import DTYPE_BYTES, Job
from memplan.model.architecture import Architecture
from memplan.model.tensors import num_parameters, parameters
from memplan.tape.repeat import Expansion


def host_memory(job: Job, architecture: Architecture, expansion: Expansion) -> Host:
    """
    Bytes of tensors in RAM, all ranks on one node; the interpreter and its libraries are not counted.

    Loading comes first and what the run keeps comes after, so the peak is the larger of the two.
    """
    loading = Line("loading", *_loading(job, architecture))
    kept = [Line(category, num_bytes * job.world_size) for category, num_bytes in expansion.host.items() if num_bytes]
    peak_bytes = max(loading.bytes, sum(line.bytes for line in kept))
    return Host(peak_bytes, tuple(line for line in (loading, *kept) if line.bytes))


def _loading(job: Job, architecture: Architecture) -> tuple[int, str]:
    itemsize = DTYPE_BYTES[job.dtype]
    if job.weights == "random":
        return 0, ""
    if job.load.ram_efficient:
        largest = max(parameter.num_elements for parameter in parameters(architecture))
        return largest * itemsize, "the largest tensor, streamed"
    return num_parameters(architecture) * itemsize * job.world_size, "the whole model, once per rank"
