"""What trains in a Trainer: adapters on some blocks, whole copies beside them, and steps of torchao's optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf.tiny_trainers import LENGTH, arguments, lora, model, trainer
from memplan.hf import preflight
from memplan.hf.reading import Reading, read_model


@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_adapters_on_some_blocks(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """A model is read by what it has, a config by its pattern."""
    run = trainer(tmp_path, model(lora(**chosen)))
    shape, trace = (preflight(run, engine=engine) for engine in ("auto", "trace"))
    assert shape.result.engine["name"] == "shape"
    assert shape.peak_bytes == pytest.approx(trace.peak_bytes, rel=0.005)
    assert shape.result.job is not None
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qv"]
    assert shape.result.job.lora.target_modules == tuple(names)
    if isinstance(chosen["target_modules"], str):
        bare = preflight(arguments(tmp_path), model(), peft_config=lora(**chosen), max_seq_len=LENGTH)
        assert bare.peak_bytes == shape.peak_bytes
    else:
        reading = Reading()
        read_model(reading, model(), lora(**chosen, exclude_modules=["lm_head"]))
        assert len(reading.unknown) == 2


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["lm_head"]], ids=str)
def test_copies_that_peft_trains_beside_adapters(tmp_path: Path, saved: list[str], is_tied: bool) -> None:
    """Planned as a job, in the dtype that they have, and not much else than the trace of the Trainer itself."""
    given = model(lora(modules_to_save=saved), tie_word_embeddings=is_tied)
    for name, parameter in given.named_parameters():
        if ".modules_to_save." in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    run = trainer(tmp_path, given)
    shape, trace = (preflight(run, engine=engine) for engine in ("auto", "trace"))
    job = shape.result.job
    assert job is not None and shape.result.engine["name"] == "shape", shape.reasons
    assert (job.lora.modules_to_save, job.lora.modules_to_save_dtype) == (tuple(saved), "bfloat16")
    assert shape.result.parameters == trace.result.parameters
    assert shape.peak_bytes == pytest.approx(trace.peak_bytes, rel=0.001)


@pytest.mark.parametrize(
    ("name", "optimizer"), [("adamw_torch_8bit", "ao_adamw_8bit"), ("adamw_torch_4bit", "ao_adamw_4bit")]
)
def test_optimizers_of_torchao_are_planned_by_shape(tmp_path: Path, name: str, optimizer: str) -> None:
    """Without torchao, whose states are smaller than those of torch."""
    given = {"max_seq_len": LENGTH, "gpu": "24GB"}
    plain, small = (
        preflight(arguments(tmp_path, optim=optim), model(vocab_size=4096), **given)
        for optim in ("adamw_torch_fused", name)
    )
    assert small.result.engine["name"] == "shape"
    assert small.result.job is not None and small.result.job.optimizer == optimizer
    states = [
        sum(part.bytes for part in plan.result.phases[-1].budget if part.category == "optimizer")
        for plan in (plain, small)
    ]
    assert 0 < states[1] < states[0] / 2
