"""A tape written as a snapshot: what the viewer and torch's own tools make of it."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from snapshot_tapes import SETTINGS, settings, small_tape, written_tapes
from snapshot_viewer import follow_trace, unreadable_opcodes

from memplan.allocator import replay
from memplan.errors import SnapshotError
from memplan.snapshot import snapshot_of, write_snapshot
from memplan.tape.tape import FlatTape, Storage, Tape
from memplan.units import MiB

FEW = hypothesis_settings(max_examples=25)


@FEW
@given(written_tapes(), settings, st.none() | st.integers(1, 200))
def test_the_trace_leads_to_the_segments(written, allocator, limit_mib):
    """From nothing, entry by entry, to exactly the segments and blocks at the end; also on a card that is full."""
    limit = None if limit_mib is None else limit_mib * MiB
    snapshot = snapshot_of(written, allocator, limit_bytes=limit)
    [trace] = snapshot["device_traces"]
    memory, live = follow_trace(trace)

    assert memory == sorted((segment["address"], segment["total_size"]) for segment in snapshot["segments"])
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    kept = [block for block in blocks if block["state"] == "active_allocated"]
    assert live == {block["address"]: block["requested_size"] for block in kept}
    for segment in snapshot["segments"]:
        address = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == address and block["requested_size"] <= block["size"]
            address += block["size"]
        assert address == segment["address"] + segment["total_size"]
        held = [block for block in segment["blocks"] if block["state"] == "active_allocated"]
        assert segment["allocated_size"] == segment["active_size"] == sum(block["size"] for block in held)
        assert segment["requested_size"] == sum(block["requested_size"] for block in held)


@FEW
@given(written_tapes(), settings)
def test_every_event_appears(written, allocator):
    """Allocations and frees in the order of the tape, with the bytes and streams that were asked for."""
    tape = written.flatten()
    [trace] = snapshot_of(written, allocator)["device_traces"]
    moves = [entry for entry in trace if entry["action"] in ("alloc", "free_completed")]

    assert [
        ("alloc" if event > 0 else "free_completed", tape.sizes[abs(event)], tape.streams.get(abs(event), 0))
        for event in tape.events
    ] == [(entry["action"], entry["size"], entry["stream"]) for entry in moves]
    end = replay(tape.events, tape.sizes, tape.streams, allocator)
    segments = snapshot_of(written, allocator)["segments"]
    assert end.reserved_bytes == sum(segment["total_size"] for segment in segments)
    assert end.allocated_bytes == sum(segment["allocated_size"] for segment in segments)


@FEW
@given(written_tapes(), settings)
def test_the_viewer_can_load_it(written, allocator):
    """Plain data in its dialect of pickle, events that are objects of their own, and the category it asks for."""
    snapshot = snapshot_of(written, allocator)
    data = pickle.dumps(snapshot, 4)
    [trace] = pickle.loads(data)["device_traces"]

    assert set() == unreadable_opcodes(data)
    assert len(trace) == len({id(entry) for entry in trace})
    assert not trace or "unknown" in {entry.get("category") for entry in trace}
    assert all(entry["frames"] for entry in trace)
    assert all(0 < entry["addr"] < 2**53 for entry in trace)


def test_the_check_of_opcodes_can_fail():
    """Classes and other protocols are told apart."""
    assert {"STACK_GLOBAL", "REDUCE"} <= unreadable_opcodes(pickle.dumps(complex(1, 2), 4))


def test_a_tooltip_names_the_tensor_its_category_and_its_phase():
    """The viewer prints `filename:line:name` of each frame."""
    [trace] = snapshot_of(small_tape(), SETTINGS[0])["device_traces"]
    [entry] = [entry for entry in trace if entry["frames"][0]["name"] == "lm_head logits"][:1]
    lines = [f"{frame['filename']}:{frame['line']}:{frame['name']}" for frame in entry["frames"]]

    assert ["float32 [96, 262144]:0:lm_head logits", "category:0:logits_loss", "step:1:forward"] == lines
    assert ("logits_loss", "forward of step 1") == (entry["category"], entry["user_metadata"])


def test_expandable_segments_are_mapped_and_others_allocated():
    """Each kind of segment has events of its own."""

    def kinds(allocator):
        [trace] = snapshot_of(small_tape(), allocator)["device_traces"]
        return {entry["action"] for entry in trace if entry["action"].startswith("segment")}

    assert ({"segment_alloc"}, {"segment_map"}) == (kinds(SETTINGS[0]), kinds(SETTINGS[1]))


@pytest.mark.parametrize("allocator", SETTINGS[:2], ids=["classic", "expandable"])
def test_a_card_that_is_full_gives_back_and_then_fails(allocator):
    """Cached segments go back to the driver in the trace; where that is not enough, it ends with `oom`."""
    tape = Tape([1, -1, 2, 3], [0, 40 * MiB, 40 * MiB, 30 * MiB], [], {2: 7, 3: 7})
    written = FlatTape(tape, [Storage(size, "weights", "w", None, None) for size in tape.sizes[1:]])
    snapshot = snapshot_of(written, allocator, limit_bytes=60 * MiB)
    [trace] = snapshot["device_traces"]
    actions = [entry["action"] for entry in trace]

    given_back = "segment_unmap" if allocator.expandable_segments else "segment_free"
    first, second = [index for index, action in enumerate(actions) if action == "alloc"]
    assert given_back in actions[first:second]
    assert "oom" == actions[-1]
    assert (30 * MiB, 20 * MiB) == (trace[-1]["size"], trace[-1]["device_free"])


def test_storages_without_bytes_are_left_out():
    """As in torch, where they have no address; phases keep their places."""
    written = small_tape()
    tape = written.tape
    tape.events.insert(0, len(tape.sizes))
    tape.sizes.append(0)
    tape.marks[1:] = [type(mark)(mark.event + 1, mark.phase, mark.step) for mark in tape.marks[1:]]
    padded = FlatTape(tape, [*written.storages, Storage(0, "inputs", "empty", "int64", (0,))])

    assert snapshot_of(small_tape(), SETTINGS[0]) == snapshot_of(padded, SETTINGS[0])


def test_a_file_is_whole_or_absent(tmp_path):
    """What is there stays, unless it may be replaced, and nothing else is left behind."""
    path = tmp_path / "run.pickle"
    write_snapshot(small_tape(), path)
    before = path.read_bytes()
    with pytest.raises(SnapshotError, match="exists already"):
        write_snapshot(small_tape(logits_mib=8), path)
    assert before == path.read_bytes()
    write_snapshot(small_tape(logits_mib=8), path, overwrite=True)

    assert before != path.read_bytes()
    assert [path] == list(tmp_path.iterdir())
    with pytest.raises(SnapshotError, match="cannot be written"):
        write_snapshot(small_tape(), tmp_path / "missing" / "run.pickle")


@pytest.mark.torch
@pytest.mark.parametrize("allocator", SETTINGS, ids=["classic", "expandable", "max_split"])
def test_torchs_own_tools_read_it(allocator, tmp_path, capsys):
    """`python -m torch.cuda._memory_viz`: the totals, the trace, the pages and the comparison."""
    viz = pytest.importorskip("torch.cuda._memory_viz")
    path = tmp_path / "run.pickle"
    write_snapshot(small_tape(), path, allocator)

    def load():
        return pickle.loads(path.read_bytes())

    tape = small_tape().tape
    end = replay(tape.events, tape.sizes, tape.streams, allocator)
    summary = viz.segsum(load())
    assert f"total_reserved: {viz.Bytes(end.reserved_bytes)}" in summary
    assert f"total_allocated: {viz.Bytes(180 * MiB)}" in summary
    text = viz.trace(load())
    assert text.count("\ndel ") == sum(event < 0 for event in tape.events)
    assert f"{len(load()['device_traces'][0])} entries" in text
    for page in (
        viz.trace_plot(load()),
        viz.segment_plot(load()),
        viz.trace_plot(load(), plot_segments=True),
    ):
        assert "snapshot.pickle" in page
    for flamegraph in (viz.memory, viz.segments):
        lines = flamegraph(load(), format_flamegraph=lambda lines: lines)
        assert "step:0:load;category:0:weights;float32 [30, 262144]:0:layers.0.weight" in lines
    empty = snapshot_of(FlatTape(Tape([], [0], []), []), allocator)
    compared = viz.compare(empty["segments"], load()["segments"], format_flamegraph=lambda lines: lines)
    assert "only_after;stream_0;" in compared and "only_before = []" in capsys.readouterr().out
