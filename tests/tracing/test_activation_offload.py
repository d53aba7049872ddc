"""Offload of all activations, against TRL's own OffloadActivations on the same meta tensors, event by event."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from memplan.budget.estimate import estimate
from memplan.budget.host_sizes import pinned_bytes
from memplan.cli.planning import plan
from memplan.errors import JobError, TraceError, UnknownModel
from memplan.job.load import load_job
from memplan.model import architecture_from_config
from memplan.tracing import hf_loop
from memplan.tracing.activation_offload import TRANSFER_STREAM
from memplan.tracing.replaced import replaced
from memplan.tracing.writer import Traced, trace_job
from tracing.tiny import CONFIGS, job

DEEP = {"num_hidden_layers": 8, "n_layer": 8}
"""More blocks than saved tensors are kept for their copies."""

JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full": ("llama", "streams", {}),
    "lora, in line": ("qwen2, tied", "synchronous", {"method": "lora", "attention": "eager"}),
    "qlora": ("qwen3", "streams", {"method": "qlora", "dtype": "bfloat16"}),
    "checkpointed, autocast, accumulated": (
        "llama",
        "streams",
        {
            "activation_checkpointing": "full", "dtype": "float32", "autocast": "bfloat16",
            "gradient_accumulation_steps": 2,
        },
    ),
    "lora, checkpointed": ("gpt2", "streams", {"method": "lora", "activation_checkpointing": "full"}),
    "checkpointed, in line": ("llama", "synchronous", {"activation_checkpointing": "full"}),
    "two replicas, TRL's head": (
        "llama", "streams", {"method": "lora", "parallel__dp_replicate": 2, "loss": "chunked"}
    ),
}  # fmt: skip


class _Stream:
    """Of copies, or of the step."""

    def __init__(self, number: int = TRANSFER_STREAM) -> None:
        self.number = number

    def __getattr__(self, name: str) -> Any:  # waits and events
        return lambda *_: None


class Judge:
    """TRL's context manager in place of ours: its device is meta, its streams are numbers on the tape."""

    def __init__(self) -> None:
        self.pinned_peak_bytes = 0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        from trl.models import activation_offloading

        def make(recorder: Any, model: Any, *, streams: bool) -> Any:
            @contextmanager
            def on(stream: _Stream) -> Iterator[None]:
                outer = recorder.stream
                recorder.stream = lambda: stream.number
                yield
                recorder.stream = outer

            device = SimpleNamespace(
                Stream=_Stream, stream=on, current_stream=lambda: _Stream(0), empty_cache=lambda: None
            )

            def key_of(tensor: Any) -> Any:
                return recorder.id_of(tensor), tensor.storage_offset(), tensor.dtype

            changes: list[tuple[Any, str, Any]] = [
                (torch.accelerator, "current_accelerator", lambda: torch.device("meta")),
                (torch, "get_device_module", lambda _: device),
                (torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),
            ]
            self.lasting = [
                (activation_offloading, "_get_unique_tensor_key", key_of),
                (torch.Tensor, "record_stream", lambda tensor, _: recorder.record_stream(tensor)),
                (torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),
            ]
            with replaced(changes):
                offload = activation_offloading.get_act_offloading_ctx_manager(
                    model, use_pin_memory=False, use_streams=streams
                )
            pack = offload.pack_hook

            def counted(tensor: Any) -> Any:
                number = pack(tensor)
                waiting = sum(pinned_bytes(each[0].nbytes) for each in offload.tracker.values() if each[1])
                self.pinned_peak_bytes = max(self.pinned_peak_bytes, waiting)
                return number

            offload.pack_hook = counted
            stack.enter_context(replaced(self.lasting))
            offload.peak_bytes = 0
            return offload

        with (
            ExitStack() as stack,
            patch.object(hf_loop, "OffloadedActivations", make),
            patch.object(hf_loop, "leave_head", lambda _: None),
        ):
            yield


def what_happens(traced: Traced) -> list[tuple[int, int]]:
    """Sizes of allocations, and of frees below zero, in order, each with its stream; without marks of no bytes."""
    tape = traced.flatten()
    return [
        (tape.sizes[abs(event)] * (1 if event > 0 else -1), tape.streams.get(abs(event), 0))
        for event in tape.events
        if tape.sizes[abs(event)]
    ]


@pytest.mark.parametrize(("model", "mode", "settings"), JOBS.values(), ids=JOBS)
def test_what_moves_is_what_trl_moves(model: str, mode: str, settings: dict[str, Any]) -> None:
    """Same tensors, same order, same streams, same blocks handed over, same pinned memory."""
    pytest.importorskip("trl")
    config = CONFIGS[model] | (DEEP if settings.get("activation_checkpointing") else {})
    task = job(loop="hf_trainer", offload__activations=mode, **settings)
    ours = trace_job(task, config)
    judge = Judge()
    with judge.in_place():
        theirs = trace_job(task, config)

    assert what_happens(ours) == what_happens(theirs)
    assert len(ours.flatten().recorded) == len(theirs.flatten().recorded)
    assert ours.sizes.offloaded == judge.pinned_peak_bytes > 0


def test_it_takes_memory_of_the_host_in_place_of_the_gpus(tmp_path: Path) -> None:
    """Through the command's way to a plan, which leaves such a job to the trace."""
    config = CONFIGS["llama"] | {"num_hidden_layers": 12, "hidden_size": 128, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = [f"model={tmp_path / 'config.json'}", "loop=hf_trainer", "method=lora", "max_seq_len=512"]
    kept, moved = (
        plan(load_job(None, [*asked, f"offload.activations={mode}"])).result for mode in ("none", "streams")
    )

    assert (kept.engine["name"], moved.engine["name"]) == ("shape", "trace")
    assert moved.peak.allocated_bytes < 0.7 * kept.peak.allocated_bytes
    assert kept.host is not None and moved.host is not None
    (line,) = [line for line in moved.host.budget if line.category == "activations"]
    assert line.bytes > kept.peak.allocated_bytes - moved.peak.allocated_bytes


def test_values_that_are_known_come_back_with_their_tensor() -> None:
    """The mask of TRL's loss, large enough to be moved, selects what has a gradient."""
    pytest.importorskip("trl")
    task = job(loop="hf_trainer", offload__activations="streams", loss="chunked", max_seq_len=1024)
    assert trace_job(task, CONFIGS["llama"]).sizes.offloaded > 0


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"loop": "memplan"}, JobError, "which `loop: memplan` does not have"),
        ({"activation_checkpointing": "full", "activation_offload": True}, JobError, "`activation_offload` moves too"),
        ({"loss": "fused"}, TraceError, "by a trace alone, and `loss: fused` is not traced"),
        ({"parallel__strategy": "FULL_SHARD", "parallel__dp_shard": 2}, TraceError, "with sharded weights"),
    ],
)  # fmt: skip
def test_what_is_not_planned_is_refused(fields: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        trace_job(job(**{"loop": "hf_trainer", "offload__activations": "streams"} | fields), CONFIGS["llama"])


def test_the_shape_writer_leaves_it_to_the_trace() -> None:
    architecture = architecture_from_config(CONFIGS["llama"], name="tiny", source="test")
    with pytest.raises(UnknownModel, match="by a trace of the step alone"):
        estimate(job(loop="hf_trainer", offload__activations="streams"), architecture)
