"""
Host RAM that loading takes, on one node.

transformers maps the files of a checkpoint (5.23: modeling_utils.py, _load_pretrained_model; core_model_loading.py,
_materialize_copy): a tensor of the dtype that is asked for is a part of a file, which all ranks of a node share and the
system reads again when RAM is short. What is cast, or put together from several tensors, is memory of each process.
"""

from __future__ import annotations

from memplan.budget.host_sizes import HostSizes, trained_numbers
from memplan.job.spec import DTYPE_BYTES, Job
from memplan.tape.packing import packed_bytes
from memplan.tape.sharded.sharding import SHARDED
from memplan.tape.sharded.zero_groups import zero_stage


def loading_bytes(job: Job, sizes: HostSizes) -> tuple[int, str]:
    """Bytes that cannot be taken back, of all ranks, and what they are."""
    itemsize = DTYPE_BYTES[job.dtype]
    if zero_stage(job) in (1, 2) and not job.has_quantized_base:
        return (
            sizes.base * itemsize * job.world_size,
            "the whole model, once per rank, as DeepSpeed is given it",
        )
    if job.loop != "memplan" and not zero_stage(job):
        return _by_transformers(job, sizes)
    if job.weights == "random":
        return 0, ""
    if job.load.ram_efficient:
        if job.data.special_tokens and 2 * sizes.embedding > sizes.largest:
            return 2 * sizes.embedding * itemsize, "embeddings, and their copy with more rows"
        return sizes.largest * itemsize, "the largest tensor, streamed"
    num_bytes, note = _whole(job, sizes)
    return num_bytes * job.world_size, note


def _by_transformers(job: Job, sizes: HostSizes) -> tuple[int, str]:
    """
    Every rank loads all of the model, also with RAM-efficient loading, which transformers 5.23 heeds in buffers alone
    (modeling_utils.py, _move_missing_keys_from_meta_to_device; in 4.x ranks other than the first of a node left the
    weights out). 4-bit weights are packed on the device, tensor by tensor; those of 8 bits come back from it, and go
    there again in float16 (integrations/bitsandbytes.py, Bnb8bitQuantize).
    """
    if job.has_8bit_base and job.weights != "random":
        copies = DTYPE_BYTES[job.dtype] + (0 if job.dtype == "float16" else DTYPE_BYTES["float16"])
        note = "the largest tensor, from the device and in float16, once per rank"
        return sizes.largest * copies * job.world_size, note
    if job.has_quantized_base:
        if job.weights == "random" or sizes.stored_dtype == job.dtype:
            return 0, ""
        largest = sizes.embedding if sizes.is_stored_packed else sizes.largest
        num_bytes = largest * DTYPE_BYTES[job.dtype] * job.world_size
        return num_bytes, "the largest tensor, cast, once per rank"
    num_bytes, note = _whole(job, sizes)
    adapters = [] if job.method == "full" else trained_numbers(job, sizes)
    num_bytes += sum(count * itemsize for count, itemsize in adapters)
    if job.data.special_tokens:
        num_bytes += 2 * sizes.embedding * DTYPE_BYTES[job.dtype]
        note = ", ".join(filter(None, [note, "embeddings and head with more rows"]))
    if job.autocast is not None and job.parallel.strategy in SHARDED and job.parallel.fsdp_version == 2:
        # accelerate 1.15, utils/fsdp_utils.py, fsdp2_prepare_model: what trains becomes float32 before it is cut.
        if job.method == "full" and job.dtype != "float32":
            num_bytes = sizes.base * DTYPE_BYTES["float32"]
            note = "the whole model in float32, which accelerate makes of it, once per rank"
        elif job.method != "full":
            num_bytes += sum(count * (4 - itemsize) for count, itemsize in adapters)
    return num_bytes * job.world_size, note


def _whole(job: Job, sizes: HostSizes) -> tuple[int, str]:
    """What one process takes that loads the whole model in `dtype`."""
    itemsize = DTYPE_BYTES[job.dtype]
    if job.weights == "random":
        # Of a Trainer's script from_config makes it; without FSDP it is made on the device.
        if job.parallel.strategy in SHARDED:
            return sizes.base * itemsize, "the whole model, once per rank"
        return 0, ""
    if sizes.stored_dtype is None:
        note = f"the whole model, cast, once per rank; next to nothing of a checkpoint in {job.dtype}"
        return sizes.base * itemsize, note
    if sizes.stored_dtype != job.dtype:
        return sizes.base * itemsize, f"the whole model, cast from {sizes.stored_dtype}, once per rank"
    if sizes.stacked:
        stacked = sizes.stacked + sizes.largest_stack
        return stacked * itemsize, "experts, put together from the checkpoint's, once per rank"
    return 0, "" if job.method == "full" else "adapters, once per rank"


def page_cache_bytes(job: Job, sizes: HostSizes) -> int:
    """Of the files that are read or mapped, whose dtype is taken to be the job's where it is not known."""
    if job.weights == "random":
        return 0
    packed = sizes.packed if sizes.is_stored_packed else 0
    return (sizes.base - packed) * DTYPE_BYTES[sizes.stored_dtype or job.dtype] + packed_bytes(packed)
