"""Tracing imports torch, transformers and peft; without them its tests are left out."""

import pytest

for _name in ("torch", "transformers", "peft"):
    pytest.importorskip(_name)
