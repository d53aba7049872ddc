"""Writing jobs: what is written reads back, also by others, and nothing is overwritten by accident."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given

from memplan.errors import JobError
from memplan.job.fields import field_value, job_fields
from memplan.job.load import load_job
from memplan.job.spec import Job
from memplan.job.write import dump_job, write_job
from strategies import jobs


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An empty folder for all examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("write"))
        yield


@given(jobs())
def test_job_survives_a_round_trip(job: Job):
    """What the YAML writer writes, the reader reads back."""
    Path("round.yaml").write_text(dump_job(job), encoding="utf-8")

    assert job == load_job("./round.yaml").job


@given(jobs())
def test_job_survives_a_round_trip_in_json(job: Job):
    """A path that says `.json` gets JSON."""
    write_job("round.json", job, overwrite=True)

    assert job == load_job("./round.json").job


@given(jobs())
def test_other_yaml_readers_agree(job: Job):
    """PyYAML, which knows nothing of our fields, reads the same values with the same types."""
    tree = yaml.safe_load(dump_job(job))

    for name, field in job_fields().items():
        section, _, last = name.rpartition(".")
        value = (tree.get(section, {}) if section else tree).get(last, field.default)
        assert field_value(job, name) == (tuple(value) if isinstance(value, list) else value)


def test_only_what_matters_is_written():
    """The basics, then what differs from the defaults, in the order of the spec."""
    job = Job(model="gpt2", dtype="float32", gpu="RTX 4090").replace(
        **{"lora.rank": 8, "train.learning_rate": 1e-5, "allocator.expandable_segments": False}
    )

    assert dump_job(job).splitlines() == [
        "model: gpt2",
        "method: lora",
        "dtype: float32",
        "micro_batch_size: 1",
        "gradient_accumulation_steps: 1",
        "max_seq_len: 2048",
        "lora: {rank: 8}",
        "train: {learning_rate: 1.0e-05}",
        'gpu: "RTX 4090"',
        "allocator: {expandable_segments: false}",
    ]


def test_long_sections_are_written_in_block_style():
    """A line stays readable."""
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    job = Job(model="gpt2").replace(**{"lora.rank": 128, "lora.alpha": 256.0, "lora.target_modules": modules})

    assert dump_job(job).splitlines()[-4:] == [
        "lora:",
        "  rank: 128",
        "  alpha: 256",
        "  target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]",
    ]


def test_patterns_are_quoted(tmp_path):
    """So that no reader of YAML takes their marks for its own."""
    pattern = r"*.\d: [q]|{v}_proj #"
    job = Job(model="gpt2").replace(**{"lora.target_modules": pattern})
    write_job(tmp_path / "job.yaml", job)

    assert pattern == yaml.safe_load(dump_job(job))["lora"]["target_modules"]


def test_origins_decide_what_is_worth_writing():
    """What was said is written even where it equals the default; a tool's silent defaults are marked."""
    job = Job(model="gpt2", max_seq_len=512).replace(**{"lora.alpha": 16.0})
    origins = dict.fromkeys(job_fields(), "memplan default") | {
        "packing": "user",
        "max_seq_len": "tool default",
        "lora.rank": "alias",
        "lora.alpha": "tool default",
    }

    assert dump_job(job, origins=origins).splitlines()[4:] == [
        "max_seq_len: 512  # tool default",
        "packing: false",
        "lora:",
        "  rank: 16",
        "  alpha: 16  # tool default",
    ]


TRICKY = (
    "null", "yes", "True", "1e5", "24", "0x10", "~", "-", "#1", "a:b", "[a]", "{a}", "!a", "&a", "*a", "@a",
    "%a", ".inf", "2024-01-01", "1:30", "\U0001f600", "- x", "a: b", " x ", "a\nb", "a\u2028b", "a\x00b",
    "'", '"', "a #b",
)  # fmt: skip


@pytest.mark.parametrize("text", TRICKY)
def test_words_that_yaml_would_misread_are_quoted(text: str):
    """Text stays the same text for every reader."""
    job = Job(model=text)
    Path("words.yaml").write_text(dump_job(job), encoding="utf-8")

    assert text == yaml.safe_load(dump_job(job))["model"]
    assert text == load_job("words.yaml").job.model


def test_a_file_is_never_overwritten_unasked():
    """The second write is refused and leaves the first alone."""
    write_job("once.yaml", Job(model="gpt2"))

    with pytest.raises(JobError, match="exists already") as caught:
        write_job("once.yaml", Job(model="other"))

    assert "another name" in (caught.value.hint or "")
    assert load_job("once.yaml").job.model == "gpt2"

    write_job("once.yaml", Job(model="other"), overwrite=True)

    assert load_job("once.yaml").job.model == "other"


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file is there whole or not at all."""

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)

    with pytest.raises(JobError, match="No space left on device"):
        write_job(tmp_path / "job.yaml", Job(model="gpt2"))

    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_explained(tmp_path: Path):
    """The error names the folder."""
    with pytest.raises(JobError) as caught:
        write_job(tmp_path / "no" / "job.yaml", Job(model="gpt2"))

    assert str(tmp_path / "no") in (caught.value.hint or "")


def test_toml_is_read_but_not_written():
    """Asking for TOML is refused with the formats there are."""
    with pytest.raises(JobError) as caught:
        write_job("job.toml", Job(model="gpt2"))

    assert caught.value.hint == "write `.yaml` or `.json`"
    assert not Path("job.toml").exists()


def test_data_paths_move_with_the_job(tmp_path: Path):
    """A job written to another folder still finds its data; built-in names and absolute paths stay."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    job = Job(model="gpt2").replace(**{"data.train": "x/train.jsonl", "data.eval": "memplan-docs"})

    write_job(tmp_path / "b" / "job.yaml", job, base_dir=tmp_path / "a")
    moved = load_job(tmp_path / "b" / "job.yaml")

    assert moved.job.data.train == "../a/x/train.jsonl"
    assert moved.job.data.eval == "memplan-docs"
    assert (tmp_path / "a" / "x" / "train.jsonl") == moved.resolve_path("../a/x/train.jsonl").resolve()

    write_job(tmp_path / "a" / "job.yaml", job, base_dir=tmp_path / "a")

    assert load_job(tmp_path / "a" / "job.yaml").job.data.train == "x/train.jsonl"


def test_every_field_can_be_written():
    """The writer reaches every leaf of the spec."""
    text = dump_job(Job(model="gpt2"), origins=dict.fromkeys(job_fields(), "user"))
    tree = yaml.safe_load(text)
    written = {
        f"{name}.{inner}" if isinstance(value, dict) else name
        for name, value in tree.items()
        for inner in (value if isinstance(value, dict) else [""])
    }

    assert set(job_fields()) == written
    assert {field.name for field in dataclasses.fields(Job)} == set(tree)
