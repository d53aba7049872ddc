"""What of a job's fields on several GPUs does not go together."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.job.problems import Conflict
from memplan.job.spec import Job

_UNSUPPORTED_DEGREES = {
    "tp": "tensor parallelism",
    "pp": "pipeline parallelism",
    "cp": "context parallelism",
    "ep": "expert parallelism",
}


def check_degrees(job: Job) -> Iterator[Conflict]:
    for name, technique in _UNSUPPORTED_DEGREES.items():
        degree = getattr(job.parallel, name)
        if degree != 1:
            yield Conflict(
                (f"parallel.{name}",),
                f"`parallel.{name}` is {degree}, and {technique} is not supported yet",
                f"set `parallel.{name}: 1`; `parallel.dp_shard` with `FULL_SHARD` spreads a model over GPUs",
            )


def check_strategy(job: Job) -> Iterator[Conflict]:
    strategy, shard, replicate = job.parallel.strategy, job.parallel.dp_shard, job.parallel.dp_replicate
    if strategy == "NO_SHARD":
        if shard > 1:
            yield Conflict(
                ("parallel.strategy", "parallel.dp_shard"),
                f"`parallel.dp_shard` is {shard}, but `NO_SHARD` keeps a whole copy on every GPU",
                f"set `parallel.strategy: FULL_SHARD`, or `parallel.dp_replicate: {shard}` for DDP",
            )
    elif strategy == "HYBRID_SHARD":
        if shard == 1 or replicate == 1:
            yield Conflict(
                ("parallel.strategy", "parallel.dp_shard", "parallel.dp_replicate"),
                "`HYBRID_SHARD` needs `parallel.dp_shard` and `parallel.dp_replicate` above 1, "
                f"not {shard} and {replicate}",
                "set `parallel.strategy: FULL_SHARD` to shard only, or `NO_SHARD` to replicate only",
            )
    else:
        if shard == 1:
            yield Conflict(
                ("parallel.strategy", "parallel.dp_shard"),
                f"`{strategy}` has nothing to shard over: `parallel.dp_shard` is 1",
                "set `parallel.dp_shard` to the number of GPUs, or `parallel.strategy: NO_SHARD`",
            )
        if replicate > 1:
            yield Conflict(
                ("parallel.strategy", "parallel.dp_replicate"),
                f"`{strategy}` has no copies, but `parallel.dp_replicate` is {replicate}",
                "set `parallel.strategy: HYBRID_SHARD`, or `parallel.dp_replicate: 1`",
            )


def check_fsdp1(job: Job) -> Iterator[Conflict]:
    if job.parallel.fsdp_version != 1:
        return
    if job.loop != "hf_trainer":
        yield Conflict(
            ("parallel.fsdp_version", "loop"),
            f"`parallel.fsdp_version: 1` is for `loop: hf_trainer`, and `loop: {job.loop}` shards with FSDP2",
            "leave it out, or set `loop: hf_trainer`",
        )
    elif job.parallel.strategy not in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"):
        yield Conflict(
            ("parallel.fsdp_version", "parallel.strategy"),
            f"`parallel.fsdp_version: 1` says how weights are sharded, which `{job.parallel.strategy}` does not ask of "
            "FSDP",
            "leave it out, or set `parallel.strategy: FULL_SHARD`",
        )
    if job.has_quantized_base and not job.has_8bit_base:
        yield from _check_flat_storage(job)
    if job.offload.params:
        yield Conflict(
            ("parallel.fsdp_version", "offload.params"),
            "`offload.params` is not planned with `parallel.fsdp_version: 1`",
            "set `parallel.fsdp_version: 2`, or `offload.params: false`",
        )


def _check_flat_storage(job: Job) -> Iterator[Conflict]:
    """
    FSDP1 makes one tensor of a block's packed weights and norms (torch/distributed/fsdp/_flat_param.py,
    _validate_tensors_to_flatten), and transformers has it computed in the dtype of storage (distributed/fsdp.py,
    update_fsdp_plugin_peft). Linear4bit makes a new parameter of a gathered weight (bitsandbytes/nn/modules.py,
    fix_4bit_weight_quant_state_from_module), which FSDP1 refuses where it stays gathered (_writeback_orig_params).
    """
    storage = job.quantization.storage
    remedy = f"set `quantization.storage: {job.autocast or job.dtype}`, or `parallel.fsdp_version: 2`"
    if storage == "uint8":
        yield Conflict(
            ("parallel.fsdp_version", "quantization.storage"),
            "FSDP1 (`parallel.fsdp_version: 1`) cannot shard 4-bit weights stored as bytes, bitsandbytes' default",
            remedy,
        )
        return
    if job.parallel.strategy == "SHARD_GRAD_OP":
        yield Conflict(
            ("parallel.fsdp_version", "parallel.strategy"),
            "FSDP1 (`parallel.fsdp_version: 1`) stops in the first backward pass of a 4-bit base with `SHARD_GRAD_OP`: "
            "bitsandbytes replaces parameters in forward, which it allows where they are let go after that",
            "set `parallel.strategy: FULL_SHARD`, or `parallel.fsdp_version: 2`",
        )
    if job.quantization.kbit_preparation and storage != "float32":
        yield Conflict(
            ("parallel.fsdp_version", "quantization.kbit_preparation"),
            "FSDP1 (`parallel.fsdp_version: 1`) makes one tensor of all that a block holds, and "
            f"`quantization.kbit_preparation` makes norms float32 beside 4-bit weights stored in {storage}",
            "leave `quantization.kbit_preparation` out, or set `parallel.fsdp_version: 2`",
        )
    if storage != job.dtype:
        yield Conflict(
            ("parallel.fsdp_version", "quantization.storage"),
            "FSDP1 (`parallel.fsdp_version: 1`) makes one tensor of all that a block holds, and its norms are "
            f"{job.dtype} beside 4-bit weights stored in {storage}",
            f"set `dtype: {storage}`, or `parallel.fsdp_version: 2`",
        )
    elif storage != job.autocast:
        yield Conflict(
            ("parallel.fsdp_version", "autocast"),
            f"with 4-bit weights stored in {storage} transformers has FSDP1 gather adapters in {storage} too, which is "
            "planned with autocast to that dtype alone",
            f"set `autocast: {storage}`, or `parallel.fsdp_version: 2`",
        )


def check_8bit_base(job: Job) -> Iterator[Conflict]:
    """
    Linear8bitLt takes its bytes from an attribute of the parameter that it was made with (bitsandbytes/nn/modules.py,
    init_8bit_state). FSDP2 puts another parameter in its place, which has none; FSDP1 makes one tensor of parameters of
    one dtype (_flat_param.py, _validate_tensors_to_flatten). Partitions of ZeRO's stage 3 leave the attribute whole.
    """
    if not job.has_8bit_base:
        return
    strategy = job.parallel.strategy
    if strategy not in ("NO_SHARD", "ZERO_1", "ZERO_2") or job.offload.params:
        what = f"`parallel.strategy: {strategy}`" if strategy != "NO_SHARD" else "`offload.params`"
        yield Conflict(
            ("quantization.type", "parallel.strategy", "offload.params"),
            f"an 8-bit base (`quantization.type: int8`) is not sharded, which {what} asks for: bitsandbytes keeps its "
            "bytes beside the parameters that are",
            "set `quantization.type: nf4`, or `parallel.strategy: NO_SHARD` with `parallel.dp_replicate`",
        )
    if job.method == "npt":
        yield Conflict(
            ("quantization.type", "method"),
            "`method: npt` is planned and trained on a base in 4 or 16 bits, not in 8 (`quantization.type: int8`)",
            "set `quantization.type: nf4`, or `npt.quantized_base: false`",
        )


def check_storage(job: Job) -> Iterator[Conflict]:
    """FSDP2 casts what it takes for numbers to the dtype of mixed precision (_fsdp_param.py, all_gather_inputs)."""
    storage = job.quantization.storage
    shards = job.loop == "hf_trainer" and job.parallel.strategy in (
        "FULL_SHARD",
        "SHARD_GRAD_OP",
        "HYBRID_SHARD",
    )
    if not shards or not job.has_quantized_base or job.has_8bit_base or job.parallel.fsdp_version == 1:
        return
    if storage not in ("uint8", job.autocast or storage):
        yield Conflict(
            ("quantization.storage", "autocast"),
            f"FSDP2 would cast 4-bit weights stored in {storage} to the {job.autocast} of `autocast`, which destroys "
            "them",
            f"set `quantization.storage: {job.autocast}`",
        )
