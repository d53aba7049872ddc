"""`memplan diff` with the real rooms behind it."""

from __future__ import annotations

import json
import pickle
from functools import cache

import pytest
from commands import run
from recordings import recording_of
from snapshot_tapes import SETTINGS, small_tape

from memplan.job.load import load_job
from memplan.model import resolve_model
from memplan.tape.writer import write_tape
from memplan.units import MiB

JOB = "model: gpt2\nmax_seq_len: 64\nmicro_batch_size: {}\nloss: {}\n"


@pytest.fixture(autouse=True)
def sides(folder):
    """Two jobs, and what was recorded of the first."""
    (folder / "a.yaml").write_text(JOB.format(2, "full"))
    (folder / "b.yaml").write_text(JOB.format(4, "full") + "gpu: 24GB\n")
    (folder / "gpu.yaml").write_text(JOB.format(2, "full") + "gpu: 24GB\n")
    (folder / "a.pickle").write_bytes(recorded())
    return folder


@cache
def plan():
    """The plan of the first job, and its allocator."""
    job = load_job(None, ["model=gpt2", "max_seq_len=64", "micro_batch_size=2", "loss=full"]).job
    return write_tape(job, resolve_model(job.model)), job.allocator


@cache
def recorded():
    """A run that did what the plan says, its beginning lost."""
    return pickle.dumps(recording_of(*plan(), drop=400))


def diff(*arguments):
    """The JSON of a comparison."""
    return json.loads(run("diff", *arguments, "--format", "json").stdout)


def need(source):
    """What `estimate` says."""
    return json.loads(run("estimate", source, "--format", "json").stdout)


def test_two_jobs():
    """Totals and peaks are those of the estimates; what was changed is said; tensors are named."""
    found = diff("a.yaml", "b.yaml")
    a, b = need("a.yaml"), need("b.yaml")
    totals = {amount["name"]: (amount["a_bytes"], amount["b_bytes"]) for amount in found["totals"]}

    assert {"micro_batch_size": [2, 4], "gpu": [None, "24GB"]} == found["fields"]
    assert (a["need_bytes"], b["need_bytes"]) == totals["need"]
    assert (a["peak"], b["peak"]) == (found["a"]["peak"], found["b"]["peak"])
    assert (None, "fits") == (found["a"]["verdict"], found["b"]["verdict"]["state"])
    for name in ("categories", "totals", "tensors"):
        for amount in found[name]:
            assert amount["change_bytes"] == amount["b_bytes"] - amount["a_bytes"]
    allocated = totals["allocated"][1] - totals["allocated"][0]
    assert allocated == sum(amount["change_bytes"] for amount in found["categories"])
    largest = found["tensors"][0]
    assert "loss" in largest["where"] and largest["b_bytes"] == 2 * largest["a_bytes"]


def test_a_job_is_like_itself():
    """No difference is made up, and the exit code is 0 however little is allowed."""
    outcome = run("diff", "a.yaml", "a.yaml", "--fail-over", "0%")

    assert (0, "") == (outcome.code, outcome.stderr)
    assert outcome.stdout.splitlines()[0].endswith(": the same")
    assert [] == diff("a.yaml", "a.yaml")["tensors"]


def test_a_plan_and_its_run():
    """Each tensor of the run is found in the plan by its size, and counts in the plan's category."""
    found = diff("a.yaml", "a.pickle")
    recorded = need("a.pickle")

    assert [] == found["tensors"]
    assert found["alike"]["count"] == found["alike"]["by_size"] > 100
    assert recorded["peak"] == found["b"]["peak"]
    assert {} == found["fields"]
    changed = {amount["name"]: amount["change_bytes"] for amount in found["categories"]}
    assert {0} == set(changed.values()), changed
    text = run("diff", "a.yaml", "a.pickle").stdout
    assert "are older than the recording and count as loaded" in text
    assert "have the categories of the plan's tensors of the same size" in text


def test_what_the_plan_does_not_explain_is_unknown(folder):
    """A run that holds one more tensor than planned: it is named, and it is all that is unknown."""
    snapshot = pickle.loads(recorded())
    block = {"size": 6 * MiB, "requested_size": 5 * MiB, "state": "active_allocated", "address": 512}
    block["frames"] = [{"name": "cache", "filename": "/home/me/project/train.py", "line": 5}]
    leak = {**snapshot["segments"][0], "address": 512, "total_size": 6 * MiB, "blocks": [block]}
    snapshot["segments"].append(leak)
    (folder / "leak.pickle").write_bytes(pickle.dumps(snapshot))
    found = diff("a.yaml", "leak.pickle")

    assert ["cache project/train.py:5"] == [change["where"] for change in found["tensors"]]
    unknown = {amount["name"]: amount["b_bytes"] for amount in found["categories"]}["unknown"]
    assert 5 * MiB == unknown == found["tensors"][0]["change_bytes"]


def test_two_recordings(folder):
    """Lines of code are matched with lines of code."""
    for name, logits in (("one", 96), ("two", 128)):
        recording = recording_of(small_tape(logits_mib=logits), SETTINGS[0])
        (folder / f"{name}.pickle").write_bytes(pickle.dumps(recording))
    found = diff("one.pickle", "two.pickle")

    assert {"lm_head logits models/net.py:41", "lm_head grad of logits models/net.py:41"} == {
        change["where"] for change in found["tensors"]
    }
    assert 0 == found["alike"]["by_size"]


def test_a_phase_on_one_side_alone_has_no_change(folder):
    """A recording without phases beside a plan with them."""
    phases = {amount["name"]: amount for amount in diff("a.yaml", "a.pickle")["phases"]}

    assert ["load", "forward", "backward", "optimizer_step", "trace"] == list(phases)
    assert None is phases["forward"]["b_bytes"] and None is phases["trace"]["a_bytes"]


@pytest.mark.parametrize("output_format", ["text", "markdown"])
def test_the_headline_comes_first_and_the_verdict_last(output_format):
    """Both needs, and on a GPU both verdicts."""
    lines = run("diff", "gpu.yaml", "b.yaml", "--format", output_format).stdout.splitlines()

    assert "needs " in lines[0] and " more (+" in lines[0]
    assert lines[-1].startswith("on 24GB: A fits, ") and "; B fits, " in lines[-1]


def test_one_verdict_and_another_card():
    """`--gpu` asks both about one card; without it each job has its own."""
    assert run("diff", "a.yaml", "b.yaml").stdout.splitlines()[-1].startswith("on 24GB: B fits, ")
    last = run("diff", "a.yaml", "b.yaml", "--gpu", "1GiB").stdout.splitlines()[-1]
    assert last.startswith("on 1GiB: A does not fit, ") and last.endswith(" too much")


def test_fail_over():
    """Exit code 1 from the first byte above, and a sentence why; less is never too much."""
    more = diff("a.yaml", "b.yaml")["totals"][0]["change_bytes"]
    just, below = f"{more // 1024}KiB", f"{more // 1024 - 1}KiB"

    assert 0 == run("diff", "a.yaml", "b.yaml", "--fail-over", just).code
    assert 0 == run("diff", "b.yaml", "a.yaml", "--fail-over", "0%").code
    outcome = run("diff", "a.yaml", "b.yaml", "--fail-over", below)
    assert 1 == outcome.code
    assert "note: B needs " in outcome.stderr and " are allowed" in outcome.stderr
    assert outcome.stdout == run("diff", "a.yaml", "b.yaml").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["a.yaml", "b.yaml", "--fail-over", "much"],
            "`--fail-over much` is neither a percentage nor a size",
        ),
        (["a.yaml", "b.yaml", "--format", "github"], "`--format` cannot be `github`"),
        (["a.yaml"], "Missing argument"),
        (["a.yaml", "none.pickle"], "cannot be read"),
        (["a.yaml", "none.yaml"], "none.yaml"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_questions_that_make_no_sense(arguments, message):
    """One sentence, exit code 2, nothing on stdout."""
    outcome = run("diff", *arguments)

    assert (2, "") == (outcome.code, outcome.stdout)
    assert message in outcome.stderr


def test_a_plan_that_was_written_keeps_its_names(folder):
    """It compares with another plan by name."""
    run("estimate", "a.yaml", "--snapshot", "plan.pickle")
    found = diff("plan.pickle", "b.yaml")

    assert diff("a.yaml", "b.yaml")["tensors"] == found["tensors"]
    assert 0 == found["alike"]["by_size"]


def test_launch_settings_lie_over_jobs_alone(folder):
    """Over both jobs, or over that beside a recording; two recordings have none to lay them over."""
    job = JOB.format(2, "full") + "loop: hf_trainer\n"
    (folder / "c.yaml").write_text(job)
    (folder / "d.yaml").write_text(job + "parallel: {dp_replicate: 4}\n")
    (folder / "launch.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")

    assert {"parallel.dp_replicate": [1, 4]} == diff("c.yaml", "d.yaml")["fields"]
    assert {} == diff("c.yaml", "d.yaml", "--accelerate", "launch.yaml")["fields"]
    changed = {amount["name"]: amount["a_bytes"] for amount in diff("d.yaml", "a.pickle")["totals"]}
    launched = diff("c.yaml", "a.pickle", "--accelerate", "launch.yaml")["totals"]
    assert changed == {amount["name"]: amount["a_bytes"] for amount in launched}
    refused = run("diff", "a.pickle", "a.pickle", "--accelerate", "launch.yaml")
    assert 2 == refused.code and "both sides are recordings" in refused.stderr
