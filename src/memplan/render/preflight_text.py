"""`memplan preflight` for people."""

from __future__ import annotations

from memplan.preflight.live import LiveCheck, process_words
from memplan.render.report import Report
from memplan.render.screen import Screen, Segment
from memplan.render.text import paragraph, verdict_lines, warnings
from memplan.units import format_bytes


def preflight_screen(screen: Screen, report: Report) -> None:
    """Write the verdict, then what was checked, one line each, then the warnings."""
    found = report.preflight
    assert found is not None
    verdict_lines(screen, found.result)
    screen.line()
    for label, sentence in check_lines(report):
        paragraph(screen, (f"{label}:", "bold"), sentence)
        if label == "live check":
            for process in found.live.processes:
                screen.line(f"  {process_words(process)}")
    warnings(screen, found.result.warnings)
    hint = hint_line(report)
    if hint is not None:
        screen.line()
        screen.line(*hint)


def check_lines(report: Report) -> list[tuple[str, str]]:
    """(what was checked, what was found) in sentences."""
    found = report.preflight
    assert found is not None
    disk = found.disk
    variables = " ".join(f"{name}={value}" for name, value in found.environment.variables.items())
    room = "enough" if disk.is_enough else "not enough"
    lines = [
        ("live check", live_sentence(found.live)),
        ("allocator", f"`memplan env` sets {variables}" if variables else "nothing to set"),
        (
            "disk",
            f"{room}: the run keeps up to {format_bytes(disk.needed_bytes)} "
            f"({disk.num_checkpoints} x {format_bytes(disk.checkpoint_bytes)} of checkpoints), "
            f"{format_bytes(disk.free_bytes)} are free in {disk.path}",
        ),
    ]
    if found.capacity is None:
        lines.insert(
            1, ("capacity", "not checked: name a card with `--gpu 24GB` or run this where the GPU is")
        )
    return lines


def live_sentence(live: LiveCheck) -> str:
    """What a reading of the card says; never that nobody else is there when they may be out of sight."""
    if live.skipped is not None:
        return f"skipped ({live.skipped})"
    others = live.used_by_others_bytes or 0
    sentence = (
        f"{live.gpu} has {format_bytes(live.free_bytes or 0)} of {format_bytes(live.total_bytes or 0)} free; "
    )
    if others:
        sentence += f"others hold {format_bytes(others)}"
    else:
        sentence += "nobody else is on it" if live.processes_complete else "no other process is in sight"
    if live.waited_seconds:
        sentence += f"; waited {live.waited_seconds:.0f} s"
    return sentence


def hint_line(report: Report) -> tuple[Segment, ...] | None:
    """What to do when it does not fit: wait for others where they are the reason, else change the job."""
    found = report.preflight
    assert found is not None
    if not found.disk.is_enough:
        return (("hint: ", "bold"), "free some disk, or set `train.output_dir` to where there is room")
    if found.verdict is None or found.verdict.state != "does_not_fit" or found.capacity is None:
        return None
    held = found.capacity.used_by_others_bytes
    if held and found.result.need_bytes <= found.capacity.usable_bytes + held:
        return (
            ("hint: ", "bold"),
            "it would fit without the others; "
            f"`memplan preflight {report.job_words} --wait 10m` waits until they are gone",
        )
    return (("hint: ", "bold"), f"`memplan fit {report.job_words}` finds the smallest change that fits")
