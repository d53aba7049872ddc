"""float16: scaled losses give the gradients of unscaled ones, overflows are left out, and the plan holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_runs import LLAMA, losses, prepared, stops_in, tiny_job  # noqa: E402

from memplan.errors import RunError  # noqa: E402
from memplan.job.spec import Job, Lora, Train  # noqa: E402
from memplan.train.build import build_model  # noqa: E402
from memplan.train.data import MicroBatch  # noqa: E402
from memplan.train.loop import Loop  # noqa: E402
from memplan.train.optimizer import build_optimizer  # noqa: E402
from memplan.train.record import Record  # noqa: E402
from memplan.train.scaling import FILE  # noqa: E402
from memplan.train.worker import run_job  # noqa: E402

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")


class _OneBatch:
    """The same two sequences for ever."""

    ids = (torch.arange(24) * 7 % 260).view(2, 12)

    def num_targets(self, step: int) -> int:
        return 22

    def micro_batch(self, step: int, micro: int) -> MicroBatch:
        return MicroBatch(self.ids, self.ids)


def _loop(**changes: Any) -> Loop:
    job = Job(model="tiny", weights="random", dtype="float32", lora=Lora(rank=4), optimizer="sgd")
    job = job.replace(train=Train(learning_rate=0.5)).replace(**changes)
    built = build_model(job, LLAMA, CPU, weights_path=None)
    for parameter in built.trainable:  # adapters start with B = 0, which hides half of the gradients
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return Loop(job, built, build_optimizer(job, built.trainable), _OneBatch(), CPU)  # type: ignore[arg-type]


def _weights(loop: Loop) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in loop.parameters])


def _copy_base(source: Loop, target: Loop) -> None:
    """Round the base weights of one to the other: before torch 2.12 the same seed draws others in 16 bits."""
    named = dict(source.built.model.named_parameters())
    for name, parameter in target.built.model.named_parameters():
        parameter.data.copy_(named[name].data)


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("norm", [None, 0.1], ids=["plain", "clipped"])
@pytest.mark.parametrize(
    "low", [{"dtype": "float16"}, {"autocast": "float16"}, {"method": "full", "autocast": "float16"}], ids=str
)
def test_a_step_is_that_of_float32(low: dict[str, Any], norm: float | None, loss: str) -> None:
    """A 16-bit base with float32 adapters, or autocast: the loss, and what the step adds to every weight."""
    common = {"loss": loss, "train.max_grad_norm": norm}
    exact = _loop(**common, **{key: value for key, value in low.items() if key == "method"})
    found = _loop(**common, **low)
    _copy_base(exact, found)
    assert torch.equal(_weights(exact), _weights(found))
    before = _weights(exact)

    expected, actual = exact.step(1).loss, found.step(1).loss
    for step in range(2, 8):  # as the first steps of a run, until the scale is small enough
        if torch.equal(_weights(found), before):
            found.step(step)

    assert actual == pytest.approx(expected, rel=2e-3)
    assert actual != expected
    change, other = _weights(exact) - before, _weights(found) - before
    assert (change - other).norm() < 0.02 * change.norm()
    assert found.loss_scale.value() >= 1024


def test_without_float16_nothing_is_scaled() -> None:
    """The scale is 1 and no checkpoint has it."""
    assert _loop(dtype="bfloat16").loss_scale.value() == 1.0


def test_an_overflow_is_left_out_and_halves_the_scale() -> None:
    """Weights and the step's loss stay; where every scale overflows, the run ends with a sentence."""
    loop = _loop(dtype="float16")
    before = _weights(loop)
    hook = loop.parameters[0].register_hook(lambda gradient: gradient * float("inf"))

    assert loop.step(1).loss < 20

    assert torch.equal(before, _weights(loop))
    assert loop.loss_scale.value() == 32768.0
    hook.remove()
    loop.step(2)
    assert not torch.equal(before, _weights(loop))
    loop.parameters[0].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RunError, match="overflow in float16") as caught:
        for step in range(3, 60):
            loop.step(step)
    assert caught.value.hint


def test_a_run_keeps_to_its_plan_and_resumes_exactly(tmp_path: Path) -> None:
    """Every phase of a step within 1 % of the plan; the scale is part of a checkpoint."""
    config = LLAMA | {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 600}
    changes = {"dtype": "float16", "max_seq_len": 24, "train__max_grad_norm": 1.0, "train__save_every": 2}
    job = tiny_job(tmp_path, "lora", config=config, **changes)
    whole = prepared(job)
    assert run_job(whole) == 0
    resumed = prepared(job.replace(**{"train.output_dir": str(tmp_path / "resumed")}))

    assert run_job(resumed, hook=stops_in("backward", 4)) == 70
    state = json.loads((resumed / "checkpoints" / "step-2" / FILE).read_text())
    assert (state["scale"], state["_growth_tracker"]) == (65536.0, 2)
    assert run_job(resumed, resume=True) == 0
    assert losses(whole) == losses(resumed)

    record = Record.read(whole)
    assert record is not None
    planned: dict[str, int] = {}
    for line in record.fields["plan"]["phases"]:
        planned[line["phase"]] = max(planned.get(line["phase"], 0), line["allocated_peak_bytes"])
    measured: dict[str, int] = {}
    for peak in record.fields["measured"]["phases"]:
        measured[peak["phase"]] = max(measured.get(peak["phase"], 0), peak["allocated_peak_bytes"])
    for phase in ("forward", "backward", "optimizer_step"):
        assert measured[phase] == pytest.approx(planned[phase], rel=0.01), phase


def test_float16_adapters_train_unscaled(tmp_path: Path) -> None:
    """As the job for a 24 GB card has them: the loss falls, nothing is scaled, and the peak is the planned one."""
    config = LLAMA | {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 600}
    changes = {"dtype": "float16", "lora__dtype": "float16", "max_seq_len": 24, "train__learning_rate": 2e-3}
    changes["train__max_steps"] = 12  # of two to an epoch
    changes["loop"] = "hf_trainer"  # as that job has it; what trains here is our own loop
    folder = prepared(tiny_job(tmp_path, "lora", config=config, **changes))

    assert run_job(folder) == 0
    found = list(losses(folder).values())
    assert sum(found[-2:]) < sum(found[:2])
    record = Record.read(folder)
    assert record is not None
    planned = max(line["allocated_peak_bytes"] for line in record.fields["plan"]["phases"])
    assert record.fields["measured"]["peak"]["allocated_peak_bytes"] == pytest.approx(planned, rel=0.01)
