"""
The smallest set of changes that makes a job fit, exact over the lattice of `changes.candidate_edits`.

The search walks tiers from 0 up, and in a tier the number of changes from 1 up; among the states with the
same tier and count it takes the next cheapest first. It stops when it has found enough, so what it returns
first is smallest by construction. It stays quick because most states are never evaluated: a box of states is
left out when the lower bound of its least demanding states is above the limit (branch and bound), and the
exact need is only computed for a state whose own lower bound fits and whose turn it is.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

from memplan.budget.result import Change
from memplan.errors import MemplanError
from memplan.fit.changes import candidate_edits
from memplan.fit.lattice import Box, Dimension, State, changed, cheapest, edits_of
from memplan.gpu.capacity import Capacity
from memplan.job.spec import Job
from memplan.model.architecture import Architecture, Outline


class Evaluate(Protocol):
    """
    What a job needs, in bytes per GPU. Both raise `MemplanError` for a job that cannot be estimated; an edit
    with which the job cannot be must not become known with more edits.

    Where `Dimension.no_more_than` says that an option needs no more than another, its `lower_bound_bytes`
    must be no more than the other's. The lower bound must be defined wherever the need is.
    """

    def lower_bound_bytes(self, job: Job) -> int:
        """Never above `need_bytes(job)`, and much cheaper."""

    def need_bytes(self, job: Job) -> int:
        """The smallest capacity at which the job completes."""


@dataclass(frozen=True)
class Estimate:
    """`Evaluate` by the estimator, for one model."""

    architecture: Architecture

    def lower_bound_bytes(self, job: Job) -> int:
        """
        Live bytes at the peak, without a replay, of two micro batches: those that follow are like the second.
        """
        from memplan.budget.estimate import quick_need_bytes

        steps = min(job.gradient_accumulation_steps, 2)
        return quick_need_bytes(job.replace(gradient_accumulation_steps=steps), self.architecture)

    def need_bytes(self, job: Job) -> int:
        """The smallest capacity at which the replay completes."""
        from memplan.budget.estimate import need_bytes

        return need_bytes(job, self.architecture)


def estimate_of(architecture: Architecture | Outline) -> Evaluate:
    """The estimator, which needs more than an outline."""
    assert isinstance(architecture, Architecture), "a model of which an outline is known takes an `evaluate`"
    return Estimate(architecture)


@dataclass(frozen=True)
class Search:
    """What a search found, and what it took."""

    changes: tuple[Change, ...]
    """Smallest first; one without edits if the job fits as it is, none if nothing in the lattice fits."""
    skipped: tuple[str, ...]
    """Combinations that could not be estimated, with the reason; they are never counted as fitting."""
    num_lower_bounds: int
    num_exact: int


def smallest_changes(
    job: Job,
    architecture: Architecture | Outline,
    capacity: Capacity,
    *,
    allow_capacity: bool = False,
    can_make: Callable[[Mapping[str, Any]], bool] | None = None,
    evaluate: Evaluate | None = None,
    num_results: int = 4,
) -> tuple[Change, ...]:
    """
    The smallest changes that make the job fit in `capacity.usable_bytes`, smallest first.

    The first minimises, in this order: the highest tier used, the number of changes, the predicted slowdown,
    the share of data or trained capacity given up; then it prefers more headroom. The others follow in the
    same order, each leaving alone something that every better one changes, so that they are different choices
    and not the same one with more added. Tier 4 takes part only with `allow_capacity`, and of the edits those
    that `can_make` says whoever runs the job has.

    A job that fits as it is gives one `Change` with an empty `set`; a lattice in which nothing fits gives
    `()`. What cannot be estimated is passed over. Raises `MemplanError` if the job itself cannot be.
    """
    return search_changes(
        job,
        architecture,
        capacity,
        allow_capacity=allow_capacity,
        can_make=can_make,
        evaluate=evaluate,
        num_results=num_results,
    ).changes


def search_changes(
    job: Job,
    architecture: Architecture | Outline,
    capacity: Capacity,
    *,
    allow_capacity: bool = False,
    can_make: Callable[[Mapping[str, Any]], bool] | None = None,
    evaluate: Evaluate | None = None,
    num_results: int = 4,
) -> Search:
    """
    As `smallest_changes`, with the combinations that could not be estimated and the number of evaluations.
    """
    dimensions = candidate_edits(job, architecture, allow_capacity=allow_capacity, can_make=can_make)
    return search_lattice(
        job, dimensions, capacity.usable_bytes, evaluate or estimate_of(architecture), num_results=num_results
    )


def search_lattice(
    job: Job,
    dimensions: Sequence[Dimension],
    limit_bytes: int,
    evaluate: Evaluate,
    *,
    num_results: int = 4,
) -> Search:
    """The smallest changes over any lattice; see `smallest_changes` for the order and what is left out."""
    lattice = _Lattice(job, dimensions, limit_bytes, evaluate)
    lower_bound_bytes = evaluate.lower_bound_bytes(job)
    if lower_bound_bytes <= limit_bytes:
        need_bytes = evaluate.need_bytes(job)
        if need_bytes <= limit_bytes:
            unchanged = Change({}, "fits as it is", 0, 1.0, need_bytes, limit_bytes - need_bytes)
            return Search((unchanged,), (), 1, 1)
    lattice.lower_bounds[(0,) * len(dimensions)] = lower_bound_bytes
    states = tuple(itertools.islice(lattice.fitting_states(), num_results))
    return Search(
        changes=tuple(lattice.change(state) for state in states),
        skipped=tuple(lattice.skipped.values()),
        num_lower_bounds=len(lattice.lower_bounds),
        num_exact=len(lattice.needs),
    )


class _Lattice:
    """One search: the lattice, the limit, and every evaluation made so far."""

    def __init__(
        self, job: Job, dimensions: Sequence[Dimension], limit_bytes: int, evaluate: Evaluate
    ) -> None:
        self.job = job
        self.dimensions = tuple(dimensions)
        self.limit_bytes = limit_bytes
        self.evaluate = evaluate
        self.lower_bounds: dict[State, int | MemplanError] = {}
        self.needs: dict[State, int | MemplanError] = {}
        self.skipped: dict[str, str] = {}
        """The first combination that each reason was met with."""
        self.unknown: set[tuple[int, int]] = set()
        """(dimension, option) of edits that cannot be estimated even alone, and so in no combination."""
        self.found: list[frozenset[int]] = []
        """The dimensions that each state found so far changes."""

    def fitting_states(self) -> Iterator[State]:
        """States that fit, smallest first, none of which changes everything that one before it changes."""
        tiers = sorted({option.tier for dimension in self.dimensions for option in dimension.options[1:]})
        most_changes = sum(
            max(option.num_changes for option in dimension.options) for dimension in self.dimensions
        )
        for tier in tiers:
            for num_changes in range(1, most_changes + 1):
                boxes = self._boxes(tier, num_changes)
                queue = [(*cheapest(self.dimensions, box), box) for box in boxes]
                heapq.heapify(queue)
                while queue:
                    yield from self._roomiest_first(self._next_cheapest(queue, tier))

    def change(self, state: State) -> Change:
        """A fitting state as a person and a job file see it, least invasive edits first."""
        edits = sorted(edits_of(self.dimensions, state), key=lambda edit: edit.tier)
        slowdown, _ = cheapest(self.dimensions, tuple((index,) for index in state))
        need_bytes = self._need(state)
        assert need_bytes is not None
        return Change(
            set={field: value for edit in edits for field, value in edit.set.items()},
            summary="; ".join(edit.summary for edit in edits),
            tier=max(edit.tier for edit in edits),
            slowdown=slowdown,
            need_bytes=need_bytes,
            headroom_bytes=self.limit_bytes - need_bytes,
        )

    def _boxes(self, tier: int, num_changes: int) -> Iterator[Box]:
        """
        Boxes that together hold every state of this tier with so many changes that may fit and is none of
        those found with more added. All states of a box change the same dimensions.
        """

        def descend(prefix: Box, left: int) -> Iterator[Box]:
            position = len(prefix)
            chosen = {index for index, options in enumerate(prefix) if 0 not in options}
            missing = [one - chosen for one in self.found]
            completing = set().union(*(rest for rest in missing if len(rest) == 1))
            remaining = tuple(
                (0,) if index in completing else dimension.allowed(tier, left)
                for index, dimension in enumerate(self.dimensions[position:], position)
            )
            box = prefix + remaining
            if not self._reaches(box, tier) or not self._may_fit(box):
                return
            if left == 0:
                yield box
                return
            if not remaining:
                return
            options = self.dimensions[position].options
            by_count = sorted(remaining[0], key=lambda index: options[index].num_changes)
            for count, group in itertools.groupby(by_count, key=lambda index: options[index].num_changes):
                yield from descend((*prefix, tuple(group)), left - count)

        yield from descend((), num_changes)

    def _next_cheapest(self, queue: list[tuple[float, float, Box]], tier: int) -> list[State]:
        """
        Takes the states of this tier with the least (slowdown, share given up) off the queue, splitting boxes
        on the way. `queue` is a heap of (what no state of the box stays below, box).
        """
        states: list[State] = []
        least: tuple[float, float] | None = None
        while queue and (least is None or queue[0][:2] == least):
            slowdown, given_up, box = heapq.heappop(queue)
            changes = {index for index, options in enumerate(box) if 0 not in options}
            if self._adds_to_found(changes) or not self._reaches(box, tier) or not self._may_fit(box):
                continue
            position = max(range(len(box)), key=lambda index: len(box[index]))
            options = box[position]
            if len(options) == 1:
                least = (slowdown, given_up)
                states.append(tuple(index for (index,) in box))
                continue
            middle = len(options) // 2
            for half in (options[:middle], options[middle:]):
                part = (*box[:position], half, *box[position + 1 :])
                heapq.heappush(queue, (*cheapest(self.dimensions, part), part))
        return states

    def _roomiest_first(self, states: Sequence[State]) -> Iterator[State]:
        """Those of equally cheap states that fit, most headroom first, with no need computed in vain."""
        bounds = {state: bound for state in states if (bound := self._lower_bound(state)) is not None}
        remaining = sorted(bounds, key=lambda state: (bounds[state], state))
        while remaining:
            best: tuple[int, State] | None = None
            for state in remaining:
                if best is not None and bounds[state] > best[0]:
                    break
                need_bytes = self._need(state)
                if need_bytes is not None and need_bytes <= self.limit_bytes:
                    best = min(best, (need_bytes, state)) if best else (need_bytes, state)
            if best is None:
                return
            self.found.append(changed(best[1]))
            yield best[1]
            remaining = [state for state in remaining if not self._adds_to_found(changed(state))]

    def _adds_to_found(self, changes: Set[int]) -> bool:
        """Whether these dimensions are all of a state found before, and perhaps more."""
        return any(one <= changes for one in self.found)

    def _reaches(self, box: Box, tier: int) -> bool:
        """Whether a state of the box uses this tier."""
        return any(
            index and dimension.options[index].tier == tier
            for dimension, options in zip(self.dimensions, box)
            for index in options
        )

    def _may_fit(self, box: Box) -> bool:
        """
        False only if no state of the box fits: the lower bounds of all that may be its least are above the
        limit. A combination that cannot be estimated, though its edits can, says nothing about the others.
        """
        known = tuple(
            tuple(index for index in options if (position, index) not in self.unknown)
            for position, options in enumerate(box)
        )
        least = (dimension.least(options) for dimension, options in zip(self.dimensions, known))
        for corner in itertools.product(*least):
            bound = self._evaluated(corner, self.lower_bounds, self.evaluate.lower_bound_bytes)
            if isinstance(bound, MemplanError):
                return not self._has_unknown_edit(corner) or self._may_fit(box)
            if bound <= self.limit_bytes:
                return True
        return False

    def _has_unknown_edit(self, state: State) -> bool:
        """Notes the edits of a state that cannot be estimated even alone; whether there are any."""
        num_unknown = len(self.unknown)
        for position in changed(state):
            alone = tuple(index if other == position else 0 for other, index in enumerate(state))
            if self._lower_bound(alone) is None:
                self.unknown.add((position, state[position]))
        return len(self.unknown) > num_unknown

    def _lower_bound(self, state: State) -> int | None:
        """None, and noted as skipped, where it cannot be estimated."""
        return self._noted(state, self._evaluated(state, self.lower_bounds, self.evaluate.lower_bound_bytes))

    def _need(self, state: State) -> int | None:
        """None, and noted as skipped, where it cannot be estimated."""
        return self._noted(state, self._evaluated(state, self.needs, self.evaluate.need_bytes))

    def _evaluated(
        self, state: State, known: dict[State, int | MemplanError], function: Callable[[Job], int]
    ) -> int | MemplanError:
        if state not in known:
            edits = edits_of(self.dimensions, state)
            settings = {field: value for edit in edits for field, value in edit.set.items()}
            try:
                known[state] = function(self.job.replace(**settings))
            except MemplanError as error:
                known[state] = error
        return known[state]

    def _noted(self, state: State, result: int | MemplanError) -> int | None:
        if isinstance(result, int):
            return result
        names = " + ".join(edit.name for edit in edits_of(self.dimensions, state))
        self.skipped.setdefault(result.message, f"{names}: {result.message}")
        return None
