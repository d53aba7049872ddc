"""The search on the real estimator: what the lattice states holds, and what it answers fits."""

from __future__ import annotations

import random

import pytest
from toy_estimator import JOB, QWEN_7B, card

from memplan.budget.estimate import estimate, need_bytes, quick_need_bytes, with_known_need
from memplan.fit import candidate_edits, maximize, smallest_changes
from memplan.fit.lattice import edits_of
from memplan.fit.search import Estimate
from memplan.units import GiB

RTX_4090_USABLE = 25_253_904_384
ESTIMATE = Estimate(QWEN_7B)

BARE = JOB.replace(activation_checkpointing="none", micro_batch_size=4, attention="eager")
JOBS = {
    "lora": BARE,
    "lora, one accumulation step": BARE.replace(gradient_accumulation_steps=1, loop="hf_trainer"),
    "lora on float32": BARE.replace(dtype="float32", optimizer_kernel="foreach"),
    "qlora": BARE.replace(
        method="qlora", **{"quantization.kbit_preparation": True, "quantization.double_quant": False}
    ),
    "full": BARE.replace(method="full", loop="script"),
    "full, four replicas": BARE.replace(method="full", **{"parallel.dp_replicate": 4}),
    "npt": BARE.replace(method="npt", max_seq_len=64, **{"npt.form": "materialised"}),
}


def settings(dimensions, state):
    return {field: value for edit in edits_of(dimensions, state) for field, value in edit.set.items()}


def random_states(dimensions, count, seed):
    """States of few and of many changes."""
    rng = random.Random(seed)
    for _ in range(count):
        density = rng.random()
        yield tuple(
            rng.randrange(len(dimension.options)) if rng.random() < density else 0 for dimension in dimensions
        )


def test_lora_on_a_7b_model_misses_24_gb_by_its_logits():
    """Rank 128, 2 x 2048, checkpointed: the chunked loss alone makes it fit an RTX 4090."""
    (first,) = smallest_changes(JOB, QWEN_7B, card(RTX_4090_USABLE), num_results=1)

    assert {"loss": "chunked"} == first.set
    assert (0, 1.0) == (first.tier, first.slowdown)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_answers_fit_as_they_say(method):
    """Every answer, applied and estimated anew, needs what it claims and fits."""
    job = JOB.replace(method=method)
    limit = need_bytes(job, QWEN_7B) - 2 * GiB

    changes = smallest_changes(job, QWEN_7B, card(limit), num_results=2)

    assert 2 == len(changes)
    for change in changes:
        assert change.need_bytes == need_bytes(job.replace(**change.set), QWEN_7B)
        assert change.need_bytes + change.headroom_bytes == limit
        assert change.headroom_bytes >= 0


@pytest.mark.parametrize("name", JOBS)
def test_lower_bound_is_never_above_the_need(name):
    """For states all over the lattice, the bound holds and is within a tenth."""
    dimensions = candidate_edits(JOBS[name], QWEN_7B, allow_capacity=True)

    for state in random_states(dimensions, 2, seed=1):
        job = JOBS[name].replace(**settings(dimensions, state))

        bound, need = ESTIMATE.lower_bound_bytes(job), ESTIMATE.need_bytes(job)

        assert 0.9 * need < bound <= need


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_micro_batches_bound_as_many_as_there_are(method):
    """The lower bound of the search, of two micro batches, is that of all of them."""
    job = JOB.replace(method=method, gradient_accumulation_steps=5)

    assert quick_need_bytes(job, QWEN_7B) == ESTIMATE.lower_bound_bytes(job)


@pytest.mark.parametrize("name", JOBS)
def test_what_the_lattice_states_is_so(name):
    """An option said never to need more than another has a lower bound that is not above the other's."""
    dimensions = candidate_edits(JOBS[name], QWEN_7B, allow_capacity=True)
    stated = [
        (position, smaller, larger)
        for position, dimension in enumerate(dimensions)
        for smaller, others in enumerate(dimension.no_more_than)
        for larger in others
    ]
    rng = random.Random(name)

    for state in random_states(dimensions, 8, seed=name):
        position, smaller, larger = rng.choice(stated)
        bounds = [
            ESTIMATE.lower_bound_bytes(
                JOBS[name].replace(
                    **settings(dimensions, (*state[:position], option, *state[position + 1 :]))
                )
            )
            for option in (smaller, larger)
        ]

        assert bounds[0] <= bounds[1], (dimensions[position].name, smaller, larger, state)


def test_longest_sequence_of_a_real_job():
    """64 tokens more than the answer no longer fit."""
    frontier = maximize(JOB, QWEN_7B, card(RTX_4090_USABLE), "max_seq_len")

    assert frontier.value is not None
    assert frontier.need_bytes == need_bytes(JOB.replace(max_seq_len=frontier.value), QWEN_7B)
    assert frontier.need_bytes <= RTX_4090_USABLE
    assert need_bytes(JOB.replace(max_seq_len=frontier.value + 64), QWEN_7B) > RTX_4090_USABLE


@pytest.mark.parametrize("other", ["qlora", "full, four replicas"])
def test_a_known_need_is_judged_as_an_estimate_is(other):
    """`fit` judges the job that it found by the need that its search computed."""
    job = JOBS[other]
    known = with_known_need(estimate(JOB, QWEN_7B), job, need_bytes(job, QWEN_7B))
    anew = estimate(job, QWEN_7B)

    assert (anew.need_bytes, anew.error_band, anew.job) == (known.need_bytes, known.error_band, known.job)
