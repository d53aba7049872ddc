"""The longest sequence and the largest micro batch that fit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_estimator import ENOUGH, JOB, QWEN_7B, ToyEstimator, card

from memplan.errors import JobError
from memplan.fit.frontier import LARGEST_MICRO_BATCH, maximize
from memplan.units import GiB

STEPS = {"max_seq_len": 64, "micro_batch_size": 1}


class Steps(ToyEstimator):
    """Need by the value of one field, the lower bound a little below; both rise."""

    def __init__(self, field, needs, bounds):
        super().__init__()
        self.field = field
        self.needs = needs
        self.bounds = bounds

    def _at(self, table, job):
        count = getattr(job, self.field) // STEPS[self.field]
        return table[min(count, len(table)) - 1]

    def lower_bound_bytes(self, job):
        return self._at(self.bounds, job)

    def need_bytes(self, job):
        self.num_exact += 1
        return self._at(self.needs, job)


@pytest.mark.parametrize("field", STEPS)
@pytest.mark.parametrize("usable_gib", [23, 24, 26, 32, 48])
def test_frontier_fits_and_the_next_step_does_not(field, usable_gib):
    """The value is a multiple of the step, needs what it says, and one step more needs too much."""
    limit = usable_gib * GiB

    frontier = maximize(JOB, QWEN_7B, card(limit), field, evaluate=ToyEstimator())

    assert frontier.value is not None
    assert 0 == frontier.value % STEPS[field]
    assert frontier.need_bytes == ToyEstimator().need_bytes(JOB.replace(**{field: frontier.value}))
    assert limit == frontier.need_bytes + frontier.headroom_bytes
    assert frontier.need_bytes <= limit
    beyond = JOB.replace(**{field: frontier.value + STEPS[field]})
    assert ToyEstimator().need_bytes(beyond) > limit
    assert "capacity" == frontier.limit


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_frontier_is_the_last_that_fits_of_any_rising_need(data):
    """Bisection finds what a walk over all values finds, wherever the bound and the need are."""
    field = data.draw(st.sampled_from(sorted(STEPS)))
    bounds = sorted(data.draw(st.lists(st.integers(0, 100), min_size=1, max_size=512)))
    needs, gap = [], 0
    for bound in bounds:
        gap = max(gap, bound) + data.draw(st.integers(0, 3))
        needs.append(gap)
    limit = data.draw(st.integers(-1, 110))
    evaluate = Steps(field, needs, bounds)
    most = 512 if field == "max_seq_len" else LARGEST_MICRO_BATCH
    values = [count for count in range(1, most + 1) if needs[min(count, len(needs)) - 1] <= limit]

    frontier = maximize(JOB, QWEN_7B, card(limit), field, evaluate=evaluate)

    assert (values[-1] * STEPS[field] if values else None) == frontier.value
    assert (frontier.value == most * STEPS[field]) == (frontier.limit != "capacity")
    assert evaluate.num_exact <= 26


def test_longest_sequence_stops_at_the_positions_of_the_model():
    """With room to spare the model is the limit, and is named as such."""
    frontier = maximize(JOB, QWEN_7B, card(ENOUGH), "max_seq_len", evaluate=ToyEstimator())

    assert (32768, "max_position_embeddings") == (frontier.value, frontier.limit)


def test_nothing_fits():
    """Without a value, the need is that of the smallest, and the headroom is what is missing."""
    frontier = maximize(JOB, QWEN_7B, card(GiB), "micro_batch_size", evaluate=ToyEstimator())

    assert frontier.value is None
    assert frontier.need_bytes == ToyEstimator().need_bytes(JOB.replace(micro_batch_size=1))
    assert GiB == frontier.need_bytes + frontier.headroom_bytes


def test_the_bound_spares_exact_evaluations():
    """Where the lower bound is within a hundredth, a handful of exact needs decide among 512 lengths."""
    evaluate = ToyEstimator()

    maximize(JOB, QWEN_7B, card(40 * GiB), "max_seq_len", evaluate=evaluate)

    assert evaluate.num_exact <= 8


def test_other_fields_are_refused():
    """The message names the field, the hint those that can be maximised."""
    with pytest.raises(JobError, match=r"lora\.rank") as caught:
        maximize(JOB, QWEN_7B, card(GiB), "lora.rank", evaluate=ToyEstimator())

    assert "max_seq_len" in str(caught.value.hint)


def test_unknown_stays_unknown():
    """A job that cannot be estimated has no frontier."""
    evaluate = ToyEstimator(unsupported={"loss": "full"})

    with pytest.raises(JobError, match="no formula"):
        maximize(JOB, QWEN_7B, card(GiB), "max_seq_len", evaluate=evaluate)
