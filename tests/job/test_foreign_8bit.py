"""8-bit bases in files of other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foreign_files import AXOLOTL_LORA, FACTORY, TRL, read, values

_PEFT = {"use_peft": True, "lora_target_modules": "all-linear"}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (AXOLOTL_LORA | {"load_in_8bit": True}, ("bfloat16", "float32", True)),
        (
            AXOLOTL_LORA
            | {"load_in_8bit": True, "bf16": False}
            | {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
            ("float16", "float32", False),
        ),
        (FACTORY | {"quantization_bit": 8}, ("bfloat16", "float32", True)),
        (FACTORY | {"quantization_bit": 8, "use_reentrant_gc": False}, ("bfloat16", "float32", False)),
        (TRL | _PEFT | {"load_in_8bit": True}, ("float32", "bfloat16", False)),
        (
            TRL | _PEFT | {"load_in_8bit": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            ("float32", "bfloat16", True),
        ),
    ],
)
def test_8_bit_bases(content: dict[str, Any], expected: tuple[str, str, bool]):
    """Each tool's way of asking for one, its dtypes, and how it checkpoints blocks, which matters there."""
    fields = ("method", "quantization.type", "dtype", "lora.dtype", "use_reentrant")
    assert ["qlora", "int8", *expected] == values({**content, "gradient_checkpointing": True}, *fields)
    assert not any("lora_mlp_kernel" in note for note in read(content).notes)
