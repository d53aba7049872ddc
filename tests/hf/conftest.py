"""The Trainer is transformers'; without it its tests are left out."""

from types import SimpleNamespace

import pytest

for _name in ("torch", "transformers", "peft"):
    pytest.importorskip(_name)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it trains a Trainer has all of the process's garbage collected, which takes longer than a tiny run."""
    monkeypatch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))
