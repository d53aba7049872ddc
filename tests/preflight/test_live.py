"""What is on the card, waiting for it, and the whole preflight, on machines made by hand."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from handmade import make_result

from memplan.errors import JobError, NoLiveGpu
from memplan.gpu.probe import GpuFailure, GpuProcess, GpuReading
from memplan.preflight import disk
from memplan.preflight.disk import check_disk
from memplan.preflight.live import Machine, is_live, look, parse_seconds, wait_for
from memplan.preflight.run import run_preflight
from memplan.units import GiB, MiB


class Probe:
    """Gives one reading after the other, the last one for ever."""

    def __init__(self, *readings):
        self.readings = list(readings)

    def read(self):
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


class NoDriver:
    """A machine without a GPU."""

    def read(self):
        raise NoLiveGpu("This machine has no NVIDIA driver (libnvidia-ml.so.1 is missing)", hint="name a GPU")


class Clock:
    """Time that passes by sleeping."""

    def __init__(self):
        self.now = 100.0
        self.naps = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += seconds


def reading(others_gib=0.0, *, total_gib=24, index=0, processes=(), complete=True):
    """A 24 GiB card on which others hold memory."""
    used = int(others_gib * GiB)
    total = total_gib * GiB
    return GpuReading(
        index=index, uuid=f"GPU-{index}abc", name=f"Card {index}", total_bytes=total, used_bytes=used,
        reserved_bytes=0, free_bytes=total - used, processes=processes, processes_complete=complete,
        pci_bus_id=f"0000:0{index}:00.0",
    )  # fmt: skip


def machine(*readings, **settings):
    """A machine whose probe gives these readings of one card each."""
    probe = Probe(*((each,) for each in readings)) if readings else NoDriver()
    clock = Clock()
    return Machine(probe, **{"torch_version": "2.13.0", "clock": clock, "sleep": clock.sleep, **settings})


@pytest.fixture(autouse=True)
def working_dir(tmp_path, monkeypatch):
    """A disk with room, and nothing from the environment of the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000 * GiB))
    return tmp_path


def preflight(on, *, wait=0.0, result=None, **changes):
    """A preflight of the made result's job."""
    result = result or make_result()
    job = result.job.replace(**changes)
    loaded = SimpleNamespace(job=job, base_dir=Path.cwd(), notes=())
    told = []
    found = run_preflight(
        loaded, None, replace(result, job=job), wait_seconds=wait, machine=on, on_wait=told.append
    )
    return found, told


def test_a_job_is_judged_on_the_card_that_is_there():
    """Without a card named, the one at hand is the one asked about."""
    found, _ = preflight(machine(reading()))

    assert "fits" == found.verdict.state
    assert "Card 0" == found.capacity.gpu
    assert 0 == found.exit_code()


def test_memory_of_others_counts_and_is_named():
    """What others hold is not usable; each process is listed with its pid."""
    process = GpuProcess(4211, 10 * GiB, "python")
    found, _ = preflight(machine(reading(10, processes=(process,))))

    assert "does_not_fit" == found.verdict.state
    assert (process,) == found.live.processes
    assert 10 * GiB == found.live.used_by_others_bytes
    assert 1 == found.exit_code()


def test_without_a_driver_the_live_check_is_skipped():
    """A GPU-less machine is normal: no verdict, no failure."""
    found, _ = preflight(machine())

    assert "no NVIDIA driver" == found.live.skipped
    assert found.verdict is None and found.capacity is None
    assert 0 == found.exit_code()


def test_asking_for_a_live_card_that_is_not_there_is_an_error():
    """`--gpu live` without a GPU has no answer: exit code 3."""
    with pytest.raises(NoLiveGpu) as caught:
        preflight(machine(), gpu="live")

    assert 3 == caught.value.exit_code


def test_a_named_card_is_judged_without_a_gpu():
    """On a GPU-less machine a named card still gets its verdict."""
    found, _ = preflight(machine(), gpu="20GiB")

    assert ("does_not_fit", "no NVIDIA driver") == (found.verdict.state, found.live.skipped)
    assert 1 == found.exit_code()


def test_a_named_card_is_judged_as_named_where_another_is_there():
    """The question was about 80 GiB; the card at hand is only looked at."""
    found, _ = preflight(machine(reading(23)), gpu="80GiB")

    assert ("fits", "Card 0") == (found.verdict.state, found.live.gpu)


@pytest.mark.parametrize(("which", "name"), [("live", "Card 1"), ("live:1", "Card 0"), ("GPU-0", "Card 0")])
def test_the_card_that_is_looked_at_is_the_one_that_is_judged(which, name):
    """CUDA_VISIBLE_DEVICES reorders, and a uuid names one."""
    probe = Probe((reading(), reading(index=1)))
    found, _ = preflight(Machine(probe, {"CUDA_VISIBLE_DEVICES": "1,0"}), gpu=which)

    assert name == found.capacity.gpu == found.live.gpu


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (None, True),
        ("live", True),
        ("Live:2", True),
        ("GPU-12ab", True),
        ("MIG-1", True),
        ("24GB", False),
        ("L4", False),
    ],
)
def test_live_cards_are_told_from_named_ones(gpu, expected):
    """Only a card of this machine can drain."""
    assert expected == is_live(gpu)


def test_a_card_that_cannot_be_read_is_skipped_with_its_reason():
    """A lost GPU is named with what is wrong with it."""
    lost = GpuFailure(0, "The GPU has fallen off the bus", "reboot", name="Card 0")
    live = look(Machine(Probe((lost,))))

    assert ("Card 0", "the GPU has fallen off the bus") == (live.gpu, live.skipped)


def test_hidden_cards_are_no_cards():
    """An empty CUDA_VISIBLE_DEVICES leaves nothing to look at."""
    live = look(Machine(Probe((reading(),)), {"CUDA_VISIBLE_DEVICES": ""}))

    assert "CUDA_VISIBLE_DEVICES hides the GPU" == live.skipped


def test_waiting_ends_when_the_memory_has_drained():
    """Others leave after two polls; the verdict is that of the last reading."""
    full, empty = reading(10), reading()
    on = machine(full, full, full, empty)
    found, told = preflight(on, wait=60)

    assert "fits" == found.verdict.state
    assert [2.0, 2.0] == on.clock.naps
    assert 4.0 == found.live.waited_seconds
    assert ["waiting up to 60 s for memory that others hold"] == told


def test_waiting_ends_when_the_time_is_over():
    """Nothing drains: after exactly the time asked for, it does not fit."""
    on = machine(reading(10))
    found, _ = preflight(on, wait=5)

    assert "does_not_fit" == found.verdict.state
    assert [2.0, 2.0, 1.0] == on.clock.naps


def test_nobody_waits_for_what_fits_or_cannot_drain():
    """A job that fits starts at once, and a named card never drains."""
    for on, gpu in ((machine(reading()), None), (machine(reading(10)), "20GiB"), (machine(), None)):
        _, told = preflight(on, wait=60, gpu=gpu)

        assert [] == told and [] == on.clock.naps


def test_wait_for_asks_once_without_time():
    """Zero seconds is one look."""
    asked = []
    waited = wait_for(lambda: bool(asked.append(1)), 0, machine())

    assert ([1], 0.0) == (asked, waited)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("60", 60), ("60s", 60), ("0", 0), ("1.5m", 90), ("2min", 120), ("1h", 3600), (" 5 s ", 5)],
)
def test_durations(text, seconds):
    """Plain numbers are seconds."""
    assert seconds == parse_seconds(text)


@pytest.mark.parametrize("text", ["", "soon", "-5s", "5 days", "1e3", "1m30s"])
def test_what_is_no_duration(text):
    """A wait that cannot be read is never taken for none."""
    with pytest.raises(JobError, match="--wait"):
        parse_seconds(text)


def test_lints_reach_the_warnings_once():
    """What the estimate has warned of is not said again."""
    result = make_result()
    changes = {"attention": "eager", "lora.dtype": "bfloat16"}
    again = str(preflight(machine(), **changes)[0].lints[0])
    found, _ = preflight(machine(), result=replace(result, warnings=("first", again)), **changes)

    assert ("first", again) == found.result.warnings


def test_the_environment_suits_torch_and_what_is_set():
    """The same table as `memplan env`, for the torch of this machine."""
    old, _ = preflight(machine(torch_version="2.9.1"))
    taken, _ = preflight(machine(environ={"PYTORCH_ALLOC_CONF": "backend:native"}))

    assert {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} == old.environment.variables
    assert {} == taken.environment.variables
    assert "allocator-differs" in [lint.code for lint in taken.lints]


def test_a_full_disk_fails_the_preflight(monkeypatch):
    """A run that cannot save its first checkpoint should not start."""
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * MiB))
    found, _ = preflight(machine(reading()))

    assert "fits" == found.verdict.state and not found.disk.is_enough
    assert 1 == found.exit_code()


@pytest.mark.parametrize(
    ("changes", "num_bytes"),
    [
        # 39,976,960 float32 adapters: weights, and two float32 moments of adamw.
        ({}, 39_976_960 * (4 + 8)),
        ({"lora.dtype": "bfloat16"}, 39_976_960 * (2 + 4)),
        ({"optimizer": "sgd"}, 39_976_960 * (4 + 4)),
        ({"optimizer": "lion"}, 39_976_960 * (4 + 4)),
        ({"method": "full"}, 39_976_960 * (2 + 4)),
        ({"method": "full", "dtype": "float32"}, 39_976_960 * (4 + 8)),
        ({"optimizer": "adamw_8bit"}, 39_976_960 * 4 + int(39_976_960 * (2 + 8 / 256))),
    ],
)
def test_a_checkpoint_holds_trained_weights_and_optimizer_states(changes, num_bytes, tmp_path):
    """Frozen weights are not saved."""
    result = make_result()

    assert num_bytes == check_disk(result.job.replace(**changes), result, tmp_path).checkpoint_bytes


@pytest.mark.parametrize(
    ("max_steps", "save_every", "count"), [(10, 50, 1), (100, 50, 2), (101, 50, 3), (1000, 50, 4)]
)
def test_old_checkpoints_are_deleted(max_steps, save_every, count, tmp_path):
    """A long run never holds more than the kept ones and the one being written."""
    job = make_result().job.replace(**{"train.max_steps": max_steps, "train.save_every": save_every})
    found = check_disk(job, make_result(), tmp_path)

    assert count == found.num_checkpoints
    assert count * found.checkpoint_bytes + found.final_bytes == found.needed_bytes


def test_the_best_checkpoint_takes_room_too(tmp_path):
    """As many as the job keeps, one more of the best evaluation, and the one being written."""
    job = make_result().job.replace(**{"train.max_steps": 1000, "train.keep_checkpoints": 1})

    assert check_disk(job, make_result(), tmp_path).num_checkpoints == 2
    assert check_disk(job.replace(**{"data.eval": "x"}), make_result(), tmp_path).num_checkpoints == 3


def test_the_disk_is_that_of_the_nearest_folder_that_exists(tmp_path):
    """`output_dir` is usually not there yet."""
    job = make_result().job.replace(**{"train.output_dir": "runs/a/b"})
    (tmp_path / "runs").mkdir()

    assert str(tmp_path / "runs") == check_disk(job, make_result(), tmp_path).path


def test_json_holds_what_the_result_does_not():
    """Readings, variables, lints and disk, as plain values."""
    process = GpuProcess(4211, None, None)
    found, _ = preflight(machine(reading(1, processes=(process,))), attention="eager")
    read = json.loads(json.dumps(found.to_json()))

    assert ["live", "environment", "lints", "disk"] == list(read)
    assert [asdict(process)] == read["live"]["processes"]
    assert "eager-attention" == read["lints"][0]["code"]
    assert {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} == read["environment"]["variables"]


def test_strict_turns_tight_into_a_failure():
    """CI may want no risk at all."""
    found, _ = preflight(machine(), gpu="23GiB")

    assert "tight" == found.verdict.state
    assert (0, 1) == (found.exit_code(), found.exit_code(strict=True))
