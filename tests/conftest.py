"""Shared set-up: what several rooms' tests import lies in this folder (`strategies.py`)."""

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

# Machines that run the tests are shared and slow at times; a deadline would only make tests flaky.
settings.register_profile("memplan", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("memplan")
