"""What `from_pretrained` takes of memory of its own, against the plan of host RAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf.one_rank import loaded_bytes
from hf.own_memory import MAPS, own_bytes
from hf.tiny_trainers import config
from hf.tiny_trainers import model as tiny
from memplan.budget.host import host_memory
from memplan.model import architecture_from_config
from memplan.train.meta_model import as_transformers
from tracing.tiny import CONFIGS, job

pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="which memory is of a file, Linux says")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in bfloat16, by model."""
    folders = {}
    for name in ("llama", "mixtral"):
        folders[name] = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(as_transformers(CONFIGS[name]), dtype=torch.bfloat16)
        model.save_pretrained(folders[name])
    return folders


def planned(name: str, **fields: Any) -> tuple[int, int]:
    """Own bytes and page cache of a job of transformers' Trainer."""
    host = host_memory(
        job(loop="hf_trainer", **fields),
        architecture_from_config(CONFIGS[name] | {"dtype": "bfloat16"}, name=name, source="test"),
    )
    return host.peak_bytes, host.page_cache_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_checkpoint_of_another_dtype_is_cast_into_memory(dtype: str, saved: dict[str, Path]) -> None:
    """One of the same dtype stays in its files, which are as large as the plan's page cache, but for their headers."""
    model = AutoModelForCausalLM.from_pretrained(saved["llama"], dtype=getattr(torch, dtype))
    own, page_cache = planned("llama", dtype=dtype)

    assert own == own_bytes(model.parameters())
    assert (own == 0) == (dtype == "bfloat16")
    (file,) = saved["llama"].glob("*.safetensors")
    assert page_cache == pytest.approx(file.stat().st_size, rel=0.01)


def test_experts_are_put_together_in_memory(saved: dict[str, Path]) -> None:
    """Besides those that stay, the plan has what one of them is put together from."""
    model = AutoModelForCausalLM.from_pretrained(saved["mixtral"], dtype=torch.bfloat16)
    experts = {name: tensor for name, tensor in model.named_parameters() if ".experts." in name}
    parts = max(tensor.nbytes for tensor in experts.values())

    assert sum(tensor.nbytes for tensor in experts.values()) == own_bytes(model.parameters())
    assert planned("mixtral")[0] == own_bytes(model.parameters()) + parts


def test_ranks_have_what_they_cast_and_share_the_files() -> None:
    """DDP's ranks each cast; where nothing is known of the checkpoint's dtype, it is taken to be another."""
    one, page_cache = planned("llama", dtype="float32")

    assert planned("llama", dtype="float32", parallel__dp_replicate=4) == (4 * one, page_cache)
    unknown = architecture_from_config(CONFIGS["llama"], name="llama", source="test")
    host = host_memory(job(loop="hf_trainer", dtype="float32"), unknown)
    assert (host.peak_bytes, host.page_cache_bytes) == (one, 2 * page_cache)
    (line,) = host.budget
    assert "next to nothing of a checkpoint in float32" in line.note


@pytest.mark.parametrize(
    ("dtype", "version", "efficient", "method"),
    [
        ("bfloat16", 2, True, "full"),
        ("bfloat16", 2, False, "full"),
        ("bfloat16", 2, True, "lora"),
        ("float16", 2, True, "lora"),
        ("bfloat16", 1, False, "full"),
    ],
)
def test_every_rank_loads_all_of_the_model(
    dtype: str, version: int, efficient: bool, method: str, tmp_path: Path
) -> None:
    """RAM-efficient or not; accelerate makes what trains float32 before FSDP2 cuts it, and FSDP1 afterwards."""
    tiny().to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    described = config().to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    task = job(
        loop="hf_trainer", dtype=dtype, autocast="bfloat16", method=method, lora__rank=8,
        load__ram_efficient=efficient, parallel__strategy="FULL_SHARD", parallel__dp_shard=2,
        parallel__fsdp_version=version,
    )  # fmt: skip
    host = host_memory(task, architecture_from_config(described, name="tiny", source="test"))

    ranks = [
        loaded_bytes(
            tmp_path / "saved", tmp_path, rank, 2,
            dtype=dtype, version=version, efficient=efficient, adapts=method == "lora",
        )
        for rank in range(2)
    ]  # fmt: skip

    assert host.peak_bytes == sum(ranks)
    assert ranks[0] == ranks[1]
