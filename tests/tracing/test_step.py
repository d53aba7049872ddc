"""`memplan.trace`: steps that somebody else wrote, beside what they really take on this CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memplan
from memplan.errors import TraceError
from memplan.train.measure import CpuMeter
from tracing.steps import STEPS, Classifier, _ids, _loss, plain
from tracing.test_lean import run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def measured_peak(made: Any, steps: int = 2) -> int:
    """Bytes that live tensors take at the peak of real steps, by torch's profiler."""
    step, models, _, batch = made
    modules = [models] if isinstance(models, nn.Module) else list(getattr(models, "values", lambda: models)())
    meter = CpuMeter(steps)
    meter.begin("load", 0)
    meter.adopt(nn.ModuleList(modules))
    held = None
    for number in range(1, steps + 1):
        meter.begin("step", number)
        fresh = torch.utils._pytree.tree_map(torch.clone, batch)
        held = step(fresh)
        meter.end_step(number)
    del held
    peak = meter.peak_bytes()
    assert peak is not None
    return peak


@pytest.mark.parametrize("name", STEPS)
def test_a_traced_step_peaks_where_the_real_one_does(name: str) -> None:
    traced = memplan.trace(*STEPS[name](), device="cpu")
    assert traced.peak_bytes == pytest.approx(measured_peak(STEPS[name]()), rel=0.005)
    assert traced.unknown_values == 0


def test_phases_are_found() -> None:
    traced = memplan.trace(*STEPS["adversarial"](), device="cpu", steps=1)
    phases = [mark.phase for mark in traced.tape.flatten().marks]
    assert phases == [
        "load", "forward", "backward", "forward", "backward", "optimizer_step", "forward", "backward",
        "optimizer_step", "end",
    ]  # fmt: skip


def test_a_real_model_is_as_it_was() -> None:
    step, model, optimizer, batch = plain()
    step(batch)  # so that there are states
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = dict(optimizer.state[model.head.weight])
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    torch.manual_seed(3)
    memplan.trace(step, model, optimizer, batch)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(value is optimizer.state[model.head.weight][name] for name, value in states.items())
    step(batch)  # and it trains on
    assert not torch.equal(model.head.weight, before["head.weight"])


FIRST = """
import gc, types
import torch, memplan

model = torch.nn.Linear(4, 4)

def step(batch):
    with torch.device("cpu"):
        torch.zeros(2)
    model(batch).sum().backward()

memplan.trace(step, model, None, torch.zeros(2, 4))
with torch.device("meta"):
    print(torch.tensor(1.0).device)

from torch._dynamo.trace_rules import get_torch_obj_rule_map
print(torch.tensor in get_torch_obj_rule_map())
gc.collect()
functions = [each for each in gc.get_objects() if isinstance(each, types.FunctionType)]
names = {each.__qualname__ for each in functions if (each.__module__ or "").startswith("memplan.tracing")}
print(sorted(name for name in names if "<locals>" in name and not name.startswith("__create_fn__")))
"""
"""`__create_fn__` makes the methods of dataclasses."""


def test_torch_knows_its_own_functions_afterwards() -> None:
    """Also where nobody had asked before which take a device and which can be compiled; and nothing is left."""
    assert ["meta", "True", "[]"] == run(FIRST)


def test_what_a_step_raises_comes_out_and_the_model_survives() -> None:
    model = Classifier()

    def step(batch: Any) -> None:
        model(batch).sum().backward()
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        memplan.trace(step, model, None, _ids())
    assert model.head.weight.device.type == "cpu" and model.head.weight.grad is None


def test_a_loss_that_is_still_held_is_no_obstacle() -> None:
    step, model, optimizer, batch = plain()
    loss = _loss(model(batch["ids"]), batch["ids"])
    memplan.trace(step, model, optimizer, batch)
    loss.backward()
    assert model.head.weight.grad is not None


def test_a_model_without_memory_takes_what_a_real_one_does() -> None:
    def peak(on: str) -> int:
        with torch.device(on):
            model = Classifier()
        optimizer = torch.optim.AdamW(model.parameters())

        def step(batch: Any) -> None:
            ids = batch.to("cuda")
            _loss(model(ids), ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        batch = _ids() if on == "cpu" else _ids().to("meta")
        return memplan.trace(step, model, optimizer, batch).peak_bytes

    assert peak("meta") == peak("cpu")


def test_autocast_makes_activations_smaller_even_where_it_was_imported_by_name() -> None:
    def peak(enabled: bool) -> int:
        from torch.amp import autocast

        _, model, optimizer, batch = plain()

        def inside(given: Any) -> Any:
            with autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
                loss = _loss(model(given["ids"]), given["ids"])
            loss.backward()
            return loss

        return memplan.trace(inside, model, optimizer, batch).peak_bytes

    assert peak(True) < peak(False)


def test_values_that_nobody_knows_are_counted_and_said() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight if (x * self.weight).sum().item() > 0 else x

    model = Router()
    traced = memplan.trace(lambda batch: model(batch).sum().backward(), model, None, torch.ones(4))
    assert traced.unknown_values == 2
    assert any("looked at 2 values" in note for note in traced.result.warnings)
    assert any("no optimizer stepped" in note for note in traced.result.warnings)


def test_a_step_that_leaves_out_bad_losses_does_not_here() -> None:
    _, model, optimizer, batch = plain()
    seen = []

    def careful(given: Any) -> None:
        loss = _loss(model(given["ids"]), given["ids"])
        if torch.isnan(loss).any() or not torch.isfinite(loss):
            return
        loss.backward()
        optimizer.step()
        seen.append(1)

    memplan.trace(careful, model, optimizer, batch)
    assert len(seen) == 2


def test_what_the_trace_does_not_know_is_said() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(0, 1), nn.LSTM(14, 4))
    traced = memplan.trace(lambda batch: model(batch)[0].sum().backward(), model, None, torch.ones(2, 4, 16))
    assert any("cuDNN's workspaces" in note for note in traced.result.warnings)
    assert any("recurrent layers" in note for note in traced.result.warnings)


def test_a_compiled_function_in_a_step_is_said() -> None:
    """It runs as it is written; one that is there and not called is nothing to speak of."""
    model = nn.Linear(4, 4)

    @torch.compile
    def loss_of(out: torch.Tensor) -> torch.Tensor:
        return (out.sin() * out).sum()

    def warnings(step: Any) -> list[str]:
        return [
            note
            for note in memplan.trace(step, model, None, torch.ones(2, 4)).result.warnings
            if "compile" in note
        ]

    assert len(warnings(lambda batch: loss_of(model(batch)).backward())) == 1
    assert warnings(lambda batch: model(batch).sum().backward()) == []


def test_experts_are_not_counted_as_active() -> None:
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    first = model.get_submodule("experts.0")
    traced = memplan.trace(lambda batch: first(batch).sum().backward(), model, None, torch.ones(2, 4))
    assert traced.result.parameters is not None and traced.result.parameters.active is None


def test_the_answer_can_be_asked_printed_and_drawn(tmp_path: Path) -> None:
    traced = memplan.trace(*plain(), gpu="24GB")
    assert traced.fits and traced.need_bytes > traced.peak_bytes > 0
    assert traced.result.verdict is not None and traced.result.parameters is not None
    assert sum(line.bytes for line in traced.result.budget) == traced.peak_bytes
    last = traced.result.phases[-1]
    assert {line.category for line in last.budget} >= {"weights", "gradients", "optimizer", "inputs"}
    assert any("blocks.0.mlp" in traced.tape.describe(index).where for index in range(1, 200))
    assert "optimizer states" in str(traced) and "step completes" in str(traced)
    traced.write_snapshot(tmp_path / "step.pickle")
    assert (tmp_path / "step.pickle").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"optimizer": object()}, "no torch.optim.Optimizer"),
        ({"model": {"a": 1}}, "no torch module"),
        ({"model": len}, "`model` is of builtin_function_or_method, which is no torch module"),
        ({"model": "gpt2"}, "`model` is of str"),
        ({"model": nn.DataParallel(nn.Linear(2, 2))}, "wrapped in DataParallel"),
        ({"step": None}, "`step` is of NoneType, which cannot be called"),
        ({"device": "tpu"}, "`device` is `tpu`"),
        ({"steps": 0}, "at least one"),
    ],
)
def test_what_cannot_be_traced_is_said(changed: dict[str, Any], sentence: str) -> None:
    step, model, optimizer, batch = plain()
    arguments = {"step": step, "model": model, "optimizer": optimizer, "batch": batch} | changed
    with pytest.raises(TraceError, match=sentence):
        memplan.trace(**arguments)


def test_a_mask_selects_as_many_as_it_is_true_for() -> None:
    """Its values come with the batch; of one that the step computes they are not known."""
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50)
    labels = torch.full((4, 25), -100)
    labels[:, :10] = 1

    def step(batch: dict[str, torch.Tensor]) -> None:
        logits, keep = head(embedding(batch["ids"])), batch["labels"] != -100
        nn.functional.cross_entropy(logits[keep], batch["labels"][keep]).backward()

    batch = {"ids": torch.zeros(4, 25, dtype=torch.int64), "labels": labels}
    traced = memplan.trace(step, [embedding, head], None, batch)
    shapes = [traced.tape.describe(number).shape for number in range(1, len(traced.tape.categories()))]
    assert (40, 50) in shapes and (40, 2) in shapes

    of_logits = [number for number in range(1, len(shapes) + 1) if shapes[number - 1] == (4, 25, 50)]
    names = [traced.tape.describe(number).where for number in of_logits]
    assert not any("index_put" in name for name in names)  # added in place to zeros

    def unknown(batch: dict[str, torch.Tensor]) -> None:
        out = head(embedding(batch["ids"]))
        out[out > 0].sum().backward()

    with pytest.raises(TraceError, match="by a mask whose values only real data has"):
        memplan.trace(unknown, [embedding, head], None, batch)

    def fill(batch: dict[str, torch.Tensor]) -> None:
        out = head(embedding(batch["ids"])).clone()
        out[out.detach() > 0] = 0.0
        out.sum().backward()

    assert memplan.trace(fill, [embedding, head], None, batch).peak_bytes


def test_what_is_written_over_is_no_longer_known() -> None:
    """Neither the tensor nor the one that it is a view of."""
    model, seen = nn.Linear(4, 4), []

    def step(batch: torch.Tensor) -> None:
        whole, part = torch.zeros(4, device=batch.device), torch.zeros(4, device=batch.device)
        seen.append(whole.sum().item())
        whole += model(batch).detach().sum(0)
        part[0] = model(batch).detach().sum()
        seen.extend([whole.sum().item(), part.sum().item()])
        model(batch).sum().backward()

    traced = memplan.trace(step, model, None, torch.ones(2, 4), steps=1)
    assert [0.0, 1.0, 1.0] == seen
    assert any("looked at 2 such values" in note for note in traced.result.warnings)
