"""The JSON schema says what the reader does."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given

from memplan.errors import JobError
from memplan.job.fields import job_fields
from memplan.job.load import load_job
from memplan.job.ready import FOLDER
from memplan.job.schema import job_schema
from memplan.job.spec import Job
from memplan.job.write import dump_job
from strategies import jobs

jsonschema = pytest.importorskip("jsonschema")
VALIDATOR = jsonschema.Draft202012Validator(job_schema())


def leaf(schema: dict[str, Any], name: str) -> dict[str, Any]:
    for part in name.split("."):
        schema = schema["properties"][part]
    return schema


def test_the_schema_is_one():
    """It is valid by its own meta-schema, and plain JSON."""
    jsonschema.Draft202012Validator.check_schema(job_schema())

    assert job_schema() == json.loads(json.dumps(job_schema()))


def test_every_field_is_described():
    """Every leaf has its sentence and its default; only the model is required."""
    for name, field in job_fields().items():
        schema = leaf(job_schema(), name)
        assert field.doc == schema["description"]
        assert name == "model" or "default" in schema
    assert job_schema()["required"] == ["model"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_jobs_are_valid(path: Path):
    """Editors that know the schema accept the jobs we ship."""
    VALIDATOR.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@given(jobs())
def test_any_job_in_order_is_valid(job: Job):
    """What the writer writes is valid."""
    VALIDATOR.validate(yaml.safe_load(dump_job(job)))


@pytest.mark.parametrize(
    "line",
    [
        "micro_batch_size: 0",
        "micro_batch_size: 1.5",
        "method: dora",
        "autocast: float32",
        "packing: 1",
        "rank: 8",
        "lora: {rnak: 8}",
        "lora: {alpha: 0}",
        "lora: {dropout: 1}",
        "lora: {target_modules: []}",
        "lora: {target_modules: [q_proj, q_proj]}",
        "npt: {layers: middle}",
        "npt: {layers: [-1]}",
        "allocator: {max_split_size_mb: 19}",
        "allocator: {garbage_collection_threshold: 0}",
        "gpu: ''",
        "model: null",
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(line: str, tmp_path: Path):
    """A wrong line is wrong to both."""
    text = f"{line}\n" if line.startswith("model") else f"model: gpt2\n{line}\n"
    (tmp_path / "job.yaml").write_text(text)

    assert not VALIDATOR.is_valid(yaml.safe_load(text))
    with pytest.raises(JobError):
        load_job(tmp_path / "job.yaml")
