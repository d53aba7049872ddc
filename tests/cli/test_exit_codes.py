"""Errors become one sentence, a hint and an exit code; answers become exit codes."""

import pytest
from commands import run

from memplan.errors import MemplanError, NoLiveGpu

SMALL = ("--model", "gpt2", "--max-seq-len", "64")
A_JOB = "model: gpt2\nmax_seq_len: 64\n"

BAD_INPUT = [
    # arguments, exit code, phrase on stderr
    (("nope",), 2, "No such command"),
    (("estimat",), 2, "No such command 'estimat'"),
    (("--nope",), 2, "No such option"),
    (("estimate",), 2, "`model` is missing"),
    (("estimate", "nope.yaml"), 2, "nope.yaml"),
    (("estimate", "."), 2, "."),
    (("estimate", "job.yaml", "other.yaml"), 2, "unexpected extra argument"),
    (("estimate", "empty.yaml"), 2, "empty.yaml"),
    (("estimate", "broken.yaml"), 2, "broken.yaml"),
    (("estimate", "binary.yaml"), 2, "binary.yaml"),
    (("estimate", "list.yaml"), 2, "list.yaml"),
    (("estimate", "unknown-field.yaml"), 2, "micro_batch_size"),
    (("estimate", "job.yaml", "--nope"), 2, "No such option"),
    (("estimate", "job.yaml", "--max-seq-length", "64"), 2, "--max-seq-len"),
    (("estimate", "job.yaml", "--format", "xml"), 2, "`--format` cannot be `xml`"),
    (("estimate", "job.yaml", "--format"), 2, "requires an argument"),
    (("estimate", "job.yaml", "--format", ""), 2, "`--format` cannot be"),
    (("estimate", "job.yaml", "--engine", "guess"), 2, "`--engine` cannot be `guess`"),
    (("estimate", "job.yaml", "--strict", "yes"), 2, "unexpected extra argument"),
    (("estimate", "job.yaml", "--set"), 2, "requires an argument"),
    (("estimate", "job.yaml", "--set", "micro_batch_size"), 2, "field=value"),
    (("estimate", "job.yaml", "--set", "=2"), 2, "field=value"),
    (("estimate", "job.yaml", "--set", "micro_batch=2"), 2, "unknown field `micro_batch`"),
    (("estimate", "job.yaml", "--set", "lora.rnak=2"), 2, "lora.rank"),
    (("estimate", "job.yaml", "--set", "micro_batch_size=0"), 2, "micro_batch_size"),
    (("estimate", "job.yaml", "--set", "micro_batch_size=two"), 2, "whole number"),
    (("estimate", "job.yaml", "--set", "method=dora"), 2, "method"),
    (("estimate", "job.yaml", "--micro-batch-size", "-1"), 2, "--micro-batch-size"),
    (("estimate", "job.yaml", "--micro-batch-size", "1.5"), 2, "whole number"),
    (("estimate", "job.yaml", "--micro-batch-size", ""), 2, "is empty"),
    (("estimate", "job.yaml", "--method", "magic"), 2, "lora"),
    (("estimate", "job.yaml", "--dtype", "int3"), 2, "bfloat16"),
    (("estimate", "job.yaml", "--optimizer", "adamm"), 2, "adamw"),
    (("estimate", "job.yaml", "--attention", "flash"), 2, "flash_attention_2"),
    (("estimate", "job.yaml", "--margin", "lots"), 2, "margin"),
    (("estimate", "job.yaml", "--packing", "true"), 2, "unexpected extra argument"),
    (("estimate", "job.yaml", "--model", "no-such-model"), 2, "no-such-model"),
    (("estimate", "job.yaml", "--model", "no/such-model"), 2, "no/such-model"),
    (("estimate", "job.yaml", "--model", ""), 2, "empty"),
    (("estimate", "job.yaml", "--gpu", "RTX 9999"), 2, "RTX 9999"),
    (("estimate", "job.yaml", "--gpu", "7GB"), 2, "7GB"),
    (("estimate", "job.yaml", "--gpu", "0GiB"), 2, "0GiB"),
    (("estimate", "job.yaml", "--gpu", "2x24GB"), 2, "several GPUs"),
    (("estimate", "job.yaml", "--gpu", "live"), 3, "NVIDIA driver"),
    (("estimate", "job.yaml", "--set", "lora.target_modules=[c_atn]"), 2, "did you mean `c_attn`?"),
    (
        ("estimate", "job.yaml", "--set", "lora.target_modules=[zzz]"),
        2,
        "has `c_attn`, `c_proj`, `c_fc` and `lm_head`",
    ),
    (("estimate", "job.yaml", "--set", r"lora.target_modules=h\.[0-9]+\.attn"), 2, "which matches no layer"),
    (
        ("estimate", "job.yaml", "--set", r"lora.target_modules=.*\.mlp.*"),
        2,
        "also matches `transformer.h.0.mlp`, which is no linear layer",
    ),
    (("estimate", "job.yaml", "--set", "lora.target_modules=.*wte|.*c_attn"), 2, "adapters on embeddings"),
    (("estimate", "job.yaml", "--set", "lora.target_modules=[c_attn,wte]"), 2, "adapters on embeddings"),
    (
        ("fit", "job.yaml", "--gpu", "24GiB", "--set", "lora.target_modules=[c_atn]"),
        2,
        "did you mean `c_attn`?",
    ),
    (("preflight", "job.yaml", "--set", "lora.target_modules=[c_atn]"), 2, "did you mean `c_attn`?"),
    (("estimate", "job.yaml", "--set", "method=npt", "--set", "npt.layers=[12]"), 2, "has blocks 0 to 11"),
    (
        ("estimate", "job.yaml", "--set", "loss=chunked", "--set", "lora.target_modules=[lm_head]"),
        2,
        "output head",
    ),
    (
        ("estimate", "job.yaml", "--model", "bert-base-uncased", "--set", "loss=chunked"),
        2,
        "bias and a transform",
    ),
    (("estimate", "job.yaml", "--model", "bert-base-uncased", "--set", "packing=true"), 2, "is an encoder"),
    (("train", "job.yaml", "--model", "bert-base-uncased"), 2, "trains causal language models"),
    (("fit", "job.yaml"), 2, "`fit` needs a GPU"),
    (("fit", "job.yaml", "--gpu", "live"), 3, "NVIDIA driver"),
    (("fit", "job.yaml", "--gpu", "24GiB", "--maximize", "rank"), 2, "`--maximize` cannot be `rank`"),
    (("fit", "job.yaml", "--gpu", "24GiB", "--allow", "everything"), 2, "`--allow` cannot be `everything`"),
    (("fit", "job.yaml", "--gpu", "24GiB", "--format", "html"), 2, "`--format` cannot be `html`"),
    (("fit", "job.yaml", "--gpu", "24GiB", "--write", "job.yaml"), 2, "exists already"),
    (("fit", "job.yaml", "--gpu", "24GiB", "--write", "no/folder/new.yaml"), 2, "no/folder"),
    (("preflight", "job.yaml", "--gpu", "live"), 3, "NVIDIA driver"),
    (("preflight", "job.yaml", "--gpu", "live:1"), 3, "NVIDIA driver"),
    (("preflight", "job.yaml", "--wait", "soon"), 2, "`--wait` cannot be `soon`"),
    (("preflight", "job.yaml", "--format", "sarif"), 2, "`--format` cannot be `sarif`"),
    (("preflight", "nope.yaml"), 2, "nope.yaml"),
    (("train",), 2, "`model` is missing"),
    (("train", "nope.yaml"), 2, "nope.yaml"),
    (("train", "job.yaml"), 2, "names no training data"),
    (("train", "job.yaml", "--set", "data.train=missing.jsonl"), 2, "missing.jsonl"),
    (("env", "job.yaml", "--format", "csh"), 2, "`--format` cannot be `csh`"),
    (("env", "nope.yaml"), 2, "nope.yaml"),
    (("models", "--format", "csv"), 2, "`--format` cannot be `csv`"),
    (("gpus", "now"), 2, "unexpected extra argument"),
    (("jobs", "--format", "csv"), 2, "`--format` cannot be `csv`"),
    (("schema", "--of", "everything"), 2, "`--of` cannot be `everything`"),
]


@pytest.fixture(autouse=True)
def files(quiet_place):
    """A job that is in order, and several that are not."""
    (quiet_place / "job.yaml").write_text(A_JOB)
    (quiet_place / "empty.yaml").write_text("")
    (quiet_place / "broken.yaml").write_text("model: [gpt2\n")
    (quiet_place / "binary.yaml").write_bytes(b"\x80\x02\xff\x00")
    (quiet_place / "list.yaml").write_text("- model: gpt2\n")
    (quiet_place / "unknown-field.yaml").write_text("model: gpt2\nmicro_batchsize: 2\n")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same answers on a machine with a GPU."""

    def read(self):
        raise NoLiveGpu("This machine has no NVIDIA driver", hint="name a GPU")

    monkeypatch.setattr("memplan.gpu.nvml.NvmlProbe.read", read)


@pytest.mark.parametrize(
    ("arguments", "code", "phrase"),
    BAD_INPUT,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_answered_with_a_sentence(arguments, code, phrase):
    """Whatever is typed: nothing on stdout, `error:` with the culprit on stderr, the documented exit code."""
    outcome = run(*arguments)

    assert code == outcome.code
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.startswith("error: ")
    assert phrase in outcome.stderr
    assert ("--write" in arguments) == bool(outcome.stdout)


@pytest.mark.parametrize(("arguments", "code", "phrase"), BAD_INPUT)
def test_every_error_has_a_hint(arguments, code, phrase):
    """An error says what to do about it, after an empty line."""
    assert "\n\nhint: " in run(*arguments).stderr


def test_the_table_is_not_small():
    """At least forty ways to get it wrong."""
    assert len({arguments for arguments, _, _ in BAD_INPUT}) >= 40


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--version",), 0),
        (("--help",), 0),
        ((), 0),
        (("estimate", "--help"), 0),
        (("estimate", "-h"), 0),
        (("estimate", "job.yaml"), 0),
        (("estimate", *SMALL), 0),
        (("estimate", *SMALL, "--gpu", "24GiB"), 0),
        (("estimate", *SMALL, "--gpu", "null"), 0),
        (("estimate", *SMALL, "--gpu", "100MiB"), 1),
        (("estimate", *SMALL, "--gpu", "100MiB", "--format", "json"), 1),
        (("estimate", *SMALL, "--gpu", "100MiB", "--format", "github"), 1),
        (("estimate", *SMALL, "--gpu", "24GiB", "--strict"), 0),
        (("fit", *SMALL, "--gpu", "24GiB"), 0),
        (("fit", *SMALL, "--gpu", "100MiB"), 1),
        (("preflight", "job.yaml"), 0),
        (("preflight", "job.yaml", "--gpu", "24GiB"), 0),
        (("preflight", "job.yaml", "--gpu", "100MiB"), 1),
        (("env", "job.yaml"), 0),
        (("models",), 0),
        (("gpus",), 0),
        (("jobs",), 0),
        (("schema",), 0),
        (("schema", "--of", "result"), 0),
    ],
)
def test_an_answer_has_its_exit_code(arguments, code):
    """0 fits or not asked, 1 does not fit; the answer is on stdout and nothing is an error."""
    outcome = run(*arguments)

    assert code == outcome.code
    assert outcome.stdout.strip()
    assert "error:" not in outcome.stderr


def test_tight_fails_only_with_strict():
    """The error band crosses the capacity: a risk that CI may not want to take."""
    import json

    band = json.loads(run("estimate", *SMALL, "--format", "json").stdout)["error_band"]
    between = f"{(band['low_bytes'] + band['high_bytes']) // 2048}KiB"

    assert 0 == run("estimate", *SMALL, "--gpu", between).code
    assert 1 == run("estimate", *SMALL, "--gpu", between, "--strict").code
    assert 1 == run("preflight", *SMALL, "--gpu", between, "--strict").code


@pytest.mark.parametrize("engine", ["auto", "shape", "trace"])
def test_a_classifier_is_no_language_model(tmp_path, engine):
    """No engine plans it as one, and the remedy is one that works, not a package to install."""
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "bert", "architectures": ["BertForSequenceClassification"]}')
    outcome = run("estimate", "--model", str(file), "--engine", engine)

    assert 3 == outcome.code
    assert "is a BertForSequenceClassification, and jobs train language models" in outcome.stderr
    assert "MemplanCallback" in outcome.stderr and "pip install" not in outcome.stderr


def test_an_interrupt_is_no_error(monkeypatch):
    """Ctrl-C exits with 130 and no word."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("memplan.job.load.load_job", interrupted)
    outcome = run("estimate", "job.yaml")

    assert (130, "", "") == (outcome.code, outcome.stdout, outcome.stderr)


def test_a_fault_of_ours_is_admitted_without_a_traceback(monkeypatch):
    """Exit code 70, one sentence, and how to report it; the traceback only on request."""

    def broken(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("memplan.cli.planning.estimate_written", broken)
    outcome = run("estimate", "job.yaml")

    assert 70 == outcome.code
    assert "ZeroDivisionError: division by zero" in outcome.stderr
    assert "Traceback" not in outcome.stderr and "MEMPLAN_DEBUG=1" in outcome.stderr
    monkeypatch.setenv("MEMPLAN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("estimate", "job.yaml")


def test_an_error_keeps_its_own_exit_code(monkeypatch):
    """Rooms decide what their errors mean; the command line only passes it on."""

    class Odd(MemplanError):
        exit_code = 3

    def odd(*_, **__):
        raise Odd("nobody can tell")

    monkeypatch.setattr("memplan.job.load.load_job", odd)
    outcome = run("estimate", "job.yaml")

    assert (3, "error: nobody can tell\n") == (outcome.code, outcome.stderr)
