"""Arguments and options that several commands share; those of the job are made from the fields of `Job`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from memplan.errors import JobError
from memplan.job.spec import Job

JOB_FIELDS = (
    "model", "weights", "method", "dtype", "autocast", "micro_batch_size", "gradient_accumulation_steps",
    "max_seq_len", "packing", "activation_checkpointing", "activation_offload", "attention", "loss",
    "optimizer", "optimizer_kernel", "lora.rank", "lora.dtype", "loop", "gpu", "margin",
)  # fmt: skip
"""Fields with a flag of their own; `--set` reaches all the others."""

JobArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="JOB",
        help="Job file, config of axolotl, LLaMA-Factory or trl sft, a name from memplan jobs, or a model: a hub id, "
        "a local folder or a name from memplan models",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Change any field of the job, e.g. lora.rank=8; repeatable"
    ),
]
Accelerate = Annotated[
    str | None,
    typer.Option(
        "--accelerate",
        metavar="FILE",
        help="Launch settings of accelerate to lay over the job: how many GPUs, and how they share it",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 also when the fit is tight")]
OutputFormat = Annotated[
    str, typer.Option("--format", metavar="text|json|markdown|github", help="What to print")
]

REPORT_FORMATS = ("text", "json", "markdown", "github")


class _AsTyped:
    """The interface of typer's `RuntimeParam`, without a conversion."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        if value is None and (param.multiple or param.nargs == -1):
            return ()
        return value


class _WithoutAdapters:
    """
    Options arrive as the text that was typed; the job reader knows their types and bounds.

    typer 0.29 builds a pydantic adapter for every option when it parses, and importing pydantic takes longer
    than a whole estimate. Handing it the trivial conversion in advance keeps pydantic out; earlier versions
    have no use for it.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            parameter._runtime_param = _AsTyped()
        return parameters


class Command(_WithoutAdapters, typer.core.TyperCommand):
    """One command."""


class Group(_WithoutAdapters, typer.core.TyperGroup):
    """The command that holds the others."""


def with_job_flags(function: Callable[..., int]) -> Callable[..., int]:
    """
    Give a command the flags of the job. It receives those that were given as `flags`, {dotted field, or
    `accelerate`: text or bool}.
    """

    def command(**given: Any) -> int:
        flags = {name: given.pop(_parameter_name(name)) for name in ("accelerate", *JOB_FIELDS)}
        return function(**given, flags={name: value for name, value in flags.items() if value is not None})

    signature = inspect.signature(function, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "flags"]
    launch = inspect.Parameter(
        "accelerate", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Accelerate
    )
    parameters = [*own, launch, *map(_job_parameter, JOB_FIELDS)]
    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def check_choice(flag: str, value: str, choices: tuple[str, ...]) -> str:
    """
    `value`, if it is one of the choices.

    Raises:
        JobError: it is not.
    """
    if value not in choices:
        raise JobError(f"`{flag}` cannot be `{value}`", hint=f"choose one of {', '.join(choices)}")
    return value


def _job_parameter(name: str) -> inspect.Parameter:
    field = _field(name)
    flag = "--" + name.replace("_", "-").replace(".", "-")
    if isinstance(field.default, bool):
        annotation: Any = bool | None
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=field.metadata["doc"])
    else:
        annotation = str | None
        option = typer.Option(flag, metavar=_metavar(field), help=_plain(field.metadata["doc"]))
    return inspect.Parameter(
        _parameter_name(name),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation, option],
    )


def _field(name: str) -> dataclasses.Field[Any]:
    owner: Any = Job
    *path, last = name.split(".")
    for part in path:
        owner = _field_of(owner, part).default_factory
    return _field_of(owner, last)


def _field_of(owner: Any, name: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(owner) if field.name == name)


def _metavar(field: dataclasses.Field[Any]) -> str:
    if field.metadata["choices"]:
        return "|".join("null" if choice is None else str(choice) for choice in field.metadata["choices"])
    return "NUMBER" if isinstance(field.default, (int, float)) else "TEXT"


def _parameter_name(name: str) -> str:
    return name.replace(".", "_")


def _plain(doc: str) -> str:
    return doc.replace("`", "")
