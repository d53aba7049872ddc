"""Host RAM of one node: loading, and what the job keeps there."""

from __future__ import annotations

from memplan.budget.count import count_parameters
from memplan.budget.result import Host, Line
from memplan.job.spec import DTYPE_BYTES, Job
from memplan.model.architecture import Architecture
from memplan.model.tensors import num_parameters, parameters
from memplan.tape.optimizer import SMALL_PAGED_ELEMENTS
from memplan.tape.shape import checkpointed_layers
from memplan.tape.sharding import layout


def host_memory(job: Job, architecture: Architecture) -> Host:
    """
    Bytes of tensors in RAM, all ranks on one node; the interpreter and its libraries are not counted.

    Loading comes first and what the run keeps comes after, so the peak is the larger of the two.
    """
    loading = Line("loading", *_loading(job, architecture))
    kept = [
        Line("weights", *_parameters(job, architecture)),
        Line("optimizer", *_optimizer(job, architecture)),
        Line("activations", *_activations(job, architecture)),
    ]
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


def _parameters(job: Job, architecture: Architecture) -> tuple[int, str]:
    """Offloaded shards of the parameters and of the gradients that train; replicas each keep their own."""
    if not job.offload.params:
        return 0, ""
    replicas = job.world_size // layout(job).parameters
    trainable = count_parameters(job, architecture).trainable * 4
    return (num_parameters(architecture) * DTYPE_BYTES[job.dtype] + trainable) * replicas, "offloaded shards"


def _optimizer(job: Job, architecture: Architecture) -> tuple[int, str]:
    """
    Offloaded states; or those of a paged optimizer, which the driver moves to the host when the GPU is full:
    all of them at worst. bitsandbytes pages tensors from SMALL_PAGED_ELEMENTS elements on, which the few
    below do not change.
    """
    trainable = count_parameters(job, architecture).trainable
    replicas = job.world_size // layout(job).optimizer
    if layout(job).optimizer_on_host:
        return trainable * _state_bytes(job) * replicas, "offloaded states"
    if job.optimizer.startswith("paged"):
        note = f"paged states (of tensors from {SMALL_PAGED_ELEMENTS} elements on), at worst"
        return trainable * _state_bytes(job) * replicas, note
    return 0, ""


def _state_bytes(job: Job) -> int:
    """Bytes of optimizer state per trained parameter."""
    if "8bit" in job.optimizer:
        return 2
    per_state = 4 if job.method != "full" or job.optimizer.startswith("paged") else DTYPE_BYTES[job.dtype]
    return {"sgd": 0, "lion": 4, "adafactor": 0}.get(job.optimizer, 2 * per_state)


def _activations(job: Job, architecture: Architecture) -> tuple[int, str]:
    if not job.activation_offload:
        return 0, ""
    tokens = job.micro_batch_size * job.max_seq_len
    inputs = tokens * architecture.hidden_size * DTYPE_BYTES[job.dtype]
    num_inputs = len(checkpointed_layers(job, architecture)) * job.world_size
    return num_inputs * inputs, "inputs of checkpointed blocks"
