"""Jobs over weights in GPTQ's format: what is planned of them."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.job.problems import Conflict
from memplan.job.spec import Job


def check_gptq_base(job: Job) -> Iterator[Conflict]:
    """peft's adapters beside them, in float16, in another's loop than ours."""
    if not job.has_gptq_base:
        return
    if job.method == "npt" or job.loop == "memplan":
        field, value = ("method", "npt") if job.method == "npt" else ("loop", "memplan")
        yield Conflict(
            ("quantization.type", field),
            f"`quantization.type: gptq` is planned for adapters in transformers' Trainer or a script, not with "
            f"`{field}: {value}`",
            "set `method: qlora` with `loop: hf_trainer`, or `quantization.type: nf4`",
        )
    if job.dtype != "float16" or job.autocast == "bfloat16":
        field = "dtype" if job.dtype != "float16" else "autocast"
        yield Conflict(
            ("quantization.type", field),
            f"GPTQ's scales are float16, and `quantization.type: gptq` is planned where all is, not with "
            f"`{field}: {job.dtype if field == 'dtype' else job.autocast}`",
            "set `dtype: float16`, with `autocast: float16` or without autocast",
        )
    if job.quantization.kbit_preparation:
        yield Conflict(
            ("quantization.type", "quantization.kbit_preparation"),
            "peft's prepare_model_for_kbit_training makes nothing float32 beside weights in GPTQ's format",
            "leave `quantization.kbit_preparation` out",
        )
    strategy, is_flat = job.parallel.strategy, job.parallel.fsdp_version == 1
    shards = strategy not in ("NO_SHARD", "ZERO_1", "ZERO_2")
    if shards and (strategy == "ZERO_3" or not is_flat or job.offload.params):
        yield Conflict(
            ("quantization.type", "parallel.strategy", "parallel.fsdp_version"),
            "weights in GPTQ's format are buffers, which FSDP and ZeRO leave whole; sharded, they are planned for "
            "FSDP1 alone, as fms-acceleration makes parameters of them",
            "set `parallel.fsdp_version: 1` with `quantization.storage: float16`, or `parallel.strategy: NO_SHARD`",
        )
