"""Offload of all activations, against TRL's own OffloadActivations on the same meta tensors, event by event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from memplan.budget.host_sizes import pinned_bytes
from memplan.cli.planning import plan
from memplan.errors import JobError, TraceError, UnknownModel
from memplan.job.load import load_job
from memplan.tracing import hf_loop
from memplan.tracing.activation_offload import TRANSFER_STREAM
from memplan.tracing.replaced import replaced
from memplan.tracing.writer import Traced, trace_job
from tracing.tiny import CONFIGS, job

WIDE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama", {}),
    "lora": ("llama", {"method": "lora"}),
    "lora, autocast, accumulated": (
        "llama",
        {"method": "lora", "autocast": "bfloat16", "gradient_accumulation_steps": 2},
    ),
    "qlora": ("qwen3", {"method": "qlora"}),
    "full, checkpointed, autocast": (
        "qwen2, tied",
        {"activation_checkpointing": "full", "dtype": "float32", "autocast": "bfloat16"},
    ),
    "lora, checkpointed": ("gpt2", {"method": "lora", "activation_checkpointing": "full"}),
    "eager attention": ("llama", {"attention": "eager"}),
    "two replicas": ("llama", {"method": "lora", "parallel__dp_replicate": 2}),
}


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

        from contextlib import ExitStack

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


@pytest.mark.parametrize("mode", ["streams", "synchronous"])
@pytest.mark.parametrize(("model", "settings"), JOBS.values(), ids=JOBS)
def test_what_moves_is_what_trl_moves(model: str, settings: dict[str, Any], mode: str) -> None:
    """Same tensors, same order, same streams, same blocks handed over, same pinned memory."""
    pytest.importorskip("trl")
    config = CONFIGS[model] | (WIDE if model != "gpt2" else {"n_embd": 128, "n_layer": 8})
    task = job(loop="hf_trainer", offload__activations=mode, max_seq_len=256, **settings)
    ours = trace_job(task, config)
    judge = Judge()
    with judge.in_place():
        theirs = trace_job(task, config)

    assert what_happens(ours) == what_happens(theirs)
    assert len(ours.flatten().recorded) == len(theirs.flatten().recorded)
    assert ours.sizes.offloaded == judge.pinned_peak_bytes > 0
