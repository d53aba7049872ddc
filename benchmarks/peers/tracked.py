"""A model of transformers and peft in fake tensors, and what torch's MemTracker sees of two of its steps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

NUM_STEPS = 2
"""Optimizer states appear in the first."""


def tracked_peak_bytes(job: dict[str, Any], config: dict[str, Any], targets: list[str]) -> int:
    """The peak of live tensors over all devices."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    model = _build(job, config, targets)
    with FakeTensorMode():
        _to_fake(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        autocast = torch.autocast("cpu", torch.bfloat16) if job["autocast"] else nullcontext()
        with tracker:
            for _ in range(NUM_STEPS):
                tokens = torch.zeros(job["micro_batch_size"], job["max_seq_len"], dtype=torch.long)
                with autocast:
                    loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        peaks = tracker.get_tracker_snapshot("peak")
        return sum(peak["Total"] for peak in peaks.values())


def _build(job: dict[str, Any], config: dict[str, Any], targets: list[str]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    settings = AutoConfig.for_model(fields.pop("model_type"), **fields)
    settings.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            settings, dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
        )
        if job["method"] == "lora":
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=job["lora"]["rank"], target_modules=targets)
            model = get_peft_model(model, lora)
            model.enable_input_require_grads()
    if job["activation_checkpointing"] == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _to_fake(model: Any) -> None:
    """Every meta tensor becomes a fake one of the CPU, parameters that are shared staying so."""
    import torch

    fakes: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in fakes:
                data = torch.empty(parameter.shape, dtype=parameter.dtype)
                fakes[id(parameter)] = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
            setattr(module, name, fakes[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
