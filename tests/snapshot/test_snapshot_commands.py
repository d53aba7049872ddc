"""Snapshots on the command line."""

from __future__ import annotations

import json
import os
import pickle

import jsonschema
import pytest
from commands import run
from recordings import recording_of
from snapshot_tapes import SETTINGS, small_tape

from memplan.render.schema import result_schema
from memplan.snapshot import is_pickle, write_snapshot
from memplan.units import MiB

SMALL = ("--model", "gpt2", "--max-seq-len", "64")


def test_estimate_writes_the_plan(folder):
    """The report is as without it, the file is said, and it holds what the plan says."""
    plain = run("estimate", *SMALL)
    outcome = run("estimate", *SMALL, "--snapshot", "plan.pickle")

    assert (0, plain.stdout) == (outcome.code, outcome.stdout)
    assert "note: wrote `plan.pickle`; open it at https://pytorch.org/memory_viz\n" == outcome.stderr
    snapshot = pickle.loads((folder / "plan.pickle").read_bytes())
    names = {entry["frames"][0]["name"] for entry in snapshot["device_traces"][0]}
    assert "transformer.wte.weight" in names
    assert snapshot["allocator_settings"]["expandable_segments"]


def test_a_file_that_is_there_stays(folder):
    """As with `fit --write`: one sentence, exit code 2, nothing printed and nothing replaced."""
    (folder / "plan.pickle").write_text("mine")
    outcome = run("estimate", *SMALL, "--snapshot", "plan.pickle")

    assert (2, "") == (outcome.code, outcome.stdout)
    assert "error: `plan.pickle` exists already\n\nhint: write to another name" in outcome.stderr
    assert "mine" == (folder / "plan.pickle").read_text()


@pytest.fixture
def recording(folder):
    """A recorded run of which the loading is lost, `run.pickle`."""
    (folder / "run.pickle").write_bytes(pickle.dumps(recording_of(small_tape(), SETTINGS[0], drop=4)))


def result(*arguments):
    """The JSON of `estimate`, which satisfies its schema."""
    outcome = run("estimate", *arguments, "--format", "json")
    found = json.loads(outcome.stdout)
    jsonschema.validate(found, result_schema())
    return found


def test_a_recording_is_estimated(recording):
    """The measured peak, its tensors by the lines that made them, and no job."""
    found = result("run.pickle")

    assert [None] * 4 == [found[name] for name in ("job", "error_band", "host", "parameters")]
    assert {"name": "snapshot", "device": "cuda", "file": "run.pickle"} == found["engine"]
    assert 276 * MiB == found["peak"]["allocated_bytes"] == sum(line["bytes"] for line in found["budget"])
    assert ("trace", "lm_head grad of logits models/net.py:41") == (
        found["peak"]["phase"],
        found["peak"]["where"],
    )
    assert ["load", "trace"] == [phase["phase"] for phase in found["phases"]]
    assert 336 * MiB == max(phase["reserved_bytes"] for phase in found["phases"])
    assert {"lm_head logits models/net.py:41", "lm_head grad of logits models/net.py:41"} == {
        tensor["where"] for tensor in found["top"][:2]
    }


@pytest.mark.parametrize("output_format", ["text", "markdown", "github"])
def test_a_recording_in_every_format(recording, output_format):
    """Without a job there is still a whole report."""
    outcome = run("estimate", "run.pickle", "--gpu", "24GB", "--format", output_format)

    assert (0, "") == (outcome.code, outcome.stderr)
    assert "fits" in outcome.stdout and "peak" in outcome.stdout.lower()
    assert "None" not in outcome.stdout


def test_a_recording_fits_or_not(recording):
    """The verdict is on the need of what was recorded, without a band; `--margin` counts."""
    need = result("run.pickle")["need_bytes"]

    assert 0 == run("estimate", "run.pickle", "--gpu", f"{need // 1024}KiB").code
    assert 1 == run("estimate", "run.pickle", "--gpu", f"{need // 1024 - 1}KiB").code
    assert (
        "tight" == result("run.pickle", "--gpu", f"{need // 1024}KiB", "--margin", "5%")["verdict"]["state"]
    )


def test_a_plan_read_back_is_the_plan(folder):
    """The same need, peak, budgets, phases and tensors as the estimate that wrote it."""
    planned = result(*SMALL)
    run("estimate", *SMALL, "--snapshot", "plan.pickle")
    read = result("plan.pickle")

    for name in ("need_bytes", "peak", "budget", "phases", "top", "timeline"):
        assert planned[name] == read[name], name
    assert "written by memplan: a plan, not a measurement" == read["warnings"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.pickle", "--max-seq-len", "8"], "`--max-seq-len` changes a job"),
        (["run.pickle", "--set", "lora.rank=8"], "`--set` changes a job"),
        (["run.pickle", "--snapshot", "new.pickle"], "this is a snapshot already"),
        (["run.pickle", "--engine", "fast"], "`--engine` cannot be `fast`"),
        (["run.pickle:3"], "holds nothing of device 3"),
        (["other.pickle"], "cannot be read"),
        (["empty.pickle"], "holds no allocation"),
        (["job.yaml", "--engine", "snapshot"], "is no pickle"),
        ([*SMALL, "--engine", "snapshot"], "none is named"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_questions_that_make_no_sense(recording, folder, arguments, message):
    """One sentence, a remedy, exit code 2."""
    (folder / "job.yaml").write_text("model: gpt2\n")
    (folder / "empty.pickle").write_bytes(pickle.dumps({"segments": [], "device_traces": []}))
    outcome = run("estimate", *arguments)

    assert (2, "") == (outcome.code, outcome.stdout)
    assert message in outcome.stderr and "\nhint: " in outcome.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_job_from_a_pipe_loses_nothing(folder):
    """`memplan estimate <(generate-job)`: looking for a snapshot must not take the first byte."""
    os.mkfifo(folder / "pipe")
    pipe = os.open(folder / "pipe", os.O_RDWR | os.O_NONBLOCK)
    os.write(pipe, b"model")

    assert not is_pickle(folder / "pipe")
    assert b"model" == os.read(pipe, 100)
    os.close(pipe)


def test_a_recording_is_known_by_its_content(folder):
    """Whatever its name."""
    write_snapshot(small_tape(), folder / "memory.dump")

    assert "snapshot" == result("memory.dump")["engine"]["name"]
    assert result("memory.dump")["peak"] == result("memory.dump:0")["peak"]
