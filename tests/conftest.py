"""Shared set-up: what several rooms' tests import lies in this folder (`strategies.py`)."""

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

# Some virtual machines announce AMX and die of it: oneDNN's bfloat16 products end in an illegal instruction.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

# The models of the tests are too small for threads to help, also in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test reads or writes the runs that were measured on this machine.
os.environ["MEMPLAN_HOME"] = ""

# Machines that run the tests are shared and slow at times; a deadline would only make tests flaky.
settings.register_profile("memplan", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("memplan")
