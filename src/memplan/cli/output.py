"""stdout carries the one requested format; everything else goes to stderr through here."""

from __future__ import annotations

import sys
from collections.abc import Callable

from memplan.render.report import Report
from memplan.render.screen import Screen, screen_for, wants_colour


def write_report(report: Report, output_format: str) -> None:
    """Put a report on stdout; `github` also writes the summary and the outputs of the step."""
    if output_format == "text":
        write_screen(lambda screen: _fill(screen, report))
    elif output_format == "json":
        from memplan.render.json import dump, report_object

        emit(dump(report_object(report)))
    elif output_format == "markdown":
        from memplan.render.markdown import report_markdown

        emit(report_markdown(report))
    else:
        import os

        from memplan.render.github import annotation_lines, write_files

        emit(annotation_lines(report))
        write_files(report, os.environ)


def write_screen(fill: Callable[[Screen], None]) -> None:
    """Lay out a screen and print it, with colour where the terminal takes it."""
    screen = screen_for(sys.stdout)
    fill(screen)
    if wants_colour(sys.stdout):
        screen.coloured(sys.stdout)
    else:
        emit(screen.plain())


def emit(text: str) -> None:
    """Write text to stdout; a reader that has gone is no error, and what its encoding lacks becomes `?`."""
    from memplan.cli.main import silence_stdout

    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()


def note(message: str) -> None:
    """A remark for the person at the terminal, on stderr."""
    print(f"note: {message}", file=sys.stderr)


def _fill(screen: Screen, report: Report) -> None:
    if report.command == "fit":
        from memplan.render.fit_text import fit_screen

        fit_screen(screen, report)
    elif report.command == "preflight":
        from memplan.render.preflight_text import preflight_screen

        preflight_screen(screen, report)
    else:
        from memplan.render.text import estimate_screen

        estimate_screen(screen, report.result)
