"""The first screen for people: does it fit, where the bytes are, when, and what they are."""

from __future__ import annotations

from memplan.budget.result import Host, Result
from memplan.render.screen import Screen, Segment, clip, columns, gib
from memplan.render.timeline import draw_timeline, in_reach
from memplan.render.words import (
    CATEGORY_NAMES,
    PHASE_NAMES,
    STATE_STYLES,
    band,
    categories_in,
    category_bytes,
    headline,
    is_lint,
    job_phrase,
    peak_moment,
    tensor_phrase,
    worst_phases,
)
from memplan.units import format_bytes

_TOP_TENSORS = 8


def estimate_screen(screen: Screen, result: Result) -> None:
    """Write everything about one estimate: headline, phases, totals, timeline, largest tensors, warnings."""
    verdict_lines(screen, result)
    phase_table(screen, result)
    totals(screen, result)
    timeline(screen, result)
    top_tensors(screen, result)
    warnings(screen, result.warnings)


def verdict_lines(screen: Screen, result: Result) -> None:
    """The headline, and below it when and where the peak is."""
    state, sentence = headline(result)
    style = STATE_STYLES[result.verdict.state] if result.verdict else "bold"
    joint = ": " if result.verdict else " "
    screen.line((state, style), joint + sentence)
    screen.line(f"  peak {peak_moment(result.peak)}: {clip(result.peak.where, screen.width - 40)}")
    screen.line(("  " + band(result), "dim"))
    if result.capacity is not None:
        paragraph(screen, ("capacity:", "dim"), result.capacity.source, indent="  ")
    if result.job is not None:
        paragraph(screen, ("job:", "dim"), job_phrase(result.job), indent="  ")


def phase_table(screen: Screen, result: Result) -> None:
    """
    Categories by phase in GiB; each column is the highest moment of its phase, so columns add up downwards
    only.
    """
    phases = worst_phases(result)
    if not phases:
        return
    header = ["GiB", *(PHASE_NAMES.get(phase.phase, phase.phase) for phase in phases)]
    rows = [header]
    for category in categories_in(phases):
        cells = [gib(category_bytes(phase, category)) for phase in phases]
        rows.append([CATEGORY_NAMES.get(category, category), *cells])
    rows.append(["allocated", *(gib(phase.allocated_peak_bytes) for phase in phases)])
    rows.append(["reserved", *(gib(phase.reserved_bytes) for phase in phases)])
    lines = columns(rows, right=range(1, len(header)), gap=3)
    screen.line()
    screen.line((lines[0], "bold"))
    for line in lines[1:-2]:
        screen.line(line)
    screen.line((lines[-2], "bold"))
    screen.line(lines[-1])


def totals(screen: Screen, result: Result) -> None:
    """The numbers that answer different questions, each with its question."""
    peak = result.peak
    what = "job completes" if result.job is not None else "recording would have completed"
    if result.engine["name"] == "trace" and result.job is None:
        what = "step completes"
    rows = [
        ["need", format_bytes(result.need_bytes), f"smallest memory in which this {what}, per GPU"],
        ["allocated", format_bytes(peak.allocated_bytes), "live tensors at the peak"],
        ["reserved", format_bytes(peak.reserved_bytes), "what torch keeps, with room to spare"],
        ["non-torch", format_bytes(peak.non_torch_bytes), "CUDA context and libraries"],
        ["device", format_bytes(peak.device_bytes), "what nvidia-smi shows, with room to spare"],
    ]
    if result.host is not None:
        rows.append(["host RAM", format_bytes(result.host.peak_bytes), _of_host(result.host)])
    if result.parameters is not None:
        total, trainable = result.parameters.total, result.parameters.trainable
        share = 100 * trainable / max(total, 1)
        rows.append(["parameters", f"{total:,}", f"{trainable:,} trainable ({share:.2f} %)"])
    screen.line()
    for line in columns(rows, right=[1]):
        screen.line(line)


def _of_host(host: Host) -> str:
    """What the RAM is of, where loading takes most, and what the files take beside it."""
    loading = [line for line in host.budget if line.category == "loading" and line.bytes == host.peak_bytes]
    what = f"while it loads: {loading[0].note}" if loading and loading[0].note else "loading included"
    cache = host.page_cache_bytes
    return f"per node, {what}" + (
        f"; besides, files of {format_bytes(cache)} in the page cache" if cache else ""
    )


def timeline(screen: Screen, result: Result) -> None:
    """Live bytes over loading and the steps, with the capacity where it is in reach of the curve."""
    limit_bytes = None
    if result.capacity is not None:
        limit_bytes = result.capacity.usable_bytes - result.peak.non_torch_bytes
    lines = draw_timeline(
        result.timeline, width=screen.width, unicode=screen.unicode, limit_bytes=limit_bytes
    )
    if not lines:
        return
    note = ""
    if limit_bytes is not None and in_reach(result.timeline, limit_bytes):
        note = "; dashes: what the GPU leaves for them"
    screen.line()
    screen.line((f"live tensors in GiB over time{note}", "bold"))
    for line in lines:
        screen.line((line, "cyan"))


def top_tensors(screen: Screen, result: Result) -> None:
    """The largest single tensors alive at the peak."""
    if not result.top:
        return
    rows = [["GiB", "tensor at the peak", "shape", "category"]]
    for tensor in result.top[:_TOP_TENSORS]:
        category = CATEGORY_NAMES.get(tensor.category, tensor.category)
        rows.append([gib(tensor.bytes), tensor.where, tensor_phrase(tensor), category])
    room = screen.width - 6 - sum(max(len(row[index]) for row in rows) for index in (0, 2, 3))
    lines = columns([[row[0], clip(row[1], max(room, 20)), *row[2:]] for row in rows], right=[0])
    screen.line()
    screen.line((lines[0], "bold"))
    for line in lines[1:]:
        screen.line(line)


def warnings(screen: Screen, messages: tuple[str, ...]) -> None:
    """Lints as warnings, and silent defaults worth knowing as notes, a paragraph each."""
    if messages:
        screen.line()
    for message in messages:
        label = ("warning:", "bold yellow") if is_lint(message) else ("note:", "bold")
        paragraph(screen, label, message)


def paragraph(screen: Screen, label: Segment, text: str, *, indent: str = "") -> None:
    """
    `text` after `label`, wrapped to the screen; continuation lines are two spaces further in than `indent`.
    """
    import textwrap

    head = label if isinstance(label, str) else label[0]
    lines = textwrap.wrap(
        f"{head} {text}", screen.width - len(indent), subsequent_indent="  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    first, *rest = [indent + line for line in lines or [head]]
    screen.line(indent, label, first[len(indent) + len(head) :])
    for line in rest:
        screen.line(line)
