"""docs/accuracy.md: what was compared, how far off, why, and every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import quantiles
from typing import Any

from benchmarks.ablation import Ablation
from benchmarks.compare import (
    ALSO_TRACED,
    ASSUMED,
    END,
    GROUPS,
    LITGPT,
    ONE_GPU,
    OTHER,
    RECORDED,
    SCRIPTED,
    SHARDED,
    TITAN,
    TORCHTUNE,
    TRACED,
    NeedRow,
    Row,
)
from benchmarks.fsdp1_runs import fsdp1_note
from benchmarks.needs_page import need_section, outside_section
from benchmarks.peft_table import BEFORE, LONGEST, NOT_TRACED, load_runs
from benchmarks.published import HIGHEST, LOWEST, NUM_ORDERS, Case
from benchmarks.summary import summarize
from benchmarks.tables import table
from benchmarks.trace_cases import load_traced_cases
from benchmarks.unstated import Unstated, unstated_section
from memplan.budget.outside import NCCL_BYTES
from memplan.units import GiB, MiB

MISS = 0.05
"""Errors above this are listed with their cause."""

HEAD = """# Accuracy

Written by `python -m benchmarks.accuracy`; do not edit. The measurements are in `benchmarks/data/published.json`,
each with its source; the arithmetic is in `benchmarks/`.

Every prediction is of the statistic that was measured, over the part of the run that was measured: `allocated` is
`torch.cuda.max_memory_allocated`, `reserved` is `max_memory_reserved`, `device` is what nvidia-smi shows. A job is
planned for the software that ran it: what changes between versions is a field of `Behaviour`
(`src/memplan/tape/behaviour.py`), set from the versions that the source names. No figure is fitted to a row. Three
facts were read off measurements, for want of another source: the length of peft's longest batch (694 tokens, from the
run `peft-mm-lora--rank32` alone), that fms-acceleration's 4-bit runs with Liger had the Triton norm, which their
configuration file asks for under a misspelt name, and that litgpt's runs of Llama 2 had the norm of the week after the
commit that they name.

Two engines predict: `shape`, which knows the operations of model families, and `trace`, which runs the real model,
peft, optimizer and loop on tensors without memory. Rows are the shape writer's where they do not say otherwise.

Errors are predicted / measured - 1: above zero the prediction is too high. "Too low" counts predictions more than
0.5 % below the measurement.
"""

GROUP_NOTES = {
    ONE_GPU: "Llama, Mistral, Granite, Qwen2 and GPT-2 as transformers runs them; the source leaves nothing open.",
    ASSUMED: "The same, where the source leaves one thing open that is assumed.",
    SHARDED: (
        "FSDP1, unit by unit, and replicas. FSDP1 hands blocks from stream to stream (`record_stream`): reserved and "
        "device are the higher of two paces, a device that keeps up and a host that is as far ahead of it as FSDP1's "
        "limit on gathers and what waits for the device allow. Its flat shards end inside tensors, so that every rank "
        "has other parts of them: device is the mean over the ranks, as published, and the rest is of the first."
    ),
    OTHER: (
        "Llama 3 8B, all of it trained on four A100s, planned by shape: FSDP1 with a unit for each block, as "
        "Lightning's Fabric sets it up, micro batches before the last of a step that reduce nothing (`no_sync`), and "
        "float32 logits that the loop keeps. Operations and loss are planned as transformers', and decide nothing: the "
        "peak lies at the end of the backward of a micro batch after the first, where every gradient is whole and "
        "those of the embeddings and the head are beside the flat one that they go into."
    ),
    ALSO_TRACED: (
        "Runs of the first group that a trace with today's transformers and peft can follow: a plain script without "
        "other kernels. `python -m benchmarks.trace_cases` traces them and keeps the results in `benchmarks/data`."
    ),
    TITAN: (
        "Llama 3 8B and Llama 2 7B on 8 to 128 GPUs, without torch.compile: torchtitan's model code, checkpointing, "
        "sharding and loop at the commits that ran, traced on rank 0 of a process group that sends nothing. "
        "`python -m benchmarks.titan` traces them, says what was read where, and keeps the results in "
        "`benchmarks/data`. The torch of those days does not run: 2.13 does, and for runs before July 2024 with what "
        "reductions then took on a stream of their own. Since 2025 runs on one machine were started with expandable "
        "segments, but for `titan-8b-d9bdfbb20-fsdp2`: its script asks for them in `PYTORCH_ALLOC_CONF`, which torch "
        "did not read on that day, 16 October 2025; with them 45.3 GiB would be reserved. Assumed for "
        "`titan-8b-fsdp*` and `titan-8b-d9bdfbb20-fsdp2-64`: that they were started as runs on many machines can be, "
        "which leaves expandable segments off. With them 79.1 GiB would be reserved on 8 GPUs and 64.9 on 128, and "
        "32.1 on 64."
    ),
    LITGPT: (
        "litgpt's model code and step at the commits that ran, with Lightning's Fabric of today, traced. "
        "`python -m benchmarks.litgpt CLONE` takes the code from a clone of its repository, says what was read where, "
        "and keeps the results in `benchmarks/data`. The resource tables (`litgpt-rt-*`) have the longest sample in "
        "the first iteration. There the thread of backward has no workspace of cuBLAS yet, 8.5 MB, which traces give "
        "it as backward begins. In 4 bits products of bitsandbytes kept their inputs as long as the graph, until "
        "0.43.2; that is stated anew. The tables name a commit of 16 October 2023 and were added "
        "eleven days later, when Llama's norm was computed in float32: its rows, which show that, are traced with it. "
        "Of the other runs (`litgpt-hub-*`) the batch before the longest is taken to be as long, which in 4 bits "
        "matters: its graph is still held."
    ),
    TORCHTUNE: (
        "Llama 3.2 3B with packed samples: torchtune's model code at the commit that published the table, its recipe's "
        "step and what compiled flex_attention keeps, stated anew. Its statistic is of active bytes, which on one "
        "stream are those allocated. `python -m benchmarks.torchtune CLONE` traces it, says what was read where, and "
        "keeps the result in `benchmarks/data`. The rows below it in that table were compiled, the one above had "
        "samples of lengths that are not published."
    ),
    TRACED: (
        "Llama-3.2-3B on one L40S. The versions behind each error are those that were traced: those of the run, except "
        "where its peft was another."
    ),
    SCRIPTED: (
        "What sources measured in scripts of their own, which are no jobs: encoders without a head (T4, second step), "
        "a head with its loss, or the loss alone (A100; gradients kept from step to step; one on a card that is not "
        "named), BERT large with a head for classification in the Trainer of January 2022 (V100, torch 1.10; device is "
        "what is reserved, the CUDA context that the source prints, and cuBLAS's own workspaces), and GPT-2 in code of "
        "its own. Each step is stated anew (`benchmarks/scripts.py`, `bert_2022.py` and `gpt_from_scratch.py`), "
        "`python -m benchmarks.trace_cases` traces them. Nothing was found for what the classifier holds beyond the "
        "replay in float16 with a batch of 4: 19 MiB per block, while its run with checkpoints, and all runs in "
        "float32, are within 0.6 %. In the first row 1.5 GiB are scores that softmax kept for backward before torch "
        "1.11."
    ),
    RECORDED: "Made by `memplan record`, and kept in `benchmarks/data/records/`; the peaks are those of the steps.",
}


def render(
    cases: Sequence[Case],
    rows: Sequence[Row],
    needs: Sequence[NeedRow],
    ablations: Sequence[Ablation],
    unstated: Sequence[Unstated] = (),
) -> str:
    """The whole page."""
    parts = [HEAD, summary_section(cases, rows), traced_section(rows), standing_section(rows)]
    parts += [need_section(needs), outside_section(needs), _by_source(rows)]
    parts += [_ablations(ablations), miss_section(rows)]
    parts += group_sections(rows)
    parts += [unstated_section(unstated, table), _unsupported(cases)]
    return "\n".join(parts)


def _figures(errors: Sequence[float]) -> list[str]:
    summary = summarize(errors)
    return [
        str(summary.count),
        f"{summary.median:.2%}",
        f"{summary.p90:.2%}",
        f"{summary.worst:+.2%}",
        str(summary.too_low),
    ]


FIGURES = ("rows", "median", "90th percentile", "worst", "too low")


def _grouped(
    rows: Iterable[Row], key: Callable[[Row], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[float]]:
    grouped: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        grouped.setdefault(key(row), []).append(row.error)
    return dict(sorted(grouped.items()))


def summary_section(cases: Sequence[Case], rows: Sequence[Row]) -> str:
    """How far off, by group and statistic."""
    published = [case for case in cases if not case.is_recorded]
    planned = sum(bool(case.fields) for case in published)
    scripts = sum(bool(case.script) for case in published)
    titan, litgpt, torchtune = (
        len({row.case.id for row in rows if row.group == group}) for group in (TITAN, LITGPT, TORCHTUNE)
    )
    grouped = _grouped(rows, lambda row: (GROUPS.index(row.group), row.measured.statistic))
    lines = [[GROUPS[group], statistic, *_figures(errors)] for (group, statistic), errors in grouped.items()]
    return (
        f"## In short\n\n{planned} of {len(published)} published runs can be planned, {scripts} more are traced as "
        f"scripts, {titan} with torchtitan's model code, {litgpt} with litgpt's and {torchtune} with torchtune's; the "
        "reasons for the others are at the end.\n\n"
        f"{table(('group', 'statistic', *FIGURES), lines, len(FIGURES))}\n"
        "Allocated bytes are what a job's tensors take, and what a plan is judged by. Reserved bytes and what the "
        "driver shows hold the allocator's cache as well: what is in it depends on the order of requests since the "
        "start, on lengths that vary and on the allocator of that version, and no need includes it.\n"
    )


def _by_source(rows: Sequence[Row]) -> str:
    grouped = _grouped(
        rows, lambda row: (row.case.source, _kind(row), row.case.gpus, row.measured.statistic, row.engine)
    )
    lines = [
        [source, method, str(gpus), statistic, engine, *_figures(errors)]
        for (source, method, gpus, statistic, engine), errors in grouped.items()
    ]
    header = ("source", "method", "GPUs", "statistic", "engine", *FIGURES)
    return f"## By source, method, statistic and engine\n\n{table(header, lines, len(FIGURES))}"


def _kind(row: Row) -> str:
    if row.case.script:
        return str(row.case.script["step"])
    return row.case.method if row.case.method in ("full", "lora", "qlora", "npt") else "other adapters"


def traced_section(rows: Sequence[Row]) -> str:
    """peft's comparison: how many runs could be traced, how far off, and why others could not."""
    traced = [row for row in rows if row.group == TRACED]
    runs = load_runs()
    sizes = sorted(abs(row.error) for row in traced)
    missing = Counter(run.method for run in runs if run.method in NOT_TRACED)
    lines = [[method, NOT_TRACED[method], str(count)] for method, count in sorted(missing.items())]
    within = ", ".join(f"{sum(size <= limit for size in sizes)} within {limit:.2%}" for limit in WITHIN)
    return (
        f"## peft's comparison of adapters, traced\n\n{len(traced)} of the {len(runs)} runs that peft publishes for "
        "MetaMathQA (Llama-3.2-3B on one L40S) are traced: its training loop, its adapters and torch's AdamW on "
        "tensors without memory, and the peak that the allocator then reserves. "
        f"Median {summarize([row.error for row in traced]).median:.2%}; {within}. "
        "`python -m benchmarks.peft_table` traces them again; `benchmarks/data/peft_traced.json` keeps the results "
        "with their versions.\n\n"
        f"Assumed: the longest batch has {LONGEST} tokens (fitted to `peft-mm-lora--rank32` alone), the one before it "
        f"{BEFORE}; it meets an empty cache, since the loop empties it every 10 steps; weights are cut from the one "
        "block that `from_pretrained` takes and frees first; the steps between are left out, and evaluation too. "
        "The result of full fine-tuning depends on the lengths before. Why prefix tuning takes more was not found.\n\n"
        f"{table(('method', 'why it is not traced', 'runs'), lines, 1)}"
    )


WITHIN = (0.0005, 0.001, 0.002, 0.0035)


def standing_section(rows: Sequence[Row]) -> str:
    """Complete cases of sources of high trust, beside what this project asks of itself."""
    complete = [row for row in rows if row.case.trust == "high" and not row.case.completeness]
    lines = []
    for statistic, scripts in product(("allocated", "reserved"), (False, True)):
        found = [
            row
            for row in complete
            if row.measured.statistic == statistic and bool(row.case.script) is scripts
        ]
        if found:
            summary = summarize([row.error for row in found])
            below = sum(row.error < 0 for row in found)
            counts = (below, sum(_is_below_rounding(row) for row in found), summary.too_low)
            shares = [f"{count / len(found):.0%}" for count in counts]
            figures = (f"{summary.median:.2%}", f"{summary.worst:+.2%}", *shares)
            lines.append([f"{statistic}, scripts" if scripts else statistic, str(summary.count), *figures])
    header = ("statistic", "rows", "median", "worst", "below", "below beyond rounding", "too low")
    return (
        "## Complete cases of high trust\n\nAsked for: a median of at most 1 %, a worst of at most 8 %, and reserved "
        "memory predicted below the measurement in at most 5 % of the rows. Below at all, below by more than the last "
        "digit that the source prints, and below by more than 0.5 %:\n\n"
        f"{table(header, lines, 6)}\n{_standing_note(rows)}"
    )


def _standing_note(rows: Sequence[Row]) -> str:
    traced = load_traced_cases()["cases"]
    lines = []
    for row in rows:
        if row.case.script and row.measured.statistic == "reserved" and not row.case.completeness:
            orders = (traced[row.case.id][which] for which in (LOWEST, HIGHEST))
            beside = (predicted - row.measured.bytes for predicted in (row.predicted_bytes, *orders))
            lines.append([f"`{row.case.id}`", *(f"{num_bytes / MiB:+.1f}" for num_bytes in beside)])
    return fsdp1_note(rows) + (
        "Reserved memory of GPT-2 on a T4 (torch 2.11) is right to the byte: products with a bias run in cuBLASLt, for "
        "which torch 2.9 to 2.11 keeps 1 MiB beside cuBLAS's workspace, in a segment of 2 MiB. Without it the "
        "larger of the two would lack that segment.\n\n"
        "Scripts, which are no jobs, are counted apart. Of free blocks of one size torch takes that at the lowest "
        "address. Scripts are replayed with addresses as the driver gives them (`benchmarks/drivers_order.py`): of "
        "ranges of 32 MiB, each below the one before; jobs with addresses that count upwards. The encoders ran in one "
        "process behind other models, which is replayed as a whole (`benchmarks/one_process.py`): with 512 tokens what "
        "is allocated is right to the byte too. MiB beside the measurement, as predicted and, of the step in a process "
        f"of its own, over {NUM_ORDERS} orders of the segments' addresses:\n\n"
        f"{table(('run', 'predicted', 'lowest', 'highest'), lines, 3)}"
    )


def _is_below_rounding(row: Row) -> bool:
    return row.measured.bytes - row.predicted_bytes > row.measured.rounding_bytes


def _ablations(ablations: Sequence[Ablation]) -> str:
    lines = [
        [
            ablation.fact,
            str(ablation.runs),
            f"{ablation.median:.2%}",
            f"{ablation.median_without:.2%}",
            f"{ablation.worst:.2%}",
            f"{ablation.worst_without:.2%}",
        ]
        for ablation in ablations
    ]
    header = ("fact", "runs", "median", "median without", "worst", "worst without")
    return (
        "## What each fact about the software is worth\n\n"
        "Absolute errors of the allocated peak on the runs whose peak it changes, and on the same runs planned without "
        "it.\n\n"
        f"{table(header, lines, 5)}"
    )


def miss_section(rows: Sequence[Row]) -> str:
    """Errors beyond MISS, by cause."""
    missed = [row for row in rows if abs(row.error) > MISS]
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in missed:
        grouped.setdefault((row.measured.statistic, row.cause or "not looked into"), []).append(row)
    lines = []
    for (statistic, cause), found in sorted(grouped.items()):
        errors = [row.error for row in found]
        lines.append([statistic, cause, str(len(found)), f"{min(errors):+.1%}", f"{max(errors):+.1%}"])
    text = f"## Misses beyond {MISS:.0%}\n\n"
    return text + table(("statistic", "cause", "rows", "lowest", "highest"), lines, 3)


def group_sections(rows: Sequence[Row]) -> list[str]:
    """A section for each group that has rows."""
    return [group_section(group, rows) for group in GROUPS if any(row.group == group for row in rows)]


def group_section(group: str, rows: Sequence[Row]) -> str:
    """Every row of a group."""
    lines = [
        [
            f"`{row.case.id}`",
            row.case.trust,
            row.measured.statistic if row.measured.statistic != END else "allocated, end",
            f"{row.measured.bytes / GiB:.3f}",
            f"{row.predicted_bytes / GiB:.3f}",
            f"{row.error:+.2%}",
        ]
        for row in rows
        if row.group == group
    ]
    header = ("run", "trust", "statistic", "measured GiB", "predicted GiB", "error")
    note = GROUP_NOTES[group] + (_left_for_nccl(rows) if group == SHARDED else "")
    return f"## Rows: {group}\n\n{note}\n\n{table(header, lines, 3)}"


def _left_for_nccl(rows: Sequence[Row]) -> str:
    """What NCCL would have to hold for the device rows to be right, by number of GPUs."""
    left: dict[int, list[float]] = {}
    for row in rows:
        if row.group == SHARDED and row.measured.statistic == "device":
            held = row.measured.bytes - row.predicted_bytes + NCCL_BYTES
            left.setdefault(row.case.gpus, []).append(held / GiB)
    if any(len(found) < 4 for found in left.values()):
        return ""
    spreads = []
    for gpus, found in sorted(left.items()):
        low, middle, high = quantiles(found, n=4)
        spreads.append(f"{middle:.2f} GiB on {gpus} GPUs (half of the runs between {low:.2f} and {high:.2f})")
    return (
        f" Of the driver's figure NCCL is a constant, {NCCL_BYTES / GiB:.2f} GiB. For these rows to be right it would "
        f"have to be {' and '.join(spreads)}. Its buffers depend on channels, peers and protocols, which one model's "
        "runs on as many GPUs share, and those differ by as much: it is the allocator's cache that varies, and no "
        "formula for NCCL can be told from it."
    )


def _unsupported(cases: Sequence[Case]) -> str:
    counted = Counter(case.unsupported for case in cases if case.unsupported)
    lines = [[reason, str(count)] for reason, count in counted.most_common()]
    return f"## Runs that cannot be planned\n\n{table(('reason', 'runs'), lines, 1)}"
