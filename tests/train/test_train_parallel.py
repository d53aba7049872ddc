"""Two processes compute what one computes, save what one can continue, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from launched import ENDLESS, GUARD_SECONDS, environment, ranks, running, started_at  # noqa: E402
from measured_cells import GRID, Measured, measure, planned  # noqa: E402
from parallel_cells import Cell, cells, resumable_job, train  # noqa: E402
from tiny_runs import losses, prepared, tiny_job  # noqa: E402

from memplan.errors import RunError  # noqa: E402
from memplan.train import group  # noqa: E402
from memplan.train.group import Group  # noqa: E402
from memplan.train.output_folder import write_job  # noqa: E402
from memplan.train.processes import Workers, membership  # noqa: E402
from memplan.train.record import Record  # noqa: E402
from memplan.train.worker import run_job  # noqa: E402

pytestmark = pytest.mark.torch

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cell, trained by two processes."""
    root = tmp_path_factory.mktemp("cells")
    for name in ("rank-0", "rank-1", "runs"):
        (root / name).mkdir()
    command = [sys.executable, str(HERE / "parallel_cells.py"), str(root)]
    assert Workers(command, environment(HERE), count=2).wait().code == 0
    return root


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, dict[str, Any]]:
    """The same trainings in this process."""
    root = tmp_path_factory.mktemp("alone")
    return {cell: train(cell.job(root)) for cell in {cell.reference for cell in cells()}}


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.file.removesuffix(".pt"))
def test_two_processes_compute_what_one_computes(
    trained: Path, references: dict[Cell, dict[str, Any]], cell: Cell
) -> None:
    """Losses of the steps and of an evaluation, every gradient of the first step, and the loss falls."""
    expected, found = references[cell.reference], torch.load(trained / cell.file)
    exact = cell.precision in ("float32", "copies")

    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-6 if exact else 5e-3)
    assert found["losses"][2] < found["losses"][0]
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        difference = (found["gradients"][name] - gradient).float().norm()
        assert difference <= (1e-5 if exact else 0.05) * gradient.float().norm(), name


@pytest.mark.parametrize("cell", GRID, ids=lambda cell: cell.name)
def test_measured_peaks_are_the_planned_ones(trained: Path, tmp_path: Path, cell: Measured) -> None:
    """On every rank, of every phase, to 1 %; and so is the whole run's, which is the highest of them."""
    job = cell.job(tmp_path)
    expected = planned(job)
    if cell.is_alone:
        ranks = [measure(job)]
    else:
        ranks = [
            json.loads((trained / f"rank-{rank}" / "measured.json").read_text())[cell.name] for rank in (0, 1)
        ]

    for found in ranks:
        assert found == pytest.approx(expected, rel=0.01)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (path,) = (folder / "final").glob("*.safetensors")
    return dict(load_file(path))


def test_resuming_on_as_many_processes_is_exact(trained: Path) -> None:
    """Stopped in step 5 and continued after step 4: every loss and every final weight, bit for bit."""
    whole, resumed = trained / "runs" / "whole", trained / "runs" / "resumed"

    assert losses(whole) == losses(resumed)
    assert list(losses(whole)) == [1, 2, 3, 4, 5, 6]
    expected, found = _tensors(whole), _tensors(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("name", ["resumed", "changed"])
def test_reading_a_checkpoint_is_planned(trained: Path, name: str) -> None:
    """Loading of a run that goes on, with its strategy or another, on every rank: weights, states, one tensor more."""
    record = Record.read(trained / "runs" / name)
    assert record is not None
    assert record.fields["resumed_from"] is not None
    (planned,) = (line for line in record.fields["plan"]["phases"] if line["phase"] == "load")
    peaks = [line for line in record.fields["measured"]["phases"] if line["phase"] == "load"]
    for peak in peaks:
        assert peak["allocated_peak_bytes"] == pytest.approx(planned["allocated_peak_bytes"], rel=0.01)


def test_resuming_with_another_strategy_learns_the_same(trained: Path) -> None:
    """Shards of FULL_SHARD are whole tensors of DDP."""
    assert losses(trained / "runs" / "changed") == pytest.approx(losses(trained / "runs" / "whole"), rel=1e-5)


def test_resuming_alone_passes_over_a_damaged_checkpoint(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One process goes on from what two have saved; a shard that has changed is noticed, and step 4 is taken."""
    shutil.copytree(trained / "runs" / "whole", tmp_path / "alone")
    (shard, *_) = (tmp_path / "alone" / "checkpoints" / "step-6" / "state").glob("__1_*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    shutil.copytree(trained / "runs" / "model", tmp_path / "model")

    assert run_job(prepared(resumable_job(tmp_path, "alone", strategy="alone")), resume=True) == 0

    assert "step-6` is damaged" in capfd.readouterr().err
    assert losses(tmp_path / "alone") == pytest.approx(losses(trained / "runs" / "whole"), rel=1e-5)


def test_final_weights_are_gathered(trained: Path) -> None:
    """transformers loads a full model that two processes held, and peft adapters; a line per rank is in the record."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    full = trained / "runs" / "full"
    model = AutoModelForCausalLM.from_pretrained(full / "final")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in _tensors(full).items())

    adapted = PeftModel.from_pretrained(model, trained / "runs" / "whole" / "final")
    saved = _tensors(trained / "runs" / "whole")
    assert any(tensor.abs().sum() > 0 for name, tensor in saved.items() if "lora_B" in name)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        module = adapted.get_submodule(f"base_model.model.{name}".removesuffix(".weight"))
        assert torch.equal(module.weight, saved[f"base_model.model.{name}"])
        assert not torch.equal(module.weight, module.original_module.weight)
    assert sum("lora_" in name for name in adapted.state_dict()) == len(saved) - 2

    record = Record.read(full)
    assert record is not None
    assert {0, 1} == {line["rank"] for line in record.fields["measured"]["phases"]}


# -- how they are started, and how they end


def test_processes_of_others_are_joined() -> None:
    """torchrun's variables and srun's; a number that is not the job's is refused; alone is alone."""
    torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    member = membership(torchrun, 4)
    assert member is not None
    assert (member.rank, member.local_rank, member.variables) == (3, 1, {})
    with pytest.raises(
        RunError, match="4 processes were started, and the job's parallel degrees multiply to 2"
    ):
        membership(torchrun, 2)

    slurm = {
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }  # fmt: skip
    member = membership(slurm, 8)
    assert member is not None
    assert member.variables["MASTER_ADDR"] == "gpu07"
    assert (member.variables["RANK"], member.variables["LOCAL_WORLD_SIZE"]) == ("5", "4")
    # Inside a batch script, before srun.
    assert membership({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 8) is None
    assert membership({}, 2) is None


@pytest.mark.parametrize("goes", [False, True], ids=["explains", "goes"])
def test_whoever_fails_later_waits_for_the_explanation(monkeypatch: pytest.MonkeyPatch, goes: bool) -> None:
    """Until the process that failed first has said why, or has taken the store with it."""

    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise torch.distributed.DistNetworkError("Connection reset by peer")

    first, second = Group(world_size=2, store=torch.distributed.HashStore()), Group(rank=1, world_size=2)
    second.store = first.store
    polls: list[float] = []

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 3 and goes:
            second.store = Gone()
        elif len(polls) == 3:
            first.has_explained()

    monkeypatch.setattr(group.time, "sleep", sleep)
    assert first.is_first_to_fail()
    assert not second.is_first_to_fail()
    second.await_explanation()

    assert len(polls) == 3
    Group().await_explanation()  # alone there is nobody to wait for


@pytest.mark.parametrize("is_killed", [False, True], ids=["SIGTERM", "SIGKILL of a rank"])
def test_all_end_together(tmp_path: Path, is_killed: bool) -> None:
    """SIGTERM saves once and exits with 143; a rank that is killed is named, and the other one does not stay."""
    job = tiny_job(tmp_path, train__max_steps=ENDLESS, parallel__strategy="FULL_SHARD", parallel__dp_shard=2)
    folder = tmp_path / "run"
    write_job(tmp_path / "job.yaml", job)
    with running(["train", str(tmp_path / "job.yaml")], folder, steps=3) as process:
        pids = ranks(process.pid)
        began = {pid: started_at(pid) for pid in pids.values()}
        assert pids.keys() == {0, 1}
        if is_killed:
            os.kill(pids[1], signal.SIGKILL)
        else:
            process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=GUARD_SECONDS)

    record = Record.read(folder)
    assert record is not None
    assert None not in began.values()
    assert not any(started_at(pid) == time for pid, time in began.items())
    assert "Traceback" not in text
    if is_killed:
        assert process.returncode == 137
        assert "error: the training process of rank 1 was killed by SIGKILL" in text
        assert record.fields["outcome"] == "failed"
    else:
        assert process.returncode == 143
        done = max(losses(folder))
        assert text.count(f"interrupted by SIGTERM after step {done}") == 1
        assert (folder / "checkpoints" / f"step-{done}" / "manifest.json").exists()
        assert record.fields["outcome"] == "interrupted"
