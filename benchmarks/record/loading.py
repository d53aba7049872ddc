"""
What loading a checkpoint takes: `python -m benchmarks.record.loading FILE WAY [FOLDER]`.

WAY is one of

    save         writes a model of random weights to FOLDER, for the others to load
    device_map   transformers' `from_pretrained(device_map=...)`
    to           `from_pretrained(...)` in RAM, then `.to(device)`
    trainer      the loading of `memplan train`

and then LoRA adapters are added, for `trainer` in the same go. FILE gets phases, segments and events, as a record does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record.matrix import cut
from memplan.job.spec import Job
from memplan.model.resolve import resolve_config
from memplan.record.compact import encode
from memplan.record.device import Device, make_device
from memplan.record.worker import library_versions
from memplan.train.record import write_atomically
from memplan.train.tokens import first_line

WAYS = ("device_map", "to", "trainer")
MODEL, LAYERS = "llama-3.2-1b", 4
SCHEMA_VERSION = 1


def load_and_record(way: str, folder: Path, device: Device) -> dict[str, Any]:
    """Load the model of a folder in one of the WAYS and say what it took, or how it failed."""
    found: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "way": way, "versions": library_versions()}
    found["device"] = device.open()
    try:
        held = _load(way, folder, device)
        device.begin("end", 0)
        del held
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {first_line(error)}"
    device.end()
    found |= {"phases": device.phases(), "process": device.process(), "segments": device.segments()}
    try:
        flat, found["trace_error"] = device.trace()
        found["trace"] = encode(flat)
    except Exception as error:
        found["trace_error"] = f"{type(error).__name__}: {first_line(error)}"
    return found


def _load(way: str, folder: Path, device: Device) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device.begin("load", 0)
    if way == "trainer":
        from memplan.train.build import build_model

        job = Job(model=str(folder))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return build_model(job, config, device.tensors, weights_path=str(folder))
    if way == "device_map":
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": device.tensors}
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device.tensors)
    device.begin("adapters", 0)
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def save_model(folder: Path, config: dict[str, Any]) -> None:
    """A model of random bfloat16 weights, in one safetensors file."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    resolved = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    AutoModelForCausalLM.from_config(resolved, dtype=torch.bfloat16).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the arguments name."""
    file, way, folder = sys.argv[1:] if arguments is None else arguments
    if way == "save":
        save_model(Path(folder), cut(resolve_config(MODEL, offline=True).config, LAYERS))
        return
    found = load_and_record(way, Path(folder), make_device())
    write_atomically(Path(file), json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
