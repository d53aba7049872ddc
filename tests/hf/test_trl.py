"""TRL's SFTTrainer, whose head and loss are its own: traced as they run on a GPU, and planned by shape."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_trainers import config, model

from memplan.budget.estimate import estimate_written
from memplan.hf import preflight
from memplan.model import architecture_from_config
from memplan.tracing.estimate import estimate_traced

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")


def model_of(attention: str) -> Any:
    built = model(bos_token_id=None, eos_token_id=1, pad_token_id=0)
    built.set_attn_implementation(attention)
    return built


def sft_trainer(
    folder: Path, *, adapters: bool, batch: int, length: int, built: Any = None, **options: Any
) -> Any:
    """An SFTTrainer of a tiny model and rows of `length` tokens."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, "a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    arguments = trl.SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=batch, report_to=[], use_cpu=True,
        dataset_kwargs={"skip_prepare_dataset": True}, **{"max_length": length} | options,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=built or model_of("sdpa"), args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [[2] * length] * (2 * batch)}), processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if adapters else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("adapters", "autocast", "checkpointing", "batch", "length"),
    [(False, True, True, 2, 256), (True, True, False, 9, 512), (True, False, True, 1, 300)],
)
def test_its_trace_on_a_gpu_is_its_plan_by_shape(
    tmp_path: Path, adapters: bool, autocast: bool, checkpointing: bool, batch: int, length: int
) -> None:
    """Two kinds of operands, one tile of tokens and two."""
    run = sft_trainer(
        tmp_path,
        adapters=adapters,
        batch=batch,
        length=length,
        bf16=autocast,
        gradient_checkpointing=checkpointing,
    )
    planned, traced = preflight(run, gpu="24GB"), preflight(run, gpu="24GB", engine="trace")

    assert planned.result.engine["name"] == "shape" and not planned.reasons
    assert planned.result.job is not None and planned.result.job.loss == "chunked"
    assert traced.peak_bytes == planned.peak_bytes
    assert traced.result.peak.reserved_bytes == planned.result.peak.reserved_bytes


def test_on_the_cpu_it_is_traced(tmp_path: Path) -> None:
    """There the head runs in code of its own, which holds more."""
    plan = preflight(sft_trainer(tmp_path, adapters=False, batch=1, length=64))

    assert any("SFTTrainer.compute_loss" in reason for reason in plan.reasons)


def test_a_trainer_made_of_it_is_traced(tmp_path: Path) -> None:
    """A loss of one's own is not TRL's."""

    class Mine(trl.SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    run = sft_trainer(tmp_path, adapters=False, batch=1, length=64)
    run.__class__ = Mine

    assert any("Mine.compute_loss" in reason for reason in preflight(run, gpu="24GB").reasons)


def test_other_kernels_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version whose kernels are not known is traced as it runs without Triton."""
    from trl.kernels import chunked_logprob

    run = sft_trainer(tmp_path, adapters=False, batch=1, length=64)
    known = preflight(run, gpu="24GB", engine="trace")
    monkeypatch.delattr(chunked_logprob, "_forward_kernel")
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 2048)
    other = preflight(run, gpu="24GB")

    assert not any("other kernels" in note for note in known.result.warnings)
    assert any("other kernels than 1.16" in note for note in other.result.warnings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batches_without_padding_are_one_row_under_a_mask(tmp_path: Path, attention: str) -> None:
    """Positions in place of the collator's mask, and a mask of (1, 1, B x S, B x S) in every step."""
    settings: dict[str, Any] = {"adapters": False, "batch": 3, "length": 200}
    made = model_of(attention)
    padded = preflight(sft_trainer(tmp_path, **settings, built=made), gpu="24GB")
    traced = preflight(
        sft_trainer(tmp_path, **settings, built=made, padding_free=True, max_length=None),
        gpu="24GB",
        engine="trace",
    )
    job = padded.result.job
    assert job is not None
    architecture = architecture_from_config(made.config.to_dict(), name="tiny", source="test")
    planned = estimate_written(job.replace(padding_free=True), architecture)[1]

    assert planned.peak.allocated_bytes == traced.peak_bytes > padded.peak_bytes
    assert planned.peak.reserved_bytes == traced.result.peak.reserved_bytes


def test_its_offload_of_activations_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job's is, whose head and loss are TRL's; the context manager itself needs a GPU to be made."""
    device = SimpleNamespace(Stream=lambda: None)
    options = {"adapters": True, "batch": 2, "length": 256, "gradient_checkpointing": False}
    kept = preflight(sft_trainer(tmp_path, **options), gpu="24GB")
    with monkeypatch.context() as patched:
        patched.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("meta"))
        patched.setattr(torch, "get_device_module", lambda *_: device)
        run = sft_trainer(tmp_path, activation_offloading=True, **options)
    moved = preflight(run, gpu="24GB")

    assert moved.reasons == ("`activation_offloading`",) and moved.result.engine["name"] == "trace"
    assert kept.result.job is not None
    job = kept.result.job.replace(**{"offload.activations": "streams"})
    described = config(bos_token_id=None, eos_token_id=1, pad_token_id=0).to_dict()
    planned = estimate_traced(job, described | {"architectures": ["LlamaForCausalLM"]})[1]
    assert moved.peak_bytes == planned.peak.allocated_bytes < kept.peak_bytes
