"""Which variable, with which value, for which torch."""

import pytest

from memplan.job.spec import Job
from memplan.preflight.environment import (
    allocator_environment,
    allocator_string,
    current_platform,
    installed_torch_version,
    parse_settings,
    variable_in_force,
)

CUDA, HIP, SHARED = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
ON = "expandable_segments:True"
JOB = Job(model="gpt2")


def found(*question):
    """Variables and notes."""
    environment = allocator_environment(*question)
    return environment.variables, environment.notes


@pytest.mark.parametrize(
    ("torch_version", "names"),
    [
        ("2.1.0", {CUDA}),
        ("2.8.0+cu126", {CUDA}),
        ("2.9.0", {CUDA}),
        ("2.9.1+cu128", {CUDA}),
        ("2.10.0", {SHARED}),
        ("2.10.0a0+git1234abc", {SHARED}),
        ("2.13.0+cpu", {SHARED}),
        ("3.0.0", {SHARED}),
        (None, {CUDA, SHARED}),
    ],
)
def test_the_variable_suits_the_version(torch_version, names):
    """torch below 2.10 reads one name only, later ones the other; without a version both are set."""
    variables = allocator_environment(JOB, torch_version, "linux").variables

    assert dict.fromkeys(names, ON) == variables


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, ON),
        ({"expandable_segments": False}, ""),
        ({"expandable_segments": False, "max_split_size_mb": 128}, "max_split_size_mb:128"),
        ({"garbage_collection_threshold": 0.8}, f"{ON},garbage_collection_threshold:0.8"),
        ({"roundup_power2_divisions": 16}, f"{ON},roundup_power2_divisions:16"),
    ],
)
def test_the_value_comes_from_the_job(settings, value):
    """Settings left at torch's defaults are not written."""
    job = JOB.replace(**{f"allocator.{name}": setting for name, setting in settings.items()})

    assert value == allocator_string(job)
    assert ({SHARED: value} if value else {}) == allocator_environment(job, "2.13.0", "linux").variables


@pytest.mark.parametrize(("platform", "system"), [("win32", "Windows"), ("wsl", "WSL")])
def test_expandable_segments_are_left_out_where_they_do_not_exist(platform, system):
    """Windows and WSL warn and ignore them, so they are not set, and the difference to the plan is said."""
    variables, notes = found(JOB, "2.13.0", platform)

    assert {} == variables
    assert any(system in note for note in notes)


@pytest.mark.parametrize("torch_version", ["2.9.1", "2.13.0", None])
def test_what_the_user_has_set_is_kept(torch_version):
    """A value in force is never replaced; one that differs is reported with what the job asks for."""
    variables, notes = found(JOB, torch_version, "linux", {CUDA: "roundup_power2_divisions:16"})

    assert {} == variables
    assert any("kept" in note and ON in note for note in notes)


def test_what_the_user_has_set_to_the_same_needs_no_word():
    """The same settings in another order are the same settings."""
    job = JOB.replace(**{"allocator.roundup_power2_divisions": 16})
    environ = {SHARED: f"roundup_power2_divisions:16, {ON}"}

    assert ({}, ()) == found(job, "2.13.0", "linux", environ)


def test_torch_2_9_ignores_the_new_name():
    """On 2.9 the new name is silently ignored for CUDA, so the job's value goes into the one that is read."""
    variables, notes = found(JOB, "2.9.1", "linux", {SHARED: ON})

    assert {CUDA: ON} == variables
    assert any(SHARED in note and "ignores" in note for note in notes)


@pytest.mark.parametrize(
    ("environ", "winner"),
    [
        ({CUDA: ON, SHARED: "backend:native"}, CUDA),
        ({HIP: ON, SHARED: "backend:native"}, HIP),
        ({SHARED: ON}, SHARED),
    ],
)
def test_the_older_name_wins(environ, winner):
    """torch 2.10 and above read the CUDA name first, then HIP, then the shared one."""
    _, notes = found(JOB, "2.13.0", "linux", environ)

    assert winner == variable_in_force(environ, "2.13.0")
    assert (len(environ) > 1) == any(f"`{winner}` wins" in note for note in notes)


def test_an_empty_variable_is_not_set():
    """`export NAME=` asks for nothing."""
    assert {SHARED: ON} == allocator_environment(JOB, "2.13.0", "linux", {CUDA: ""}).variables


def test_lists_in_brackets_stay_whole():
    """The commas inside a list of divisions do not end it."""
    parsed = parse_settings("roundup_power2_divisions:[256:1,512:2,>:8],expandable_segments:True")

    assert {"roundup_power2_divisions": "[256:1,512:2,>:8]", "expandable_segments": "True"} == parsed


def test_this_machine_can_be_asked():
    """Version and platform come without importing torch; either is a string that the table understands."""
    assert installed_torch_version() is None or installed_torch_version()[0].isdigit()
    assert current_platform() in ("linux", "wsl", "win32", "darwin")
