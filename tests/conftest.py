"""Shared set-up: what several rooms' tests import lies in this folder (`strategies.py`)."""

import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

# Some virtual machines announce AMX and die of it: oneDNN's bfloat16 products end in an illegal instruction.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

# The models of the tests are too small for threads to help, also in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# No test reads or writes the runs that were measured on this machine.
os.environ["MEMPLAN_HOME"] = ""

# No test asks a hub for anything, nor waits for one that does not answer.
os.environ["HF_HUB_OFFLINE"] = "1"

# Settings of whoever runs the tests that would change what they see.
for _name in (
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS",
    "CUDA_VISIBLE_DEVICES", "MEMPLAN_DEBUG", "FORCE_COLOR", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY",
):  # fmt: skip
    os.environ.pop(_name, None)

# Machines that run the tests are shared and slow at times; a deadline would only make tests flaky. Where a change is
# judged by them the examples are the same every time; elsewhere each run looks at new ones.
settings.register_profile(
    "memplan",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
    database=None if "CI" in os.environ else settings().database,
)
settings.load_profile("memplan")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws does not depend on the tests that this process ran before."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
