"""`memplan env`"""

from __future__ import annotations

import os
import shlex
from typing import Annotated, Any

import typer

from memplan.cli.options import JobArgument, Overrides, check_choice, with_job_flags

FORMATS = ("sh", "fish", "powershell", "github", "json")


@with_job_flags
def env(
    job: JobArgument = None,
    overrides: Overrides = None,
    output_format: Annotated[
        str,
        typer.Option("--format", metavar="|".join(FORMATS), help="Whose syntax; github is for $GITHUB_ENV"),
    ] = "sh",
    *,
    flags: dict[str, Any],
) -> int:
    """
    Print a job's allocator settings as variables: eval "$(memplan env JOB)"

    The names suit the torch that is installed beside memplan; without one, both names are set. What is
    already set in the environment is kept.
    """
    from memplan.cli.output import emit, note
    from memplan.cli.planning import read_job
    from memplan.preflight.environment import allocator_environment, current_platform, installed_torch_version

    check_choice("--format", output_format, FORMATS)
    loaded = read_job(job, overrides, flags)
    found = allocator_environment(loaded.job, installed_torch_version(), current_platform(), os.environ)
    for message in found.notes:
        note(message)
    emit(environment_text(found.variables, output_format))
    return 0


def environment_text(variables: dict[str, str], output_format: str) -> str:
    """
    Variables in the syntax of a shell; empty when there are none to set.

    >>> environment_text({"NAME": "a:b,c"}, "sh")
    'export NAME=a:b,c\\n'
    """
    if output_format == "json":
        from memplan.render.json import dump

        return dump(variables)
    return "".join(_line(name, value, output_format) + "\n" for name, value in variables.items())


def _line(name: str, value: str, output_format: str) -> str:
    if output_format == "fish":
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"set -gx {name} '{quoted}'"
    if output_format == "powershell":
        quoted = value.replace("'", "''")
        return f"$Env:{name} = '{quoted}'"
    if output_format == "github":
        return f"{name}={value}"
    return f"export {name}={shlex.quote(value)}"
