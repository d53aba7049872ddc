"""What differs between two tapes at their peaks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from recordings import recording_of
from snapshot_tapes import SETTINGS, small_tape, written_tapes

from memplan.allocator import replay
from memplan.job.spec import AllocatorSettings
from memplan.snapshot import TensorChange, diff_tapes, tape_of
from memplan.tape.tape import FlatTape, Storage
from memplan.units import MiB

FEW = hypothesis_settings(max_examples=25)
PLANTED = Storage(7 * MiB, "activations", "layers.1.mask", "bool", (7, MiB))


def at_peak(written):
    """Bytes of each storage that is alive when the most is allocated."""
    tape = written.flatten()
    peak = replay(tape.events, tape.sizes, tape.streams, AllocatorSettings()).peak_allocated_event
    alive = set()
    for event in tape.events[: peak + 1]:
        alive ^= {abs(event)}
    return [tape.sizes[storage_id] for storage_id in alive]


@FEW
@given(written_tapes(), written_tapes())
def test_the_changes_add_up(a, b):
    """To the difference of what is alive; with what is alike they are all of both."""
    diff = diff_tapes(a, b)

    assert sum(at_peak(b)) - sum(at_peak(a)) == sum(change.change_bytes for change in diff.changes)
    assert sum(at_peak(a)) == diff.alike_bytes + sum(change.a_bytes for change in diff.changes)
    assert len(at_peak(b)) == diff.alike_count + sum(change.b_count for change in diff.changes)
    sizes = [abs(change.change_bytes) for change in diff.changes]
    assert sizes == sorted(sizes, reverse=True)


@FEW
@given(written_tapes(), written_tapes())
def test_the_other_way_round_is_the_opposite(a, b):
    """The same changes with their signs turned."""
    there, back = diff_tapes(a, b), diff_tapes(b, a)

    assert (there.alike_bytes, there.alike_count) == (back.alike_bytes, back.alike_count)
    assert Counter(change.change_bytes for change in there.changes) == Counter(
        -change.change_bytes for change in back.changes
    )


@FEW
@given(written_tapes())
def test_a_tape_is_like_itself(written):
    """Also when the other side is a recording of it, whose names are lines of code."""
    assert () == diff_tapes(written, written).changes
    recorded = diff_tapes(written, tape_of(recording_of(written, SETTINGS[1])))
    assert () == recorded.changes
    assert len(at_peak(written)) == recorded.alike_count


def test_a_planted_tensor_is_found():
    """One that only B holds, by its name, and nothing else."""
    [change] = diff_tapes(small_tape(), small_tape(extra=PLANTED)).changes

    assert (
        TensorChange("layers.*.mask", "activations", None, (7, MiB), None, "bool", 0, 1, 0, 7 * MiB) == change
    )  # fmt: skip
    assert 7 * MiB == change.change_bytes


def test_a_planted_tensor_is_found_in_a_recording():
    """By size alone, since the recording has lines of code where the plan has tensors."""
    recorded = tape_of(recording_of(small_tape(extra=PLANTED), SETTINGS[0], drop=9))
    diff = diff_tapes(small_tape(), recorded)

    assert [("layers.*.mask models/net.py:41", 0, 1, 7 * MiB)] == [
        (change.where, change.a_count, change.b_count, change.change_bytes) for change in diff.changes
    ]
    assert diff.alike_count == diff.alike_by_size == 6


def test_another_size_is_one_change():
    """The logits of both sides are the same tensors, grown; what happens to every block is said once."""
    diff = diff_tapes(small_tape(), small_tape(logits_mib=128))

    assert [
        ("lm_head grad of logits", (96, 262144), (128, 262144), 1, 1, 32 * MiB),
        ("lm_head logits", (96, 262144), (128, 262144), 1, 1, 32 * MiB),
    ] == [
        (change.where, change.a_shape, change.b_shape, change.a_count, change.b_count, change.change_bytes)
        for change in diff.changes
    ]
    halved = FlatTape(
        replace(small_tape().tape, sizes=[size // 2 for size in small_tape().tape.sizes]),
        [
            storage._replace(num_bytes=storage.num_bytes // 2, dtype="bfloat16")
            for storage in small_tape().storages
        ],
    )
    blocks = {change.where: change for change in diff_tapes(small_tape(), halved).changes}
    assert (2, 2, -30 * MiB) == (
        blocks["layers.*.weight"].a_count, blocks["layers.*.weight"].b_count, blocks["layers.*.weight"].change_bytes
    )  # fmt: skip


def test_tensors_of_one_size_are_not_alike_in_two_plans():
    """Plans know their tensors: another name is another tensor."""
    other = PLANTED._replace(where="layers.1.scores")
    changes = diff_tapes(small_tape(extra=PLANTED), small_tape(extra=other)).changes

    assert {("layers.*.mask", -7 * MiB), ("layers.*.scores", 7 * MiB)} == {
        (change.where, change.change_bytes) for change in changes
    }
