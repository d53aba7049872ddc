"""What a job over weights in GPTQ's format may not say."""

from __future__ import annotations

import pytest

from memplan.errors import JobError
from memplan.job.load import load_job

BASE = ["model=qwen3-0.6b", "method=qlora", "quantization.type=gptq", "dtype=float16", "loop=hf_trainer"]
SHARDED = ["parallel.strategy=FULL_SHARD", "parallel.dp_shard=2"]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["loop=script", "quantization.group_size=null", "autocast=float16"],
        ["parallel.strategy=ZERO_2", "parallel.dp_shard=2"],
        [*SHARDED, "parallel.fsdp_version=1", "quantization.storage=float16", "autocast=float16"],
    ],
)
def test_what_agrees(changes: list[str]) -> None:
    assert load_job(None, [*BASE, *changes]).job.has_gptq_base


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["loop=memplan"], "`loop: memplan`"),
        (["method=npt", "npt.quantized_base=true", "loop=memplan"], "`method: npt`"),
        (["dtype=bfloat16"], "`dtype: bfloat16`"),
        (["autocast=bfloat16"], "`autocast: bfloat16`"),
        (["quantization.kbit_preparation=true"], "makes nothing float32"),
        (SHARDED, "are buffers"),
        (["parallel.strategy=ZERO_3", "parallel.dp_shard=2"], "are buffers"),
        (["quantization.group_size=0"], "group_size"),
    ],
)
def test_what_does_not(changes: list[str], sentence: str) -> None:
    with pytest.raises(JobError, match=sentence) as refusal:
        load_job(None, [*BASE, *changes])
    assert refusal.value.hint


def test_of_other_methods_nothing_is_asked() -> None:
    """The section has no effect there."""
    assert not load_job(None, ["model=qwen3-0.6b", "quantization.type=gptq"]).job.has_gptq_base
