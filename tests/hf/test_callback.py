"""A callback in a real Trainer: planned before step 1, measured afterwards, and never in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf.tiny_trainers import collate, lora, model, rows, trainer
from memplan.errors import JobError, MemoryBudgetError
from memplan.hf import MemplanCallback, preflight

pytestmark = pytest.mark.filterwarnings("ignore")


class Weighted(Trainer):
    """A Trainer with a loss of its own, which keeps more of the logits."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        scores = outputs.logits.log_softmax(-1) * outputs.logits.softmax(-1)
        return (-scores.mean(), outputs) if return_outputs else -scores.mean()


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "full": (lambda: model(), {}),
    "lora, checkpointed, accumulated": (
        lambda: model(lora()),
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "optim": "adamw_torch"},
    ),
    "a loss and an optimizer of one's own": (lambda: model(), {"kind": Weighted, "optim": "rmsprop"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_what_is_measured(name: str, tmp_path: Path) -> None:
    build, changes = RUNS[name]
    said: list[str] = []
    callback = MemplanCallback(say=said.append)
    run = trainer(tmp_path, build(), callbacks=[callback], **changes)
    run.train()
    plan, measured = callback.plan, callback.measured
    assert plan is not None and measured is not None and measured.steps == 2, said
    assert plan.result.engine["name"] == ("trace" if "kind" in changes else "shape")
    assert plan.peak_bytes == pytest.approx(measured.allocated_peak_bytes, rel=0.001)
    assert said[0].startswith("memplan: needs ") and f"{2} x {64} tokens" in said[1]
    assert ("`Weighted.compute_loss`" in said[1]) == ("kind" in changes)
    assert [line.split("  ")[0] for line in said[2:]] == [
        "memplan, 2 steps", "forward", "backward", "optimizer step", "peak allocated",
    ]  # fmt: skip
    assert not {"training_step", "get_batch_samples", "evaluate"} & vars(run).keys()
    assert "backward" not in vars(run.accelerator)


def test_a_run_that_does_not_fit_ends_before_its_first_step(tmp_path: Path) -> None:
    said: list[str] = []
    run = trainer(
        tmp_path, callbacks=[MemplanCallback(gpu="500MiB", on_misfit="raise", measure=False, say=said.append)]
    )
    before = [parameter.clone() for parameter in run.model.parameters()]
    with pytest.raises(MemoryBudgetError, match="more than the 500") as refusal:
        run.train()
    assert refusal.value.exit_code == 1 and run.state.global_step == 0
    assert all(torch.equal(old, new) for old, new in zip(before, run.model.parameters()))
    assert said[0].startswith("memplan: does not fit: ")


def test_by_default_it_only_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    callback = MemplanCallback(gpu="500MiB", measure=False, say=said.append)
    run = trainer(tmp_path, callbacks=[callback], max_steps=1)
    run.train()
    assert callback.plan is not None and callback.plan.fits is False
    assert run.state.global_step == 1 and len(said) == 2 and callback.measured is None


def test_training_goes_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Also where the run was traced, with its model, optimizer and random state put aside."""

    def trained(callbacks: list[Any]) -> tuple[Any, Any]:
        run = trainer(
            tmp_path, model(lora(lora_dropout=0.5)), callbacks=callbacks, gradient_checkpointing=True
        )
        run.train()
        return run, [parameter.detach() for parameter in run.model.parameters()]

    callback = MemplanCallback(engine="trace", say=lambda line: None)
    run, with_it = trained([callback])
    plain, without = trained([])
    assert callback.result is not None and callback.result.engine["name"] == "trace"
    assert all(torch.equal(old, new) for old, new in zip(with_it, without))
    hooks = [[len(module._forward_hooks) for module in each.model.modules()] for each in (run, plain)]
    assert hooks[0] == hooks[1]


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(rows())


def test_what_goes_wrong_in_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    run = trainer(tmp_path, callbacks=[MemplanCallback(say=said.append)], data=Stream(), max_steps=1)
    monkeypatch.setattr("memplan.hf.watching.make_meter", lambda device: 1 / 0)
    run.train()
    assert run.state.global_step == 1
    assert said == [
        "memplan: no plan: the training data is a stream, whose longest row is not known (give `max_seq_len`)",
        "memplan: not measured: ZeroDivisionError: division by zero",
    ]


class Fragile(Trainer):
    """A Trainer that cannot be traced."""

    def compute_loss(self, model: Any, inputs: Any, *positional: Any, **options: Any) -> Any:
        if inputs["input_ids"].device.type == "meta":
            raise RuntimeError("no values\nat all")
        return super().compute_loss(model, inputs, *positional, **options)


def test_a_trace_that_fails_is_one_line_too(tmp_path: Path) -> None:
    said: list[str] = []
    callback = MemplanCallback(say=said.append, measure=False)
    run = trainer(tmp_path, kind=Fragile, callbacks=[callback])
    run.train()
    assert run.state.global_step == 2 and callback.result is None
    assert said == ["memplan: no plan: RuntimeError: no values"]
    assert {parameter.device.type for parameter in run.model.parameters()} == {"cpu"}


def test_a_meter_that_fails_later_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def adopt(self, *_: Any) -> None:
            """Works."""

        def begin(self, phase: str, step: int) -> None:
            if step:
                raise RuntimeError("two\nlines")

        def end_step(self, step: int) -> None:
            raise RuntimeError("two\nlines")

        def peaks(self) -> list[Any]:
            return []

    said: list[str] = []
    monkeypatch.setattr("memplan.hf.watching.make_meter", lambda device: Broken())
    run = trainer(tmp_path, callbacks=[MemplanCallback(say=said.append)])
    run.train()
    assert run.state.global_step == 2
    assert said[2:] == ["memplan: no longer measured: RuntimeError: two"]


@pytest.mark.parametrize("on_misfit", ["warn", "raise"])
def test_other_ranks_are_silent(on_misfit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    callback = MemplanCallback(gpu="500MiB", on_misfit=on_misfit, say=said.append)
    run = trainer(tmp_path, callbacks=[callback], max_steps=1)
    monkeypatch.setattr(type(run.args), "process_index", 1)
    if on_misfit == "raise":
        with pytest.raises(MemoryBudgetError):
            run.train()
    else:
        run.train()
    assert said == [] and callback.measured is None


def test_words_that_mean_nothing_are_refused_at_once() -> None:
    with pytest.raises(JobError, match="`on_misfit` is `stop`"):
        MemplanCallback(on_misfit="stop")
    with pytest.raises(JobError, match="`engine` is `magic`"):
        MemplanCallback(engine="magic")
    for length in (0, -1, True, "64", 2.0):
        with pytest.raises(JobError, match="`max_seq_len` is"):
            MemplanCallback(max_seq_len=length)  # type: ignore[arg-type]
    with pytest.raises(JobError, match="`gpu` is `24`"):
        MemplanCallback(gpu=24)  # type: ignore[arg-type]
    with pytest.raises(JobError, match="`say` is of str, which cannot be called"):
        MemplanCallback(say="loud")  # type: ignore[arg-type]


def test_a_listener_that_fails_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang_up(line: str) -> None:
        raise ValueError("no longer\nlistening")

    callback = MemplanCallback(say=hang_up)
    run = trainer(tmp_path, callbacks=[callback])
    run.train()
    assert run.state.global_step == 2 and callback.plan is not None and callback.measured is not None
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memplan")]
    assert said == ["memplan: `say` failed, and nothing more is said: ValueError: no longer"]


def test_a_plan_of_a_card_is_not_compared_with_a_run_on_the_cpu(tmp_path: Path) -> None:
    said: list[str] = []
    trainer(tmp_path, callbacks=[MemplanCallback(gpu="24GB", say=said.append)]).train()
    assert said[2:] == ["memplan: the plan is of a GPU and the run was on cpu: not compared"]


class Taught(Trainer):
    """A Trainer with a second model, which is asked and not trained."""

    teacher: Any

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            target = self.teacher(inputs["input_ids"]).logits.softmax(-1)
        loss = -(outputs.logits.log_softmax(-1) * target).mean()
        return (loss, outputs) if return_outputs else loss


def test_a_second_model_is_planned_and_measured(tmp_path: Path) -> None:
    said: list[str] = []
    callback = MemplanCallback(say=said.append)
    run = trainer(tmp_path, kind=Taught, callbacks=[callback])
    run.teacher = model().eval()
    run.train()
    assert callback.plan is not None and callback.measured is not None, said
    planned = {
        line.phase: line.allocated_peak_bytes for line in callback.plan.result.phases if line.step == 2
    }
    measured = {peak.phase: peak.allocated_peak_bytes for peak in callback.measured.phases if peak.step == 2}
    for phase in ("forward", "backward", "optimizer_step"):
        assert planned[phase] == pytest.approx(measured[phase], rel=0.005), phase


def test_trl_trains_with_it(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel(
            {"<pad>": 0, "<eos>": 1, **{f"w{index}": index + 2 for index in range(598)}}, "<pad>"
        )
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": " ".join(f"w{index}" for index in range(90))}] * 8)
    callback = MemplanCallback(say=lambda line: None)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False, max_length=64,
        report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    run = trl.SFTTrainer(
        model=model(bos_token_id=None, eos_token_id=1, pad_token_id=0), args=arguments, train_dataset=data,
        processing_class=tokenizer, peft_config=lora(), callbacks=[callback],
    )  # fmt: skip
    run.train()
    assert callback.plan is not None and callback.measured is not None
    assert any("SFTTrainer" in reason for reason in callback.plan.reasons)
    assert callback.plan.peak_bytes == pytest.approx(callback.measured.allocated_peak_bytes, rel=0.005)


def test_a_trainer_is_planned_without_a_run(tmp_path: Path) -> None:
    """The Trainer that was planned and traced is the one that was built, and trains as one that was not."""
    run = trainer(tmp_path)
    addresses = [parameter.data_ptr() for parameter in run.model.parameters()]
    random_state, plain = torch.get_rng_state(), dict(vars(run.model))
    shape, trace = preflight(run), preflight(run, engine="trace")
    assert shape.peak_bytes == pytest.approx(trace.peak_bytes, rel=0.001)
    assert shape.fits is None and "optimizer states" in str(trace)
    assert [parameter.data_ptr() for parameter in run.model.parameters()] == addresses
    assert run.optimizer is None and run.accelerator._dataloaders == [] and run.state.global_step == 0
    assert vars(run.model).keys() == plain.keys() and not run.is_in_train
    assert torch.equal(torch.get_rng_state(), random_state)
    assert collate(rows()[:1])["labels"].device.type == "cpu"
