"""
Whole conversations: command, exit code, stdout and stderr, as they are read.

The engine's answers are made by hand: these texts change when the words do, not when an estimate does.
`MEMPLAN_UPDATE_SNAPSHOTS=1 pytest tests/cli/test_snapshots.py` writes what is there now; read the diff.
"""

import os
import re
import shlex
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from commands import run
from handmade import make_change, make_result

import memplan
from memplan.errors import NoLiveGpu
from memplan.fit.frontier import Frontier
from memplan.gpu.nvml import NvmlProbe
from memplan.gpu.probe import GpuProcess, GpuReading
from memplan.preflight.disk import check_disk
from memplan.preflight.live import Machine
from memplan.units import GiB

FOLDER = Path(__file__).parent / "snapshots"
JOB = """\
model: llama-2-7b
micro_batch_size: 2
max_seq_len: 4096
lora: {dtype: bfloat16}
data: {train: data.jsonl}
"""
CHANGES = (
    make_change(
        set={"loss": "chunked"}, summary="loss in chunks", tier=0, slowdown=1.0,
        need_bytes=19 * GiB, headroom_bytes=1 * GiB,
    ),
    make_change(headroom_bytes=2 * GiB),
    make_change(
        set={"max_seq_len": 2048}, summary="sequences of 2048 tokens instead of 4096", tier=3, slowdown=1.0,
        need_bytes=17 * GiB, headroom_bytes=3 * GiB,
    ),
)  # fmt: skip

CASES = {
    "estimate": "estimate job.yaml",
    "estimate-fits": "estimate job.yaml --gpu 24GiB",
    "estimate-tight": "estimate job.yaml --gpu 23GiB --strict",
    "estimate-does-not-fit": "estimate job.yaml --gpu 20GiB",
    "estimate-margin": "estimate job.yaml --gpu 24GiB --margin 5%",
    "estimate-lints": "estimate job.yaml --attention eager --loop script",
    "estimate-markdown": "estimate job.yaml --gpu 20GiB --format markdown",
    "estimate-github": "estimate job.yaml --gpu 20GiB --attention eager --format github",
    "estimate-without-a-file": "estimate --model llama-2-7b --gpu 24GiB --format github",
    "fit": "fit job.yaml --gpu 20GiB",
    "fit-markdown": "fit job.yaml --gpu 20GiB --format markdown",
    "fit-nothing": "fit job.yaml --gpu 2GiB",
    "fit-maximize": "fit job.yaml --gpu 24GiB --micro-batch-size 1 --maximize max_seq_len",
    "fit-write": "fit job.yaml --gpu 20GiB --write new.yaml",
    "preflight-without-a-gpu": "preflight job.yaml",
    "preflight-named": "preflight job.yaml --gpu 20GiB",
    "preflight-markdown": "preflight job.yaml --gpu 24GiB --format markdown",
    "preflight-github": "preflight job.yaml --gpu 24GiB --format github",
    "preflight-live-asked": "preflight job.yaml --gpu live",
    "env": "env job.yaml",
    "env-fish": "env job.yaml --format fish",
    "env-powershell": "env job.yaml --format powershell",
    "env-github": "env job.yaml --format github",
    "env-json": "env job.yaml --format json",
    "train-dry-run": "train job.yaml --dry-run",
    "version": "--version",
    "help": "--help",
    "help-fit": "fit --help",
    "error-flag": "estimate job.yaml --max-seq-length 2048",
    "error-field": "estimate job.yaml --set micro_batch=2",
}
FULL_DISK = {"preflight-full-disk", "preflight-full-disk-github"}
WORDED_BY_TYPER = ("help", "help-fit", "error-flag")
RECORDED_WITH = "0.29"
WITH_A_GPU = {
    "preflight-live": "preflight job.yaml",
    "preflight-live-others": "preflight job.yaml --gpu live --wait 3s",
    "train-does-not-fit": "train job.yaml",
}


@pytest.fixture(autouse=True)
def stage(quiet_place, monkeypatch):
    """A job file, an engine made by hand, a torch, and a disk; no GPU."""
    (quiet_place / "job.yaml").write_text(JOB)
    rows = ['{"text": "short"}', '{"text": "' + "long " * 3000 + '"}']
    (quiet_place / "data.jsonl").write_text("\n".join(rows) + "\n")

    def estimate(job, architecture, **_):
        result = make_result(job=job)
        if job.loss == "chunked":
            band = replace(result.error_band, low_bytes=int(18.5 * GiB), high_bytes=int(19.5 * GiB))
            return replace(result, need_bytes=19 * GiB, error_band=band)
        return result

    def smallest_changes(job, architecture, capacity, **_):
        return tuple(change for change in CHANGES if change.need_bytes <= capacity.usable_bytes)

    def maximize(job, architecture, capacity, field, evaluate):
        return Frontier(field, 4480, 23 * GiB, capacity.usable_bytes - 23 * GiB, "capacity")

    monkeypatch.setattr("memplan.budget.estimate.estimate", estimate)
    monkeypatch.setattr("memplan.cli.planning.estimate_written", lambda *given: (None, estimate(*given)))
    monkeypatch.setattr("memplan.fit.smallest_changes", smallest_changes)
    monkeypatch.setattr("memplan.fit.maximize", maximize)
    monkeypatch.setattr("memplan.train.truncation.count_truncated", lambda loaded, length: (2, 1))
    launch = import_module("memplan.train.launch")
    monkeypatch.setattr("memplan.train.refusals.check_trainable", lambda loaded: None)
    monkeypatch.setattr(launch, "launch", lambda loaded, **_: 0)
    monkeypatch.setattr("memplan.preflight.environment.installed_torch_version", lambda: "2.13.0")
    monkeypatch.setattr("memplan.preflight.environment.current_platform", lambda: "linux")
    monkeypatch.setattr("memplan.preflight.disk.shutil", SimpleNamespace(disk_usage=disk_usage))
    monkeypatch.setattr(
        "memplan.preflight.run.check_disk", lambda *asked: replace(check_disk(*asked), path="/data")
    )
    monkeypatch.setattr("memplan.gpu.nvml.NvmlProbe.read", no_driver)


def disk_usage(path):
    """100 GiB are free."""
    return SimpleNamespace(free=100 * GiB)


def no_driver(self):
    """A machine without a GPU."""
    raise NoLiveGpu("This machine has no NVIDIA driver", hint="name a GPU, such as `--gpu 24GB`")


def a_shared_card(self):
    """A card on which somebody else holds 4 GiB."""
    process = GpuProcess(4211, 4 * GiB, "python")
    return (
        GpuReading(
            index=0, uuid="GPU-5a", name="NVIDIA Test 24", total_bytes=24 * GiB, used_bytes=4 * GiB,
            reserved_bytes=0, free_bytes=20 * GiB, processes=(process,), processes_complete=True,
        ),
    )  # fmt: skip


def conversation(command):
    """What somebody at a terminal types and sees."""
    outcome = run(*shlex.split(command))
    text = (
        f"$ memplan {command}\nexit code: {outcome.code}\n----- stdout -----\n{outcome.stdout}"
        f"----- stderr -----\n{outcome.stderr}"
    )
    return text.replace(memplan.__version__, "[VERSION]")


def check(name, command):
    """Compare with the snapshot, or write it."""
    path = FOLDER / f"{name}.txt"
    text = conversation(command)
    if os.environ.get("MEMPLAN_UPDATE_SNAPSHOTS") == "1":
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")

    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", CASES)
def test_conversation(name):
    """A command answers as recorded."""
    if name in WORDED_BY_TYPER and typer.__version__ < RECORDED_WITH:
        pytest.skip("earlier versions of typer word it differently")
    check(name, CASES[name])


@pytest.mark.parametrize("name", WITH_A_GPU)
def test_conversation_with_a_gpu(name, monkeypatch):
    """On a machine with a card that is shared, it answers as recorded."""
    monkeypatch.setattr("memplan.gpu.nvml.NvmlProbe.read", a_shared_card)
    now = [0.0]
    machine = Machine(
        NvmlProbe(), {}, "2.13.0", clock=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds)
    )
    monkeypatch.setattr("memplan.preflight.run.this_machine", lambda: machine)
    check(name, WITH_A_GPU[name])


def test_conversation_with_a_full_disk(monkeypatch):
    """Without room for its checkpoints a job fails the preflight, though it fits the card."""
    monkeypatch.setattr(
        "memplan.preflight.disk.shutil",
        SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=GiB // 4)),
    )
    check("preflight-full-disk", "preflight job.yaml --gpu 24GiB")
    check("preflight-full-disk-github", "preflight job.yaml --gpu 24GiB --format github")


def test_no_snapshot_is_left_over():
    """Each file belongs to a case."""
    assert {path.stem for path in FOLDER.iterdir()} == CASES.keys() | WITH_A_GPU.keys() | FULL_DISK


def test_the_same_in_ascii_and_without_colour():
    """Every text reads without block characters too: only the chart uses them."""
    for path in FOLDER.glob("*.txt"):
        if "markdown" in path.stem:
            continue
        assert not re.search(r"[^\x00-\x7f▁▂▃▄▅▆▇█┤│└─]", path.read_text(encoding="utf-8")), path.name
