"""The search against brute force over random small lattices and evaluators, monotone and not."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import JobError
from memplan.fit.lattice import AS_IS, Dimension, Edit
from memplan.fit.search import search_lattice
from memplan.job.spec import Job

FIELDS = (
    "micro_batch_size",
    "max_seq_len",
    "lora.rank",
    "train.max_steps",
    "train.save_every",
)
JOB = Job(model="any").replace(**dict.fromkeys(FIELDS, 1))
LIMIT = 1000


class Table:
    """Needs and lower bounds by option, read back from the job; some combinations are unsupported."""

    def __init__(self, needs, bounds):
        self.needs = needs
        self.bounds = bounds

    def state(self, job):
        values = [functools.reduce(getattr, field.split("."), job) - 1 for field in FIELDS]
        return tuple(values[: len(next(iter(self.needs)))])

    def need_bytes(self, job):
        return self._known(self.needs[self.state(job)])

    def lower_bound_bytes(self, job):
        return self._known(self.bounds[self.state(job)])

    def _known(self, value):
        if value is None:
            raise JobError("no formula")
        return value


def random_lattice(rng, *, stated):
    """Dimensions over FIELDS; with `stated`, most options are said to need no more than an earlier one."""
    dimensions = []
    for field in FIELDS[: rng.randint(1, len(FIELDS))]:
        edits = []
        for index in range(1, rng.randint(1, 3) + 1):
            tier = rng.randint(0, 4)
            edits.append(
                Edit(
                    name=f"{field} {index}",
                    set={field: index + 1},
                    summary=f"{field} to {index + 1}",
                    tier=tier,
                    slowdown=rng.choice((1.0, 1.0, 1.02, 1.05, 1.1, 4 / 3)),
                    num_changes=rng.choice((1, 1, 1, 2)),
                    given_up=rng.choice((0.25, 0.5)) if tier >= 3 else 0.0,
                )
            )
        above = [()] + [
            tuple(other for other in range(index) if stated and rng.random() < 0.6)
            for index in range(1, len(edits) + 1)
        ]
        dimensions.append(Dimension(field, (AS_IS, *edits), tuple(above)))
    return dimensions


def random_needs(rng, dimensions, *, unsupported):
    """
    A lower bound that is the largest of three moments, each a sum over dimensions that obeys what is stated;
    a need that lies above it by any amount.
    """
    moments = []
    for _ in range(3):
        moment = []
        for dimension in dimensions:
            share = []
            for above in dimension.no_more_than:
                share.append(rng.randint(0, min((share[other] for other in above), default=400)))
            moment.append(share)
        moments.append(moment)
    unknown = {
        (position, index)
        for position, dimension in enumerate(dimensions)
        for index in range(1, len(dimension.options))
        if rng.random() < unsupported
    }
    slack = rng.choice((0, 20, 200))
    needs, bounds = {}, {}
    for state in itertools.product(*(range(len(dimension.options)) for dimension in dimensions)):
        live = max(sum(share[index] for share, index in zip(moment, state)) for moment in moments)
        is_unknown = bool(unknown & set(enumerate(state)))
        is_unsupported = is_unknown or (sum(map(bool, state)) > 1 and rng.random() < unsupported)
        bounds[state] = None if is_unknown or (is_unsupported and rng.random() < 0.5) else live
        needs[state] = None if is_unsupported else live + rng.randint(0, slack)
    return needs, bounds


def key(dimensions, state):
    """The order of the design, written down a second time."""
    edits = [dimension.options[index] for dimension, index in zip(dimensions, state) if index]
    slowdown, kept = 1.0, 1.0
    for edit in edits:
        slowdown *= edit.slowdown
        kept *= 1 - edit.given_up
    return (
        max(edit.tier for edit in edits),
        sum(edit.num_changes for edit in edits),
        round(slowdown, 6),
        round(1 - kept, 6),
    )


def brute_force(dimensions, needs, bounds, limit, num_results):
    """Every state that fits, in order, without those that change all that a better one changes."""
    fitting = [
        state
        for state, need in needs.items()
        if need is not None and bounds[state] is not None and need <= limit
    ]
    fitting.sort(key=lambda state: (key(dimensions, state), needs[state], state))
    chosen = []
    for state in fitting:
        changes = {position for position, index in enumerate(state) if index}
        if not any(better <= changes for _, better in chosen):
            chosen.append((state, changes))
    return [state for state, _ in chosen[:num_results]]


def compare(seed, *, stated, unsupported):
    rng = random.Random(seed)
    dimensions = random_lattice(rng, stated=stated)
    needs, bounds = random_needs(rng, dimensions, unsupported=unsupported)
    as_is = (0,) * len(dimensions)
    limit = rng.randint(min(need for need in needs.values() if need is not None) - 1, needs[as_is] - 1)
    num_results = rng.randint(1, 5)

    found = search_lattice(JOB, dimensions, limit, Table(needs, bounds), num_results=num_results)
    expected = brute_force(dimensions, needs, bounds, limit, num_results)

    assert [
        (
            {
                field: value
                for dimension, index in zip(dimensions, state)
                for field, value in dimension.options[index].set.items()
            },
            key(dimensions, state)[0],
            key(dimensions, state)[2],
            needs[state],
            limit - needs[state],
        )
        for state in expected
    ] == [
        (change.set, change.tier, change.slowdown, change.need_bytes, change.headroom_bytes)
        for change in found.changes
    ]
    return found


@settings(max_examples=1500, deadline=None)
@given(st.integers(0, 2**63))
def test_search_equals_brute_force_when_nothing_is_stated(seed):
    """Over evaluators without any order, the answer and all runners-up are those of brute force."""
    compare(seed, stated=False, unsupported=0.0)


@settings(max_examples=1500, deadline=None)
@given(st.integers(0, 2**63))
def test_search_equals_brute_force_with_bounds(seed):
    """Over evaluators that obey what the lattice states, bounding whole boxes loses nothing."""
    compare(seed, stated=True, unsupported=0.0)


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**63))
def test_unsupported_combinations_never_count_as_fitting(seed):
    """States that raise are passed over, and everything else is found as if they were not there."""
    compare(seed, stated=True, unsupported=0.15)


def test_brute_force_would_notice_a_wrong_statement():
    """Meta-test: with an option wrongly stated to need less, the search misses what brute force finds."""
    dimensions = [
        Dimension(
            "a", (AS_IS, Edit("weak", {FIELDS[0]: 2}), Edit("strong", {FIELDS[0]: 3})), ((), (0,), (1,))
        ),
    ]
    needs = {(0,): 1200, (1,): 900, (2,): 1100}

    found = search_lattice(JOB, dimensions, LIMIT, Table(needs, needs))

    assert [(1,)] == brute_force(dimensions, needs, needs, LIMIT, 4)
    assert () == found.changes


def test_bounding_saves_evaluations():
    """A lattice of 4**5 states in which nothing fits is dismissed with the bounds of a few."""
    edits = [
        [Edit(f"{field} {index}", {field: index + 1}, tier=1, slowdown=1 + index / 10) for index in (1, 2, 3)]
        for field in FIELDS
    ]
    dimensions = [
        Dimension(field, (AS_IS, *options), ((), (0,), (1,), (2,))) for field, options in zip(FIELDS, edits)
    ]
    needs = {state: 5000 - sum(state) for state in itertools.product(range(4), repeat=5)}

    found = search_lattice(JOB, dimensions, LIMIT, Table(needs, needs))

    assert () == found.changes
    assert found.num_lower_bounds < 25
    assert 0 == found.num_exact


@pytest.mark.parametrize(
    ("smaller", "larger", "smaller_need"),
    [
        pytest.param({"tier": 1, "num_changes": 3, "slowdown": 9.0}, {"tier": 2}, 600, id="tier"),
        pytest.param({"slowdown": 9.0}, {"num_changes": 2}, 600, id="count"),
        pytest.param(
            {"tier": 3, "given_up": 0.5}, {"tier": 3, "slowdown": 1.1, "given_up": 0.25}, 600, id="slowdown"
        ),
        pytest.param({"tier": 3, "given_up": 0.25}, {"tier": 3, "given_up": 0.5}, 600, id="given up"),
        pytest.param({}, {}, 400, id="headroom"),
    ],
)
def test_order_of_two_fitting_changes(smaller, larger, smaller_need):
    """
    Tier comes before count, count before slowdown, slowdown before what is given up, and that before
    headroom.
    """
    edits = [Edit("larger", {FIELDS[0]: 2}, **larger), Edit("smaller", {FIELDS[1]: 2}, **smaller)]
    dimensions = [Dimension(edit.name, (AS_IS, edit), ((), ())) for edit in edits]
    needs = {(0, 0): 2000, (1, 0): 500, (0, 1): smaller_need, (1, 1): 100}

    changes = search_lattice(JOB, dimensions, LIMIT, Table(needs, needs)).changes

    assert [edits[1].set, edits[0].set] == [change.set for change in changes]
