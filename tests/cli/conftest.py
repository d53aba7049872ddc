"""A quiet place to run commands in: an empty folder, no network, no variables that change an answer."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "render"))


@pytest.fixture(autouse=True)
def quiet_place(tmp_path, monkeypatch):
    """The working directory of a test is its own; width, colour, hub and allocator variables are fixed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in (
        "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
        "PYTORCH_NO_CUDA_MEMORY_CACHING",
        "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "MEMPLAN_DEBUG",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    return tmp_path
