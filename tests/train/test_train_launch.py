"""What `memplan train` refuses, how it treats its output folder, and real child processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from launched import ENDLESS, GUARD_SECONDS, environment, running
from tiny_runs import GPT2, losses, prepared, tiny_job

from memplan.errors import DataError, RunError
from memplan.job.load import LoadedJob
from memplan.job.spec import Job
from memplan.train.launch import _environment as _environment_of_child
from memplan.train.launch import _explain_death, _lock, self_contained
from memplan.train.output_folder import JOB_FILE, check_folder, different_fields, read_job, write_job
from memplan.train.processes import GRACE_SECONDS, Ending, Workers
from memplan.train.record import Record
from memplan.train.refusals import check_device, check_trainable


def _loaded(job: Job, base_dir: Path) -> LoadedJob:
    return LoadedJob(job, {}, None, base_dir, ())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel.dp_shard": 2, "parallel.strategy": "ZERO_2"}, "ZERO_2"),
        ({"parallel.tp": 2}, "`parallel.tp`"),
        ({"offload.optimizer": True, "optimizer": "lion"}, "no step there"),
        ({"offload.optimizer": True, "autocast": "float16"}, "loss scaling"),
        (
            {"parallel.dp_shard": 2, "parallel.strategy": "FULL_SHARD", "offload.optimizer": True},
            "`offload.optimizer` alone",
        ),
        (
            {"parallel.dp_shard": 2, "parallel.strategy": "FULL_SHARD", "optimizer": "sgd"},
            "fused step",
        ),
        (
            {"parallel.dp_shard": 2, "parallel.strategy": "FULL_SHARD", "optimizer": "adafactor"},
            "cannot step sharded weights",
        ),
        (
            {
                "method": "qlora",
                "quantization.kbit_preparation": True,
                "parallel.dp_shard": 2,
                "parallel.strategy": "FULL_SHARD",
            },
            "kbit_preparation",
        ),
        ({"method": "full", "dtype": "float16"}, "cannot be float16"),
        ({"method": "npt", "autocast": "float16"}, "loss scaling"),
        (
            {"autocast": "float16", "parallel.dp_shard": 2, "parallel.strategy": "FULL_SHARD"},
            "sharded gradients",
        ),
        ({"loss": "fused"}, "liger-kernel"),
        ({"attention": "flash_attention_2"}, "flash-attn"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Each is named in a sentence with a remedy, before anything is loaded."""
    job = tiny_job(tmp_path).replace(**changes)

    with pytest.raises(RunError, match=words) as caught:
        check_trainable(_loaded(job, tmp_path))
    assert caught.value.hint


def test_missing_packages_are_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch there is the command that installs it; peft is needed for adapters, bitsandbytes for 4 bits."""
    module = sys.modules[check_trainable.__module__]
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in ("torch", "peft") else object())
    with pytest.raises(RunError, match="`torch`, `peft`") as caught:
        check_trainable(_loaded(tiny_job(tmp_path), tmp_path))
    assert caught.value.hint == 'pip install "memplan[train]"'
    with pytest.raises(RunError, match="needs `torch`, not"):
        check_trainable(_loaded(tiny_job(tmp_path, "full"), tmp_path))
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(RunError, match="needs `bitsandbytes`"):
        check_trainable(_loaded(tiny_job(tmp_path, "qlora"), tmp_path))


def test_missing_data_is_refused(tmp_path: Path) -> None:
    """No data and data that is not there are both said before a model is loaded."""
    job = tiny_job(tmp_path)

    with pytest.raises(DataError, match="names no training data"):
        check_trainable(_loaded(job.replace(**{"data.train": None}), tmp_path))
    with pytest.raises(DataError, match=r"`gone\.jsonl` does not exist"):
        check_trainable(_loaded(job.replace(**{"data.train": "gone.jsonl"}), tmp_path))


@pytest.mark.parametrize(
    "changes", [{"optimizer": "paged_adamw"}, {"loss": "fused"}, {"attention": "flash_attention_2"}]
)
def test_what_needs_a_gpu_is_refused_on_the_cpu(changes: dict[str, Any]) -> None:
    """The remedy is a field to set; on CUDA nothing is refused."""
    job = Job(model="gpt2", **changes)

    check_device(job, "cuda")
    with pytest.raises(RunError, match="runs on CUDA only"):
        check_device(job, "cpu")


def test_the_copy_of_the_job_stands_alone(tmp_path: Path) -> None:
    """Relative paths become absolute, and every field is spelt out and read back."""
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(GPT2))
    job = Job(model="model").replace(
        **{"data.train": "train.jsonl", "lora.target_modules": ("c_attn", "c_fc")}
    )

    alone = self_contained(_loaded(job, tmp_path))
    write_job(tmp_path / JOB_FILE, alone)

    assert alone.model == str(tmp_path / "model")
    assert alone.data.train == str(tmp_path / "train.jsonl")
    assert alone.train.output_dir == str(Path.cwd() / "runs/memplan")
    assert alone == read_job(tmp_path / JOB_FILE)
    assert "micro_batch_size" in yaml.safe_load((tmp_path / JOB_FILE).read_text())


def test_what_a_resumed_run_may_change() -> None:
    """What decides memory and length may change; what decides the result may not."""
    job = Job(model="gpt2", micro_batch_size=4)

    same = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "loss": "chunked", "train.max_steps": 7}
    assert different_fields(job, job.replace(**same, **{"allocator.expandable_segments": False})) == []
    assert different_fields(job, job.replace(**{"lora.rank": 8, "train.seed": 1})) == [
        "lora.rank",
        "train.seed",
    ]
    assert different_fields(job, job.replace(micro_batch_size=2)) == ["global_batch_size"]


def test_another_run_is_never_written_over(tmp_path: Path) -> None:
    """A folder with weights is for resuming its own job; without weights there is nothing to lose."""
    job = tiny_job(tmp_path)
    folder = tmp_path / "run"
    with pytest.raises(RunError, match="no run to resume"):
        check_folder(folder, job, resume=True)
    folder.mkdir()
    write_job(folder / JOB_FILE, job)
    other = job.replace(**{"lora.rank": 9})
    check_folder(folder, other, resume=False)

    (folder / "checkpoints" / "step-2").mkdir(parents=True)

    check_folder(folder, job, resume=True)
    with pytest.raises(RunError, match="already holds a run of this job"):
        check_folder(folder, job, resume=False)
    for resume in (False, True):
        with pytest.raises(RunError, match=r"different job: it differs in `lora\.rank`") as caught:
            check_folder(folder, other, resume=resume)
        assert "train.output_dir" in (caught.value.hint or "")
    (folder / JOB_FILE).unlink()
    with pytest.raises(RunError, match=r"without its `job\.yaml`"):
        check_folder(folder, job, resume=False)


def test_importing_the_trainer_imports_no_torch() -> None:
    """The command line can offer `train` on a machine without torch."""
    probe = "import sys, memplan.train, memplan.train.data\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], env=environment(), capture_output=True, text=True, check=True
    )

    loaded = set(done.stdout.split())
    assert "memplan.train.data" in loaded
    assert {"torch", "numpy", "transformers", "tokenizers"}.isdisjoint(loaded)


# -- real processes


def _printed_command(text: str) -> list[str]:
    """The command that a run ends with, for this interpreter."""
    found = re.search(r"`memplan (train .* --resume)`", text)
    assert found is not None, text
    return [sys.executable, "-m", "memplan", *shlex.split(found[1])]


@pytest.mark.torch
def test_a_run_survives_an_interruption_and_a_full_disk(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Ctrl-C finishes the step, saves, prints a command and exits with 130. Continued where no file may pass 64 KiB,
    the run says why it cannot save and what is left, and ends with 2. The command, run as printed, then gives the
    losses of a run that nothing disturbed.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from memplan.train.worker import run_job

    job = tiny_job(tmp_path, config=GPT2, train__max_steps=ENDLESS, lora__dropout=0.1)
    path, folder = tmp_path / "job.yaml", tmp_path / "run"
    write_job(path, job)
    with running(["train", str(path)], folder, steps=5) as process:
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == 130, text
    done = max(losses(folder))
    assert f"interrupted by SIGINT after step {done}" in text
    record = Record.read(folder)
    assert record is not None
    assert record.fields["outcome"] == "interrupted"

    longer = job.replace(**{"train.max_steps": done + 2, "train.save_every": 1})
    torch.set_num_threads(1)
    # A module that is imported meanwhile would leave its bytecode cut off, for every process that comes after.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
    try:
        assert run_job(prepared(longer), resume=True) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    failed = capfd.readouterr().err
    assert f"step-{done + 1}` could not be saved: File too large" in failed
    assert f"the last checkpoint is that of step {done}" in failed
    assert [step.name for step in (folder / "checkpoints").iterdir()] == [f"step-{done}"]
    assert _printed_command(failed) == _printed_command(text)

    again = subprocess.run(_printed_command(text), env=environment(), timeout=GUARD_SECONDS)
    assert again.returncode == 0
    whole = prepared(longer.replace(**{"train.output_dir": str(tmp_path / "whole")}))
    assert run_job(whole) == 0
    assert losses(whole) == losses(folder)


def test_the_child_gets_the_allocator_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in its environment before torch is imported; what the user has set already stays."""
    for name in (
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_HIP_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "OMP_WAIT_POLICY",
    ):
        monkeypatch.delenv(name, raising=False)
    job = Job(model="gpt2")

    variables = _environment_of_child(job)
    assert "expandable_segments:True" in variables.values()
    assert variables["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "OMP_WAIT_POLICY" not in _environment_of_child(job)


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    """While one run holds the folder another is refused; afterwards it is free."""
    with _lock(tmp_path), pytest.raises(RunError, match="another run is writing"), _lock(tmp_path):
        pass
    with _lock(tmp_path):
        pass


def test_a_killed_child_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher says what killed the trainer, and how to continue; the record does not stay `running`."""
    job = tiny_job(tmp_path, "full")
    folder = Path(job.train.output_dir)
    (folder / "checkpoints" / "step-2").mkdir(parents=True)
    Record.start(folder, dataclasses.asdict(job))

    _explain_death(Ending(137, (0, signal.SIGKILL)), folder, job, None)

    text = capsys.readouterr().err
    assert "error: the training process was killed by SIGKILL; the system does that" in text
    assert "--resume" in text
    record = Record.read(folder)
    assert record is not None
    assert record.fields["outcome"] == "failed"


def test_a_process_that_waits_for_a_dead_one_is_ended() -> None:
    """One fails, the other notices nothing: it is not waited for beyond the grace, and the cause is the exit code."""
    program = "import os, time; time.sleep(600) if os.environ['RANK'] == '0' else os._exit(3)"
    ending = Workers([sys.executable, "-c", program], os.environ, count=2, grace_seconds=0.1).wait()

    assert (ending.code, ending.killed) == (3, None)
    assert GRACE_SECONDS <= 10


@pytest.mark.torch
@pytest.mark.parametrize(("is_first", "expected"), [(True, ["said", "left"]), (False, ["left"])])
def test_ranks_that_stop_together_leave_together(
    monkeypatch: pytest.MonkeyPatch, is_first: bool, expected: list[str]
) -> None:
    """Nobody goes before the first rank has said how the run ended, since the launcher then ends those that stay."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from memplan.train import worker
    from memplan.train.run import Interrupted

    seen: list[str] = []
    group = SimpleNamespace(is_first=is_first, leave=lambda: seen.append("left"))
    run = SimpleNamespace(group=group, stop_measuring=lambda: None)
    monkeypatch.setattr(worker, "_finish", lambda *_: None)
    monkeypatch.setattr(worker, "_say_how_to_continue", lambda _: seen.append("said"))

    assert worker._interrupted(run, Interrupted(signal.SIGTERM, 3), together=True) == 143  # type: ignore[arg-type]
    assert seen == expected
    seen.clear()
    worker._interrupted(run, Interrupted(signal.SIGTERM, 0))  # type: ignore[arg-type]
    assert "left" not in seen, "before the first step each stops by itself"


def test_a_process_of_a_group_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of gloo's are not given the time to meet a Python that shuts down; alone there are none."""
    pytest.importorskip("torch")
    from memplan.train import group

    codes: list[int] = []
    monkeypatch.setattr(group.os, "_exit", codes.append)
    monkeypatch.setattr(group, "_has_joined", True)
    group.end_process(3)
    monkeypatch.setattr(group, "_has_joined", False)
    with pytest.raises(SystemExit):
        group.end_process(4)
    assert codes == [3]
