"""Stage 3 of ZeRO: sizes and lifetimes derived by hand, and the working set of a whole model."""

from __future__ import annotations

from collections import Counter

import pytest
from test_zero import LLAMA, alive_at, events, make_job, parameters

from memplan.job.check import check_job
from memplan.job.spec import Job, Offload, Parallel
from memplan.model.tensors import num_parameters
from memplan.model.tensors import parameters as parameters_of
from memplan.tape.graph import Graph
from memplan.tape.modules import hooked
from memplan.tape.sharded.zero3 import Zero3Optimizer
from memplan.tape.sharded.zero3_gather import Coordinator
from memplan.tape.tensors import Tensor
from memplan.tape.writer import write_tape


@hooked
def use(g: Graph, x: Tensor, *weights: Tensor) -> Tensor:
    """A module that allocates nothing."""
    return x


def coordinator(g: Graph, *counts: int, prefetch: int = 0, persistent: int = 0) -> tuple[Coordinator, list]:
    """Over two ranks."""
    made = parameters(g, *counts)
    hooks = Coordinator(g, made, 2, prefetch_elements=prefetch, persistence_threshold=persistent)
    g.hooks = hooks
    return hooks, made


def passed(g: Graph, *modules: tuple) -> list[tuple[int, str]]:
    """Signed bytes and names of a forward pass over modules with these parameters."""
    begin = len(g.events)
    g.hooks.begin_forward()  # type: ignore[union-attr]
    for weights in modules:
        use(g, Tensor((1,), "bfloat16", None), *weights)
    return events(g, begin)


def test_a_module_gathers_its_parameters_and_lets_go_of_them():
    """One is gathered where it stays, padded from 3 elements to 4; two by way of one buffer of 4 + 6 elements."""
    g = Graph()
    _, (a, b, c) = coordinator(g, 3, 4, 5)

    assert [
        (8, "p0 gathered"), (-8, "p0 gathered"),
        (20, "parameters gathered together"), (8, "p1 gathered"), (10, "p2 gathered"),
        (-20, "parameters gathered together"), (-10, "p2 gathered"), (-8, "p1 gathered"),
    ] == passed(g, (a,), (c, b))  # fmt: skip


def test_later_passes_fetch_ahead_and_keep_what_is_near():
    """The first pass is recorded; then p1 is fetched while p0 is used, and p0 stays for the third module."""
    g = Graph()
    hooks, (a, b) = coordinator(g, 4, 6, prefetch=1)
    assert [8, -8, 12, -12, 8, -8] == [size for size, _ in passed(g, (a,), (b,), (a,))]
    g.hooks = hooks

    assert [8, 12, -12, -8] == [size for size, _ in passed(g, (a,), (b,), (a,))]


def test_small_parameters_stay_from_step_to_step():
    g = Graph()
    hooks, (small, large) = coordinator(g, 2, 6, persistent=2)
    passed(g, (small,), (large,))
    begin = len(g.events)
    hooks.release_all()
    hooks.gather_persistent()

    assert [(4, "p0 gathered")] == events(g, begin)
    assert [(12, "p1 gathered"), (-12, "p1 gathered")] == passed(g, (small,), (large,))


def test_gradients_are_reduced_together_and_kept_in_parts():
    """
    A bucket of 4 elements over 2 ranks: of 3 and 1 elements parts of 2 and 1 are copied together with 2 of padding;
    6 are too many for the bucket and are reduced where they are.
    """
    g = Graph()
    job = Job(model="small", method="full", parallel=Parallel(strategy="ZERO_3", dp_shard=2))
    made = parameters(g, 6, 3, 1)
    zero = Zero3Optimizer(g, job, made, made, hidden_size=2)
    begin = len(g.events)
    for parameter in reversed(made):
        parameter.grad = g.new(parameter.shape, "bfloat16", f"{parameter.name} grad", "gradients")
        zero.gradient_arrived(parameter)
    zero.end_backward()

    assert Counter({
        (2, "p2 grad"): 1, (-2, "p2 grad"): 1, (6, "p1 grad"): 1, (-6, "p1 grad"): 1,
        (2, "padding of gradients"): 2, (-2, "padding of gradients"): 2,
        (12, "gradients reduced together"): 1, (-12, "gradients reduced together"): 1,
        (12, "p0 grad"): 1, (-12, "p0 grad"): 1,
    }) == Counter(events(g, begin))  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_states_are_those_of_the_paper(dtype: str):
    """Every tensor is padded by itself; gradients of the parts are a buffer, master weights and states float32."""
    itemsize = 4 if dtype == "float32" else 2
    parts = sum(-(-item.num_elements // 3) for item in parameters_of(LLAMA))
    alive = alive_at(make_job(3, dtype=dtype), "forward")

    assert num_parameters(LLAMA) / 3 <= parts
    assert parts * itemsize == alive["gradients"]
    assert parts * 12 + 4 == alive["optimizer"]
    assert 0 <= alive["weights"] - parts * itemsize < 512  # and the table of rotary frequencies


def test_an_offloaded_optimizer_leaves_parts_of_the_weights_on_the_device():
    alive = alive_at(make_job(3, offload=Offload(optimizer=True)), "optimizer_step")

    assert 0 == alive["optimizer"] == alive["gradients"] and alive["weights"]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_nothing_is_left_of_a_step(method: str, checkpointing: str):
    """Weights, states and buffers at the end of the third step are those at the end of the second."""
    job = make_job(3, method=method, activation_checkpointing=checkpointing, loop="hf_trainer")
    written = write_tape(job, LLAMA, num_steps=3)
    tape = written.flatten()
    ends = [mark.event for mark in tape.marks if mark.phase == "forward" and mark.step in (2, 3)]
    ends.append(tape.marks[-1].event)
    held = [
        sum(tape.sizes[abs(event)] * (1 if event > 0 else -1) for event in tape.events[:end])
        for end in ends[1:]
    ]

    assert held[0] == held[1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_npt_is_not_deepspeeds(stage: int):
    (found,) = check_job(make_job(stage, method="npt"))

    assert "`method: npt`" in found.message and "FULL_SHARD" in found.hint
