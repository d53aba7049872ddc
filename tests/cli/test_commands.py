"""What each command does with the real rooms behind it."""

import json

import jsonschema
import pytest
from commands import run

from memplan.cli.app import COMMANDS
from memplan.cli.options import JOB_FIELDS
from memplan.errors import NoLiveGpu
from memplan.job.fields import job_fields
from memplan.job.ready import list_jobs
from memplan.render.schema import result_schema

SMALL = ("--model", "gpt2", "--max-seq-len", "64")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same answers on a machine with a GPU."""

    def read(self):
        raise NoLiveGpu("This machine has no NVIDIA driver", hint="name a GPU")

    monkeypatch.setattr("memplan.gpu.nvml.NvmlProbe.read", read)


def result(*arguments):
    """The JSON of a command."""
    return json.loads(run(*arguments, "--format", "json").stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ("estimate", *SMALL),
        ("estimate", *SMALL, "--gpu", "24GB"),
        ("estimate", "npt-gpt2"),
        ("fit", *SMALL, "--gpu", "24GB"),
        ("fit", *SMALL, "--gpu", "1200MiB"),
        ("fit", *SMALL, "--gpu", "24GB", "--maximize", "micro_batch_size"),
        ("preflight", *SMALL),
        ("preflight", *SMALL, "--gpu", "24GB", "--attention", "eager"),
    ],
    ids=" ".join,
)
def test_every_result_satisfies_the_schema(arguments):
    """`memplan schema --of result` describes what is printed, with the same keys for every command."""
    schema = json.loads(run("schema", "--of", "result").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    found = result(*arguments)

    jsonschema.validate(found, schema)
    assert list(schema["properties"]) == list(found)


@pytest.mark.parametrize("gpu", [(), ("--gpu", "24GB")], ids=["alone", "with a card"])
def test_every_comparison_satisfies_its_schema(gpu):
    """`memplan schema --of diff` describes what `diff` prints, and refuses what it does not print."""
    schema = json.loads(run("schema", "--of", "diff").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    found = json.loads(run("diff", "npt-gpt2", "npt-llama-8b", *gpu, "--format", "json").stdout)

    jsonschema.validate(found, schema)
    assert list(schema["properties"]) == list(found)
    for broken in ({**found, "more": 1}, {**found, "totals": [{"name": "need"}]}, {**found, "a": None}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_gemma_2_is_planned_with_an_attention_that_it_has():
    """sdpa cannot cap scores: the default gives way and says so, sdpa by name is refused."""
    gemma = ("--model", "gemma-2-2b", "--method", "lora", "--max-seq-len", "64")
    found = result("estimate", *gemma)
    refused = run("estimate", *gemma, "--attention", "sdpa")

    assert "eager" == found["job"]["attention"]
    assert any("attention: eager" in warning for warning in found["warnings"])
    assert (2, True) == (refused.code, "attention=eager" in refused.stderr)


def test_the_schema_can_refuse():
    """Meta-test: a schema that takes anything would make the test above pass for ever."""
    found = result("estimate", *SMALL)
    for broken in ({**found, "extra": 1}, {**found, "need_bytes": 1.5}, {**found, "peak": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, result_schema())


@pytest.mark.parametrize("field", JOB_FIELDS)
def test_each_flag_sets_its_field(field):
    """A flag is the field with dashes, and does the same as `--set`."""
    known = job_fields()[field]
    flag = "--" + field.replace("_", "-").replace(".", "-")
    value = {
        "model": "tinyllama-1.1b",
        "gpu": "24GB",
        "margin": "1GiB",
        "method": "full",
        "loss": "chunked",
    }.get(field)
    if isinstance(known.default, bool):
        flagged, set_to = (flag,), "true"
    else:
        set_to = value or str(next((choice for choice in known.choices or () if choice != known.default), 2))
        flagged = (flag, set_to)
    base = {"model": SMALL[2:], "max_seq_len": SMALL[:2]}.get(field, SMALL)
    by_flag = result("estimate", *base, *flagged)
    by_set = result("estimate", *base, "--set", f"{field}={set_to}")

    assert by_set["job"] == by_flag["job"]
    assert "user" == by_flag["origins"][field]
    assert result("estimate", *SMALL)["job"] != by_flag["job"]


def test_later_words_win():
    """File, then flags, then `--set`."""
    found = result("estimate", *SMALL, "--micro-batch-size", "2", "--set", "micro_batch_size=3")

    assert 3 == found["job"]["micro_batch_size"]


def test_no_packing_undoes_packing(tmp_path):
    """A boolean flag has its opposite."""
    (tmp_path / "job.yaml").write_text("model: gpt2\npacking: true\nmax_seq_len: 64\n")

    assert result("estimate", "job.yaml")["job"]["packing"] is True
    assert result("estimate", "job.yaml", "--no-packing")["job"]["packing"] is False


def test_every_ready_job_can_be_estimated_or_says_why():
    """What `memplan jobs` lists can be asked about at once."""
    for name, _ in list_jobs():
        outcome = run("estimate", name)

        assert outcome.code in (0, 1), (name, outcome.stderr)


def test_a_budget_adds_up_to_the_peak():
    """The contract of the result, as printed."""
    found = result("estimate", *SMALL)

    assert found["peak"]["allocated_bytes"] == sum(line["bytes"] for line in found["budget"])


def test_fit_writes_a_job_that_fits(tmp_path):
    """`--write` gives the changed job, which then fits as it is, and leaves the old one alone."""
    (tmp_path / "job.yaml").write_text("model: gpt2\nmicro_batch_size: 4\nmax_seq_len: 512\n")
    before = (tmp_path / "job.yaml").read_text()
    need = result("estimate", "job.yaml")["need_bytes"]
    gpu = f"{need * 9 // 10 // 1024}KiB"
    outcome = run("fit", "job.yaml", "--gpu", gpu, "--write", "new.yaml")

    assert 0 == outcome.code
    assert "wrote `new.yaml`" in outcome.stderr
    assert before == (tmp_path / "job.yaml").read_text()
    found = result("estimate", "new.yaml")
    assert found["need_bytes"] <= need * 9 // 10
    assert gpu == found["capacity"]["gpu"]


def test_the_pasted_line_gives_the_promised_need(tmp_path):
    """The flags that fit prints do what it says they do."""
    import shlex

    asked = ("--model", "gpt2", "--micro-batch-size", "4", "--max-seq-len", "512")
    need = result("estimate", *asked)["need_bytes"]
    gpu = f"{need * 9 // 10 // 1024}KiB"
    outcome = run("fit", *asked, "--gpu", gpu)
    [line] = [line for line in outcome.stdout.splitlines() if line.startswith("  memplan train ")]
    change = result("fit", *asked, "--gpu", gpu)["changes"][0]

    found = result("estimate", *shlex.split(line)[2:])
    assert change["need_bytes"] == found["need_bytes"]
    assert change["headroom_bytes"] == found["capacity"]["usable_bytes"] - found["need_bytes"]


def test_fit_keeps_the_margin_free():
    """With a margin, what is found fits with the margin, not without it alone."""
    asked = ("--model", "gpt2", "--micro-batch-size", "4", "--max-seq-len", "512")
    need = result("estimate", *asked)["need_bytes"]
    gpu = f"{(need + 2**20) // 1024}KiB"

    assert {} == result("fit", *asked, "--gpu", gpu)["changes"][0]["set"]
    changed = result("fit", *asked, "--gpu", gpu, "--margin", "10%")["changes"][0]
    assert changed["set"] and changed["need_bytes"] * 1.1 <= need + 2**20


def test_maximize_names_the_edge():
    """The value fits, and the next one does not."""
    asked = ("--model", "gpt2", "--max-seq-len", "64")
    found = result("fit", *asked, "--gpu", "3GiB", "--maximize", "micro_batch_size")["frontier"]
    fits = result("estimate", *asked, "--gpu", "3GiB", "--micro-batch-size", str(found["value"]))
    above = result("estimate", *asked, "--gpu", "3GiB", "--micro-batch-size", str(found["value"] + 1))

    assert fits["need_bytes"] == found["need_bytes"] <= 3 * 2**30 < above["need_bytes"]


@pytest.mark.parametrize("name", ["models", "gpus", "jobs"])
def test_lists_say_the_same_to_people_and_to_scripts(name):
    """One line per entry below the header, and the same entries as JSON."""
    lines = run(name).stdout.splitlines()
    entries = json.loads(run(name, "--format", "json").stdout)

    assert len(entries) == len(lines) - 1 > 5
    assert all(line.startswith(entry["name"]) for entry, line in zip(entries, lines[1:]))


def test_each_command_has_help_in_one_line():
    """The list of commands shows a whole sentence for each."""
    text = run("--help").stdout

    for name in COMMANDS:
        [line] = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
        assert not line.endswith("..."), line


def test_the_schema_of_the_job_describes_its_fields():
    """`memplan schema` is the job file's."""
    schema = json.loads(run("schema").stdout)

    assert {"model", "lora", "gpu"} <= set(schema["properties"])
