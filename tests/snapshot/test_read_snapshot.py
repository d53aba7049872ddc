"""Snapshots read as tapes: memplan's own, those of torch, and files that are neither."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from recordings import TORCH, recording_of
from snapshot_tapes import SETTINGS, settings, small_tape, written_tapes

from memplan.allocator import replay
from memplan.errors import SnapshotError
from memplan.snapshot import read_snapshot, snapshot_of, tape_of, write_snapshot
from memplan.snapshot.frames import name_of
from memplan.tape.tape import Mark, Tape
from memplan.units import MiB

FEW = hypothesis_settings(max_examples=25)


def plain(path, value):
    """A pickle file."""
    path.write_bytes(pickle.dumps(value, 4))
    return path


def live_bytes(tape: Tape) -> list[int]:
    """Bytes alive after each event."""
    return list(accumulate(tape.sizes[event] if event > 0 else -tape.sizes[-event] for event in tape.events))


@FEW
@given(written_tapes(), settings)
def test_what_was_written_is_read(written, allocator):
    """Event for event, with phases, streams and all that is known of each storage."""
    read = tape_of(pickle.loads(pickle.dumps(snapshot_of(written, allocator))))

    assert written.tape == read.tape
    assert written.storages == read.storages
    assert allocator == read.settings
    assert read.planned and () == read.notes


@FEW
@given(written_tapes(), settings, st.data())
def test_a_ring_buffer_loses_no_memory(written, allocator, data):
    """However much of a recording is lost, from its first entry on the same bytes are alive as in the run."""
    whole = recording_of(written, allocator)
    length = len(whole["device_traces"][0])
    drop = data.draw(st.integers(0, length))
    kept = [entry["action"] for entry in whole["device_traces"][0][drop:]]
    read = tape_of(recording_of(written, allocator, drop=drop)).flatten()

    moves = kept.count("alloc") + kept.count("free_completed")
    assert (
        live_bytes(written.tape)[len(written.tape.events) - moves :]
        == live_bytes(read)[len(read.events) - moves :]
    )
    first = read.events[: len(read.events) - moves]
    assert first == list(range(1, len(first) + 1))
    assert ["load"] * bool(first) + ["trace"] * bool(moves) + ["end"] == [mark.phase for mark in read.marks]


@FEW
@given(written_tapes(), settings, st.data())
def test_reserved_bytes_are_those_that_were_recorded(written, allocator, data):
    """Known from the end backwards, also where the beginning is lost."""
    whole = recording_of(written, allocator)
    drop = data.draw(st.integers(0, len(whole["device_traces"][0])))
    end = replay(written.tape.events, written.tape.sizes, written.tape.streams, allocator)
    read = tape_of(recording_of(written, allocator, drop=drop))

    assert end.reserved_bytes == read.reserved[-1][1]
    if not drop:
        assert end.peak_reserved_bytes == read.reserved_peak(0, len(read.tape.events) + 1)


def test_names_come_from_the_innermost_frame_of_the_model():
    """Neither torch's frames nor those of C++; the path from the package on."""
    read = tape_of(recording_of(small_tape(), SETTINGS[0]))

    assert "lm_head logits models/net.py:41" in {storage.where for storage in read.storages}
    assert {"unknown"} == {storage.category for storage in read.storages}
    assert {(None, None)} == {(storage.dtype, storage.shape) for storage in read.storages}


@pytest.mark.parametrize(
    ("frames", "name"),
    [
        ([], "unknown"),
        ([("step", "/home/me/project/optim.py", 3)], "step project/optim.py:3"),
        (
            [("_foreach", f"{TORCH}/optim/adamw.py", 9), ("step", f"{TORCH}/optim/optimizer.py", 5)],
            "_foreach torch/optim/adamw.py:9",
        ),
        ([("malloc", "c10/cuda/CUDACachingAllocator.cpp", 1), ("at::mm", "??", 0)], "malloc"),
        ([("c10::cuda::malloc", "??", 0), ("torch::autograd::mm", "??", 0)], "torch::autograd::mm"),
        ([("unwind::unwind()", "??", 0)], "unknown"),
        ([("f", "C:\\me\\site-packages\\net\\a.py", 4)], "f net\\a.py:4"),
    ],
)
def test_names_where_there_is_little_to_go_by(frames, name):
    """Torch's Python, then C++, then nothing."""
    stack = [{"name": function, "filename": file, "line": line} for function, file, line in frames]

    assert name == name_of(stack)


def test_without_stacks_nothing_has_a_name():
    """No guess is made."""
    read = tape_of(recording_of(small_tape(), SETTINGS[0], frames=False))

    assert {"unknown"} == {storage.where for storage in read.storages}


def test_what_is_older_than_the_recording_has_the_name_of_its_block():
    """Blocks remember who allocated them; what was freed meanwhile does not, and its free is somebody else's."""
    whole = recording_of(small_tape(), SETTINGS[0])
    trace = recording_of(small_tape(), SETTINGS[0], metadata=True)["device_traces"][0]
    drop = 1 + [entry["user_metadata"] for entry in trace].index("backward of step 1")
    read = tape_of({**whole, "device_traces": [whole["device_traces"][0][drop:]]})
    loaded = Counter(storage.where for storage in read.storages[: read.tape.marks[1].event])
    expected = {"layers.0.weight models/net.py:41": 1, "layers.1.weight models/net.py:41": 1, "unknown": 3}

    assert expected == {name: loaded[name] for name in expected}
    assert "are older than the recording" in read.notes[0]


def test_phases_that_the_run_named():
    """`torch.cuda.memory._set_memory_metadata` divides a recording as marks divide a plan."""
    planned = small_tape().tape
    read = tape_of(recording_of(small_tape(), SETTINGS[0], metadata=True))

    assert planned.marks == read.tape.marks
    assert "evaluation" in str(tape_of(renamed("evaluation")).tape.marks)


def renamed(text):
    """A recording of one phase with this name."""
    snapshot = recording_of(small_tape(), SETTINGS[0])
    for entry in snapshot["device_traces"][0]:
        entry["user_metadata"] = text
    return snapshot


def test_an_end_without_a_free_is_a_free():
    """Where no free was recorded, an address that is used again, or is empty at the end, was freed."""
    snapshot = recording_of(small_tape(), SETTINGS[0])
    trace = snapshot["device_traces"][0]
    snapshot["device_traces"] = [[entry for entry in trace if not entry["action"].startswith("free")]]
    read = tape_of(snapshot)

    assert live_bytes(small_tape().tape)[-1] == live_bytes(read.tape)[-1]


@pytest.mark.parametrize(("state", "events"), [("active_pending_free", [1]), ("inactive", [1, -1])])
def test_memory_counts_until_it_can_be_used_again(state, events):
    """What another stream may still read is alive after `free_requested`, unless its block is free at the end."""
    entries = [{"action": action, "addr": 512, "size": 100} for action in ("alloc", "free_requested")]
    block = {"address": 512, "size": 512, "requested_size": 100, "state": state}
    segment = {"device": 0, "address": 512, "total_size": 512, "stream": 0, "blocks": [block]}

    assert events == tape_of({"segments": [segment], "device_traces": [entries]}).tape.events


def test_out_of_memory_is_said():
    """The request that failed, and what was left."""
    snapshot = recording_of(small_tape(), SETTINGS[0])
    oom = {
        "action": "oom",
        "device_free": 5 * MiB,
        "size": 96 * MiB,
        "stream": 0,
        "time_us": 10**6,
        "frames": [],
    }
    snapshot["device_traces"][0].append(oom)

    assert (
        "the run was out of memory: 96.00 MiB were asked for, and the GPU had 5.00 MiB left"
        in tape_of(snapshot).notes
    )


def test_the_fullest_device_is_read_unless_one_is_named():
    """Devices are those with segments or events."""
    small, large = small_tape(logits_mib=8), small_tape()
    both = recording_of(small, SETTINGS[0])
    other = recording_of(large, SETTINGS[0], device=2)
    both["segments"] += other["segments"]
    both["segments"][-1]["total_size"] += 400 * MiB
    both["segments"][-1]["blocks"].append(
        {"size": 400 * MiB, "requested_size": 0, "state": "inactive", "frames": []}
    )
    both["device_traces"] += other["device_traces"][1:]

    assert (2, ("device 2, the fullest of 0, 2",)) == (tape_of(both).device, tape_of(both).notes)
    assert large.tape.events == tape_of(both).tape.events
    assert small.tape.sizes == tape_of(both, device=0).tape.sizes
    with pytest.raises(SnapshotError, match="nothing of device 1"):
        tape_of(both, device=1)


@pytest.mark.parametrize("form", ["no traces", "empty traces", "segments alone", "legacy blocks"])
def test_without_a_trace_there_is_what_is_alive(form):
    """One moment: everything counts as loaded."""
    snapshot = recording_of(small_tape(), SETTINGS[0])
    if form == "no traces":
        del snapshot["device_traces"]
    else:
        snapshot["device_traces"] = []
    if form == "segments alone":
        snapshot = snapshot["segments"]
    if form == "legacy blocks":
        for segment in snapshot["segments"]:
            for block in segment["blocks"]:
                del block["address"]
                block["history"] = [{"real_size": block.pop("requested_size"), "frames": block.pop("frames")}]
    read = tape_of(snapshot)

    assert [Mark(0, "load", 0), Mark(4, "end", 0)] == read.tape.marks
    assert [1, 2, 3, 4] == read.tape.events
    assert sorted([30, 30, 60, 60]) == sorted(size // MiB for size in read.tape.sizes[1:])
    assert {"layers.0.weight", "layers.1.weight", "state"} == {
        storage.where.removesuffix(" models/net.py:41") for storage in read.storages
    }


class Malice:
    """Pickles as a call of something else."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_code_is_refused(protocol, tmp_path):
    """Before anything of it is run, and with its request named."""
    import os

    ran = tmp_path / "ran"
    path = tmp_path / "run.pickle"
    payload = {"segments": [], "device_traces": [[Malice(os.mkdir, str(ran))]]}
    path.write_bytes(pickle.dumps(payload, protocol))
    with pytest.raises(SnapshotError, match=r"this pickle asks for `(posix|nt|os)\.mkdir`"):
        read_snapshot(path)

    assert not ran.exists()
    pickle.loads(path.read_bytes())
    assert ran.exists(), "the payload does nothing, so that the test above proves nothing"


@pytest.mark.parametrize("value", [complex(1, 2), bytearray(b"x"), SETTINGS[0], range(3)], ids=repr)
def test_classes_are_refused(value, tmp_path):
    """Harmless ones too: a snapshot has none."""
    with pytest.raises(SnapshotError, match="is refused"):
        read_snapshot(plain(tmp_path / "run.pickle", {"segments": value}))


ALL = recording_of(small_tape(), SETTINGS[0])


@pytest.mark.parametrize(
    "broken",
    [
        None,
        7,
        {},
        {"segments": 3},
        {"segments": [3]},
        {"segments": [{"device": "0"}]},
        {"segments": [], "device_traces": 3},
        {"segments": [], "device_traces": [3]},
        {"segments": [], "device_traces": [[3]]},
        {"segments": [], "device_traces": [[{"action": "alloc"}]]},
        {"segments": [], "device_traces": [[{"action": "alloc", "addr": 1, "size": -5}]]},
        {"segments": [], "device_traces": [[{"action": "alloc", "addr": 1, "size": 5, "frames": 3}]]},
        {"segments": [{"total_size": 5, "blocks": [{}]}]},
        {**ALL, "memplan": {"format": 99}},
        {**ALL, "memplan": {"format": 1, "marks": [[0, "load"]]}},
        {**ALL, "memplan": {"format": 1, "marks": [[10**6, "load", 0]]}},
    ],
    ids=str,
)
def test_what_is_no_snapshot_is_said_in_a_sentence(broken, tmp_path):
    """With the file's name and a remedy, whatever is wrong."""
    with pytest.raises(
        SnapshotError, match=r"run\.pickle` (is no memory snapshot|was written by another)"
    ) as caught:
        read_snapshot(plain(tmp_path / "run.pickle", broken))
    assert caught.value.hint


@FEW
@given(st.binary(max_size=60), st.integers(0, 400))
def test_damaged_files_are_said(tmp_path_factory, tail, cut):
    """Anything that is not a pickle from its first to its last byte."""
    path = tmp_path_factory.mktemp("damaged") / "run.pickle"
    path.write_bytes(pickle.dumps(ALL, 4)[:cut] + tail)
    with pytest.raises(SnapshotError):
        read_snapshot(path)


def test_a_missing_file_is_said(tmp_path):
    """With how to record one."""
    with pytest.raises(SnapshotError, match="cannot be read") as caught:
        read_snapshot(tmp_path / "none.pickle")
    assert "_record_memory_history" in caught.value.hint


@pytest.mark.torch
def test_torch_has_what_the_remedies_name():
    """The functions that the hints and the documentation tell people to call."""
    memory = pytest.importorskip("torch.cuda.memory")

    for name in ("_record_memory_history", "_dump_snapshot", "_snapshot", "_set_memory_metadata"):
        assert callable(getattr(memory, name))


@pytest.mark.torch
def test_what_torchs_profiler_made_is_read():
    """A run on the CPU, put into a snapshot by torch itself: what is alive at its end is all there."""
    torch = pytest.importorskip("torch")
    from torch.cuda import _memory_viz

    model = torch.nn.Linear(60, 70, bias=False)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, record_shapes=True, with_stack=True
    ) as profile:
        model(torch.ones(5, 60)).sum().backward()
    tape = tape_of(_memory_viz._profile_to_snapshot(profile)).tape
    alive = Counter(tape.sizes[event] for event in tape.events if event > 0)
    alive.subtract(tape.sizes[-event] for event in tape.events if event < 0)

    assert 2 == alive[60 * 70 * 4], "the weight, which is older than the recording, and its gradient"


def test_a_file_goes_there_and_back(tmp_path):
    """The same through the file system."""
    write_snapshot(small_tape(), tmp_path / "plan.pickle", SETTINGS[0])
    read = read_snapshot(str(tmp_path / "plan.pickle"))

    assert (small_tape().tape, small_tape().storages) == (read.tape, read.storages)
