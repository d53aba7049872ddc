"""Host RAM of one node: loading, and what the job keeps there."""

from __future__ import annotations

from math import prod

from memplan.budget.count import count_copies, count_parameters
from memplan.budget.host_sizes import HostSizes, pinned_bytes, trained_numbers
from memplan.budget.loading import loading_bytes, page_cache_bytes
from memplan.budget.result import Host, Line
from memplan.job.spec import DTYPE_BYTES, Job
from memplan.model.architecture import Architecture
from memplan.model.families import layout as layout_of
from memplan.model.tensors import num_parameters, parameters
from memplan.tape.optimizer import SMALL_PAGED_ELEMENTS
from memplan.tape.packing import num_packed, packed_bytes
from memplan.tape.shape import checkpointed_layers
from memplan.tape.sharded.sharding import layout
from memplan.tape.sharded.zero_groups import as_deepspeed_runs_it, zero_stage


def host_memory(job: Job, architecture: Architecture) -> Host:
    """`host_of` a model whose program is known."""
    stacks = [prod(module.shape) for module in layout_of(architecture).block if module.role == "experts"]
    sizes = HostSizes(
        base=num_parameters(architecture),
        trainable=count_parameters(job, architecture).trainable,
        largest=max(parameter.num_elements for parameter in parameters(architecture)),
        embedding=architecture.vocab_size * architecture.hidden_size,
        hidden_size=architecture.hidden_size,
        num_layers=architecture.num_hidden_layers,
        packed=num_packed(job, architecture),
        copied=count_copies(job, architecture),
        stacked=architecture.num_hidden_layers * sum(stacks),
        largest_stack=max(stacks, default=0),
        stored_dtype=architecture.stored_dtype,
        is_stored_packed=architecture.stored is not None,
    )
    return host_of(job, sizes)


def host_of(job: Job, sizes: HostSizes) -> Host:
    """
    Bytes of tensors in RAM, all ranks on one node; the interpreter and its libraries are not counted.

    Loading comes first and what the run keeps comes after, so the peak is the larger of the two.
    """
    loading = Line("loading", *loading_bytes(job, sizes))
    kept = [
        Line("weights", *_parameters(job, sizes)),
        Line("optimizer", *_optimizer(job, sizes)),
        Line("activations", *_activations(job, sizes)),
    ]
    peak_bytes = max(loading.bytes, sum(line.bytes for line in kept))
    lines = tuple(line for line in (loading, *kept) if line.bytes)
    return Host(peak_bytes, lines, page_cache_bytes(job, sizes))


def _parameters(job: Job, sizes: HostSizes) -> tuple[int, str]:
    """
    Offloaded shards of the parameters, adapters included, and of the gradients of those that train; replicas each keep
    their own. Constants of packed weights, and NPT's tensors, are on the device.
    """
    if not job.offload.params:
        return 0, ""
    base = (sizes.base - sizes.packed) * DTYPE_BYTES[job.dtype] + packed_bytes(sizes.packed)
    if zero_stage(job):
        return base, "offloaded shards"
    with_gradients = {"full": 1, "npt": 0}.get(job.method, 2)
    trained = sum(map(prod, trained_numbers(job, sizes))) * with_gradients
    return (base + trained) * (job.world_size // layout(job).parameters), "offloaded shards"


def _optimizer(job: Job, sizes: HostSizes) -> tuple[int, str]:
    """
    Offloaded states; or those of a paged optimizer, which the driver moves to the host when the GPU is full:
    all of them at worst. bitsandbytes pages tensors from SMALL_PAGED_ELEMENTS elements on, which the few
    below do not change.
    """
    replicas = job.world_size // layout(job).optimizer
    if zero_stage(job) and (job.offload.optimizer or job.offload.params):
        return _zero_optimizer(job, sizes), "partitions of the optimizer: pinned, and the states"
    if layout(job).optimizer_on_host:
        states = sum(count * _state_bytes(job, itemsize) for count, itemsize in trained_numbers(job, sizes))
        if job.offload.params:
            return states * replicas, "offloaded states"
        # train/host_optimizer.py: one pinned buffer of each, where what trains has one dtype.
        copies = 2 * sum(pinned_bytes(count * itemsize) for count, itemsize in trained_numbers(job, sizes))
        return (states + copies) * replicas, "states, and pinned copies of weights and gradients"
    if job.optimizer.startswith("paged"):
        note = f"paged states (of tensors from {SMALL_PAGED_ELEMENTS} elements on), at worst"
        return sizes.trainable * _state_bytes(job, 4) * replicas, note
    return 0, ""


def _zero_optimizer(job: Job, sizes: HostSizes) -> int:
    """
    Of each rank's partition: master weights and gradients in float32, and a copy in the dtype of the weights, all three
    pinned (`pin_memory` is on by default), and the states. Stage 2 also keeps there what it has accumulated.
    """
    deepspeed = as_deepspeed_runs_it(job)
    partition = -(-sizes.trainable // job.parallel.dp_shard)
    pinned = [4, 4, DTYPE_BYTES[deepspeed.dtype]]
    if zero_stage(job) == 3:
        pinned.pop(0)  # master weights are not pinned
    if zero_stage(job) == 2 and job.gradient_accumulation_steps > 1:
        pinned.append(DTYPE_BYTES[deepspeed.dtype])
    states = _state_bytes(job, 4)
    pageable = states + (4 if zero_stage(job) == 3 else 0)
    per_rank = sum(pinned_bytes(itemsize * partition) for itemsize in pinned) + pageable * partition
    return per_rank * job.parallel.dp_shard


def _state_bytes(job: Job, itemsize: int) -> int:
    """Bytes of optimizer state per trained number, whose states have so many bytes."""
    if "8bit" in job.optimizer:
        return 2
    return {"sgd": 0, "lion": 4, "adafactor": 0}.get(job.optimizer, 2 * itemsize)


def _activations(job: Job, sizes: HostSizes) -> tuple[int, str]:
    """Each input is a pinned block of its own."""
    if job.offload.activations != "none":
        return sizes.offloaded * job.world_size, "pinned copies of what backward needs"
    if not job.activation_offload:
        return 0, ""
    tokens = job.micro_batch_size * job.max_seq_len
    # That preparation makes the embeddings float32, and with them what runs from block to block.
    is_prepared = job.method == "qlora" and job.quantization.kbit_preparation
    dtype = (
        job.autocast if job.autocast and layout(job).gathers else job.dtype
    )  # FSDP casts what a block is given
    block_bytes = tokens * sizes.hidden_size * (4 if is_prepared else DTYPE_BYTES[dtype])
    num_inputs = len(checkpointed_layers(job, sizes.num_layers)) * job.world_size
    return num_inputs * pinned_bytes(block_bytes), "pinned inputs of checkpointed blocks"
