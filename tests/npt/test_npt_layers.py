"""Which blocks are converted, and that asking so needs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from memplan.errors import JobError
from memplan.npt.layers import layer_indices


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ("all", 3, (0, 1, 2)),
        ("upper_half", 4, (2, 3)),
        ("upper_half", 5, (2, 3, 4)),
        ("lower_half", 5, (0, 1)),
        ("upper_half", 1, (0,)),
        ([3, 1], 4, (1, 3)),
        ((0,), 1, (0,)),
    ],
)
def test_words_and_lists_name_blocks_in_order(layers, num_layers, expected):
    """Halves do not overlap, the middle block of an odd number is in the upper one, lists are sorted."""
    assert expected == layer_indices(layers, num_layers)


@pytest.mark.parametrize(
    ("layers", "num_layers", "said"),
    [
        ("upper", 4, "'upper'"),
        ([4], 4, "block 4"),
        ([-1], 4, "block -1"),
        ([1, 2, 1], 4, "block 1 more than once"),
        ([], 4, "none of the model's 4 blocks"),
        ("lower_half", 1, "none of the model's 1 blocks"),
    ],
)
def test_bad_choices_are_job_errors_with_a_remedy(layers, num_layers, said):
    """Unknown words, indices out of range, repetitions and empty choices are named in the message."""
    with pytest.raises(JobError) as caught:
        layer_indices(layers, num_layers)
    assert said in caught.value.message
    assert caught.value.hint


def test_the_package_imports_no_torch():
    """The planner asks for layer indices in milliseconds: no torch until something that needs it is named."""
    code = "import sys, memplan.npt; memplan.npt.layer_indices('all', 2); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "False" == done.stdout.strip()


@pytest.mark.torch
def test_every_export_exists():
    """The lazy names of the package lead to real objects, and others are attribute errors."""
    import memplan.npt

    assert all(getattr(memplan.npt, name) is not None for name in memplan.npt.__all__)
    with pytest.raises(AttributeError, match="no attribute `nothing`"):
        memplan.npt.nothing  # noqa: B018
