"""
Predicted against published memory. `python -m benchmarks.accuracy`

Writes docs/accuracy.md and src/memplan/profiles/accuracy.json; takes half a minute.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import bands
from benchmarks.ablation import ablate
from benchmarks.compare import GROUPS, PEAKS, Row, compare, compare_need
from benchmarks.published import load_published
from benchmarks.report import render
from benchmarks.summary import summarize

REPORT = Path(__file__).parent.parent / bands.REPORT


def main() -> None:
    """Compare every case, print the summary, write both files."""
    cases = load_published()
    rows = [row for case in cases for row in compare(case)]
    needs = [need for case in cases if (need := compare_need(case)) is not None]
    print(f"{'group':40}{'statistic':12}{'rows':>5}{'median':>9}{'p90':>9}{'worst':>10}")
    for group in GROUPS:
        for statistic in PEAKS:
            _print_line(group, statistic, rows)
    planned = sum(bool(case.fields) for case in cases)
    print(f"\n{len(cases)} published cases, {planned} planned, {len(cases) - planned} not")
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(render(cases, rows, needs, ablate(rows)), encoding="utf-8")
    bands.FILE.write_text(bands.dump_bands(bands.error_bands(rows, needs)), encoding="utf-8")
    for path in (REPORT, bands.FILE):
        print(f"wrote {path.relative_to(REPORT.parent.parent)}")


def _print_line(group: str, statistic: str, rows: list[Row]) -> None:
    errors = [row.error for row in rows if row.group == group and row.measured.statistic == statistic]
    if errors:
        summary = summarize(errors)
        print(
            f"{group:40}{statistic:12}{summary.count:5}{summary.median:9.2%}{summary.p90:9.2%}{summary.worst:+10.2%}"
        )


if __name__ == "__main__":
    main()
