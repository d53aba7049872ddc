"""What waits in host memory: off the tape, and the same RAM by both engines."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.budget.estimate import estimate
from memplan.errors import TraceError
from memplan.model import architecture_from_config
from memplan.tracing import writer
from memplan.tracing.estimate import estimate_traced
from memplan.tracing.host import HostMemory
from tracing.comparison import compare
from tracing.test_shape_equals_trace import assert_equal
from tracing.tiny import CONFIGS, job

OFFLOAD = {"activation_offload": True, "activation_checkpointing": "full"}
SHARDED = {"parallel__strategy": "FULL_SHARD", "parallel__dp_shard": 4}


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lora", "dtype": "float32", "autocast": "bfloat16", "gradient_accumulation_steps": 2},
        {"activation_checkpointing": "selective"},
        SHARDED,
    ],
    ids=str,
)
def test_inputs_of_blocks_come_back_for_their_recomputation(settings: dict[str, Any]) -> None:
    both = compare(job(**OFFLOAD | settings), CONFIGS["llama"])
    assert_equal(both)
    kept = compare(job(**OFFLOAD | settings | {"activation_offload": False}), CONFIGS["llama"])
    assert both.peaks()[1] < kept.peaks()[1]


@pytest.mark.parametrize("loop", ["script", "memplan"])
def test_the_fused_step_of_sgd_is_taken_on_the_host(loop: str) -> None:
    """torch has no such step for meta tensors."""
    fields = {"optimizer": "sgd", "optimizer_kernel": "fused", "offload__optimizer": True}
    assert_equal(compare(job(loop=loop, **fields), CONFIGS["llama"]))


@pytest.mark.parametrize(
    "settings",
    [
        {"train__max_grad_norm": 1.0, "gradient_accumulation_steps": 2},
        {"method": "lora", "optimizer_kernel": "foreach", "parallel__dp_replicate": 2},
        {"method": "npt", "optimizer": "adafactor"},
    ],
    ids=str,
)
def test_states_on_the_host_are_not_on_the_tape(settings: dict[str, Any]) -> None:
    both = compare(job(**settings | {"offload__optimizer": True}), CONFIGS["llama"])
    assert_equal(both)
    kept = compare(job(**settings), CONFIGS["llama"])
    for offloaded, whole in ((both.shape, kept.shape), (both.trace, kept.trace)):
        assert "optimizer" not in offloaded.categories()
        assert "optimizer" in whole.categories()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SHARDED | {"offload__optimizer": True}, "has no `offload.optimizer` alone with sharded weights"),
        (
            {"loop": "hf_trainer", "offload__params": True},
            "jobs with `offload.params` are not traced with `loop: hf_trainer`",
        ),
        (SHARDED | {"optimizer": "adafactor"}, "`optimizer: adafactor` cannot step sharded weights"),
        (
            {"offload__params": True, "optimizer": "sgd"},
            "`optimizer: sgd` with `optimizer_kernel: fused` cannot step",
        ),
    ],
)
def test_what_no_loop_does_is_refused(settings: dict[str, Any], message: str) -> None:
    """FSDP2 steps where its shards are; the Trainer leaves `offload.params` to DeepSpeed."""
    with pytest.raises(TraceError) as caught:
        estimate_traced(job(**settings), CONFIGS["llama"])
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", {"offload__optimizer": True}),
        ("gpt2", {"offload__optimizer": True, "method": "lora", "parallel__dp_replicate": 2}),
        ("llama", OFFLOAD | {"activation_checkpointing": "selective"}),
        ("gpt2", {"offload__params": True, "method": "lora"}),
        (
            "qwen2, tied",
            SHARDED
            | {"parallel__strategy": "HYBRID_SHARD", "parallel__dp_replicate": 2, "offload__params": True},
        ),
        ("llama", SHARDED | {"offload__params": True, "method": "qlora", "lora__dtype": "bfloat16"}),
        ("qwen3", {"method": "npt", "load__ram_efficient": False, "dtype": "float16"}),
        ("llama", {"optimizer": "paged_adamw", "method": "lora"}),
        ("mixtral", {"loop": "hf_trainer", "method": "lora"}),
        ("mixtral", {"loop": "hf_trainer", "parallel__dp_replicate": 2}),
        ("llama", SHARDED | {"loop": "hf_trainer", "autocast": "bfloat16"}),
        ("llama", {"loop": "hf_trainer", "method": "qlora", "dtype": "float16"}),
    ],
    ids=str,
)
def test_both_engines_say_the_same_host_memory(model: str, settings: dict[str, Any]) -> None:
    task, config = job(**settings), CONFIGS[model] | {"dtype": "bfloat16"}
    planned = estimate(task, architecture_from_config(config, name="tiny", source="test"))
    traced = estimate_traced(task, config)[1]
    assert planned.host == traced.host
    assert planned.host is not None and planned.host.peak_bytes > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "float32", "autocast": "bfloat16"},
        {"method": "lora", "lora__dtype": "bfloat16"},
        {"method": "qlora"},
        {"method": "npt"},
    ],
    ids=str,
)
def test_host_memory_holds_what_the_trace_puts_there(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of all ranks with their gradients and states, but for Adam's counts of steps."""
    made: list[HostMemory] = []

    class Counted(HostMemory):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            made.append(self)

    monkeypatch.setattr(writer, "HostMemory", Counted)
    task = job(**SHARDED | settings | {"offload__params": True})
    config = CONFIGS["llama"] | {"hidden_size": 256, "intermediate_size": 704}
    writer.trace_job(task, config, whole=True)
    planned = estimate(task, architecture_from_config(config, name="tiny", source="test")).host
    assert planned is not None
    (host,) = made
    assert task.world_size * host.peak_bytes == pytest.approx(planned.peak_bytes, rel=0.001)
