"""What `smallest_changes` answers for real jobs and their real lattice, on a toy estimator."""

from __future__ import annotations

import itertools
import math

import pytest
from toy_estimator import ENOUGH, JOB, QWEN_7B, ToyEstimator, card

from memplan.errors import JobError
from memplan.fit.changes import candidate_edits
from memplan.fit.lattice import edits_of
from memplan.fit.search import search_changes, smallest_changes
from memplan.units import GiB

CROWDED = JOB.replace(
    micro_batch_size=4,
    gradient_accumulation_steps=2,
    activation_checkpointing="none",
    optimizer_kernel="foreach",
)


def answer(job, usable_gib, **options):
    options.setdefault("evaluate", ToyEstimator())
    return smallest_changes(job, QWEN_7B, card(int(usable_gib * GiB)), **options)


def test_a_job_that_fits_is_left_alone():
    """One change with nothing in it, and the headroom of the job as it is."""
    (change,) = smallest_changes(JOB, QWEN_7B, card(ENOUGH), evaluate=ToyEstimator())

    assert {} == change.set
    assert (0, 1.0) == (change.tier, change.slowdown)
    assert ENOUGH == change.need_bytes + change.headroom_bytes


def test_nothing_fits_on_a_card_that_is_too_small():
    """Empty when not even all changes together fit."""
    assert () == answer(JOB, 1)


def test_a_long_sequence_with_a_large_vocabulary_takes_the_chunked_loss_alone():
    """LoRA on a 7B model that misses a 24 GB card by its logits keeps its sequence, batch and precision."""
    changes = answer(JOB, 24)

    assert {"loss": "chunked"} == changes[0].set
    assert (0, 1.0) == (changes[0].tier, changes[0].slowdown)


@pytest.mark.parametrize("usable_gib", [9, 14, 20, 26, 40])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_change_needs_what_it_says(method, usable_gib):
    """Applied to the job and evaluated anew, each answer fits and needs exactly what it claims."""
    job = CROWDED.replace(method=method)
    limit = usable_gib * GiB

    changes = answer(job, usable_gib, allow_capacity=True)

    for change in changes:
        assert change.need_bytes == ToyEstimator().need_bytes(job.replace(**change.set))
        assert limit == change.need_bytes + change.headroom_bytes
        assert 0 <= change.headroom_bytes


@pytest.mark.parametrize("usable_gib", [9, 14, 20, 24, 26])
def test_first_answer_is_the_smallest_of_the_whole_lattice(usable_gib):
    """Every state of a real lattice of some thousands, evaluated one by one, agrees."""
    job = JOB.replace(micro_batch_size=4, optimizer_kernel="foreach")
    evaluate = ToyEstimator(lost=0.0)
    dimensions = candidate_edits(job, QWEN_7B)
    best = None
    for state in itertools.product(*(range(len(dimension.options)) for dimension in dimensions)):
        edits = edits_of(dimensions, state)
        settings = {field: value for edit in edits for field, value in edit.set.items()}
        need_bytes = evaluate.need_bytes(job.replace(**settings))
        if edits and need_bytes <= usable_gib * GiB:
            slowdown = round(math.prod(edit.slowdown for edit in edits), 6)
            kept = round(math.prod(1 - edit.given_up for edit in edits), 6)
            ranked = (
                max(edit.tier for edit in edits),
                sum(edit.num_changes for edit in edits),
                slowdown,
                -kept,
                need_bytes,
            )
            best = ranked if best is None or ranked < best else best

    first = answer(job, usable_gib, evaluate=ToyEstimator(lost=0.0))[0]

    assert best is not None
    assert (best[0], best[2], best[4]) == (first.tier, first.slowdown, first.need_bytes)


def test_answers_come_smallest_first_and_are_different_choices():
    """Tiers never fall along the answers, and each leaves alone something that every better one changes."""
    changes = answer(CROWDED, 20, num_results=6)

    assert len(changes) > 2
    assert sorted(change.tier for change in changes) == [change.tier for change in changes]
    for better, worse in itertools.combinations(changes, 2):
        assert not set(better.set) <= set(worse.set)


def test_as_many_answers_as_asked_for():
    """`num_results` cuts the list and does not change what is in it."""
    assert answer(CROWDED, 20, num_results=3)[:1] == answer(CROWDED, 20, num_results=1)


def test_capacity_is_given_up_only_when_asked():
    """Without `allow_capacity` no answer is of tier 4; with it, a job that nothing else saves gets one."""
    job = JOB.replace(
        method="qlora", loss="chunked", micro_batch_size=1, max_seq_len=64, **{"lora.dtype": "bfloat16"}
    )
    job = job.replace(
        **{"offload.params": True, "parallel.strategy": "FULL_SHARD", "activation_offload": True}
    )
    usable_gib = (ToyEstimator().need_bytes(job) / GiB) - 0.2

    assert () == answer(job, usable_gib)
    assert [4] == [change.tier for change in answer(job, usable_gib, allow_capacity=True, num_results=1)]


def test_unsupported_edits_are_skipped_and_noted():
    """An edit that cannot be estimated is no answer, and the reason is given with its name."""
    evaluate = ToyEstimator(unsupported={"loss": "chunked", "method": "qlora"})

    found = search_changes(JOB, QWEN_7B, card(24 * GiB), evaluate=evaluate)

    assert {"loss": "fused"} == found.changes[0].set
    assert "chunked loss: no formula for loss chunked" in found.skipped


def test_a_job_that_cannot_be_estimated_raises():
    """Nothing is changed about a job that is itself unknown."""
    with pytest.raises(JobError, match="no formula"):
        answer(JOB, 24, evaluate=ToyEstimator(unsupported={"loss": "full"}))


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("usable_gib", [2, 6, 10, 16, 20, 24, 32, 48])
def test_a_large_lattice_takes_few_evaluations(method, usable_gib):
    """At 4 ms a lower bound and 150 ms an exact need, the smallest change is found in under 2 s."""
    evaluate = ToyEstimator()
    job = CROWDED.replace(method=method)
    assert 2000 < math.prod(len(dimension.options) for dimension in candidate_edits(job, QWEN_7B))

    answer(job, usable_gib, evaluate=evaluate, num_results=1)

    assert evaluate.num_lower_bounds <= 200
    assert evaluate.num_exact <= 6
