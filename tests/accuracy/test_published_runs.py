"""Published measurements, predicted: the data in order, the errors within bounds, the misses explained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from benchmarks import bands, needs_page, report
from benchmarks.compare import (
    ASSUMED,
    CAUSES,
    END,
    ONE_GPU,
    SCRIPTED,
    SHARDED,
    NeedRow,
    Row,
    Run,
    compare,
    compare_need,
)
from benchmarks.litgpt_runs import RUNS as LITGPTS
from benchmarks.published import FILE, Case, Measurement, load_published
from benchmarks.recorded import load_recorded
from benchmarks.summary import Summary, summarize
from benchmarks.titan import RUNS as TITANS
from benchmarks.torchtune import RUN as TORCHTUNE
from benchmarks.traced import load_traced_rows

from memplan.allocator import replay
from memplan.budget.estimate import estimate
from memplan.tape.behaviour import Behaviour
from memplan.tape.writer import write_tape
from memplan.units import GiB, MiB

ROOT = Path(__file__).parent.parent.parent
CASES = load_published()
ALL_CASES = [*CASES, *load_recorded()]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Every statistic of every case that can be planned, and of those that were traced."""
    return [row for case in ALL_CASES for row in compare(case)] + load_traced_rows()


@pytest.fixture(scope="module")
def needs() -> list[NeedRow]:
    """The needs that runs bound."""
    return [need for case in ALL_CASES if (need := compare_need(case)) is not None]


def of(rows: list[Row], group: str, statistic: str) -> Summary:
    """The errors of one group and statistic."""
    return summarize([row.error for row in rows if (row.group, row.measured.statistic) == (group, statistic)])


def case_named(name: str) -> Case:
    """One case by its id."""
    return next(case for case in CASES if case.id == name)


# -- the data ------------------------------------------------------------------------------------------------


def test_every_case_has_a_job_a_script_or_a_reason_for_neither():
    """382 runs, each once, of a source that the file describes, with a positive number of bytes."""
    sources = json.loads(FILE.read_text(encoding="utf-8"))["sources"]

    assert 382 == len({case.id for case in CASES}) == len(CASES)
    kinds = [
        (
            bool(case.fields),
            bool(case.script),
            bool(case.unsupported),
            case.id in {*TITANS, *LITGPTS, TORCHTUNE},
        )
        for case in CASES
    ]
    assert [1] * len(CASES) == [sum(kind) for kind in kinds]
    assert [] == [case.id for case in CASES if case.source not in sources]
    figures = [figure for case in CASES for figure in (case.measured, *case.also_measured)]
    assert [] == [figure for figure in figures if not isinstance(figure.bytes, int) or figure.bytes <= 0]


def test_jobs_and_behaviours_can_be_read():
    """Every job in the file is one that a job file could hold, of a model that has a program."""
    planned = [case for case in CASES if case.fields]
    families = {case.architecture.family for case in planned}

    assert 169 == len(planned)
    assert {"llama", "qwen2", "gpt2", "granite", "qwen"} == families
    assert [] == [case.id for case in planned if case.job.method != case.method]


# -- the errors ----------------------------------------------------------------------------------------------


def test_allocated_peaks_on_one_gpu(rows: list[Row]):
    """
    Median 0.1 %, none beyond 1 %, none too low. What is left between steps is right to 0.05 %, but for the remainder of
    a block, up to 1 MiB that the allocator does not split off: in small 4-bit models that is 0.05 % by itself.
    """
    peaks, left = of(rows, ONE_GPU, "allocated"), of(rows, ONE_GPU, END)

    assert 47 == peaks.count
    assert peaks.median < 0.001
    assert abs(peaks.worst) < 0.01
    assert 0 == peaks.too_low
    assert 40 == left.count
    beyond = [
        row for row in rows
        if row.group == ONE_GPU and row.measured.statistic == END and abs(row.error) >= 0.0005
    ]  # fmt: skip
    assert {"ibm/PowerLM-3b"} == {row.case.model for row in beyond}
    assert all(
        abs(row.predicted_bytes - row.measured.bytes) < 0.0005 * row.measured.bytes + MiB for row in beyond
    )


def test_reserved_peaks_on_one_gpu(rows: list[Row]):
    """Median 1 %, none beyond 5 %."""
    for group, count in ((ONE_GPU, 7), (ASSUMED, 5)):
        summary = of(rows, group, "reserved")
        assert count == summary.count
        assert summary.median < 0.01
        assert abs(summary.worst) < 0.05


def test_reserved_peaks_of_complete_cases(rows: list[Row]):
    """Of sources of high trust: median 1 %, none beyond 1 %, none too low."""
    errors = [
        row.error
        for row in rows
        if row.case.trust == "high" and not row.case.completeness and row.measured.statistic == "reserved"
        if row.group != SCRIPTED
    ]
    summary = summarize(errors)

    assert 19 == summary.count
    assert summary.median < 0.01
    assert abs(summary.worst) < 0.01
    assert 0 == summary.too_low


def test_no_reserved_peak_of_a_complete_job_is_below_the_measurement(rows: list[Row]):
    """Of sources of high trust, beyond the rounding of what they print."""
    complete = [row for row in rows if row.case.trust == "high" and not row.case.completeness]
    jobs = [row for row in complete if row.measured.statistic == "reserved" and row.group != SCRIPTED]
    below = [
        row.case.id
        for row in jobs
        if row.measured.bytes - row.predicted_bytes > 1 + row.measured.rounding_bytes
    ]

    assert 19 == len(jobs)
    assert not below


@pytest.mark.parametrize(("name", "segments"), [("preflight-gpt2-b4-s128", 0), ("preflight-gpt2-b8-s256", 1)])
def test_the_workspace_of_products_with_a_bias_is_in_what_gpt2_reserved(name: str, segments: int):
    """
    Torch 2.11: to the byte. Planned for 2.12, which has none, 1 MiB of the allocated peak is missing, and in the larger
    run one segment of the small pool.
    """
    case = case_named(name)
    planned = Run(case, case.behaviour)
    later = Run(case, dataclasses.replace(case.behaviour, torch=(2, 12)))
    reserved = case.also_measured[0]
    allocated, without = planned.predict("allocated"), later.predict("allocated")

    assert ("reserved", reserved.bytes) == (reserved.statistic, planned.predict("reserved"))
    assert reserved.bytes - segments * 2 * MiB == later.predict("reserved")
    assert allocated is not None and without is not None
    assert MiB == allocated - without


def test_what_rounding_leaves_open():
    """Half a unit of the last digit that is printed, whatever the unit."""
    assert 0.5 == Measurement("allocated", 3042967552, "3042967552 bytes").rounding_bytes
    assert 0.005 * GiB == pytest.approx(Measurement("reserved", 5594194903, "5.21 GiB").rounding_bytes)
    assert 0.05 * GiB == pytest.approx(Measurement("allocated", 64424509440, "60.0").rounding_bytes)


@pytest.mark.parametrize(
    ("name", "loaded", "forward", "backward"),
    [
        ("0.5b-instruct_lora_s1024", 0.9766, 2.6211, 3.209),
        ("0.5b-instruct_qlora_s1024", 0.9648, 2.1309, 3.2988),
        ("0.5b-instruct_qlora_s2048", 0.9648, 3.9492, 6.2773),
        ("1.5b-instruct_qlora_s1024", 2.0059, 3.1719, 4.3477),
        ("1.5b-instruct_qlora_s2048", 2.0059, 4.7520, 7.0898),
    ],
)
def test_reserved_memory_of_each_stage_of_the_first_step(
    name: str, loaded: float, forward: float, backward: float
):
    """
    What these runs reserved with the adapters attached, after the first forward and after the first backward, in GiB as
    their source publishes it: within one segment of the small pool.
    """
    case = case_named(f"cift-qwen2.5-{name}_b1_r16")
    phases = Run(case, case.behaviour).replay.phases

    planned = [phase.reserved_peak_bytes / GiB for phase in phases[:3]]
    assert [loaded, forward, backward] == pytest.approx(planned, abs=2.1 / 1024)


def test_allocated_peaks_on_several_gpus(rows: list[Row]):
    """62 within 0.02 %, Granite's and one of fsdp_qlora's, of two decimals, within 0.5 %; none too low."""
    errors = [row.error for row in rows if (row.group, row.measured.statistic) == (SHARDED, "allocated")]

    assert [64, 73] == [sum(abs(error) < most for error in errors) for most in (0.0002, 0.005)]
    assert 73 == len(errors)
    assert 0 == of(rows, SHARDED, "allocated").too_low


def test_a_need_lies_between_what_a_run_allocated_and_what_it_reserved(needs: list[NeedRow]):
    """Never below, above by 4 % at most, and inside for most of 47 runs."""
    errors = [need.error for need in needs]

    assert 47 == len(errors)
    assert 0.0 == min(errors)
    assert max(errors) < 0.04
    assert sum(error == 0 for error in errors) > 15


def test_every_miss_has_its_cause_and_every_cause_a_miss(rows: list[Row]):
    """Beyond 5 %: each row has a sentence, and no sentence is left over from a miss that is gone."""
    missed = [row for row in rows if abs(row.error) > report.MISS]
    causes = {entry["cause"] for entry in json.loads(CAUSES.read_text(encoding="utf-8"))}

    assert [] == [row.case.id for row in missed if not row.cause]
    assert causes == {row.cause for row in missed}


def test_the_comparison_replays_what_estimate_does():
    """A comparison's shortcut and the answer that a user gets are the same bytes."""
    case = case_named("fms-main-mistral-7b-v0.1-none-lora-g1-bs4")
    result = estimate(case.job, case.architecture, behaviour=case.behaviour)
    run = Run(case, case.behaviour)

    assert result.peak.allocated_bytes == run.predict("allocated")
    assert result.peak.device_bytes == run.predict("device")
    assert result.need_bytes == run.need_bytes() + result.peak.non_torch_bytes


# -- what the software does --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fact", "off"),
    [
        ("fms-main-mistral-7b-v0.1-none-lora-g1-bs4", "shift_logits", 0.03),
        ("fms-main-mistral-7b-v0.1-foak-fast-kernels-lora-g1-bs4", "triton_loss", 0.04),
        ("fms-liger-llama-3.1-8b-foak-fast-kernels-lora-g1-bs8", "float_logits", 0.1),
        ("fms-liger-llama-3.1-8b-foak-fast-kernels-liger-lora-g1-bs16", "triton_norm", 0.03),
        ("fms-liger-llama-3.1-8b-foak-fast-kernels-liger-lora-g1-bs16", "triton_rotary", 0.0),
        ("fms-liger-llama-3.1-8b-foak-fast-kernels-liger-lora-g2-bs16", "fsdp1", 0.2),
        ("fms-liger-llama-3.1-8b-foak-fast-kernels-liger-lora-g2-bs16", "reentrant", 0.2),
        ("fms-liger-llama-3.1-8b-foak-fast-kernels-lora-g2-bs4", "recomputes_units", 0.009),
        ("fms-main-mistral-7b-v0.1-accelerated-peft-bnb-foak-lora-g1-bs4", "fused_lora", 0.001),
        ("fms-liger-mistral-7b-v0.1-accelerated-peft-bnb-foak-lora-g4-bs4", "whole_adapters", 0.005),
        ("fms-granite-powerlm-3b-none-lora-g1-bs8", "float_logits", 0.09),
        ("fms-granite-powerlm-3b-baseline-peft-bnb-lora-g1-bs4", "casts_embedding_back", 0.03),
        ("preflight-gpt2-b8-s256", "compute_capability", 0.1),
        ("cift-qwen2.5-1.5b-instruct_qlora_s2048_b1_r16", "hold_logits", 0.1),
    ],
)
def test_a_fact_about_the_software_is_what_makes_a_prediction_right(name: str, fact: str, off: float):
    """Within 0.5 % with it; without it off by more than a share of the measurement."""
    case = case_named(name)
    without = dataclasses.replace(case.behaviour, **{fact: getattr(Behaviour(), fact)})
    measured = case.measured.bytes

    assert Run(case, case.behaviour).predict("allocated") == pytest.approx(measured, rel=0.005)
    predicted = Run(case, without).predict("allocated")
    assert predicted is not None
    assert abs(predicted / measured - 1) >= off


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("fms-liger-llama-3.1-8b-accelerated-peft-bnb-foak-lora-g1-bs4", 0.15),
        ("fms-liger-llama-3.1-8b-accelerated-peft-bnb-foak-lora-g4-bs8", 0.15),
        ("fms-liger-mistral-7b-v0.1-accelerated-peft-bnb-foak-lora-g1-bs4", 0.1),
    ],
)
def test_slices_of_whole_dimensions_and_added_tokens_are_what_fills_the_cache(name: str, off: float):
    """
    The slice of the vocabulary in `logits[..., :-1, :]` makes backward take zeros of all positions but the last, and
    then of all: with a row for an added token these no longer fit the segment of the former. Within 3 % with both.
    """
    case = case_named(name)
    measured = next(figure.bytes for figure in case.also_measured if figure.statistic == "device")
    later_torch = dataclasses.replace(case.behaviour, torch=(2, 9))
    unresized = dataclasses.replace(case, added_tokens=0)

    def error(run: Run) -> float:
        predicted = run.predict("device")
        assert predicted is not None
        return predicted / measured - 1

    assert abs(error(Run(case, case.behaviour))) < 0.03
    assert error(Run(case, later_torch)) < -off
    if name.endswith("bs4"):
        assert error(Run(unresized, unresized.behaviour)) < -off


@pytest.mark.parametrize(
    ("name", "peak", "held"),
    [
        ("fms-liger-llama-3.1-8b-foak-fast-kernels-lora-g1-bs8", 67.5, 56.9),
        ("fms-liger-llama-3.1-8b-foak-fast-kernels-lora-g2-bs8", 66.6, 54.5),
        ("fms-liger-mistral-7b-v0.1-foak-fast-kernels-full-g2-bs4", 78.0, 73.2),
        ("fms-main-mistral-7b-v0.1-none-full-g1-bs8", 77.1, 70.4),
        ("fms-main-mistral-7b-v0.1-foak-fast-kernels-full-g1-bs8", 75.3, 68.5),
        ("fms-liger-mistral-7b-v0.1-foak-fast-kernels-full-g1-bs8", 75.3, 68.5),
    ],
)
def test_what_is_held_once_the_cache_was_given_back(name: str, peak: float, held: float):
    """The figures in the causes of misses near the card's capacity, GiB; of several GPUs their mean."""
    case = case_named(name)
    run = Run(case, case.behaviour)
    predicted = run.predict("device")
    given_back = []
    for rank in range(case.gpus):
        behaviour = dataclasses.replace(case.behaviour, rank=rank)
        tape = write_tape(case.job, case.architecture, behaviour=behaviour, num_steps=3).flatten()
        replayed = replay(
            tape.events,
            tape.sizes,
            tape.streams,
            case.job.allocator,
            limit_bytes=run.limit_bytes,
            marks=tape.marks,
            recorded=tape.recorded,
            waits=tape.waits,
        )
        third = max(phase.reserved_peak_bytes for phase in replayed.phases if phase.mark.step == 3)
        given_back.append(replayed.peak_reserved_bytes - third)
        assert 1 == replayed.num_retries

    assert predicted is not None
    assert peak == pytest.approx(predicted / GiB, abs=0.06)
    assert held == pytest.approx((predicted - sum(given_back) / case.gpus) / GiB, abs=0.06)


def test_one_rank_needs_more_than_the_card_has():
    """The figures in the cause: the second of two GPUs, and what is left of the card, GiB."""
    case = case_named("fms-liger-llama-3.1-8b-foak-fast-kernels-liger-full-g2-bs8")
    run = Run(case, dataclasses.replace(case.behaviour, rank=1))
    assert run.limit_bytes is not None

    assert [77.4, 76.9] == [round(num_bytes / GiB, 1) for num_bytes in (run.need_bytes(), run.limit_bytes)]


def test_logits_are_taken_anew_on_three_of_four_gpus():
    """The figures in the cause: what each reserves, GiB, and the mean with one block of logits less on three."""
    case = case_named("fms-liger-llama-3.1-8b-foak-fast-kernels-full-g4-bs4")
    runs = [Run(case, dataclasses.replace(case.behaviour, rank=rank)) for rank in range(4)]
    reserved = [run.replay.peak_reserved_bytes / GiB for run in runs]
    logits = max(runs[0].tape.sizes) / GiB
    predicted = runs[0].predict("device")
    assert predicted is not None

    assert 7.8 == round(logits, 1)
    assert [2 * logits] * 3 == pytest.approx([other - reserved[0] for other in reserved[1:]], abs=0.02)
    assert 65.3 == round(predicted / GiB - logits * 3 / 4, 1)


# -- what is written from it -------------------------------------------------------------------------------


def test_the_error_bands_are_those_of_the_rows(rows: list[Row], needs: list[NeedRow]):
    """`python -m benchmarks.accuracy` would write the file as it is."""
    expected = bands.dump_bands(bands.error_bands(rows, needs))

    assert expected == bands.FILE.read_text(encoding="utf-8")


def test_the_page_holds_the_rows(rows: list[Row], needs: list[NeedRow]):
    """`docs/accuracy.md` is of these rows: its summary, its needs, its misses and every group."""
    page = (ROOT / bands.REPORT).read_text(encoding="utf-8")
    sections = [
        report.summary_section(ALL_CASES, rows),
        report.standing_section(rows),
        needs_page.need_section(needs),
        needs_page.outside_section(needs),
        report.miss_section(rows),
        *report.group_sections(rows),
    ]

    assert [] == [section[:60] for section in sections if section not in page]
