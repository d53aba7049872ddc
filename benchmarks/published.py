"""
The published measurements in `data/published.json`, as jobs and behaviours that memplan can plan.

The file says what each field means (`about`) and what each source measures (`sources`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from memplan.budget.outside import non_torch_bytes
from memplan.job.load import load_job
from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.model.config import architecture_from_config
from memplan.model.resolve import resolve_config
from memplan.tape.behaviour import Behaviour

FILE = Path(__file__).parent / "data" / "published.json"
NUM_ORDERS = 100
LOWEST, HIGHEST = (
    f"reserved, {which} of {NUM_ORDERS} orders of addresses" for which in ("lowest", "highest")
)
"""Beside the statistics of a script."""
CONTEXT = "CUDA context"
"""A statistic: what the driver shows before torch has allocated anything."""


@dataclass(frozen=True)
class Measurement:
    """One figure of a run: `bytes`, and `published` as its source prints it."""

    statistic: str
    """`allocated`, `reserved`, `device` (what the driver shows), or a longer name of what it is."""
    bytes: int
    published: str

    @property
    def rounding_bytes(self) -> float:
        """
        Half a unit of the last digit that the source prints: no closer is the figure known.

        >>> Measurement("reserved", 5594194903, "5.21 GiB").rounding_bytes / 2**30
        0.005
        """
        number = re.search(r"\d+(?:\.(\d+))?", self.published)
        assert number is not None
        unit = round(self.bytes / float(number[0]))
        return unit * 0.5 * 10.0 ** -len(number[1] or "")


@dataclass(frozen=True)
class Case:
    """One published run."""

    id: str
    source: str
    where: str
    """File and row in the source."""
    hardware: str
    gpus: int
    model: str
    measured: Measurement
    trust: str
    """`high`, `medium` or `low`: a judgement on the source."""
    also_measured: tuple[Measurement, ...] = ()
    unsupported: str = ""
    """Why there is no job; empty where there is one, or a script."""
    script: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of a run that is no job: the step of `benchmarks.scripts` that it is, and its sizes."""
    completeness: str = ""
    """What the source leaves open; empty: nothing."""
    scope: str = "process"
    """What a peak covers: `process`, `train` (loading left out) or `second step`."""
    model_code: str = "transformers"
    """Whose model code ran: `torchtitan`, `litgpt`, `torchtune` or what plans are made of."""
    notes: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The job as the file gives it."""
    published_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of a case without a job: what its source says of it."""
    software: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    padded: bool = False
    first_length: int | None = None
    step_is_function: bool = False
    upcast_logits: bool = True
    fsdp1: bool = False
    """FSDP1 where no version tells: replicas that it keeps in step without cutting anything, and Lightning's Fabric."""
    float_output: bool = False
    """Fabric gives what the model returns in float32 (plugins/precision/fsdp.py, convert_output)."""
    checkpoints_inside_units: bool = False
    """A script checkpointed what FSDP1 had wrapped."""
    wrapped_dtype: str | None = None
    """FSDP1 wrapped the model in this dtype, which it was loaded in, before the shards were made float32."""
    float_buffers: bool = False
    """A script made its model in float32 and cast no more than the parameters."""
    loads_on_device: bool = False
    """`from_pretrained` was given a `device_map`."""
    products_before: bool = False
    """The process multiplied matrices before it loaded the model."""
    added_tokens: int = 0
    """Rows that the embeddings and the head were given for tokens that the tokenizer lacked."""
    config: Mapping[str, Any] | None = None
    """The model's `config.json` where it is not one of the catalogue."""

    @cached_property
    def job(self) -> Job:
        """Raises JobError where the file is wrong."""
        flags = dict(_dotted(self.fields))
        if self.config is not None:
            flags["model"] = self.id
        return load_job(None, flags=flags).job

    @cached_property
    def _model(self) -> tuple[Architecture, str]:
        config, source = self.config, FILE.name
        if config is None:
            resolved = resolve_config(self.job.model, offline=True)
            config, source = resolved.config, resolved.source
        architecture = architecture_from_config(dict(config), name=self.model, source=source)
        if self.added_tokens:
            rows = architecture.vocab_size + self.added_tokens
            architecture = dataclasses.replace(architecture, vocab_size=rows, is_resized=True)
        return architecture, str(config["model_type"])

    @property
    def architecture(self) -> Architecture:
        """Of the catalogue, or from the file."""
        return self._model[0]

    @property
    def behaviour(self) -> Behaviour:
        """What this software did."""
        if self.script:
            job = Job(model="script", gpu=self.hardware.removeprefix("1x "))
            behaviour = Behaviour.for_software(job, self.software, family="")
            return dataclasses.replace(behaviour, products_before=self.products_before)
        behaviour = Behaviour.for_software(
            self.job, self.software, family=self._model[1], kernels=self.kernels, padded=self.padded
        )
        return dataclasses.replace(
            behaviour,
            first_length=self.first_length,
            step_is_function=self.step_is_function,
            upcast_logits=behaviour.upcast_logits and self.upcast_logits,
            fsdp1=behaviour.fsdp1 or self.fsdp1,
            float_output=behaviour.float_output or self.float_output,
            recomputes_units=behaviour.recomputes_units and not self.checkpoints_inside_units,
            wrapped_dtype=self.wrapped_dtype,
            rotary_tables="float32"
            if behaviour.rotary_tables and self.float_buffers
            else behaviour.rotary_tables,
            loads_on_device=behaviour.loads_on_device or self.loads_on_device,
            products_before=self.products_before,
        )

    @property
    def is_recorded(self) -> bool:
        """Whether it was measured with `memplan record`, and not published by others."""
        return False

    def need_bounds(self) -> tuple[int, int] | None:
        """
        What the run shows of its need inside torch's allocator: at least the peak that it allocated, at most what it
        reserved, since it completed in that. None where not both are known.
        """
        measured = {figure.statistic: figure.bytes for figure in (self.measured, *self.also_measured)}
        reserved = measured.get("reserved", measured.get("device", 0) - non_torch_bytes(self.job)[0])
        if "allocated" not in measured or reserved <= measured["allocated"]:
            return None
        return measured["allocated"], reserved

    @property
    def method(self) -> str:
        """`full`, `lora`, `qlora`; empty where there is no job."""
        return str(self.fields.get("method", ""))


def load_published(file: Path = FILE) -> list[Case]:
    """All cases, in the order of the file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return [_case(entry, content["models"]) for entry in content["cases"]]


def _case(entry: dict[str, Any], models: dict[str, Any]) -> Case:
    fields = entry.get("job", {})
    own = models.get(fields.get("model", ""))
    known = {field.name for field in dataclasses.fields(Case)}
    values = {key: value for key, value in entry.items() if key in known}
    values |= {
        "measured": Measurement(**entry["measured"]),
        "also_measured": tuple(Measurement(**other) for other in entry.get("also_measured", ())),
        "kernels": tuple(entry.get("kernels", ())),
        "fields": fields,
        "config": None if own is None else own["config"],
    }
    return Case(**values)


def _dotted(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
