"""A process that only traces does without torch's compiler, and can still have it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from memplan.tracing.compiler import without_compiler

with without_compiler():
    import torch
    from torch.utils.checkpoint import checkpoint

    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    checkpoint(layer, torch.ones(1, 2), use_reentrant=False).sum().backward()
    optimizer.step()
    print("torch._dynamo.eval_frame" in sys.modules, "sympy" in sys.modules)
    if "ask" in sys.argv:
        print(torch._dynamo.is_compiling(), "torch._dynamo.eval_frame" in sys.modules)
    real = sys.modules["torch._dynamo"]
import torch._dynamo
print(hasattr(torch._dynamo, "optimize"), torch._dynamo is real)
"""


def run(*arguments: str) -> list[str]:
    """What the script prints, in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_checkpoints_and_optimizers_do_without_it():
    """Afterwards an import brings the real one."""
    assert ["False", "False", "True", "False"] == run()


def test_the_real_one_comes_when_more_is_asked_of_it():
    """And stays."""
    assert ["False", "False", "False", "True", "True", "True"] == run("ask")
