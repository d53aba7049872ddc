"""The formats for machines and for CI."""

import json
from dataclasses import replace

import pytest
from handmade import make_capacity, make_change, make_result

from memplan.fit.frontier import Frontier
from memplan.preflight.verdict import judge
from memplan.render.github import annotation, annotation_lines, outputs, write_files
from memplan.render.json import dump, report_object
from memplan.render.markdown import report_markdown, table
from memplan.render.report import Report
from memplan.units import GiB


def make_report(usable_gib=None, **fields):
    """A report about the made result, on a card where one is given."""
    result = make_result(**fields.pop("result", {}))
    if usable_gib is not None:
        capacity = make_capacity(usable_gib)
        result = replace(result, capacity=capacity, verdict=judge(result, capacity))
    return Report(
        result, **{"command": "estimate", "job_words": "job.yaml", "job_path": "job.yaml", **fields}
    )


def test_json_has_the_same_keys_whatever_was_asked():
    """A script can read `verdict` or `changes` without asking which flags were given."""
    plain = report_object(make_report())
    full = report_object(
        make_report(
            24,
            result={"changes": (make_change(),)},
            frontier=Frontier("max_seq_len", 64, GiB, GiB, "capacity"),
        )
    )

    assert list(plain) == list(full)
    assert plain["verdict"] is None and full["verdict"]["state"] == "fits"
    assert plain["frontier"] is None and full["frontier"]["value"] == 64


def test_json_survives_a_round_trip_with_integers():
    """Bytes are integers and stay so; the text is ASCII, whatever the names hold."""
    job = replace(make_result().job, model="modèle")
    text = dump(report_object(make_report(24, result={"job": job})))
    read = json.loads(text)

    assert text.isascii() and text.endswith("\n")
    assert 1 == read["schema_version"]
    assert isinstance(read["need_bytes"], int) and read["need_bytes"] == 23 * GiB
    assert "modèle" == read["job"]["model"]


@pytest.mark.parametrize(
    ("message", "escaped"),
    [("a\nb", "a%0Ab"), ("a\r\nb", "a%0D%0Ab"), ("100%", "100%25"), ("%0A", "%250A"), ("a:b,c", "a:b,c")],
)
def test_annotation_messages_are_escaped(message, escaped):
    """A line break would end the command, a per cent sign would start an escape."""
    assert f"::error::{escaped}" == annotation("error", message)


def test_annotation_properties_are_escaped_further():
    """In a property, colon and comma would end it too."""
    assert "::warning file=a%2Cb%3Ac.yaml,title=memplan::x" == annotation(
        "warning", "x", file="a,b:c.yaml", title="memplan"
    )


@pytest.mark.parametrize(
    ("usable_gib", "level"), [(24, "notice"), (23.2, "warning"), (20, "error"), (None, "notice")]
)
def test_the_level_follows_the_verdict(usable_gib, level):
    """Only what does not fit is an error."""
    assert annotation_lines(make_report(usable_gib)).startswith(
        f"::{level} file=job.yaml,title=memplan estimate::"
    )


def test_annotations_carry_change_and_warnings_one_per_line():
    """The smallest change is in the first annotation, each warning is one of its own."""
    report = make_report(
        20, result={"changes": (make_change(),), "warnings": ("first\nsecond [a-lint]", "third")}
    )
    lines = annotation_lines(report).splitlines()

    assert ["::error", "::warning", "::notice"] == [line.split(" ")[0] for line in lines]
    assert "%0Asmallest change: recompute every block in backward" in lines[0]
    assert lines[1].endswith("first%0Asecond [a-lint]")


def test_a_job_without_a_file_has_no_file_property():
    """A job by name or by flags points nowhere."""
    assert annotation_lines(make_report(24, job_path=None)).startswith("::notice title=")


def test_summary_and_outputs_go_to_the_files_that_the_runner_names(tmp_path):
    """What is there is kept: other steps have written before."""
    summary, output = tmp_path / "summary.md", tmp_path / "output"
    summary.write_text("earlier\n")
    output.write_text("a=b\n")

    write_files(make_report(24), {"GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(output)})

    assert summary.read_text().startswith("earlier\n### memplan estimate: ✅ fits")
    assert output.read_text().startswith("a=b\nverdict=fits\n")


def test_without_a_runner_nothing_is_written(tmp_path, monkeypatch):
    """The format can be tried on any machine."""
    monkeypatch.chdir(tmp_path)
    write_files(make_report(24), {"GITHUB_OUTPUT": ""})

    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("usable_gib", "fits", "headroom"),
    [(24, "true", "1024"), (23.2, "true", "204"), (20, "false", "-3072"), (None, "", "")],
)
def test_outputs_are_plain_values(usable_gib, fits, headroom):
    """A later step compares them as text; headroom is rounded down, need up."""
    found = outputs(make_report(usable_gib))

    assert (fits, headroom) == (found["fits"], found["headroom-mib"])
    assert str(23 * 1024) == found["need-mib"]
    assert all("\n" not in value for value in found.values())


def test_markdown_leads_with_the_verdict_and_folds_the_rest():
    """The headline is what a reviewer sees; the breakdown opens on demand."""
    text = report_markdown(make_report(20))
    head, folded = text.split("<details>")

    assert head.startswith("### memplan estimate: ❌ does not fit")
    assert "needs 23.00 GiB, 3.00 GiB more than" in head
    assert "| weights | 12.50 | 12.50 | 12.50 | 12.50 |" in folded
    assert "| 0.98 | `lm_head: logits` | [2, 4096, 32000] float32 | logits and loss |" in folded


def test_markdown_lists_changes_with_what_to_paste():
    """Changes are a table, smallest first; the pipe of no cell breaks it."""
    change = make_change(summary="a | b", set={"max_seq_len": 2048})
    text = report_markdown(make_report(20, result={"changes": (change,)}, truncations={2048: (12, 3400)}))

    assert "| a \\| b | 18.00 | 6.00 | x 1.33 | slower, truncates 12 of 3,400 samples |" in text
    assert "`--set max_seq_len=2048`" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [((), "Nothing that memplan knows"), ((make_change(set={}),), "Nothing to change")],
)
def test_markdown_says_when_there_is_no_change(changes, words):
    """Neither case is an empty table."""
    assert words in report_markdown(make_report(20, result={"changes": changes}))


def test_markdown_shows_the_frontier():
    """`fit --maximize` in CI."""
    found = Frontier("max_seq_len", 6144, GiB, GiB, "capacity")

    assert "Largest `max_seq_len` that fits: **6144**" in report_markdown(make_report(24, frontier=found))


def test_tables_align_numbers():
    """Right-aligned columns say so in the rule below the header."""
    assert "| a | b |\n| --- | ---: |\n| x | 1 |" == table(("a", "b"), [("x", "1")], right=(1,))
