"""As a shell sees it: what is imported, pipes, terminals, encodings, and lines that are evaluated."""

import json
import os
import subprocess
import sys

import pytest
from commands import process_environ, run, run_process

JOB = "lora-gpt2"
HEAVY = {
    "torch",
    "numpy",
    "transformers",
    "pydantic",
    "pydantic_core",
    "rich",
    "peft",
    "huggingface_hub",
}
REPORT_IMPORTS = """
import sys
code = 0
{statements}
print("modules:", *sys.modules, file=sys.stderr)
sys.exit(code)
"""


def modules_loaded_by(statements):
    """Names of all modules that a fresh interpreter holds after the statements, with stdout piped."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT_IMPORTS.format(statements=statements)],
        capture_output=True, text=True, env=process_environ(), timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rpartition("modules:")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["estimate", JOB],
        ["estimate", JOB, "--gpu", "24GB", "--format", "json"],
        ["estimate", JOB, "--format", "markdown"],
        ["fit", JOB, "--gpu", "24GB"],
        ["preflight", JOB, "--gpu", "24GB"],
        ["diff", JOB, JOB],
        ["env", JOB],
        ["jobs"],
        ["--version"],
        ["--help"],
        ["estimate", "--help"],
    ],
    ids=" ".join,
)
def test_planning_imports_nothing_heavy(arguments):
    """`memplan estimate` works at once and on a laptop without torch: nothing heavy is even looked at."""
    loaded = modules_loaded_by(f"from memplan.cli import main\ncode = main({arguments!r})")

    assert "memplan.cli.app" in loaded
    assert set() == HEAVY & loaded


def test_an_estimate_imports_no_more_than_it_uses():
    """It reads no GPU, no recording and no list of installed packages; each would cost a part of its 0.3 s."""
    arguments = ["estimate", JOB, "--gpu", "24GB"]
    loaded = modules_loaded_by(f"from memplan.cli import main\ncode = main({arguments!r})")
    rooms = {"memplan.gpu.probe", "memplan.gpu.nvml", "memplan.snapshot.read", "memplan.tracing.writer"}

    assert set() == loaded & (rooms | {"importlib.metadata", "pygments", "asyncio", "email", "unittest"})
    assert {"memplan.gpu", "memplan.snapshot"} <= loaded


def test_counting_truncated_samples_imports_nothing_heavy(tmp_path):
    """With the data at hand, a shorter sequence says how many samples it cuts, still without torch."""
    rows = ['{"text": "short"}', '{"text": "' + "x" * 1000 + '"}']
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    asked = [
        "--model",
        "gpt2",
        "--weights",
        "random",
        "--max-seq-len",
        "1024",
        "--set",
        "data.train=data.jsonl",
    ]
    need_bytes = json.loads(run("estimate", *asked, "--format", "json").stdout)["need_bytes"]
    arguments = ["fit", *asked, "--gpu", f"{need_bytes * 85 // 100 // 1024}KiB"]
    loaded = modules_loaded_by(f"from memplan.cli import main\ncode = main({arguments!r})")

    assert "truncates 1 of 2 samples" in run(*arguments).stdout
    assert set() == HEAVY & loaded


@pytest.mark.parametrize("module", ["pydantic", "rich", "sqlite3"])
def test_the_probe_can_see_an_import(module):
    """Meta-test: a probe that sees nothing would make the test above pass for ever."""
    assert module in modules_loaded_by(f"import {module}")


def test_an_estimate_runs_in_a_fresh_process():
    """The module can be run, and its answer is the same as in this process."""
    outcome = run_process("estimate", JOB)

    assert (0, "") == (outcome.code, outcome.stderr)
    assert run("estimate", JOB).stdout == outcome.stdout
    assert outcome.stdout.startswith("needs ")


def test_a_reader_that_leaves_is_no_error():
    """`memplan models | head -1` ends quietly, whenever head goes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "memplan", "models"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=process_environ(),
    )  # fmt: skip
    process.stdout.close()
    stderr = process.stderr.read()

    assert b"" == stderr
    assert 0 == process.wait(timeout=600)


def test_an_ascii_console_gets_ascii():
    """No block characters, no crash, the same numbers."""
    outcome = run_process("estimate", JOB, "--gpu", "24GB", PYTHONIOENCODING="ascii")

    assert (0, "") == (outcome.code, outcome.stderr)
    assert outcome.stdout.isascii() and "#" in outcome.stdout


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colour_and_the_same_text(no_color, coloured):
    """Colour only adds escape sequences; NO_COLOR takes them away."""
    import re

    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "memplan", "estimate", JOB, "--gpu", "24GB"],
        stdout=theirs, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        env=process_environ(NO_COLOR=no_color, TERM="xterm-256color", COLUMNS="100"),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    text = shown.decode().replace("\r\n", "\n")

    assert b"" == process.stderr.read() and 0 == process.wait(timeout=600)
    assert coloured == ("\x1b[" in text)
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    assert run("estimate", JOB, "--gpu", "24GB").stdout.splitlines() == lines


def test_env_can_be_evaluated():
    """`eval "$(memplan env JOB)"` sets what the table says for this torch."""
    command = f'eval "$({sys.executable} -m memplan env {JOB})" && env'
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=process_environ(), timeout=600, check=False
    )

    [line] = [line for line in done.stdout.splitlines() if "ALLOC_CONF" in line][:1]
    assert line.endswith("=expandable_segments:True")


def test_env_keeps_what_is_set():
    """Nothing is printed to evaluate, and the remark is on stderr."""
    outcome = run_process("env", JOB, PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync")

    assert (0, "") == (outcome.code, outcome.stdout)
    assert "is already set and kept" in outcome.stderr


def test_github_files_are_written(tmp_path):
    """In a workflow the summary and the outputs appear beside the annotations."""
    summary, output = tmp_path / "summary", tmp_path / "output"
    outcome = run_process(
        "estimate", JOB, "--gpu", "24GB", "--format", "github",
        GITHUB_STEP_SUMMARY=str(summary), GITHUB_OUTPUT=str(output),
    )  # fmt: skip

    assert outcome.stdout.startswith("::notice ")
    assert "verdict=fits" in output.read_text() and "### memplan estimate" in summary.read_text()


def test_the_answer_does_not_depend_on_the_machine():
    """An estimate is a function of the job: the environment changes nothing in it."""
    plain = json.loads(run("estimate", JOB, "--format", "json").stdout)
    other = json.loads(
        run_process(
            "estimate", JOB, "--format", "json", PYTORCH_ALLOC_CONF="backend:native", COLUMNS="40"
        ).stdout
    )

    assert plain == other
