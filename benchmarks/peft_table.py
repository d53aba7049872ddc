"""
peft's comparison of adapter methods, traced: peak reserved memory. `python -m benchmarks.peft_table [NAME ...]`

Traces the training loop of the runs in `data/peft_metamathqa.json` (those whose names begin with NAME) with the
installed torch, transformers and peft. Keeps the results in `data/peft_traced.json`, beside those of other versions.
All of them take a minute or two. The published runs are of

    pip install torch==2.13.0 transformers==5.13.1 "peft @ git+https://github.com/huggingface/peft@d787f51b"

The loop is that of method_comparison/MetaMathQA/run.py. Of its 5000 steps two are traced: buckets of 20 batches begin
with their longest and end with their shortest, and the cache is emptied every 10 steps, so the longest batch of all
comes after a short one and meets an empty cache. The lengths of both are not published: LONGEST is fitted to one run,
`lora--llama-3.2-3B-rank32`, and BEFORE is assumed. Evaluation is not traced.
"""

from __future__ import annotations

import gc
import inspect
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memplan.allocator import CachingAllocator
from memplan.job.spec import AllocatorSettings
from memplan.model.resolve import resolve_config
from memplan.tape.software import CUBLAS_WORKSPACE_BYTES
from memplan.units import GiB

DATA = Path(__file__).parent / "data"
PUBLISHED = DATA / "peft_metamathqa.json"
TRACED = DATA / "peft_traced.json"
LONGEST = 694
BEFORE = 100

NOT_TRACED = {
    "adamss": "its initialisation clusters the weights of the base model: how many parameters train depends on them",
    "frod": "its initialisation factorises the weights of the base model, for minutes",
    "shira": "it looks for the nonzero elements of a mask that is made on the device",
    "vblora": "its forward raises an error for values that a trace does not have",
    "waveft": "its forward selects elements by a mask whose values a trace does not have",
}
"""By the method that a run's name begins with."""


@dataclass(frozen=True)
class PeftRun:
    """One published run."""

    name: str
    train: Mapping[str, Any]
    """Settings of the loop."""
    peft: Mapping[str, Any]
    """Settings of the adapter that are not peft's defaults; empty for full fine-tuning."""
    versions: Mapping[str, str]
    reserved_bytes: int
    trainable_parameters: int

    @property
    def method(self) -> str:
        """The adapter method, as the name begins."""
        return self.name.partition("--")[0]


@dataclass(frozen=True)
class TracedRun:
    """What a trace of a run gave."""

    reserved_bytes: int
    allocated_bytes: int
    trainable_parameters: int
    unknown_values: int
    """How often code looked at a value that meta tensors have not."""


def load_runs(file: Path = PUBLISHED) -> list[PeftRun]:
    """All runs, in the order of the file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    runs = []
    for entry in content["runs"]:
        shared = {"train": content["train"] | entry.get("train", {}), "peft": entry.get("peft", {})}
        runs.append(PeftRun(**{"versions": content["versions"], **entry, **shared}))
    return runs


def trace_run(run: PeftRun, *, longest: int = LONGEST, before: int = BEFORE) -> TracedRun:
    """Load, a step of `before` tokens, an emptied cache, a step of `longest`: what the allocator then holds at most."""
    from memplan.tape.backends import Target
    from memplan.tracing.autocast import emulated
    from memplan.tracing.calibrate import sole_owner_counts
    from memplan.tracing.cuda import handlers, like_device
    from memplan.tracing.recorder import Recorder

    recorder = Recorder(handlers=handlers(*sole_owner_counts()), workspace_bytes=CUBLAS_WORKSPACE_BYTES)
    with _quiet(), like_device(Target()), emulated(casts=False):
        model, optimizer = _load(recorder, run)
        loop = _Loop(recorder, run, model, optimizer)
        loop.step(1, before)
        emptied = len(recorder.events)
        loop.step(2, longest)
        events = recorder.events[:]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    reserved, allocated = _replay(recorder, events, emptied)
    return TracedRun(reserved, allocated, trainable, recorder.unknown_values)


def _replay(recorder: Any, events: list[int], emptied: int) -> tuple[int, int]:
    """Peak reserved, less what was reserved at the start, and peak allocated."""
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=False))
    sizes = allocator.all_block_bytes(recorder.sizes)
    start, rest = events[:_PROBE_EVENTS], events[_PROBE_EVENTS:emptied]
    allocator.run(start, sizes, recorder.streams)
    initial = allocator.peak_reserved_bytes
    allocator.run(rest, sizes, recorder.streams)
    allocator.release_cached()
    allocator.run(events[emptied:], sizes, recorder.streams)
    return allocator.peak_reserved_bytes - initial, allocator.peak_allocated_bytes


_PROBE_EVENTS = 4
"""run.py puts a Linear(1, 1) on the card before it asks what is reserved."""


def _load(recorder: Any, run: PeftRun) -> tuple[Any, Any]:
    """The model with its adapter, and the optimizer, as run.py makes them."""
    import torch

    recorder.mark("load", 0)
    recorder.scratch((4, 4), "Linear(1, 1)")
    base = _base(run)
    base_bytes = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    # from_pretrained: one block of the model's size, so that weights are cut from one segment
    recorder.scratch((base_bytes,), "caching_allocator_warmup")
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        recorder.adopt(tensor, "weights", name)
    model = _adapted(recorder, base, run) if run.peft else base
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        recorder.adopt(tensor, "adapters", name)
    kwargs = dict(run.train["optimizer_kwargs"])
    if run.train["optimizer_type"] == "lora-fa":
        from peft.optimizers import create_lorafa_optimizer

        optimizer = create_lorafa_optimizer(model, **kwargs)
    else:
        optimizer = getattr(torch.optim, run.train["optimizer_type"])(model.parameters(), **kwargs)
    # run.py measures the base model's loss before training. Leaving the context makes frozen parts trainable again.
    with model.disable_adapter() if run.peft else nullcontext():
        pass
    model.train()
    return model, optimizer


def _base(run: PeftRun) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, initialization
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = dict(resolve_config(run.train["model_id"], offline=True).config)
    resolved = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with torch.device("meta"), initialization.no_init_weights():
        model = AutoModelForCausalLM.from_config(
            resolved, dtype=getattr(torch, run.train["dtype"]), attn_implementation="sdpa"
        )
    model.tie_weights()
    return model


def _adapted(recorder: Any, base: Any, run: PeftRun) -> Any:
    """
    Adapters made on the CPU, where their initialisation has values, and moved by peft: to the dtype of the base, then
    to float32.
    """
    import torch
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    settings = dict(run.peft)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[settings.pop("peft_type")]
    known = inspect.signature(config_class.__init__).parameters
    config = config_class(**{key: value for key, value in settings.items() if key in known})
    # MiCA takes singular vectors of the base's weights; peft leaves that out for adapters that are meta tensors.
    where = torch.device("meta") if settings.get("init_lora_weights") == "mica" else nullcontext()
    with recorder.active(), where:
        return get_peft_model(base, config, autocast_adapter_dtype=run.train["autocast_adapter_dtype"])


class _Loop:
    """Steps as run.py makes them: the last output stays alive until the next takes its place."""

    def __init__(self, recorder: Any, run: PeftRun, model: Any, optimizer: Any) -> None:
        self.recorder, self.run, self.model, self.optimizer = recorder, run, model, optimizer
        self.held: Any = None

    def step(self, number: int, length: int) -> None:
        """One step of batches padded to `length`; all rows but the longest are one token shorter."""
        import torch

        with self.recorder.active():
            self.recorder.mark("forward", number)
            batch = self._batch(length)
            batch["labels"] = batch["input_ids"].clone()
            count = batch["attention_mask"].sum().item()
            self.optimizer.zero_grad()
            outputs = self.model(**batch, num_items_in_batch=count)
            loss = outputs.loss
            self.held = (batch, outputs, loss)
            self.recorder.mark("backward", number)
            loss.backward()
            self.recorder.mark("optimizer_step", number)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.train["grad_norm_clip"])
            self.optimizer.step()
            if self.run.peft.get("peft_type") in ("ADALORA", "ADAMSS"):
                self.model.base_model.update_and_allocate(number)

    def _batch(self, length: int) -> dict[str, Any]:
        import torch

        shape = (self.run.train["batch_size"], length)
        mask = torch.ones(shape, dtype=torch.long)
        mask[1:, -1] = 0
        batch = {}
        for name, values in (("input_ids", torch.zeros(shape, dtype=torch.long)), ("attention_mask", mask)):
            tensor = torch.empty(shape, dtype=torch.long, device="meta")
            self.recorder.adopt(tensor, "inputs", name)
            batch[name] = self.recorder.shadows.give(tensor, values)
        return batch


def load_traced(file: Path = TRACED) -> list[dict[str, Any]]:
    """What traces gave: `versions` of the packages, and `runs` by name; the versions of the published runs first."""
    results: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return results


def installed_versions() -> dict[str, str]:
    """Of torch, transformers and peft, without what names a build."""
    return {name: version(name).partition("+")[0] for name in ("torch", "transformers", "peft")}


def traceable(runs: list[PeftRun]) -> list[PeftRun]:
    """Those that NOT_TRACED does not name."""
    return [run for run in runs if run.method not in NOT_TRACED]


def main(names: Sequence[str]) -> None:
    """Trace the runs whose names begin so (all, without names); keep each as it comes, and print it."""
    for run in traceable(load_runs()):
        if names and not run.name.startswith(tuple(names)):
            continue
        start = time.monotonic()
        try:
            found = trace_run(run)
        except Exception as error:  # whatever this version of peft raises
            print(f"{run.name:58}left out: {type(error).__name__}: {error}", flush=True)
            continue
        _keep(run, found)
        figures = f"{run.reserved_bytes / GiB:9.3f}{found.reserved_bytes / GiB:9.3f}"
        error_share = found.reserved_bytes / run.reserved_bytes - 1
        print(f"{run.name:58}{figures}{error_share:+9.3%}{time.monotonic() - start:7.1f} s", flush=True)


def _keep(run: PeftRun, found: TracedRun) -> None:
    """Into the file, in place of what these versions gave before; a line per run."""
    results = load_traced() if TRACED.exists() else []
    versions = installed_versions()
    result = next((result for result in results if result["versions"] == versions), None)
    if result is None:
        result = {"versions": versions, "runs": {}}
        results.append(result)
        results.sort(key=lambda result: [int(part) for part in result["versions"]["transformers"].split(".")])
    result["runs"] = dict(sorted((result["runs"] | {run.name: asdict(found)}).items()))
    blocks = []
    for result in results:
        lines = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(run)}" for name, run in result["runs"].items()
        )
        blocks.append(f'  {{"versions": {json.dumps(result["versions"])}, "runs": {{\n{lines}\n  }}}}')
    partial = TRACED.with_suffix(".partial")
    partial.write_text("[\n" + ",\n".join(blocks) + "\n]\n", encoding="utf-8")
    partial.replace(TRACED)  # whole at any time, for those who read it meanwhile


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


if __name__ == "__main__":
    main(sys.argv[1:])
