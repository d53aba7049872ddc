"""The attention kernel that a job names is the one that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from memplan.train.kernels import attention_kernel  # noqa: E402
from memplan.train.worker import run_job  # noqa: E402
from train.tiny_runs import prepared, tiny_job, tokenizer_folder  # noqa: E402

pytestmark = pytest.mark.torch

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Seen(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kernel", "is_fused"), [("auto", True), ("flash", True), ("math", False)])
def test_training_runs_the_kernel_of_the_job(tmp_path: Path, kernel: str, is_fused: bool) -> None:
    tokenizer_folder(tmp_path)
    folder = prepared(tiny_job(tmp_path, attention_kernel=kernel, train__max_steps=1))
    with Seen() as seen:
        assert run_job(folder) == 0
    assert (FUSED in seen.names) == is_fused


def test_what_the_kernel_does_not_take_is_an_error_and_then_the_choice_is_torchs_again() -> None:
    query = torch.ones(1, 2, 8, 16)
    with pytest.raises(RuntimeError, match=r"[Nn]o (viable|available)"), attention_kernel("cudnn"):
        F.scaled_dot_product_attention(query, query, query)
    with Seen() as seen:
        F.scaled_dot_product_attention(query, query, query)
    assert FUSED in seen.names
