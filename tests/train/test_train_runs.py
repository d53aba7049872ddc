"""Whole runs of tiny jobs: they learn, leave what they promise, and continue bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_runs import GPT2, losses, prepared, stops_in, tiny_job  # noqa: E402

from memplan.job.load import LoadedJob  # noqa: E402
from memplan.train import launch  # noqa: E402
from memplan.train.record import Record, read_metrics_lines  # noqa: E402
from memplan.train.worker import run_job  # noqa: E402

pytestmark = pytest.mark.torch


def _record(folder: Path) -> dict[str, Any]:
    record = Record.read(folder)
    assert record is not None
    return record.fields


def _load_ratio(folder: Path) -> float:
    """Measured over planned peak of loading."""
    record = _record(folder)
    measured, planned = (
        next(line["allocated_peak_bytes"] for line in record[name]["phases"] if line["phase"] == "load")
        for name in ("measured", "plan")
    )
    return float(measured / planned)


def _final_weights(folder: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    (path,) = (folder / "final").glob("*.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_loss_falls(tmp_path: Path, method: str, loss: str) -> None:
    """Both losses teach both methods the text, and the plan is within 2 % of what was measured."""
    folder = prepared(tiny_job(tmp_path, method, loss=loss, train__max_steps=30, train__learning_rate=2e-2))

    assert run_job(folder) == 0

    curve = losses(folder)
    assert curve[30] < 0.75 * curve[1]
    record = _record(folder)
    assert record["plan"]["peak"]["allocated_bytes"] == pytest.approx(
        record["measured"]["peak"]["allocated_peak_bytes"], rel=0.02
    )


def test_npt_layers_learn_their_blocks(tmp_path: Path) -> None:
    """On GPT-2 with its own dropout, the NPT layers come closer to the blocks that they replace."""
    job = tiny_job(tmp_path, "npt", config=GPT2, train__max_steps=60, train__learning_rate=2e-2)
    folder = prepared(job.replace(**{"npt.rank": 16, "npt.regularization": 0.0}))

    assert run_job(folder) == 0

    lines = read_metrics_lines(folder)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert {"0", "1", "2"} == set(lines[0]["relative_error"])
    assert {"load", "forward", "optimizer_step"} == {
        line["phase"] for line in _record(folder)["measured"]["phases"]
    }


@pytest.mark.parametrize(
    ("method", "config", "changes"),
    [
        ("lora", GPT2, {"lora__dropout": 0.2, "activation_checkpointing": "full"}),
        ("full", GPT2, {"train__schedule": "linear", "train__warmup_steps": 2}),
        ("npt", GPT2, {}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, method: str, config: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Dropout, schedule, optimizer: every loss and every final weight is the same, bit for bit."""
    job = tiny_job(tmp_path, method, config=config, train__max_steps=5, train__save_every=2, **changes)
    whole = prepared(job)
    assert run_job(whole) == 0
    other = job.replace(**{"train.output_dir": str(tmp_path / "resumed")})
    resumed = prepared(other)

    assert run_job(resumed, hook=stops_in("optimizer_step", 4)) == 70
    assert list(losses(resumed)) == [1, 2, 3]
    assert run_job(resumed, resume=True) == 0
    assert _load_ratio(resumed) == pytest.approx(1, rel=0.01)

    assert losses(whole) == losses(resumed)
    assert _final_weights(whole) == _final_weights(resumed) != {}
    assert _record(resumed)["resumed_from"] == 2


def test_record_and_metrics_keep_their_contract(tmp_path: Path) -> None:
    """The fields that readers rely on are there, with the job, the plan and every measured phase."""
    folder = prepared(tiny_job(tmp_path, "lora", train__max_steps=4, train__max_grad_norm=1.0))

    assert run_job(folder) == 0

    record = _record(folder)
    assert {
        "schema_version", "job", "plan", "measured", "versions", "device", "data", "outcome", "error",
        "steps", "loss", "resumed_from", "replan", "started_at", "finished_at",
    } == set(record)  # fmt: skip
    assert (record["outcome"], record["error"], record["schema_version"]) == ("completed", None, 1)
    assert record["job"]["method"] == "lora"
    assert record["plan"]["need_bytes"] > 0
    assert {"memplan", "python", "torch", "transformers", "peft"} <= set(record["versions"])
    assert record["steps"] == {"first": 1, "last": 4, "max": 4}
    phases = [(line["phase"], line["step"]) for line in record["measured"]["phases"]]
    steps = [(phase, step) for step in (1, 2, 3) for phase in ("forward", "backward", "optimizer_step")]
    assert [("load", 0), *steps] == phases
    lines = read_metrics_lines(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {"step", "loss", "learning_rate", "samples", "tokens", "tokens_per_s", "memory"} == set(line)
        assert line["samples"] == line["step"] * 4
        assert line["memory"] > 0
    assert [json.loads(text)["step"] for text in (folder / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_peft_loads_the_final_adapters(tmp_path: Path) -> None:
    """`final/` on the same base gives the logits of the model that was trained."""
    from peft import PeftModel

    from memplan.train.build import build_model

    job = tiny_job(tmp_path, "lora")
    folder = prepared(job)
    assert run_job(folder) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    base = build_model(job.replace(method="full"), config, torch.device("cpu"), weights_path=None).model
    trained = build_model(job, config, torch.device("cpu"), weights_path=None)
    trained.load_weights(folder / "final")
    ids = torch.tensor([[1, 2, 3, 4]])

    loaded = PeftModel.from_pretrained(base, folder / "final").eval()

    expected = trained.model.eval()(input_ids=ids).logits
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(input_ids=ids).logits, expected)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


def test_transformers_loads_the_final_model(tmp_path: Path) -> None:
    """A full run leaves a folder that `from_pretrained` takes."""
    from transformers import AutoModelForCausalLM

    folder = prepared(tiny_job(tmp_path, "full", train__max_steps=2))
    assert run_job(folder) == 0

    AutoModelForCausalLM.from_pretrained(folder / "final")


def test_pretrained_weights_of_a_local_folder(tmp_path: Path) -> None:
    """Weights in a folder are trained on from where they were; without a tokenizer they are refused."""
    first = prepared(tiny_job(tmp_path, "full", train__max_steps=25, train__learning_rate=2e-2))
    assert run_job(first) == 0
    job = tiny_job(tmp_path, "lora", model=str(first / "final"), weights="pretrained")
    second = prepared(job.replace(**{"train.output_dir": str(tmp_path / "second")}))

    assert run_job(second) == 2
    assert "tokenizer" in _record(second)["error"]

    import tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {chr(code): code for code in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet | {"<eos>": 256}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(first / "final")

    assert run_job(second) == 0
    assert _load_ratio(second) == pytest.approx(1, rel=0.01)
    assert losses(second)[1] < 0.8 * losses(first)[1]
    assert (second / "final" / "tokenizer.json").exists()


def test_evaluation_is_taken_when_weights_are_saved(tmp_path: Path) -> None:
    """With `data.eval` the lines of saved steps carry the loss on it, and evaluating changes nothing else."""
    job = tiny_job(tmp_path, "lora", config=GPT2, train__save_every=2)
    plain = prepared(job)
    assert run_job(plain) == 0
    other = prepared(
        job.replace(**{"data.eval": job.data.train, "train.output_dir": str(tmp_path / "evaluated")})
    )
    assert run_job(other) == 0

    lines = read_metrics_lines(other)
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    assert losses(plain) == losses(other)


def test_npt_can_be_evaluated(tmp_path: Path) -> None:
    """For NPT layers the evaluation is their objective on other text."""
    job = tiny_job(tmp_path, "npt", train__max_steps=1)
    folder = prepared(job.replace(**{"data.eval": job.data.train}))

    assert run_job(folder) == 0
    assert read_metrics_lines(folder)[0]["eval_loss"] > 0


def test_a_dry_run_trains_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It loads data and model, says so, and stops before the first step."""
    folder = prepared(tiny_job(tmp_path))

    assert run_job(folder, dry_run=True) == 0

    assert "ready for the first step" in capfd.readouterr().err
    assert not (folder / "metrics.jsonl").exists()
    assert not (folder / "checkpoints").exists()


# -- runs that end badly


def test_running_out_of_memory_is_explained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """When, what the plan said, what is free, the smallest change as a command; no traceback."""
    folder = prepared(tiny_job(tmp_path, "lora", train__save_every=1))

    def fail(phase: str, step: int) -> None:
        if (phase, step) == ("backward", 2):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of ..."
            )

    assert run_job(folder, hook=fail) == 1

    text = capfd.readouterr().err
    assert "out of memory in backward of step 2: tried to allocate 2.50 GiB more" in text
    assert "planned for backward" in text
    assert "activations" in text
    assert "free for this run" in text
    assert "--resume --set " in text
    assert "Traceback" not in text
    assert _record(folder)["outcome"] == "out_of_memory"
    assert run_job(folder, resume=True) == 0


def test_a_cpu_allocation_that_fails_is_out_of_memory(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A request that no machine can serve, made for real, is told apart from other errors."""
    folder = prepared(tiny_job(tmp_path))

    def fail(phase: str, step: int) -> None:
        if (phase, step) == ("forward", 1):
            torch.empty(1 << 60, dtype=torch.uint8)

    assert run_job(folder, hook=fail) == 1
    assert "in forward of step 1: tried to allocate 1,073,741,824.00 GiB more" in capfd.readouterr().err


def test_memory_is_let_go_before_the_explanation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the explanation looks at what is free, no tensor of the failed step is alive."""
    import weakref

    from memplan.train import worker
    from memplan.train.loop import Loop

    folder = prepared(tiny_job(tmp_path))
    parameters: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def count_parameters(run: Any, detail: str) -> None:
        alive.append(sum(parameter() is not None for parameter in parameters))

    def remember(loop: Loop, *arguments: Any, **options: Any) -> None:
        make(loop, *arguments, **options)
        parameters.extend(map(weakref.ref, loop.built.model.parameters()))

    make = Loop.__init__
    monkeypatch.setattr(Loop, "__init__", remember)
    monkeypatch.setattr(worker, "_say_out_of_memory", count_parameters)

    def fail(phase: str, step: int) -> None:
        if (phase, step) == ("backward", 2):
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert run_job(folder, hook=fail) == 1
    assert len(parameters) > 20
    assert [0] == alive


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The step and a remedy are named, without a traceback."""
    folder = prepared(
        tiny_job(tmp_path, "full", train__learning_rate=1e30, train__save_every=1, optimizer="sgd")
    )

    assert run_job(folder) == 2

    text = capfd.readouterr().err
    assert "step" in text
    assert "learning_rate" in text
    assert "Traceback" not in text
    assert _record(folder)["outcome"] == "failed"


def test_a_full_disk_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint before is intact, and the message says how to continue from it."""
    import errno

    from torch.distributed.checkpoint import FileSystemWriter

    folder = prepared(tiny_job(tmp_path, train__save_every=2))
    write = FileSystemWriter.write_data
    saved: list[object] = []

    def full_disk(writer: Any, *args: Any, **kwargs: Any) -> Any:
        saved.append(args)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(writer, *args, **kwargs)

    monkeypatch.setattr(FileSystemWriter, "write_data", full_disk)

    assert run_job(folder) == 2
    text = capfd.readouterr().err
    assert "the disk is full" in text
    assert "the last checkpoint is that of step 2" in text
    assert "--resume" in text
    monkeypatch.undo()
    assert run_job(folder, resume=True) == 0
    assert list(losses(folder)) == [1, 2, 3, 4]


def test_changed_data_cannot_be_continued_on(tmp_path: Path) -> None:
    """Exact resuming needs the same samples: others are refused."""
    job = tiny_job(tmp_path, train__save_every=1, train__max_steps=1)
    folder = prepared(job)
    assert run_job(folder) == 0
    Path(str(job.data.train)).write_text('{"text": "other text"}\n')
    prepared(job.replace(**{"train.max_steps": 2}))

    assert run_job(folder, resume=True) == 2
    assert "the data or the tokenizer has changed" in _record(folder)["error"]


@pytest.mark.parametrize(
    ("length", "longer"),
    [({"train.max_steps": 2}, {"train.max_steps": 3}), ({"train.epochs": 1.0}, {"train.epochs": 1.3})],
)
def test_a_finished_run_is_not_run_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], length: dict[str, Any], longer: dict[str, Any]
) -> None:
    """
    Resuming a complete run says that it is complete and touches nothing; a longer one goes on. An epoch of 8 samples is
    two steps of 4, and a part of a step is a step.
    """
    job = tiny_job(tmp_path).replace(**{"train.max_steps": 100} | length)
    folder = prepared(job)
    assert run_job(folder) == 0
    capfd.readouterr()
    record = (folder / "record.json").read_bytes()

    assert launch(LoadedJob(job, {}, None, tmp_path, ()), resume=True) == 0
    assert "this run is complete: 2 steps are done" in capfd.readouterr().err
    assert record == (folder / "record.json").read_bytes()
    prepared(job.replace(**longer))
    assert run_job(folder, resume=True) == 0
    assert list(losses(folder)) == [1, 2, 3]


def test_positions_beyond_the_embeddings_are_refused(tmp_path: Path) -> None:
    """A sequence longer than GPT-2's position embeddings is an explained error, not an index error."""
    folder = prepared(tiny_job(tmp_path, config=GPT2, max_seq_len=65))

    assert run_job(folder) == 2
    assert "64 positions" in _record(folder)["error"]
