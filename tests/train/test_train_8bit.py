"""Adapters beside an 8-bit base: what the layers hold and compute, and whole runs against their plan, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

from tiny_runs import GPT2, LLAMA, losses, prepared, stops_in, tiny_job  # noqa: E402

from memplan.errors import RunError  # noqa: E402
from memplan.job.spec import Job, Lora  # noqa: E402
from memplan.train.build import Built, build_model  # noqa: E402
from memplan.train.quantize import PackedLinear8bit  # noqa: E402
from memplan.train.record import Record  # noqa: E402
from memplan.train.worker import run_job  # noqa: E402

pytestmark = pytest.mark.torch

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


def _build(config: dict[str, Any], method: str = "qlora", **changes: Any) -> Built:
    job = Job(model="tiny", weights="random", method=method, dtype="float32", lora=Lora(rank=4))
    job = job.replace(**{"quantization.type": "int8", **changes})
    return build_model(job, config, torch.device("cpu"), weights_path=None)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_layers_hold_the_largest_value_of_each_row_and_its_127ths(config: dict[str, Any]) -> None:
    """The model computes what the plain one does with weights rounded so; peft's layers are those of 8 bits."""
    whole = _build(config, method="full").model
    built = _build(config)
    plain = dict(whole.named_modules())
    layers = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in built.model.named_modules()
        if isinstance(module, PackedLinear8bit)
    }

    assert len(layers) == (7 if config is LLAMA else 4) * 3
    assert {type(module).__module__ for module in built.model.modules() if hasattr(module, "lora_A")} == {
        "peft.tuners.lora.bnb"
    }
    for name, layer in layers.items():
        weight = plain[name].weight.detach()
        rows = weight.T if config is GPT2 else weight
        largest = rows.half().abs().amax(1).float()
        assert layer.weight.dtype == torch.int8
        assert torch.equal(layer.weight.SCB, largest), name
        assert torch.equal(layer.weight.data, (rows.half() * (127 / largest[:, None])).round().char()), name
        rounded = layer.weight.data * (largest[:, None] / 127)
        plain[name].weight.data = rounded.T.contiguous() if config is GPT2 else rounded
    built.model.eval()  # no dropout
    for layer in layers.values():
        layer.train()  # in eval mode inputs are rounded too
    with torch.no_grad():
        ours, theirs = (model(input_ids=IDS).logits for model in (built.model, whole.eval()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_stays_as_it_is() -> None:
    """The head unless it is not skipped, and everything that is no linear layer, in float32 if the job says so."""
    assert type(_build(LLAMA).head) is torch.nn.Linear
    assert isinstance(_build(LLAMA, **{"quantization.skip": ()}).head, PackedLinear8bit)
    prepared_ = _build(LLAMA, dtype="bfloat16", **{"quantization.kbit_preparation": True}).model
    assert {torch.int8, torch.float32} == {parameter.dtype for parameter in prepared_.parameters()}
    with pytest.raises(RunError, match="can be stored in 8 bits"):
        _build(GPT2, **{"quantization.skip": ("c_attn", "c_fc", "c_proj")})


def test_a_run_learns_and_keeps_to_its_plan(tmp_path: Path) -> None:
    """The loss falls; the plan is within 1 % of what was measured, in every phase of every step."""
    # So short that every micro batch has a sample of full length.
    changes = {"dtype": "bfloat16", "max_seq_len": 24, "quantization__type": "int8"}
    config = GPT2 | {"n_embd": 64, "vocab_size": 600}
    folder = prepared(
        tiny_job(tmp_path, "qlora", config=config, train__max_steps=15, train__learning_rate=2e-2, **changes)
    )

    assert run_job(folder) == 0

    curve = losses(folder)
    assert curve[15] < 0.8 * curve[1]
    record = Record.read(folder)
    assert record is not None
    peaks: dict[str, dict[str, int]] = {"measured": {}, "plan": {}}
    for whose, found in peaks.items():
        for line in record.fields[whose]["phases"]:
            found[line["phase"]] = max(found.get(line["phase"], 0), line["allocated_peak_bytes"])
    assert set(peaks["measured"]) == {"load", "forward", "backward", "optimizer_step"}
    for phase, peak_bytes in peaks["measured"].items():
        assert peak_bytes == pytest.approx(peaks["plan"][phase], rel=0.01), phase


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Bit for bit, with dropout, checkpointing and evaluation, which multiplies in 8 bits."""
    changes = {"lora__dropout": 0.2, "activation_checkpointing": "full", "quantization__type": "int8"}
    job = tiny_job(tmp_path, "qlora", train__max_steps=4, train__save_every=2, **changes)
    job = job.replace(**{"data.eval": job.data.train, "train.eval_every": 2})
    whole = prepared(job)
    assert run_job(whole) == 0
    resumed = prepared(job.replace(**{"train.output_dir": str(tmp_path / "resumed")}))

    assert run_job(resumed, hook=stops_in("backward", 4)) == 70
    assert run_job(resumed, resume=True) == 0
    assert losses(whole) == losses(resumed)
