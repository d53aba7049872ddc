"""What of FSDP is read off accelerate's settings, and what a job has no words for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf.tiny_trainers import arguments
from memplan.hf.ranks import read_fsdp
from memplan.hf.reading import Reading

pytestmark = pytest.mark.filterwarnings("ignore")


def read(tmp_path: Path, world_size: int = 4, **settings: Any) -> Reading:
    """What is read of arguments with FSDP."""
    plugin = arguments(tmp_path, fsdp=True, fsdp_config=settings).fsdp_plugin_args
    reading = Reading()
    read_fsdp(reading, plugin.get, world_size)
    return reading


def test_fsdp_as_accelerate_sets_it_up_is_planned(tmp_path: Path) -> None:
    plain = read(tmp_path)
    assert plain.unknown == []
    assert plain.fields["parallel.strategy"] == "FULL_SHARD" and plain.fields["parallel.dp_shard"] == 4
    kept = read(tmp_path, reshard_after_forward=False)
    assert kept.unknown == [] and kept.fields["parallel.strategy"] == "SHARD_GRAD_OP"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"version": 1, "forward_prefetch": True}, "`forward_prefetch` of FSDP1"),
        ({"version": 1, "limit_all_gathers": False}, "`limit_all_gathers: false` of FSDP1"),
        ({"cpu_offload": True}, "`cpu_offload` of FSDP"),
        ({"activation_checkpointing": True}, "`activation_checkpointing` of FSDP"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, "`auto_wrap_policy: SIZE_BASED_WRAP` of FSDP"),
    ],
    ids=str,
)
def test_what_of_fsdp_has_no_words_is_named(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    assert read(tmp_path, **settings).unknown == [reason]


def test_fsdp1_as_accelerate_sets_it_up_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its strategy is the launcher's, whatever the arguments say, and transformers fetches nothing ahead."""
    plain = read(tmp_path, version=1)
    assert plain.unknown == plain.notes == []
    assert plain.fields == {
        "parallel.strategy": "FULL_SHARD", "parallel.dp_shard": 4, "parallel.dp_replicate": 1,
        "parallel.fsdp_version": 1, "parallel.backward_prefetch": "NO_PREFETCH",
    }  # fmt: skip
    passed_over = read(
        tmp_path, version=1, reshard_after_forward="shard_grad_op", backward_prefetch="backward_pre"
    )
    assert (
        passed_over.fields["parallel.strategy"] == "FULL_SHARD"
        and "FSDP_SHARDING_STRATEGY" in passed_over.notes[0]
    )
    assert passed_over.fields["parallel.backward_prefetch"] == "BACKWARD_PRE"
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert read(tmp_path, version=1).fields["parallel.dp_replicate"] == 2


def test_replicas_of_shards_are_read(tmp_path: Path) -> None:
    from accelerate.parallelism_config import ParallelismConfig

    plugin = arguments(tmp_path, fsdp=True).fsdp_plugin_args
    reading = Reading()
    read_fsdp(reading, plugin.get, 4, ParallelismConfig(dp_replicate_size=2, dp_shard_size=2))
    assert reading.unknown == []
    assert reading.fields == {
        "parallel.strategy": "HYBRID_SHARD", "parallel.dp_shard": 2, "parallel.dp_replicate": 2,
    }  # fmt: skip
