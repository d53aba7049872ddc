"""Whatever is in a job file, the reader either reads it or explains it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.errors import JobError
from memplan.job.aliases import ALIASES
from memplan.job.fields import job_fields, job_sections
from memplan.job.load import load_job

KEYS = st.sampled_from(
    [*job_fields(), *job_sections(), *ALIASES, *(name.split(".")[-1] for name in job_fields())]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(("true", "none", "all", "auto", "bf16", "qlora", "1e-4", "adamw_torch", "FULL_SHARD"))
)  # fmt: skip
TREES = st.dictionaries(
    KEYS | st.text(max_size=8),
    st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=5,
)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty folder for all examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        yield


def read(name: str, content: bytes) -> None:
    """Load a job; only a JobError with a remedy may come out of it."""
    Path(name).write_bytes(content)
    try:
        load_job(name)
    except JobError as error:
        assert error.message
        assert error.hint


@given(st.binary(max_size=60), st.sampled_from(("job.yaml", "job.json", "job.toml")))
def test_any_bytes_are_read_or_explained(content: bytes, name: str):
    """No content of a file ends in another exception."""
    read(name, content)


@given(st.text(alphabet="model: gpt2\n-[]{}*&#'\"|>!%@\t,?0123", max_size=60))
def test_any_yaml_syntax_is_read_or_explained(text: str):
    """No corner of YAML's grammar ends in another exception."""
    read("job.yaml", text.encode())


@given(TREES)
def test_any_tree_is_read_or_explained(tree: dict[str, Any]):
    """No value of any field or alias ends in another exception, in JSON or in YAML."""
    content = json.dumps(tree).encode()
    read("job.json", content)
    read("job.yaml", content)


@given(st.text(max_size=20), SCALARS)
def test_any_override_is_read_or_explained(override: str, value: Any):
    """No `--set` ends in another exception."""
    for text in (override, f"lora.rank={override}", f"train.seed={value}", f"{override}={value}"):
        try:
            load_job(None, [text], flags={"model": "gpt2"})
        except JobError as error:
            assert error.hint
