"""The divergence of predictions, in chunks, beside torch's own; and the curriculum of streams."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from npt_models import LiveStorages  # noqa: E402

from memplan.job.spec import Npt  # noqa: E402
from memplan.npt.curriculum import stream_at  # noqa: E402
from memplan.npt.divergence import CHUNK_TOKENS, logits_divergence  # noqa: E402

pytestmark = pytest.mark.torch

F = torch.nn.functional


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_and_gradient_are_those_of_kl_div(padded, temperature):
    """float64, more tokens than a chunk has; padding does not count."""
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 9, bias=False).double()
    hidden, target = torch.randn(2, 2, CHUNK_TOKENS - 50, 6, dtype=torch.float64)
    hidden.requires_grad_()
    padding = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    padding[1, 40:] = padded
    counted = ~padding
    found = logits_divergence(
        hidden,
        target,
        head,
        temperature=temperature,
        padding=padding if padded else None,
        num_tokens=counted.sum() if padded else counted.numel(),
    )
    (2.0 * found).backward()
    actual, hidden.grad = hidden.grad, None

    scores, expected_scores = (head(states[counted]) / temperature for states in (hidden, target))
    divergence = F.kl_div(
        scores.log_softmax(-1), expected_scores.log_softmax(-1), log_target=True, reduction="sum"
    )
    expected = temperature**2 * divergence / counted.sum()
    (2.0 * expected).backward()
    assert expected > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(actual, hidden.grad, rtol=1e-9, atol=1e-12)


def test_logits_of_all_tokens_are_never_there():
    """At most four tensors of a chunk's logits at once, forward and backward."""
    head = torch.nn.Linear(8, 500, bias=False)
    hidden, target = torch.randn(2, 1, 4 * CHUNK_TOKENS, 8)
    hidden.requires_grad_()
    with LiveStorages([hidden, target, head.weight]) as live:
        logits_divergence(hidden, target, head, temperature=1.0, num_tokens=hidden.shape[1]).backward()
    chunk = CHUNK_TOKENS * 500 * 4
    assert live.largest_bytes == chunk
    assert live.peak_bytes < 4.5 * chunk


def test_equal_predictions_are_no_loss():
    """Zero at equality, with a gradient of zero."""
    head = torch.nn.Linear(8, 20, bias=False)
    hidden = torch.randn(1, 10, 8, requires_grad=True)
    loss = logits_divergence(hidden, hidden.detach(), head, temperature=2.0, num_tokens=10)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert hidden.grad.abs().max() < 1e-6


def test_a_curriculum_goes_from_teacher_to_student():
    """
    Half of its steps are the teacher's, ever fewer; steps 1 and 2 are, so that a plan of the teacher's stream is one of
    the run: optimizer states are there from step 2 on.
    """
    for length in (2, 3, 10, 101):
        npt = Npt(stream="curriculum", curriculum_steps=length)
        streams = [stream_at(npt, step, 1000) for step in range(1, 2 * length + 1)]
        counted = [stream == "teacher" for stream in streams]
        assert counted[:2] == [True, True]
        assert not any(counted[length:])
        assert abs(sum(counted) - (length + 1) / 2) < 1
        assert sum(counted[: length // 2]) >= sum(counted[length // 2 : length])
    assert [stream_at(Npt(stream="student"), step, 10) for step in (1, 9)] == ["student", "student"]
    default = [stream_at(Npt(stream="curriculum"), step, 20) for step in (1, 11, 20)]
    assert default == ["teacher", "student", "student"]
